"""Builds and serves the atlas."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from neurarium.catalog import Catalog
from neurarium.errors import BadInput, MissingExtra

__all__ = ["build", "repository", "serve"]


def repository() -> Path:
    """The clone that the guides and ``mkdocs.yml`` lie in: the working folder's, or else the package's."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (folder / "mkdocs.yml").is_file() and (folder / "docs").is_dir():
            return folder
    raise BadInput("the atlas is built in a clone of neurarium's repository: no mkdocs.yml and docs/ here")


def build(
    out: Path | str = "site", *, catalog: Catalog | None = None, records: Path | str | None = None, cache: Path | str | None = None
) -> Path:
    """Build the site into a folder, which is emptied first, and return it.

    Args:
        out: the folder.
        catalog: what to show; the installed catalog by default.
        records: folder of records; the published ones by default.
        cache: folder of drawn figures, reused while their records and code are the same; ``build/site-cache`` by default.

    Raises :class:`~neurarium.errors.MissingExtra` without MkDocs, and ``BadInput`` where a page has a broken link.
    """
    root = repository()
    out = Path(out).absolute()
    if out.is_dir() and any(out.iterdir()) and not (out / "sitemap.xml").is_file():
        raise BadInput(f"{out} is not empty and is no built site; it would be emptied")
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    os.environ.setdefault("DISABLE_MKDOCS_2_WARNING", "true")
    try:
        from mkdocs.commands.build import build as mkdocs_build
        from mkdocs.config import load_config
        from mkdocs.exceptions import Abort
    except ImportError:
        raise MissingExtra("mkdocs-material", "docs") from None
    from neurarium.site.facts import Atlas

    folder = Path(cache) if cache is not None else root / "build" / "site-cache"
    atlas = Atlas.load(root, catalog=catalog, records=None if records is None else Path(records), cache=folder)
    heard = _Warnings()
    logger = logging.getLogger("mkdocs")
    logger.setLevel(logging.WARNING)
    logger.addHandler(heard)
    config: Any = load_config(str(root / "mkdocs.yml"), site_dir=str(out), strict=True)
    config.extra["atlas"] = atlas
    config.plugins.run_event("startup", command="build", dirty=False)
    try:
        mkdocs_build(config)
    except Abort as error:
        raise BadInput(f"the site was not built: {'; '.join(heard.said) or error}") from None
    finally:
        logger.removeHandler(heard)
        config.plugins.run_event("shutdown")
    return out


class _Warnings(logging.Handler):
    """Keeps what MkDocs warns of, which a strict build turns into its failure."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def serve(folder: Path | str, port: int = 8000) -> ThreadingHTTPServer:
    """A server of a built site on 127.0.0.1, for ``serve_forever()``."""
    if not Path(folder).joinpath("index.html").is_file():
        raise BadInput(f"{folder} holds no built site; `neurarium site build` makes one")
    handler = functools.partial(_Quiet, directory=str(folder))
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


class _Quiet(SimpleHTTPRequestHandler):
    """Says nothing of each request, and lets the browser keep nothing."""

    extensions_map: Mapping[str, str] = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()
