"""Elastic layers: one set of weights, many networks cut out of its leading slices.

A :class:`Width` is a number of units (channels, features, heads) that several layers share: the one that makes them, the norms that scale
them, the layers that read them. A :class:`Depth` is a row of blocks of which the leading ones run. A :class:`Config` says how many of each.
``with active(model, config):`` sets the slices: layers then use views of the leading rows and columns of their weights, so FLOPs really
fall, and switching allocates nothing. ``extract(model, config)`` cuts the same network out as a plain module with weights of its own.

*Batch normalisation.* Statistics of one width are wrong for another, which is the best known way to ruin the small networks of a family.
:class:`ElasticNorm` therefore has an explicit policy (``statistics=``):

- ``"config"``: a row of running statistics for each declared config (:func:`declare`), updated while training under that config;
- ``"recalibrate"``: training keeps none; :func:`recalibrate` measures them for the configs that matter, on a few batches;
- ``"shared"``: one row, sliced. Cheap and usually wrong; here for comparison.

A config without statistics is refused in evaluation mode. LayerNorm, RMSNorm and GroupNorm (whole groups) need none.

*Source.* Slimmable networks (Yu et al. 2019) and their universal form (Yu and Huang 2019) for slices and statistics of their own;
once-for-all (Cai et al. 2020) for elastic depth and the order of channels by importance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.decoder import Attention
from neurarium.dynamic.tree import repeat
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import device_of, to
from neurarium.roles import Loader

__all__ = [
    "Config",
    "Depth",
    "ElasticAttention",
    "ElasticConv2d",
    "ElasticFamily",
    "ElasticLinear",
    "ElasticNorm",
    "Statistics",
    "Width",
    "active",
    "at",
    "declare",
    "extract",
    "flops",
    "full",
    "grid",
    "recalibrate",
    "reorder",
    "slots",
    "units",
]

Statistics = Literal["config", "recalibrate", "shared"]


@dataclass(frozen=True)
class Config:
    """How much of an elastic model runs: units of each :class:`Width` and blocks of each :class:`Depth`, in the order of :func:`slots`."""

    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[int, ...]:
        return (*self.widths, *self.depths)

    def within(self, other: Config) -> bool:
        """Whether every slice of this config lies in that of ``other``."""
        return len(self.key) == len(other.key) and all(a <= b for a, b in zip(self.key, other.key))


@dataclass(eq=False)
class Width:
    """Units that several layers share; ``active`` of ``size`` are in use, in multiples of ``step`` (a group norm's whole groups)."""

    name: str
    size: int
    step: int = 1
    active: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.step < 1 or self.size % self.step:
            raise BadInput(f"{self.name}: {self.size} units do not come in steps of {self.step}")
        self.active = self.active or self.size

    def at(self, ratio: float) -> int:
        """The units nearest to a share of all, at least one step."""
        return self.step * min(max(1, round(ratio * self.size / self.step)), self.size // self.step)

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.step, self.size + 1, self.step))


