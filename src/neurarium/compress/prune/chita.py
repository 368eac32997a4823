"""CHITA: pruning as sparse regression on the gradients, without ever forming a Hessian.

Optimal brain surgeon asks which weights to remove, and how to correct the others, so that a quadratic model of the loss rises least.
With the empirical Fisher H = A^T A / n (the rows of A are n per-sample gradients) that is a regression with a budget of non-zero
coefficients:

    minimise Q(w) = 1/2 ||A w_bar - A w||^2 + alpha . w + (n lambda / 2) ||w - w_bar||^2   subject to ||w||_0 <= k.

A is n x p, so the p x p matrix is never needed. *Iterative hard thresholding* alternates a gradient step with keeping the k largest
weights; a line search picks the step: the largest one that leaves the support as it is, the exact minimiser along the gradient on
that support if it is shorter, otherwise steps that double as long as Q falls. An *active set* restricts the iterations to somewhat
more than k candidate columns and lets weights enter when the full gradient asks for them. At the end the weights on the support are
*solved for exactly* (back-solve, an n x n system by Woodbury). Several stages at rising sparsity, with gradients taken anew, are
CHITA++.

*Source*: Benbaki et al., Fast as CHITA (ICML 2023), sections 3 (formulation, hard thresholding, line search, active set, back-solve),
3.4 (block approximation) and 4 (multi-stage). The authors' public code was read for settings.

*Departures*: the step that keeps the support is the exact bound per coordinate; the active set starts from the 2k largest weights and its
inner problem is solved exactly on the support found before the full gradient brings in new columns; a weight pruned in an earlier stage
stays pruned. The method "exchange" is an addition of ours: after the back-solve, weights on the support
are exchanged for columns that gain more, with exact costs and gains. The claims are measured without it.

*Cost*: memory n p floats; about two passes over A an iteration, over its active columns only with "active".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.pattern import keep_largest
from neurarium.compress.plan import MaskPlan, apply, flat_weights, prunable, shaped, weight_names
from neurarium.compress.sensitivity import Loss, collect, gram, per_sample_grads
from neurarium.errors import BadInput

__all__ = ["SparseSolution", "chita", "chita_pp", "plan_chita", "sparse_quadratic"]

_METHODS = ("active", "bso", "cd", "exchange")
_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class SparseSolution:
    """The k-sparse minimiser found: ``w`` (p,), its ``support`` (indices, sorted), Q there, and Q after each iteration."""

    w: Tensor
    support: Tensor
    objective: float
    history: tuple[float, ...]


def chita(
    model: nn.Module,
    loader: Iterable,
    *,
    sparsity: float,
    samples: int = 500,
    ridge: float = 1e-4,
    method: str = "active",
    first_order: bool = False,
    stages: int = 1,
    block: int | None = None,
    loss_fn: Loss = F.cross_entropy,
    modules: tuple = (nn.Linear, nn.Conv2d),
    chunk: int = 64,
) -> nn.Module:
    """A copy of the model with `sparsity` of its weights removed and the others corrected.

    Args:
        loader: ``(x, y)`` batches; the first `samples` rows give the gradients. Deterministic: the loader's order decides.
        sparsity: share of the weights of all planned layers together, in [0, 1). Biases and norms are never pruned.
        ridge: lambda; with fewer samples than weights the regression is singular without it.
        method: "active" (hard thresholding on an active set, then back-solve), "bso" (support of the largest weights, back-solve only),
            "cd" (hard thresholding, then coordinate descent on the support), "exchange" ("active", then exchanges of weights: better
            and slower; ours).
        first_order: keep the gradient term (alpha = the sum of the rows); for networks that are not at a minimum.
        stages: > 1 is CHITA++: sparsity s (1 - (1 - t/stages)^3) after stage t, gradients recomputed each time.
        block: solve blocks of this many weights apart (support from one global threshold): for networks whose gradients do not fit in
            memory; not with method "cd".
        loss_fn: of a batch of one.

    Raises:
        UnsupportedModel: nothing prunable.
        BadInput: an empty or non-finite loader, a sparsity that would empty the network, too little memory.
    """
    for name, value in (("stages", stages), ("chunk", chunk), ("block", 1 if block is None else block)):
        if value < 1:
            raise BadInput(f"{name} must be at least 1, got {value}")
    if method not in _METHODS:
        raise BadInput(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if block is not None and method == "cd":
        raise BadInput("block goes with the methods 'bso', 'active' and 'exchange', not with 'cd'")
    _keep(sum(m.weight.numel() for m in prunable(model, modules)[0].values()), sparsity, 1)
    x, y = collect(loader, samples)
    result = model
    for stage in range(1, stages + 1):
        level = sparsity * (1 - (1 - stage / stages) ** 3)
        options = {"ridge": ridge, "method": method, "first_order": first_order, "block": block, "loss_fn": loss_fn}
        result = apply(result, plan_chita(result, x, y, sparsity=level, modules=modules, chunk=chunk, **options))  # type: ignore[arg-type]
    return result


def chita_pp(model: nn.Module, loader: Iterable, *, sparsity: float, stages: int = 15, **options: object) -> nn.Module:
    """CHITA++: :func:`chita` in several stages of rising sparsity."""
    return chita(model, loader, sparsity=sparsity, stages=stages, **options)  # type: ignore[arg-type]


def plan_chita(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sparsity: float,
    ridge: float = 1e-4,
    method: str = "active",
    first_order: bool = False,
    block: int | None = None,
    loss_fn: Loss = F.cross_entropy,
    modules: tuple = (nn.Linear, nn.Conv2d),
    chunk: int = 64,
) -> MaskPlan:
    """One stage's plan: masks and corrected values. Weights that a mask already removes stay removed."""
    layers, skipped = prunable(model, modules)
    names = weight_names(layers)
    w = flat_weights(layers)
    alive = torch.cat([_mask(m).flatten() for m in layers.values()])
    keep = min(_keep(w.numel(), sparsity, len(layers)), int(alive.sum()))
    if block is None:
        _fits(len(x), w.numel())
        rows = per_sample_grads(model, x, y, loss_fn, names=names, chunk=chunk)
        new = _solve(rows, w, alive, keep, ridge, method, first_order)
    else:
        # One global threshold gives each block its share; each block is then solved alone.
        share = keep_largest(torch.where(alive, w.abs(), -1.0)[None], keep)[0]
        pieces, at = [], 0
        for name, module in zip(names, layers.values(), strict=True):
            size = module.weight.numel()
            _fits(len(x), size)
            rows = per_sample_grads(model, x, y, loss_fn, names=[name], chunk=chunk)
            for start in range(0, size, block):
                here = slice(at + start, min(at + start + block, at + size))
                part = rows[:, start : start + block]
                pieces.append(_solve(part, w[here], alive[here], int(share[here].sum()), ridge, method, first_order))
            at += size
        new = torch.cat(pieces)
    values = shaped(layers, new)
    return MaskPlan({k: v != 0 for k, v in values.items()}, values, skipped=skipped)


