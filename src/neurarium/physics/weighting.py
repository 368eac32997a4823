"""Weights on the residual, point by point.

A weighting is a frozen bag of settings with ``begin(steps) -> schedule``. A schedule is asked for weights at every loss evaluation,
``schedule.weights(squares, initial, strength)``, and told the outcome after every step, ``schedule.update()``. Weights multiply squared
residuals, carry no gradient and serve first-order training (the loss) and least squares (rows times their roots) alike.

:class:`Causal` is the weighting of :mod:`neurarium.physics.causal`, where its idea is explained.
"""

from __future__ import annotations

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
        patience: steps an eps may take at most; None shares the steps of the run equally.
    """

    eps: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0)
    delta: float = 0.99
    chunks: int = 32
    patience: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", tuple(float(e) for e in self.eps))
        if not self.eps or any(e < 0 for e in self.eps) or not 0 < self.delta < 1 or self.chunks < 1:
            raise BadInput("Causal needs eps >= 0 (one at least), 0 < delta < 1 and chunks >= 1")

    def slice_losses(self, squares: Tensor) -> Tensor:
        """L_i: the mean squared residual of each slice; (n,) in order of time -> (chunks,)."""
        if len(squares) % self.chunks:
            raise BadInput(f"{len(squares)} points cannot be cut into {self.chunks} equal time slices; choose a multiple")
        return squares.view(self.chunks, -1).mean(1)

    def slice_weights(self, losses: Tensor, eps: Tensor | float, initial: Tensor | float = 0.0) -> Tensor:
        """w_i from L_i (chunks,) and the weighted loss of soft initial data, which counts as the slice before the first. No gradient."""
        losses = losses.detach()
        earlier = torch.cat([torch.zeros_like(losses[:1]), torch.cumsum(losses[:-1], 0)])
        return torch.exp(-eps * (earlier + (initial.detach() if isinstance(initial, Tensor) else initial)))

    def begin(self, steps: int) -> CausalSchedule:
        """The state of one run of that many steps."""
        return CausalSchedule(self, self.patience or max(1, steps // len(self.eps)))


@dataclass
class CausalSchedule:
    """Where a run stands: its eps, and the slice weights of the last evaluation."""

    settings: Causal
    patience: int
    level: int = 0
    age: int = 0
    last: Tensor | None = field(default=None, repr=False)  # (chunks,)

    @property
    def eps(self) -> float:
        return self.settings.eps[self.level]

    @property
    def min_weight(self) -> float:
        return float("nan") if self.last is None else float(self.last.min())

    @property
    def converged(self) -> bool:
        """Every weight exceeds delta at the last eps: the paper's test of convergence. (With eps = 0 it would say nothing.)"""
        return self.level == len(self.settings.eps) - 1 and self.eps > 0 and self.min_weight > self.settings.delta

    def strength(self, like: Tensor) -> Tensor:
        """eps as a tensor, so that compiled code need not be made anew when it changes."""
        return torch.full((), self.eps, dtype=like.dtype, device=like.device)

    def weights(self, squares: Tensor, initial: Tensor | float, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Weights a point (n,) and a slice (chunks,). Pure: it changes no state, so it may be compiled."""
        losses = self.settings.slice_losses(squares)
        w = self.settings.slice_weights(losses, strength, initial)
        return w.repeat_interleave(len(squares) // self.settings.chunks), w

    def update(self, weights: Tensor) -> None:
        """After a step, with the slice weights that it used."""
        self.last, self.age = weights.detach(), self.age + 1
        last = self.level == len(self.settings.eps) - 1
        if not last and (self.min_weight > self.settings.delta or self.age >= self.patience):
            self.level, self.age = self.level + 1, 0
