"""What a catalog entry may say, and the checks on it.

:func:`parse` turns one TOML document into :class:`Paper` and :class:`Comparison` objects or raises a
:class:`~neurarium.errors.BadInput` that names the file, the paper and the field. A document is treated as untrusted text: it is
bounded in size and depth, and no name in it is imported.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from neurarium.catalog import references
from neurarium.catalog.bounds import Bound
from neurarium.errors import BadInput

__all__ = ["EVIDENCE", "ROLES", "STATUSES", "Claim", "Comparison", "Paper", "parse", "read_toml"]

#: The names of :data:`neurarium.roles.ROLES`, repeated because that module imports torch.
ROLES = ("layer", "model", "optimizer", "learner", "transform", "policy", "searcher", "probe", "solver", "dataset", "study")
STATUSES = ("planned", "works")
EVIDENCE = ("real", "generated", "simulated")

MAX_BYTES = 1_000_000  # of one TOML file
MAX_LINE = 8_000  # characters of one line: bounds the length of dotted keys and of nested brackets on a line
MAX_TEXT = 2_000  # characters of one string
MAX_CLAIMS = 30
YEARS = range(1940, 2101)

_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_ARXIV = re.compile(r"[0-9]{2}(?:0[1-9]|1[0-2])\.[0-9]{4,5}|[a-z]+(?:-[a-z]+)?/[0-9]{2}(?:0[1-9]|1[0-2])[0-9]{3}")
_ARM = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Control, format (bidirectional overrides, zero-width), private-use and surrogate characters: a title goes to terminals and pages.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\uf8ff\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U0010ffff]"
)


@dataclass(frozen=True)
class Claim:
    """One thing that a paper says of its method, and how it is measured here."""

    says: str
    reported: str  # the paper's own figure, in words
    measure: str  # an expression over ``arm.metric``
    holds: str  # a bound on the measure, see :class:`~neurarium.catalog.Bound`
    direction: str | None = None  # a weaker bound: the sign of the effect
    null: Mapping[str, str] | None = field(default=None, hash=False)  # overrides the paper's null check
    reason: str | None = None  # why it does not hold here, where that is known


@dataclass(frozen=True)
class Paper:
    """One paper. Everything from ``use`` on is required of a paper whose status is ``works``, save where a default is given."""

    id: str
    title: str
    room: str
    year: int | None
    arxiv: str | None
    role: str
    status: str
    use: str | None = None  # module:object, the method's public entry
    also: tuple[str, ...] = ()  # further public objects
    experiment: str | None = None  # module with run(trial)
    example: str | None = None  # module:function, the conformance suite's tiny example
    summary: str = ""
    evidence: str | None = None  # real, generated or simulated
    evidence_note: str = ""
    seeds: int = 3
    timed: bool = False  # claims involve seconds: seeds run one after another
    null: Mapping[str, str] = field(default_factory=dict, hash=False)  # method arm -> baseline arm
    claims: tuple[Claim, ...] = ()
    package: str = "neurarium"  # the top-level package that the entry comes from

    def bibtex(self) -> str:
        """A BibTeX entry of what the catalog knows: title, year, arXiv number. It names no author, because the catalog knows none."""
        from neurarium.catalog.bibtex import bibtex

        return bibtex(self)


@dataclass(frozen=True)
class Comparison:
    """Methods that do one job, measured side by side."""

    id: str
    question: str
    members: tuple[str, ...]  # paper ids
    experiment: str
    room: str
    plot: tuple[str, ...] = ()  # the metrics to plot
    summary: str = ""
    evidence: str = "real"
    evidence_note: str = ""
    seeds: int = 3
    timed: bool = False
    package: str = "neurarium"


def read_toml(data: bytes, where: str) -> dict[str, Any]:
    """Decode and parse one TOML document within the limits on size, line length and depth."""
    if len(data) > MAX_BYTES:
        raise BadInput(f"{where}: larger than {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            raise BadInput(f"{where}: line {number} is longer than {MAX_LINE:,} characters")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise BadInput(f"{where}: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number too long to convert
        raise BadInput(f"{where}: not valid TOML: {error}") from None


def parse(data: bytes, where: str, room: str, package: str = "neurarium") -> tuple[list[Paper], list[Comparison]]:
    """Papers and comparisons of one room's file. ``where`` names the file in errors, ``package`` owns the code that it may refer to."""
    document = read_toml(data, where)
    if _ID.fullmatch(room) is None:
        raise BadInput(f"{where}: the file's name {room!r} is not a room: lower-case letters, digits and single hyphens")
    _known(document, ("paper", "comparison"), where)
    papers = [_paper(table, f"{where}: {_label(table, 'paper', i)}", room, package) for i, table in _tables(document, "paper", where)]
    comparisons = [
        _comparison(table, f"{where}: {_label(table, 'comparison', i)}", room, package)
        for i, table in _tables(document, "comparison", where)
    ]
    seen: set[str] = set()
    entries: list[Paper | Comparison] = [*papers, *comparisons]
    for entry in entries:
        if entry.id in seen:
            raise BadInput(f"{where}: {entry.id!r}: field 'id': appears twice in this file")
        seen.add(entry.id)
    return papers, comparisons


