"""Super-convergence: one learning-rate cycle with a very large peak, and two ways to learn how large the peak may be.

A small learning rate is safe and slow. One cycle starts small, climbs to a rate an order of magnitude above the usual one, where the noise
of the steps themselves regularises, comes down again and ends far below the start. Momentum runs the other way: low where the rate is
high. A range test finds the peak, by raising the rate at every step until the loss turns up; an estimate of the curvature along the path
finds it from the weights alone.

*Equations.* A cycle of N steps is four knots with linear (or cosine) pieces between them:
``max/div`` at 0, ``max`` at ``up N``, ``max/div`` at ``(1 - tail) N``, ``max/(div final_div)`` at N; momentum goes high, low, high, high.
Curvature: with weights ``w_i`` kept every ``every`` steps of gradient descent at rate ``eps``,
``est = (1 - a) est + a eps |w_{i+1} - w_i|_1 / |2 w_{i+1} - w_i - w_{i+2}|_1``. As ``w_{i+1} - w_i = -eps g_i``, this is
``|g| / |H eps g| eps``: the inverse curvature along the step.

*Source.* Smith, Topin, "Super-Convergence" (arXiv 1708.07120); range test and cyclical momentum: Smith, arXiv 1803.09820.

*Departures.* The descent need not mirror the ascent (``up + tail`` may be anything up to 1), ``tail=0`` goes from the peak straight to
the last rate. Steps are counted as torch's ``OneCycleLR`` counts them, so the rates agree where both are defined. Beyond the end the last
rate stays. The range test raises the rate geometrically unless told otherwise, and reads a curve smoothed in both directions, because
smoothing in one direction alone sees the turn too late.

*Cost.* A cycle costs nothing. A range test costs ``steps`` batches, on a copy of the model. The estimate keeps two copies of the weights.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from neurarium.errors import BadInput
from neurarium.learn.fit import Loss, call, device_of, find_loss, forked_rng, to, trainable
from neurarium.roles import Loader, Report

__all__ = ["CyclicalMomentum", "HessianFreeLR", "OneCycle", "RangeTest", "lr_range_test"]

Knots = tuple[tuple[float, float, float], ...]  # (step, rate as a share of the peak, weight of the low momentum)


class OneCycle(LRScheduler):
    """One cycle of learning rate and momentum, stepped after every batch.

    Args:
        max_lr: the peak, one for all groups or one a group. ``None``: each group's own rate in the optimizer is its peak, so that groups
            with rates of their own keep their ratios.
        total_steps: length of the cycle. Beyond it the last rate stays, with one warning.
        div: peak over first rate.
        final_div: first rate over last rate.
        up: share of the steps that climb.
        tail: share of the steps that go from the first rate to the last; 0 = from the peak straight down.
        shape: of the pieces: ``"linear"`` or ``"cos"``.
        momentum: (high, low), put into ``momentum`` and the first of ``betas`` of each group that has them; ``None`` leaves them alone.
        last_step: where to begin, as ``last_epoch`` of torch's schedulers.

    Loading a state goes on where that state was. Where ``total_steps`` now differs from what that run asked for, the cycle is stretched
    or shortened as by :meth:`extend`: so a run is resumed to another length by giving that length.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float] | None,
        total_steps: int,
        *,
        div: float = 12.0,
        final_div: float = 1e3,
        up: float = 0.45,
        tail: float = 0.1,
        shape: str = "linear",
        momentum: tuple[float, float] | None = (0.95, 0.85),
        last_step: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise BadInput(f"{type(optimizer).__name__} is not an optimizer")
        groups = optimizer.param_groups
        peaks = [g["lr"] if max_lr is None else max_lr for g in groups] if not isinstance(max_lr, Sequence) else list(max_lr)
        peaks = [float(p) for p in peaks]
        valid = {
            "max_lr": len(peaks) == len(groups) and all(0 <= p < math.inf for p in peaks),
            "total_steps": int(total_steps) == total_steps and total_steps >= 1, "div": div > 0, "final_div": final_div > 0,
            "up": 0 <= up <= 1, "tail": 0 <= tail <= 1 - up, "shape": shape in ("linear", "cos"),
            "momentum": momentum is None or (len(momentum) == 2 and all(0 <= m < 1 for m in momentum)),
        }  # fmt: skip
        if wrong := [name for name, fine in valid.items() if not fine]:
            raise BadInput(f"OneCycle: {wrong[0]}={locals()[wrong[0]]!r} is out of range (groups: {len(groups)}, 0 <= up <= 1 - tail)")
        self.peaks, self.shape, self.momentum = peaks, shape, momentum
        self.div, self.final_div, self.up, self.tail = div, final_div, up, tail
        self.total_steps = self.asked = int(total_steps)
        self.knots = self._cycle(0, self.total_steps, 1 / div)
        self.warned = False
        for group, peak in zip(groups, peaks):
            if last_step != -1:
                group.setdefault("initial_lr", peak / div)
        super().__init__(optimizer, last_step)

    def _cycle(self, start: int, end: int, first: float) -> Knots:
        """Knots of a cycle whose first step is ``start`` and whose last is ``end - 1``; torch counts the inner knots from 1 and 2."""
        n, last = end - start, max(end - 1, start)
        peak = min(max(start + self.up * n - 1, start), last)
        foot = min(max(start + (1 - self.tail) * n - 2, peak), last)
        low, final = 1 / self.div, 1 / (self.div * self.final_div)
        down = ((foot, low, 0.0),) if self.tail else ()
        return ((float(start), first, 0.0), (peak, 1.0, 1.0), *down, (float(last), final, 0.0))

    def at(self, step: float) -> tuple[float, float]:
        """The rate at a step as a share of the peak, and the weight of the low momentum."""
        if step <= self.knots[0][0]:
            return self.knots[0][1:]
        for (left, *a), (right, *b) in zip(self.knots, self.knots[1:]):
            if step <= right and right > left:
                share = (step - left) / (right - left)
                if self.shape == "cos":
                    share = (1 - math.cos(math.pi * share)) / 2
                rate, low = (x + (y - x) * share for x, y in zip(a, b))
                return rate, low
        return self.knots[-1][1:]

    def get_lr(self) -> list[float]:
        share, low = self.at(self.last_epoch)
        if self.momentum is not None:
            set_momentum(self.optimizer, self.momentum[0] + (self.momentum[1] - self.momentum[0]) * low)
        return [peak * share for peak in self.peaks]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch > self.total_steps and not self.warned:
            self.warned = True
            warnings.warn(f"the cycle ended after {self.total_steps} steps: the last rate stays (see OneCycle.extend)", stacklevel=2)

    def extend(self, total_steps: int) -> None:
        """Let the run end after ``total_steps`` in all, more or fewer, without a jump: what remains of the cycle is stretched to fit.

        If nothing remains, the added steps are a new cycle that climbs from the present rate.
        """
        now = self.last_epoch
        if total_steps <= now:
            raise BadInput(f"OneCycle: {now} steps are done, so the total cannot become {total_steps}")
        if now >= self.total_steps - 1:
            done = [k for k in self.knots if k[0] < now]
            self.knots = (*done, (float(now), *self.at(now)), *self._cycle(now, total_steps, self.at(now)[0])[1:])
        else:
            stretch = (total_steps - 1 - now) / (self.total_steps - 1 - now)
            self.knots = tuple((now + (step - now) * stretch, *value) for step, *value in self.knots)  # type: ignore[misc]
        self.total_steps, self.warned = int(total_steps), False

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if missing := {"knots", "peaks", "asked"} - set(state_dict):
            raise BadInput(f"not the state of a OneCycle: it has no {sorted(missing)}")
        if len(state_dict["peaks"]) != len(self.optimizer.param_groups):
            raise BadInput(f"the state has {len(state_dict['peaks'])} parameter groups, the optimizer {len(self.optimizer.param_groups)}")
        asked = self.asked
        super().load_state_dict(copy.deepcopy(dict(state_dict)))
        self.knots = tuple(tuple(k) for k in self.knots)  # type: ignore[misc]
        if asked != self.asked:
            self.asked = asked
            self.extend(asked)


