"""Attacks on networks that decide: inputs changed by little until the answer, or the price of the answer, is another one.

:func:`pgd` is projected gradient ascent in the sup-norm on any differentiable output: a plain network, a policy's own answer (the readout
of the exit that each row takes; the choice itself is piecewise constant and has no gradient), one member of a family.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.cost import evaluating
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["pgd"]

RowLoss = Callable[[Any, Any], Tensor]

#: name -> a loss for each row of ``(output, target)``; the attack raises it
LOSSES: dict[str, RowLoss] = {
    "ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"),
    # KL(target || softmax(logits)); the target's own entropy is a constant that keeps it at 0 for equal distributions
    "kl": lambda logits, p: (torch.xlogy(p, p) - p * logits.log_softmax(-1)).sum(-1),
}


def pgd(
    f: Callable[[Tensor], Any],
    x: Tensor,
    y: Any,
    *,
    eps: float,
    step: float,
    steps: int,
    loss: Literal["ce", "kl"] | RowLoss = "ce",
    start: Literal["uniform"] | float = 0.0,
    generator: torch.Generator | None = None,
    clip: tuple[float | Tensor, float | Tensor] | None = None,
    best: bool = True,
    module: nn.Module | None = None,
) -> Tensor:
    """x', within ``eps`` of ``x`` in every entry, on which ``loss(f(x'), y)`` is large for each row.

    x_0 = x + noise;  x_{t+1} = project(x_t + step * sign(d loss / d x_t)), project: onto [x - eps, x + eps] and ``clip``.

    Args:
        y: labels for ``"ce"``, probabilities ``(n, classes)`` for ``"kl"`` (the loss is KL(y || softmax(f))), anything for your own loss.
        loss: or a function ``(output, y) -> (n,)``, one number a row. To aim at a label, pass ``lambda out, y: -cross_entropy(...)``.
        start: ``"uniform"`` draws x_0 from the whole ball, a number is the standard deviation of Gaussian noise, 0 starts at ``x``.
        generator: of the random start (on the CPU); the global one without it.
        clip: smallest and largest allowed input, numbers or tensors that broadcast to ``x`` (standardised inputs have a pair a channel).
            An entry of ``x`` that lies outside may stay there.
        best: return, row by row, the point of largest loss on the way (so never a smaller one than at x_0) instead of the last.
        module: put into evaluation mode meanwhile, so that batch statistics do not move; ``f`` itself if that is a module.

    Weights, their gradients and all modes are afterwards as before.

    Raises:
        UnsupportedModel: no gradient reaches the input.
    """
    _check(x, eps, step, steps)
    module = f if module is None and isinstance(f, nn.Module) else module
    measure = LOSSES[loss] if isinstance(loss, str) else loss
    x = x.detach()
    low, high = x - eps, x + eps
    if clip is not None:
        lo, hi = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in clip)
        low, high = torch.minimum(torch.maximum(low, lo), x), torch.maximum(torch.minimum(high, hi), x)
    at = _start(x, eps, start, generator).clamp(low, high)
    kept, most = at, x.new_full((len(x),), float("-inf"))
    with evaluating(module) if module is not None else nullcontext():
        for t in range(steps + best):
            with torch.enable_grad():
                at = at.clone().requires_grad_()
                value = measure(f(at), y)
            if value.shape != (len(x),):
                raise BadInput(f"the loss must give one number for each of {len(x)} rows, not shape {tuple(value.shape)}")
            if t < steps:
                ascent = _ascent(value, at, f)
            at, value = at.detach(), value.detach().to(x.dtype)
            if best:
                better = value > most
                most = torch.where(better, value, most)
                kept = torch.where(better.view(-1, *[1] * (x.ndim - 1)), at, kept)
            if t < steps:
                at = (at + step * ascent).clamp(low, high)
    return kept if best else at


def _check(x: Tensor, eps: float, step: float, steps: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise BadInput("an attack needs a floating-point input to change")
    if len(x) == 0:
        raise BadInput("an empty batch: pass at least one row")
    if x.isnan().any():
        raise BadInput("the input has NaN")
    if eps < 0 or step < 0 or steps < 0:
        raise BadInput(f"eps, step and steps cannot be negative: {eps}, {step}, {steps}")


def _start(x: Tensor, eps: float, start: str | float, generator: torch.Generator | None) -> Tensor:
    if start == "uniform":
        return x + eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) - 1)
    if isinstance(start, str) or start < 0:
        raise BadInput(f"start must be 'uniform' or the standard deviation of the noise, not {start!r}")
    return x if start == 0 else x + start * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def _ascent(value: Tensor, at: Tensor, f: Any) -> Tensor:
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, at, torch.ones_like(value), allow_unused=True)
        if gradient is not None:
            return gradient.sign().nan_to_num(0)
    raise UnsupportedModel("no gradient reaches the input, so there is no direction to attack in", module=type(f).__name__)
