"""SparseGPT: prune a layer column by column and let the columns still to come make good for what was lost.

Each row w of a layer's weight is to change by little in the norm of its inputs, (w - w_bar) H (w - w_bar)^T with H = E[x x^T]. Let F be the
columns not yet visited. Fixing the next weight w_i at q costs (w_i - q)^2 / (2 [H_FF^-1]_ii) if the later ones answer optimally, by

    w_F <- w_F - (w_i - q) / [H_FF^-1]_ii * [H_FF^-1]_i

(optimal brain surgeon). The order is the same for all rows, so one matrix serves them all: with the upper Cholesky factor U of H^-1,
[H_FF^-1]_ii = U_ii^2 and [H_FF^-1]_i = U_ii U_i,F. Columns are visited in blocks: within a block updates are made at once, on the columns
behind it in one product at its end. The mask of a block is chosen when it is reached, by the cost above; that of an N:M group when the
group is reached.

*Source*: Frantar and Alistarh, SparseGPT (2023), algorithm 1. *Departures*: exact counts (every block brings the total to the
rounded share, ties go to the lower index) instead of a threshold; float64; convolutions, also grouped ones, by their unfolded input.
*Cost*: columns^3 for the factor and rows columns^2 for the updates of each layer; by default one forward pass over the data a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from neurarium.compress.calibrate import InputStats
from neurarium.compress.pattern import NM, Block, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply
from neurarium.compress.prune.layerwise import layerwise, per_group
from neurarium.compress.prune.wanda import resolve
from neurarium.errors import BadInput

__all__ = ["obs_sweep", "plan_sparsegpt", "sparsegpt"]


def plan_sparsegpt(
    model: nn.Module,
    loader: Iterable,
    *,
    sparsity: float | None = None,
    scope: str = "layer",
    pattern: Pattern | None = None,
    damping: float = 0.01,
    block: int = 128,
    modules: Sequence[type] = (nn.Linear, nn.Conv2d),
    skip: Sequence[str] = (),
    batches: int | None = None,
    sequential: bool = True,
) -> MaskPlan:
    """The plan of :func:`sparsegpt`; its values are the updated weights."""
    pattern, sparsity = resolve(pattern, sparsity)

    def decide(module: nn.Module, stats: InputStats) -> tuple[Tensor, Tensor]:
        weight = module.weight.detach()
        flat = weight.flatten(1).double().cpu()
        mask, before = torch.zeros_like(flat, dtype=torch.bool), flat.clone()
        for rows, gram in per_group(module, stats.gram):
            flat[rows], mask[rows] = obs_sweep(before[rows], gram, sparsity, pattern=pattern, scope=scope, damping=damping, block=block)
        return mask.view_as(weight), flat.view(weight.shape).to(weight)

    return layerwise(
        model, loader, decide, pattern=pattern, modules=modules, skip=skip, gram=True, batches=batches, sequential=sequential
    )  # fmt: skip


def sparsegpt(model: nn.Module, loader: Iterable, **options: object) -> nn.Module:
    """A copy of the model, each layer pruned and its remaining weights corrected on its inputs.

    Args:
        loader: calibration batches, see :func:`~neurarium.compress.calibrate.calibrate`.
        sparsity: share of the weights to remove, in [0, 1); with ``pattern=NM(n, m)`` it follows from the pattern.
        scope: "layer" or "row": within which the weights of one block of columns are compared.
        pattern: :class:`~neurarium.compress.pattern.Unstructured` (default), NM, Block or Group.
        damping: added to H's diagonal, as a share of its mean.
        block: columns for which the mask is chosen at once.
        modules, skip, batches: as in :func:`~neurarium.compress.prune.wanda.wanda`.
        sequential: measure each layer behind the layers already pruned.
    """
    return apply(model, plan_sparsegpt(model, loader, **options))  # type: ignore[arg-type]


def obs_sweep(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    scope: str = "layer",
    damping: float = 0.01,
    block: int = 128,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One matrix (rows, columns) pruned from its first column to its last.

    Args:
        gram: E[x x^T] of its inputs.
        mask: True = stays, if the choice is already made; then only the updates are computed.

    Returns:
        the new weights (zero outside the mask) and the mask.
    """
    pattern = Unstructured() if pattern is None else pattern
    if not damping >= 0 or block < 1:
        raise BadInput(f"damping must be >= 0 and block >= 1, got {damping} and {block}")
    width = {NM: lambda: pattern.m, Block: lambda: pattern.into}.get(type(pattern), lambda: 1)()
    chunk = width if isinstance(pattern, NM) else max(1, block // width) * width  # columns whose mask is chosen together
    columns = weight.shape[1]
    if columns % width:
        pattern.mask(weight, sparsity)  # raises what does not fit
    w = weight.double().clone()
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    factor = _factor(gram, w, damping)
    for start in range(0, columns, max(1, block // chunk) * chunk):
        stop = min(start + max(1, block // chunk) * chunk, columns)
        errors = torch.zeros(len(w), stop - start, dtype=torch.float64)
        for i in range(start, stop):
            if mask is None and (i - start) % chunk == 0:
                here = slice(i, min(i + chunk, columns))
                score = (w[:, here] / factor.diagonal()[here]).square()
                share = _share(sparsity, weight, here, width, pattern, scope)
                kept[:, here] = pattern.mask(score, share, scope=scope) if share < 1 else False
            errors[:, i - start] = torch.where(kept[:, i], 0.0, w[:, i] / factor[i, i])
            w[:, i:stop] -= errors[:, i - start, None] * factor[i, i:stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.where(kept, w, 0.0), kept


def _factor(gram: Tensor, w: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (H + damping mean(diag H) I)^-1. Inputs that are always zero get an independent entry and no weight."""
    h = gram.double().clone()
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean() if not bool(dead.all()) else torch.ones(())
    w[:, dead] = 0.0
    h.diagonal()[dead] = mean
    h.diagonal().add_(damping * mean)
    lower, singular = torch.linalg.cholesky_ex(h)
    if not int(singular):
        upper, singular = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(singular):
        raise BadInput(f"the Gram matrix of {len(h)} inputs is singular: use more calibration data or a larger damping than {damping}")
    return upper


def _share(sparsity: float, weight: Tensor, here: slice, width: int, pattern: Pattern, scope: str) -> float:
    """The sparsity of some columns that brings the number removed up to them to the rounded share of all."""
    if isinstance(pattern, NM):
        return sparsity
    rows = 1 if scope == "row" else weight.shape[0] // getattr(pattern, "out", 1)
    before, after = (round(sparsity * rows * (end // width)) for end in (here.start, here.stop))
    return (after - before) / (rows * ((here.stop - here.start) // width))
