"""What methods that remove whole units share: the model as the channel graph sees it, norms of units, statistics after a cut.

A unit (:class:`~neurarium.compress.graph.Group`) owns slices of several tensors: the filter that makes a channel ("out"), its
normalisation ("norm"), the columns of what reads it ("in"). Its norm is over some or all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neurarium.compress.blocks import explicit
from neurarium.compress.graph import ChannelGraph, Example, Group
from neurarium.errors import BadInput

__all__ = ["budget", "keep_top", "refresh_norms", "traced", "unit_norms", "unit_slices"]


def traced(model: nn.Module, example: Example) -> tuple[nn.Module, ChannelGraph]:
    """The model and its channel graph; where it has torch's fused encoder layers, an equal model whose attention can lose heads."""
    if any(type(m) is nn.TransformerEncoderLayer for m in model.modules()):
        model = explicit(model)
    return model, ChannelGraph.trace(model, example)


def unit_slices(tensors: Mapping[str, Tensor], group: Group, sides: Sequence[str] = ("out", "in", "norm")) -> list[Tensor]:
    """The (units, numbers) slices of a group in each of its tensors; `tensors` holds parameters (and buffers) by name."""
    found = []
    for member in group.members:
        if member.side not in sides:
            continue
        for attribute, dim in member.tensors:
            name = f"{member.module}.{attribute}".lstrip(".")
            if name in tensors:
                tensor = tensors[name].movedim(dim, 0)
                found.append(tensor[member.index.to(tensor.device)].flatten(1))
    return found


def unit_norms(
    model: nn.Module, graph: ChannelGraph, *, p: float = 2.0, sides: Sequence[str] = ("out",), biases: bool = False
) -> dict[str, Tensor]:
    """Group id -> norm of each unit over all of its slices, float64. Biases and scales count only with `biases`."""
    with torch.no_grad():
        tensors = {n: t.detach().cpu().double() for n, t in model.named_parameters(remove_duplicate=False) if biases or t.ndim > 1}
        result = {}
        for group in graph.groups:
            parts = unit_slices(tensors, group, sides)
            result[group.id] = torch.cat(parts, 1).norm(p, 1) if parts else torch.zeros(group.size, dtype=torch.float64)
    return result


def keep_top(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The units of largest score in each group, ties to the lower index."""
    return {name: torch.argsort(s, descending=True, stable=True)[: counts[name]].sort().values for name, s in scores.items()}


def budget(graph: ChannelGraph, scores: Mapping[str, Tensor], ratio: float, *, minimum: float = 1) -> dict[str, Tensor]:
    """Kept units: one threshold on the scores over all groups, the lowest at which at most `ratio` of the multiply-adds remain."""
    from neurarium.compress.allocate import global_threshold

    if not 0.0 < ratio <= 1.0:
        raise BadInput(f"ratio is the share of multiply-adds that stays, in (0, 1], got {ratio}")
    order = [g.id for g in graph.groups]
    masks = global_threshold(
        {name: scores[name] for name in order}, ratio * graph.cost().macs, minimum=minimum,
        cost=lambda kept: float(graph.macs([int(kept[name].sum()) for name in order])),
    )  # fmt: skip
    return {name: mask.nonzero()[:, 0] for name, mask in masks.items()}


@torch.no_grad()
def refresh_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Sets the running statistics of every batch normalisation to those of x, in place; modes stay."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    modes = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.momentum = 1.0
        m.train()
    model(x.to(next(model.parameters()).device))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    for m, training in modes.items():
        m.training = training
    return model
