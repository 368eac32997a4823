"""A disciplined approach to hyperparameters: one balance of regularisation, read off early losses, instead of a grid.

Learning rate, momentum, batch size and weight decay all regularise, and they add up: raise one and another must fall. So they are not
searched together but set in turn, each by short runs. How a run will end shows early: in whether the validation loss still falls, turns,
or has settled.

*Recipe.* (1) A range test gives the largest rate. (2) Short cycles at several constant momenta, and one with momentum cycled against the
rate; as ``lr/(1 - momentum)`` is what moves the weights, the peak is scaled by ``1 - momentum``. (3) Short cycles at several weight
decays. Each choice is that of the lowest validation loss.

*Source.* Smith, "A disciplined approach to neural network hyper-parameters: Part 1" (arXiv 1803.09820).

*Departures.* The report is advice for a person who looks at curves; :func:`clues` puts its reading into numbers (thresholds ours). Short
runs are whole cycles of a fraction of the length, so that their last loss means something. The batch size is the loader's: the report
takes the largest that memory holds, compared at equal time.

*Cost.* ``range_steps`` + (momenta + decays) x ``steps`` training steps, and as many validations as trials; :attr:`Recipe.steps` says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from neurarium.errors import BadInput
from neurarium.learn.fit import Backprop, Diverged, Loss, evaluate
from neurarium.learn.schedule import OneCycle, RangeTest, lr_range_test
from neurarium.roles import Loader, Report

__all__ = ["Clues", "Recipe", "balance_search", "clues"]


@dataclass(frozen=True)
class Clues(Report):
    """What two loss curves say. Places are indices into the curves."""

    underfit: bool  # the validation loss is still falling at the end
    overfit_from: int | None  # its minimum, if it rises after that while the training loss falls on
    divergence_at: int | None  # where the training loss leaves its lowest for good
    plateau: bool  # the validation loss has settled
    advice: tuple[str, ...]


def clues(
    train_loss: Sequence[float], val_loss: Sequence[float], lr: Sequence[float] | None = None, *, tolerance: float = 0.03
) -> Clues:
    """Read training and validation loss, measured at the same points of a run (and the learning rate there, to name it).

    Args:
        tolerance: what counts as a change, as a share of the fall of the validation loss from its first value to its lowest.
    """
    train, val = np.asarray(train_loss, float), np.asarray(val_loss, float)
    if train.ndim != 1 or train.shape != val.shape or len(train) < 4 or (lr is not None and len(lr) != len(train)):
        raise BadInput(f"clues needs curves of one length, at least 4, not {train.shape} and {val.shape}")
    spoilt = ~(np.isfinite(train) & np.isfinite(val))
    at = int(np.argmax(spoilt)) if spoilt.any() else None
    train, val = train[:at], val[:at]
    if at is not None and at < 4:
        return Clues(False, None, at, False, ("the loss is not finite from the start: lower the learning rate",))
    low = int(train.argmin())
    if at is None and train[-1] - train[low] > 0.25 * max(train[0] - train[low], tolerance):
        at = low + 1
    calm, fall = _calm(val), max(val[0] - val.min(), 1e-12)
    best, end = int(calm.argmin()), max(len(calm) // 4, 2)
    rise, last = (calm[-1] - calm[best]) / fall, (calm[-end] - calm[-1]) / fall
    overfit = at is None and rise > tolerance and best < len(calm) - 1 and _calm(train)[-1] <= _calm(train)[best]
    underfit = at is None and not overfit and last > tolerance
    plateau = at is None and not overfit and abs(last) <= tolerance
    advice = []
    if at is not None:
        remedy = "lower the learning rate" if lr is None else f"keep the learning rate below {lr[at]:.3g}"
        advice.append(f"the training loss rises: {remedy}")
    if overfit:
        advice.append("the validation loss turns up: regularise more (a larger learning rate, weight decay, dropout)")
    if underfit:
        advice.append("the validation loss still falls: train longer, raise the learning rate, or regularise less")
    if plateau:
        advice.append("the validation loss has settled: the balance is right, or the rate may now fall")
    return Clues(bool(underfit), best if overfit else None, at, bool(plateau), tuple(advice))


def _calm(values: np.ndarray) -> np.ndarray:
    """Mean of three neighbours, of two at the ends."""
    padded = np.pad(values, 1, constant_values=np.nan)
    return np.nanmean([padded[:-2], padded[1:-1], padded[2:]], axis=0)


@dataclass(frozen=True)
class Recipe:
    """Settings that a search found: peak rate of the cycle, (high, low) momentum, weight decay."""

    max_lr: float
    momentum: tuple[float, float]
    weight_decay: float
    steps: int  # training steps that the search took
    trials: tuple[dict[str, Any], ...]  # one a short run: lr, momentum, weight_decay, loss on validation
    range_test: RangeTest | None
    make_optimizer: Callable[..., Optimizer]

    def optimizer(self, params: Any) -> Optimizer:
        """The optimizer of a model, of its parameters, or of parameter groups."""
        params = [p for p in params.parameters() if p.requires_grad] if isinstance(params, nn.Module) else params
        return self.make_optimizer(params, lr=self.max_lr, weight_decay=self.weight_decay)

    def schedule(self, optimizer: Optimizer, steps: int) -> OneCycle:
        """The cycle of a run of so many steps."""
        return OneCycle(optimizer, None, steps, momentum=self.momentum)

    def learner(self, steps: int, **settings: Any) -> Backprop:
        """A learner of both; ``settings`` go to :class:`~neurarium.learn.fit.Backprop`."""
        return Backprop(optimizer=self.optimizer, schedule=partial(self.schedule, steps=steps), **settings)


def balance_search(
    make_model: Callable[[], nn.Module],
    loader: Loader,
    val: Loader,
    *,
    steps: int = 100,
    lrs: str | Sequence[float] = "range",
    momenta: Sequence[float] = (0.99, 0.97, 0.95, 0.9),
    decays: Sequence[float] = (1e-3, 1e-4, 1e-5, 0.0),
    cyclical: tuple[float, float] | None = (0.95, 0.85),
    optimizer: Callable[..., Optimizer] = SGD,
    loss: str | Loss = "cross_entropy",
    range_steps: int = 100,
    groups: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
) -> Recipe:
    """Follow the recipe with short runs of ``steps`` steps each.

    Args:
        make_model: a new model; it is made under ``seed``, so that all runs begin alike.
        val: decides. Not the test set.
        lrs: ``"range"``: the peak comes from a range test at the first of ``cyclical`` momenta; otherwise peaks to try.
        momenta: constant momenta to try.
        cyclical: (high, low) momentum cycled against the rate, tried as well.
        optimizer: called with parameters, ``lr`` and ``weight_decay``.
        groups: makes parameter groups of a model, e.g. ``matrix_groups``.
    """
    if steps < 4 or not decays or not (momenta or cyclical) or not len(lrs):
        raise BadInput("balance_search needs steps >= 4, and at least one rate, one momentum and one decay to try")
    bounds = [(m, m) for m in momenta] + ([cyclical] if cyclical else [])
    start, trials, spent, test = cyclical or bounds[0], [], 0, None

    def model() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return make_model()

    def attempt(lr: float, momentum: tuple[float, float], decay: float) -> float:
        candidate = Recipe(lr, momentum, decay, 0, (), None, optimizer)
        net = model()
        try:
            candidate.learner(steps, loss=loss, groups=groups).fit(net, First(loader, steps), epochs=1, seed=seed)
            found = evaluate(net, val, loss=loss)["loss"]
        except Diverged:
            found = math.inf
        found = found if math.isfinite(found) else math.inf
        trials.append({"lr": lr, "momentum": momentum, "weight_decay": decay, "loss": found})
        return found

    middle = sorted(decays)[len(decays) // 2]
    if isinstance(lrs, str):
        if lrs != "range":
            raise BadInput(f"lrs must be 'range' or rates to try, not {lrs!r}")

        def swept(params: Any) -> Optimizer:
            made = optimizer(params, lr=1.0, weight_decay=middle)
            OneCycle(made, None, 1, momentum=(start[0], start[0]))  # sets the momentum alone: the test sets the rate
            return made

        net = model()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            test = lr_range_test(net, loss, loader, swept, steps=range_steps, groups=groups)
        peak, spent = test.suggestion, len(test.lrs)
    else:
        peak = min(lrs, key=lambda lr: attempt(lr, start, middle))
    # Constant momentum m moves weights by lr/(1 - m) a step; at the top of a cycle the momentum is the low one.
    scaled = {m: peak * (1 - m[0]) / (1 - start[0]) for m in bounds}
    losses = {m: attempt(scaled[m], m, middle) for m in bounds}
    momentum = min(losses, key=lambda m: losses[m])
    known = {middle: losses[momentum]}
    known |= {d: attempt(scaled[momentum], momentum, d) for d in decays if d != middle}
    decay = min(known, key=lambda d: known[d])
    if not math.isfinite(known[decay]):
        raise BadInput("balance_search: every short run diverged; give smaller rates in lrs")
    return Recipe(scaled[momentum], momentum, decay, spent + steps * len(trials), tuple(trials), test, optimizer)


class First:
    """The first ``steps`` batches of as many passes as it takes, as one epoch."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        left, epoch = self.steps, 0
        while left:
            before = left
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(epoch)
            for batch in self.loader:
                yield batch
                left -= 1
                if not left:
                    return
            if left == before:
                raise BadInput("the loader yielded no samples")
            epoch += 1
