"""Names that become files, columns and expressions: papers' ids, arms, metrics.

Ids become folders, so they hold nothing that a path could misread; arms and metrics become ``arm.metric`` in a claim's measure, so
they are ASCII identifiers. Everything that comes from a record, a catalog or a command line passes through here before it is used.
"""

from __future__ import annotations

import keyword
import re

from neurarium.errors import BadInput

__all__ = ["SCALES", "check_id", "check_name", "check_scale"]

#: ``smoke``: a few seconds, runs through in tests, claims not judged. ``laptop``: minutes on two cores, every claim judged.
SCALES = ("smoke", "laptop")

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def check_id(value: object, what: str = "id") -> str:
    """Return an id of a paper, a comparison or a room, or raise :class:`~neurarium.errors.BadInput`."""
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise BadInput(f"{what} {_short(value)} must be 1 to 64 lower-case ASCII letters, digits and hyphens, and start with no hyphen")
    return value


def check_name(value: object, what: str = "name") -> str:
    """Return the name of an arm, a metric, a curve or a grid, or raise :class:`~neurarium.errors.BadInput`."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None or keyword.iskeyword(value):
        raise BadInput(f"{what} {_short(value)} must be a Python identifier of at most 64 ASCII characters that starts with a letter")
    return value


def check_scale(value: object) -> str:
    """Return the name of a scale, or raise :class:`~neurarium.errors.BadInput`."""
    if value not in SCALES:
        raise BadInput(f"scale {_short(value)} is unknown; scales are {', '.join(SCALES)}")
    return str(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
