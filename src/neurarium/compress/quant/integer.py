"""The operations of an integer network, and the network that strings them together.

Every operation takes and gives integer tensors and has only integer buffers. Products accumulate in int32 (int8 times int8 through
torch's integer matrix product), rescaling multiplies by a dyadic number in int64, averages are sums whose 1 / n is part of the next
rescaling. Scales are known when the network is built, so none is left when it runs.

A convolution cuts its input into patches. The codes of unsigned 8-bit activations do not fit int8: they are shifted down by 128 and the
accumulator gets 128 times the sum of the weights back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.quant.fixedpoint import Dyadic
from neurarium.compress.quant.packing import pack, unpack
from neurarium.errors import BadInput

__all__ = [
    "Constant", "Dilate", "IntegerCore", "IntegerNetwork", "Leaky", "MaxPool", "Product", "Replay", "Rescale", "Slot", "SumPool",
    "Upsample", "count_float_ops",
]  # fmt: skip


class Product(nn.Module):
    """Convolution (of any number of dimensions) or linear layer: int32 accumulators of activation codes times weight codes, plus a bias."""

    codes: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, bits: int, *, unsigned: bool, stride: Sequence[int] = (), dilation: Sequence[int] = (),
        padding: Sequence[int] = (), groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits, self.shape, self.unsigned = bits, tuple(weight.shape), unsigned
        self.stride, self.dilation, self.padding, self.groups = tuple(stride), tuple(dilation), tuple(padding), groups
        self.register_buffer("codes", weight.to(torch.int8) if bits == 8 else pack(weight, bits, signed=True))
        self.register_buffer("bias", bias.to(torch.int32))

    def weight(self) -> Tensor:
        """The weight's codes, int8."""
        if self.bits == 8:
            return self.codes
        return unpack(self.codes, self.bits, math.prod(self.shape), signed=True).to(torch.int8).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight()
        zero = 128 if self.unsigned else 0
        x = (x.to(torch.int32) - zero).to(torch.int8)
        bias = self.bias + zero * w.flatten(1).sum(1, dtype=torch.int32)
        if not self.stride:
            return torch._int_mm(x.reshape(-1, x.shape[-1]), w.T).view(*x.shape[:-1], len(w)) + bias
        n = len(self.stride)
        x = torch.constant_pad_nd(x, self.padding, -zero)  # F.pad would hand on a float
        for i, (size, stride, dilation) in enumerate(zip(self.shape[2:], self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        batch, out = x.shape[0], x.shape[2 : 2 + n]
        bias = bias.view(-1, *[1] * n)
        if self.groups > 8:
            return self._taps(x.to(torch.int32), w.to(torch.int32)) + bias
        x = x.reshape(batch, self.groups, -1, *x.shape[2:])  # (batch, groups, channels, *out, *taps)
        order = (1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
        rows = x.permute(order).reshape(self.groups, batch * math.prod(out), -1)
        parts = [torch._int_mm(a, b.flatten(1).T) for a, b in zip(rows, w.chunk(self.groups), strict=True)]
        return torch.cat(parts, 1).view(batch, *out, -1).movedim(-1, 1).contiguous() + bias

    def _taps(self, x: Tensor, w: Tensor) -> Tensor:
        """Many small groups (depthwise): one multiply-add of whole maps for each weight of a filter."""
        n = len(self.stride)
        x = x.reshape(x.shape[0], self.groups, 1, -1, *x.shape[2:]).flatten(4 + n).movedim(-1, 4)  # (b, g, 1, c, taps, *out)
        w = w.view(self.groups, -1, w.shape[1], math.prod(self.shape[2:]), *[1] * n)  # (g, out / g, c, taps, 1...)
        acc = torch.zeros((), dtype=torch.int32, device=x.device)
        for c in range(w.shape[2]):
            for tap in range(w.shape[3]):
                acc = acc + x[:, :, :, c, tap] * w[:, :, c, tap]
        return acc.flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.shape}, bits={self.bits}, unsigned={self.unsigned}"


class Rescale(nn.Module):
    """clip((x m + b + 2^(e-1)) >> e): to the next scale, and where there is an offset b, to another zero.

    ``factor`` holds the real numbers that m / 2^e stands for, for those who want to know; nothing computes with them.
    """

    multiplier: Tensor
    shift: Tensor
    offset: Tensor | None

    def __init__(
        self, dyadic: Dyadic, low: int, high: int, *, axis: int | None = None, offset: Tensor | None = None, factor: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.low, self.high, self.axis, self.factor = low, high, axis, tuple(factor)
        self.register_buffer("multiplier", dyadic.multiplier.clone())
        self.register_buffer("shift", dyadic.shift.clone())
        self.register_buffer("offset", offset)
        self.dtype = torch.int8 if low >= -128 and high <= 127 else torch.uint8 if low >= 0 and high <= 255 else torch.int32

    def forward(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return Dyadic(self.multiplier, self.shift).rescale(x, low=self.low, high=self.high, axis=self.axis).to(self.dtype)
        shape = [1] * x.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        m, e, b = (t.view(shape) for t in (self.multiplier, self.shift, self.offset))
        half = torch.bitwise_left_shift(torch.ones_like(e), e - 1)
        return torch.clamp(torch.bitwise_right_shift(x.to(torch.int64) * m + b + half, e), self.low, self.high).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.low}..{self.high}, axis={self.axis}"


class Leaky(nn.Module):
    """x where it is positive, else x rescaled."""

    def __init__(self, negative: Rescale) -> None:
        super().__init__()
        self.negative = negative

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.int32)
        return torch.where(x >= 0, x, self.negative(x))


class MaxPool(nn.Module):
    """Largest code of each window of a map."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> None:
        super().__init__()
        self.options = (kernel, stride, padding, dilation, ceil)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.to(torch.int32), *self.options)


class SumPool(nn.Module):
    """Sum over windows, or over whole dimensions of a known size."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (), *, dims: Sequence[int] = (),
                 keep: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.kernel, self.stride, self.padding, self.dims, self.keep = tuple(kernel), tuple(stride), tuple(padding), tuple(dims), keep

    def forward(self, x: Tensor) -> Tensor:
        if self.dims:
            if tuple(x.shape[d] for d in self.dims) != self.kernel:
                raise BadInput(f"this integer network averages {self.kernel} values, the input of that size gives {tuple(x.shape)}")
            return x.sum(self.dims, keepdim=self.keep, dtype=torch.int32)
        x = torch.constant_pad_nd(x.to(torch.int32), self.padding, 0)
        first = x.ndim - len(self.kernel)
        for i, (size, stride) in enumerate(zip(self.kernel, self.stride, strict=True)):
            x = x.unfold(first + i, size, stride)
        return x.sum(tuple(range(-len(self.kernel), 0)), dtype=torch.int32)


class Upsample(nn.Module):
    """Every pixel several times."""

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)

    def forward(self, x: Tensor) -> Tensor:
        for i, factor in enumerate(self.factors):
            x = x.repeat_interleave(factor, 2 + i)
        return x


class Dilate(nn.Module):
    """Zeros between the pixels: the first half of a transposed convolution."""

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)

    def forward(self, x: Tensor) -> Tensor:
        for i, factor in enumerate(self.factors, 2):
            x = torch.constant_pad_nd(x.unsqueeze(i + 1), (0, 0) * (x.ndim - i - 1) + (0, factor - 1), 0).flatten(i, i + 1)
            x = x.narrow(i, 0, x.shape[i] - factor + 1)
        return x


