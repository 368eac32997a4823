"""DSnoT: a sparse layer's mask improved by swaps, weight for weight, until the row's mean error is gone. Nothing is trained.

A row of a pruned layer misses E = sum over removed j of W_j mean_j of its expected output (mean over calibration inputs). Each cycle
swaps one weight for another, so that the sparsity stays exactly what it was:

    grow   g = argmax over removed j of   sign(E) W_j mean_j / var_j^p,
    prune  q = argmin over kept j with sign(E) W_j mean_j < 0 of   |W_j| ||x_j||_2,
    E <- E - W_g mean_g + W_q mean_q.

What is grown brings back most of the missing mean for little variance; what is pruned is what Wanda values least among the weights whose
loss moves E the right way. A swap that would turn E's sign is not made and ends the row (``same_sign``), as does |E| <= ``threshold``.
No weight takes part twice. Where inputs have no mean there is no error of this kind and nothing happens: the method lives on layers
behind a ReLU, and only there does it pay to apply it (``modules``).

Because E keeps its sign, both orders are fixed beforehand: the t-th swap takes the t-th of either list, E after t swaps is a cumulative
sum, and a layer costs two sorts. N:M patterns (q comes from g's group) and ``same_sign=False`` go cycle by cycle.

*Source*: Zhang et al., Dynamic Sparse No Training (ICLR 2024), equations 3 to 7 and algorithm 1. The authors' public code was read for the
order of candidates and the stopping rules.
*Departures*: errors are means over tokens (their sums over sequences of 2048 make their threshold of 0.1 about 5e-5 here); a swap must
lower |E| on both sides, a row without such a pair stops; statistics come from one pass of the dense model, as for Wanda
(``sequential`` measures each layer on the inputs that it gets in the sparse model, behind the layers already done); convolutions by
their unfolded input; where the start has corrected weights (SparseGPT, CHITA) they keep their values, and grown ones take the dense
model's.
*Cost*: one forward pass and two sorts a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from neurarium.compress.calibrate import InputStats, calibrate, per_weight
from neurarium.compress.pattern import NM, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply, prunable
from neurarium.errors import BadInput

__all__ = ["dsnot", "plan_dsnot", "reselect", "row_error"]


def dsnot(sparse_model: nn.Module, dense_model: nn.Module, loader: Iterable, **options: object) -> nn.Module:
    """A masked copy of the sparse model with swapped weights and the sparsity of each row as it was.

    Args:
        sparse_model: masked (see :func:`~neurarium.compress.plan.apply`), or with zeros where weights were removed.
        dense_model: the model it was pruned from: values of the weights that come back.
        loader: calibration batches, see :func:`~neurarium.compress.calibrate.calibrate`.
        cycles: most swaps a row; a float below 1 is a share of the layer's inputs.
        threshold: |mean error| at which a row is content.
        var_power: p; 0 leaves the variance out.
        same_sign: never let the error turn its sign.
        nm: ``NM(n, m)``: keep this pattern.
        modules: names of the layers to work on, or the ends of their names (``"down"``); None: all.
        batches: calibrate on this many only.
        sequential: measure each layer in the sparse model, behind the layers already done; one pass a layer.

    Raises:
        UnsupportedModel: no layer that a mask can hold.
        BadInput: models that do not fit together, no removed weight, an empty or non-finite loader.
    """
    return apply(sparse_model, plan_dsnot(sparse_model, dense_model, loader, **options))  # type: ignore[arg-type]


def plan_dsnot(
    sparse_model: nn.Module,
    dense_model: nn.Module,
    loader: Iterable,
    *,
    cycles: float = 50,
    threshold: float = 5e-5,
    var_power: float = 1.0,
    same_sign: bool = True,
    nm: NM | None = None,
    modules: Sequence[str] | None = None,
    batches: int | None = None,
    sequential: bool = False,
) -> MaskPlan:
    """The plan of :func:`dsnot`, for the sparse model; its values are those of the weights that stay."""
    layers, skipped = _sparse_layers(sparse_model, dense_model, modules)
    dense = dict(dense_model.named_modules())
    work = copy.deepcopy(sparse_model) if sequential else dense_model
    data = list(loader) if sequential else loader
    seen = calibrate(work, data, modules=list(layers), batches=batches)
    masks, values = {}, {}
    for name, module in ((n, layers[n]) for n in seen):  # as called
        stats = calibrate(work, data, modules=[name], batches=batches)[name] if sequential else seen[name]
        old, weight = _mask(module), module.weight.detach()
        before = torch.where(old, weight, 0)
        full = torch.where(old, weight, dense[name].weight.detach().to(weight))  # what each weight is if it stays
        new = reselect(
            full, old, _of_rows(stats, module), error=row_error(dense[name].weight, before, per_weight(stats.mean, module)),
            cycles=cycles, threshold=threshold, var_power=var_power, same_sign=same_sign, nm=nm,
        ).to(weight.device)  # fmt: skip
        masks[name], values[name] = new, torch.where(new, full, 0)
        if sequential:
            target = work.get_submodule(name)
            with torch.no_grad():
                target.weight.copy_(values[name])
            if "mask" in target._buffers:
                target.mask.copy_(new)
    pattern: Pattern = Unstructured() if nm is None else nm
    return MaskPlan(masks, values, pattern, skipped)


def row_error(dense: Tensor, sparse: Tensor, mean: Tensor) -> Tensor:
    """Expected output of each row of the dense weight minus that of the sparse one; `mean` is shaped as the weight."""
    return ((dense.detach().double().cpu() - sparse.detach().double().cpu()) * mean.double()).flatten(1).sum(1)


def reselect(
    weight: Tensor,
    mask: Tensor,
    stats: InputStats | tuple[Tensor, Tensor, Tensor],
    *,
    error: Tensor | None = None,
    cycles: float = 50,
    threshold: float = 5e-5,
    var_power: float = 1.0,
    same_sign: bool = True,
    nm: NM | None = None,
) -> Tensor:
    """The swaps of one weight.

    Args:
        weight: (rows, ...): what each weight is worth if it stays.
        mask: True = stays.
        stats: of the layer's inputs; or their mean, variance and norm, each shaped as the weight.
        error: of each row at the start; default: what the removed weights make.

    Returns:
        the new mask, with as many entries in each row.
    """
    if not cycles >= 0 or not threshold >= 0:
        raise BadInput(f"cycles and threshold must not be negative, got {cycles} and {threshold}")
    if isinstance(stats, InputStats):
        stats = tuple(v.expand(weight.flatten(1).shape) for v in (stats.mean, stats.variance, stats.norm))  # type: ignore[assignment]
    w, kept = weight.detach().double().cpu().flatten(1), mask.cpu().flatten(1)
    mean, var, norm = (v.reshape(w.shape).double() for v in stats)  # type: ignore[union-attr]
    if nm is not None and not nm.holds(kept):
        raise BadInput(f"the mask has not the pattern {nm.n}:{nm.m}")
    part = w * mean
    miss = torch.where(kept, 0, part).sum(1) if error is None else error.double().clone()
    per_variance = part / var.clamp_min(max(1e-12 * float(var.max()), 1e-300)) ** var_power
    saliency = w.abs() * norm
    swaps = min(w.shape[1], max(1, round(cycles * w.shape[1])) if 0 < cycles < 1 else int(cycles))
    if same_sign and nm is None:
        new = _at_once(kept, part, per_variance, saliency, miss, swaps, threshold)
    else:
        new = _by_cycles(kept, part, per_variance, saliency, miss, swaps, threshold, same_sign, nm.m if nm else w.shape[1])
    return new.view(mask.shape)


def _at_once(kept: Tensor, part: Tensor, per_variance: Tensor, saliency: Tensor, miss: Tensor, swaps: int, threshold: float) -> Tensor:
    """All cycles in one: while E keeps its sign, the candidates come in a fixed order."""
    sign = miss.sign()[:, None]
    gain = torch.where(~kept & (sign * part > 0), sign * per_variance, -torch.inf)
    price = torch.where(kept & (sign * part < 0), saliency, torch.inf)
    gain, grown = (t[:, :swaps] for t in gain.sort(dim=1, descending=True, stable=True))
    price, pruned = (t[:, :swaps] for t in price.sort(dim=1, stable=True))
    step = sign * (part.gather(1, grown) - part.gather(1, pruned))  # what each swap takes off |E|
    left = miss.abs()[:, None] - step.cumsum(1)
    fits = (left + step > threshold) & (left >= 0) & gain.isfinite() & price.isfinite()
    made = fits.long().cumprod(1).bool()
    row = torch.arange(len(kept))[:, None].expand_as(made)[made]
    new = kept.clone()
    new[row, grown[made]], new[row, pruned[made]] = True, False
    return new


def _by_cycles(
    kept: Tensor, part: Tensor, per_variance: Tensor, saliency: Tensor, miss: Tensor, swaps: int, threshold: float, same_sign: bool,
    group: int,
) -> Tensor:  # fmt: skip
    """One swap a cycle for all rows together; q comes from g's group of columns."""
    rows, columns = kept.shape
    new, may_grow, may_go = kept.clone(), ~kept, kept.clone()
    start, active = miss.sign(), torch.ones(rows, dtype=torch.bool)
    at, block = torch.arange(rows), torch.arange(columns) // group
    for _ in range(swaps):
        sign = miss.sign()[:, None]
        goes = may_go & (sign * part < 0)
        partner = goes.view(rows, -1, group).any(2).repeat_interleave(group, 1)
        gain, g = torch.where(may_grow & partner & (sign * part > 0), sign * per_variance, -torch.inf).max(1)
        price, q = torch.where(goes & (block == block[g][:, None]), saliency, torch.inf).min(1)
        after = miss - part[at, g] + part[at, q]
        active = active & (miss.abs() > threshold) & gain.isfinite() & price.isfinite()
        if same_sign:
            active = active & (after * start >= 0)
        if not active.any():
            break
        r, g, q = at[active], g[active], q[active]
        new[r, g], new[r, q], may_grow[r, g], may_go[r, q] = True, False, False, False
        miss = torch.where(active, after, miss)
    return new


