"""The baselines of every pruning paper: remove the smallest weights, or those of the smallest diagonal-Fisher saliency.

Magnitude: score |w|. Diagonal Fisher (optimal brain damage with the empirical Fisher): score w^2 E[g^2] / 2. Neither changes the
weights that stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.pattern import Pattern, Unstructured, keep_largest
from neurarium.compress.plan import MaskPlan, apply, prunable, weight_names
from neurarium.compress.sensitivity import Loss, collect, per_sample_grads
from neurarium.errors import BadInput

__all__ = ["diagonal_fisher", "magnitude", "plan_magnitude", "plan_scores"]


def plan_scores(
    model: nn.Module, scores: dict[str, Tensor], sparsity: float, *, scope: str = "global", pattern: Pattern | None = None, skipped: dict
) -> MaskPlan:
    """Keeps the largest scores: over all layers together ("global", single weights only), or in each "layer" or "row"."""
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    pattern = Unstructured() if pattern is None else pattern
    if scope != "global":
        return MaskPlan({k: pattern.mask(s, sparsity, scope=scope) for k, s in scores.items()}, {}, pattern, skipped)
    if not isinstance(pattern, Unstructured):
        raise BadInput("scope='global' ranks single weights; use scope='layer' or 'row' with a structured pattern")
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = keep_largest(flat[None], flat.numel() - round(sparsity * flat.numel()))[0]
    parts = kept.split([s.numel() for s in scores.values()])
    return MaskPlan({k: part.view_as(s) for (k, s), part in zip(scores.items(), parts, strict=True)}, {}, pattern, skipped)


def plan_magnitude(
    model: nn.Module, *, sparsity: float, scope: str = "global", pattern: Pattern | None = None, modules: tuple = (nn.Linear, nn.Conv2d)
) -> MaskPlan:
    """The plan of :func:`magnitude`."""
    layers, skipped = prunable(model, modules)
    scores = {name: m.weight.detach().abs().float() for name, m in layers.items()}
    return plan_scores(model, scores, sparsity, scope=scope, pattern=pattern, skipped=skipped)


def magnitude(model: nn.Module, *, sparsity: float, **options: object) -> nn.Module:
    """A copy of the model without its smallest weights.

    Args:
        sparsity: share of the weights to remove, in [0, 1).
        scope: "global" (one threshold for all layers), "layer" or "row".
        pattern: :class:`~neurarium.compress.pattern.Unstructured` (default), NM, Block or Group.
    """
    return apply(model, plan_magnitude(model, sparsity=sparsity, **options))  # type: ignore[arg-type]


def diagonal_fisher(
    model: nn.Module,
    loader: Iterable,
    *,
    sparsity: float,
    samples: int = 500,
    loss_fn: Loss = F.cross_entropy,
    modules: tuple = (nn.Linear, nn.Conv2d),
) -> nn.Module:
    """A copy without the weights of smallest w^2 E[g^2], over all layers together."""
    layers, skipped = prunable(model, modules)
    x, y = collect(loader, samples)
    scores = {}
    for parameter, (name, module) in zip(weight_names(layers), layers.items(), strict=True):
        grads = per_sample_grads(model, x, y, loss_fn, names=[parameter])
        scores[name] = (module.weight.detach().float().flatten() ** 2 * grads.square().mean(0)).view(module.weight.shape)
    return apply(model, plan_scores(model, scores, sparsity, skipped=skipped))
