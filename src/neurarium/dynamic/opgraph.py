"""A network as a list of operations with their reach: which part of a map an operation reads, and when a map is read for the last time.

:func:`trace` turns a model into :class:`Op` records (``torch.fx``, then proven by running them). A convolution takes along what a kernel
does in one go: the BatchNorm behind it (folded into its weights), the residual sum that it ends in, the activation. For *local*
operations (convolution, pooling, elementwise ones, sums, concatenation of channels) :func:`reach` walks backward from an interval of the
output to the interval of the input that it needs:

    output [a, b) of a window of size k, stride t, padding q, dilation d      needs input [a t - q, (b - 1) t - q + d (k - 1) + 1)

clipped to the map; only what lies outside the map is padding. What mixes the whole map (global pooling, attention, GroupNorm, a
flatten) is not local.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.cost import evaluating
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter.allocated import AllocatedBytes

__all__ = ["Call", "Graph", "Op", "Ref", "Span", "Window", "reach", "trace"]

Span = tuple[tuple[int, int], tuple[int, int]]  # rows [a, b), columns [a, b)

POINTWISE = (
    nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU,
    nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign,
)  # fmt: skip
POINT_FUNCTIONS = (
    torch.relu, F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.sigmoid, torch.sigmoid, F.tanh,
    torch.tanh, F.hardswish, F.hardsigmoid, F.softplus, torch.abs, torch.square, torch.sqrt, torch.exp, torch.clamp, operator.neg,
)  # fmt: skip
POINT_METHODS = ("relu", "relu_", "sigmoid", "tanh", "clamp", "abs", "square", "sqrt", "exp", "contiguous")
SUMS = (operator.add, operator.iadd, torch.add)
BINARY = (*SUMS, operator.sub, operator.mul, operator.imul, torch.sub, torch.mul)


@dataclass(frozen=True)
class Ref:
    """Stands in the arguments of a call for what an earlier operation made."""

    name: str


@dataclass(frozen=True)
class Call:
    """One call of the traced model: a module, function, method or attribute, with its arguments."""

    how: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module, env: Mapping[str, Any]) -> Any:
        """What the call returns, with ``env`` for the references."""
        args, kwargs = (fx.node.map_aggregate(a, lambda r: env[r.name] if isinstance(r, Ref) else r) for a in (self.args, self.kwargs))
        if self.how == "call_module":
            return model.get_submodule(self.target)(*args, **kwargs)
        if self.how == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        if self.how == "get_attr":
            return operator.attrgetter(self.target)(model)
        return self.target(*args, **kwargs)

    def of(self, model: nn.Module, x: Tensor) -> Tensor:
        """The call with every reference replaced by ``x``: for elementwise calls."""
        args, kwargs = (fx.node.map_aggregate(a, lambda r: x if isinstance(r, Ref) else r) for a in (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs).run(model, {})


@dataclass(frozen=True)
class Window:
    """What one output element reads along both axes. ``pad`` is the padding before the first element."""

    size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    total_pad: tuple[int, int]

    def needs(self, axis: int, a: int, b: int) -> tuple[int, int]:
        """The unclipped input interval of the output interval [a, b)."""
        first = a * self.stride[axis] - self.pad[axis]
        return first, first + (b - 1 - a) * self.stride[axis] + self.dilation[axis] * (self.size[axis] - 1) + 1

    def out(self, axis: int, n: int) -> int:
        """The size of the output of a whole map."""
        return (n + self.total_pad[axis] - self.dilation[axis] * (self.size[axis] - 1) - 1) // self.stride[axis] + 1


@dataclass(frozen=True)
class Op:
    """One kernel.

    Attributes:
        name: of what it makes.
        kind: "conv", "pool", "point", "binary", "cat" or "other".
        inputs: names of what it reads.
        norm: the BatchNorm folded into this convolution.
        other: the map that is added to this convolution's output.
        points: elementwise calls on the result, in order.
        shape: of one row of the output (``None``: not one tensor), ``numel`` its elements.
        depthwise: each output channel of this convolution reads the same channel of the input.
        views: inputs whose memory an "other" operation shares instead of making its own; ``inner``: elements that it needs meanwhile.
    """

    name: str
    kind: str
    call: Call
    inputs: tuple[str, ...]
    block: str
    norm: str | None = None
    other: str | None = None
    points: tuple[Call, ...] = ()
    shape: tuple[int, ...] | None = None
    numel: int = 0
    views: tuple[str, ...] = ()
    inner: int = 0
    window: Window | None = None
    depthwise: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """``inputs`` and ``other``."""
        return self.inputs if self.other is None else (*self.inputs, self.other)


@dataclass(frozen=True)
class Graph:
    """Operations in order.

    Attributes:
        source: name of the input.
        result: name of the output.
        last: name -> index of the operation that reads it last.
        cuts: operations behind which only their own output lives on.
        blocks: (name, index of its last operation), the units that a user counts.
        input_shape: of one row.
        flops: of one row, counted.
    """

    ops: tuple[Op, ...]
    source: str
    result: str
    last: Mapping[str, int]
    cuts: tuple[int, ...]
    blocks: tuple[tuple[str, int], ...]
    input_shape: tuple[int, ...]
    flops: int

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of one row of what ``name`` stands for."""
        return self.input_shape if name == self.source else next(op.shape for op in self.ops if op.name == name)

    def stage(self, split: int) -> int:
        """How many operations the first ``split`` blocks have."""
        return self.blocks[split - 1][1] + 1 if split else 0

    def sizes(self, height: int, width: int, upto: int) -> dict[str, tuple[int, int]]:
        """Height and width of the maps of the first ``upto`` operations, which are local, for an image of this size."""
        known = {self.source: (height, width)}
        for op in self.ops[:upto]:
            h, w = known[op.inputs[0]]
            known[op.name] = (h, w) if op.window is None else (op.window.out(0, h), op.window.out(1, w))
        return known

    def local(self) -> int:
        """How many operations from the start on are local."""
        return next((i for i, op in enumerate(self.ops) if op.kind == "other"), len(self.ops))


