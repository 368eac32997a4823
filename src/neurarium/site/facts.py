"""What is known of each paper: its entry, its published record, the verdicts on its claims, its docstring, its figure."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from neurarium import catalog as catalogs
from neurarium.catalog import Catalog, Comparison, Paper
from neurarium.errors import NeurariumError, RecordError
from neurarium.site.docstrings import Told, told

if TYPE_CHECKING:
    from neurarium.lab import Record, Verdict

__all__ = ["VERDICTS", "Atlas", "Facts", "duration"]

log = logging.getLogger("mkdocs.plugins.neurarium")

#: The verdicts with the sign that stands beside the word, so that colour is never alone.
VERDICTS = {"held": "✓", "weaker": "≈", "failed": "✕", "not judged": "–"}


@dataclass(frozen=True)
class Facts:
    """One paper or comparison as a page shows it."""

    entry: Paper | Comparison
    record: Record | None = None
    verdicts: tuple[Verdict, ...] = ()
    figure: str | None = None  # address below the site's root
    thumbnail: str | None = None

    @property
    def id(self) -> str:
        """Its id in the catalog."""
        return self.entry.id

    @property
    def url(self) -> str:
        """Address of its page below the site's root."""
        return f"{self.folder}/{self.entry.id}.html"

    @property
    def folder(self) -> str:
        """Folder of its page below the site's root."""
        return "comparisons" if isinstance(self.entry, Comparison) else f"papers/{self.entry.room}"

    @property
    def counts(self) -> dict[str, int]:
        """How many claims have each verdict that occurs, in the order of :data:`VERDICTS`."""
        found = [v.verdict for v in self.verdicts]
        return {name: found.count(name) for name in VERDICTS if name in found}

    @property
    def status(self) -> str:
        """planned, works (there is code but no published record) or measured."""
        if self.record is not None:
            return "measured"
        return getattr(self.entry, "status", "works")

    @cached_property
    def told(self) -> Told:
        """What the method's own file says."""
        use = getattr(self.entry, "use", None)
        return told(use) if use else Told()


@dataclass(frozen=True)
class Atlas:
    """Everything that the site is generated from."""

    catalog: Catalog
    facts: tuple[Facts, ...]
    comparisons: tuple[Facts, ...] = ()
    figures: dict[str, bytes] = field(default_factory=dict)  # address below the site's root -> file
    snippets: Path | None = None

    @classmethod
    def load(cls, root: Path, *, catalog: Catalog | None = None, records: Path | None = None, cache: Path | None = None) -> Atlas:
        """Read catalog, records and snippets; figures are redrawn from the records, or taken from ``cache``."""
        from neurarium.site.figures import draw_all

        catalog = catalog if catalog is not None else catalogs.load()
        for problem in catalog.problems:
            log.warning("%s", problem)
        entries: list[Paper | Comparison] = [*catalog.papers, *catalog.comparisons]
        found = {entry.id: record for entry in entries if (record := _record(entry, records)) is not None}
        drawn = draw_all([(entry, found[entry.id]) for entry in entries if entry.id in found], cache)
        figures: dict[str, bytes] = {}
        facts: list[Facts] = []
        for entry in entries:
            record = found.get(entry.id)
            one = Facts(entry, record, _judge(entry, record))
            if entry.id in drawn:
                one = Facts(entry, record, one.verdicts, f"{one.folder}/{entry.id}.png", f"{one.folder}/{entry.id}-small.png")
                figures[str(one.figure)], figures[str(one.thumbnail)] = drawn[entry.id]
            facts.append(one)
        papers = tuple(one for one in facts if isinstance(one.entry, Paper))
        comparisons = tuple(one for one in facts if isinstance(one.entry, Comparison))
        return cls(catalog, papers, comparisons, figures, root / "docs" / "snippets")

    @cached_property
    def by_id(self) -> dict[str, Facts]:
        """Papers and comparisons by id."""
        return {one.id: one for one in (*self.facts, *self.comparisons)}

    @cached_property
    def rooms(self) -> dict[str, list[Facts]]:
        """The papers of each room, working ones first."""
        rooms: dict[str, list[Facts]] = {room: [] for room in sorted(self.catalog.rooms)}
        for one in self.facts:
            rooms[one.entry.room].append(one)
        return {room: sorted(papers, key=order) for room, papers in rooms.items()}

    def snippet(self, one: Facts) -> tuple[str, str]:
        """The question that the paper asks and the lines that use its method, from ``docs/snippets/ROOM/ID.py``; empty if there is none."""
        import ast

        file = self.snippets / one.entry.room / f"{one.id}.py" if self.snippets else None
        if file is None or not file.is_file():
            return "", ""
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        question = " ".join((ast.get_docstring(tree) or "").split())
        first = tree.body[1 if question else 0]
        return question, "\n".join(text.splitlines()[first.lineno - 1 :]).strip()


def order(one: Facts) -> tuple[int, int, str]:
    """Measured papers first, then those that work, then planned ones; newest first."""
    paper = one.entry
    return {"measured": 0, "works": 1}.get(one.status, 2), -(getattr(paper, "year", None) or 0), paper.id


def duration(seconds: float) -> str:
    """A time as one says it."""
    if not math.isfinite(seconds) or seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _record(entry: Paper | Comparison, root: Path | None) -> Record | None:
    from neurarium import lab

    if not lab.record_path(entry, root).is_file():
        return None
    try:
        return lab.published(entry, root)
    except RecordError as error:
        log.warning("%s is left out: %s", entry.id, error)
        return None


def _judge(entry: Paper | Comparison, record: Record | None) -> tuple[Verdict, ...]:
    if record is None or isinstance(entry, Comparison):
        return ()
    from neurarium import lab

    try:
        return tuple(lab.judge(entry, record))
    except NeurariumError as error:
        log.warning("%s: its claims cannot be judged: %s", entry.id, error)
        return ()
