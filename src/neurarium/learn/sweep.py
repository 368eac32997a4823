"""Many learning rates at once: copies of one network with different weights, rates and data, trained in a single vectorised loop.

A learning-rate curve needs a dozen trainings of one architecture. On small networks most of the time of each goes to overhead, and all
are alike but for their numbers: so the weights are stacked, the model is mapped over the stack (:func:`torch.vmap`), and the optimizer's
arithmetic runs on the stacks. Each copy ends where a loop of its own would end.

*Equations.* Those of ``torch.optim.Adam`` and ``torch.optim.SGD`` (with momentum), and of :class:`~neurarium.learn.orthogonal.ROOT`, each
without weight decay. A copy whose loss is not finite stops there and then: its loss stays infinite, the others are not touched.

*Cost.* That of the separate trainings in arithmetic, that of one in overhead. Memory grows with the number of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import exp, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.learn.fit import find_loss
from neurarium.learn.orthogonal import MUON, coefficients_for, newton_schulz

__all__ = ["best_rate", "sweep"]


def sweep(
    models: Sequence[nn.Module],
    groups: Callable[[nn.Module], list[dict[str, Any]]],
    lrs: Sequence[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    optimizer: str = "adam",
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Train each model at each learning rate.

    Args:
        models: of one architecture, e.g. of different seeds. They are left as they are.
        groups: ``groups(model)`` -> groups whose ``lr`` is relative to the learning rate, as ``mup_groups(..., lr=1.0)`` makes them.
        lrs: the learning rates.
        batches: ``(x, y)``, or with a leading dimension of ``len(models)`` if each model has data of its own (x then has one dimension
            more; this is told from ``y.ndim == 2``).
        optimizer: ``"adam"``, ``"sgd"``, ``"muon"`` or ``"root"``; the last two orthogonalise groups with ``use_orth`` with scale "rms" and
            momentum 0.95 and give Adam to the others.

    Returns:
        losses (models, lrs, steps), each before its step, and the trained parameters, each (models, lrs, ...).
    """
    if optimizer not in ("adam", "sgd", "muon", "root"):
        raise BadInput(f"optimizer must be 'adam', 'sgd', 'muon' or 'root', not {optimizer!r}")
    if not models or not len(lrs):
        raise BadInput("a sweep needs a model and a learning rate at least")
    n, k = len(models), len(lrs)
    params, buffers = stack_module_state(list(models))
    params = {name: p.detach().repeat_interleave(k, 0) for name, p in params.items()}  # (models * lrs, ...)
    buffers = {name: b.repeat_interleave(k, 0) for name, b in buffers.items()}
    names = {p: name for name, p in models[0].named_parameters()}
    relative = {names[p]: (g["lr"], bool(g.get("use_orth", False))) for g in groups(models[0]) for p in g["params"]}
    if missing := sorted(set(params) - set(relative)):
        raise BadInput(f"the groups leave out {missing[:3]}")
    rates = torch.as_tensor(lrs, dtype=next(iter(params.values())).dtype).repeat(n)
    criterion = F.cross_entropy if loss == "cross_entropy" else find_loss(loss)  # without the checks, which look at values
    skeleton = models[0]

    def value(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(skeleton, (p, b), (x,)), y)

    state: dict[str, list[Tensor]] = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in params.items()}
    alive, losses = torch.ones(n * k, dtype=torch.bool), []
    for step, (x, y) in enumerate(batches, 1):
        own = y.ndim == 2
        if own:
            x, y = x.repeat_interleave(k, 0), y.repeat_interleave(k, 0)
        axis = 0 if own else None
        gradients, now = vmap(grad_and_value(value), in_dims=(0, 0, axis, axis), randomness="error")(params, buffers, x, y)
        alive &= torch.isfinite(now)
        losses.append(torch.where(alive, now, torch.inf))
        rate = torch.where(alive, rates, 0.0)
        for name, p in params.items():
            ratio, orth = relative[name]
            lr = (ratio * rate).view(-1, *[1] * (p.ndim - 1))
            g = gradients[name]
            if not alive.all():
                g = torch.where(alive.view(-1, *[1] * (p.ndim - 1)), g, 0.0)
            if optimizer == "sgd":
                update = state[name][0].mul_(momentum).add_(g) if momentum else g
            elif optimizer in ("muon", "root") and orth:
                update = _orthogonal(g, state[name][0], optimizer == "root")
            else:
                first = state[name][0].lerp_(g, 1 - betas[0])
                second = state[name][1].mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
                scale = (1 - betas[1] ** step) ** 0.5
                update = first / (second.sqrt().div_(scale).add_(eps)).mul_(1 - betas[0] ** step)
            p.addcmul_(lr, update, value=-1)
            if not alive.all():  # what was infinite before the copy stopped
                p.nan_to_num_()
    if not losses:
        raise BadInput("the loader yielded no batch")
    return torch.stack(losses, -1).view(n, k, -1), {name: p.view(n, k, *p.shape[1:]) for name, p in params.items()}


def best_rate(lrs: Sequence[float], losses: Sequence[float] | Tensor) -> float:
    """The learning rate of lowest loss, between the grid's points: vertex of a parabola in the logarithms of both; NaN at an edge."""
    y = torch.as_tensor(losses, dtype=torch.float64)
    i = int(y.argmin())
    if not 0 < i < len(lrs) - 1 or not torch.isfinite(y[i]):
        return float("nan")
    a, b, c = y[i - 1 : i + 2].clamp(1e-12, 1e3 * float(y[i])).log().tolist()
    step = (log(lrs[i + 1] / lrs[i - 1])) / 2
    return lrs[i] * exp(step * 0.5 * (a - c) / (a - 2 * b + c) if a - 2 * b + c > 0 else 0.0)


def _orthogonal(g: Tensor, buffer: Tensor, robust: bool, momentum: float = 0.95, quantile: float = 0.9) -> Tensor:
    """ROOT's update, with scale "rms", of each matrix of the stack."""
    rows, columns = g.shape[1], g[0, 0].numel()
    buffer.mul_(momentum).add_(g)
    v = (g + momentum * buffer).reshape(-1, rows, columns)
    if robust:
        flat = v.flatten(1).abs()
        cut = flat.kthvalue(1 + int(quantile * (flat.shape[1] - 1)), dim=1).values.view(-1, 1, 1) + 1e-9
        v = v.clamp(-cut, cut)
    x = newton_schulz(v, coefficients_for((rows, columns)) if robust else MUON)
    return x.reshape(g.shape) * (0.2 * max(rows, columns) ** 0.5)
