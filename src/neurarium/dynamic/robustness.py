"""Does deciding at run time make a network easier to attack? A probe that compares a policy with its static twin.

A network that stops early answers with other layers than the plain one: it shares most of its weights with it, so what fools one may fool
the other; attacking it is cheaper, because its forward passes end early; and it has answers that the plain network does not show, which can
be made wrong behind its back.

*Measures.* On rows that both get right, for each eps: PGD on the plain network and on the policy's own answer (the logits of the exit that
is taken); the share of rows that fools the attacked one, and the share that fools both, in each direction; FLOPs spent, forward and
backward, per row that was fooled. The early attack and the slow-down attack (:mod:`~neurarium.dynamic.attacks`), the former beside noise of
the same norm.

*Source.* Chen et al., "Dynamic Neural Network is All You Need: Understanding the Robustness of Dynamic Mechanisms in Neural Networks",
arXiv 2308.08709.

*Departures.* One gradient attack stands for the paper's set of gradient and decision attacks. Prices are counted in FLOPs; seconds are
measured on request. The slow-down is added: cost is an answer of a policy too.

*Cost.* For each eps, 3 (steps + 1) forward and backward passes, and those of the early attack.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from neurarium.dynamic.attacks import early_attack, pgd, slowdown, succeeds
from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.exits import check_labels
from neurarium.dynamic.outcome import Policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import Report

__all__ = ["DyNNReport", "TransferReport", "dynn_robustness", "transfer"]

Range = tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True)
class TransferReport(Report):
    """PGD on ``source``, tried on ``target``.

    Attributes:
        rows: how many both get right without an attack; the rates are shares of these.
        success: fooled the source.
        rate: fooled the source and the target.
        flops: spent on making the attacks, forward and backward.
        seconds: the same by the clock; differs from call to call.
    """

    rows: int
    success: float
    rate: float
    flops: int
    seconds: float

    @property
    def flops_per_success(self) -> float:
        """FLOPs spent for each row that fooled the source; infinite if none did."""
        return self.flops / (self.success * self.rows) if self.success else float("inf")


def transfer(
    source: nn.Module,
    target: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    eps: float,
    step: float | None = None,
    steps: int = 10,
    clip: Range | None = (0.0, 1.0),
    batch_size: int = 250,
) -> TransferReport:
    """Attack ``source`` on the rows of ``data`` = (x, y) that both models get right, and see whether ``target`` falls for it too.

    Raises:
        BadInput: no row is right on both.
    """
    x, y = _right(source, target, data)
    return _transfer(source, target, x, y, eps, step, steps, clip, batch_size)[0]


def _right(source: nn.Module, target: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = data
    if len(x) == 0:
        raise BadInput("an empty batch: pass at least one row")
    if x.isnan().any():
        raise BadInput("the input has NaN")
    with evaluating(source), evaluating(target), torch.no_grad():
        said = source(x), target(x)
    check_labels(y, said[0])
    right = (said[0].argmax(1) == y) & (said[1].argmax(1) == y)
    if not right.any():
        raise BadInput("no row is right on both models, so there is nothing to attack: are they trained?")
    return x[right], y[right]


def _transfer(
    source: nn.Module,
    target: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float | None,
    steps: int,
    clip: Range | None,
    batch_size: int,
) -> tuple[TransferReport, Tensor]:
    step = eps / 4 if step is None else step
    if isinstance(source, Policy):
        source.costs(x)  # measured once and kept: no part of the attack
    began = time.perf_counter()
    with _Flops() as counter:
        moved = torch.cat(
            [pgd(source, a, b, eps=eps, step=step, steps=steps, clip=clip) for a, b in zip(x.split(batch_size), y.split(batch_size))]
        )
    seconds = time.perf_counter() - began
    with evaluating(source), evaluating(target), torch.no_grad():
        fooled, both = (m(moved).argmax(1) != y for m in (source, target))
    both &= fooled
    return TransferReport(len(x), _share(fooled), _share(both), counter.total, seconds), moved


class _Flops(TorchDispatchMode):
    """FLOPs of forward and backward passes; torch's own counter hooks into modules and refuses `autograd.grad` of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (price := flop_registry.get(func._overloadpacket)) is not None:
            self.total += price(*args, **(kwargs or {}), out_val=out)
        return out


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


