"""How good a forecast is: errors in common units, the naive rival, and whether a difference between two forecasters is noise.

*Source*: Hyndman and Koehler, "Another look at measures of forecast accuracy" (2006) for MASE and sMAPE; Diebold and Mariano, "Comparing
predictive accuracy" (1995), with the small-sample correction of Harvey, Leybourne and Newbold (1997).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["DieboldMariano", "diebold_mariano", "directional_accuracy", "mae", "mase", "rmse", "seasonal_naive", "smape"]


def mae(truth: Tensor, forecast: Tensor) -> float:
    """Mean absolute error, in the units of the series."""
    return _errors(truth, forecast).abs().mean().item()


def rmse(truth: Tensor, forecast: Tensor) -> float:
    """Root of the mean squared error, in the units of the series."""
    return _errors(truth, forecast).square().mean().sqrt().item()


def smape(truth: Tensor, forecast: Tensor) -> float:
    """Symmetric mean absolute percentage error: mean of ``200 |e| / (|truth| + |forecast|)``, between 0 and 200; 0 where both are 0."""
    error, size = _errors(truth, forecast).abs(), truth.abs() + forecast.abs()
    return (200 * torch.where(size > 0, error / size.clamp_min(torch.finfo(size.dtype).tiny), 0)).mean().item()


def mase(truth: Tensor, forecast: Tensor, train: Tensor, season: int = 1) -> float:
    """Mean absolute error in units of the (seasonal) naive forecast's one-step error on the training series ``train`` (time,)."""
    if not 1 <= season < len(train):
        raise BadInput(f"a season of {season} needs a training series that is longer, got {len(train)} steps")
    naive = (train[season:] - train[:-season]).abs().mean().item()
    if naive == 0:
        raise BadInput(f"the training series repeats every {season} steps exactly, which leaves no unit for the error")
    return mae(truth, forecast) / naive


def directional_accuracy(truth: Tensor, forecast: Tensor, last: Tensor) -> float:
    """Share of the steps at which the forecast moves from ``last``, the last known value, in the direction of the truth.

    ``last`` broadcasts to the forecasts: (n, 1) for (n, horizon). Steps at which the truth does not move are left out.
    """
    _errors(truth, forecast)
    try:
        last = last.expand_as(truth)
    except RuntimeError:
        raise BadInput(f"the last values {tuple(last.shape)} do not broadcast to the forecasts {tuple(truth.shape)}") from None
    if not all(torch.isfinite(t).all() for t in (truth, forecast, last)):
        raise BadInput("truth, forecast and last values must be finite")
    move = (truth - last).sign()
    if not move.any():
        raise BadInput("the truth never moves: there is no direction to forecast")
    return ((forecast - last).sign() == move)[move != 0].double().mean().item()


def seasonal_naive(history: Tensor, steps: int, season: int = 1) -> Tensor:
    """Repeat the last season: (..., time) -> (..., steps). ``season=1`` repeats the last value."""
    if not 1 <= season <= history.shape[-1]:
        raise BadInput(f"a season of {season} needs as many steps of history, got {history.shape[-1]}")
    return history[..., history.shape[-1] - season + torch.arange(steps, device=history.device) % season]


@dataclass(frozen=True)
class DieboldMariano:
    """``statistic`` < 0: the first forecaster's loss is smaller. ``p_value``: two-sided, of equal expected losses."""

    statistic: float
    p_value: float


def diebold_mariano(first: Tensor, second: Tensor, *, horizon: int = 1, power: float = 2.0) -> DieboldMariano:
    """Test whether two forecasters of one series have the same expected loss ``|error|^power``.

    ``first`` and ``second`` are the errors at consecutive times, (time,) or (time, horizon) with the loss averaged over the steps ahead.
    Errors of ``horizon`` steps ahead overlap: their first ``horizon - 1`` autocovariances enter the variance.
    """
    from scipy.stats import t as student

    if first.shape != second.shape or first.dim() not in (1, 2):
        raise BadInput(f"errors are (time,) or (time, horizon), both of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    n = len(first)
    if not 1 <= horizon < n:
        raise BadInput(f"{n} forecasts are too few for a horizon of {horizon}")
    gap = first.double().abs() ** power - second.double().abs() ** power
    gap = gap.mean(1) if gap.dim() == 2 else gap
    mean, centred = gap.mean().item(), gap - gap.mean()
    variance = sum((1 if k == 0 else 2) * (centred[k:] @ centred[: n - k]).item() / n for k in range(horizon))
    if variance <= 0:
        if mean == 0:
            return DieboldMariano(0.0, 1.0)
        variance = (centred @ centred).item() / n  # the truncated sum need not be positive; without its tail it is
    if variance == 0:
        return DieboldMariano(math.copysign(math.inf, mean), 0.0)
    correction = math.sqrt((n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n)
    statistic = correction * mean / math.sqrt(variance / n)
    return DieboldMariano(statistic, 2 * float(student.sf(abs(statistic), n - 1)))


def _errors(truth: Tensor, forecast: Tensor) -> Tensor:
    if truth.shape != forecast.shape or truth.numel() == 0:
        raise BadInput(f"truth and forecast have one shape and are not empty, got {tuple(truth.shape)} and {tuple(forecast.shape)}")
    return (truth - forecast).double()