def _mask(module: nn.Module) -> Tensor:
    mask = getattr(module, "mask", None)
    return module.weight.detach() != 0 if mask is None else mask.bool()


def _of_rows(stats: InputStats, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, norm = (per_weight(v, module) for v in (stats.mean, stats.variance, stats.norm))
    return mean, variance, norm


def _sparse_layers(
    sparse_model: nn.Module, dense_model: nn.Module, modules: Sequence[str] | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers with removed weights, and why the others are left alone."""
    if isinstance(modules, str):
        raise BadInput(f"modules must be a sequence of names, got the string {modules!r}")
    layers, skipped = prunable(sparse_model, (nn.Linear, nn.Conv1d, nn.Conv2d))
    wanted = [(m, {n for n in layers if n == m or n.endswith(f".{m}")}) for m in modules or ()]
    if none := [m for m, names in wanted if not names]:
        raise BadInput(f"modules names {none[0]!r}, and no prunable layer is called so; there are {', '.join(list(layers)[:4])}, ...")
    dense, chosen = dict(dense_model.named_modules()), {}
    for name, module in layers.items():
        shape = getattr(getattr(dense.get(name), "weight", None), "shape", None)
        if shape != module.weight.shape:
            theirs = "missing" if shape is None else tuple(shape)
            raise BadInput(f"{name}: its weight is {tuple(module.weight.shape)} in the sparse model and {theirs} in the dense one")
        if modules is not None and not any(name in names for _, names in wanted):
            skipped[name] = "was not asked for"
        elif bool(_mask(module).all()):
            skipped[name] = "no weight of it is removed"
        else:
            chosen[name] = module
    if not chosen:
        raise BadInput("no weight of the chosen layers is removed: prune first, e.g. with wanda")
    return chosen, skipped