def _paper(table: dict[str, Any], where: str, room: str, package: str) -> Paper:
    row = _Row(table, where, package)
    row.known(Paper, extra=("claim",), without=("room", "claims", "package"))
    status = row.one_of("status", STATUSES)
    claims = tuple(_claim(t, f"{where}: claim {i + 1}", package) for i, t in _tables(table, "claim", where))
    if len(claims) > MAX_CLAIMS:
        raise BadInput(f"{where}: field 'claim': {len(claims)} claims, at most {MAX_CLAIMS}")
    paper = Paper(
        id=row.id(),
        title=row.text("title"),
        room=room,
        year=row.integer("year", YEARS) if "year" in table else None,
        arxiv=row.arxiv(),
        role=row.one_of("role", ROLES),
        status=status,
        use=row.reference("use", "object"),
        also=row.references("also"),
        experiment=row.reference("experiment", "module"),
        example=row.reference("example", "object"),
        summary=row.text("summary", ""),
        evidence=row.one_of("evidence", EVIDENCE) if "evidence" in table else None,
        evidence_note=row.text("evidence_note", ""),
        seeds=row.integer("seeds", range(1, 101)) if "seeds" in table else 3,
        timed=row.boolean("timed"),
        null=row.arms("null") or {},
        claims=claims,
        package=package,
    )
    if status == "works":
        for name in ("use", "experiment", "example", "summary", "evidence"):
            if not getattr(paper, name):
                row.fail(name, "a paper whose status is 'works' must have it")
        if not claims:
            row.fail("claim", "a paper whose status is 'works' must have at least one [[paper.claim]]")
        if paper.seeds < 3:
            row.fail("seeds", f"must be at least 3 where claims are judged, is {paper.seeds}")
        if paper.evidence != "real" and not paper.evidence_note:
            row.fail("evidence_note", f"{paper.evidence} evidence must say what stands in for what")
    return paper


def _claim(table: dict[str, Any], where: str, package: str) -> Claim:
    row = _Row(table, where, package)
    row.known(Claim)
    return Claim(
        says=row.text("says"),
        reported=row.text("reported"),
        measure=row.text("measure"),
        holds=row.bound("holds"),
        direction=row.bound("direction") if "direction" in table else None,
        null=row.arms("null"),
        reason=row.text("reason", "") or None,
    )


def _comparison(table: dict[str, Any], where: str, room: str, package: str) -> Comparison:
    row = _Row(table, where, package)
    row.known(Comparison, without=("room", "package"))
    members = row.strings("members")
    for member in members:
        if _ID.fullmatch(member) is None:
            row.fail("members", f"{member!r} is not a paper's id")
    if len(set(members)) != len(members) or len(members) < 2:
        row.fail("members", "must name at least two papers, each once")
    experiment = row.reference("experiment", "module")
    if experiment is None:
        row.fail("experiment", "is missing")
    return Comparison(
        id=row.id(),
        question=row.text("question"),
        members=members,
        experiment=experiment or "",
        room=room,
        plot=row.strings("plot") if "plot" in table else (),
        summary=row.text("summary", ""),
        evidence=row.one_of("evidence", EVIDENCE) if "evidence" in table else "real",
        evidence_note=row.text("evidence_note", ""),
        seeds=row.integer("seeds", range(1, 101)) if "seeds" in table else 3,
        timed=row.boolean("timed"),
        package=package,
    )


