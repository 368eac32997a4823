"""Attacks on networks that decide: inputs changed by little until the answer, or the price of the answer, is another one.

- :func:`pgd` is projected gradient ascent in the sup-norm on any differentiable output: a plain network, a policy's own answer (the readout
  of the exit that each row takes; the choice itself is piecewise constant and has no gradient), one member of a family.
- :func:`early_attack` makes every early readout wrong and leaves the last as it was: whoever checks the plain network sees nothing.
- :func:`slowdown` makes inputs dear: it takes the confidence away that lets rows leave early.

What they say about a network is put together by :func:`~neurarium.dynamic.robustness.dynn_robustness`.

*Source.* Projected gradient: Madry et al. 2018. Early attack: Chen et al., "Dynamic Neural Network is All You Need: Understanding the
Robustness of Dynamic Mechanisms in Neural Networks", arXiv 2308.08709, section on its fourth question. Slow-down: Hong et al. 2021
(DeepSloth), here by the entropy of the early readouts.

*Departures.* The early attack keeps, row by row, the nearest point on its way that succeeds, instead of the point where it stops; and it
starts a thousandth of the range inside the allowed range, for at its very edge the change of variables has no slope.

*Cost.* A forward and a backward pass a step; the early attack runs all rows side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.outcome import Policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import Report

__all__ = ["EarlyAttackReport", "SlowdownReport", "early_attack", "hesitation", "pgd", "slowdown", "succeeds"]

RowLoss = Callable[[Any, Any], Tensor]
Readouts = Callable[[Tensor], list[Tensor]]

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


@dataclass(frozen=True)
class EarlyAttackReport(Report):
    """What :func:`early_attack` found.

    Attributes:
        x: ``(n, ...)`` the attacked inputs: where it succeeded the nearest such point, else the last one.
        success: ``(n,)`` bool: every early readout differs from ``label``, the last one does not.
        label: ``(n,)`` the last readout's answer on the clean input.
        norm: ``(n,)`` L2 norm of the change.
        steps: of the optimiser, for every row.
    """

    x: Tensor
    success: Tensor
    label: Tensor
    norm: Tensor
    steps: int

    @property
    def rate(self) -> float:
        """Share of the rows on which it succeeded."""
        return float(self.success.double().mean())


def early_attack(
    policy: Policy | Readouts,
    x: Tensor,
    *,
    alpha: float = 1.0,
    c: float = 5.0,
    lr: float = 0.01,
    steps: int = 300,
    clip: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0),
) -> EarlyAttackReport:
    """Make all early readouts wrong while the last one answers as before.

    Adam on w with x' = lo + (hi - lo) (tanh(w) + 1)/2 minimises, for each row, with r = the last readout's label on ``x``,

        |x' - x|^2 + c [ sum_{k<K} p_k(r) - alpha sum_{j != r} relu(p_K(r) - p_K(j)) ].

    Args:
        policy: or a function from inputs to the list of all readouts ``(n, classes)``, the final one last.
        alpha: how strongly the last readout is held.
        c: what the readouts weigh against the distance. The paper's 50 is for standardised pixels; with pixels in [0, 1] of standard
            deviation 0.3 distances are a tenth of those, which makes it 5.
        clip: ``(lo, hi)``, the allowed range; ``None``: none, then x' = w.
    """
    _check(x, 0.0, lr, steps)
    read: Readouts = policy.outputs if isinstance(policy, Policy) else policy
    with evaluating(policy) if isinstance(policy, nn.Module) else nullcontext():
        with torch.no_grad():
            readouts = read(x)
            _classes(readouts)
            label = readouts[-1].argmax(1)
        to_input, w = _unbounded(x.detach(), clip)
        w.requires_grad_()
        optimizer = torch.optim.Adam([w], lr=lr)
        kept, nearest = to_input(w).detach(), x.new_full((len(x),), float("inf"))
        for t in range(steps + 1):
            with torch.enable_grad():
                at = to_input(w)
                distance = (at - x).square().flatten(1).sum(1)
                readouts = read(at)
                loss = distance + c * _early_loss(readouts, label, alpha)
            with torch.no_grad():
                better = succeeds(readouts, label) & (distance < nearest)
                failed = ~better & nearest.isinf() if t == steps else torch.zeros_like(better)
                nearest = torch.where(better, distance, nearest)
                kept = torch.where((better | failed).view(-1, *[1] * (x.ndim - 1)), at, kept)
            if t < steps:
                (w.grad,) = torch.autograd.grad(loss.sum(), w)
                optimizer.step()
    norm = (kept - x).flatten(1).norm(dim=1)
    return EarlyAttackReport(kept.detach(), nearest.isfinite(), label, norm.detach(), steps)


def succeeds(readouts: list[Tensor], label: Tensor) -> Tensor:
    """``(n,)``: every early readout says something else than ``label``, the last one says ``label``."""
    early = torch.stack([y.argmax(1) != label for y in readouts[:-1]]).all(0)
    return early & (readouts[-1].argmax(1) == label)


def _classes(readouts: list[Tensor]) -> None:
    if len(readouts) < 2:
        raise BadInput("there is no early readout to attack: this has only one")
    if any(y.ndim != 2 for y in readouts):
        raise BadInput(f"readouts must be (n, classes), not {tuple(readouts[-1].shape)}")


def _early_loss(readouts: list[Tensor], label: Tensor, alpha: float) -> Tensor:
    p = torch.stack([y.softmax(1) for y in readouts])  # (readouts, n, classes)
    reference = p.gather(2, label.expand(len(p), -1)[..., None])  # (readouts, n, 1)
    hold = (reference[-1] - p[-1]).relu().sum(1)  # the label's own term is 0
    return reference[:-1, :, 0].sum(0) - alpha * hold


def _unbounded(x: Tensor, clip: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A map from all of space to the allowed inputs, and the point that it takes (nearly) to x."""
    if clip is None:
        return lambda w: w, x.clone()
    lo, hi = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in clip)
    if (hi <= lo).any():
        raise BadInput("clip must be (smallest, largest)")
    centred = ((x - lo) / (hi - lo) * 2 - 1).clamp(-0.999, 0.999)
    return lambda w: lo + (hi - lo) * (w.tanh() + 1) / 2, centred.atanh()


