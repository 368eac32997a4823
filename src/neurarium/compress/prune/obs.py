"""WoodFisher, the optimal-brain-surgeon baseline: prune in one shot by w^2 / [H^-1]_qq and correct the weights that stay.

Removing weight q alone is best answered by the update -w_q H^-1 e_q / [H^-1]_qq and costs w_q^2 / (2 [H^-1]_qq). For a set of weights
the single updates are added, which ignores that they interact: that is what CHITA mends.

*Source*: Singh and Alistarh, WoodFisher (2020), with the inverse by Woodbury on all samples at once instead of one rank-one update a
sample (the same matrix).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from neurarium.compress.pattern import keep_largest
from neurarium.compress.plan import MaskPlan, apply, flat_weights, prunable, shaped, weight_names
from neurarium.compress.sensitivity import FisherOperator, Loss, collect, per_sample_grads
from neurarium.errors import BadInput

__all__ = ["woodfisher"]


def woodfisher(
    model: nn.Module,
    loader: Iterable,
    *,
    sparsity: float,
    samples: int = 500,
    ridge: float = 1e-4,
    update: bool = True,
    loss_fn: Loss = F.cross_entropy,
    modules: tuple = (nn.Linear, nn.Conv2d),
) -> nn.Module:
    """A copy of the model pruned over all layers together.

    Args:
        loader: ``(x, y)`` batches; the first `samples` rows give the Fisher.
        ridge: added to the Fisher's diagonal.
        update: correct the remaining weights (False: selection only).
    """
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    layers, skipped = prunable(model, modules)
    x, y = collect(loader, samples)
    rows = per_sample_grads(model, x, y, loss_fn, names=weight_names(layers))
    w = flat_weights(layers)
    fisher = FisherOperator(rows, ridge)
    diagonal = fisher.inverse_diagonal()
    mask = keep_largest((w * w / diagonal)[None], w.numel() - round(sparsity * w.numel()))[0]
    if update:
        w = w - fisher.solve(torch.where(mask, 0.0, w / diagonal))
    return apply(model, MaskPlan(shaped(layers, mask), shaped(layers, w * mask), skipped=skipped))
