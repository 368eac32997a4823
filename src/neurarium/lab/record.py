"""A record: everything that one run of an experiment measured, as one JSON file.

It holds every measurement of every (seed, arm), curves and pictures, tracebacks of what crashed, durations, versions, the machine
(never its name), the fingerprint of the code that was run, and the claims' bounds as they stood on that day, so that a threshold moved
after the measurement shows. Figures, tables and verdicts are made from it alone.

Reading trusts nothing: format version, names, types, sizes and shapes are checked, and every refusal is a
:class:`~neurarium.errors.RecordError` that names the file and the field. Nothing in a record is executed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from neurarium.errors import BadInput, RecordError
from neurarium.lab import strictjson
from neurarium.lab.files import atomic_write, read_regular
from neurarium.lab.measurement import MAX_GRID, MAX_LIST, MAX_POINTS, Curve, Grid, Value
from neurarium.lab.names import check_id, check_name, check_scale

__all__ = ["FORMAT", "ArmRun", "Measured", "Record", "SeedRun"]

T = TypeVar("T")

FORMAT = 1
MAX_TEXT = 8_000  # characters of a traceback or a note
MAX_ARMS, MAX_SEEDS, MAX_METRICS = 100, 1_000, 200

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DEVICE = re.compile(r"[a-z]{2,10}(:\d{1,3})?")


@dataclass(frozen=True)
class ArmRun:
    """One arm at one seed: what it logged, or how it crashed."""

    seed: int
    arm: str
    status: str  # done or crashed
    metrics: Mapping[str, Value] = field(default_factory=dict)
    timed: tuple[str, ...] = ()  # the metrics and curves that a clock measured, and that so differ from run to run
    curves: Mapping[str, Curve] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    error: str | None = None  # the traceback of a crash, without machine paths

    @property
    def seconds(self) -> float:
        """Wall seconds of the loop body."""
        value = self.metrics.get("seconds", 0.0)
        return 0.0 if isinstance(value, list) else float(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is empty is left out."""
        table: dict[str, Any] = {"seed": self.seed, "arm": self.arm, "status": self.status, "metrics": dict(self.metrics)}
        if self.timed:
            table["timed"] = list(self.timed)
        if self.curves:
            table["curves"] = {name: {"x": x, "y": y} for name, (x, y) in self.curves.items()}
        if self.grids:
            table["grids"] = {name: dataclasses.asdict(grid) for name, grid in self.grids.items()}
        if self.error is not None:
            table["error"] = self.error
        return table

    @classmethod
    def from_dict(cls, table: Any, where: str) -> ArmRun:
        """Checked; the error says which field of ``where`` is wrong."""
        row = _Row(table, where)
        row.known("seed", "arm", "status", "metrics", "timed", "curves", "grids", "error")
        status = row.text("status")
        if status not in ("done", "crashed"):
            row.fail("status", "must be 'done' or 'crashed'")
        metrics = row.mapping("metrics", _value)
        timed = tuple(row.items("timed", lambda item, w: _name(item, w), MAX_METRICS, default=True))
        curves = row.mapping("curves", _curve, default=True)
        if missing := [name for name in timed if name not in metrics and name not in curves]:
            row.fail("timed", f"names {missing[0]!r}, which is no metric and no curve")
        run = cls(
            seed=row.integer("seed", 0, 2**31),
            arm=row.name("arm"),
            status=status,
            metrics=metrics,
            timed=timed,
            curves=curves,
            grids=row.mapping("grids", _grid, default=True),
            error=row.text("error", default=None),
        )
        if (run.status == "crashed") != (run.error is not None):
            row.fail("error", "must be there if and only if the arm crashed")
        return run


@dataclass(frozen=True)
class SeedRun:
    """One seed as a whole: the arms that it has, how long it took, and the traceback if something outside every arm failed."""

    seed: int
    arms: tuple[str, ...]
    seconds: float
    error: str | None = None
    machine: Mapping[str, str | int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "arms": list(self.arms), "machine": dict(self.machine)}

    @classmethod
    def from_dict(cls, table: Any, where: str) -> SeedRun:
        """Checked; the error says which field of ``where`` is wrong."""
        row = _Row(table, where)
        row.known("seed", "arms", "seconds", "error", "machine")
        return cls(
            seed=row.integer("seed", 0, 2**31),
            arms=tuple(row.items("arms", _name, MAX_ARMS)),
            seconds=row.seconds("seconds"),
            error=row.text("error", default=None),
            machine=row.mapping("machine", _fact),
        )