@dataclass(frozen=True)
class _Row:
    """One table of a document: typed reading with errors that name the field."""

    table: dict[str, Any]
    where: str
    package: str

    def fail(self, name: str, why: str) -> None:
        raise BadInput(f"{self.where}: field {name!r}: {why}")

    def known(self, of: type, *, extra: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> None:
        _known(self.table, (*(f.name for f in fields(of) if f.name not in without), *extra), self.where)

    def typed(self, name: str, of: type, default: Any = MISSING) -> Any:
        if name not in self.table:
            if default is MISSING:
                self.fail(name, "is missing")
            return default
        value = self.table[name]
        if not isinstance(value, of) or (of is int and isinstance(value, bool)):
            self.fail(name, f"must be {_KINDS[of]}, is {_KINDS.get(type(value), type(value).__name__)}")
        return value

    def text(self, name: str, default: Any = MISSING) -> str:
        return self.clean(name, self.typed(name, str, default), required=default is MISSING)

    def clean(self, name: str, value: str, *, required: bool = True) -> str:
        value = " ".join(value.split(" ")) if "\n" not in value else " ".join(value.split())
        if len(value) > MAX_TEXT:
            self.fail(name, f"has {len(value):,} characters, at most {MAX_TEXT:,}")
        if match := _INVISIBLE.search(value):
            self.fail(name, f"holds the control or invisible character U+{ord(match[0]):04X}")
        if required and not value.strip():
            self.fail(name, "is empty")
        return value.strip()

    def integer(self, name: str, allowed: range) -> int:
        value: int = self.typed(name, int)
        if value not in allowed:
            self.fail(name, f"must be between {allowed[0]} and {allowed[-1]}, is {str(value)[:20]}")
        return value

    def boolean(self, name: str) -> bool:
        return bool(self.typed(name, bool, False))

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in allowed:
            self.fail(name, f"must be one of {', '.join(allowed)}; is {value[:60]!r}")
        return value

    def id(self) -> str:
        value: str = self.typed("id", str)
        if len(value) > 64 or _ID.fullmatch(value) is None:
            self.fail("id", f"{value[:80]!r} must be 1 to 64 lower-case ASCII letters and digits, in words joined by single hyphens")
        return value

    def arxiv(self) -> str | None:
        value: str | None = self.typed("arxiv", str, None)
        if value is not None and _ARXIV.fullmatch(value) is None:
            self.fail("arxiv", f"{value[:80]!r} is not an arXiv number such as 2302.14311 (without version)")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        values = self.typed(name, list)
        if len(values) > 100:
            self.fail(name, f"holds {len(values)} items, at most 100")
        if any(not isinstance(value, str) for value in values):
            self.fail(name, "must be a list of strings")
        return tuple(self.clean(name, value) for value in values)

    def reference(self, name: str, kind: str) -> str | None:
        value: str | None = self.typed(name, str, None)
        if value is not None:
            self.owned(name, value, kind)
        return value

    def references(self, name: str) -> tuple[str, ...]:
        values = self.strings(name) if name in self.table else ()
        for value in values:
            self.owned(name, value, "object")
        return values

    def owned(self, name: str, value: str, kind: str) -> None:
        if problem := references.check(value, kind=kind):
            self.fail(name, problem)
        if references.top_level(value) not in ("neurarium", self.package):
            owners = "neurarium" if self.package == "neurarium" else f"{self.package} or neurarium"
            self.fail(name, f"{value!r} lies outside the package that declares it: its code must be in {owners}")

    def bound(self, name: str) -> str:
        value = self.text(name)
        try:
            Bound.parse(value)
        except BadInput as error:
            self.fail(name, str(error))
        return value

    def arms(self, name: str) -> dict[str, str] | None:
        table: dict[str, Any] | None = self.typed(name, dict, None)
        for key, value in (table or {}).items():
            if not isinstance(value, str) or _ARM.fullmatch(key) is None or _ARM.fullmatch(value) is None:
                self.fail(name, "must map names of method arms to names of baseline arms, as in { sltt = 'bptt' }")
        return table


_KINDS: dict[type, str] = {str: "a string", int: "an integer", bool: "true or false", list: "an array", dict: "a table", float: "a number"}


def _tables(document: dict[str, Any], name: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    tables = document.get(name, [])
    if not isinstance(tables, list) or any(not isinstance(t, dict) for t in tables):
        raise BadInput(f"{where}: field {name!r}: must be an array of tables, [[{name}]]")
    return list(enumerate(tables))


def _label(table: dict[str, Any], kind: str, index: int) -> str:
    name = table.get("id")
    return f"{kind} {name[:80]!r}" if isinstance(name, str) else f"{kind} number {index + 1}"


def _known(table: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in allowed:
            near = difflib.get_close_matches(key[:80], allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise BadInput(f"{where}: unknown field {key[:80]!r}; {hint}")
