"""The fingerprint of the code behind a record: it changes when the measured method changes, and only then.

It covers the experiment's ``run`` and everything of neurarium that ``run`` and the paper's ``use`` and ``also`` reach, one top-level
definition at a time: adding a function to an engine file changes no fingerprint, editing a helper that a method calls changes those
of all methods that reach it. Modules are parsed, never imported. Docstrings, comments, formatting and the experiment's ``figure`` do not
count; neither do the packages that only run, list, test or print experiments.

How names are followed: a name used in a reached definition is looked up among the module's own definitions, then its imports
(``from package.module import name``, re-exports of a package's ``__init__`` included; ``import package.module as alias`` and attributes
of it; imports inside functions too). Where in doubt, more is covered rather than less: top-level statements that are no definition
(a registration, a loop) count as soon as anything of their module is reached, and so do functions that a decorator of neurarium's own
registers. A package that resolves names lazily (a module-level ``__getattr__``) is searched for the name in its files. Code reached by
a computed name alone is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from neurarium.errors import BadInput

if TYPE_CHECKING:
    from neurarium.catalog import Comparison, Paper

__all__ = ["Code", "fingerprint"]

#: Packages that run, list, test and print: what they do changes no measurement.
APART = ("neurarium.lab", "neurarium.catalog", "neurarium.testing", "neurarium.cli", "neurarium.site")


def fingerprint(paper: Paper | Comparison, code: Code | None = None) -> str:
    """The sha256, in hexadecimal, of the code that a paper's or comparison's record depends on.

    ``code`` may hold what was already parsed for other papers; it must not outlive an edit.
    """
    if not paper.experiment:
        raise BadInput(f"{paper.id!r} has no experiment, so no code to fingerprint")
    references = [f"{paper.experiment}:run"]
    references += [reference for reference in (getattr(paper, "use", None), *getattr(paper, "also", ())) if reference]
    code = code or Code()
    code.add(reference.partition(":")[0].partition(".")[0] for reference in references)
    return code.digest(references)


_At: TypeAlias = "tuple[str, str]"  # a module and a name in it
_Seen: TypeAlias = "frozenset[_At]"


@dataclass(frozen=True)
class _Module:
    """A parsed module: its top-level statements by what they bind."""

    name: str
    package: str  # what relative imports are relative to
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # alias -> (module, name or None)
    stars: list[str] = field(default_factory=list)
    effects: list[ast.stmt] = field(default_factory=list)  # statements that matter as soon as the module is loaded
    registered: list[str] = field(default_factory=list)  # decorated definitions
    lazy: bool = False  # has a __getattr__


class Code:
    """The source of some top-level packages, followed statically."""

    def __init__(self, packages: Iterable[str] = ("neurarium",)) -> None:
        self._roots: dict[str, Path] = {}
        self._files: dict[str, _Module | None] = {}
        self._edges: dict[_At, list[_At]] = {}
        self._texts: dict[_At, bytes] = {}
        self.add(packages)

    def add(self, packages: Iterable[str]) -> None:
        """Follow names into these top-level packages too."""
        for name in set(packages) - set(self._roots):
            root = _package_root(name)
            if root is not None:
                self._roots[name] = root
                self._edges.clear()
                self._files = {known: module for known, module in self._files.items() if module is not None}

    def digest(self, references: Iterable[str]) -> str:
        """The hash over everything that the references (``module:object``) reach."""
        hasher = hashlib.sha256()
        for at, statements in sorted(self.reached(references).items()):
            if at not in self._texts:
                self._texts[at] = "\n".join([f"\n{at[0]}:{at[1]}", *map(_normal, statements)]).encode()
            hasher.update(self._texts[at])
        return hasher.hexdigest()

    def reached(self, references: Iterable[str]) -> dict[_At, list[ast.stmt]]:
        """(module, name) -> the statements that bind it, for all that the references reach. The empty name holds a module's effects."""
        found: dict[_At, list[ast.stmt]] = {}
        todo: list[_At] = []
        for reference in references:
            where, _, name = reference.partition(":")
            targets = list(self._lookup(where, name.partition(".")[0]))
            if not targets:
                raise BadInput(f"{reference!r}: no such definition in the source of {where.partition('.')[0]!r}")
            todo += targets
        while todo:
            at = todo.pop()
            if at in found:
                continue
            module = self._module(at[0])
            assert module is not None
            found[at] = module.effects if at[1] == "" else module.definitions[at[1]]
            if at not in self._edges:
                edges = [target for statement in found[at] for target in self._uses(module, statement)]
                if at[1] == "":
                    edges += [(at[0], name) for name in module.registered if self._registers(module, name)]
                self._edges[at] = list(dict.fromkeys([(at[0], ""), *edges]))
            todo += self._edges[at]
        return {at: statements for at, statements in found.items() if statements}

    def _uses(self, module: _Module, statement: ast.stmt) -> Iterator[_At]:
        """The definitions that a statement names."""
        local = _Module(module.name, module.package)
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                _add_import(local, node)
        for node in ast.walk(statement):
            chain = _chain(node)
            if chain:
                yield from self._follow(module, local, chain)

    def _follow(self, module: _Module, local: _Module, chain: list[str]) -> Iterator[_At]:
        if chain[0] in local.imports:
            yield from self._imported(local.imports[chain[0]], chain[1:])
        yield from self._lookup(module.name, chain[0], chain[1:])

    def _lookup(self, name: str, attribute: str, rest: list[str] | None = None, seen: _Seen = frozenset()) -> Iterator[_At]:
        """Where ``attribute`` of a module is defined: there, or where it imports it from."""
        module = self._module(name)
        if module is None or (name, attribute) in seen:
            return
        seen |= {(name, attribute)}
        if attribute in module.definitions:
            yield name, attribute
        elif attribute in module.imports:
            yield (name, "")  # passing through a module runs it
            yield from self._imported(module.imports[attribute], rest or [], seen)
        elif self._module(f"{name}.{attribute}") is not None:
            yield from self._imported((f"{name}.{attribute}", None), rest or [], seen)
        else:
            found = [target for star in module.stars for target in self._lookup(star, attribute, rest, seen)]
            if not found and module.lazy:
                found = [(inner, attribute) for inner in self._below(name) if attribute in (self._module(inner) or module).definitions]
            yield from found

    def _imported(self, target: tuple[str, str | None], rest: list[str], seen: _Seen = frozenset()) -> Iterator[_At]:
        name, attribute = target
        if attribute is not None:
            yield from self._lookup(name, attribute, rest, seen)
        elif self._module(name) is not None:
            yield (name, "")
            if rest:
                yield from self._lookup(name, rest[0], rest[1:], seen)

    def _registers(self, module: _Module, name: str) -> bool:
        """Whether a decorator of a definition is one of ours: it may register it somewhere."""
        for statement in module.definitions[name]:
            for decorator in getattr(statement, "decorator_list", ()):
                chain = _chain(decorator.func if isinstance(decorator, ast.Call) else decorator)
                if chain and any(True for _ in self._follow(module, module, chain)):
                    return True
        return False

    def _module(self, name: str) -> _Module | None:
        """The parsed module of ours by this name; None if it is not ours or set apart."""
        if name not in self._files:
            path = self._path(name)
            self._files[name] = None if path is None else _parse(name, str(path), path.stat().st_mtime_ns, path.stat().st_size)
        return self._files[name]

    def _path(self, name: str) -> Path | None:
        top, *inner = name.split(".")
        root = self._roots.get(top)
        if root is None or any(name == apart or name.startswith(apart + ".") for apart in APART):
            return None
        if root.is_file():
            return None if inner else root
        base = root.joinpath(*inner)
        for path in (base / "__init__.py", base.parent / f"{base.name}.py") if inner else (base / "__init__.py",):
            if path.is_file():
                return path
        return None

    def _below(self, name: str) -> list[str]:
        path = self._path(name)
        if path is None or path.name != "__init__.py":
            return []
        files = sorted(path.parent.rglob("*.py"))
        return [".".join([name, *file.relative_to(path.parent).with_suffix("").parts]) for file in files if file.name != "__init__.py"]