class Constant(nn.Module):
    """A constant of the model, on the scale of what it meets."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.to(torch.int32))

    def forward(self) -> Tensor:
        return self.value


class Slot:
    """The place of a value in the arguments of a :class:`Replay`."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"<{self.index}>"


class Replay(nn.Module):
    """A function, or a method of the first argument, that means the same for integers: reshaping, adding, comparing, sizes."""

    def __init__(self, target: Callable[..., Any] | str | nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.target, self.args, self.kwargs = target, args, kwargs

    def forward(self, *values: Any) -> Any:
        args, kwargs = _filled((tuple(self.args), dict(self.kwargs)), values)
        return getattr(args[0], self.target)(*args[1:], **kwargs) if isinstance(self.target, str) else self.target(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{getattr(self.target, '__name__', self.target)}, {self.args}"


def _filled(value: Any, values: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, tuple | list):
        return type(value)(_filled(v, values) for v in value)
    if isinstance(value, dict):
        return {k: _filled(v, values) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_filled(v, values) for v in (value.start, value.stop, value.step)))
    return value


class IntegerCore(nn.Module):
    """Integers in, integers out.

    Attributes:
        steps: the operations in order.
        wiring: for each step the places of its inputs: network inputs first, then one place a step.
        outputs: places of the results.
        names: for each step the layer or function of the model that it comes from.
    """

    def __init__(self, inputs: int, steps: Sequence[nn.Module], wiring: Sequence[Sequence[int]], outputs: Sequence[int],
                 names: Sequence[str]) -> None:  # fmt: skip
        super().__init__()
        self.inputs, self.steps, self.names = inputs, nn.ModuleList(steps), tuple(names)
        self.wiring, self.outputs = tuple(map(tuple, wiring)), tuple(outputs)
        last = {place: i for i, places in enumerate(self.wiring) for place in places}
        self._free = tuple(tuple(p for p, at in last.items() if at == i and p not in self.outputs) for i in range(len(self.wiring)))

    def forward(self, *codes: Tensor) -> tuple[Tensor, ...]:
        values: list[Any] = list(codes)
        for step, places, done in zip(self.steps, self.wiring, self._free, strict=True):
            values.append(step(*(values[p] for p in places)))
            for p in done:
                values[p] = None
        return tuple(values[p] for p in self.outputs)


class IntegerNetwork(nn.Module):
    """A network that computes with integers between its entry (float to codes) and its exit (codes to float).

    Attributes:
        core: the integer part; ``core(*network.encode(x))`` is a tuple of int32 codes.
        entry, exit: scales of the inputs and of the outputs (buffers ``0``, ``1``, ...).
        ranges: (low, high) of the codes of each input.
        plan: bits of each layer.
    """

    plan: BitPlan

    def __init__(self, core: IntegerCore, entry: Sequence[Tensor], ranges: Sequence[tuple[int, int]], exit: Sequence[Tensor],
                 single: bool, plan: BitPlan) -> None:  # fmt: skip
        super().__init__()
        self.core, self.ranges, self.single, self.plan = core, tuple(ranges), single, plan
        self.entry, self.exit = nn.Module(), nn.Module()
        for side, scales in ((self.entry, entry), (self.exit, exit)):
            for i, scale in enumerate(scales):
                side.register_buffer(str(i), scale.float())

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The integer codes of the inputs."""
        if len(inputs) != len(self.ranges):
            raise BadInput(f"the network takes {len(self.ranges)} inputs, got {len(inputs)}")
        scales = self.entry.buffers()
        pairs = zip(inputs, scales, self.ranges, strict=True)
        return tuple(torch.clamp(torch.round(x / s.to(x.dtype)), low, high).to(torch.int32) for x, s, (low, high) in pairs)

    def forward(self, *inputs: Tensor) -> Any:
        codes = self.core(*self.encode(*inputs))
        values = tuple(c * s for c, s in zip(codes, self.exit.buffers(), strict=True))
        return values[0] if self.single else values


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(_is_float, tree_leaves((args, kwargs, out)))):
            self.found.append(str(func))
        return out


def _is_float(value: Any) -> bool:
    return isinstance(value, float | complex) or (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()))


def count_float_ops(module: nn.Module, *inputs: Tensor, exported: bool = False) -> int:
    """How many operations of one forward pass read or write a floating-point number.

    Args:
        module: an :class:`IntegerNetwork`'s ``core`` with its codes, or any other module.
        exported: look at the graph that ``torch.export`` captures instead of watching every call of an operator.
    """
    if not exported:
        with torch.no_grad(), _Watch() as watch:
            module(*inputs)
        return len(watch.found)
    graph = torch.export.export(module, inputs).graph
    calls = [n for n in graph.nodes if n.op == "call_function"]
    return sum(any(map(_is_float, tree_leaves((_values(n.args), _values(n.kwargs), n.meta.get("val"))))) for n in calls)


def _values(arguments: Any) -> Any:
    return torch.fx.node.map_arg(arguments, lambda n: n.meta.get("val"))
