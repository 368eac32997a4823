"""DynST: train a forecaster and find out which of its sensors it can do without.

It is the input that is pruned here, not the weights. During training the least useful sensors (cells of a grid, nodes) are switched off
round by round and a few come back, so that training ends with one layout of sensors and a forecaster that is used to it. All regions are
still predicted and judged, those without a sensor included.

*Equations.* One mask m in {0, 1} over the sensors multiplies all times and channels of the input, x' = m x + (1 - m) fill (a mask a time
step would have a sensor exist now and then). Behind it stand scores M, ``init`` at first, which learn by the gradient that passes straight
through the mask: with g = sum over times and channels of x dL/dx', of each row, M <- M - ``rate`` mean(g).

- *usefulness* of a sensor that is on: mean over rows of |M g|, ``"magnitude_gradient"``; of |g|, ``"gradient"``; |M|, ``"magnitude"``.
- *promise* of one that is off: |mean over rows of g|, with the x that it would have sent.
- *density* after round r of R: d_r = d + (1 - d)(1 - r/R)^3, d = 1 - sparsity. A round comes every ``prune_every`` epochs: with ``net``
  sensors to go, the net + b least useful go and the b most promising of those that were off come back, b = regrow (net + b) but at most
  half of those then on.

After round R the layout stays. Give at least 1.25 R ``prune_every`` epochs, so that the last fifth of the training is on the final layout.

*Source.* Wu et al., "DynST: Dynamic Sparse Training for Resource-Constrained Spatio-Temporal Forecasting", arXiv 2403.02914: pruning of
sensors during training, the merge of time into one mask, dropping and growing back.

*Departures.* The formulas above are reconstructed. Usefulness and promise are means over all batches since the last round, both of rows:
a batch's mean of g vanishes where the forecaster is trained. Missing sensors read a constant, not a learned one.

*Cost.* One gradient with respect to the input a step. What leaving out sensors saves is the sensors; a convolution over a grid with holes
does the same work.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import ADAMW, Learner, Loss, call, device_of, evaluate, find_loss, loop, trainable
from neurarium.roles import History, Loader

__all__ = ["DynST", "SensorHistory", "SensorMask", "apply_mask", "density"]

Score = Literal["magnitude_gradient", "gradient", "magnitude"]


@dataclass(frozen=True)
class SensorHistory(History):
    """A history with the layout at its end: ``mask`` (H, W) or (sensors,), True where a sensor is on. ``extra["active"]``: by epoch."""

    mask: Tensor | None = None


class SensorMask(nn.Module):
    """Reads the sensors that ``mask`` names and ``fill`` elsewhere, whatever the others send (NaN too).

    Args:
        mask: bool, over the axes ``axis`` of the input.
        axis: where the sensors are; negative numbers count from the end.
        fill: what a missing sensor reads.
    """

    def __init__(self, mask: Tensor, axis: int | Sequence[int] = (-2, -1), fill: float = 0.0) -> None:
        super().__init__()
        self.axis, self.fill = _axes(axis), float(fill)
        if mask.dtype != torch.bool or mask.ndim != len(self.axis):
            raise BadInput(f"mask must be bool over the {len(self.axis)} axes {self.axis}; got {mask.dtype} of shape {tuple(mask.shape)}")
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(_spread(self.mask, x, self.axis), x, self.fill)

    def extra_repr(self) -> str:
        return f"{tuple(self.mask.shape)}, axis={self.axis}, fill={self.fill:g}"


def apply_mask(model: nn.Module, mask: Tensor, *, axis: int | Sequence[int] = (-2, -1), fill: float = 0.0) -> nn.Sequential:
    """A copy of ``model`` that reads the sensors of ``mask`` alone, for deployment."""
    return nn.Sequential(SensorMask(mask, axis, fill).to(device_of(model)), copy.deepcopy(model)).train(model.training)


def density(round: int, rounds: int, sparsity: float) -> float:
    """d_r: the share of sensors on after a round; 1 at round 0, 1 - sparsity from round ``rounds`` on."""
    return 1 - sparsity + sparsity * (1 - min(round, rounds) / rounds) ** 3


@dataclass(frozen=True)
class DynST(Learner):
    """Backpropagation during which sensors are switched off; ``fit`` returns a :class:`SensorHistory`.

    Args:
        sparsity: share of the sensors that are off in the end.
        rounds, prune_every: how often some go, and after how many epochs each time.
        regrow: share of a round's dropped sensors that others, which were off, make up for.
        score: what makes a sensor useful; see the module.
        init, rate: scores at first and again for a sensor that comes back, and their rate.
        axis: where the sensors are in x: (-2, -1) for grids, -1 or -2 for nodes.
        fill: what a missing sensor reads.
        loss, optimizer, schedule, clip: as for :class:`~neurarium.learn.fit.Backprop`.

    The model is any forecaster of one floating-point tensor x. It is trained in place and left without a mask: see :func:`apply_mask`.
    """

    sparsity: float = 0.5
    rounds: int = 5
    prune_every: int = 1
    regrow: float = 0.3
    score: Score = "magnitude_gradient"
    init: float = 1.0
    rate: float = 0.01
    axis: int | Sequence[int] = (-2, -1)
    fill: float = 0.0
    loss: str | Loss = "mse"
    optimizer: Callable[..., Optimizer] = ADAMW
    schedule: Callable[[Optimizer], Any] | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.sparsity < 1 and 0 <= self.regrow < 1):
            raise BadInput(f"sparsity and regrow are shares from 0 to below 1; got {self.sparsity} and {self.regrow}")
        if self.rounds < 1 or self.prune_every < 1:
            raise BadInput(f"rounds and prune_every must be at least 1; got {self.rounds} and {self.prune_every}")
        if self.score not in get_args(Score):
            raise BadInput(f"score must be one of {', '.join(get_args(Score))}, not {self.score!r}")
        if not (math.isfinite(self.init) and self.init != 0 and math.isfinite(self.fill) and 0 <= self.rate < math.inf):
            raise BadInput(f"init must be finite and not 0, fill finite, rate at least 0; got {self.init}, {self.fill}, {self.rate}")
        _axes(self.axis)

    def fit(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        epochs: int,
        val: Loader | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        callbacks: Sequence[Callable[[Any], bool | None]] = (),
        resume: Mapping[str, Any] | None = None,
    ) -> SensorHistory:
        if device is not None:
            model.to(device)
        parameters = trainable(model)
        optimizer = self.optimizer(parameters)
        schedule = None if self.schedule is None else self.schedule(optimizer)
        sensors, criterion, name = _Sensors(self), find_loss(self.loss), type(model).__name__

        def step(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            seen = sensors.read(x).requires_grad_()
            output = call(model, seen)
            loss = criterion(output, y)
            loss.backward()
            if seen.grad is None:
                raise UnsupportedModel("has an output that does not depend on its input by any gradient", module=name)
            if torch.isfinite(loss.detach()):
                sensors.learn(x, seen.grad)
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, self.clip)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            return loss, output

        def measured(batches: Loader) -> Mapping[str, float]:
            return evaluate(nn.Sequential(SensorMask(sensors.mask, self.axis, self.fill), model), batches, loss=self.loss)

        def ended(progress: Any) -> None:
            sensors.end_epoch(progress.epoch + 1)

        history = loop(
            model, loader, epochs=epochs, step=step, parts={"optimizer": optimizer, "schedule": schedule, "sensors": sensors}, val=val,
            evaluator=measured, forward=lambda x: model(sensors.read(x)), seed=seed, callbacks=[ended, *callbacks], resume=resume,
        )  # fmt: skip
        extra = {**history.extra, "active": tuple(sensors.active)}
        parts = {f: getattr(history, f) for f in ("train", "val", "steps", "state")}
        return SensorHistory(**parts, extra=extra, mask=None if sensors.mask is None else sensors.mask.clone())


class _Sensors:
    """The layout during training, and what has been learned about each sensor since the last round. Shaped by the first batch."""

    def __init__(self, settings: DynST) -> None:
        self.settings, self.axis = settings, _axes(settings.axis)
        self.mask: Tensor | None = None  # bool
        self.weight: Tensor | None = None  # M
        self.useful: Tensor | None = None  # sum over rows of |g| or |M g|
        self.promise: Tensor | None = None  # sum over rows of g
        self.active: list[int] = []  # sensors on during each epoch

    def read(self, x: Any) -> Tensor:
        """x as the sensors that are on see it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise BadInput("DynST switches off sensors of one floating-point tensor x")
        if self.mask is None:
            shape = _shape(x, self.axis)
            if round((1 - self.settings.sparsity) * math.prod(shape)) < 1:
                raise BadInput(f"sparsity {self.settings.sparsity} leaves none of {math.prod(shape)} sensors on")
            self.mask = torch.ones(shape, dtype=torch.bool, device=x.device)
            self.weight = torch.full(shape, self.settings.init, dtype=x.dtype, device=x.device)
            self._forget()
        return torch.where(_spread(self.mask, x, self.axis), x, self.settings.fill).detach()

    def learn(self, x: Tensor, gradient: Tensor) -> None:
        """Take in one batch: its input, and the gradient of the mean loss with respect to what was read."""
        assert self.mask is not None and self.weight is not None and self.useful is not None and self.promise is not None
        rest = [i for i in range(1, x.ndim) if i - x.ndim not in self._from_end(x)]
        g = torch.where(torch.isfinite(x), (x - self.settings.fill) * gradient, 0) * len(x)  # m + dm adds dm (x - fill)
        g = g.sum(rest) if rest else g  # (n, *sensors)
        size = (self.weight * g).abs() if self.settings.score == "magnitude_gradient" else g.abs()
        self.useful += size.sum(0)
        self.promise += g.sum(0)
        self.weight -= self.settings.rate * g.mean(0)

    def end_epoch(self, epoch: int) -> None:
        """Count the sensors; change the layout if a round is due."""
        if self.mask is None:
            return
        self.active.append(int(self.mask.sum()))
        at, due = divmod(epoch, self.settings.prune_every)
        if due == 0:
            if at <= self.settings.rounds:
                self._round(at)
            self._forget()

    def _round(self, at: int) -> None:
        assert self.mask is not None and self.weight is not None and self.useful is not None and self.promise is not None
        on, off = self.mask.flatten().nonzero().squeeze(1), (~self.mask).flatten().nonzero().squeeze(1)
        stay = round(density(at, self.settings.rounds, self.settings.sparsity) * self.mask.numel())
        net = len(on) - stay
        if net <= 0:
            return
        back = min(round(self.settings.regrow * net / (1 - self.settings.regrow)), len(off), stay // 2)
        useful = self.weight.abs() if self.settings.score == "magnitude" else self.useful
        gone = on[useful.flatten()[on].argsort(stable=True)[: net + back]]
        again = off[self.promise.abs().flatten()[off].argsort(stable=True, descending=True)[:back]]
        mask, weight = self.mask.flatten(), self.weight.flatten()
        mask[gone], mask[again], weight[again] = False, True, self.settings.init
        self.mask, self.weight = mask.view_as(self.mask), weight.view_as(self.weight)

    def _forget(self) -> None:
        assert self.weight is not None
        self.useful, self.promise = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def _from_end(self, x: Tensor) -> set[int]:
        return {a if a < 0 else a - x.ndim for a in self.axis}

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("mask", "weight", "useful", "promise", "active")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, list(value) if key == "active" else value)


def _axes(axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or len(set(axes)) < len(axes) or 0 in axes or any(b <= a for a, b in pairwise(axes)):
        raise BadInput(f"axis names the axes of the sensors in rising order, never the batch's axis 0; got {axis}")
    return axes


def _shape(x: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    if any(not -x.ndim < a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) < len(axes):
        raise BadInput(f"x of shape {tuple(x.shape)} has no sensors on the axes {axes}")
    return tuple(x.shape[a] for a in axes)


def _spread(mask: Tensor, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mask in a shape that broadcasts over x."""
    if _shape(x, axes) != tuple(mask.shape):
        raise BadInput(f"x of shape {tuple(x.shape)} has {_shape(x, axes)} sensors on the axes {axes}, the mask {tuple(mask.shape)}")
    shape = [1] * x.ndim
    for a in axes:
        shape[a] = x.shape[a]
    return mask.to(x.device).view(shape)
