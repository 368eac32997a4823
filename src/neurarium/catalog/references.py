"""References to code: ``package.module`` and ``package.module:object``, checked as text and imported only on demand."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from neurarium.errors import BadInput, NeurariumError

__all__ = ["check", "resolve", "top_level"]

_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_MODULE = re.compile(rf"{_NAME}(?:\.{_NAME})*")
_OBJECT = re.compile(rf"({_NAME}(?:\.{_NAME})+):({_NAME}(?:\.{_NAME})*)")


def check(text: str, *, kind: str) -> str:
    """Return what is wrong with a reference, or ''. ``kind`` is 'module' or 'object'; nothing is imported."""
    pattern, form = (_OBJECT, "package.module:object") if kind == "object" else (_MODULE, "package.module")
    if len(text) > 200 or pattern.fullmatch(text) is None:
        return f"{text[:200]!r} must be written as {form!r}: dotted names that start with a letter, ASCII letters, digits and _ only"
    return ""


def top_level(text: str) -> str:
    """The top-level package of a reference."""
    return text.partition(":")[0].partition(".")[0]


def resolve(text: str) -> Any:
    """Import a reference and return the module or the object that it names.

    Raises :class:`~neurarium.errors.BadInput` if it is malformed, absent, or names a module where an object was promised.
    """
    kind = "object" if ":" in text else "module"
    if problem := check(text, kind=kind):
        raise BadInput(problem)
    name, _, path = text.partition(":")
    try:
        target: Any = importlib.import_module(name)
    except NeurariumError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise BadInput(f"{text!r}: there is no module {error.name!r}") from error
        raise
    for part in path.split(".") if path else ():
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise BadInput(f"{text!r}: {name!r} has no {path!r}") from error
    if path and isinstance(target, ModuleType):
        raise BadInput(f"{text!r} names a module, not an object")
    return target
