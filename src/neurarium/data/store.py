"""Where data sets lie: the mirror folder, the cache, and downloads into it.

A file is looked for in the mirror (``$NEURARIUM_DATA``, read only), then in the cache (``$NEURARIUM_CACHE``, otherwise
``~/.cache/neurarium``), then downloaded from its canonical address. A download goes to a temporary file, is compared with the
checksum that upstream publishes and is moved into place in one step, so that a killed download never leaves half a file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from neurarium.errors import BadInput, MissingData

__all__ = ["Remote", "Source", "atomic", "cache_dir", "locate", "mirror_dir", "obtain"]

TIMEOUT = 8.0  # seconds without an answer after which a download gives up
LIMIT = 1 << 30  # bytes: nothing in the registry is larger


@dataclass(frozen=True)
class Remote:
    """One file of a data set: its path in mirror and cache, its canonical address, and upstream's checksum where it publishes one."""

    path: str
    url: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Source:
    """One entry of the registry :data:`neurarium.data.SETS`."""

    name: str
    kind: str  # the loader: images, tabular, series, text, graph, audio, photos
    home: str  # a page or address that says where the data comes from
    licence: str
    note: str = ""
    embedded: str | None = None  # the package that carries it
    files: tuple[Remote, ...] = ()
    mirrored: tuple[str, ...] = field(default=())  # other forms that only a mirror folder holds, preferred in this order after `files`

    @property
    def call(self) -> str:
        return f'neurarium.data.{self.kind}("{self.name}")'


def cache_dir() -> Path:
    """The folder of downloads and decoded copies; it may not exist yet."""
    chosen = os.environ.get("NEURARIUM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(base) if base else Path("~/.cache").expanduser()) / "neurarium"


def mirror_dir() -> Path | None:
    """The read-only mirror folder, if ``$NEURARIUM_DATA`` names one."""
    chosen = os.environ.get("NEURARIUM_DATA")
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise BadInput(f"NEURARIUM_DATA names {str(folder)!r}, which is not a folder")
    return folder


def safe_name(name: str) -> str:
    """``name`` if it stays inside a folder that it is joined to, otherwise :class:`BadInput`."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0] or "\0" in name:
        raise BadInput(f"{name!r} is not a path inside the archive or data folder")
    return name


def locate(path: str) -> Path | None:
    """``path`` in the mirror or the cache, whichever has it first."""
    safe_name(path)
    folders = [mirror_dir(), cache_dir() / "data"]
    return next((f / path for f in folders if f is not None and (f / path).is_file()), None)


def obtain(remote: Remote, call: str) -> Path:
    """The local path of one file, downloaded if need be."""
    found = locate(remote.path)
    if found is not None:
        return found
    if remote.url is None:
        raise MissingData(call, None, f"{remote.path} is in no mirror folder and has no address to download it from")
    if os.environ.get("NEURARIUM_OFFLINE"):
        raise MissingData(call, remote.url, "NEURARIUM_OFFLINE forbids the download")
    target = cache_dir() / "data" / remote.path
    _download(remote, target, call)
    return target


@contextmanager
def atomic(target: Path) -> Iterator[IO[bytes]]:
    """A file opened for writing that becomes ``target`` in one step when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.parent / f".{target.name}.{secrets.token_hex(6)}.part"
    try:
        with part.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _sweep(folder: Path, age: float = 86_400.0) -> None:
    """Removes what killed downloads left a day ago or earlier."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > age:
                part.unlink()


def _download(remote: Remote, target: Path, call: str) -> None:
    assert remote.url is not None
    if not remote.url.startswith(("https://", "http://")):
        raise BadInput(f"{remote.url!r}: only http(s) addresses are downloaded")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        request = urllib.request.Request(remote.url, headers={"User-Agent": "neurarium"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, atomic(target) as out:
            expected, size = answer.headers.get("Content-Length"), 0
            while block := answer.read(1 << 20):
                size += len(block)
                if size > LIMIT:
                    raise MissingData(call, remote.url, f"the answer is larger than {LIMIT >> 20} MiB")
                digest.update(block)
                out.write(block)
            if expected is not None and size != int(expected):
                raise MissingData(call, remote.url, f"the connection broke after {size} of {expected} bytes")
            if remote.md5 is not None and digest.hexdigest() != remote.md5:
                raise MissingData(
                    call, remote.url, f"the download has MD5 {digest.hexdigest()}, upstream publishes {remote.md5}; it was deleted"
                )
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise MissingData(call, remote.url, f"the download failed: {reason}") from error
    except OSError as error:
        if isinstance(error, MissingData):
            raise
        raise MissingData(call, remote.url, f"saving it as {target} failed: {error.strerror or error}") from error
