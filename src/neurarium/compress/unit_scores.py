"""What a channel, a neuron or a head is worth, by every yardstick, and the plan that drops the cheapest until a budget is met.

All functions speak of the groups of a :class:`~neurarium.compress.graph.ChannelGraph` and return ``group id -> (units,)`` in float64;
larger = keep. So scores of different papers can be exchanged, compared and carried out by the same executor.

Weights of a unit: those that make it ("out": the rows of the convolution), those that read it ("in"), or "both".

``ablation`` is the ground truth of all of them: each unit alone is silenced (what reads it is set to zero) and the loss measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurarium.compress.calibrate import calibrate, is_conv1d, per_weight
from neurarium.compress.channels import ChannelPlan
from neurarium.compress.graph import ChannelGraph, Group
from neurarium.compress.sensitivity import Loss, collect, per_sample_grads
from neurarium.errors import BadInput, UnsupportedModel

__all__ = [
    "ablation", "choose_groups", "diagonal", "norm_product", "plan_units", "ranked", "unit_fluctuation", "unit_norm", "unit_sum",
    "unit_taylor", "unit_weights",
]  # fmt: skip

Scores = dict[str, Tensor]
KINDS = ("channels", "neurons", "heads")
_SIDES = {"out": ("out",), "in": ("in",), "both": ("out", "in")}


def choose_groups(graph: ChannelGraph, model: nn.Module, units: str | Sequence[str] = KINDS, coupled: str = "inner") -> list[Group]:
    """The groups of the kinds "channels" (made by convolutions), "neurons" and "heads" (both by linear layers), or of any of several.

    ``coupled="inner"`` leaves out the width of residual streams, whose channels several layers add to; "sum" takes them too.
    """
    kinds = (units,) if isinstance(units, str) else tuple(units)
    if not kinds or (wrong := [k for k in kinds if k not in KINDS]):
        raise BadInput(f"units must be among {', '.join(KINDS)}, got {wrong[0]!r}" if kinds else "units names no kind")
    if coupled not in ("inner", "sum"):
        raise BadInput(f"coupled must be 'inner' or 'sum', got {coupled!r}")
    chosen = [g for g in graph.groups if _kind(g, model) in kinds and (coupled == "sum" or not _residual(g, graph, model))]
    if not chosen:
        there = ", ".join(f"{g.id} ({_kind(g, model)}{', residual' * _residual(g, graph, model)})" for g in graph.groups[:5])
        frozen = "; ".join(f"{name}: {why}" for name, why in list(graph.frozen.items())[:3])
        raise UnsupportedModel(f"has no {' or '.join(kinds)} to remove; there are {there}; {frozen}", module=type(model).__name__)
    return chosen


def makers(group: Group) -> list[str]:
    """The modules that make a group's units."""
    return list(dict.fromkeys(m.module for m in group.members if m.side == "out"))


def _kind(group: Group, model: nn.Module) -> str:
    made = [model.get_submodule(m.module) for m in group.members if m.side == "out"]
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in made):
        return "channels"
    linear = all(isinstance(m, nn.Linear) or is_conv1d(m) or not list(m.children()) for m in made) and not isinstance(made[0], nn.RNNBase)
    wide = any(m.side == "in" and m.index.shape[1] > 1 for m in group.members)
    return "heads" if linear and wide and group.unit > 1 else "neurons"


def _residual(group: Group, graph: ChannelGraph, model: nn.Module) -> bool:
    """Whether layers with different inputs make the same channels: then these are added up."""
    sources: dict[str, set[str]] = {}
    for g in graph.groups:
        for m in g.members:
            if m.side == "in":
                sources.setdefault(m.module, set()).add(g.id)
    made = []
    for name in makers(group):
        module = model.get_submodule(name)
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.groups == module.in_channels:
            continue  # depthwise
        made.append(frozenset(sources.get(name, {"(input)"} if name not in graph.frozen else set())))
    embedded = any(isinstance(model.get_submodule(n), nn.Embedding) for n in makers(group))
    return len(set(made)) > 1 or (embedded and len(made) > 1) or not group.exact


def unit_weights(model: nn.Module, groups: Sequence[Group], weights: str = "out") -> dict[str, list[tuple[str, int, Tensor]]]:
    """Group id -> (parameter, dimension, (units, k) indices) of the weight matrices and kernels of its units."""
    if weights not in _SIDES:
        raise BadInput(f"weights must be 'out', 'in' or 'both', got {weights!r}")
    known = dict(model.named_parameters())
    found: dict[str, list[tuple[str, int, Tensor]]] = {}
    for group in groups:
        found[group.id] = []
        for member in group.members:
            if member.side in _SIDES[weights]:
                for attribute, dim in member.tensors:
                    name = f"{member.module}.{attribute}".lstrip(".")
                    if name in known and known[name].ndim >= 2:
                        found[group.id].append((name, dim, member.index))
    return found


