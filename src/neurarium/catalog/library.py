"""The catalog as a whole: loading, looking up, filtering and searching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from neurarium.catalog import plugins
from neurarium.catalog.schema import MAX_BYTES, ROLES, STATUSES, Comparison, Paper, parse
from neurarium.errors import BadInput

if TYPE_CHECKING:
    from neurarium.catalog.search import Index

__all__ = ["Catalog", "load", "load_files"]

_ROOMS = Path(__file__).parent / "rooms"


@dataclass(frozen=True, eq=False)
class Catalog:
    """All papers and comparisons, in the order of their rooms' files. ``problems`` tells of plug-in catalogs that were left out."""

    papers: tuple[Paper, ...]
    comparisons: tuple[Comparison, ...] = ()
    problems: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.papers)

    def __iter__(self) -> Iterator[Paper]:
        return iter(self.papers)

    def __contains__(self, id: object) -> bool:
        return id in self._by_id

    @cached_property
    def _by_id(self) -> dict[str, Paper]:
        return {paper.id: paper for paper in self.papers}

    @property
    def rooms(self) -> tuple[str, ...]:
        """The rooms that hold a paper or a comparison."""
        entries: list[Paper | Comparison] = [*self.papers, *self.comparisons]
        return tuple(dict.fromkeys(entry.room for entry in entries))

    def get(self, id: str) -> Paper:
        """The paper of this id; :class:`~neurarium.errors.BadInput` that suggests near ids otherwise."""
        try:
            return self._by_id[id]
        except KeyError:
            raise BadInput(f"no paper has the id {id[:80]!r}{_near(id, self._by_id)}") from None

    def comparison(self, id: str) -> Comparison:
        """The comparison of this id; :class:`~neurarium.errors.BadInput` that suggests near ids otherwise."""
        known = {comparison.id: comparison for comparison in self.comparisons}
        if id in known:
            return known[id]
        hint = _near(id, known) if known else "; the catalog has no comparison yet"
        raise BadInput(f"no comparison has the id {id[:80]!r}{hint}")

    def filter(self, *, room: str | None = None, role: str | None = None, status: str | None = None) -> tuple[Paper, ...]:
        """The papers of a room, a role and a status; ``None`` means any."""
        _check("room", room, self.rooms)
        _check("role", role, ROLES)
        _check("status", status, STATUSES)
        return tuple(p for p in self.papers if room in (None, p.room) and role in (None, p.role) and status in (None, p.status))

    def search(self, query: str, *, limit: int = 20) -> list[tuple[Paper, float]]:
        """The papers that match some word of the query, best first, each with its score. See :mod:`neurarium.catalog.search`."""
        found = [(self.papers[i], score) for i, score in self._index.search(query, limit=limit)]
        named = self._by_id.get(query.strip())
        if named is None:
            return found
        best = found[0][1] if found else 0.0  # an id names its paper, wherever else its words occur
        return [(named, best), *(pair for pair in found if pair[0] is not named)][:limit]

    @cached_property
    def _index(self) -> Index:
        from neurarium.catalog.search import Index

        return Index(
            {
                "id": p.id,
                "title": p.title,
                "summary": p.summary,
                "room": p.room,
                "role": p.role,
                "claims": " ".join(c.says for c in p.claims),
            }
            for p in self.papers
        )


@lru_cache(maxsize=1)
def load() -> Catalog:
    """neurarium's own catalog and those of installed plug-ins. A plug-in that cannot be read is left out and told of in ``problems``."""
    own = load_files(sorted(_ROOMS.glob("*.toml")))
    return plugins.extend(own)


def load_files(files: Iterable[Path], package: str = "neurarium") -> Catalog:
    """A catalog from TOML files, each named ``ROOM.toml``. ``package`` is the top-level package that holds the code referred to."""
    papers: list[Paper] = []
    comparisons: list[Comparison] = []
    for file in files:
        new_papers, new_comparisons = parse(read(file), str(Path(*file.parts[-2:])), file.stem, package)
        papers += new_papers
        comparisons += new_comparisons
    return join(Catalog(tuple(papers), tuple(comparisons)), Catalog(()))


def read(file: Path) -> bytes:
    """A regular file's bytes, within the limit on size."""
    try:
        if not file.is_file():
            raise BadInput(f"{file.name}: not a regular file")
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{file.name}: cannot be read: {error.strerror}") from None


def join(base: Catalog, more: Catalog) -> Catalog:
    """Both catalogs as one; ids may not collide, and the members of every comparison must exist."""
    seen: dict[str, str] = {}
    entries: list[Paper | Comparison] = [*base.papers, *base.comparisons, *more.papers, *more.comparisons]
    for entry in entries:
        if entry.id in seen:
            raise BadInput(f"room {entry.room!r} ({entry.package}): {entry.id!r}: field 'id': already taken in {seen[entry.id]}")
        seen[entry.id] = f"room {entry.room!r} ({entry.package})"
    papers = {paper.id for paper in (*base.papers, *more.papers)}
    for comparison in more.comparisons or base.comparisons:
        for member in comparison.members:
            if member not in papers:
                raise BadInput(f"comparison {comparison.id!r}: field 'members': no paper has the id {member!r}{_near(member, papers)}")
    return Catalog(base.papers + more.papers, base.comparisons + more.comparisons, base.problems + more.problems)


def _near(id: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    names = list(known)
    near = get_close_matches(id[:80].lower(), names, 3, 0.6) or [name for name in names if id and name.startswith(id.lower())][:3]
    return f"; did you mean {' or '.join(near)}?" if near else "; `neurarium list` shows them all"


def _check(name: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in (names := list(known)):
        from difflib import get_close_matches

        near = get_close_matches(value[:80], names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise BadInput(f"no paper has the {name} {value[:80]!r}; {hint}")
