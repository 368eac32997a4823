"""The records' figures, redrawn at build time and kept in a cache by what they are drawn from."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from neurarium.catalog import Comparison, Paper
from neurarium.site.docstrings import source_file

if TYPE_CHECKING:
    from neurarium.lab import Record

__all__ = ["draw_all", "thumbnail"]

log = logging.getLogger("mkdocs.plugins.neurarium")

THUMBNAIL = 560  # pixels wide: sharp at twice the width of a card's column on most screens
ALONE = 16  # so many figures are drawn here; more are worth processes of their own

Subject = Paper | Comparison


def draw_all(wanted: Sequence[tuple[Subject, Record]], cache: Path | None = None) -> dict[str, tuple[bytes, bytes]]:
    """The figure and its thumbnail, PNG both, of every record that could be drawn, by id."""
    found: dict[str, tuple[bytes, bytes]] = {}
    missing: list[tuple[Subject, Record, str]] = []
    for subject, record in wanted:
        key = _key(subject, record)
        files = [cache / f"{key}{end}.png" for end in ("", "-small")] if cache else []
        if files and all(file.is_file() for file in files):
            found[subject.id] = (files[0].read_bytes(), files[1].read_bytes())
        else:
            missing.append((subject, record, key))
    jobs = [(subject, record) for subject, record, _ in missing]
    drawn: list[tuple[bytes | None, str]] = []
    if len(jobs) > ALONE:
        with suppress(BrokenProcessPool), ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            drawn = list(pool.map(_draw, jobs, chunksize=4))
    drawn = drawn or [_draw(job) for job in jobs]  # few, or a script without a main guard, from which no process can start
    for (subject, _, key), (large, note) in zip(missing, drawn):
        if note:
            log.warning("%s: %s", subject.id, note)
        if large is None:
            continue
        found[subject.id] = (large, thumbnail(large))
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            for end, data in zip(("", "-small"), found[subject.id]):
                (cache / f"{key}{end}.png").write_bytes(data)
    return found


def thumbnail(figure: bytes) -> bytes:
    """The figure at the width of a card, in a palette of 128 colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(figure)).convert("RGB")
    picture = picture.resize((THUMBNAIL, round(picture.height * THUMBNAIL / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw(job: tuple[Subject, Record]) -> tuple[bytes | None, str]:
    from neurarium.lab.figures import render

    subject, record = job
    try:
        return render(record, subject), ""
    except Exception as error:
        note = f"its figure failed ({type(error).__name__}: {error}); a plain one is drawn"
    try:
        return render(record, subject, default=True), note
    except Exception as error:
        return None, f"{note}; that failed too ({type(error).__name__}: {error}): there is none"


def _key(subject: Subject, record: Record) -> str:
    """Of everything that a figure depends on: the record, the code that draws it, the library that draws."""
    digest = hashlib.sha256(record.to_bytes())
    for module in (subject.experiment or "", "neurarium.lab.figures", __name__):
        file = source_file(module)
        digest.update(file.read_bytes() if file else b"-")
    digest.update(f"{subject}{version('matplotlib')}".encode())
    return digest.hexdigest()[:32]
