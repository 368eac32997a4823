"""The few errors that neurarium raises on purpose.

Each says what was wrong, where, and what would be right. All derive from :class:`NeurariumError`, so that a caller can catch the
family, and from the built-in error that a PyTorch user would expect, so that ordinary ``except ValueError`` code keeps working.
"""

from __future__ import annotations

__all__ = ["BadInput", "MissingData", "MissingExtra", "NeurariumError", "RecordError", "UnsupportedModel"]


class NeurariumError(Exception):
    """Base of all errors below."""


class UnsupportedModel(NeurariumError, TypeError):
    """A method cannot take this model. The message names the module that it cannot take and what it would accept."""

    def __init__(self, message: str, *, module: str | None = None) -> None:
        super().__init__(message if module is None else f"{module}: {message}")
        self.module = module


class BadInput(NeurariumError, ValueError):
    """An argument or the data cannot be used: wrong shape, empty, NaN, out of range. The message names it and the valid values."""


class MissingExtra(NeurariumError, ImportError):
    """An optional dependency is absent. The message names the pip extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'neurarium[{extra}]'")
        self.package, self.extra = package, extra


class MissingData(NeurariumError, FileNotFoundError):
    """A data set is neither in the cache nor in the mirror folder and could not be downloaded. Names the loader call and the URL."""

    def __init__(self, call: str, url: str | None, why: str = "") -> None:
        where = f"; its canonical source is {url}" if url else ""
        because = f" ({why})" if why else ""
        super().__init__(
            f"{call} found no data{because}{where}. Set NEURARIUM_DATA to a folder that holds a copy, "
            f"or run `neurarium data get` with a network connection."
        )
        self.call, self.url = call, url


class RecordError(NeurariumError, ValueError):
    """A record cannot be read, written or trusted. The message names the file and the field."""