class Sliced(nn.Module):
    """A layer whose tensors are used by their leading slices. ``axes`` says which dimension of which tensor follows which width."""

    def axes(self) -> dict[str, dict[int, Width]]:
        raise NotImplementedError

    def part(self, name: str) -> Tensor | None:
        """The slice of a parameter that is in use, a view."""
        tensor: Tensor | None = getattr(self, name, None)
        if tensor is not None:
            for dim, width in self.axes().get(name, {}).items():
                if width.active < width.size:
                    tensor = tensor.narrow(dim, 0, width.active * (tensor.shape[dim] // width.size))
        return tensor

    def plain(self) -> nn.Module:
        """The ordinary layer of the present slice, with copied weights."""
        raise NotImplementedError

    def _copy_to(self, layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor is not None:
                    own = getattr(layer, name)
                    value = tensor.detach().clone()
                    setattr(layer, name, nn.Parameter(value, tensor.requires_grad) if isinstance(own, nn.Parameter) else value)
        return layer.train(self.training)


def _per(width: Width | None, features: int, what: str) -> None:
    if width is not None and features % width.size:
        raise BadInput(f"{features} {what} cannot follow {width.name!r} of {width.size} units")


def _adopt(module: nn.Module, cls: type[nn.Module]) -> Any:
    """The same tensors as a module of another class; the original stays as it was."""
    new = cls.__new__(cls)
    new.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    return new


class ElasticLinear(Sliced, nn.Linear):
    """A linear layer that reads the leading units of ``inputs`` and makes those of ``outputs``; ``None`` is always all.

    A unit may be several features: a head, or a channel that was flattened together with its pixels.
    """

    inputs: Width | None
    outputs: Width | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, inputs: Width | None = None, outputs: Width | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._follow(inputs, outputs)

    @classmethod
    def of(cls, layer: nn.Linear, inputs: Width | None = None, outputs: Width | None = None) -> ElasticLinear:
        """With the weights of a given layer, shared."""
        new: ElasticLinear = _adopt(layer, cls)
        new._follow(inputs, outputs)
        return new

    def _follow(self, inputs: Width | None, outputs: Width | None) -> None:
        _per(inputs, self.in_features, "input features")
        _per(outputs, self.out_features, "output features")
        self.inputs, self.outputs = inputs, outputs

    def axes(self) -> dict[str, dict[int, Width]]:
        rows = {} if self.outputs is None else {0: self.outputs}
        return {"weight": rows if self.inputs is None else {**rows, 1: self.inputs}, "bias": rows}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.part("weight"), self.part("bias"))

    def plain(self) -> nn.Linear:
        w, b = self.part("weight"), self.part("bias")
        assert w is not None
        return _linear(w, b).train(self.training)


class ElasticConv2d(Sliced, nn.Conv2d):
    """A convolution on the leading channels. Depthwise ones (``groups`` = input channels) follow their input; other groups are refused."""

    inputs: Width | None
    outputs: Width | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        inputs: Width | None = None,
        outputs: Width | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self._follow(inputs, outputs)

    @classmethod
    def of(cls, layer: nn.Conv2d, inputs: Width | None = None, outputs: Width | None = None) -> ElasticConv2d:
        """With the weights of a given layer, shared."""
        new: ElasticConv2d = _adopt(layer, cls)
        new._follow(inputs, outputs)
        return new

    def _follow(self, inputs: Width | None, outputs: Width | None) -> None:
        if self.groups not in (1, self.in_channels) and not (inputs is None and outputs is None):
            raise UnsupportedModel(f"has {self.groups} groups over {self.in_channels} channels: slices would cut them", module="Conv2d")
        if self.depthwise and inputs is not outputs:
            raise UnsupportedModel("a depthwise convolution puts out the units that it reads", module="Conv2d")
        _per(inputs, self.in_channels, "input channels")
        _per(outputs, self.out_channels, "output channels")
        self.inputs, self.outputs = inputs, outputs

    @property
    def depthwise(self) -> bool:
        return self.groups == self.in_channels and self.groups > 1

    def axes(self) -> dict[str, dict[int, Width]]:
        rows = {} if self.outputs is None else {0: self.outputs}
        return {"weight": rows if self.inputs is None or self.depthwise else {**rows, 1: self.inputs}, "bias": rows}

    def _groups(self) -> int:
        return self.groups * self.inputs.active // self.inputs.size if self.depthwise and self.inputs is not None else self.groups

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.part("weight"), self.part("bias")
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, w, b, self.stride, 0, self.dilation, self._groups())
        return F.conv2d(x, w, b, self.stride, self.padding, self.dilation, self._groups())

    def plain(self) -> nn.Conv2d:
        w, b, groups = self.part("weight"), self.part("bias"), self._groups()
        assert w is not None
        new = nn.Conv2d(
            w.shape[1] * groups, w.shape[0], self.kernel_size, self.stride, self.padding, self.dilation, groups, b is not None,
            self.padding_mode, device="meta",
        )  # fmt: skip
        return self._copy_to(new, weight=w, bias=b)


class ElasticNorm(Sliced):
    """A LayerNorm, RMSNorm, GroupNorm or BatchNorm on the leading units of ``width``, with the scale and shift of ``norm`` (shared).

    Args:
        statistics: the policy for the running statistics of batch normalisation, see the module's text.
    """

    def __init__(self, norm: nn.Module, width: Width, statistics: Statistics = "config") -> None:
        super().__init__()
        size = _normed(norm)
        if size is None:
            raise UnsupportedModel("no slice of this norm is known", module=type(norm).__name__)
        _per(width, size, "normalised features")
        if statistics not in ("config", "recalibrate", "shared"):
            raise BadInput(f"statistics must be 'config', 'recalibrate' or 'shared', not {statistics!r}")
        self.width, self.statistics, self.eps, self.size = width, statistics, norm.eps, size
        self.kind = type(norm)
        self.per_group = size // norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        if self.per_group and (width.step * (size // width.size)) % self.per_group:
            raise BadInput(f"{width.name!r} comes in steps of {width.step} units, which cut the groups of {self.per_group} channels")
        self.momentum: float | None = getattr(norm, "momentum", None)
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", getattr(norm, "bias", None))
        self.row, self.rows, self.measuring = 0, {}, False
        if self.batch:
            if norm.running_mean is None:
                raise UnsupportedModel(
                    "keeps no running statistics, so that rows of a batch depend on each other", module=type(norm).__name__
                )
            shared = statistics == "shared"
            for name in ("running_mean", "running_var"):
                tensor = getattr(norm, name)
                self.register_buffer(name, tensor[None].clone() if shared else tensor.new_empty(0, size))
            self.register_buffer("keys", torch.zeros(0, 0, dtype=torch.int64))
        self.train(norm.training)

    @property
    def batch(self) -> bool:
        return issubclass(self.kind, nn.modules.batchnorm._BatchNorm)

    def axes(self) -> dict[str, dict[int, Width]]:
        own = {"weight": {0: self.width}, "bias": {0: self.width}}
        return {**own, "running_mean": {1: self.width}, "running_var": {1: self.width}} if self.batch else own

    def select(self, config: Config) -> None:
        """Use the statistics of this config; -1 where there are none."""
        self.row = 0 if self.statistics == "shared" else self.rows.get(config.key, -1)

    def declare(self, configs: Iterable[Config]) -> None:
        """Make room for the statistics of more configs."""
        new = [c.key for c in dict.fromkeys(configs) if c.key not in self.rows]
        if not self.batch or self.statistics == "shared" or not new:
            return
        mean, var = self.running_mean, self.running_var
        self.running_mean = torch.cat([mean, mean.new_zeros(len(new), mean.shape[1])])
        self.running_var = torch.cat([var, var.new_ones(len(new), var.shape[1])])
        added = torch.tensor(new, dtype=torch.int64, device=self.keys.device)
        self.keys = torch.cat([self.keys, added]) if len(self.keys) else added
        self.rows = {tuple(k): i for i, k in enumerate(self.keys.tolist())}

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.part("weight"), self.part("bias")
        if issubclass(self.kind, nn.LayerNorm):
            return F.layer_norm(x, x.shape[-1:], w, b, self.eps)
        if issubclass(self.kind, nn.RMSNorm):
            return F.rms_norm(x, x.shape[-1:], w, self.eps)
        if issubclass(self.kind, nn.GroupNorm):
            return F.group_norm(x, x.shape[1] // self.per_group, w, b, self.eps)
        mean, var = self._running()
        if self.training:
            return F.batch_norm(x, mean, var, w, b, True, 0.0 if self.momentum is None else self.momentum, self.eps)
        if mean is None:
            if not self.measuring:
                raise BadInput("no batch statistics for this config: recalibrate(model, loader, [config]) first")
            mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        return F.batch_norm(x, mean, var, w, b, False, 0.0, self.eps)

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        if not 0 <= self.row < len(self.running_mean) or (self.training and self.statistics == "recalibrate" and not self.measuring):
            return None, None
        mean, var = self.part("running_mean"), self.part("running_var")
        assert mean is not None and var is not None
        return mean[self.row], var[self.row]

    def plain(self) -> nn.Module:
        w, b = self.part("weight"), self.part("bias")
        n = self.width.active * (self.size // self.width.size)
        options: dict[str, Any] = {"eps": self.eps, "device": "meta"}
        if issubclass(self.kind, nn.LayerNorm):
            return self._copy_to(nn.LayerNorm(n, elementwise_affine=w is not None, bias=b is not None, **options), weight=w, bias=b)
        if issubclass(self.kind, nn.RMSNorm):
            return self._copy_to(nn.RMSNorm(n, elementwise_affine=w is not None, **options), weight=w)
        if issubclass(self.kind, nn.GroupNorm):
            return self._copy_to(nn.GroupNorm(n // self.per_group, n, affine=w is not None, **options), weight=w, bias=b)
        mean, var = self._running()
        if mean is None:
            raise BadInput("no batch statistics for this config: recalibrate(model, loader, [config]) first")
        new = self.kind(n, momentum=self.momentum, affine=w is not None, **options)
        new.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        return self._copy_to(new, weight=w, bias=b, running_mean=mean, running_var=var)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        if self.batch and f"{prefix}keys" in state:  # another number of configs may have been declared
            for name in ("keys", "running_mean", "running_var"):
                own, given = getattr(self, name), state[prefix + name]
                if own.shape != given.shape:
                    setattr(self, name, own.new_empty(given.shape))
            self.rows = {tuple(k): i for i, k in enumerate(state[f"{prefix}keys"].tolist())}
        super()._load_from_state_dict(state, prefix, *args)


def _normed(norm: nn.Module) -> int | None:
    """How many features a norm scales, if its slices are known."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and len(norm.normalized_shape) == 1:
        return norm.normalized_shape[0]
    return None


class ElasticAttention(Attention):
    """Multi-head self-attention ``(n, time, features)`` that runs its leading heads.

    Args:
        stream: the width of what is read and added to; ``None`` is always all.
    """

    def __init__(
        self, features: int, heads: int, *, causal: bool = False, bias: bool = True, stream: Width | None = None, name: str = "heads"
    ) -> None:
        nn.Module.__init__(self)
        if features % heads:
            raise BadInput(f"{features} features cannot be shared by {heads} heads")
        self.head_dim, self.causal, self.kept = features // heads, causal, Width(name, heads)
        self.q, self.k, self.v = (ElasticLinear(features, features, bias, inputs=stream, outputs=self.kept) for _ in range(3))
        self.o = ElasticLinear(features, features, bias, inputs=self.kept, outputs=stream)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.kept.active

    @classmethod
    def of(cls, layer: nn.Module, *, causal: bool = False, stream: Width | None = None, name: str = "heads") -> ElasticAttention:
        """With the weights of this library's attention (shared) or of torch's (copied)."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        if isinstance(layer, Attention):
            parts = [layer.q, layer.k, layer.v, layer.o]
            new.head_dim, new.causal, new.kept = layer.head_dim, layer.causal, Width(name, layer.heads)
        elif isinstance(layer, nn.MultiheadAttention):
            if not layer._qkv_same_embed_dim or layer.bias_k is not None or layer.add_zero_attn or layer.dropout or not layer.batch_first:
                raise UnsupportedModel("needs batch_first, no dropout, no bias_k and one size of queries, keys and values", module=name)
            new.head_dim, new.causal, new.kept = layer.head_dim, causal, Width(name, layer.num_heads)
            biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
            parts = [_linear(w, b) for w, b in zip(layer.in_proj_weight.chunk(3), biases)] + [layer.out_proj]
        else:
            raise UnsupportedModel("is no attention whose heads are known", module=type(layer).__name__)
        new.q, new.k, new.v = (ElasticLinear.of(part, stream, new.kept) for part in parts[:3])
        new.o = ElasticLinear.of(parts[3], new.kept, stream)
        return new.train(layer.training)


def _linear(w: Tensor, b: Tensor | None) -> nn.Linear:
    new = nn.Linear(w.shape[1], w.shape[0], b is not None, device="meta")
    new.weight = nn.Parameter(w.detach().clone())
    if b is not None:
        new.bias = nn.Parameter(b.detach().clone())
    return new


class Depth(nn.Sequential):
    """Blocks of which the leading ``active`` run. Each must put out what it reads, as residual blocks do.

    Iterating goes over the running blocks only, so it also stands in for an ``nn.ModuleList`` that a model loops over.
    """

    def __init__(self, *blocks: nn.Module, least: int = 0, name: str = "depth") -> None:
        super().__init__(*blocks)
        if not 0 <= least <= len(blocks) or not blocks:
            raise BadInput(f"{name}: of {len(blocks)} blocks at least {least} cannot run")
        self.least, self.active, self.name = least, len(blocks), name

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.least, len(self._modules) + 1))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.active])

    def __len__(self) -> int:
        return self.active


def slots(model: nn.Module) -> tuple[tuple[Width, ...], tuple[Depth, ...]]:
    """The widths and depths of a model, each in the order in which a module first uses it."""
    widths: dict[int, Width] = {}
    depths = []
    for module in model.modules():
        if isinstance(module, Sliced):
            for axes in module.axes().values():
                widths.update((id(w), w) for w in axes.values())
        elif isinstance(module, Depth):
            depths.append(module)
    return tuple(widths.values()), tuple(depths)


def full(model: nn.Module) -> Config:
    """The config that runs everything."""
    widths, depths = slots(model)
    return Config(tuple(w.size for w in widths), tuple(len(d._modules) for d in depths))


def at(model: nn.Module, width: float | Sequence[float] = 1.0, depth: float | Sequence[float] = 1.0) -> Config:
    """The config of these shares of every width (or of each) and of the blocks that may be skipped (or of each depth)."""
    widths, depths = slots(model)
    return Config(
        tuple(w.at(r) for w, r in zip(widths, _each(width, len(widths), "widths"))),
        tuple(d.values[round(r * (len(d.values) - 1))] for d, r in zip(depths, _each(depth, len(depths), "depths"))),
    )


def grid(model: nn.Module, widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0), *, together: bool = False) -> list[Config]:
    """Every combination of these shares of the widths (``together``: all widths have the same share) with every combination of depths."""
    wide, deep = slots(model)
    per = [tuple(w.at(r) for r in widths) for w in wide]
    choices = list(zip(*per)) if together and per else list(product(*per))
    return list(dict.fromkeys(Config(tuple(w), d) for w in choices for d in product(*(d.values for d in deep))))