@dataclass(frozen=True)
class DyNNReport(Report):
    """What :func:`dynn_robustness` measured; tuples have one number for each ``eps``.

    Attributes:
        rows: how many both models get right; all rates are shares of these.
        success_static, success_dynamic: fooled by the attack on itself.
        static_to_dynamic, dynamic_to_static: fooled the one that was attacked and the other.
        flops_static, flops_dynamic: FLOPs of the attack for each row that it fooled.
        seconds_static, seconds_dynamic: the same by the clock, empty unless asked for.
        exit_clean, exit_robust: accuracy of every readout, ``(readouts,)`` on clean rows and ``(eps, readouts)`` under the attack on the
            policy.
        early_success: share of rows on which every early readout is wrong and the last as before.
        early_kept: the same rows judged by the last readout alone: share of them whose label is kept.
        early_seen: share of rows whose answer by the policy is changed by the early attack while the last readout keeps its label.
        early_norm: median L2 norm of the successful changes; 0 without any.
        noise_success: the success of Gaussian noise of the same norm, row by row.
        cost: mean FLOPs a row on clean inputs, ``cost_attacked``: under the slow-down attack.
        accuracy_attacked: of the policy under the slow-down attack, on rows that it got right.
    """

    eps: tuple[float, ...]
    rows: int
    success_static: tuple[float, ...]
    success_dynamic: tuple[float, ...]
    static_to_dynamic: tuple[float, ...]
    dynamic_to_static: tuple[float, ...]
    flops_static: tuple[float, ...]
    flops_dynamic: tuple[float, ...]
    seconds_static: tuple[float, ...]
    seconds_dynamic: tuple[float, ...]
    exit_clean: Tensor
    exit_robust: Tensor
    early_success: float
    early_kept: float
    early_seen: float
    early_norm: float
    noise_success: float
    cost: float
    cost_attacked: tuple[float, ...]
    accuracy_attacked: tuple[float, ...]

    @property
    def inflation(self) -> tuple[float, ...]:
        """Cost under the slow-down attack over cost on clean inputs."""
        return tuple(c / self.cost for c in self.cost_attacked)


def dynn_robustness(
    policy: Policy,
    static: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    eps: Sequence[float] = (0.05, 0.1, 0.2),
    steps: int = 10,
    clip: Range | None = (0.0, 1.0),
    early_rows: int = 128,
    early: dict[str, Any] | None = None,
    seed: int = 0,
    timed: bool = False,
    batch_size: int = 250,
) -> DyNNReport:
    """Attack a policy at its current setting and its static twin.

    Args:
        policy: with at least two readouts in ``outputs``, the final one last (exits; a family's configurations work too).
        static: the same architecture without the mechanism; the comparison is about the mechanism only then.
        data: ``(x, y)``.
        early_rows: how many rows the early attack gets.
        early: its settings, see :func:`~neurarium.dynamic.attacks.early_attack`.
        timed: measure seconds too, which makes two calls differ.
    """
    if not isinstance(policy, Policy):
        raise UnsupportedModel("is no policy: EarlyExit(with_exits(model, example)) makes one of a chain", module=type(policy).__name__)
    x, y = _right(static, policy, data)
    options = (None, steps, clip, batch_size)
    out, back, robust, slow = [], [], [], []
    with evaluating(policy):
        for e in eps:
            out.append(_transfer(static, policy, x, y, e, *options)[0])
            report, moved = _transfer(policy, static, x, y, e, *options)
            back.append(report)
            robust.append(_accuracies(policy, moved, y))
            slow.append(_slowdown(policy, x, y, e, steps, clip, batch_size))
        some = x[:early_rows]
        found = early_attack(policy, some, clip=clip, **(early or {}))
        noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x)
        noise *= (found.norm / noise.flatten(1).norm(dim=1)).view(-1, *[1] * (x.ndim - 1))
        noisy = some + noise
        if clip is not None:
            noisy = noisy.clamp(*(torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in clip))
        with torch.no_grad():
            final = policy.outputs(found.x)[-1].argmax(1)
            seen = (policy(found.x).argmax(1) != found.label) & (final == found.label)
            by_noise = succeeds(policy.outputs(noisy), found.label)
            cost = float(policy.decide(x).cost.double().mean())
            clean = _accuracies(policy, x, y)
    return DyNNReport(
        eps=tuple(eps),
        rows=len(x),
        success_static=tuple(r.success for r in out),
        success_dynamic=tuple(r.success for r in back),
        static_to_dynamic=tuple(r.rate for r in out),
        dynamic_to_static=tuple(r.rate for r in back),
        flops_static=tuple(r.flops_per_success for r in out),
        flops_dynamic=tuple(r.flops_per_success for r in back),
        seconds_static=tuple(r.seconds / max(r.success * r.rows, 1) for r in out) if timed else (),
        seconds_dynamic=tuple(r.seconds / max(r.success * r.rows, 1) for r in back) if timed else (),
        exit_clean=clean,
        exit_robust=torch.stack(robust),
        early_success=found.rate,
        early_kept=_share(final[found.success] == found.label[found.success]) if found.success.any() else 1.0,
        early_seen=_share(seen),
        early_norm=float(found.norm[found.success].median()) if found.success.any() else 0.0,
        noise_success=_share(by_noise),
        cost=cost,
        cost_attacked=tuple(c for c, _ in slow),
        accuracy_attacked=tuple(a for _, a in slow),
    )


@torch.no_grad()
def _accuracies(policy: Policy, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([(out.argmax(1) == y).double().mean() for out in policy.outputs(x)])


def _slowdown(policy: Policy, x: Tensor, y: Tensor, eps: float, steps: int, clip: Range | None, batch_size: int) -> tuple[float, float]:
    parts = [slowdown(policy, a, eps=eps, steps=steps, clip=clip) for a in x.split(batch_size)]
    cost, answers = torch.cat([p.attacked for p in parts]), torch.cat([p.answers for p in parts])
    return float(cost.double().mean()), _share(answers == y)