def reach(ops: Sequence[Op], sizes: Mapping[str, tuple[int, int]], span: Span) -> dict[str, Span]:
    """For each map that the local ``ops`` touch, the part that is needed for ``span`` of the last one's output."""
    need: dict[str, Span] = {ops[-1].name: span}
    for op in reversed(ops):
        out = need[op.name]
        for name in op.reads:
            part = out if op.window is None or name == op.other else _clip(op.window, out, sizes[name])
            old = need.get(name)
            need[name] = part if old is None else tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(old, part))  # type: ignore[assignment]
    return need


def _clip(window: Window, out: Span, size: tuple[int, int]) -> Span:
    wanted = (window.needs(axis, *out[axis]) for axis in (0, 1))
    rows, columns = ((min(max(a, 0), n), max(min(b, n), 0)) for (a, b), n in zip(wanted, size))
    return rows, columns


# ---- tracing ------------------------------------------------------------------------------------------------------------------------


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The operations of ``model``, proven on the first row of ``example``.

    Raises:
        UnsupportedModel: it cannot be traced, takes or returns more than one tensor, or its operations do not give its output.
    """
    kind = type(model).__name__
    if not isinstance(example, Tensor) or example.ndim != 4 or len(example) == 0 or not example.is_floating_point():
        raise BadInput("example must be a floating-point batch of images (n, channels, height, width) with at least one row")
    if not torch.isfinite(example).all():
        raise BadInput("the example has NaN or infinite values")
    example = example[:1]
    with evaluating(model), torch.no_grad():
        try:
            with FlopCounterMode(display=False) as counter:
                want = model(example)
        except Exception as error:
            raise BadInput(f"the model does not take this example of shape {tuple(example.shape)}: {_first(error)}") from error
        try:
            traced = fx.symbolic_trace(model).graph
        except Exception as error:
            raise UnsupportedModel(f"cannot be traced into operations: {_first(error)}", module=kind) from error
        traced.eliminate_dead_code()
        nodes = [n for n in traced.nodes if n.op not in ("placeholder", "output") or (n.op == "placeholder" and n.users)]
        sources = [n.name for n in nodes if n.op == "placeholder"]
        (output,) = (n for n in traced.nodes if n.op == "output")
        if len(sources) != 1 or not isinstance(want, Tensor) or not isinstance(output.args[0], fx.Node):
            raise UnsupportedModel("must take one tensor and return one", module=kind)
        ops = _fused([_op(model, n) for n in nodes if n.op != "placeholder"], model, output.args[0].name)
        ops, got = _shaped(model, ops, sources[0], example, output.args[0].name)
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max().clamp(min=1e-6))):
        raise UnsupportedModel(
            "does something that its traced operations do not: a value fixed while tracing, an in-place change", module=kind
        )
    result = output.args[0].name
    last = _last(ops, result)
    cuts = _cuts(ops, last, sources[0], result)
    return Graph(tuple(ops), sources[0], result, last, cuts, _blocks(ops, cuts), tuple(example.shape[1:]), counter.get_total_flops())


def _first(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _op(model: nn.Module, node: fx.Node) -> Op:
    args, kwargs = (fx.node.map_aggregate(a, lambda n: Ref(n.name) if isinstance(n, fx.Node) else n) for a in (node.args, node.kwargs))
    call = Call(node.op, node.target, tuple(args), dict(kwargs))
    inputs = tuple(n.name for n in node.all_input_nodes)
    stack = [path for path, kind in node.meta.get("nn_module_stack", {}).values() if not _is_container(kind)]
    block = stack[0] if stack else ""
    kind, window = _kind(model, node)
    if kind == "binary" and len(inputs) == 1:
        kind = "point" if sum(isinstance(a, Ref) for a in tree_leaves((call.args, call.kwargs))) == 1 else "other"
    module = model.get_submodule(str(node.target)) if kind == "conv" else None
    depthwise = module is not None and module.groups == module.in_channels == module.out_channels
    return Op(node.name, kind, call, inputs, block, window=window, depthwise=depthwise)


def _is_container(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _kind(model: nn.Module, node: fx.Node) -> tuple[str, Window | None]:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            return "conv", _window(module)
        if type(module) is nn.MaxPool2d and not module.ceil_mode and not module.return_indices:
            return "pool", _window(module)
        if type(module) is nn.AvgPool2d and not module.ceil_mode and (module.count_include_pad or not any(_pair(module.padding))):
            return "pool", _window(module)
        return ("point" if type(module) in POINTWISE else "other"), None
    if node.op == "call_function":
        if node.target in POINT_FUNCTIONS and len(node.all_input_nodes) == 1:
            return "point", None
        if node.target in BINARY:
            return "binary", None
        if node.target in (torch.cat, torch.concat) and (node.args[1:] == (1,) or node.kwargs.get("dim") == 1):
            return "cat", None
    if node.op == "call_method" and node.target in POINT_METHODS and len(node.all_input_nodes) == 1:
        return "point", None
    return "other", None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _window(module: Any) -> Window:
    size, stride = _pair(module.kernel_size), _pair(module.stride or module.kernel_size)
    dilation = _pair(getattr(module, "dilation", 1))
    if module.padding == "valid":
        pad = total = (0, 0)
    elif module.padding == "same":
        total = (dilation[0] * (size[0] - 1), dilation[1] * (size[1] - 1))
        pad = (total[0] // 2, total[1] // 2)
    else:
        pad = _pair(module.padding)
        total = (2 * pad[0], 2 * pad[1])
    return Window(size, stride, pad, dilation, total)


def _last(ops: Sequence[Op], result: str) -> dict[str, int]:
    last = {name: i for i, op in enumerate(ops) for name in op.reads}
    last[result] = len(ops)
    return last


def _fused(ops: list[Op], model: nn.Module, result: str) -> list[Op]:
    """Convolutions take the BatchNorm, the sum and the elementwise calls that follow and that alone read them; so do the others' calls."""
    uses = Counter(name for op in ops for name in op.inputs)
    uses[result] += 1
    made = {op.name: i for i, op in enumerate(ops)}
    reader = {name: op for op in ops for name in op.inputs}  # unique where uses == 1
    taken: set[str] = set()
    fused = []
    for i, op in enumerate(ops):
        if op.name in taken:
            continue
        while op.kind != "other" and uses[op.name] == 1 and op.name != result:
            then = reader[op.name]
            if then.kind == "point":
                norm = model.get_submodule(then.call.target) if then.call.how == "call_module" else None
                if op.kind == "conv" and op.norm is None and op.other is None and not op.points and _folds(norm):
                    op = replace(op, name=then.name, norm=then.call.target)
                else:
                    op = replace(op, name=then.name, points=(*op.points, then.call))
            elif then.kind == "binary" and op.kind == "conv" and op.other is None and not op.points and _plain_sum(then):
                other = next(n for n in then.inputs if n != op.name)
                if made.get(other, -1) >= i:  # not yet there
                    break
                op = replace(op, name=then.name, other=other)
            else:
                break
            taken.add(then.name)
        fused.append(op)
        made[op.name] = i
    return fused