@dataclass(frozen=True)
class Measured:
    """A claim's measure and bounds as they stood when the record was made."""

    measure: str
    holds: str
    direction: str | None = None


@dataclass(frozen=True)
class Record:
    """Everything that one run of an experiment measured. See the module's docstring."""

    id: str
    kind: str  # paper or comparison
    room: str
    scale: str
    evidence: str  # real, generated or simulated
    evidence_note: str
    fingerprint: str  # sha256 of the code that was run
    created: str  # UTC date
    device: str
    versions: Mapping[str, str]
    seeds: tuple[SeedRun, ...]
    runs: tuple[ArmRun, ...]
    claims: tuple[Measured, ...] = ()

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """The arms in the order of the experiment."""
        return tuple(dict.fromkeys(arm for seed in self.seeds for arm in seed.arms))

    @property
    def seconds(self) -> float:
        """Seconds of work, summed over seeds."""
        return sum(seed.seconds for seed in self.seeds)

    @property
    def machine(self) -> Mapping[str, str | int]:
        """The machine of the first seed (on a cluster others may differ)."""
        return self.seeds[0].machine if self.seeds else {}

    @cached_property
    def _runs(self) -> dict[tuple[int, str], ArmRun]:
        return {(run.seed, run.arm): run for run in self.runs}

    def run(self, seed: int, arm: str) -> ArmRun | None:
        """One arm at one seed; None if it was never reached."""
        return self._runs.get((seed, arm))

    @property
    def crashes(self) -> list[tuple[int, str | None, str]]:
        """(seed, arm, traceback) of everything that crashed; arm is None where it was outside every arm."""
        arms = [(run.seed, run.arm, run.error or "") for run in self.runs if run.status == "crashed"]
        return [*arms, *((seed.seed, None, seed.error) for seed in self.seeds if seed.error is not None)]

    @property
    def stand_in(self) -> str:
        """What this run used in place of what the evidence note names; empty if nothing."""
        return "; ".join(sorted({str(seed.machine["stand_in"]) for seed in self.seeds if "stand_in" in seed.machine}))

    def same_measurements(self, other: Record) -> bool:
        """Whether both measured the same, seconds aside."""
        return bool(self._timeless() == other._timeless())

    def _timeless(self) -> Any:
        def stripped(run: ArmRun) -> dict[str, Any]:
            timeless = {kind: {k: v for k, v in getattr(run, kind).items() if k not in run.timed} for kind in ("metrics", "curves")}
            return {**run.to_dict(), **timeless}

        runs = sorted((stripped(run) for run in self.runs), key=lambda r: (r["seed"], r["arm"]))
        head = (self.id, self.kind, self.scale, self.fingerprint, [(s.seed, s.arms, s.error) for s in self.seeds])
        return head, strictjson.dumps(runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "id": self.id,
            "kind": self.kind,
            "room": self.room,
            "scale": self.scale,
            "evidence": self.evidence,
            "evidence_note": self.evidence_note,
            "fingerprint": self.fingerprint,
            "created": self.created,
            "device": self.device,
            "versions": dict(self.versions),
            "claims": [dataclasses.asdict(claim) for claim in self.claims],
            "seeds": [seed.to_dict() for seed in self.seeds],
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_bytes(self) -> bytes:
        """The file's content, under a megabyte: if it must, it keeps pictures of the first seed only, then thins curves further."""
        record = self
        for lighter in (None, _first_grids, _thin_curves, _no_pictures):
            record = record if lighter is None else lighter(record)
            data = strictjson.dumps(record.to_dict())
            if len(data) <= strictjson.MAX_BYTES:
                return data
        raise RecordError(f"{self.id}: the metrics alone make a record of {len(data):,} bytes, at most {strictjson.MAX_BYTES:,}")

    def save(self, path: Path | str) -> Path:
        """Write it, all or nothing."""
        path = Path(path)
        atomic_write(path, self.to_bytes())
        return path

    @classmethod
    def load(cls, path: Path | str) -> Record:
        """Read and check a file; :class:`~neurarium.errors.RecordError` naming file and field if anything is amiss."""
        path = Path(path)
        return cls.from_dict(strictjson.loads(read_regular(path, strictjson.MAX_BYTES), str(path)), str(path))

    @classmethod
    def from_dict(cls, table: Any, where: str = "record") -> Record:
        """Checked; the error names ``where`` and the field."""
        row = _Row(table, where)
        version = row.integer("format", 0, 2**31)
        if version != FORMAT:
            row.fail("format", f"is {version}; this neurarium reads format {FORMAT}")
        row.known("format", *(f.name for f in dataclasses.fields(cls)))
        record = cls(
            id=row.checked("id", check_id),
            kind=row.one_of("kind", ("paper", "comparison")),
            room=row.checked("room", check_id),
            scale=row.checked("scale", check_scale),
            evidence=row.one_of("evidence", ("real", "generated", "simulated")),
            evidence_note=row.text("evidence_note"),
            fingerprint=row.matching("fingerprint", _FINGERPRINT, "64 hexadecimal digits"),
            created=row.matching("created", _DATE, "a date YYYY-MM-DD"),
            device=row.matching("device", _DEVICE, "a device such as cpu or cuda:0"),
            versions=row.mapping("versions", lambda item, w: _text(item, w, 60)),
            claims=tuple(row.items("claims", _measured, 100)),
            seeds=tuple(row.items("seeds", SeedRun.from_dict, MAX_SEEDS)),
            runs=tuple(row.items("runs", ArmRun.from_dict, MAX_SEEDS * MAX_ARMS)),
        )
        _check_whole(record, row)
        return record


def _check_whole(record: Record, row: _Row) -> None:
    seeds = [seed.seed for seed in record.seeds]
    if not seeds:
        row.fail("seeds", "is empty")
    if len(set(seeds)) < len(seeds):
        row.fail("seeds", "holds the same seed twice")
    if len(record._runs) < len(record.runs):
        row.fail("runs", "holds the same seed and arm twice")
    arms = {seed.seed: seed for seed in record.seeds}
    for run in record.runs:
        if run.seed not in arms or run.arm not in arms[run.seed].arms:
            row.fail("runs", f"seed {run.seed}, arm {run.arm!r} is not announced in 'seeds'")
    for seed in record.seeds:
        for arm in seed.arms:
            if seed.error is None and record.run(seed.seed, arm) is None:
                row.fail("runs", f"seed {seed.seed} lacks its arm {arm!r}")


def _first_grids(record: Record) -> Record:
    first = record.seeds[0].seed
    return dataclasses.replace(record, runs=tuple(r if r.seed == first else dataclasses.replace(r, grids={}) for r in record.runs))


def _thin_curves(record: Record) -> Record:
    def thin(curve: Curve) -> Curve:
        step = max(1, -(-len(curve[0]) // 100))
        return curve[0][::step], curve[1][::step]

    runs = (dataclasses.replace(r, curves={name: thin(curve) for name, curve in r.curves.items()}) for r in record.runs)
    return dataclasses.replace(record, runs=tuple(runs))


def _no_pictures(record: Record) -> Record:
    return dataclasses.replace(record, runs=tuple(dataclasses.replace(r, curves={}, grids={}) for r in record.runs))


class _Row:
    """One table of a record: typed reading with errors that name file and field."""

    def __init__(self, table: Any, where: str) -> None:
        if not isinstance(table, dict):
            raise RecordError(f"{where}: must be a table, is {_kind(table)}")
        self.table, self.where = table, where

    def fail(self, name: str, why: str) -> None:
        raise RecordError(f"{self.where}: field {name!r}: {why}")

    def known(self, *names: str) -> None:
        for key in self.table:
            if key not in names:
                raise RecordError(f"{self.where}: unknown field {key[:80]!r}")

    def get(self, name: str) -> Any:
        if name not in self.table:
            self.fail(name, "is missing")
        return self.table[name]

    def text(self, name: str, default: Any = "required") -> Any:
        if default is None and self.table.get(name) is None:
            return None
        return _text(self.get(name), f"{self.where}: field {name!r}", MAX_TEXT)

    def checked(self, name: str, check: Callable[[object], str]) -> str:
        try:
            return check(self.get(name))
        except BadInput as error:
            raise RecordError(f"{self.where}: field {name!r}: {error}") from None

    def name(self, name: str) -> str:
        return self.checked(name, check_name)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value: str = self.text(name)
        if value not in allowed:
            self.fail(name, f"must be one of {', '.join(allowed)}, is {value[:60]!r}")
        return value

    def matching(self, name: str, pattern: re.Pattern[str], form: str) -> str:
        value: str = self.text(name)
        if pattern.fullmatch(value) is None:
            self.fail(name, f"must be {form}, is {value[:80]!r}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            self.fail(name, f"must be an integer of at least {low}, is {_kind(value)}")
        return int(value)

    def seconds(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            self.fail(name, "must be seconds, not negative")
        return float(value)

    def items(self, name: str, read: Callable[[Any, str], T], limit: int, *, default: bool = False) -> list[T]:
        values = [] if default and name not in self.table else self.get(name)
        if not isinstance(values, list):
            self.fail(name, f"must be a list, is {_kind(values)}")
        if len(values) > limit:
            self.fail(name, f"holds {len(values):,} items, at most {limit:,}")
        return [read(item, f"{self.where}: field '{name}[{i}]'") for i, item in enumerate(values)]

    def mapping(self, name: str, read: Callable[[Any, str], T], *, default: bool = False) -> dict[str, T]:
        values = {} if default and name not in self.table else self.get(name)
        if not isinstance(values, dict):
            self.fail(name, f"must be a table, is {_kind(values)}")
        if len(values) > MAX_METRICS:
            self.fail(name, f"holds {len(values):,} entries, at most {MAX_METRICS}")
        for key in values:
            _name(key, f"{self.where}: field {name!r}")
        return {key: read(value, f"{self.where}: field '{name}.{key}'") for key, value in values.items()}


def _kind(value: Any) -> str:
    return {dict: "a table", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}.get(type(value), "a number")


def _text(value: Any, where: str, limit: int) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: must be a string, is {_kind(value)}")
    if len(value) > limit:
        raise RecordError(f"{where}: has {len(value):,} characters, at most {limit:,}")
    return value


def _name(value: Any, where: str) -> str:
    try:
        return check_name(value)
    except BadInput as error:
        raise RecordError(f"{where}: {error}") from None


def _fact(value: Any, where: str) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1_000_000:
        return value
    return _text(value, where, 120)


def _value(value: Any, where: str) -> Value:
    if isinstance(value, list):
        return _numbers(value, where, MAX_LIST)
    found = strictjson.number(value)
    if found is None:
        raise RecordError(f"{where}: must be a number, 'nan', 'inf', '-inf' or a list of those, is {_kind(value)}")
    return found


def _numbers(values: Any, where: str, limit: int) -> list[float]:
    if not isinstance(values, list) or len(values) > limit:
        raise RecordError(f"{where}: must be a list of at most {limit:,} numbers")
    found = [strictjson.number(value) for value in values]
    if None in found:
        raise RecordError(f"{where}: item {found.index(None)} is not a number")
    return [float(value) for value in found if value is not None]


def _curve(value: Any, where: str) -> Curve:
    row = _Row(value, where)
    row.known("x", "y")
    x, y = (_numbers(row.get(axis), f"{where}.{axis}", MAX_POINTS) for axis in "xy")
    if len(x) != len(y) or not x:
        raise RecordError(f"{where}: x has {len(x)} points, y has {len(y)}; they must be as many and not none")
    return x, y


def _grid(value: Any, where: str) -> Grid:
    row = _Row(value, where)
    row.known("rows", "columns", "low", "high", "cells")
    ends = _numbers([row.get("low"), row.get("high")], where, 2)
    size = [row.integer(side, 1, MAX_GRID + 1) for side in ("rows", "columns")]
    grid = Grid(size[0], size[1], ends[0], ends[1], _text(row.get("cells"), f"{where}.cells", 2 * MAX_GRID**2))
    try:
        grid.codes()
    except BadInput as error:
        raise RecordError(f"{where}: {error}") from None
    return grid


def _measured(value: Any, where: str) -> Measured:
    row = _Row(value, where)
    row.known("measure", "holds", "direction")
    return Measured(row.text("measure"), row.text("holds"), row.text("direction", default=None))