def _each(ratio: float | Sequence[float], n: int, what: str) -> Sequence[float]:
    ratios = [ratio] * n if isinstance(ratio, int | float) else list(ratio)
    if len(ratios) != n or not all(0 <= r <= 1 for r in ratios):
        raise BadInput(f"the model has {n} {what}, each needs a share between 0 and 1; got {ratios}")
    return ratios


@contextmanager
def active(model: nn.Module, config: Config) -> Iterator[nn.Module]:
    """Inside, ``model`` runs as ``config`` says; afterwards as before."""
    widths, depths = slots(model)
    check(config, widths, depths)
    norms = [m for m in model.modules() if isinstance(m, ElasticNorm) and m.batch]
    before = [w.active for w in widths], [d.active for d in depths], [m.row for m in norms]
    for w, n in zip(widths, config.widths):
        w.active = n
    for d, n in zip(depths, config.depths):
        d.active = n
    for m in norms:
        m.select(config)
    try:
        yield model
    finally:
        for slot, n in zip((*widths, *depths), (*before[0], *before[1])):
            slot.active = n
        for m, row in zip(norms, before[2]):
            m.row = row


def check(config: Config, widths: Sequence[Width], depths: Sequence[Depth]) -> None:
    """Raise :class:`BadInput` unless the model has such a config."""
    if len(config.widths) != len(widths) or len(config.depths) != len(depths):
        raise BadInput(
            f"the model has {len(widths)} widths and {len(depths)} depths; the config names {len(config.widths)} and {len(config.depths)}"
        )
    for slot, n in zip((*widths, *depths), config.key):
        if n not in slot.values:
            raise BadInput(f"{slot.name!r} cannot be {n}: it takes {_short(slot.values)}")