class CyclicalMomentum(LRScheduler):
    """Momentum alone in triangles, from ``high`` down to ``low`` in ``up`` steps and back in ``down``; the learning rate is not touched.

    To be stepped beside any scheduler of the rate, or with a constant rate.
    """

    def __init__(
        self, optimizer: Optimizer, up: int, down: int | None = None, *, high: float = 0.95, low: float = 0.85, last_step: int = -1
    ) -> None:
        down = up if down is None else down
        if up < 1 or down < 1 or not 0 <= low <= high < 1:
            raise BadInput(f"CyclicalMomentum needs up, down >= 1 and 0 <= low <= high < 1, not {up}, {down}, {low}, {high}")
        if not any("momentum" in g or "betas" in g for g in optimizer.param_groups):
            raise BadInput(f"{type(optimizer).__name__} has neither momentum nor betas")
        self.up, self.down, self.high, self.low = up, down, high, low
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        super().__init__(optimizer, last_step)

    def get_lr(self) -> list[Any]:
        place = self.last_epoch % (self.up + self.down)
        share = place / self.up if place <= self.up else 1 - (place - self.up) / self.down
        set_momentum(self.optimizer, self.high - (self.high - self.low) * share)
        return [group["lr"] for group in self.optimizer.param_groups]


def set_momentum(optimizer: Optimizer, value: float) -> None:
    """Into ``momentum`` and the first of ``betas``, whichever a group has."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = value
        if "betas" in group:
            group["betas"] = (value, *group["betas"][1:])


@dataclass(frozen=True)
class RangeTest(Report):
    """What a range test saw. ``losses`` are as measured, one a rate; the rest is read off the smoothed curve."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float  # where the loss falls fastest per factor of the rate
    lowest: float  # where it is lowest
    divergence: float  # the first rate that the test did not survive; inf if it survived all
    suggestion: float  # a peak for a cycle: half the rate of the lowest loss, or of divergence if that comes first


