"""From a budget to thresholds.

A :class:`Curve` is a one-parameter family of threshold vectors tau(s), s = 0 (everything leaves at once) to S - 1 (nothing leaves early),
non-decreasing in s in every coordinate. A row that stops at stage k under a larger s has a score there that passes the smaller threshold
too, so under a smaller s it stops no later: **every single row's cost is monotone in s**, not only the mean.

*Construction.* The share of rows that leaves at exit k is made proportional to q^k for q on a logarithmic grid (the recipe of multi-scale
dense networks, Huang et al. 2018, section 4): thresholds are sequential quantiles of the calibration scores. A running maximum over q then
repairs the places where that recipe alone is not monotone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurarium.dynamic.cost import CostTable
from neurarium.errors import BadInput

__all__ = ["Curve", "calibrate"]


@dataclass(frozen=True, eq=False)
class Curve:
    """The calibrated trade-off, float64, cheapest setting first.

    Attributes:
        tau: ``(settings, stages)`` thresholds.
        share: ``(settings, stages)`` share of the calibration rows that leaves at each stage.
        accuracy: ``(settings,)`` on the calibration rows.
    """

    tau: Tensor
    share: Tensor
    accuracy: Tensor

    def cost(self, table: CostTable) -> Tensor:
        """Mean FLOPs a row at each setting, ``(settings,)``."""
        return self.share @ table.tensor().to(self.share)

    def pick(self, budget: float, table: CostTable) -> int:
        """The most generous setting whose mean cost is within ``budget`` FLOPs a row."""
        cost = self.cost(table)
        # A share is k/n in float64: its cost can exceed the exact one in the last digits.
        fits = int((cost <= budget * (1 + 1e-12)).sum())
        if not fits:
            raise BadInput(
                f"a budget of {budget:g} FLOPs a row is below the cheapest path: the smallest feasible one is {cost[0].item():.0f}"
            )
        return fits - 1

    def pack(self) -> Tensor:
        """All of it as one tensor ``(settings, 2 stages + 1)``."""
        return torch.cat([self.tau, self.share, self.accuracy[:, None]], 1)

    @classmethod
    def unpack(cls, packed: Tensor) -> Curve:
        """The inverse of :meth:`pack`."""
        k = (packed.shape[1] - 1) // 2
        return cls(packed[:, :k], packed[:, k : 2 * k], packed[:, -1])


def calibrate(scores: Tensor, correct: Tensor, *, grid: int = 64) -> Curve:
    """Build the curve from ``(n, stages - 1)`` scores and ``(n, stages)`` correctness of a dense pass."""
    n, stages = correct.shape
    if n == 0:
        raise BadInput("no rows to calibrate on")
    if grid < 3:
        raise BadInput(f"grid must be at least 3 settings (cheapest, dearest, one between), not {grid}")
    if scores.isnan().any():
        raise BadInput("a calibration score is NaN: the policy's outputs are not numbers")
    scores, correct = scores.double().cpu(), correct.double().cpu()
    powers = torch.logspace(-2, 2, grid - 2, dtype=torch.float64)[:, None] ** torch.arange(stages)
    shares = powers / powers.sum(1, keepdim=True)
    tau = torch.stack([_quantiles(scores, p) for p in shares])
    lowest, highest = torch.full((2, 1, stages), float("inf"), dtype=torch.float64) * torch.tensor([-1.0, 1.0])[:, None, None]
    tau = torch.cat([lowest, tau, highest]).cummax(0).values
    tau[:, -1] = float("-inf")  # the last stage keeps nobody
    choice = (scores[None] < tau[:, None, :-1]).long().cumprod(2).sum(2)  # (settings, n)
    share = torch.nn.functional.one_hot(choice, stages).double().mean(1)
    accuracy = correct[torch.arange(n), choice].mean(1)
    return Curve(tau, share, accuracy)


def _quantiles(scores: Tensor, shares: Tensor) -> Tensor:
    """Thresholds that let the asked shares of all rows leave, at least one row at each exit that still has any and whose scores differ.

    A threshold lies halfway to the next smaller score: on a calibration row's own score, rounding would decide. Rows of one score leave
    together: where many share the score at the edge, they all leave or all stay, whichever is nearer to the share that was asked for. The
    threshold is -inf where all that are left leave, so that an exit that few rows reach does not, by the running maximum, close for the
    larger q, and inf where nobody does.
    """
    left, tau = scores, torch.full((len(shares),), float("-inf"), dtype=scores.dtype)
    for k in range(scores.shape[1]):
        if not len(left):
            break
        asked, score = math.ceil(len(left) * float(shares[k] / shares[k:].sum())), left[:, k]
        edge = score.topk(asked).values[-1]
        go, above = score >= edge, score > edge
        if int(go.sum()) - asked > asked - int(above.sum()):
            go = above
        left = left[~go]
        if not go.any():
            tau[k] = float("inf")
        elif len(left):
            tau[k] = (score[go].min() + left[:, k].max()) / 2
    return tau
