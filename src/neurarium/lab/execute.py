"""Runs one unit of work: one experiment at one seed. This is what an engine has a process do.

An exception in an arm's body is recorded with its traceback as that arm's result, and ``run(trial)`` is called again for the arms that
are left. An exception outside every arm ends the seed. Every finished arm is told at once, so that whoever listens can write it down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from neurarium.errors import BadInput
from neurarium.lab import tracebacks
from neurarium.lab.machine import machine
from neurarium.lab.record import ArmRun, SeedRun
from neurarium.lab.seeding import preserved, torch_is_loaded
from neurarium.lab.trial import Trial

__all__ = ["Event", "Unit", "execute"]


@dataclass(frozen=True)
class Unit:
    """One experiment at one seed: all that a process needs to know, in plain values."""

    key: str  # the run that it belongs to
    experiment: str  # module with run(trial)
    seed: int
    scale: str
    device: str = "cpu"
    threads: int = 1  # of torch
    exclusive: bool = False  # seconds are measured: nothing else may run beside it
    finished: tuple[ArmRun, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "finished": [run.to_dict() for run in self.finished]}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Unit:
        """From what :meth:`to_dict` gave."""
        return cls(**{**table, "finished": tuple(ArmRun.from_dict(run, "unit") for run in table["finished"])})


@dataclass(frozen=True)
class Event:
    """What an engine tells of a unit: an arm began (``arm``, of all ``arms``), an arm ended (``run``), the seed ended (``end``)."""

    key: str
    seed: int
    arm: str | None = None
    arms: tuple[str, ...] = ()
    run: ArmRun | None = None
    end: SeedRun | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        run, end = self.run and self.run.to_dict(), self.end and self.end.to_dict()
        return {"key": self.key, "seed": self.seed, "arm": self.arm, "arms": list(self.arms), "run": run, "end": end}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Event:
        """From what :meth:`to_dict` gave, checked as a record would be."""
        run, end = table["run"], table["end"]
        return cls(
            table["key"],
            table["seed"],
            table["arm"],
            tuple(table["arms"]),
            None if run is None else ArmRun.from_dict(run, "event"),
            None if end is None else SeedRun.from_dict(end, "event"),
        )


def execute(unit: Unit, emit: Callable[[Event], None]) -> None:
    """Run a unit to its end in this process. Global random state and torch's settings are afterwards as before."""
    trial = Trial(
        unit.seed,
        unit.scale,
        unit.device,
        finished={run.arm: run for run in unit.finished},
        on_start=lambda arm: emit(Event(unit.key, unit.seed, arm=arm, arms=tuple(trial.order))),
        on_finish=lambda run: emit(Event(unit.key, unit.seed, run=run)),
    )
    error: str | None
    start, before = time.perf_counter(), sum(run.seconds for run in unit.finished)
    try:
        run = importlib.import_module(unit.experiment).run
    except (Exception, SystemExit) as problem:
        error = tracebacks.describe(problem)
    else:
        start = time.perf_counter()  # importing is no part of the experiment
        with _settings(unit.threads):
            error = _run_all(run, trial)
    spent = before + time.perf_counter() - start
    facts = machine(unit.threads, unit.device) | ({"stand_in": trial.stands_in} if trial.stands_in else {})
    emit(Event(unit.key, unit.seed, end=SeedRun(unit.seed, tuple(trial.order), spent, error, facts)))


def _run_all(run: Callable[[Trial], None], trial: Trial) -> str | None:
    """Run every arm; the traceback of what failed outside of them, or None."""
    while True:
        try:
            run(trial)
        except (Exception, SystemExit) as error:
            if trial.failure is not None:
                raise trial.failure from None
            if trial.open is None:
                return tracebacks.describe(error)
            trial.crash(tracebacks.describe(error))
        else:
            if trial.failure is not None:
                raise trial.failure
            if trial.open is None:
                return None if trial.order else tracebacks.describe(BadInput("the experiment has no arms: it never looped over trial.arms"))
            trial.crash(tracebacks.describe(BadInput("the loop over arms was left before the arm's body had ended")))


@contextlib.contextmanager
def _settings(threads: int) -> Iterator[None]:
    """Give the caller's random state and torch's threads and default type back."""
    with preserved():
        if not torch_is_loaded():
            yield
            return
        torch = sys.modules["torch"]
        before, dtype = torch.get_num_threads(), torch.get_default_dtype()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch.set_default_dtype(dtype)