def lr_range_test(
    model: nn.Module,
    loss_fn: str | Loss,
    loader: Loader,
    make_optimizer: Callable[..., Optimizer],
    *,
    lo: float = 1e-5,
    hi: float = 10.0,
    steps: int = 100,
    dwell: int = 1,
    smooth: float = 0.8,
    stop: float = 4.0,
    scale: str = "log",
    groups: Callable[[nn.Module], Any] | None = None,
) -> RangeTest:
    """Train a copy of the model while the learning rate rises from ``lo`` to ``hi``; stop when the loss is ``stop`` times its lowest.

    The model, the optimizer's maker, the loader's order and all random states (torch, numpy, ``random``) are as before afterwards.

    Args:
        loss_fn: ``"cross_entropy"``, ``"mse"``, or a function of ``(output, y)``.
        make_optimizer: makes the optimizer from the parameters, or from ``groups(model)``. Where groups differ in rate, ratios are kept and
            the largest is the one that is swept.
        dwell: batches at each rate.
        smooth: of the loss, the share of the past in an exponential average.
        scale: ``"log"`` or ``"linear"`` (the way of the papers) spacing of the rates.
    """
    valid = {
        "lo": 0 < lo < hi < math.inf, "steps": steps >= 2, "dwell": dwell >= 1, "smooth": 0 <= smooth < 1, "stop": stop > 1,
        "scale": scale in ("log", "linear"),
    }  # fmt: skip
    if wrong := [name for name, fine in valid.items() if not fine]:
        raise BadInput(f"lr_range_test: {wrong[0]}={locals()[wrong[0]]!r} is out of range")
    loss, device = find_loss(loss_fn), device_of(model)
    lrs = (np.geomspace if scale == "log" else np.linspace)(lo, hi, steps)
    losses: list[float] = []
    divergence = math.inf
    with undisturbed(loader, device) as batches:
        trial = copy.deepcopy(model)
        trial.train()
        optimizer = make_optimizer(trainable(trial) if groups is None else groups(trial))
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        ratios = [r / max(rates) for r in rates] if max(rates) > 0 else [1.0] * len(rates)
        running, best, stream = 0.0, math.inf, _endless(batches)
        for i, lr in enumerate(lrs):
            for group, ratio in zip(optimizer.param_groups, ratios):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * ratio)
                else:
                    group["lr"] = float(lr * ratio)
            total = 0.0
            for _ in range(dwell):
                x, y = next(stream)
                optimizer.zero_grad()
                value = loss(call(trial, to(x, device)), to(y, device))
                total += float(value.detach())
                if not math.isfinite(total):
                    break
                value.backward()
                optimizer.step()
            if not math.isfinite(total):
                if i == 0:
                    raise BadInput(f"lr_range_test: the loss is {total} before the first step")
                divergence = float(lr)
                break
            losses.append(total / dwell)
            running = smooth * running + (1 - smooth) * losses[-1]
            average = running / (1 - smooth ** len(losses))
            best = min(best, average)
            if average > best + (stop - 1) * abs(best):
                divergence = float(lr)
                break
    return _read(lrs[: len(losses)].tolist(), losses, divergence, smooth)


