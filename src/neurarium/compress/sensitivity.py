"""How much the loss minds a change of the weights: per-sample gradients and the empirical Fisher that they make.

The empirical Fisher of n samples with gradients g_i (the rows of A) is H = A^T A / n: p x p and never formed. With n << p every product and
solve goes through the n x n matrix A A^T (Woodbury).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.meter import undisturbed

__all__ = ["FisherOperator", "collect", "gram", "per_sample_grads"]

Loss = Callable[[Tensor, Tensor], Tensor]


def collect(loader: Iterable, samples: int) -> tuple[Tensor, Tensor]:
    """The first `samples` rows ``(x, y)`` of a loader; fewer if it has fewer."""
    if samples < 1:
        raise BadInput(f"samples must be at least 1, got {samples}")
    xs, ys, n = [], [], 0
    for x, y in loader:
        xs.append(x), ys.append(y)
        n += len(x)
        if n >= samples:
            break
    if n == 0:
        raise BadInput("the calibration loader is empty")
    x, y = torch.cat(xs)[:samples], torch.cat(ys)[:samples]
    if x.is_floating_point() and not torch.isfinite(x).all():
        row = int((~torch.isfinite(x.flatten(1))).any(1).nonzero()[0])
        raise BadInput(f"row {row} of the calibration data has values that are not finite")
    return x, y


def per_sample_grads(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Loss = F.cross_entropy, *, names: Sequence[str], chunk: int = 64
) -> Tensor:
    """Gradient of each sample's loss in the named parameters, one row a sample.

    Runs in eval mode (BatchNorm frozen, no dropout); mode, gradients and buffers of the model stay as they were. All samples of a chunk
    go at once, unless the model takes a way that depends on its data: then they go one by one, which is slower.

    Args:
        x, y: (samples, ...) inputs and targets.
        loss_fn: of a batch of one, ``loss_fn(model(x[None]), y[None]) -> ()``.
        names: parameter names; their gradients are flattened and concatenated in this order.
        chunk: samples at a time.

    Returns:
        (samples, total size) in float32.
    """
    state = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    if unknown := [k for k in names if k not in state]:
        raise BadInput(f"the model has no parameter {unknown[0]!r}")
    chosen = {k: state.pop(k) for k in names}
    device = next(iter(chosen.values())).device
    x, y = x.to(device), y.to(device)

    def loss(params: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        return loss_fn(functional_call(model, {**state, **params}, (row[None],)), target[None])

    with undisturbed(model):
        model.eval()
        try:
            grads = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)(chosen, x, y)
        except RuntimeError as error:
            if "data-dependent control flow" not in str(error):
                raise
            alone = [grad(loss)(chosen, row, target) for row, target in zip(x, y, strict=True)]
            grads = {name: torch.stack([g[name] for g in alone]) for name in chosen}
    rows = torch.cat([grads[name].reshape(len(x), -1) for name in names], 1).float()
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise BadInput(f"the gradient of calibration sample {bad} is not finite")
    return rows


@dataclass(frozen=True)
class FisherOperator:
    """H = A^T A / n + ridge I without forming it. Solves are float64 on an n x n system.

    Args:
        rows: A, (n, p), one gradient a sample.
        ridge: lambda > 0; without it H is singular as soon as n < p.
    """

    rows: Tensor
    ridge: float

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not self.rows.numel():
            raise BadInput(f"rows must be (samples, parameters), got {tuple(self.rows.shape)}")
        if not self.ridge > 0:
            raise BadInput(f"ridge must be > 0 (n < p makes the Fisher singular), got {self.ridge}")

    def matvec(self, v: Tensor) -> Tensor:
        """H v."""
        return self.rows.T @ (self.rows @ v) / len(self.rows) + self.ridge * v

    def solve(self, v: Tensor, support: Tensor | None = None) -> Tensor:
        """H^-1 v; with `support` (indices) the inverse of that sub-matrix applied to ``v[support]``, returned on the support."""
        rows = self.rows if support is None else self.rows[:, support]
        v = (v if support is None else v[support]).double()
        n = len(rows)
        factor = torch.linalg.cholesky(gram(rows) + n * self.ridge * torch.eye(n, dtype=torch.float64, device=rows.device))
        inner = torch.cholesky_solve((rows @ v.to(rows.dtype)).double()[:, None], factor)[:, 0]
        return ((v - (rows.T @ inner.to(rows.dtype)).double()) / self.ridge).to(self.rows.dtype)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of H^-1, (p,)."""
        n = len(self.rows)
        factor = torch.linalg.cholesky(gram(self.rows) + n * self.ridge * torch.eye(n, dtype=torch.float64, device=self.rows.device))
        half = torch.linalg.solve_triangular(factor.to(self.rows.dtype), self.rows, upper=False)
        return (1 - (half * half).sum(0)) / self.ridge


def gram(rows: Tensor) -> Tensor:
    """A A^T in float64, accumulated over column blocks: no float64 copy of A is made."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.split(8192, 1):
        block = block.double()
        gram += block @ block.T
    return gram
