"""A crash in words that may be published: the traceback without the folders of the machine that it happened on."""

from __future__ import annotations

import re
import traceback
from pathlib import PurePath

__all__ = ["describe", "printable", "without_paths"]

LIMIT = 4_000  # characters; the end of a traceback says most
FRAMES = 15

_PATH = re.compile(r"(?<![\w/:.~-])~?(?:/[^\s/'\"<>|:,;()\[\]{}]+)+/([^\s/'\"<>|:,;()\[\]{}]+)")
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\s\\'\"<>|:]+\\)*([^\s\\'\"<>|:]*)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def describe(error: BaseException) -> str:
    """The last frames and the message. Files are named from their package on, messages keep no folder."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "neurarium/lab/" not in _package_path(frame.filename)]
    lines = [f'  File "{_package_path(f.filename)}", line {f.lineno}, in {f.name}\n    {f.line or ""}' for f in frames[-FRAMES:]]
    message = "".join(traceback.format_exception_only(error)).strip()
    text = without_paths("\n".join(["Traceback (most recent call last):", *lines, message]) if lines else message)
    return text if len(text) <= LIMIT else "...\n" + text[-LIMIT:]


def without_paths(text: str) -> str:
    """Every absolute path cut down to its last part; web addresses stay."""
    return printable(_WINDOWS_PATH.sub(r"\1", _PATH.sub(r"\1", text)))


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return _CONTROL.sub("?", text)


def _package_path(filename: str) -> str:
    parts = PurePath(filename).parts
    for marker in ("site-packages", "dist-packages", "src"):
        if marker in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(marker) :])
    return "/".join(parts[len(parts) - parts[::-1].index("neurarium") - 1 :]) if "neurarium" in parts else parts[-1] if parts else filename
