"""Catalogs of other packages, found through the entry-point group ``neurarium.catalog``.

In the other package's ``pyproject.toml``::

    [project.entry-points."neurarium.catalog"]
    acme = "acme.papers"            # every *.toml in the folder acme/papers
    extra = "acme.papers:vision"    # or only acme/papers/vision.toml

The folder is found without importing the package, so listing papers never runs a plug-in's code. Its entries may refer to code of the
plug-in's own top-level package and of neurarium only, and that code is imported when the user runs one of them. A plug-in that is
broken, or whose ids collide with others, is left out as a whole; :attr:`Catalog.problems` says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from neurarium.errors import BadInput

if TYPE_CHECKING:
    from neurarium.catalog.library import Catalog

__all__ = ["GROUP", "extend", "files"]

GROUP = "neurarium.catalog"
MAX_FILES = 200
_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_VALUE = re.compile(rf"({_NAME})((?:\.{_NAME})*)(?::([a-z0-9]+(?:-[a-z0-9]+)*))?")


def extend(base: Catalog, found: Iterable[EntryPoint] | None = None) -> Catalog:
    """``base`` with the entries of every plug-in that can be read."""
    from neurarium.catalog.library import Catalog, join, load_files

    for point in sorted(entry_points(group=GROUP) if found is None else found, key=lambda point: (point.name, point.value)):
        try:
            package = _match(point.value)[1]
            base = join(base, load_files(files(point.value), package))
        except BadInput as error:
            problem = f"plug-in catalog {_plain(point.name)!r} ({_plain(point.value)}) is left out: {_plain(str(error))}"
            base = Catalog(base.papers, base.comparisons, (*base.problems, problem))
    return base


def files(value: str) -> list[Path]:
    """The TOML files that an entry point names; nothing is imported."""
    match = _match(value)
    folders = [folder.joinpath(*match[2].split(".")[1:]) for folder in _package_folders(match[1])]
    if not folders:
        raise BadInput(f"there is no package {match[1]!r} with a folder of its own")
    if match[3]:
        found = [folder / f"{match[3]}.toml" for folder in folders if (folder / f"{match[3]}.toml").is_file()]
    else:
        found = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.toml"))]
    if not found:
        raise BadInput("it names no TOML file")
    if len(found) > MAX_FILES:
        raise BadInput(f"it holds {len(found)} files, at most {MAX_FILES}")
    roots = [folder.resolve() for folder in _package_folders(match[1])]
    for file in found:
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise BadInput(f"{file.name} is a link that leads out of the package")
    return found


def _match(value: str) -> re.Match[str]:
    match = _VALUE.fullmatch(value) if len(value) <= 200 else None
    if match is None:
        raise BadInput("an entry point must be 'package.folder' or 'package.folder:room'")
    if match[1] == "neurarium":
        raise BadInput("a plug-in must have a package of its own")
    return match


def _package_folders(name: str) -> Iterator[Path]:
    from importlib.util import find_spec

    try:
        spec = PathFinder.find_spec(name) or find_spec(name)  # of a top-level name: locates it, imports nothing
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:500]
