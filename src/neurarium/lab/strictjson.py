"""JSON as records use it: nothing that two readers could understand differently, nothing that can exhaust this one.

Reading refuses more than a megabyte, more than twelve levels of nesting, the same key twice, NaN and Infinity literals (not JSON),
and control characters in strings (records are printed to terminals). Writing spells a float that is not finite as the string
``"nan"``, ``"inf"`` or ``"-inf"``; :func:`number` reads it back.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from neurarium.errors import RecordError

__all__ = ["MAX_BYTES", "dumps", "line", "loads", "number"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 12

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def dumps(value: Any) -> bytes:
    """UTF-8 JSON, indented two levels deep: a table of numbers stays on few lines, and differences between records stay readable."""
    return (_indented(_plain(value), 0) + "\n").encode("utf-8")


def line(value: Any) -> bytes:
    """The same on one line, for a pipe."""
    return json.dumps(_plain(value), ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def loads(data: bytes, where: str) -> Any:
    """The value of a JSON document; :class:`~neurarium.errors.RecordError` naming ``where`` otherwise."""
    if len(data) > MAX_BYTES:
        raise RecordError(f"{where}: larger than {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not UTF-8 text (byte {error.start})") from None
    _check_depth(text, where)
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where), parse_constant=lambda name: _refuse(name, where))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or an integer too long to convert
        raise RecordError(f"{where}: not valid JSON: {error}") from None
    _check_strings(value, where)
    return value


def number(value: Any) -> float | int | bool | None:
    """A JSON number, or the float that ``"nan"``, ``"inf"`` or ``"-inf"`` stands for; None if it is neither."""
    if isinstance(value, str):
        return _SPECIAL.get(value)
    if isinstance(value, bool | float):
        return None if isinstance(value, float) and not math.isfinite(value) else value  # 1e999 reads as inf
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _indented(value: Any, level: int) -> str:
    if level < 3 and isinstance(value, dict) and value and any(isinstance(v, dict | list) for v in value.values()):
        rows = [f"{json.dumps(k)}: {_indented(v, level + 1)}" for k, v in value.items()]
        brackets = "{}"
    elif level < 3 and isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        rows, brackets = [_indented(v, level + 1) for v in value], "[]"
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    pad = " " * (level + 1)
    return brackets[0] + "\n" + ",\n".join(pad + row for row in rows) + "\n" + " " * level + brackets[1]


def _check_depth(text: str, where: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise RecordError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        elif match[0] in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"{where}: field {twice[:80]!r} appears twice")
    return table


def _refuse(name: str, where: str) -> Any:
    raise RecordError(f"{where}: {name} is not JSON; a number that is not finite is written as the string 'nan', 'inf' or '-inf'")


def _check_strings(value: Any, where: str) -> None:
    if isinstance(value, str):
        if match := _CONTROL.search(value):
            raise RecordError(f"{where}: a string holds the control character U+{ord(match[0]):04X}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key, where)
            _check_strings(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, where)