def _keep(weights: int, sparsity: float, layers: int) -> int:
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    keep = weights - round(sparsity * weights)
    if keep < layers:
        raise BadInput(f"sparsity {sparsity} leaves {keep} weights for {layers} layers")
    return keep


def _solve(rows: Tensor, w: Tensor, alive: Tensor, keep: int, ridge: float, method: str, first_order: bool) -> Tensor:
    if keep == 0:
        return torch.zeros_like(w)
    columns = alive.nonzero()[:, 0]
    full = len(columns) == len(w)
    part = rows if full else rows[:, columns]
    alpha = part.sum(0) if first_order else None
    found = sparse_quadratic(part, w if full else w[columns], keep, ridge, alpha, method=method)
    return found.w if full else torch.zeros_like(w).index_copy_(0, columns, found.w)


def _mask(module: nn.Module) -> Tensor:
    mask = getattr(module, "mask", None)
    return torch.ones_like(module.weight, dtype=torch.bool) if mask is None else mask


def _fits(samples: int, weights: int) -> None:
    if samples * weights * 4 > _MAX_BYTES:
        raise BadInput(
            f"{samples} gradients of {weights} weights take {samples * weights * 4 / 2**30:.1f} GiB: use fewer samples, or block=500, "
            "which needs the gradients of one layer at a time"
        )


