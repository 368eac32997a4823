"""What an arm may log, brought into plain Python values that fit into a record.

A metric is a number or a short list of numbers; a curve is two lists, thinned to at most 400 points; a grid is a small picture.
NaN and infinities are measurements like any other (a diverged run *is* a result): they are kept, and judged as failing.

Grids are stored as one byte a cell between their lowest and highest value (255 marks a cell that is not finite): a picture needs no
more, and thirty of them fit into a record.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias

import numpy as np

from neurarium.errors import BadInput

__all__ = ["MAX_GRID", "MAX_LIST", "MAX_POINTS", "Curve", "Grid", "Value", "as_curve", "as_value"]

Value: TypeAlias = "bool | int | float | list[float]"
Curve: TypeAlias = "tuple[list[float], list[float]]"

MAX_LIST = 1000  # numbers in a metric that is a list
MAX_POINTS = 400  # of a curve
MAX_GRID = 96  # cells a side
_MISSING = 255  # the code of a cell that is not finite


def as_value(value: Any, what: str) -> Value:
    """A bool, an int, a float or a list of floats from what was logged; arrays and tensors of no or one dimension are welcome."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bool | float):
        return value
    if isinstance(value, list | tuple):
        return _floats(value, what, MAX_LIST)
    if isinstance(value, SupportsIndex):
        number = value.__index__()
        if abs(number) >= 2**63:
            raise BadInput(f"{what} is an integer beyond 64 bits; log it as a float")
        return number
    raise BadInput(f"{what} must be a number or a list of numbers, is {type(value).__name__}")


def as_curve(x: Any, y: Any, what: str) -> Curve:
    """Two lists of one length, thinned evenly to at most 400 points (ends kept) and rounded to six significant digits."""
    ys = _floats(_listed(y), f"{what}: y", 10_000_000)
    xs = [float(i) for i in range(len(ys))] if x is None else _floats(_listed(x), f"{what}: x", 10_000_000)
    if len(xs) != len(ys):
        raise BadInput(f"{what}: x has {len(xs)} points, y has {len(ys)}")
    if not xs:
        raise BadInput(f"{what} is empty")
    if len(xs) > MAX_POINTS:
        keep = np.linspace(0, len(xs) - 1, MAX_POINTS).round().astype(int)
        xs, ys = [xs[i] for i in keep], [ys[i] for i in keep]
    return [significant(v) for v in xs], [significant(v) for v in ys]


@dataclass(frozen=True)
class Grid:
    """A picture of at most 96 x 96 cells, one byte each between ``low`` and ``high``."""

    rows: int
    columns: int
    low: float
    high: float
    cells: str  # base64 of rows * columns bytes

    @classmethod
    def of(cls, values: Any, what: str) -> Grid:
        """From a 2-D array; a larger one is averaged over blocks."""
        try:
            array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{what} must be a 2-D array of numbers: {error}") from None
        if array.ndim != 2 or array.size == 0:
            raise BadInput(f"{what} must be a 2-D array with at least one cell, has shape {array.shape}")
        for axis in (0, 1):
            array = _shrink(array, axis)
        finite = np.isfinite(array)
        low = significant(float(array[finite].min())) if finite.any() else 0.0
        high = significant(float(array[finite].max())) if finite.any() else 0.0
        span = high - low if high > low else 1.0
        codes = np.full(array.shape, _MISSING, dtype=np.uint8)
        codes[finite] = np.clip(np.round((array[finite] - low) / span * (_MISSING - 1)), 0, _MISSING - 1).astype(np.uint8)
        return cls(array.shape[0], array.shape[1], low, high, base64.b64encode(codes.tobytes()).decode("ascii"))

    def array(self) -> np.ndarray:
        """The picture, (rows, columns) float64; NaN where it was not finite."""
        codes = np.frombuffer(self.codes(), dtype=np.uint8).reshape(self.rows, self.columns)
        values = self.low + codes.astype(np.float64) * ((self.high - self.low) / (_MISSING - 1))
        return np.where(codes == _MISSING, np.nan, values)

    def codes(self) -> bytes:
        """The bytes of the cells; :class:`~neurarium.errors.BadInput` if they are not what the shape promises."""
        try:
            data = base64.b64decode(self.cells, validate=True)
        except (binascii.Error, ValueError):
            raise BadInput("cells are not base64") from None
        if len(data) != self.rows * self.columns:
            raise BadInput(f"{len(data)} cells do not make {self.rows} x {self.columns}")
        return data


def significant(value: float, digits: int = 6) -> float:
    """A float rounded to so many significant digits."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def _listed(values: Any) -> Any:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _floats(values: Sequence[Any], what: str, limit: int) -> list[float]:
    if not isinstance(values, list | tuple):
        raise BadInput(f"{what} must be a list of numbers, is {type(values).__name__}")
    if len(values) > limit:
        raise BadInput(f"{what} holds {len(values):,} numbers, at most {limit:,}; a curve is thinned, a metric is not")
    out = []
    for i, item in enumerate(values):
        number = as_value(item, f"{what}[{i}]")
        if isinstance(number, list):
            raise BadInput(f"{what} must have one dimension, is nested")
        out.append(float(number))
    return out


def _shrink(array: np.ndarray, axis: int) -> np.ndarray:
    size = array.shape[axis]
    if size <= MAX_GRID:
        return array
    starts = (np.arange(MAX_GRID) * size) // MAX_GRID
    counts = np.diff(np.append(starts, size)).reshape((-1, 1) if axis == 0 else (1, -1))
    mean: np.ndarray = np.add.reduceat(array, starts, axis=axis) / counts
    return mean
