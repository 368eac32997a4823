"""Levenberg-Marquardt for residuals that a network gives point by point, with the Jacobian at the price of one backward pass.

Because points do not interact, ONE reverse pass of ``sum_n r_n`` down to the outputs Z_l of the linear layers gives every point's own
sensitivities D_l. With the inputs H_l of the layers (and s running over the streams of a jet, see :mod:`neurarium.physics.jets`)

    d r_n / d W_l = sum_s D_l[s, n] H_l[s, n]^T,      d r_n / d b_l = D_l[0, n]

are exact rows of the Jacobian J. A step solves ``(J^T J + lam I) d = -J^T r`` (or its dual ``d = -J^T (J J^T + lam I)^{-1} r`` when
there are fewer rows than parameters), raises lam until the loss falls, lowers it after. For networks of up to about 5,000 parameters
some dozens of steps do what tens of thousands of first-order steps do.

*Source*: Levenberg (1944), Marquardt (1963).
*Cost*: a step is about five gradient evaluations, rows x P^2 / 2 multiply-adds for the normal equations and P^3 / 3 for each damping
tried. J is made in pieces, so memory stays under ``memory`` bytes besides the P x P matrix. Everything is double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.physics.jets import Record

__all__ = ["LevenbergMarquardt", "Rows", "jacobian"]


@dataclass(frozen=True)
class Rows:
    """Residuals at one set of n points: ``values`` (one (n,) tensor an equation, row i of point i alone), the ``tape`` of the layers
    that made them, and ``scale`` (a number or (n,)) that multiplies the rows in the least-squares sum."""

    values: Sequence[Tensor]
    tape: Sequence[Record]
    scale: Tensor | float = 1.0

    def scaled(self) -> Tensor:
        """All rows, equation by equation, times their scale."""
        return torch.cat([r * self.scale for r in self.values]).detach()

    def loss(self) -> Tensor:
        return sum(((r.detach() * self.scale) ** 2).sum() for r in self.values)  # type: ignore[return-value]


def jacobian(rows: Rows, parameters: Sequence[Tensor], *, piece: int | None = None) -> Iterable[tuple[Tensor, Tensor]]:
    """Pieces ``(J, r)`` of the scaled Jacobian (k, P) and residual (k,), in the order of :meth:`Rows.scaled`; ``piece`` points each."""
    place, offset = {}, 0
    for p in parameters:
        place[id(p)] = offset
        offset += p.numel()
    outputs = [record.outputs for record in rows.tape]
    for values in rows.values:
        n = len(values)
        scale = torch.as_tensor(rows.scale, dtype=values.dtype, device=values.device).expand(n)
        total = values.sum()
        deltas = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True) if total.requires_grad else [None] * len(outputs)
        size = piece or n
        for at in range(0, n, size):
            part = slice(at, min(at + size, n))
            J = values.new_zeros(part.stop - at, offset)
            for record, delta in zip(rows.tape, deltas):
                if delta is None:
                    continue
                d = delta[:, part] * scale[part, None]
                if (i := place.get(id(record.weight))) is not None:
                    block = torch.einsum("sni,sno->noi", record.inputs[:, part].detach(), d)
                    J[:, i : i + record.weight.numel()] += block.flatten(1)
                if record.bias is not None and (i := place.get(id(record.bias))) is not None:
                    J[:, i : i + record.bias.numel()] += d[0]
            yield J, (values[part] * scale[part]).detach()


@dataclass
class LevenbergMarquardt:
    """Steps on ``parameters`` (in place) that lower the sum of squares of residual rows.

    Args: ``damping`` the first lam; ``up`` its factor after a failed try, ``down`` its divisor after a success; ``tries`` dampings a
    step before it gives up (the parameters then stay as they are); ``memory`` bytes for a piece of the Jacobian.

    ``residuals()`` returns the rows afresh; it is called once with gradients on and once without for each damping tried. ``weigh`` (if
    any) makes new rows of the first call's, e.g. with weights; the same scales are then kept for the tries of that step::

        lm = LevenbergMarquardt(list(model.parameters()))
        def residuals():
            tape = []
            return [Rows([model(Jet.constant(x, Orders(()), tape)).value[:, 0] - y], tape)]
        for _ in range(20):
            loss = lm.step(residuals)
    """

    parameters: list[Tensor]
    damping: float = 1e-2
    up: float = 4.0
    down: float = 3.0
    tries: int = 6
    memory: int = 256 << 20
    _checked: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.parameters)
        if not self.parameters or self.damping < 0 or self.up <= 1 or self.down < 1 or self.tries < 1:
            raise BadInput("LevenbergMarquardt needs parameters, damping >= 0, up > 1, down >= 1 and tries >= 1")

    def step(self, residuals: Callable[[], Sequence[Rows]], weigh: Callable[[Sequence[Rows]], Sequence[Rows]] | None = None) -> float:
        """One step; returns the loss (scaled sum of squares) *before* it."""
        with torch.enable_grad():
            blocks = list(residuals())
        blocks = list(weigh(blocks)) if weigh else blocks
        self._check(blocks)
        loss = float(sum(b.loss() for b in blocks))
        solve = self._normal_equations(blocks)
        scales = [b.scale for b in blocks]
        del blocks
        start = [p.detach().clone() for p in self.parameters]
        lam = self.damping
        for _ in range(self.tries):
            move = solve(lam)
            if move is not None:
                self._set(start, move)
                with torch.no_grad():
                    after = float(sum(Rows(b.values, (), s).loss() for b, s in zip(residuals(), scales)))
                if after < loss:
                    self.damping = max(lam / self.down, 1e-14)
                    return loss
            lam = max(lam, 1e-14) * self.up
        self._set(start, None)
        self.damping = lam
        return loss

    def _normal_equations(self, blocks: Sequence[Rows]) -> Callable[[float], Tensor | None]:
        """``solve(lam)`` gives the step for a damping, or None where the matrix is numerically singular."""
        P = sum(p.numel() for p in self.parameters)
        rows = sum(len(r) for b in blocks for r in b.values)
        piece = max(1, self.memory // (8 * P))
        pieces = ((J.double(), r.double()) for b in blocks for J, r in jacobian(b, self.parameters, piece=piece))
        dual = rows < P and rows <= piece
        if dual:
            parts = list(pieces)
            J, g = torch.cat([J for J, _ in parts]), torch.cat([r for _, r in parts])
            A = _gram(J.T)
        else:
            A, g = None, 0
            for J, r in pieces:
                A = _gram(J) if A is None else A.add_(_gram(J))
                g = g + J.T @ r
        diagonal = A.diagonal().clone()

        def solve(lam: float) -> Tensor | None:
            A.diagonal().copy_(diagonal + lam)
            factor, failed = torch.linalg.cholesky_ex(A)
            if failed or not torch.isfinite(diagonal).all():
                return None
            d = torch.cholesky_solve(g[:, None], factor)[:, 0]
            return -(J.T @ d) if dual else -d

        return solve

    def _set(self, start: Sequence[Tensor], move: Tensor | None) -> None:
        at = 0
        with torch.no_grad():
            for p, s in zip(self.parameters, start):
                p.copy_(s if move is None else s + move[at : at + p.numel()].view_as(p))
                at += p.numel()

    def _check(self, blocks: Sequence[Rows]) -> None:
        if self._checked:
            return
        seen = {id(t) for b in blocks for record in b.tape for t in (record.weight, record.bias)}
        for i, p in enumerate(self.parameters):
            if id(p) not in seen:
                raise UnsupportedModel(
                    f"parameter {i} of shape {tuple(p.shape)} is not the weight or bias of a linear layer that a jet passes, so its "
                    "Jacobian is unknown; freeze it (requires_grad_(False)) or use a first-order optimizer"
                )
        if not all(torch.isfinite(r).all() for b in blocks for r in b.values):
            raise BadInput("the residuals at the start are not finite")
        self._checked = True


def _gram(J: Tensor, width: int = 384) -> Tensor:
    """``J^T J``, lower triangle (by block columns: about half the work of the full product)."""
    P = J.shape[1]
    A = J.new_zeros(P, P)
    for i in range(0, P, width):
        A[i:, i : i + width] = J[:, i:].T @ J[:, i : i + width]
    return A