def sparse_quadratic(
    rows: Tensor, w_bar: Tensor, k: int, ridge: float, alpha: Tensor | None = None, *, method: str = "active", iterations: int = 50
) -> SparseSolution:
    """Minimise Q over vectors with at most k non-zeros.

    Args:
        rows: A, (n, p).
        w_bar: (p,) the dense solution to stay close to.
        alpha: (p,) linear term, or None.
        method, iterations: see :func:`chita`; at most so many hard-thresholding steps (a round).
    """
    p = rows.shape[1]
    if w_bar.shape != (p,):
        raise BadInput(f"w_bar must have {p} entries, got {tuple(w_bar.shape)}")
    if not 0 < k <= p:
        raise BadInput(f"k must be in 1..{p}, got {k}")
    if not ridge > 0:
        raise BadInput(f"ridge must be > 0, got {ridge}")
    problem = _Quadratic(rows, w_bar, ridge, alpha)
    w, history = _largest(w_bar, k), []
    if method == "bso":
        history = [problem.value(w)]
    elif method == "cd":
        w, history = _threshold(problem, w, k, iterations)
    else:
        w, history = _active_set(problem, w, k, iterations)
    support = _support(w, w_bar, k)
    w = _coordinate_descent(problem, w, support) if method == "cd" else problem.back_solve(support)
    history.append(problem.value(w))
    if method == "exchange":
        w, support = _exchange(problem, w, support, history)
    return SparseSolution(w, support, history[-1], tuple(history))


class _Quadratic:
    """Q, its gradient and its minimiser on a support; holds A and vectors only."""

    def __init__(self, rows: Tensor, w_bar: Tensor, ridge: float, alpha: Tensor | None) -> None:
        self.rows, self.w_bar, self.ridge = rows, w_bar.to(rows.dtype), ridge
        self.alpha = None if alpha is None else alpha.to(rows.dtype)
        self.weight = len(rows) * ridge  # n lambda
        self.constant = 0.0  # of the columns that a restriction leaves out
        self.target = rows @ self.w_bar

    def value(self, w: Tensor) -> float:
        return self._value(w, self.target - self.rows @ w)

    def _value(self, w: Tensor, residual: Tensor) -> float:
        d = w - self.w_bar
        linear = 0.0 if self.alpha is None else float(self.alpha.double() @ w.double())
        squares = float(residual.double() @ residual.double()) + self.weight * float(d.double() @ d.double())
        return self.constant + linear + 0.5 * squares

    def gradient(self, w: Tensor) -> tuple[Tensor, float]:
        """The gradient and the value at w."""
        residual = self.target - self.rows @ w
        g = self.weight * (w - self.w_bar) - self.rows.T @ residual
        return (g if self.alpha is None else g + self.alpha), self._value(w, residual)

    def restricted(self, columns: Tensor) -> _Quadratic:
        """The same problem in the given columns, the others being zero."""
        part = _Quadratic.__new__(_Quadratic)
        part.rows, part.w_bar, part.ridge, part.weight = self.rows[:, columns].contiguous(), self.w_bar[columns], self.ridge, self.weight
        part.alpha = None if self.alpha is None else self.alpha[columns]
        part.target = self.target
        outside = float(self.w_bar.double() @ self.w_bar.double()) - float(part.w_bar.double() @ part.w_bar.double())
        part.constant = self.constant + 0.5 * self.weight * outside
        return part

    def curvature(self) -> float:
        """1.05 times the largest eigenvalue of the Hessian, by power iteration from a fixed start."""
        v = torch.ones(self.rows.shape[1], dtype=self.rows.dtype, device=self.rows.device)
        top = 0.0
        for _ in range(30):
            v = self.rows.T @ (self.rows @ (v / v.norm().clamp_min(1e-30)))
            before, top = top, float(v.norm())
            if abs(top - before) <= 1e-3 * top:
                break
        return 1.05 * (top + self.weight)

    def quadratic_form(self, matrix: Tensor) -> Tensor:
        """a_j^T (n lambda I + A_S A_S^T)^-1 a_j for every column j, (p,); `matrix` is A_S A_S^T."""
        factor = torch.linalg.cholesky(matrix + self.weight * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device))
        return torch.linalg.solve_triangular(factor.to(self.rows.dtype), self.rows, upper=False).square().sum(0)

    def back_solve(self, support: Tensor, matrix: Tensor | None = None) -> Tensor:
        """The exact minimiser with the given support: w_S = w_bar_S + d with (A_S^T A_S + n lambda I) d = A_S^T b - alpha_S.

        b is what the removed weights contributed to A w_bar. With more weights than samples d comes from the n x n kernel form, which is
        free of the cancellation that Woodbury on the right-hand side of w_S would have. `matrix` is A_S A_S^T if it is known already.
        """
        part, kept = self.rows[:, support], self.w_bar[support]
        missing = (self.target - part @ kept).double()
        alpha = None if self.alpha is None else self.alpha[support].double()
        small, eye = len(support) <= len(part), torch.eye(min(part.shape), dtype=torch.float64, device=part.device)
        if small:
            tall = part.double()
            right = tall.T @ missing if alpha is None else tall.T @ missing - alpha
            change = torch.linalg.solve(tall.T @ tall + self.weight * eye, right)
        else:
            if alpha is not None:
                missing = missing + (part @ alpha.to(part.dtype)).double() / self.weight
            inner = torch.linalg.solve((gram(part) if matrix is None else matrix) + self.weight * eye, missing)
            change = (part.T @ inner.to(part.dtype)).double()
            if alpha is not None:
                change = change - alpha / self.weight
        return torch.zeros_like(self.w_bar).index_copy_(0, support, (kept.double() + change).to(self.w_bar.dtype))