def _folds(norm: nn.Module | None) -> bool:
    return type(norm) is nn.BatchNorm2d and norm.track_running_stats


def _plain_sum(op: Op) -> bool:
    return op.call.target in SUMS and len(op.inputs) == 2 and len(op.call.args) == 2 and not op.call.kwargs


def _shaped(model: nn.Module, ops: list[Op], source: str, example: Tensor, result: str) -> tuple[list[Op], Tensor]:
    """Run the operations; note the shapes, and what shares memory with what."""
    env: dict[str, Any] = {source: example}
    shaped = []
    for op in ops:
        with AllocatedBytes() as memory:
            out = op.call.run(model, env) if op.kind in ("other", "cat", "binary", "point") else run_local(model, op, env)
            if op.kind in ("cat", "binary", "point"):
                out = finish(model, op, out)
        width = example.element_size()
        made = {id(s): s.nbytes() for s in map(_storage, tree_leaves(out)) if s is not None}
        views = tuple(n for n in op.inputs if {id(s) for s in map(_storage, tree_leaves(env[n]))} & made.keys())
        new = memory.live // width
        if op.call.how == "get_attr":
            new, views = 0, ()
        shape = tuple(out.shape[1:]) if isinstance(out, Tensor) and out.ndim else None
        if op.kind != "other" and (shape is None or len(shape) != 3 or not _aligned(op, shape, env)):
            op = replace(op, kind="other", window=None) if op.norm is None and op.other is None and not op.points else op
        if op.kind == "other":
            op = replace(op, views=views, inner=max(memory.peak // width - new, 0), numel=new)
        else:
            op = replace(op, numel=out.numel())
        env[op.name] = out
        shaped.append(replace(op, shape=shape))
    return shaped, env[result]


def _aligned(op: Op, shape: tuple[int, ...], env: Mapping[str, Any]) -> bool:
    """Maps that are combined have the same height and width."""
    maps = [env[n] for n in op.reads]
    if not all(isinstance(t, Tensor) and t.ndim == 4 for t in maps):
        return False
    return op.window is not None or all(t.shape[2:] == shape[1:] for t in maps)


def _storage(t: Any) -> Any:
    return t.untyped_storage() if isinstance(t, Tensor) else None


def _cuts(ops: Sequence[Op], last: Mapping[str, int], source: str, result: str) -> tuple[int, ...]:
    cuts = []
    for i, op in enumerate(ops):
        alive = {n for n in (source, *(o.name for o in ops[: i + 1])) if last.get(n, -1) > i}
        if alive == {op.name} or op.name == result:
            cuts.append(i)
    return tuple(cuts)


def _blocks(ops: Sequence[Op], cuts: Iterable[int]) -> tuple[tuple[str, int], ...]:
    blocks = []
    for i in cuts:
        if i + 1 == len(ops) or not ops[i].block or ops[i + 1].block != ops[i].block:
            blocks.append((ops[i].block or ops[i].name, i))
    return tuple(blocks)


# ---- running local operations -------------------------------------------------------------------------------------------------------


def folded(model: nn.Module, op: Op) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with its BatchNorm in them."""
    conv: Any = model.get_submodule(op.call.target)
    if op.norm is None:
        return conv.weight, conv.bias
    norm: Any = model.get_submodule(op.norm)
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    shift = (0 if conv.bias is None else conv.bias) - norm.running_mean
    bias = shift * scale if not norm.affine else shift * scale + norm.bias
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def convolve(model: nn.Module, op: Op, x: Tensor, padding: Any, weights: tuple[Tensor, Tensor | None], groups: int | None = None) -> Tensor:
    """The convolution alone."""
    conv: Any = model.get_submodule(op.call.target)
    return F.conv2d(x, *weights, stride=conv.stride, padding=padding, dilation=conv.dilation, groups=groups or conv.groups)


def padded(x: Tensor, pads: tuple[int, int, int, int] | None, own: Any, value: float) -> tuple[Any, Tensor]:
    """The padding that a kernel can do itself, and the map with the rest around it."""
    if pads is None:
        return own, x
    top, bottom, left, right = pads
    if value == 0.0 and top == bottom and left == right:
        return (top, left), x
    return 0, F.pad(x, (left, right, top, bottom), value=value)


def pool(model: nn.Module, op: Op, x: Tensor, pads: tuple[int, int, int, int] | None) -> Tensor:
    """Maximum or average."""
    module: Any = model.get_submodule(op.call.target)
    if pads is None or not any(pads):
        pads = pads and (0, 0, 0, 0)
    if isinstance(module, nn.MaxPool2d):
        padding, x = (module.padding, x) if pads is None else padded(x, pads, 0, -math.inf) if any(pads) else (0, x)
        return F.max_pool2d(x, module.kernel_size, module.stride, padding, module.dilation)
    padding, x = (module.padding, x) if pads is None else (0, padded(x, pads, 0, 0.0)[1]) if _uneven(pads) else (pads[::2], x)
    return F.avg_pool2d(x, module.kernel_size, module.stride, padding, divisor_override=module.divisor_override)


def _uneven(pads: tuple[int, int, int, int]) -> bool:
    return pads[0] != pads[1] or pads[2] != pads[3]


def finish(model: nn.Module, op: Op, y: Tensor) -> Tensor:
    """The elementwise calls at the end."""
    for call in op.points:
        y = call.of(model, y)
    return y


def run_local(
    model: nn.Module, op: Op, env: Mapping[str, Any], pads: tuple[int, int, int, int] | None = None,
    weights: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """A local operation on maps (already cropped to what it reads), nothing in place."""
    if op.kind == "conv":
        padding, x = padded(env[op.inputs[0]], pads, model.get_submodule(op.call.target).padding, 0.0)
        y = convolve(model, op, x, padding, weights or folded(model, op))
        if op.other is not None:
            y = y + env[op.other]
    elif op.kind == "pool":
        y = pool(model, op, env[op.inputs[0]], pads)
    else:
        y = _without_inplace(model, op.call, env)
    return finish(model, op, y)


def _without_inplace(model: nn.Module, call: Call, env: Mapping[str, Any]) -> Tensor:
    """``x += y`` and modules with ``inplace=True`` must not change a map that another operation still reads."""
    plain: dict[Any, Callable[..., Any]] = {operator.iadd: operator.add, operator.imul: operator.mul}
    if call.target in plain:
        return replace(call, target=plain[call.target]).run(model, env)
    inplace = call.kwargs.get("inplace", False) or call.target == "relu_"
    if inplace or (call.how == "call_module" and getattr(model.get_submodule(call.target), "inplace", False)):
        return call.of(model, next(env[r.name] for r in tree_leaves(call.args) if isinstance(r, Ref)).clone())
    return call.run(model, env)
