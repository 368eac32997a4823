"""Where published records live: ``records/ROOM/ID.json``, committed with the code; figures are redrawn from them, not kept."""

from __future__ import annotations

import os
from pathlib import Path

import neurarium
from neurarium.errors import RecordError
from neurarium.lab.files import make_folder
from neurarium.lab.names import check_id
from neurarium.lab.record import Record
from neurarium.lab.runner import Subject, folder_name

__all__ = ["published", "publish", "record_path", "records_root"]


def records_root() -> Path:
    """The folder of published records.

    ``$NEURARIUM_RECORDS``; else that of the repository which the package lies in; else the copy that is installed with the package.
    """
    if wish := os.environ.get("NEURARIUM_RECORDS"):
        return Path(wish)
    package = Path(neurarium.__file__).parent
    repository = package.parent.parent
    return repository / "records" if (repository / "pyproject.toml").is_file() else package / "_records"


def record_path(paper: Subject, root: Path | str | None = None) -> Path:
    """Where a paper's or comparison's published record is, or would be."""
    folder = Path(root) if root is not None else records_root()
    return folder / check_id(paper.room, "room") / f"{check_id(folder_name(paper))}.json"


def published(paper: Subject, root: Path | str | None = None) -> Record:
    """The published record; :class:`~neurarium.errors.RecordError` if there is none, or it is of something else."""
    path = record_path(paper, root)
    if not path.is_file():
        raise RecordError(f"{path}: there is no published record of {paper.id!r} yet")
    record = Record.load(path)
    for name, found, expected in (("id", record.id, paper.id), ("room", record.room, paper.room), ("kind", record.kind, _kind(paper))):
        if found != expected:
            raise RecordError(f"{path}: field {name!r}: is {found!r}, must be {expected!r}")
    return record


def publish(record: Record, root: Path | str | None = None) -> Path:
    """Put a laptop record among the published ones, in the place of the one that is there."""
    if record.scale != "laptop":
        raise RecordError(f"{record.id}: a {record.scale} record is not published; run it at laptop scale")
    if record.stand_in:
        raise RecordError(f"{record.id}: a record of a stand-in is not published ({record.stand_in})")
    folder = make_folder(Path(root) if root is not None else _writable_root(), check_id(record.room, "room"))
    name = f"compare-{record.id}" if record.kind == "comparison" else record.id
    return record.save(folder / f"{check_id(name)}.json")


def _kind(paper: Subject) -> str:
    return "paper" if folder_name(paper) == paper.id else "comparison"


def _writable_root() -> Path:
    """Records are published into a repository or a folder that was named, never into an installed package."""
    root = records_root()
    return Path("records") if root.name == "_records" else root
