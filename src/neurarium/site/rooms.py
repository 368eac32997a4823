"""The rooms as the site shows them: name, purpose, colour, and their engine read from the code."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from neurarium.site.diagram import diagram
from neurarium.site.docstrings import first_line, imports, source_file
from neurarium.site.facts import Facts

__all__ = ["Room", "engine", "room"]

FOUNDATION = ("neurarium.nn", "neurarium.learn", "neurarium.data", "neurarium.meter")
MOST = 18  # boxes of one picture; what few use is left out first


@dataclass(frozen=True)
class Room:
    """How a room is presented."""

    id: str
    name: str
    purpose: str = ""
    pick: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _table() -> dict[str, dict]:
    return tomllib.loads(Path(__file__).with_name("rooms.toml").read_text(encoding="utf-8"))


def room(id: str) -> Room:
    """A room of neurarium's or, by its bare name, of a plug-in."""
    return Room(id, **_table().get(id, {"name": id.replace("-", " ").capitalize()}))


def engine(id: str, papers: list[Facts]) -> str:
    """The room's modules and what they build on, as a picture drawn from their imports; empty where there is no code yet."""
    package = f"neurarium.{id}"
    modules = _modules(package)
    used = {module: {name for name in imports(module) if name in modules and name != module} for module in modules}
    shared = {module: sum(module in names for names in used.values()) for module in modules}
    methods = {use.partition(":")[0]: one for one in papers if (use := getattr(one.entry, "use", None))}
    chosen = [m for m in modules if m in methods or shared[m]]
    chosen.sort(key=lambda m: (m not in methods, -shared[m]))
    chosen = [m for m in modules if m in set(chosen[:MOST])]
    if not any(m in methods for m in chosen):
        return ""
    below = sorted(
        {base for m in chosen for base in FOUNDATION for name in imports(m) if base != package and (name + ".").startswith(base + ".")}
    )
    nodes = {m: (m.removeprefix(package + "."), _short(m)) for m in chosen} | {b: (b.removeprefix("neurarium."), _short(b)) for b in below}
    edges = [(m, u) for m in chosen for u in sorted(used[m]) if u in nodes]
    edges = _reduced(edges)
    feet = {m for m in chosen if not any(a == m for a, _ in edges)}
    edges += [(m, b) for m in chosen for b in below if m in feet and any((n + ".").startswith(b + ".") for n in imports(m))]
    edges += [
        (m, b) for b in below if not any(y == b for _, y in edges) for m in chosen if any((n + ".").startswith(b + ".") for n in imports(m))
    ][:2]
    kinds = {m: "method" if m in methods else "shared" for m in chosen} | dict.fromkeys(below, "base")
    links = {m: f"../{methods[m].url}" for m in chosen if m in methods}
    return diagram(
        nodes, edges, title=f"The engine of the room {id}: its methods above the modules that they share", kinds=kinds, links=links
    )


def _modules(package: str) -> list[str]:
    file = source_file(package)
    if file is None or file.name != "__init__.py":
        return []
    found = []
    for path in sorted(file.parent.rglob("*.py")):
        if path.name != "__init__.py" and not path.name.startswith("_"):
            found.append(".".join((package, *path.relative_to(file.parent).with_suffix("").parts)))
    return found


def _short(module: str) -> str:
    return first_line(module).rstrip(".").partition(":")[0].partition(",")[0]


def _reduced(edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without the arrows that a longer way makes superfluous."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)

    def reach(start: str, seen: set[str]) -> set[str]:
        for b in after.get(start, ()):
            if b not in seen:
                seen.add(b)
                reach(b, seen)
        return seen

    return [(a, b) for a, b in edges if not any(b in reach(c, set()) for c in after[a] if c not in (a, b) and a not in reach(c, set()))]