@dataclass(frozen=True)
class SlowdownReport(Report):
    """What :func:`slowdown` found.

    Attributes:
        x: ``(n, ...)`` the attacked inputs.
        clean: ``(n,)`` int64 FLOPs of every row before, ``attacked``: after.
        answered: ``(n,)`` the label that the policy gives before, ``answers``: after.
    """

    x: Tensor
    clean: Tensor
    attacked: Tensor
    answered: Tensor
    answers: Tensor

    @property
    def inflation(self) -> float:
        """Mean cost after over mean cost before."""
        return float(self.attacked.sum() / self.clean.sum())


def slowdown(
    policy: Policy,
    x: Tensor,
    *,
    eps: float,
    step: float | None = None,
    steps: int = 10,
    objective: Callable[[Tensor], Tensor] | None = None,
    clip: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0),
) -> SlowdownReport:
    """Inputs within ``eps`` of ``x`` that make ``policy`` compute more.

    Args:
        objective: inputs to ``(n,)``, differentiable, large where the policy computes much: :func:`hesitation` by default, which is right
            for exits; for layers that decide, what their questions measure.
        step: eps / 4 by default.
    """
    raised = objective or (lambda z: hesitation(policy.outputs(z)))
    moved = pgd(
        raised, x, None, eps=eps, step=eps / 4 if step is None else step, steps=steps, loss=lambda out, _: out, clip=clip, module=policy
    )
    with evaluating(policy), torch.no_grad():
        before, after = policy.decide(x), policy.decide(moved)
    return SlowdownReport(moved, before.cost, after.cost, before.output.argmax(-1), after.output.argmax(-1))


def hesitation(readouts: list[Tensor]) -> Tensor:
    """Mean entropy of the early readouts ``(n, classes)``, as a share of the largest possible: ``(n,)``."""
    _classes(readouts)
    logs = torch.stack([y.log_softmax(1) for y in readouts[:-1]])
    return -(logs.exp() * logs).sum(2).mean(0) / torch.tensor(float(logs.shape[2])).log()
