"""Make an ordinary model elastic: find out which layers must be cut together, and give them common widths.

:func:`make_elastic` runs the model once on an example and watches every operation. A linear or convolutional layer makes units;
normalisation, activations, pools, flattening and transposes hand them on; a sum of two tensors couples the units of both (a residual
stream is one width). An operation that needs all units (a concatenation, a softmax or a mean over them, a reshape that splits them, a sum
with a parameter) fixes them, and so does being the model's output. What is left becomes :class:`~neurarium.dynamic.elastic.Width` objects.

The result is proven on the example: all of it must equal the model bit for bit, and the smallest configuration must run.

*Cost.* Two passes over the example and one over its first slice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.decoder import Attention
from neurarium.dynamic.elastic import (
    Depth,
    ElasticAttention,
    ElasticConv2d,
    ElasticLinear,
    ElasticNorm,
    Statistics,
    Width,
    active,
    at,
    full,
    slots,
)
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["make_elastic"]

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
LAYERS = (nn.Linear, nn.Conv2d, *NORMS)
SAME = {
    "relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "leaky_relu_", "softplus", "hardtanh",
    "hardswish", "hardsigmoid", "mish", "softsign", "logsigmoid", "dropout", "dropout2d", "dropout1d", "clone", "contiguous", "detach",
    "float", "double", "abs", "square", "sqrt", "rsqrt", "exp", "neg", "clamp", "pow", "__pow__", "__neg__", "clamp_min", "to",
}  # fmt: skip
POOLS = {
    "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "interpolate", "pad",
    "adaptive_avg_pool1d", "avg_pool1d", "max_pool1d",
}  # fmt: skip
PAIRS = {
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__", "mul_", "div",
    "__truediv__", "maximum",
}  # fmt: skip


class _Units:
    """Units that belong together (a union-find node)."""

    def __init__(self, size: int, maker: str) -> None:
        self.size, self.maker, self.parent, self.step, self.fixed = size, maker, self, 1, ""
        self.width: Width | None = None

    def root(self) -> _Units:
        return self if self.parent is self else self.parent.root()

    def fix(self, reason: str) -> None:
        self.root().fixed = self.root().fixed or reason

    def join(self, other: _Units, reason: str) -> None:
        a, b = self.root(), other.root()
        if a is b:
            return
        if a.size != b.size:
            reason = f"{reason} couples {a.size} units with {b.size}"
            a.fix(reason), b.fix(reason)
            return
        b.parent, a.step = a, math.lcm(a.step, b.step)
        a.fixed = a.fixed or b.fixed


@dataclass(frozen=True)
class _Label:
    """Dimension ``dim`` of a tensor holds these units, each as equally many neighbouring entries."""

    units: _Units
    dim: int


def _at(args: Any, kwargs: Any, i: int, key: str, default: Any) -> Any:
    return args[i] if len(args) > i else kwargs.get(key, default)


class _Watch(TorchFunctionMode):
    """Follows units from operation to operation; ``layers`` collects who reads and makes what."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {m: n for n, m in model.named_modules(remove_duplicate=True)}
        self.labels: dict[int, _Label] = {}
        self.alive: list[Any] = []
        self.reads: dict[nn.Module, _Units | None] = {}
        self.makes: dict[nn.Module, _Units] = {}
        self.inside: list[nn.Module] = []
        self.leaf = 0

    def label(self, t: Any) -> _Label | None:
        return self.labels.get(id(t)) if isinstance(t, Tensor) else None

    def put(self, t: Tensor, units: _Units, dim: int) -> None:
        self.labels[id(t)] = _Label(units, dim)
        self.alive.append(t)

    def place(self) -> str:
        return self.names.get(self.inside[-1], "") if self.inside else ""

    def fix(self, trees: Any, why: str) -> None:
        for t in tree_leaves(trees):
            if (known := self.label(t)) is not None:
                known.units.fix(why)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf:
            return func(*args, **kwargs)
        self.leaf += 1  # what a function calls inside is its own business
        try:
            out = func(*args, **kwargs)
        finally:
            self.leaf -= 1
        if any(self.label(t) is not None for t in tree_leaves((args, kwargs))) and any(isinstance(t, Tensor) for t in tree_leaves(out)):
            self.follow(getattr(func, "__name__", str(func)), args, kwargs, out)
        return out

    def follow(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        where = self.place()
        why = f"{name}{f' in {where!r}' if where else ''} needs all of them"
        known = [known for t in tree_leaves((args, kwargs)) if (known := self.label(t)) is not None]
        if not isinstance(out, Tensor):
            return self.fix((args, kwargs), why)
        x, (first, *rest) = args[0] if args else None, known
        if name in PAIRS:
            return self.pair(name, [t for t in args if isinstance(t, Tensor)], out, why)
        if rest or self.label(x) is None:
            return self.fix((args, kwargs), why)
        dim, moved = first.dim, None
        if name in SAME or (name in POOLS and dim == 1 and out.shape[1] == x.shape[1]):
            moved = dim
        elif name == "flatten":
            start, end = (_at(args, kwargs, i, key, d) % x.ndim for i, key, d in ((1, "start_dim", 0), (2, "end_dim", -1)))
            moved = dim if dim <= start else dim - (end - start) if dim > end else None
        elif name in ("reshape", "view") and out.ndim >= dim + 1 and out.shape[:dim] == x.shape[:dim]:
            per = x.shape[dim:].numel() // x.shape[dim]  # entries behind each channel
            moved = dim if out.shape[dim:] == x.shape[dim:] or (out.shape[dim] == x.shape[dim] * per and out.ndim == dim + 1) else None
        elif name == "transpose":
            a, b = (_at(args, kwargs, i, f"dim{i - 1}", 0) % x.ndim for i in (1, 2))
            moved = b if dim == a else a if dim == b else dim
        elif name == "permute":
            order = args[1] if isinstance(args[1], tuple | list) else args[1:]
            moved = [d % x.ndim for d in order].index(dim)
        elif name in ("mean", "sum", "amax"):
            over = _at(args, kwargs, 1, "dim", tuple(range(x.ndim)))
            dims = [d % x.ndim for d in (over if isinstance(over, tuple | list) else (over,))]
            keep = _at(args, kwargs, 2, "keepdim", False)
            moved = None if dim in dims else dim if keep else dim - sum(d < dim for d in dims)
        if moved is None:
            return self.fix((args, kwargs), why)
        return self.put(out, first.units, moved)

    def pair(self, name: str, tensors: Sequence[Tensor], out: Tensor, why: str) -> None:
        labels = [(t, known) for t in tensors if (known := self.label(t)) is not None]
        if not labels:
            return None
        t, first = labels[0]
        dim = first.dim - t.ndim  # from the end: broadcasting adds dimensions in front
        for other in tensors:
            known = self.label(other)
            if known is not None and known.dim - other.ndim == dim:
                first.units.join(known.units, f"{name}{f' in {self.place()!r}' if self.place() else ''}")
            elif known is not None or (other.ndim >= -dim and other.shape[dim] != 1):
                return self.fix(list(tensors), why)
        return self.put(out, first.units, dim + out.ndim)

    def before(self, module: nn.Module, args: Any) -> None:
        self.inside.append(module)
        self.leaf += isinstance(module, LAYERS)

    def after(self, module: nn.Module, args: Any, out: Any) -> None:
        self.inside.pop()
        if not isinstance(module, LAYERS):
            return
        self.leaf -= 1
        if not self.leaf:
            self.layer(module, args[0], out)

    def layer(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """A layer with weights: what it reads is known, what it makes is new."""
        name, known = self.names.get(module, type(module).__name__), self.label(x)
        where = 1 if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.modules.batchnorm._BatchNorm) else x.ndim - 1
        if known is not None and known.dim != where:
            known.units.fix(f"{name!r} mixes them with something else")
            known = None
        units = None if known is None else known.units
        seen = module in self.reads
        if seen and units is not None and self.reads[module] is not None:
            units.join(self.reads[module], f"{name!r}, used twice,")  # type: ignore[arg-type]
        elif seen and (units is None) != (self.reads[module] is None):
            self.fix([x], f"{name!r} is used twice")
            if self.reads[module] is not None:
                self.reads[module].fix(f"{name!r} is used twice")  # type: ignore[union-attr]
        self.reads[module] = units or self.reads.get(module)
        if isinstance(module, NORMS):
            if units is not None:
                self.norm(module, units, name)
                self.put(out, units, where)
            return
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        if isinstance(module, nn.Conv2d) and grouped and units is not None:
            if module.groups == module.in_channels == module.out_channels and module.groups == units.root().size:
                self.makes[module] = units
                return self.put(out, units, 1)
            units.fix(f"{name!r} has {module.groups} groups")
        if isinstance(module, ElasticLinear) and module.outputs is not None:
            return None  # heads: the attention's own
        size = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features  # type: ignore[union-attr]
        made = self.makes.setdefault(module, _Units(int(size), name))
        if grouped:
            made.fix(f"{name!r} has {module.groups} groups")
        return self.put(out, made, where)

    def norm(self, module: nn.Module, units: _Units, name: str) -> None:
        root = units.root()
        if isinstance(module, nn.GroupNorm):
            per, size = module.num_channels // module.num_groups, module.num_channels
            if size != root.size:
                units.fix(f"{name!r} groups several entries of one unit")
            else:
                root.step = math.lcm(root.step, per)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1:
            units.fix(f"{name!r} normalises more than them")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.running_mean is None or isinstance(module, nn.SyncBatchNorm)):
            units.fix(f"{name!r} keeps no running statistics of its own")