def _short(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) if len(values) <= 8 else f"{values[0]}, {values[1]}, ..., {values[-1]}"


def extract(model: nn.Module, config: Config) -> nn.Module:
    """A stand-alone plain module with copied weights that computes what ``model`` does under ``config``, bit for bit."""
    with active(model, config):
        model = copy.deepcopy(model)
    return _plain(model)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, Sliced):
        return module.plain()
    if isinstance(module, Depth):
        return nn.Sequential(*(_plain(m) for m in module)).train(module.training)
    if isinstance(module, ElasticAttention):
        heads, module = module.heads, _adopt(module, Attention)
        del module.kept
        module.heads = heads
    for name, child in list(module.named_children()):
        setattr(module, name, _plain(child))
    return module


def declare(model: nn.Module, configs: Iterable[Config]) -> None:
    """Give each config batch statistics of its own (``statistics="config"``), to be learned in training."""
    configs = list(configs)
    slot = slots(model)
    for config in configs:
        check(config, *slot)
    for module in model.modules():
        if isinstance(module, ElasticNorm):
            module.declare(configs)


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Loader, configs: Iterable[Config], *, batches: int = 8) -> None:
    """Measure the batch statistics of each config as their mean over the first batches."""
    norms = [m for m in model.modules() if isinstance(m, ElasticNorm) and m.batch]
    if not norms:
        return
    if any(m.statistics == "shared" for m in norms):
        raise BadInput("shared statistics belong to no config: build the model with statistics='config' or 'recalibrate'")
    configs, device = list(configs), device_of(model)
    declare(model, configs)
    modes, momenta = [(m, m.training) for m in model.modules()], [m.momentum for m in norms]
    model.eval()
    try:
        for config in configs:
            with active(model, config):
                k = 0
                for m in norms:
                    m.training = m.measuring = True
                for batch in loader:
                    if k == batches:
                        break
                    k += 1
                    for m in norms:
                        m.momentum = 1 / k
                    model(to(batch[0] if isinstance(batch, tuple | list) else batch, device))
                if not k:
                    raise BadInput("the loader yielded no samples to measure statistics on")
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum, m.measuring = momentum, False
        for module, mode in modes:
            module.training = mode


