"""Time series: measured ones, and the ARMA process."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neurarium.data.files import read_text
from neurarium.data.registry import fetch, find
from neurarium.errors import BadInput

__all__ = ["SeriesTask", "arma", "series"]


@dataclass(frozen=True, eq=False)
class SeriesTask:
    """``values`` (time, features) in time order, in the units of the source; ``borders`` ends the customary train and validation parts."""

    name: str
    values: Tensor
    columns: tuple[str, ...]
    frequency: str  # pandas' letter: "h" hourly
    start: str  # time stamp of the first row
    borders: tuple[int, int]
    note: str = ""

    def column(self, name: str) -> Tensor:
        """One feature (time,)."""
        if name not in self.columns:
            raise BadInput(f"{self.name} has no column {name!r}; it has {', '.join(self.columns)}")
        return self.values[:, self.columns.index(name)]


def series(name: str, *, dtype: torch.dtype = torch.float64) -> SeriesTask:
    """``etth1`` or ``etth2``: six loads (HUFL ... LULL) and the oil temperature OT of a power transformer, hourly, 17,420 rows.

    The customary split is 12, 4 and 4 months of 30 days: ``borders`` is (8640, 11520) and the test part ends at row 14400.
    """
    source = find(name, "series")
    (path,) = fetch(source)
    header, *rows = csv.reader(read_text(path).splitlines())
    try:
        values = np.array([[float(v) for v in row[1:]] for row in rows])
    except ValueError as error:
        raise BadInput(f"{path.name}: {error}") from error
    if values.ndim != 2 or values.shape[1] != len(header) - 1:
        raise BadInput(f"{path.name}: rows do not fit the header {header}")
    if not np.isfinite(values).all():
        raise BadInput(f"{path.name}: row {int(np.flatnonzero(~np.isfinite(values).all(1))[0])} holds a NaN or an infinity")
    return SeriesTask(name, torch.from_numpy(values).to(dtype), tuple(header[1:]), "h", rows[0][0], (8640, 11520), source.note)


def arma(ar: Sequence[float], ma: Sequence[float], n: int, *, noise: float = 1.0, seed: int = 0) -> Tensor:
    """``n`` steps of a stationary ARMA process, float64 (n,): ``y_t = sum_i ar_i y_{t-i} + e_t + sum_j ma_j e_{t-j}``, lag 1 first.

    The innovations e are normal with deviation ``noise``. A burn-in that lets the slowest mode decay to 1e-8 of itself (at least
    100 steps) is dropped, so that the first value is already drawn from the stationary law. :class:`BadInput` where the
    autoregressive part is not stationary (a root of its polynomial on or inside the unit circle).
    """
    from scipy.signal import lfilter

    a, m = np.asarray(ar, float).ravel(), np.asarray(ma, float).ravel()
    if n < 1 or not noise >= 0.0 or not np.isfinite([*a, *m, noise]).all():
        raise BadInput(f"arma needs n >= 1, finite coefficients and noise >= 0; got n={n}, ar={list(a)}, ma={list(m)}, noise={noise}")
    modulus = float(np.abs(np.roots([1.0, *-a])).max(initial=0.0)) if a.any() else 0.0
    if modulus >= 1.0 - 1e-9:
        raise BadInput(f"ar={list(a)} is not stationary: its slowest mode has modulus {modulus:.6g}, which must be below 1")
    burn = len(m) + 100 + (int(np.ceil(np.log(1e-8) / np.log(modulus))) if modulus > 0.0 else 0)
    if burn > 10_000_000:
        raise BadInput(f"ar={list(a)} is so close to a unit root (modulus {modulus:.9g}) that it would need a burn-in of {burn} steps")
    shocks = np.random.default_rng(seed).normal(0.0, noise, n + burn)
    return torch.from_numpy(np.ascontiguousarray(lfilter([1.0, *m], [1.0, *-a], shocks)[burn:]))