def sum_into(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """A tensor summed into the units that `index` (units, k) names along `dim`, float64."""
    lines = tensor.detach().cpu().double().movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1)
    return lines[index].sum(1)


def unit_sum(model: nn.Module, groups: Sequence[Group], tensors: Mapping[str, Tensor], *, weights: str = "out") -> Scores:
    """Sums something that is given for every weight (name -> tensor of the parameter's shape) over the weights of each unit."""
    result = {}
    for name, uses in unit_weights(model, groups, weights).items():
        parts = [sum_into(tensors[p], dim, index) for p, dim, index in uses if p in tensors]
        result[name] = torch.stack(parts).sum(0) if parts else torch.zeros(_size(groups, name), dtype=torch.float64)
    return result


def _size(groups: Sequence[Group], name: str) -> int:
    return next(g.size for g in groups if g.id == name)


def unit_norm(model: nn.Module, groups: Sequence[Group], *, p: int = 1, weights: str = "out") -> Scores:
    """The p-norm of each unit's weights: the magnitude criterion."""
    powers = {name: w.detach().double().abs().pow(p) for name, w in model.named_parameters()}
    return {name: s.pow(1 / p) for name, s in unit_sum(model, groups, powers, weights=weights).items()}


def norm_product(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """The norm of what makes a unit times the norm of what reads it: unchanged when a ReLU unit is rescaled."""
    out, into = (unit_norm(model, groups, p=2, weights=side) for side in ("out", "in"))
    return {name: out[name] * into[name] for name in out}


def unit_fluctuation(model: nn.Module, groups: Sequence[Group], loader: Iterable, *, batches: int | None = None) -> Scores:
    """Variance of what a unit sends into each weight that reads it, times that weight squared, summed: what its mean cannot replace.

    Layers that nothing is known of (recurrent ones, attention inside one fused call) count for nothing.
    """
    layers = dict(model.named_modules())
    tensors = {}
    for name, stats in calibrate(model, loader, batches=batches).items():
        weight = layers[name].weight.detach().cpu().double()
        tensors[f"{name}.weight".lstrip(".")] = per_weight(stats.variance, layers[name]) * weight.square()
    return unit_sum(model, groups, tensors, weights="in")


def unit_taylor(
    model: nn.Module, groups: Sequence[Group], loader: Iterable, *, weights: str = "out", reduce: str = "batch", samples: int = 512,
    loss_fn: Loss = F.cross_entropy, chunk: int = 32,
) -> Scores:  # fmt: skip
    """|sum of gradient * weight| over a unit's weights: the first-order change of the loss when the unit goes.

    ``reduce="batch"``: of the mean loss; "sample": the mean over samples of each one's absolute change (Michel et al., 2019).
    """
    if reduce not in ("batch", "sample"):
        raise BadInput(f"reduce must be 'batch' or 'sample', got {reduce!r}")
    x, y = collect(loader, samples)
    known = dict(model.named_parameters())
    total: Scores = {}
    for rows, names in _gradients(model, groups, x, y, weights, loss_fn, chunk):
        mean = {n: torch.zeros_like(known[n], dtype=torch.float64, device="cpu") for n in names}
        for row in (rows.double().sum(0, keepdim=True) if reduce == "batch" else rows.double()).cpu():
            parts = row.split([known[n].numel() for n in names])
            change = {n: p.view(known[n].shape) * known[n].detach().cpu() for n, p in zip(names, parts, strict=True)}
            if reduce == "batch":
                mean = change
            else:
                for name, s in unit_sum(model, groups, change, weights=weights).items():
                    total[name] = total.get(name, torch.zeros(())) + s.abs() / len(x)
        if reduce == "batch":
            for name, s in unit_sum(model, groups, mean, weights=weights).items():
                total[name] = total.get(name, torch.zeros(())) + s / len(x)
    return {name: s.abs() for name, s in total.items()}


def diagonal(
    model: nn.Module, groups: Sequence[Group], loader: Iterable, *, weights: str = "out", samples: int = 512,
    loss_fn: Loss = F.cross_entropy, chunk: int = 32,
) -> dict[str, Tensor]:  # fmt: skip
    """The diagonal of the empirical Fisher, E[g^2], of the groups' weights: parameter name -> float64 tensor."""
    x, y = collect(loader, samples)
    known = dict(model.named_parameters())
    total: dict[str, Tensor] = {}
    for rows, names in _gradients(model, groups, x, y, weights, loss_fn, chunk):
        square = rows.double().square().sum(0).cpu() / len(x)
        for name, part in zip(names, square.split([known[n].numel() for n in names]), strict=True):
            total[name] = total.get(name, torch.zeros(())) + part.view(known[name].shape)
    return total


def _gradients(
    model: nn.Module, groups: Sequence[Group], x: Tensor, y: Tensor, weights: str, loss_fn: Loss, chunk: int
) -> Iterable[tuple[Tensor, list[str]]]:
    names = list(dict.fromkeys(p for uses in unit_weights(model, groups, weights).values() for p, _, _ in uses))
    for start in range(0, len(x), chunk):
        with sdpa_kernel(SDPBackend.MATH):
            rows = per_sample_grads(model, x[start : start + chunk], y[start : start + chunk], loss_fn, names=names, chunk=chunk)
        yield rows, names


@torch.no_grad()
def ablation(model: nn.Module, groups: Sequence[Group], loader: Iterable, *, samples: int = 512, loss_fn: Loss = F.cross_entropy) -> Scores:
    """The increase of the loss when a unit alone is silenced: everything that reads it is set to zero. One forward pass a unit."""
    x, y = collect(loader, samples)
    work = copy.deepcopy(model).eval()
    device = next(work.parameters()).device
    x, y = x.to(device), y.to(device)
    known = dict(work.named_parameters())
    base = float(loss_fn(work(x), y))
    readers = unit_weights(work, groups, "in")
    result = {}
    for group in groups:
        rises = torch.zeros(group.size, dtype=torch.float64)
        for u in range(group.size):
            before = []
            for name, dim, index in readers[group.id]:
                weight, columns = known[name], index[u].to(device)
                before.append((weight, dim, columns, weight.index_select(dim, columns)))
                weight.index_fill_(dim, columns, 0)
            rises[u] = float(loss_fn(work(x), y)) - base
            for weight, dim, columns, old in before:
                weight.index_copy_(dim, columns, old)
        result[group.id] = rises
    return result


def ranked(scores: Mapping[str, Tensor], floor: Callable[[int], int]) -> list[tuple[str, int]]:
    """(group, unit) from the lowest score up, ties by group and unit; each group's best `floor(size)` units are left out."""
    entries = []
    for place, (name, s) in enumerate(scores.items()):
        if s.ndim != 1 or not bool(torch.isfinite(s).all()):
            raise BadInput(f"{name}: scores must be a vector of finite numbers, got {tuple(s.shape)}")
        order = torch.argsort(s.detach().cpu().double(), stable=True).tolist()
        entries += [(float(s[u]), place, rank, name, u) for rank, u in enumerate(order[: len(order) - floor(len(order))])]
    return [(name, u) for _, _, _, name, u in sorted(entries, key=lambda e: e[:3])]


def plan_units(
    graph: ChannelGraph, scores: Mapping[str, Tensor], *, ratio: float, of: str = "params", max_layer_ratio: float = 0.95
) -> ChannelPlan:
    """Removes the units of lowest score, over all scored groups together, until a share `ratio` is gone.

    Args:
        scores: group id -> (units,), larger = keep; groups without scores stay whole.
        ratio: share to remove, in [0, 1): of the scored "units", or of the model's "params", "macs" or "bytes".
        max_layer_ratio: no group loses more than this share of its units; one always stays.
    """
    check_ratio(ratio, of, max_layer_ratio)
    order = ranked(scores, floor_of(max_layer_ratio))
    count = first_that_fits(lambda n: graph.cost(kept_without(scores, order[:n])), graph, scores, len(order), ratio, of)
    return graph.plan(kept_without(scores, order[:count]), scores=dict(scores))


def check_ratio(ratio: float, of: str, max_layer_ratio: float) -> None:
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"ratio must be in [0, 1): it would remove whole layers, got {ratio}")
    if not 0.0 < max_layer_ratio <= 1.0:
        raise BadInput(f"max_layer_ratio must be in (0, 1], got {max_layer_ratio}")
    if of not in ("units", "params", "macs", "bytes"):
        raise BadInput(f"of must be 'units', 'params', 'macs' or 'bytes', got {of!r}")


