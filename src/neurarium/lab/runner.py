"""Runs papers and comparisons: plans the units of work, hands them to an engine, writes down what comes back, makes the record.

A unit is one experiment at one seed. Every finished (seed, arm) is a file at once (:mod:`~neurarium.lab.store`), so that a run that was
killed goes on where it was; the record is assembled from those parts when the last seed ends. What crashed is tried again by the next
run; what another code version or other settings left there is not used.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from neurarium.catalog import Comparison, Paper
from neurarium.errors import BadInput, NeurariumError, RecordError
from neurarium.lab.engines import Engine
from neurarium.lab.engines import engine as make_engine
from neurarium.lab.execute import Event, Unit
from neurarium.lab.fingerprinting import fingerprint
from neurarium.lab.machine import cores, threads, versions
from neurarium.lab.names import check_scale
from neurarium.lab.progress import Progress
from neurarium.lab.record import ArmRun, Measured, Record, SeedRun
from neurarium.lab.store import RunFolder

__all__ = ["Subject", "compare", "folder_name", "run", "run_many"]

Subject: TypeAlias = "Paper | Comparison"

_DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:\d{1,2})?")


def run(
    paper: Subject | str,
    *,
    scale: str = "laptop",
    seeds: int | Sequence[int] | None = None,
    out: Path | str = "runs",
    device: str = "cpu",
    engine: str | Engine = "local",
    jobs: int | None = None,
    address: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Record:
    """Measure one paper (or comparison, or the paper of this id) and return its record, which is also in ``out/ID/SCALE/record.json``.

    Args:
        scale: ``smoke`` or ``laptop``.
        seeds: how many, or which; by default as many as the catalog says, one at smoke scale.
        out: folder of all runs.
        device: where the experiment computes, in torch's notation.
        engine: ``inline``, ``local`` or ``ray`` (see :mod:`neurarium.lab.engines`), or an engine.
        jobs: processes at once; by default one a core, and one alone where the paper's claims involve seconds.
        address: of the ray cluster.
        fresh: start anew instead of going on with what an earlier run finished.
        progress: show what is going on, if on a terminal.

    Raises:
        RecordError: the folder cannot be written, or every seed failed before anything was measured.
    """
    options = {"scale": scale, "seeds": seeds, "out": out, "device": device, "engine": engine, "jobs": jobs, "address": address}
    (result,) = run_many([paper], **options, fresh=fresh, progress=progress).values()  # type: ignore[arg-type]
    if isinstance(result, NeurariumError):
        raise result
    return result


def run_many(
    papers: Iterable[Subject | str],
    *,
    scale: str = "laptop",
    seeds: int | Sequence[int] | None = None,
    out: Path | str = "runs",
    device: str = "cpu",
    engine: str | Engine = "local",
    jobs: int | None = None,
    address: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, Record | NeurariumError]:
    """Measure many at once; options as for :func:`run`. By id: the record, or the error where nothing could be measured.

    Papers whose claims involve seconds run alone, after the others. A folder that cannot be written ends the whole.
    """
    check_scale(scale)
    if _DEVICE.fullmatch(device) is None:
        raise BadInput(f"device {device[:40]!r} must be cpu, mps, cuda or cuda:N")
    if jobs is not None and jobs < 1:
        raise BadInput(f"jobs must be at least 1, is {jobs}")
    subjects = [_resolved(paper) for paper in papers]
    names = [folder_name(subject) for subject in subjects]
    if len(set(names)) < len(names):
        raise BadInput("the same paper is named twice")
    planned = [(subject, _seeds(subject, scale, seeds)) for subject in subjects]
    parallel = sum(len(s) for subject, s in planned if not subject.timed)
    jobs = jobs or (1 if device != "cpu" else max(1, min(parallel, cores())))
    with contextlib.ExitStack() as stack, Progress(progress) as show:
        chosen = make_engine(engine, jobs=jobs, address=address)
        work = [_Job(s, n, scale, device, threads() if s.timed or jobs == 1 else 1, Path(out)) for s, n in planned]
        for job in sorted(work, key=lambda job: job.name):  # in one order everywhere, so that two runs cannot wait for each other
            job.open(stack.enter_context(job.folder.locked(show.note)), fresh)
        by_name = {job.name: job for job in work}
        units: list[Unit] = []
        for job in work:
            todo = [] if job.result else job.units()
            show.add(job.name, job.seeds, list(job.runs.values()), list(job.ended))
            units += todo
            if not todo and not job.result:
                job.conclude(show)

        def emit(event: Event) -> None:
            job = by_name[event.key]
            job.take(event)
            show.event(event)
            if event.end is not None and job.complete():
                job.conclude(show)

        if units:
            chosen.map(units, emit)
    return {job.subject.id: _result(job) for job in work}


def compare(comparison: Comparison | str, **options: Any) -> Record:
    """Run a comparison (or that of this id); options as for :func:`run`. It defends no claim: its record, table and figure answer it."""
    if isinstance(comparison, str):
        from neurarium import catalog

        comparison = catalog.load().comparison(comparison)
    return run(comparison, **options)


def folder_name(subject: Subject) -> str:
    """The name under which runs and records of a paper or a comparison are kept."""
    return f"compare-{subject.id}" if isinstance(subject, Comparison) else subject.id


@dataclass
class _Job:
    """One paper's run: what is wanted, what is there, what came of it."""

    subject: Subject
    seeds: tuple[int, ...]
    scale: str
    device: str
    threads: int
    out: Path
    ended: dict[int, SeedRun] = field(default_factory=dict)
    runs: dict[tuple[int, str], ArmRun] = field(default_factory=dict)
    result: Record | RecordError | None = None

    def __post_init__(self) -> None:
        self.name = folder_name(self.subject)
        self.fingerprint = fingerprint(self.subject)
        self.folder = RunFolder(self.out, self.name, self.scale)
        self.versions = versions()
        self.settings: dict[str, Any] = {"name": self.name, "scale": self.scale, "device": self.device, "fingerprint": self.fingerprint}
        self.settings |= {package: self.versions[package] for package in ("python", "torch", "numpy")}
        if not self.subject.timed:
            self.threads = 1  # whatever runs beside it: sums in another order would change the last digits
        self.settings["threads"] = self.threads
        self.settings["data"] = os.environ.get("NEURARIUM_DATA", "")  # other data, other measurements

    def open(self, waited: bool, fresh: bool) -> None:
        """Take what earlier runs left. After waiting for another run, its record is ours too, whatever crashed in it."""
        if fresh:
            self.folder.forget()
            return
        found = self._earlier()
        if found is not None and (waited or not found.crashes):
            self.result = found
        ended, runs = self.folder.load(self.settings)
        self.runs = {at: part for at, part in runs.items() if at[0] in self.seeds and part.status == "done"}
        if any("stand_in" in s.machine for s in ended.values()):  # never mix two sources of data in one record
            ended, self.runs = {}, {}
        whole = (s for s in ended.values() if s.error is None and all((s.seed, arm) in self.runs for arm in s.arms))
        self.ended = {s.seed: s for s in whole if s.seed in self.seeds}

    def _earlier(self) -> Record | None:
        try:
            record = Record.load(self.folder.record)
        except RecordError:
            return None
        same = all(record.versions.get(package) == self.settings[package] for package in ("python", "torch", "numpy"))
        same &= (record.fingerprint, record.device, record.scale) == (self.fingerprint, self.device, self.scale)
        same &= tuple(seed.seed for seed in record.seeds) == self.seeds and record.id == self.subject.id
        same &= record.machine.get("threads") == self.threads
        same &= not record.stand_in  # what stood in may be there by now
        return record if same else None

    def units(self) -> list[Unit]:
        """One for every seed that is not finished."""
        return [
            Unit(
                self.name,
                str(self.subject.experiment),
                seed,
                self.scale,
                self.device,
                self.threads,
                self.subject.timed,
                tuple(run for (at, _), run in self.runs.items() if at == seed),
            )
            for seed in self.seeds
            if seed not in self.ended
        ]

    def take(self, event: Event) -> None:
        """Write down what an engine tells."""
        if event.run is not None:
            self.folder.save(self.settings, event.run)
            self.runs[event.run.seed, event.run.arm] = event.run
        if event.end is not None:
            self.folder.save(self.settings, event.end)
            self.ended[event.seed] = event.end

    def complete(self) -> bool:
        """Whether every seed has ended."""
        return all(seed in self.ended for seed in self.seeds)

    def conclude(self, show: Progress) -> None:
        """Make the record and the figure."""
        runs = tuple(self.runs[seed, arm] for seed in self.seeds for arm in self.ended[seed].arms if (seed, arm) in self.runs)
        if not any(run.status == "done" for run in runs):
            errors = [self.ended[seed].error for seed in self.seeds] + [run.error for run in runs]
            why = next((error for error in errors if error), "no arm ran")
            self.result = RecordError(f"{self.subject.id}: nothing was measured: {why.splitlines()[-1]}\n{why}")
            return
        claims = () if isinstance(self.subject, Comparison) else self.subject.claims
        record = Record(
            id=self.subject.id,
            kind="comparison" if isinstance(self.subject, Comparison) else "paper",
            room=self.subject.room,
            scale=self.scale,
            evidence=self.subject.evidence or "real",
            evidence_note=self.subject.evidence_note,
            fingerprint=self.fingerprint,
            created=datetime.datetime.now(datetime.UTC).date().isoformat(),
            device=self.device,
            versions=self.versions,
            seeds=tuple(self.ended[seed] for seed in self.seeds),
            runs=runs,
            claims=tuple(Measured(c.measure, c.holds, c.direction) for c in claims),
        )
        self.result = Record.load(record.save(self.folder.record))
        from neurarium.lab.figures import draw_or_say

        draw_or_say(self.result, self.subject, self.folder.figure, show.note)


def _result(job: _Job) -> Record | RecordError:
    if job.result is None:
        raise RecordError(f"{job.subject.id}: the engine returned before every seed had ended")
    return job.result


def _resolved(paper: Subject | str) -> Subject:
    if isinstance(paper, str):
        from neurarium import catalog

        paper = catalog.load().get(paper)
    if not paper.experiment:
        raise BadInput(f"{paper.id!r} is planned: it has no experiment to run yet")
    return paper


def _seeds(subject: Subject, scale: str, seeds: int | Sequence[int] | None) -> tuple[int, ...]:
    if seeds is None:
        seeds = 1 if scale == "smoke" else subject.seeds
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or any(not isinstance(s, int) or not 0 <= s < 2**31 for s in chosen):
        raise BadInput(f"seeds must be a number of at least 1, or different integers that are not negative; got {seeds!r}"[:200])
    return chosen
