"""Verification: are the published records there, sound and current, and do they bear the claims out?

A paper's record is **valid** if it exists and reads, is at laptop scale with at least three seeds, every arm of every seed is there (done,
or its crash recorded), and at least one claim's null check fails, so that a method that does nothing could not have passed. It is
**stale** if the code that it measured has changed since (:mod:`~neurarium.lab.fingerprinting`). Claims are judged by today's bounds;
``moved`` lists those whose measure or bounds differ from what they were when the record was made. A comparison defends no claim: its
record is valid if it is whole, and every arm of it ran.

Nothing is run and no experiment is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurarium.errors import BadInput, NeurariumError, RecordError
from neurarium.lab.fingerprinting import Code, fingerprint
from neurarium.lab.record import Record
from neurarium.lab.records import published
from neurarium.lab.verdict import MIN_SEEDS, Verdict, judge

if TYPE_CHECKING:
    from neurarium.catalog import Comparison, Paper

__all__ = ["PaperReport", "VerifyReport", "verify"]


@dataclass(frozen=True)
class PaperReport:
    """What verification found of one paper or comparison."""

    id: str
    valid: bool
    stale: bool
    why: str = ""  # it is not valid
    moved: tuple[str, ...] = ()  # claims whose measure or bounds were changed after the measurement
    claims: tuple[Verdict, ...] = ()
    record: Record | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with stable keys."""
        return {
            "id": self.id,
            "valid": self.valid,
            "stale": self.stale,
            "seconds": None if self.record is None else round(self.record.seconds, 3),
            "seeds": 0 if self.record is None else len(self.record.seeds),
            "claims": [verdict.to_dict() for verdict in self.claims],
        }


@dataclass(frozen=True)
class VerifyReport:
    """What verification found of many."""

    papers: tuple[PaperReport, ...]
    comparisons: tuple[PaperReport, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        """Claims by verdict (of valid papers), and how many papers and comparisons are invalid or stale."""
        both = self.papers + self.comparisons
        verdicts = [verdict.verdict for paper in self.papers if paper.valid for verdict in paper.claims]
        counts = {name: verdicts.count(name) for name in ("held", "weaker", "failed")}
        return {**counts, "invalid": sum(not p.valid for p in both), "stale": sum(p.stale for p in both)}

    @property
    def exit_code(self) -> int:
        """1 if a paper that works, or a comparison, has no valid record, else 0."""
        return int(any(not one.valid for one in self.papers + self.comparisons))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with stable keys."""
        found = {"papers": self.papers, "comparisons": self.comparisons}
        return {name: [one.to_dict() for one in many] for name, many in found.items()} | {"totals": self.totals}


def verify(papers: Iterable[Paper], records_dir: Path | str | None = None, *, comparisons: Iterable[Comparison] = ()) -> VerifyReport:
    """Judge the published records of all papers that work (planned ones are passed over) and check those of comparisons."""
    code = Code()
    working = tuple(_verified(paper, records_dir, code) for paper in papers if paper.status == "works")
    return VerifyReport(working, tuple(_compared(comparison, records_dir, code) for comparison in comparisons))


def _compared(comparison: Comparison, root: Path | str | None, code: Code) -> PaperReport:
    try:
        record = published(comparison, root)
    except RecordError as error:
        return PaperReport(comparison.id, valid=False, stale=False, why=str(error))
    try:
        stale = fingerprint(comparison, code) != record.fingerprint
    except (NeurariumError, SyntaxError) as error:
        return PaperReport(comparison.id, valid=False, stale=True, why=f"its code cannot be followed: {error}", record=record)
    why = _unsound(record)
    if not why and record.crashes:
        why = "an arm crashed: " + ", ".join(sorted({arm or "outside the arms" for _, arm, _ in record.crashes}))
    return PaperReport(comparison.id, not why, stale, why, record=record)


def _verified(paper: Paper, root: Path | str | None, code: Code) -> PaperReport:
    try:
        record = published(paper, root)
    except RecordError as error:
        return PaperReport(paper.id, valid=False, stale=False, why=str(error))
    try:
        stale = fingerprint(paper, code) != record.fingerprint
    except (NeurariumError, SyntaxError) as error:
        return PaperReport(paper.id, valid=False, stale=True, why=f"its code cannot be followed: {error}", record=record)
    try:
        verdicts = tuple(judge(paper, record))
    except BadInput as error:
        return PaperReport(paper.id, valid=False, stale=stale, why=str(error), record=record)
    moved = _moved(paper, record)
    return PaperReport(paper.id, not (why := _fault(record, verdicts)), stale or bool(moved), why, moved, verdicts, record)


def _unsound(record: Record) -> str:
    """Why a record is none of a whole laptop run; empty if it is."""
    if record.scale != "laptop":
        return f"it is at {record.scale} scale"
    if record.stand_in:
        return f"it was measured on a stand-in: {record.stand_in}"
    if len(record.seeds) < MIN_SEEDS:
        return f"it has {len(record.seeds)} seeds, fewer than {MIN_SEEDS}"
    if failed := [str(seed.seed) for seed in record.seeds if seed.error is not None]:
        return f"seed {', '.join(failed)} failed outside its arms"
    return ""


def _fault(record: Record, verdicts: Iterable[Verdict]) -> str:
    """Why a record is no evidence; empty if it is."""
    if why := _unsound(record):
        return why
    if not any(verdict.null_fails for verdict in verdicts):
        return "every claim would also hold with the baseline in the method's place: nothing here is evidence for the method"
    return ""


def _moved(paper: Paper, record: Record) -> tuple[str, ...]:
    then = {(claim.measure, claim.holds, claim.direction) for claim in record.claims}
    return tuple(claim.says for claim in paper.claims if (claim.measure, claim.holds, claim.direction) not in then)