def floor_of(max_layer_ratio: float) -> Callable[[int], int]:
    """How many units of a group must stay."""
    return lambda size: max(1, math.ceil((1 - max_layer_ratio) * size - 1e-9))


def kept_without(scores: Mapping[str, Tensor], gone: Iterable[tuple[str, int]]) -> dict[str, Tensor]:
    masks = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    for name, unit in gone:
        masks[name][unit] = False
    return {name: mask.nonzero()[:, 0] for name, mask in masks.items()}


def first_that_fits(cost: Callable[[int], Any], graph: ChannelGraph, scores: Mapping[str, Tensor], most: int, ratio: float, of: str) -> int:
    """The smallest number of units to take away so that a share `ratio` is gone."""
    if of == "units":
        count = round(ratio * sum(map(len, scores.values())))
        if count > most:
            raise BadInput(f"ratio {ratio} asks for {count} units to go, but only {most} may: every layer keeps some")
        return count
    whole = getattr(graph.cost(), of)
    target = whole * (1 - ratio) * (1 + 1e-12)
    if (least := getattr(cost(most), of)) > target:
        raise BadInput(f"ratio {ratio} leaves {target:g} {of}, but what must stay has {least} of {whole}")
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if getattr(cost(middle), of) <= target else (middle + 1, high)
    return low
