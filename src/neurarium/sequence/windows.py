"""Windows of a time series as a data set, and a scaler that sees the training range alone.

The usual leak of forecasting experiments is a random split: overlapping windows put nearly the same numbers on both sides. Here
:meth:`Windows.split` cuts the *series*, so that no window straddles a border; a random split has to be asked for by the name of its fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neurarium.data import Batches, TensorData
from neurarium.errors import BadInput

__all__ = ["Scaler", "Windows"]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """All windows of a series: ``lags`` values as input, the next ``horizon`` as target, a new window every ``stride`` steps.

    ``series`` is (time,) or (time, features); ``x`` is then (n, lags) or (n, lags, features), oldest value first, ``y`` (n, horizon) or
    (n, horizon, features). Both are views: windows take no memory of their own.

    Raises ``BadInput`` for a series that is too short for one window, or holds a NaN or an infinity.
    """

    def __init__(self, series: Tensor, lags: int, horizon: int = 1, *, stride: int = 1) -> None:
        if series.dim() not in (1, 2):
            raise BadInput(f"a series is (time,) or (time, features), not {tuple(series.shape)}")
        if min(lags, horizon, stride) < 1:
            raise BadInput(f"lags, horizon and stride are at least 1, got {lags}, {horizon}, {stride}")
        if len(series) < lags + horizon:
            raise BadInput(f"{len(series)} time steps hold no window of {lags} lags and {horizon} targets")
        if not torch.isfinite(series).all():
            raise BadInput(f"the series holds a NaN or an infinity, first at step {int((~torch.isfinite(series)).nonzero()[0, 0])}")
        self.series, self.lags, self.horizon, self.stride = series, lags, horizon, stride
        whole = series.unfold(0, lags + horizon, stride)  # (n, [features,] time)
        whole = whole if series.dim() == 1 else whole.transpose(1, 2)
        self.x, self.y = whole[:, :lags], whole[:, lags:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def batches(self, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> Batches:
        """A re-iterable of ``(x, y)`` batches for any learner."""
        return TensorData(self.x, self.y).batches(batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)

    def split(
        self, fractions: Sequence[float], *, how: Literal["time", "random"] = "time", allow_leak: bool = False, seed: int = 0
    ) -> tuple[Windows, ...] | tuple[TensorData, ...]:
        """Consecutive parts of the series, in time order; windows across a border are dropped.

        ``how="random"`` deals the windows out at random, to show what leakage does: neighbours share all values but one, so the
        test error is no test. It needs ``allow_leak=True`` and returns plain ``TensorData``.
        """
        if any(f <= 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
            raise BadInput(f"fractions are positive and add up to 1, got {tuple(fractions)}")
        if how not in ("time", "random"):
            raise BadInput(f"how is 'time' or 'random', not {how!r}")
        if how == "random" and not allow_leak:
            raise BadInput("a random split of overlapping windows leaks: split by time, or pass allow_leak=True")
        n = len(self.series) if how == "time" else len(self)
        ends = [round(n * sum(fractions[: i + 1])) for i in range(len(fractions))]
        spans = list(zip([0, *ends], ends))
        if how == "time":
            return tuple(Windows(self.series[a:b], self.lags, self.horizon, stride=self.stride) for a, b in spans)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return tuple(TensorData(self.x[order[a:b]], self.y[order[a:b]]) for a, b in spans)


class Scaler:
    """Zero mean and unit deviation, feature by feature, by what :meth:`fit` saw; a constant feature keeps its scale.

    Fit it on the training range: ``scaler = Scaler().fit(series[:border])``.
    """

    def fit(self, series: Tensor) -> Scaler:
        """Take mean and deviation of (time,) or (time, features)."""
        if len(series) < 2:
            raise BadInput(f"a scaler needs at least two time steps, got {len(series)}")
        self.mean = series.mean(0)
        deviation = series.std(0, correction=0)
        self.scale = torch.where(deviation > 1e-12 * self.mean.abs().clamp_min(1e-300), deviation, torch.ones_like(deviation))
        return self

    def transform(self, series: Tensor) -> Tensor:
        return (series - self.mean) / self.scale

    def inverse(self, series: Tensor) -> Tensor:
        return series * self.scale + self.mean