def make_elastic(
    model: nn.Module,
    example: Any,
    *,
    only: Sequence[str] | None = None,
    depths: Sequence[str] = (),
    least: int = 1,
    statistics: Statistics = "config",
) -> nn.Module:
    """A copy of ``model`` whose widths, heads and depths are elastic; with all of them in use it computes the same.

    Args:
        example: a batch that the model takes (a tensor, or a tuple of its arguments).
        only: layers (their names) whose units shall be elastic; by default all whose units can be, see ``copy.fixed`` for the others.
        depths: names of ``nn.Sequential`` or ``nn.ModuleList`` whose last blocks may be skipped, down to ``least``. Each block must put
            out what it reads.
        statistics: what batch normalisation keeps for which config, see :class:`~neurarium.dynamic.elastic.ElasticNorm`.

    The attribute ``fixed`` of the copy says which layers' units stayed whole, and why.

    Raises:
        UnsupportedModel: names the module that cannot be what was asked for, or why nothing can.
    """
    model = copy.deepcopy(model)
    args = example if isinstance(example, tuple) else (example,)
    with evaluating(model), torch.no_grad():
        want = _finite(model(*args))
        modules = dict(model.named_modules())
        for name in (*(only or ()), *depths):
            if name not in modules or not name:
                raise BadInput(f"the model has no module {name!r}")
        heads = []
        for name, module in modules.items():
            if isinstance(module, Attention) and not isinstance(module, ElasticAttention) and (only is None or name in only):
                _replace(model, name, ElasticAttention.of(module, name=name))
                heads.append(name)
        watch, blocks = _watch(model, args, depths)
    for name in depths:
        _couple(watch, name, blocks)
    fixed, norms = _replace_layers(model, watch, None if only is None else [n for n in only if n not in heads], statistics)
    for name in depths:
        container = model.get_submodule(name)
        _replace(model, name, Depth(*container._modules.values(), least=least, name=name).train(container.training))
    if not any(slots(model)):
        name, why = next(iter(fixed.items()), ("", "has no layer whose units could be cut"))
        raise UnsupportedModel(f"nothing in the model can be elastic: {why}", module=name)
    _keep_statistics(model, norms)
    model.fixed = fixed
    with evaluating(model), torch.no_grad():
        _prove(model, args, want)
    return model