def _largest(w: Tensor, k: int) -> Tensor:
    """P_k: w with all but its k largest entries set to zero."""
    return torch.where(keep_largest(w.abs()[None], k)[0], w, 0.0)


def _support(w: Tensor, w_bar: Tensor, k: int) -> Tensor:
    """k indices: those where w is not zero, filled up by the largest of w_bar."""
    score = torch.where(w != 0, w.abs() + w_bar.abs().max() + 1, w_bar.abs())
    return keep_largest(score[None], k)[0].nonzero()[:, 0]


def _threshold(problem: _Quadratic, w: Tensor, k: int, iterations: int, tolerance: float = 1e-4) -> tuple[Tensor, list[float]]:
    """Iterative hard thresholding with the line search of the paper. Q never rises."""
    safe = 1 / problem.curvature()
    history: list[float] = []
    for _ in range(iterations):
        g, value = problem.gradient(w)
        history.append(value)
        on = w != 0
        g_on = torch.where(on, g, 0.0)
        slope = float(g_on @ g_on)
        kept = _support_keeping_step(w, g, on)
        image = problem.rows @ g_on
        best = slope / max(float(image @ image) + problem.weight * slope, 1e-30)
        if 0 < best <= kept:
            new = w - best * g_on
            after = problem.value(new)
        else:
            new, after = _doubling(problem, w, g, k, kept if kept < float("inf") else safe, safe)
        if after >= value:  # no step lowers Q
            break
        w = new
        if value - after <= tolerance * max(abs(value), 1e-30):
            break
    history.append(problem.value(w))
    return w, history


def _support_keeping_step(w: Tensor, g: Tensor, on: Tensor) -> float:
    """The largest step for which every weight on the support stays larger than every weight off it."""
    outside = float(g[~on].abs().max()) if not bool(on.all()) else 0.0
    shrink = torch.where(w * g > 0, g.abs(), -g.abs())[on] + outside  # how fast |w_i| and the largest entrant approach each other
    closing = shrink > 0
    return float((w[on].abs()[closing] / shrink[closing]).min()) if bool(closing.any()) else float("inf")


def _doubling(problem: _Quadratic, w: Tensor, g: Tensor, k: int, step: float, safe: float) -> tuple[Tensor, float]:
    """The best of the guaranteed step, the one at which the support begins to change, and five doublings of it."""
    best, value = w, float("inf")
    for tried in (safe, *(step * 1.001 * 2**i for i in range(6))):
        new = _largest(w - tried * g, k)
        if (after := problem.value(new)) < value:
            best, value = new, after
    return best, value


