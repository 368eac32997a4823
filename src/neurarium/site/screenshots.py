"""Pictures of built pages for the README, and the browser that takes them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neurarium.errors import BadInput, MissingExtra

__all__ = ["browser", "chromium", "screenshots"]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
MAX_BYTES = 300_000


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium with a profile of its own, driven by playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise MissingExtra("playwright", "docs") from None
    path = chromium()
    if path is None:
        raise BadInput("no Chromium on the PATH: on Debian, apt-get install chromium")
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield running
        finally:
            running.close()


def screenshots(site: Path | str, out: Path | str, paper: str = "") -> list[Path]:
    """``gallery.png`` and ``paper.png`` in ``out``, of the built pages in ``site``.

    Args:
        site: a built site.
        out: folder of the pictures.
        paper: address of the paper's page; by default the first measured one of the gallery.
    """
    site, out = Path(site).absolute(), Path(out)
    if not (site / "index.html").is_file():
        raise BadInput(f"{site} holds no built site; `neurarium site build` makes one")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with browser() as running:
        page = running.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light", device_scale_factor=1)
        for name in ("gallery", "paper"):
            address = "index.html"
            if name == "paper":
                address = paper or page.get_attribute(".card.measured h3 a, .card h3 a", "href")
            page.goto(f"{site.as_uri()}/{address}")
            page.wait_for_load_state("networkidle")
            page.evaluate("Promise.all([...document.images].map((i) => ((i.loading = 'eager'), i.decode())))")
            path = out / f"{name}.png"
            path.write_bytes(_small(page.screenshot()))
            written.append(path)
    return written


def _small(png: bytes) -> bytes:
    """In a palette, if it is too large otherwise."""
    from PIL import Image

    if len(png) < MAX_BYTES:
        return png
    for colours in (256, 128, 64):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() < MAX_BYTES:
            break
    return buffer.getvalue()
