"""Weights on the residual, point by point.

A weighting is a frozen bag of settings with ``begin(steps) -> schedule``. A schedule is asked for weights at every loss evaluation,
``schedule.weights(squares, initial, strength)``, and told the outcome after every step, ``schedule.update()``. Weights multiply squared
residuals, carry no gradient and serve first-order training (the loss) and least squares (rows times their roots) alike.

:class:`Causal` is the weighting of :mod:`neurarium.physics.causal`, where its idea is explained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["Causal", "CausalSchedule"]


@dataclass(frozen=True)
class Causal:
    """``w_i = exp(-eps * sum_{k < i} L_k)``: a time slice counts only as far as all earlier slices are solved.

    Args:
        eps: how strictly, from lax to strict. The next value is taken when every weight exceeds ``delta``, or after ``patience`` steps.
        delta: the smallest weight above which the current eps counts as solved; training ends when the last one is.
        chunks: time slices. The points are in order of time and are cut into this many equal parts.
        patience: steps an eps may take at most; None shares the steps of the run equally (a run limited by seconds alone has no limit).
    """

    eps: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0)
    delta: float = 0.99
    chunks: int = 32
    patience: int | None = None

    def __post_init__(self) -> None:
        eps = tuple(float(e) for e in self.eps) if isinstance(self.eps, (tuple, list)) else ()
        if not eps or not all(math.isfinite(e) and e >= 0 for e in eps):
            raise BadInput(f"Causal: eps must be a tuple of one or more finite numbers >= 0, got {self.eps!r}")
        if not 0 < self.delta < 1:
            raise BadInput(f"Causal: delta must lie between 0 and 1, got {self.delta!r}")
        if not isinstance(self.chunks, int) or self.chunks < 1:
            raise BadInput(f"Causal: chunks must be a whole number >= 1, got {self.chunks!r}")
        if self.patience is not None and not self.patience >= 1:
            raise BadInput(f"Causal: patience must be None or at least 1, got {self.patience!r}")
        object.__setattr__(self, "eps", eps)

    def slice_losses(self, squares: Tensor) -> Tensor:
        """L_i: the mean squared residual of each slice; (n,) in order of time -> (chunks,)."""
        if len(squares) % self.chunks:
            raise BadInput(f"{len(squares)} points cannot be cut into {self.chunks} equal time slices; choose a multiple")
        return squares.view(self.chunks, -1).mean(1)

    def earlier(self, losses: Tensor, initial: Tensor | float = 0.0) -> Tensor:
        """S_i = sum_{k < i} L_k from L_i (chunks,) and the weighted loss of soft initial data, which counts as the slice before the
        first. No gradient."""
        losses = losses.detach()
        sums = torch.cat([torch.zeros_like(losses[:1]), torch.cumsum(losses[:-1], 0)])
        return sums + (initial.detach() if isinstance(initial, Tensor) else initial)

    def begin(self, steps: int) -> CausalSchedule:
        """The state of one run of that many steps."""
        return CausalSchedule(self, max(1, steps // len(self.eps)) if self.patience is None else self.patience)


@dataclass
class CausalSchedule:
    """Where a run stands: the eps of the next step, and the earlier losses S_i and weights of each slice (chunks,) in the last step,
    float64. ``converged``: in the last step every weight exceeded delta, at the last eps: the paper's test. (With eps = 0 it would say
    nothing and stays False.)"""

    settings: Causal
    patience: int
    level: int = 0
    age: int = 0
    converged: bool = False
    sums: Tensor | None = field(default=None, repr=False)
    slice_weights: Tensor | None = field(default=None, repr=False)

    @property
    def eps(self) -> float:
        return self.settings.eps[self.level]

    @property
    def min_weight(self) -> float:
        return float("nan") if self.slice_weights is None else float(self.slice_weights.min())

    def strength(self, like: Tensor) -> Tensor:
        """eps as a tensor, so that compiled code need not be made anew when it changes."""
        return torch.full((), self.eps, dtype=like.dtype, device=like.device)

    def weights(self, squares: Tensor, initial: Tensor | float, strength: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each point (n,), and S_i (chunks,). Pure: it changes no state, so it may be compiled."""
        sums = self.settings.earlier(self.settings.slice_losses(squares), initial)
        return torch.exp(-strength * sums).repeat_interleave(len(squares) // self.settings.chunks), sums

    def update(self, sums: Tensor) -> None:
        """After a step, with the S_i that it used."""
        self.sums, self.age = sums.detach().double().cpu(), self.age + 1
        self.slice_weights = torch.exp(-self.eps * self.sums)
        solved, last = self.min_weight > self.settings.delta, self.level == len(self.settings.eps) - 1
        self.converged = last and self.eps > 0 and solved  # of the eps just used, before the next one is taken
        if not last and (solved or self.age >= self.patience):
            self.level, self.age = self.level + 1, 0
