"""HAWQ-V3: a whole network in integers, whose scales are dyadic numbers m / 2^e.

Weights are w = s_w q_w with one s_w = max |w| / (2^(b-1) - 1) an output channel, activations x = s_x q_x with one s_x a tensor, found on
calibration data (codes 0 .. 2^b - 1 where nothing is negative, else symmetric). BatchNorm is first folded into the layer before it. Then

    acc = sum q_w q_x + round(b / (s_w s_x))          int32,         acc s_w s_x is the layer's output,
    q_y = clip((acc m + 2^(e-1)) >> e),  m / 2^e = s_w s_x / s_y     multiply, add, shift.

Division and floating point never occur between entry and exit. A residual sum brings each branch to the sum's scale by a dyadic number
of its own and adds integers, a concatenation likewise, an average is a sum whose 1 / n is in the next m. ReLU and maximum work on codes
as they are. These sums carry 16 bits (one of them headroom for inputs beyond the calibration data), layers' inputs the bits of the plan.

The network is traced with ``torch.fx`` and compiled node by node: Conv, ConvTranspose and Linear, BatchNorm anywhere, ReLU, ReLU6,
LeakyReLU, addition, subtraction and products of tensors, concatenation, maximum and average pooling, nearest upsampling, reshaping. What
has no integer form (softmax, GELU, LayerNorm, embeddings, ...) is refused with the name of its layer.

*Source*: "HAWQ-V3: Dyadic Neural Network Quantization", arXiv 2011.10680, sections 3.1 to 3.3.
*Departures*: ranges are the extremes of the calibration data; averages are rounded to nearest. Outputs are rescaled to 16-bit codes of one
scale, so that the class is the largest integer.
*Cost*: two passes over the calibration data. The result runs on the CPU, its 8-bit products on the processor's integer units.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.quant import integer as ops
from neurarium.compress.quant.fixedpoint import Dyadic, dyadic
from neurarium.compress.quant.fold import affine_of, fold_batchnorm, trace
from neurarium.compress.quant.integer import IntegerCore, IntegerNetwork, Replay, Rescale, Slot
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["quantize_integer"]

_WIDE = 16  # bits of sums
_ENTRY = 8  # bits of the network's inputs
_INT32 = 2**31 - 1
_IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_SHAPES = {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split,
           torch.narrow, operator.getitem, getattr}  # fmt: skip
_SHAPE_METHODS = {"flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "narrow", "contiguous",
                  "size", "dim", "expand"}  # fmt: skip
_SHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle)


def quantize_integer(
    model: nn.Module, loader: Iterable, *, bits: int | BitPlan = 8, act_bits: int | None = None, example: Tensor | tuple | None = None
) -> IntegerNetwork:
    """The network in integers.

    Args:
        model: a network of tensors that ``torch.fx`` can trace; it is taken in eval mode and stays as it is.
        loader: calibration batches ``x`` or ``(x, y)``.
        bits: of weights and layer inputs, 2 to 8; or a plan by layer (layers that it leaves out get 8).
        act_bits: of layer inputs, where `bits` is a number and they differ.
        example: an input or a tuple of inputs that gives the spatial size; default: the first batch.

    Raises:
        UnsupportedModel: a layer has no integer form, or its sums may not fit 32 bits; the message names it.
    """
    if not isinstance(bits, BitPlan):
        pair = (bits, bits if act_bits is None else act_bits)
        if not all(isinstance(b, int) and 2 <= b <= 8 for b in pair):
            raise BadInput(f"an integer network has 2 to 8 bits, got {pair}")
    elif bad := [name for name, pair in bits.bits.items() if not all(2 <= b <= 8 for b in pair)]:
        raise BadInput(f"{bad[0]}: an integer network has 2 to 8 bits, the plan says {bits.bits[bad[0]]}")
    else:
        bits.check(model)
    try:
        folded = fold_batchnorm(model).cpu().float()
    except UnsupportedModel as error:
        _blame(model, error)
        raise
    graph = trace(folded)
    compiler = _Compiler(folded, graph)
    compiler.check()
    batches = [tuple(map(_plain, _inputs(batch, i))) for i, batch in enumerate(loader)]
    if not batches:
        raise BadInput("the calibration loader is empty")
    first = batches[0] if example is None else tuple(map(_plain, (example,) if isinstance(example, Tensor) else example))
    record = _Record(folded, graph)
    for i, batch in enumerate(batches):
        record.watch(batch, f"batch {i} of the calibration loader")
    record.shapes(first)
    names = [str(n.target) for n in graph.nodes if n.op == "call_module" and isinstance(compiler.modules[n.target], _ConvNd | nn.Linear)]
    if not names:
        raise UnsupportedModel("has no convolution or linear layer", module=type(model).__name__)
    if isinstance(bits, BitPlan):
        chosen = {name: tuple(bits.bits.get(name, (8, 8))) for name in names}
        plan = BitPlan(chosen, dict(bits.perturbation), bits.cost, dict(bits.skipped))  # type: ignore[arg-type]
    else:
        plan = BitPlan(dict.fromkeys(names, pair))
    return compiler.compile(plan, record)


def _inputs(batch: Any, index: int) -> tuple[Any, ...]:
    if isinstance(batch, Mapping):
        raise BadInput(f"batch {index} of the calibration loader is a mapping; an integer network takes tensors")
    return (batch[0] if isinstance(batch, tuple | list) else batch,)


def _plain(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise BadInput(f"an input of an integer network must be a tensor, got a {type(x).__name__}")
    return x.cpu().float() if x.is_floating_point() else x.cpu()


def _blame(model: nn.Module, error: UnsupportedModel) -> None:
    """Where the trace fails, the first layer that would be refused anyway is the better message."""
    for name, module in model.named_modules():
        if next(module.children(), None) is None and name and _module_handler(module) is None:
            raise UnsupportedModel(f"{type(module).__name__} has no integer form", module=name) from error


class _Record(fx.Interpreter):
    """Extremes and shapes of every value of the graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self._only_shapes, self._what = False, ""

    def watch(self, inputs: tuple[Tensor, ...], what: str) -> None:
        if any(not x.numel() or (x.is_floating_point() and not torch.isfinite(x).all()) for x in inputs):
            raise BadInput(f"{what} is empty or has values that are not finite")
        self._what = what
        with torch.no_grad():
            self.run(*inputs)

    def shapes(self, inputs: tuple[Tensor, ...]) -> None:
        self._only_shapes = True
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.shape[n.name] = tuple(out.shape)
            if not self._only_shapes:
                low, high = (float(v) for v in out.aminmax())
                if not math.isfinite(low) or not math.isfinite(high):
                    raise BadInput(f"{n.target}: its output is not finite on {self._what}")
                self.low[n.name], self.high[n.name] = min(low, self.low.get(n.name, low)), max(high, self.high.get(n.name, high))
        return out