def _finite(out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise UnsupportedModel(f"puts out a {type(out).__name__}; one tensor is needed", module="")
    return out


def _watch(model: nn.Module, args: tuple[Any, ...], depths: Sequence[str]) -> tuple[_Watch, dict[str, list[tuple[_Label | None, ...]]]]:
    watch = _Watch(model)
    blocks: dict[str, list[tuple[_Label | None, ...]]] = {name: [] for name in depths}
    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(watch.before), module.register_forward_hook(watch.after)]
    for name in depths:
        container = model.get_submodule(name)
        if not isinstance(container, nn.Sequential | nn.ModuleList) or len(container) == 0:
            raise UnsupportedModel("its blocks cannot be skipped: it is no nn.Sequential or nn.ModuleList of blocks", module=name)
        for i, block in enumerate(container):

            def note(module: nn.Module, x: Any, out: Any, name: str = name, i: int = i) -> None:
                if not x or not isinstance(out, Tensor) or not isinstance(x[0], Tensor) or out.shape != x[0].shape:
                    raise UnsupportedModel("does not put out what it reads, so it cannot be skipped", module=f"{name}.{i}")
                blocks[name].append((watch.label(x[0]), watch.label(out)))

            handles.append(block.register_forward_hook(note))
    try:
        with watch:
            out = model(*args)
    finally:
        for handle in handles:
            handle.remove()
    watch.fix([out], "they are the model's output")
    return watch, blocks