class ElasticFamily(nn.Module):
    """An elastic model and the configs that matter, from the cheapest to the dearest: what budget policies and samplers work on.

    Args:
        example: a batch on which the configs' FLOPs are measured to sort them; of equal ones the one with fewer units comes first.
    """

    def __init__(self, model: nn.Module, configs: Iterable[Config], example: Any) -> None:
        super().__init__()
        self.model = model
        configs = list(dict.fromkeys(configs))
        if not configs:
            raise BadInput("a family needs at least one config")
        if not any(slots(model)):
            raise UnsupportedModel(
                "has no elastic layer: make_elastic(model, example) makes one of an ordinary model", module=type(model).__name__
            )
        norms = [m for m in model.modules() if isinstance(m, ElasticNorm) and m.batch]
        if any(m.statistics == "config" for m in norms):
            declare(model, configs)
        price = dict(zip(configs, flops(model, configs, example)))
        self.configs = tuple(sorted(configs, key=lambda c: (price[c], sum(c.key), c.key)))

    def run(self, x: Any, config: Config) -> Tensor:
        with active(self.model, config):
            return self.model(x)

    def forward(self, x: Any) -> Tensor:
        """The dearest config."""
        return self.run(x, self.configs[-1])

    def extract(self, config: Config) -> nn.Module:
        return extract(self.model, config)