@dataclass(frozen=True)
class _Value:
    """A value of the program: its place, what one code is worth (a number, or one a channel along `axis`) and the codes' bounds."""

    place: int
    scale: Tensor
    low: int
    high: int
    axis: int | None = None


Handler = Callable[["_Compiler", fx.Node, Any], Any]


class _Compiler:
    """Turns a graph into steps, one node after the other."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.steps: list[nn.Module] = []
        self.wiring: list[tuple[int, ...]] = []
        self.names: list[str] = []
        self.values: dict[fx.Node, Any] = {}  # _Value, or a place (int) where a value is no tensor
        self.cache: dict[tuple[Any, ...], _Value] = {}

    def check(self) -> None:
        """Refuses what no handler knows, before anything is computed."""
        layers = [n for n in self.graph.nodes if n.op == "call_module"]
        for node in layers + [n for n in self.graph.nodes if n.op in ("call_function", "call_method")]:
            if self._handler(node) is None:
                what = type(self.modules[node.target]).__name__ if node.op == "call_module" else _title(node.target)
                raise UnsupportedModel(f"{what} has no integer form", module=self._where(node))

    def compile(self, plan: BitPlan, record: _Record) -> IntegerNetwork:
        self.plan, self.record = plan, record
        entry: list[Tensor] = []
        ranges: list[tuple[int, int]] = []
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.inputs = len(inputs)
        for i, node in enumerate(inputs):
            if node.name not in record.low:
                raise UnsupportedModel(f"input {node.target!r} is no tensor", module=type(self.model).__name__)
            scale, low, high = _grid(record.low[node.name], record.high[node.name], _ENTRY)
            scale = scale.float().double()  # as it is stored
            entry.append(scale), ranges.append((low, high))
            self.values[node] = _Value(i, scale, low, high)
        for node in self.graph.nodes:
            self.node = node
            if node.op == "get_attr":
                self.values[node] = _attribute(self.model, str(node.target))
            elif node.op == "output":
                result = node.args[0]
            elif node.op != "placeholder":
                handler = self._handler(node)
                assert handler is not None
                self.values[node] = handler(self, node, self.modules.get(str(node.target)))
        single = isinstance(result, fx.Node)
        results = (result,) if single else result
        if not isinstance(results, tuple | list) or not all(isinstance(self.values.get(n), _Value) for n in results):
            raise UnsupportedModel("an integer network returns a tensor or a tuple of tensors", module=type(self.model).__name__)
        exits = [self.wide(self.values[n], n) for n in results]
        core = IntegerCore(self.inputs, self.steps, self.wiring, [v.place for v in exits], self.names)
        return IntegerNetwork(core, entry, ranges, [v.scale for v in exits], single, plan).eval()

    # values

    def emit(self, step: nn.Module, *places: int) -> int:
        self.steps.append(step.eval()), self.wiring.append(places), self.names.append(self._where(self.node))
        return self.inputs + len(self.steps) - 1

    def value(self, argument: Any) -> _Value:
        """The integer tensor of an argument."""
        value = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(value, _Value):
            raise UnsupportedModel(f"{_title(self.node.target)} of {argument} has no integer form", module=self._where(self.node))
        return value

    def rescaled(self, v: _Value, scale: Tensor, low: int, high: int) -> _Value:
        """The value at another scale (a number), clipped."""
        if v.axis is None and torch.equal(v.scale, scale) and low <= v.low and v.high <= high:
            return v
        key = (v.place, float(scale), low, high)
        if key not in self.cache:
            factor = v.scale / scale
            if float(factor.max()) >= 2.0**30:
                raise UnsupportedModel("its output is far larger than what it is added to or put into", module=self._where(self.node))
            step = Rescale(dyadic(factor), low, high, axis=v.axis, factor=factor.reshape(-1).tolist())
            self.cache[key] = _Value(self.emit(step, v.place), scale, low, high)
        return self.cache[key]

    def narrow(self, v: _Value, node: fx.Node, bits: int, scale: Tensor | None = None) -> _Value:
        """As codes of few bits, on the range of a node of the model."""
        own, low, high = _grid(self.record.low[node.name], self.record.high[node.name], bits)
        return self.rescaled(v, own if scale is None else scale, low, high)

    def wide_scale(self, node: fx.Node) -> tuple[Tensor, int]:
        top = 2 ** (_WIDE - 1) - 1
        largest = max(abs(self.record.low[node.name]), abs(self.record.high[node.name]))
        return torch.tensor((2 * largest or 1.0) / top, dtype=torch.float64).float().double(), top

    def wide(self, v: _Value, node: fx.Node) -> _Value:
        """As 16-bit codes of one scale, with a bit of headroom."""
        scale, top = self.wide_scale(node)
        return self.rescaled(v, scale, -top, top)

    def flat(self, v: _Value, node: fx.Node) -> _Value:
        """With one scale for all, whatever it is."""
        return v if v.axis is None else self.wide(v, node)

    # places of the graph

    def _where(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        names = [entry[0] for entry in stack.values()]
        return f"{names[-1]}.{node.name}".lstrip(".") if names else node.name

    def _handler(self, node: fx.Node) -> Handler | None:
        if node.op == "call_module":
            return _module_handler(self.modules[node.target])
        table = _FUNCTIONS if node.op == "call_function" else _METHODS
        return table.get(node.target)


def _title(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _grid(low: float, high: float, bits: int) -> tuple[Tensor, int, int]:
    """Scale and codes: unsigned where nothing is negative."""
    top = 2**bits - 1 if low >= 0 else 2 ** (bits - 1) - 1
    scale = max(abs(low), abs(high)) / top
    return torch.tensor(scale if scale > 0 else 1.0, dtype=torch.float64), 0 if low >= 0 else -top, top


# layers


def _layer(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    """A convolution, a transposed one, or a linear layer."""
    name, (w_bits, a_bits) = str(node.target), c.plan.bits[str(node.target)]
    source = node.args[0]
    x = c.narrow(c.value(source), source, a_bits, _trained_scale(m, a_bits, c.record.low[source.name] >= 0))
    weight = m.weight.detach().double()
    bias = torch.zeros(0, dtype=torch.float64) if m.bias is None else m.bias.detach().double()
    options: dict[str, Any] = {}
    if isinstance(m, _ConvNd):
        if m.padding_mode != "zeros":
            raise UnsupportedModel(f"padding with {m.padding_mode!r} has no integer form here", module=name)
        options = {"stride": m.stride, "dilation": m.dilation, "padding": m._reversed_padding_repeated_twice, "groups": m.groups}
    if isinstance(m, _ConvTransposeNd):
        if len(node.args) > 1 or node.kwargs:
            raise UnsupportedModel("an output size given at run time has no integer form here", module=name)
        g, n = m.groups, len(m.stride)
        weight = weight.view(g, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + n)))
        padding: list[int] = []
        for k, p, o, d in zip(m.kernel_size, m.padding, m.output_padding, m.dilation, strict=True):
            padding = [d * (k - 1) - p, d * (k - 1) - p + o, *padding]
        options |= {"stride": (1,) * n, "padding": padding}
        if any(s > 1 for s in m.stride):
            x = _Value(c.emit(ops.Dilate(m.stride), x.place), x.scale, min(x.low, 0), max(x.high, 0))
    if not torch.isfinite(weight).all() or not torch.isfinite(bias).all():
        raise BadInput(f"{name}: its weights are not finite")
    top, out = 2 ** (w_bits - 1) - 1, len(weight)
    scale = weight.flatten(1).abs().amax(1) / top
    if len(bias):  # a channel of tiny weights gets a step that lets its bias fit
        scale = torch.maximum(scale, bias.abs() / (x.scale * 2.0**30))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.clamp(torch.round(weight / scale.view(-1, *[1] * (weight.ndim - 1))), -top, top).to(torch.int64)
    offset = torch.round(bias / (scale * x.scale)).to(torch.int64) if len(bias) else torch.zeros(out, dtype=torch.int64)
    bound = int((codes.abs().flatten(1).sum(1) * max(x.high, -x.low) + offset.abs()).max())
    if bound > _INT32:
        raise UnsupportedModel(f"sums of up to {bound} do not fit 32 bits: give it fewer bits", module=name)
    unsigned = x.low >= 0 and x.high > 127
    step = ops.Product(codes, offset, w_bits, unsigned=unsigned, **options)
    return _Value(c.emit(step, x.place), scale * x.scale, -bound, bound, 1 if options else -1)


def _trained_scale(m: nn.Module, bits: int, unsigned: bool) -> Tensor | None:
    """The input scale that a layer was trained with, if that was for these bits."""
    scale = getattr(m, "input_scale", None)
    if scale is None or m.input_bits != bits or m.input_unsigned != unsigned:
        return None
    return scale.detach().double()


def _norm(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    v = c.value(node.args[0])
    factor, shift = affine_of(m)
    scale, top = c.wide_scale(node)
    if v.axis not in (None, 1):
        v = c.flat(v, node.args[0])
    a, b = (factor * v.scale / scale).expand_as(factor), shift / scale
    exponent = (31 - torch.frexp(a).exponent.long()).clamp(1, 62)
    exponent = torch.minimum(exponent, 60 - torch.frexp(b).exponent.long()).clamp(1, 62)
    multiplier = torch.floor(torch.ldexp(a, exponent) + 0.5).to(torch.int64)
    offset = torch.floor(torch.ldexp(b, exponent) + 0.5).to(torch.int64)
    if int(multiplier.abs().max()) > 2**31 or int(offset.abs().max()) > 2**61:
        raise UnsupportedModel("its factors are too large for 64-bit arithmetic", module=str(node.target))
    step = Rescale(Dyadic(multiplier, exponent), -top, top, axis=1, offset=offset, factor=(*a.tolist(), *b.tolist()))
    return _Value(c.emit(step, v.place), scale, -top, top)


# pointwise


def _same(c: _Compiler, node: fx.Node, m: Any) -> Any:
    return c.values[node.args[0]]


def _clamped(c: _Compiler, v: _Value, low: float | None, high: float | None, node: fx.Node) -> _Value:
    """Clipped to real numbers, which lie on the grid to half a step."""
    if high is not None or low not in (0, None):
        v = c.flat(v, node)
    ends = [None if end is None else round(end / float(v.scale)) if end else 0 for end in (low, high)]
    step = Replay(torch.clamp, (Slot(0), *ends), {})
    low_code, high_code = (v.low if ends[0] is None else max(v.low, ends[0])), (v.high if ends[1] is None else min(v.high, ends[1]))
    return _Value(c.emit(step, v.place), v.scale, min(low_code, high_code), high_code, v.axis)


def _relu(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    return _clamped(c, c.value(node.args[0]), 0, None, node.args[0])


def _clip(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    if m is not None:
        low, high = m.min_val, m.max_val
    else:
        given = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
        low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
        if node.target is F.relu6:
            low, high = 0.0, 6.0
        if any(isinstance(end, fx.Node) for end in (low, high)):
            raise UnsupportedModel("clipping to a tensor has no integer form here", module=c._where(node))
    return _clamped(c, c.value(node.args[0]), low, high, node.args[0])


def _leaky(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    slope = m.negative_slope if m is not None else node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    v = c.value(node.args[0])
    if not 0 < slope <= 1:
        raise UnsupportedModel(f"a negative slope of {slope} has no integer form here", module=c._where(node))
    step = ops.Leaky(Rescale(dyadic(slope), v.low, v.high, factor=(slope,)))
    return _Value(c.emit(step, v.place), v.scale, v.low, v.high, v.axis)


def _sum(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    """Tensors, or a tensor and a constant, added (or subtracted) at the scale of the sum."""
    minus = node.target in (operator.sub, operator.isub, torch.sub, "sub", "sub_")
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        raise UnsupportedModel("a weighted sum has no integer form here", module=c._where(node))
    scale, top = c.wide_scale(node)
    places, low, high = [], 0, 0
    for sign, argument in zip((1, -1 if minus else 1), node.args, strict=True):
        known = c.values.get(argument, argument) if isinstance(argument, fx.Node) else argument
        if (isinstance(known, Tensor | int | float) and not isinstance(argument, fx.Node | bool)) or isinstance(known, Tensor):
            value = torch.round(torch.as_tensor(known).detach().double() / scale).clamp(-_INT32, _INT32)
            v = _Value(c.emit(ops.Constant(value)), scale, int(value.min()), int(value.max()))
        else:
            v = c.rescaled(c.value(argument), scale, -2 * top, 2 * top)
        places.append(v.place)
        low, high = low + min(sign * v.low, sign * v.high), high + max(sign * v.low, sign * v.high)
    if high > _INT32 or low < -_INT32:
        raise UnsupportedModel("a constant is too large for the sum that it is in", module=c._where(node))
    step = Replay(torch.sub if minus else torch.add, (Slot(0), Slot(1)), {})
    return _Value(c.emit(step, *places), scale, low, high)


def _product(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    """Two tensors, or a tensor and a positive number."""
    inverse = node.target in (operator.truediv, operator.itruediv, torch.div, "div", "div_")
    if node.target is operator.floordiv or node.kwargs or len(node.args) != 2:
        raise UnsupportedModel(f"{_title(node.target)} of tensors has no integer form here", module=c._where(node))
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) and not inverse:
        first, second = second, first
    v = c.value(first)
    if isinstance(second, int | float) and second > 0:
        return _Value(v.place, v.scale / second if inverse else v.scale * second, v.low, v.high, v.axis)
    if inverse or not isinstance(second, fx.Node) or not isinstance(c.values.get(second), _Value):
        raise UnsupportedModel(f"{_title(node.target)} with {second} has no integer form here", module=c._where(node))
    a, b = c.narrow(v, first, 8), c.narrow(c.value(second), second, 8)
    step = Replay(_int_product, (Slot(0), Slot(1)), {})
    ends = [p * q for p in (a.low, a.high) for q in (b.low, b.high)]
    return _Value(c.emit(step, a.place, b.place), a.scale * b.scale, min(ends), max(ends))


def _int_product(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.int32) * b.to(torch.int32)


# pooling and shapes


def _pair(value: Any, n: int = 2) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _options(node: fx.Node, m: Any, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """The options of a pooling layer or function, by name."""
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return [getattr(m, n, d) if m is not None else given.get(n, d) for n, d in zip(names, defaults, strict=True)]


def _max_pool(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    kernel, stride, padding, dilation, ceil, indices = _options(node, m, names, (None, None, 0, 1, False, False))
    if indices:
        raise UnsupportedModel("indices of maxima are not supported", module=c._where(node))
    v = c.value(node.args[0])
    step = ops.MaxPool(kernel, kernel if stride is None else stride, padding, dilation, ceil)
    return _Value(c.emit(step, v.place), v.scale, v.low, v.high, v.axis)


def _averaged(c: _Compiler, node: fx.Node, step: ops.SumPool, count: int) -> _Value:
    v = c.value(node.args[0])
    if max(v.high, -v.low) * count > _INT32 or (v.axis is not None and not step.keep):
        v = c.wide(v, node.args[0])
    if max(v.high, -v.low) * count > _INT32:
        raise UnsupportedModel(f"a sum of {count} values does not fit 32 bits", module=c._where(node))
    total = _Value(c.emit(step, v.place), v.scale / count, v.low * count, v.high * count, v.axis)
    return c.wide(total, node)


def _avg_pool(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    kernel, stride, padding, ceil, include, divisor = _options(node, m, names, (None, None, 0, False, True, None))
    n = len(c.record.shape[node.args[0].name]) - 2
    kernel, padding = _pair(kernel, n), _pair(padding, n)
    if ceil or (any(padding) and not include):
        raise UnsupportedModel("an average over windows of different sizes has no integer form here", module=c._where(node))
    sides = [side for p in reversed(padding) for side in (p, p)]
    step = ops.SumPool(kernel, _pair(stride, n) if stride is not None else kernel, sides)
    return _averaged(c, node, step, divisor or math.prod(kernel))


def _adaptive_pool(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    size = m.output_size if m is not None else _options(node, m, ("output_size",), (1,))[0]
    shape = c.record.shape[node.args[0].name]
    spatial = shape[2:] if len(c.record.shape[node.name]) == len(shape) else shape
    wanted = [s if o is None else o for s, o in zip(spatial, _pair(size, len(spatial)), strict=True)]
    if all(o == 1 for o in wanted):
        dims = tuple(range(2, len(shape)))
        return _averaged(c, node, ops.SumPool(spatial, dims=dims), math.prod(spatial))
    if any(s % o for s, o in zip(spatial, wanted, strict=True)):
        raise UnsupportedModel(f"averages from {spatial} to {tuple(wanted)} run over windows of different sizes", module=c._where(node))
    kernel = [s // o for s, o in zip(spatial, wanted, strict=True)]
    return _averaged(c, node, ops.SumPool(kernel, kernel, (0, 0) * len(kernel)), math.prod(kernel))


def _mean(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    dims, keep = _options(node, None, ("dim", "keepdim"), (None, False))
    shape = c.record.shape[node.args[0].name]
    where = [d % len(shape) for d in ((dims,) if isinstance(dims, int) else dims or range(len(shape)))]
    if 0 in where:
        raise UnsupportedModel("a mean over the batch has no integer form here", module=c._where(node))
    if 1 in where and c.value(node.args[0]).axis is not None:
        c.values[node.args[0]] = c.wide(c.value(node.args[0]), node.args[0])
    sizes = [shape[d] for d in where]
    return _averaged(c, node, ops.SumPool(sizes, dims=where, keep=keep), math.prod(sizes))


def _cat(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    scale, top = c.wide_scale(node)
    parts = [c.rescaled(c.value(t), scale, -top, top) for t in tensors]
    step = Replay(_joined, ([Slot(i) for i in range(len(parts))], dim), {})
    return _Value(c.emit(step, *(p.place for p in parts)), scale, -top, top)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat([p.to(torch.int32) for p in parts], dim)


def _upsample(c: _Compiler, node: fx.Node, m: Any) -> _Value:
    mode = m.mode if m is not None else node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
    before, after = c.record.shape[node.args[0].name], c.record.shape[node.name]
    factors = [b // a for a, b in zip(before[2:], after[2:], strict=True)]
    if mode not in ("nearest", "nearest-exact") or any(a * f != b for a, b, f in zip(before[2:], after[2:], factors, strict=True)):
        raise UnsupportedModel(f"{mode} interpolation from {before[2:]} to {after[2:]} has no integer form here", module=c._where(node))
    v = c.value(node.args[0])
    return _Value(c.emit(ops.Upsample(factors), v.place), v.scale, v.low, v.high, v.axis)


def _shape(c: _Compiler, node: fx.Node, m: Any) -> Any:
    """What only moves codes (or asks for sizes) does the same to integers."""
    if node.target is getattr and node.args[1] not in ("shape", "ndim"):
        raise UnsupportedModel(f"its attribute {node.args[1]!r} has no integer form", module=c._where(node))
    first = c.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else node.args[0]
    if isinstance(first, Tensor) and node.target in ("expand", "view", "reshape"):
        raise UnsupportedModel(f"{node.target} of a constant has no integer form here", module=c._where(node))
    if isinstance(first, _Value) and node.target not in (getattr, "size", "dim"):
        first = c.values[node.args[0]] = c.flat(first, node.args[0]) if node.args[0].name in c.record.low else first
    places: list[int] = []

    def slot(n: fx.Node) -> Slot:
        value = c.values[n]
        places.append(value.place if isinstance(value, _Value) else value)
        return Slot(len(places) - 1)

    args, kwargs = fx.node.map_arg(node.args, slot), fx.node.map_arg(node.kwargs, slot)
    place = c.emit(Replay(node.target if m is None else m, tuple(args), dict(kwargs)), *places)
    if isinstance(first, _Value) and node.target not in (getattr, "size", "dim"):
        return _Value(place, first.scale, first.low, first.high)
    return place


def _arithmetic_or(handler: Handler) -> Handler:
    """Sizes are computed with as they are, tensors by `handler`."""

    def either(c: _Compiler, node: fx.Node, m: Any) -> Any:
        nodes = [a for a in node.args if isinstance(a, fx.Node)]
        if nodes and all(isinstance(c.values[n], int) for n in nodes):
            return _shape(c, node, m)
        return handler(c, node, m)

    return either


_FUNCTIONS: dict[Any, Handler] = dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_), _relu)
_FUNCTIONS |= dict.fromkeys((F.relu6, F.hardtanh, torch.clamp, torch.clip), _clip)
_FUNCTIONS |= dict.fromkeys((operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub), _arithmetic_or(_sum))
_FUNCTIONS |= dict.fromkeys((operator.mul, operator.imul, torch.mul), _arithmetic_or(_product))
_FUNCTIONS |= dict.fromkeys((operator.truediv, operator.itruediv, torch.div, operator.floordiv), _arithmetic_or(_product))
_FUNCTIONS |= {F.leaky_relu: _leaky, F.max_pool2d: _max_pool, torch.max_pool2d: _max_pool}
_FUNCTIONS |= dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _avg_pool)
_FUNCTIONS |= dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _adaptive_pool)
_FUNCTIONS |= {torch.mean: _mean, torch.cat: _cat, torch.concat: _cat, F.interpolate: _upsample, F.dropout: _same}
_FUNCTIONS |= dict.fromkeys(_SHAPES, _shape)
_METHODS: dict[Any, Handler] = {"relu": _relu, "relu_": _relu, "clamp": _clip, "clamp_": _clip, "clip": _clip, "mean": _mean}
_METHODS |= {"add": _sum, "add_": _sum, "sub": _sum, "sub_": _sum, "mul": _product, "mul_": _product, "div": _product, "div_": _product}
_METHODS |= dict.fromkeys(_SHAPE_METHODS, _shape)
_MODULES: list[tuple[Any, Handler]] = [
    (_IDENTITY, _same), ((_ConvNd, nn.Linear), _layer), (_BatchNorm, _norm), (nn.ReLU, _relu), ((nn.ReLU6, nn.Hardtanh), _clip),
    (nn.LeakyReLU, _leaky), (nn.MaxPool2d, _max_pool), ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive_pool), (nn.Upsample, _upsample),
    (_SHAPE_MODULES, _shape),
]  # fmt: skip


def _module_handler(module: nn.Module) -> Handler | None:
    return next((handler for kinds, handler in _MODULES if isinstance(module, kinds)), None)