def _couple(watch: _Watch, name: str, blocks: dict[str, list[tuple[_Label | None, ...]]]) -> None:
    """What a block reads is what it puts out, as it may be skipped."""
    if not blocks[name]:
        raise UnsupportedModel("none of its blocks is called as a module", module=name)
    for a, b in blocks[name]:
        if a is not None and b is not None and a.dim == b.dim:
            a.units.join(b.units, f"skipping a block of {name!r}")
        else:
            for label in (a, b):
                if label is not None:
                    label.units.fix(f"a block of {name!r} that may be skipped hands on what is not elastic")


def _replace_layers(
    model: nn.Module, watch: _Watch, only: Sequence[str] | None, statistics: Statistics
) -> tuple[dict[str, str], list[tuple[ElasticNorm, nn.Module]]]:
    """Give the layers their widths; returns the reasons of those whose units stay whole, and the batch norms with what they were."""
    fixed = {}
    for module, units in watch.makes.items():
        root, name = units.root(), watch.names[module]
        if root.size // root.step < 2:
            root.fix(f"{root.size} units in steps of {root.step} are too few to cut")
        if root.fixed:
            fixed[name] = root.fixed
            if only is not None and name in only:
                raise UnsupportedModel(f"its units cannot be cut: {root.fixed}", module=name)
        elif (only is None or name in only) and root.width is None:
            root.width = Width(root.maker, root.size, root.step)
    for name in only or ():
        if model.get_submodule(name) not in watch.makes:
            raise UnsupportedModel("makes no units that could be cut: name linear, convolutional or attention layers", module=name)
    whole: list[tuple[ElasticNorm, nn.Module]] = []
    for module, reads in watch.reads.items():
        inputs = None if reads is None else reads.root().width
        made = watch.makes.get(module)
        outputs = None if made is None else made.root().width
        new: nn.Module | None = None
        if isinstance(module, ElasticLinear):
            module._follow(module.inputs or inputs, module.outputs or outputs)
        elif inputs is None and outputs is None:
            continue
        elif isinstance(module, nn.Conv2d):
            new = ElasticConv2d.of(module, inputs, outputs)
        elif isinstance(module, nn.Linear):
            new = ElasticLinear.of(module, inputs, outputs)
        elif inputs is not None:
            new = ElasticNorm(module, inputs, statistics)
            if new.batch:
                whole.append((new, module))
        if new is not None:
            for name, other in list(model.named_modules(remove_duplicate=False)):
                if other is module:
                    _replace(model, name, new)
    return fixed, whole


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    if not name:
        raise UnsupportedModel("is a single layer: there is nothing to cut inside", module=type(model).__name__)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@torch.no_grad()
def _keep_statistics(model: nn.Module, norms: Sequence[tuple[ElasticNorm, nn.Module]]) -> None:
    """What batch normalisation has measured so far is that of the whole network."""
    everything = full(model)
    for new, old in norms:
        new.declare([everything])
        new.running_mean[0], new.running_var[0] = old.running_mean, old.running_var


def _prove(model: nn.Module, args: tuple[Any, ...], want: Tensor) -> None:
    if not torch.equal(model(*args), want):
        raise UnsupportedModel("computes something else once its layers are elastic: weights are used outside the layers", module="")
    names, entered = {m: n for n, m in model.named_modules()}, []
    norms = [m for m in model.modules() if isinstance(m, ElasticNorm)]
    handles = [m.register_forward_pre_hook(lambda module, _: entered.append(names[module])) for m in names]
    for m in norms:
        m.measuring = True  # without statistics of its own yet
    try:
        with active(model, at(model, 0.0, 0.0)):
            small = model(*args)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedModel(f"does not run with fewer units or blocks: {error}", module=entered[-1] if entered else "") from error
    finally:
        for handle in handles:
            handle.remove()
        for m in norms:
            m.measuring = False
    if small.shape != want.shape:
        raise UnsupportedModel("the shape of its output depends on the number of units", module="")
