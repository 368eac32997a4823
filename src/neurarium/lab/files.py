"""Reading and writing that neither loses what was there nor trusts what it finds.

A file is written to a temporary name in the same folder, flushed to the disk, and renamed over the old one: a reader sees the old
content or the new, never half of either, whatever is killed in between. A full disk or an unwritable folder is a
:class:`~neurarium.errors.RecordError` that leaves the old file and no litter.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from neurarium.errors import RecordError

__all__ = ["atomic_write", "clean", "make_folder", "read_regular"]


def atomic_write(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RecordError(f"{path}: cannot be written: {error.strerror or error}; what was there is kept") from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # the rename itself reaches the disk; not every file system can promise it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(root: Path, *parts: str) -> Path:
    """Create ``root/part/part/...`` and return it. Below ``root`` no folder may be a symbolic link: a name must not lead elsewhere."""
    folder = root
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            folder = folder / part
            if folder.is_symlink():
                raise RecordError(f"{folder}: is a symbolic link; a run folder must be a real one")
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RecordError(f"{folder}: cannot be made a folder: {error.strerror or error}") from error
    return folder


def read_regular(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; never blocks on a pipe or a device."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"{path}: is not a regular file")
        if status.st_size > limit:
            raise RecordError(f"{path}: {status.st_size:,} bytes, at most {limit:,} are read")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(limit + 1)
    finally:
        os.close(descriptor)


def clean(folder: Path) -> None:
    """Remove what a killed writer left behind. The caller holds the folder's lock."""
    for litter in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            litter.unlink()