def flops(model: nn.Module, configs: Sequence[Config], example: Any) -> list[int]:
    """FLOPs a row of each config.

    One pass over everything tells what each elastic layer costs, of which a config takes the share of the weights in its slice. That is
    checked on the smallest, the middle and the largest; where it is not so (attention, layers used in other ways) each config is measured.
    """
    slices = [m for m in model.modules() if isinstance(m, Sliced)]
    norms = [m for m in slices if isinstance(m, ElasticNorm) and m.batch]
    widths, depths = slots(model)
    blocks = {id(m): (i, k) for i, d in enumerate(depths) for k, b in enumerate(d._modules.values()) for m in b.modules()}
    number, spent = {id(w): i for i, w in enumerate(widths)}, {id(m): 0 for m in slices}

    def measured(config: Config) -> int:
        with active(model, config):
            return CostTable.measure([model], example).full

    def share(config: Config) -> int:
        total = whole
        for m, follows in costly:
            i, k = blocks.get(id(m), (0, -1))
            part = spent[id(m)] if k < 0 or k < config.depths[i] else 0
            for w in follows:
                part = part * config.widths[w] // widths[w].size
            total += part - spent[id(m)]
        return total

    with evaluating(model):
        for m in norms:
            m.measuring = True  # prices need no statistics
        try:
            whole = measured(full(model))
            with active(model, full(model)), FlopCounterMode(display=False) as counter, torch.inference_mode():
                before: list[int] = []
                handles = [m.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops())) for m in slices]

                def after(m: nn.Module, *_: Any) -> None:
                    spent[id(m)] += counter.get_total_flops() - before.pop()

                handles += [m.register_forward_hook(after) for m in slices]
                try:
                    model(repeat(example, 1))
                finally:
                    for handle in handles:
                        handle.remove()
            costly = [(m, [number[id(w)] for w in m.axes()["weight"].values()]) for m in slices if spent[id(m)]]
            prices = [share(c) for c in configs]
            order = sorted(range(len(configs)), key=lambda i: configs[i].key)
            if any(prices[i] != measured(configs[i]) for i in {order[0], order[len(order) // 2], order[-1]}):
                prices = [measured(c) for c in configs]
        finally:
            for m in norms:
                m.measuring = False
    return prices


def units(model: nn.Module, width: Width) -> Tensor:
    """How much the readers of each unit weigh it: the L1 norm of the weights that read it, ``(units,)``."""
    total = torch.zeros(width.size, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, ElasticLinear | ElasticConv2d) and module.inputs is width:
            dim = 0 if isinstance(module, ElasticConv2d) and module.depthwise else 1
            weight = module.weight.detach().double().cpu().abs().transpose(0, dim)
            total += weight.reshape(width.size, -1).sum(1)
    return total


@torch.no_grad()
def reorder(model: nn.Module, scores: dict[str, Tensor] | None = None) -> None:
    """Sort the units of every width by importance, in place, so that the leading slice is the best one. The full network computes the same.

    Args:
        scores: importance of the units of a width by its name; without one, :func:`units`. Whole steps are moved, by their summed score.
    """
    for width in slots(model)[0]:
        score = units(model, width) if scores is None or width.name not in scores else scores[width.name]
        if score.shape != (width.size,):
            raise BadInput(f"{width.name!r} has {width.size} units, the scores have shape {tuple(score.shape)}")
        steps = score.view(-1, width.step).sum(1).argsort(descending=True, stable=True)
        order = (steps[:, None] * width.step + torch.arange(width.step)).flatten()
        for module in model.modules():
            if not isinstance(module, Sliced):
                continue
            for name, axes in module.axes().items():
                tensor = getattr(module, name, None)
                for dim in (d for d, w in axes.items() if w is width and tensor is not None):
                    per = tensor.shape[dim] // width.size
                    index = (order[:, None] * per + torch.arange(per)).flatten().to(tensor.device)
                    tensor.copy_(tensor.index_select(dim, index))
