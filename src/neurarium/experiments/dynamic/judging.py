"""What an experiment of this room asks of the answers that rows leave with, on plain tensors."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, float64, zeros

__all__ = ["at_cost", "best_exits", "calibration_error", "correlation", "set_size"]


def calibration_error(p: Tensor, y: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their rows; p ``(n, classes)`` probabilities."""
    confidence, answer = p.max(1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gap = (confidence - (answer == y).to(p)).double()
    return float(zeros(bins, dtype=float64).index_add(0, bin_of, gap).abs().sum() / len(y))


def set_size(held: Tensor, y: Tensor, tested: Tensor, cover: float = 0.95) -> float:
    """Mean size of split-conformal sets {c : 1 - p(c) <= q} that hold the label with this probability.

    q is the ceil((n + 1) cover)-th smallest 1 - p(y) of the n rows of ``held`` with labels ``y``; with too few rows for that rank no
    finite q covers, and every set is whole.
    """
    misses = 1 - held.gather(1, y[:, None]).squeeze(1)
    rank = math.ceil((len(y) + 1) * cover)
    if rank > len(y):
        return float(tested.shape[1])
    return float((1 - tested <= misses.sort().values[rank - 1]).double().sum(1).mean())


def best_exits(badness: Tensor, relative_cost: Tensor, tradeoff: float) -> Tensor:
    """argmin_l badness_l + lambda ic_l, ``(n, exits), (exits,) -> (n,)``; the earlier exit where two are equal."""
    return (badness + tradeoff * relative_cost).argmin(1)


def correlation(choice: Tensor, noise: Tensor) -> float:
    """Pearson correlation; 0 where every row takes the same exit."""
    return float(np.corrcoef(choice.double(), noise.double())[0, 1]) if choice.unique().numel() > 1 else 0.0


def at_cost(where: ArrayLike, cost: ArrayLike, value: ArrayLike) -> list[float]:
    """A curve read at the costs ``where``, linearly between its points; NaN outside its range. Points of one cost count as their mean."""
    known, inverse = np.unique(np.asarray(cost, float), return_inverse=True)
    mean = np.bincount(inverse, np.asarray(value, float)) / np.bincount(inverse)
    return [float(v) for v in np.interp(where, known, mean, left=np.nan, right=np.nan)]