def _active_set(problem: _Quadratic, w: Tensor, k: int, iterations: int, rounds: int = 15) -> tuple[Tensor, list[float]]:
    """Hard thresholding on some 2k candidate columns, its support solved exactly; then the full gradient brings in new columns, and again.

    Solving the support exactly is where the inner iterations converge to. From there the gradient is zero on the support and tells alone
    which columns are worth more than the smallest weights.
    """
    active = keep_largest(problem.w_bar.abs()[None], min(2 * k, len(w)))[0]
    step = 1 / (2 * problem.curvature())
    history: list[float] = []
    before = float("inf")
    for _ in range(rounds):
        columns = active.nonzero()[:, 0]
        part, steps = _threshold(problem.restricted(columns), w[columns], k, iterations)
        history += steps
        w = problem.back_solve(torch.zeros_like(w).index_copy_(0, columns, part).nonzero()[:, 0])
        g, value = problem.gradient(w)
        entering = torch.zeros_like(active)
        for i in range(11):  # longer and longer steps until new columns come in
            entering = (_largest(w - step * 2**i * g, k) != 0) & ~active
            if bool(entering.any()):
                break
        if value > before * (1 - 1e-3) and not bool(entering.any()):
            break
        active, before = active | entering, min(before, value)
    return w, history


def _exchange(problem: _Quadratic, w: Tensor, support: Tensor, history: list[float], rounds: int = 10) -> tuple[Tensor, Tensor]:
    """After the back-solve the gradient is zero on the support: exchange the weights that cost least for the columns that gain most.

    With M = A^T A + n lambda I, removing i costs w_i^2 / (2 [M_SS^-1]_ii) and adding j gains g_j^2 / (2 (M / M_SS)_jj); both come from one
    factor of n lambda I + A_S A_S^T. As many pairs as promise a gain are exchanged, half as many while Q, solved exactly on the new
    support, does not fall; a last round tries the few best pairs one by one.
    """
    pairs, rows, matrix = len(support), problem.rows, gram(problem.rows[:, support])
    for _ in range(rounds):
        g, value = problem.gradient(w)
        on = torch.zeros_like(w, dtype=torch.bool).index_fill_(0, support, True)
        form = problem.quadratic_form(matrix)  # a_j^T (n lambda I + A_S A_S^T)^-1 a_j
        cost = torch.where(on, w.square() * problem.weight / (2 * (1 - form).clamp_min(1e-12)), float("inf"))
        gain = torch.where(on, -1.0, g.square() / (2 * problem.weight * (1 + form)))
        (cost, leaving), (gain, entering) = cost.sort(stable=True), gain.sort(descending=True, stable=True)
        pairs = min(2 * pairs, int((gain > cost).sum()))
        trials = [(leaving[:n], entering[:n]) for n in _halves(pairs)]
        trials += [(leaving[i : i + 1], entering[j : j + 1]) for i, j in _CORNER if max(i, j) < min(len(support), len(w) - len(support))]
        for out, into in trials:
            swapped = on.index_fill(0, out, False).index_fill_(0, into, True).nonzero()[:, 0]
            updated = matrix + gram(rows[:, into]) - gram(rows[:, out])
            new = problem.back_solve(swapped, updated)
            if (after := problem.value(new)) < value - 1e-6 * abs(value):
                break
        else:
            break
        w, support, matrix, pairs = new, swapped, updated, len(out)
        history.append(after)
        if value - after < 1e-3 * abs(value):
            break
    return w, support


_CORNER = [(i, j) for total in range(5) for i in range(total + 1) for j in [total - i]]


def _halves(n: int) -> list[int]:
    return [] if n < 1 else [n, *_halves(n // 2)]


def _coordinate_descent(problem: _Quadratic, w: Tensor, support: Tensor, sweeps: int = 20) -> Tensor:
    """Exact minimisation in one coordinate of the support after the other."""
    part, x = problem.rows[:, support].double(), w[support].double()
    bar, scale = problem.w_bar[support].double(), part.square().sum(0) + problem.weight
    alpha = torch.zeros_like(x) if problem.alpha is None else problem.alpha[support].double()
    residual = problem.target.double() - part @ x
    for _ in range(sweeps):
        largest = 0.0
        for j in range(len(x)):
            delta = (part[:, j] @ residual - alpha[j] - problem.weight * (x[j] - bar[j])) / scale[j]
            residual -= part[:, j] * delta
            x[j] += delta
            largest = max(largest, abs(float(delta)))
        if largest < 1e-9:
            break
    return torch.zeros_like(problem.w_bar).index_copy_(0, support, x.to(problem.w_bar.dtype))