def _package_root(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


@lru_cache(maxsize=4096)
def _parse(name: str, path: str, changed: int, size: int) -> _Module:
    del changed, size  # part of the key: an edited file is read again
    tree = ast.parse(Path(path).read_bytes(), path)
    is_package = path.endswith("__init__.py")
    module = _Module(name, name if is_package else name.rpartition(".")[0])
    lazy = False
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.definitions.setdefault(statement.name, []).append(statement)
            lazy |= statement.name == "__getattr__"
            if statement.decorator_list:
                module.registered.append(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            _add_import(module, statement)
        elif names := _assigned(statement):
            for bound in names:
                module.definitions.setdefault(bound, []).append(statement)
        elif not _is_docstring(statement) and not _is_type_checking(statement):
            module.effects.append(statement)
            for node in ast.walk(statement):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    _add_import(module, node)
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    module.definitions.setdefault(node.name, []).append(statement)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    module.definitions.setdefault(node.id, []).append(statement)
    return module if not lazy else _Module(**{**module.__dict__, "lazy": True})


def _assigned(statement: ast.stmt) -> list[str]:
    """The names that a plain assignment binds; none if it also changes something that exists."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    leaves = [leaf for target in targets for leaf in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])]
    names = [leaf.id for leaf in leaves if isinstance(leaf, ast.Name)]
    return names if len(names) == len(leaves) else []


def _add_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            target = alias.name if alias.asname else alias.name.partition(".")[0]
            module.imports[alias.asname or target] = (target, None)
        return
    base = node.module or ""
    if node.level:
        parent = module.package.split(".")
        base = ".".join([*parent[: len(parent) - node.level + 1], *([base] if base else [])])
    for alias in node.names:
        if alias.name == "*":
            module.stars.append(base)
        else:
            module.imports[alias.asname or alias.name] = (base, alias.name)


def _chain(node: ast.AST) -> list[str]:
    """``a.b.c`` as ['a', 'b', 'c']; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and (_chain(node.test) or [""])[-1] == "TYPE_CHECKING" and not node.orelse


def _normal(node: Any) -> str:
    """The syntax tree as text, the same from every Python: no positions, no docstrings, nothing that is empty."""
    if isinstance(node, list):
        return "[" + ",".join(_normal(item) for item in node if not _is_docstring(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    if isinstance(node, ast.JoinedStr):  # Python 3.12 leaves empty pieces in formatted strings
        node = ast.JoinedStr([value for value in node.values if not (isinstance(value, ast.Constant) and value.value == "")])
    for name, value in ast.iter_fields(node):
        if (value is None and not isinstance(node, ast.Constant)) or value == [] or name in ("ctx", "kind", "type_comment"):
            continue
        parts.append(f"{name}={_normal(value)}")
    return f"{type(node).__name__}({','.join(parts)})"
