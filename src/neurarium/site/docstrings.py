"""Reads what a method's file says of itself: the parts of its docstring, as Markdown. No code is imported."""

from __future__ import annotations

import ast
import html
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Told", "imports", "markdown", "public", "source_file", "told"]

#: The parts that a method's docstring names, by the word that it begins them with.
PARTS = ("equations", "source", "departures", "cost", "licence")
_WORDS = "The idea|Equations?|Sources?|Departures?|Costs?|Licence"
_PART = re.compile(rf"^\*{{0,2}}({_WORDS})\.?\*{{0,2}}(?=[.:,]|\s|$)[.:]?\s*\*{{0,2}}", re.MULTILINE)
_DISPLAY = re.compile(r"^\.\. math::\s*\n((?:[ \t]+\S.*\n?|[ \t]*\n(?=[ \t]+\S))+)", re.MULTILINE)


@dataclass(frozen=True)
class Told:
    """A docstring in parts: its first sentence, the idea, and the parts of :data:`PARTS` that it has, all as Markdown."""

    title: str = ""
    idea: str = ""
    parts: dict[str, str] = field(default_factory=dict)


def told(reference: str) -> Told:
    """What the docstring of ``module:object``, or else of its module, says. The module's is read where the object's has no departures."""
    module, _, name = reference.partition(":")
    file = source_file(module)
    if file is None:
        return Told()
    tree = _tree(file)
    own = next((n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name), None)
    texts = [ast.get_docstring(tree) or "", (ast.get_docstring(own) or "") if own is not None else ""]
    text = next((t for t in reversed(texts) if re.search(r"^\*{0,2}Departures", t, re.MULTILINE)), texts[0] or texts[1])
    return split(text)


def split(text: str) -> Told:
    """A docstring in parts."""
    first, _, rest = text.strip().partition("\n\n")
    marks = list(_PART.finditer(rest))
    idea = rest[: marks[0].start()] if marks else rest
    parts: dict[str, str] = {}
    for i, mark in enumerate(marks):
        body = rest[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else len(rest)].strip("\n ").removeprefix(",").strip("\n ")
        body = body[:1].upper() + body[1:]
        kind = mark[1].lower()
        if kind == "the idea":
            idea += "\n\n" + body
            continue
        key = next(part for part in PARTS if part.startswith(kind.rstrip("s")))
        parts[key] = "\n\n".join(filter(None, (parts.get(key, ""), markdown(body))))
    return Told(" ".join(markdown(first).split()), markdown(idea), parts)


def markdown(text: str) -> str:
    """A docstring's reStructuredText and indented formulas as Markdown, formulas as MathML where they are TeX."""
    text = _DISPLAY.sub(lambda m: f"\n{_mathml(m[1], 'block')}\n\n", text)
    text = re.sub(r":math:`([^`]+)`", lambda m: _mathml(m[1], "inline"), text)
    text = re.sub(r":[a-z]+:`~?([\w.]+)`", lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", text)
    text = re.sub(r"(?<!`)``([^`]+)``(?!`)", r"`\1`", text)
    lines: list[str] = []
    for line in text.strip("\n").splitlines():
        if lines and line.startswith("    ") and lines[-1].strip() and not lines[-1].startswith("    ") and not _item(lines[-1]):
            lines.append("")  # Markdown needs an empty line before a block
        elif lines and _item(line) and lines[-1].strip() and not _item(lines[-1]) and not lines[-1].startswith("  "):
            lines.append("")
        lines.append(line)
    return "\n".join(_escape(line) for line in lines).strip("\n")


def _item(line: str) -> bool:
    return bool(re.match(r"\s*[-*] ", line))


def _escape(line: str) -> str:
    """Angle brackets and stars of formulas, which Markdown would take for its own, outside of code and MathML."""
    if line.startswith("    ") or "<math" in line:
        return line
    pieces = re.split(r"(`[^`]*`)", line)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"(?<=\w)_(?=\W|\w)", r"\\_", html.escape(pieces[i], quote=False))
        pieces[i] = re.sub(r"(?<=[\w)\]}])(\*| \* )(?=[\w(])", lambda m: m[0].replace("*", r"\*"), pieces[i])
    return "".join(pieces)


def _mathml(tex: str, display: str) -> str:
    tex = " ".join(tex.split())
    try:
        from latex2mathml.converter import convert

        return convert(tex, display=display)
    except Exception:  # shown as it is written
        return f"`{tex}`"


def source_file(module: str) -> Path | None:
    """The file of a module; its parent packages are imported only as far as ``find_spec`` does, so None where that fails."""
    parts = module.split(".")
    spec = find_spec(parts[0])
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(folder).joinpath(*parts[1:])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=1024)
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public(module: str) -> list[tuple[str, str]]:
    """The public classes and functions of a module, each with the first line of its docstring."""
    file = source_file(module)
    if file is None:
        return []
    nodes = [n for n in _tree(file).body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
    return [(n.name, (ast.get_docstring(n) or "").partition("\n")[0]) for n in nodes]


def first_line(module: str) -> str:
    """The first sentence of a module's docstring."""
    file = source_file(module)
    if file is None:
        return ""
    return " ".join((ast.get_docstring(_tree(file)) or "").partition("\n\n")[0].split())


def imports(module: str) -> set[str]:
    """The modules that a module's top level imports from, by full name."""
    file = source_file(module)
    if file is None:
        return set()
    found: set[str] = set()
    for node in _tree(file).body:  # not those of a function or for type checking alone
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if source_file(f"{node.module}.{alias.name}")}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
