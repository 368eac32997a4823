"""Layers of low rank, and putting them in the place of a model's dense ones.

:class:`LowRankLinear` and :class:`LowRankConv2d` are two ordinary layers in a row, ``first`` and ``second``, so they train, save, export
and can be quantised or pruned like any others. ``weight`` is the dense weight that they make together: code that reads a layer's weight
(the fused path of ``nn.TransformerEncoderLayer``, a tied output) still computes the right thing, only at the dense cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neurarium.compress.factor.fold import factors, max_rank, rank_size, unfold
from neurarium.errors import BadInput, UnsupportedModel

if TYPE_CHECKING:
    from neurarium.compress.rank_plan import RankPlan

__all__ = ["GroupedLinear", "LowRankConv2d", "LowRankLinear", "apply_ranks", "decomposable", "low_rank", "rank_macs", "why_not_low_rank"]


class GroupedLinear(nn.Module):
    """Each of `groups` slices of the input has its own linear map: a block-diagonal layer, weight ``(out, in / groups)``."""

    def __init__(self, in_features: int, out_features: int, groups: int, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        if groups < 1 or in_features % groups or out_features % groups:
            raise BadInput(f"{in_features} inputs and {out_features} outputs cannot both be cut into {groups} groups")
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(-1, self.groups, self.weight.shape[1]).transpose(0, 1)  # (groups, rows, in / groups)
        blocks = self.weight.view(self.groups, -1, self.weight.shape[1])
        y = torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, bias={self.bias is not None}"


class _LowRank(nn.Module):
    """What both layers share: two factors, their product, the numbers that a plan holds."""

    first: nn.Module
    second: nn.Module
    rank: int
    splits: int
    scheme: int
    shape: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors make; a plain tensor, computed anew on every use."""
        right = self.first.weight.reshape(self.splits, self.rank, -1)  # (splits, rank, columns / splits)
        second = self.second.weight.reshape(self.shape[0], self.splits * self.rank, -1)
        left = second.transpose(1, 2).reshape(-1, self.splits, self.rank)  # rows (f, taps)
        matrix = torch.einsum("asr,src->asc", left, right).flatten(1)
        return unfold(matrix, self.shape, self.scheme)

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    @property
    def entry(self) -> tuple[int, int, int]:
        """(splits, rank, scheme), as in a RankPlan."""
        return self.splits, self.rank, self.scheme

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Takes what :func:`~neurarium.compress.factor.fold.factors` gives."""
        f = self.shape[0]
        with torch.no_grad():
            self.first.weight.copy_(right.reshape(self.first.weight.shape))
            second = left.reshape(f, -1, self.splits * self.rank).transpose(1, 2)  # (f, splits * rank, taps)
            self.second.weight.copy_(second.reshape(self.second.weight.shape))

    def extra_repr(self) -> str:
        return f"splits={self.splits}, rank={self.rank}, scheme={self.scheme}"


class LowRankLinear(_LowRank):
    """``y = B (A_1 x_1, ..., A_k x_k) + b``: inputs in k slices, each mapped to `rank` numbers, all of them to the outputs.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        rank: j, of each slice.
        splits: k; must divide in_features.

    Parameters: j (in + k out), plus the bias; as many multiply-adds a row.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, splits: int = 1, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        _check_rank((out_features, in_features), rank, splits, 0)
        self.in_features, self.out_features, self.rank, self.splits, self.scheme = in_features, out_features, rank, splits, 0
        self.shape = (out_features, in_features)
        like = {"device": device, "dtype": dtype}
        if splits == 1:
            self.first = nn.Linear(in_features, rank, bias=False, **like)
        else:
            self.first = GroupedLinear(in_features, splits * rank, splits, bias=False, **like)
        self.second = nn.Linear(splits * rank, out_features, bias=bias, **like)

    @classmethod
    def like(cls, layer: nn.Linear, rank: int, *, splits: int = 1, scheme: int = 0, device=None) -> LowRankLinear:
        """Untrained, with the sizes, dtype and bias of a dense layer."""
        if scheme:
            raise BadInput(f"a linear layer has scheme 0 alone, got {scheme}")
        device = layer.weight.device if device is None else device
        return cls(
            layer.in_features, layer.out_features, rank, splits=splits, bias=layer.bias is not None, device=device, dtype=layer.weight.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def to_dense(self) -> nn.Linear:
        """One ordinary layer with the same function."""
        like = {"device": self.second.weight.device, "dtype": self.second.weight.dtype}
        return _filled(nn.Linear(self.in_features, self.out_features, self.bias is not None, **like), self)  # type: ignore[return-value]


class LowRankConv2d(_LowRank):
    """Two convolutions with the function of one whose folded weight has low rank (schemes: :mod:`neurarium.compress.factor.fold`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as of ``nn.Conv2d`` (groups = 1).
        rank: j, of each slice of input channels.
        splits: k; must divide in_channels.
        scheme: 0 to 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        *,
        splits: int = 1,
        scheme: int = 0,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        whole = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode=padding_mode, device="meta")
        self.shape = tuple(whole.weight.shape)
        _check_rank(self.shape, rank, splits, scheme)
        self.in_channels, self.out_channels, self.rank, self.splits, self.scheme = in_channels, out_channels, rank, splits, scheme
        self.kernel_size, self.stride, self.dilation = whole.kernel_size, whole.stride, whole.dilation
        self.padding, self.padding_mode = whole.padding, padding_mode
        rank_channels, like = splits * rank, {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        own = [(True, True), (False, True), (True, False), (False, False)][scheme]  # does the first one act along height, width?
        self.first = nn.Conv2d(in_channels, rank_channels, **self._along(own), groups=splits, bias=False, **like)
        rest = (not own[0], not own[1])
        self.second = nn.Conv2d(rank_channels, out_channels, **self._along(rest), bias=bias, **like)

    def _along(self, axes: tuple[bool, bool]) -> dict:
        """Kernel, stride, padding and dilation along the given axes, 1 and no padding along the others."""
        kernel, stride, dilation = (
            tuple(v if a else 1 for v, a in zip(values, axes, strict=True)) for values in (self.kernel_size, self.stride, self.dilation)
        )
        padding = self.padding if isinstance(self.padding, str) else tuple(p if a else 0 for p, a in zip(self.padding, axes, strict=True))
        return {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}

    @classmethod
    def like(cls, layer: nn.Conv2d, rank: int, *, splits: int = 1, scheme: int = 0, device=None) -> LowRankConv2d:
        """Untrained, with the sizes, dtype, stride, padding and bias of a dense layer."""
        if layer.groups != 1:
            raise BadInput(f"a convolution with {layer.groups} groups is block-diagonal already; only groups=1 can be decomposed")
        return cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, rank, splits=splits, scheme=scheme, stride=layer.stride,
            padding=layer.padding, dilation=layer.dilation, bias=layer.bias is not None, padding_mode=layer.padding_mode,
            device=layer.weight.device if device is None else device, dtype=layer.weight.dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def to_dense(self) -> nn.Conv2d:
        """One ordinary layer with the same function."""
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, bias=self.bias is not None,
            padding_mode=self.padding_mode, device=self.second.weight.device, dtype=self.second.weight.dtype,
        )  # fmt: skip
        return _filled(dense, self)  # type: ignore[return-value]


def low_rank(layer: nn.Module, rank: int, *, splits: int = 1, scheme: int = 0) -> LowRankLinear | LowRankConv2d:
    """The best low-rank copy of a linear or convolution layer: truncated SVD of each slice of its folded weight, in float64."""
    if reason := why_not_low_rank(layer):
        raise UnsupportedModel(reason, module=type(layer).__name__)
    kind = LowRankLinear if type(layer) is nn.Linear else LowRankConv2d
    device = layer.weight.device  # built without storage first: an initialisation would move the global random state
    result = kind.like(layer, rank, splits=splits, scheme=scheme, device="meta").to_empty(device=device)  # type: ignore[arg-type]
    result.set_factors(*factors(layer.weight, rank, splits, scheme))
    if layer.bias is not None:
        with torch.no_grad():
            result.second.bias.copy_(layer.bias)
        result.second.bias.requires_grad_(layer.bias.requires_grad)
    result.first.weight.requires_grad_(layer.weight.requires_grad)
    result.second.weight.requires_grad_(layer.weight.requires_grad)
    return result.train(layer.training)


def why_not_low_rank(layer: nn.Module) -> str | None:
    """The reason why a layer cannot be decomposed, or None."""
    if isinstance(layer, _LowRank):
        return "it is of low rank already"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"{type(layer).__name__} is neither Linear nor Conv2d"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"its {layer.groups} groups make it block-diagonal already"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it carries hooks"
    return None


def decomposable(model: nn.Module, modules: Sequence[type] = (nn.Conv2d, nn.Linear)) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can be decomposed, by name, and why the others that hold a weight matrix cannot.

    A module that is used several times is listed once; a weight that several modules share is left alone. A model with nothing to
    decompose is refused, unless it is of low rank already: then the first dictionary is empty.
    """
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(weight := module._parameters.get("weight"), Tensor):
            owners.setdefault(id(weight), []).append(name)
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        weight = module._parameters.get("weight")
        if isinstance(module, _LowRank):
            inside.append(f"{name}." if name else "")
        elif weight is None or weight.ndim < 2:
            continue
        if reason := why_not_low_rank(module):
            skipped[name] = reason
        elif type(module) not in modules:
            skipped[name] = f"{type(module).__name__} was not asked for"
        elif len(tied := owners[id(weight)]) > 1:
            skipped[name] = f"its weight is tied to {next(n for n in tied if n != name)}"
        else:
            found[name] = module
    if not found and not inside:
        listed = "".join(f"; {n}: {why}" for n, why in list(skipped.items())[:3])
        raise UnsupportedModel(f"has no layer that can be decomposed{listed}", module=type(model).__name__)
    return found, skipped


def apply_ranks(model: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of the model with the planned layers decomposed, exact at full rank. The input is untouched.

    A layer that already has the planned splits, rank and scheme stays as it is; a module used in several places stays shared.
    """
    plan.check(model)
    result = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, (splits, rank, scheme) in plan.ranks.items():
        old = result.get_submodule(name)
        if not isinstance(old, _LowRank):
            made[old] = low_rank(old, rank, splits=splits, scheme=scheme)
    if result in made:
        return made[result]
    for parent in list(result.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in made:
                parent._modules[child_name] = made[child]
    return result


def rank_macs(layer: nn.Module, rank: int, size: tuple[int, int] | None = None, *, splits: int = 1, scheme: int = 0) -> int:
    """Multiply-adds of the decomposed layer for one input row, or for one image of ``size`` (height, width) where it is a convolution."""
    if type(layer) is nn.Linear:
        return rank * rank_size(tuple(layer.weight.shape), splits, scheme)
    if size is None:
        raise BadInput("a convolution's multiply-adds depend on the image: give its size")
    pair = LowRankConv2d.like(layer, rank, splits=splits, scheme=scheme, device="meta")  # type: ignore[arg-type]
    total = 0
    for conv in (pair.first, pair.second):
        size = _out_size(conv, size)
        total += conv.weight.numel() * size[0] * size[1]
    return total


def _out_size(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    if conv.padding == "same":
        return size
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    )  # type: ignore[return-value]


def _check_rank(shape: tuple[int, ...], rank: int, splits: int, scheme: int) -> None:
    if not 1 <= rank <= (most := max_rank(shape, splits, scheme)):
        raise BadInput(f"a weight {shape} in {splits} slices has ranks 1..{most} in scheme {scheme}, got {rank}")


def _filled(dense: nn.Module, source: _LowRank) -> nn.Module:
    with torch.no_grad():
        dense.weight.copy_(source.weight)
        if source.bias is not None:
            dense.bias.copy_(source.bias)
    return dense.train(source.training)
