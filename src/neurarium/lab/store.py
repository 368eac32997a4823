"""The folder of one run: ``OUT/ID/SCALE/`` with its lock, a part for every finished (seed, arm), and at the end the record and figure.

Whoever runs holds the lock (``flock``: it is gone the moment the process is, however it died); a second run of the same paper waits for
it. A part names the code, the scale and the settings that made it, and is used again only where all of them are the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neurarium.errors import RecordError
from neurarium.lab import strictjson
from neurarium.lab.files import atomic_write, clean, make_folder, read_regular
from neurarium.lab.names import check_id, check_scale
from neurarium.lab.record import ArmRun, SeedRun

__all__ = ["RunFolder"]

_PART = re.compile(r"(\d{1,10})(?:\.([A-Za-z][A-Za-z0-9_]*))?\.json")


class RunFolder:
    """One run's folder. Its name comes from checked ids, so that it lies under ``out``."""

    def __init__(self, out: Path | str, name: str, scale: str) -> None:
        self.path = make_folder(Path(out), check_id(name), check_scale(scale))
        self.parts = make_folder(self.path, "parts")
        self.record, self.figure = self.path / "record.json", self.path / "figure.png"

    @contextlib.contextmanager
    def locked(self, waiting: Callable[[str], None]) -> Iterator[bool]:
        """Hold the folder alone. Yields whether it had to wait; ``waiting`` is told for whom. A dead holder's lock is free at once."""
        path = self.path / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise RecordError(f"{path}: cannot be opened: {error.strerror or error}") from error
        try:
            waited = _lock(descriptor, lambda holder: waiting(f"{self.path} is being run by process {holder}; waiting for it"))
            with contextlib.suppress(OSError):  # the number helps whoever waits; a full disk must not stop us here
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            clean(self.path)
            clean(self.parts)
            yield waited
        finally:
            os.close(descriptor)

    def save(self, settings: Mapping[str, Any], part: ArmRun | SeedRun) -> None:
        """Write down what is finished: an arm at a seed, or a whole seed."""
        name = f"{part.seed}.{part.arm}.json" if isinstance(part, ArmRun) else f"{part.seed}.json"
        atomic_write(self.parts / name, strictjson.dumps({"settings": dict(settings), "part": part.to_dict()}))

    def load(self, settings: Mapping[str, Any]) -> tuple[dict[int, SeedRun], dict[tuple[int, str], ArmRun]]:
        """Finished seeds and arms that the same code made under the same settings. Anything else there is ignored, and replaced later."""
        seeds: dict[int, SeedRun] = {}
        runs: dict[tuple[int, str], ArmRun] = {}
        for path in sorted(self.parts.iterdir()):
            match = _PART.fullmatch(path.name)
            if match is None:
                continue
            with contextlib.suppress(RecordError):
                table = strictjson.loads(read_regular(path, strictjson.MAX_BYTES, follow=False), str(path))
                if not isinstance(table, dict) or table.get("settings") != dict(settings):
                    continue
                if match[2] is None:
                    seed = SeedRun.from_dict(table.get("part"), str(path))
                    if seed.seed == int(match[1]):
                        seeds[seed.seed] = seed
                else:
                    run = ArmRun.from_dict(table.get("part"), str(path))
                    if (run.seed, run.arm) == (int(match[1]), match[2]):
                        runs[run.seed, run.arm] = run
        return seeds, runs

    def forget(self) -> None:
        """Remove all parts; the last record and figure stay until new ones replace them."""
        for path in self.parts.iterdir():
            if _PART.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()


def _lock(descriptor: int, waiting: Callable[[int | str], None]) -> bool:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: parts are still written whole, but two runs of one paper are not kept apart
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(50):  # who took the lock writes its number a moment later
            if (holder := os.pread(descriptor, 20, 0)).isdigit():
                break
            time.sleep(0.01)
        waiting(int(holder) if holder.isdigit() else "another")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    except OSError:  # a file system without locks
        return False
    return False