def _read(lrs: list[float], losses: list[float], divergence: float, smooth: float) -> RangeTest:
    level = float(np.median(losses[: max(len(losses) // 10, 3)]))  # a burst at the end must not hide the valley before it
    curve = _average(_average(np.minimum(losses, level), smooth)[::-1], smooth)[::-1]
    low = int(np.argmin(curve))
    slopes = np.diff(curve[: low + 1]) / np.diff(np.log(lrs[: low + 1])) if low else np.zeros(1)
    steepest = lrs[min(int(np.argmin(slopes)) + bool(low), low)]
    return RangeTest(tuple(lrs), tuple(losses), tuple(curve), steepest, lrs[low], divergence, min(lrs[low], divergence) / 2)


def _average(values: Iterable[float], smooth: float) -> list[float]:
    """Exponential average, each entry a proper mean of what is before it."""
    running, found = 0.0, []
    for i, value in enumerate(values):
        running = smooth * running + (1 - smooth) * value
        found.append(running / (1 - smooth ** (i + 1)))
    return found


def _endless(loader: Loader) -> Iterator[Any]:
    epoch = 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        count = 0
        for count, batch in enumerate(loader, 1):  # noqa: B007
            yield batch
        if not count:
            raise BadInput("the loader yielded no samples")
        epoch += 1


@contextmanager
def undisturbed(loader: Loader, device: torch.device) -> Iterator[Loader]:
    """A loader to draw from for a while; random states, generators and pass counters are as before afterwards."""
    twin = copy.copy(loader) if hasattr(loader, "set_epoch") else loader
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = [(g, g.get_state()) for g in generators.values()]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (augmentations of others draw from it)
    try:
        with forked_rng(device):
            yield twin
    finally:
        for generator, state in states:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


class HessianFreeLR:
    """A running estimate of the largest useful learning rate, from the weights that training passes through; nothing is differentiated.

    Call :meth:`observe` after every step of plain gradient descent at a constant rate. On a quadratic of curvature h, with ``every=1``,
    the estimate is 1/h; with a larger spacing the gradient's noise averages out and it is about 1/(every h). Under momentum it is that of
    the effective rate.

    Args:
        optimizer: whose weights and rate are read.
        every: steps between two readings.
        average: share of a new reading.
        start: of the estimate.
    """

    def __init__(self, optimizer: Optimizer, *, every: int = 10, average: float = 0.1, start: float = 0.1) -> None:
        if every < 1 or not 0 < average <= 1 or not start > 0:
            raise BadInput(f"HessianFreeLR needs every >= 1, 0 < average <= 1, start > 0, not {every}, {average}, {start}")
        self.optimizer, self.every, self.average, self.estimate = optimizer, every, average, float(start)
        self.steps, self.kept, self.readings = 0, [], []  # type: tuple[int, list[list[Tensor]], list[float]]
        self._keep()

    def observe(self) -> float:
        """Note one step that was made; returns the estimate."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._keep()
        return self.estimate

    @torch.no_grad()
    def _keep(self) -> None:
        self.kept.append([p.detach().clone() for group in self.optimizer.param_groups for p in group["params"]])
        if len(self.kept) < 3:
            return
        old, mid, new = self.kept[-3:]
        step = sum(float((b - a).abs().sum()) for a, b in zip(old, mid))
        bend = sum(float((2 * b - a - c).abs().sum()) for a, b, c in zip(old, mid, new))
        del self.kept[0]
        if bend > 0 and math.isfinite(step) and math.isfinite(bend):
            self.readings.append(float(self.optimizer.param_groups[0]["lr"]) * step / bend)
            self.estimate = (1 - self.average) * self.estimate + self.average * self.readings[-1]
