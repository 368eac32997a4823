"""A record as a figure or a table reads it: arrays by arm and metric, one row a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from neurarium.errors import BadInput
from neurarium.lab.record import ArmRun, Record

__all__ = ["RecordView"]


class RecordView:
    """What ``figure(record, fig)`` of an experiment is given. An arm that crashed at a seed reads as NaN there."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.id, self.scale, self.device = record.id, record.scale, record.device

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in the order of the experiment."""
        return self.record.arms

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, one row each of what :meth:`values` returns."""
        return tuple(seed.seed for seed in self.record.seeds)

    def metrics(self, arm: str) -> tuple[str, ...]:
        """Names of what an arm logged at some seed."""
        return tuple(dict.fromkeys(name for run in self._done(arm).values() for name in run.metrics))

    def has(self, arm: str, metric: str) -> bool:
        """Whether an arm is there and logged this metric at some seed."""
        return arm in self.arms and metric in self.metrics(arm)

    def values(self, arm: str, metric: str) -> np.ndarray:
        """(seeds,) of a number, (seeds, k) of a list; shorter lists are filled with NaN."""
        done = self._done(arm)
        if metric not in self.metrics(arm):
            raise BadInput(f"arm {arm!r} has no metric {metric!r}; it logged {', '.join(self.metrics(arm)) or 'nothing'}")
        found = [run.metrics.get(metric) if run else None for run in (done.get(seed) for seed in self.seeds)]
        width = max((len(v) for v in found if isinstance(v, list)), default=None)
        out = np.full((len(found),) if width is None else (len(found), width), np.nan)
        for i, value in enumerate(found):
            if isinstance(value, list):
                out[i, : len(value)] = value
            elif value is not None:
                out[i] = value
        return out

    def mean(self, arm: str, metric: str) -> Any:
        """The mean over the seeds at which the arm ran: a float, or (k,) of a list."""
        values = self.values(arm, metric)
        ran = np.array([seed in self._done(arm) for seed in self.seeds])
        mean = values[ran].mean(axis=0)
        return float(mean) if mean.ndim == 0 else mean

    def curves(self, arm: str, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(x, y) of each seed that has the curve."""
        found = [run.curves[name] for run in self._done(arm).values() if name in run.curves]
        if not found:
            self._absent(arm, "curve", name, {k for run in self._done(arm).values() for k in run.curves})
        return [(np.asarray(x), np.asarray(y)) for x, y in found]

    def grids(self, arm: str, name: str) -> list[np.ndarray]:
        """The picture of each seed that has it, (rows, columns)."""
        found = [run.grids[name] for run in self._done(arm).values() if name in run.grids]
        if not found:
            self._absent(arm, "grid", name, {k for run in self._done(arm).values() for k in run.grids})
        return [grid.array() for grid in found]

    def _done(self, arm: str) -> Mapping[int, ArmRun]:
        if arm not in self.arms:
            raise BadInput(f"record {self.id!r} has no arm {arm!r}; it has {', '.join(self.arms) or 'none'}")
        runs = ((seed, self.record.run(seed, arm)) for seed in self.seeds)
        return {seed: run for seed, run in runs if run is not None and run.status == "done"}

    def _absent(self, arm: str, kind: str, name: str, known: set[str]) -> None:
        raise BadInput(f"arm {arm!r} has no {kind} {name!r}; it has {', '.join(sorted(known)) or 'none'}")
