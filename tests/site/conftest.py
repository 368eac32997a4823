"""The site, built once for all tests and test processes, with records of a small package of papers beside the published ones."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CATALOG = """
[[paper]]
id = "demo-held"
title = "Tidal <b>Averaging</b> of Gradients & Weights"
year = 2024
arxiv = "2401.01234"
role = "learner"
status = "works"
use = "atlas_demo.method:Tidal"
experiment = "atlas_demo.experiment"
example = "atlas_demo.method:example"
summary = "Averages <script>alert(1)</script> the weights with the tide."
evidence = "generated"
evidence_note = "numbers that stand in for nothing"
null = { tidal = "plain" }
[[paper.claim]]
says = "the loss is lower than without the tide"
reported = "half the loss"
measure = "tidal.loss / plain.loss"
holds = "<= 0.7"
direction = "< 1"
[[paper.claim]]
says = "the loss is a tenth"
reported = "a tenth"
measure = "tidal.loss / plain.loss"
holds = "<= 0.1"
direction = "< 1"
reason = "the demo is small"
[[paper.claim]]
says = "needs no more memory"
reported = "the same memory"
measure = "tidal.bytes / plain.bytes"
holds = "<= 1"

[[paper]]
id = "demo-works"
title = "Quiet Harbours"
year = 2023
role = "probe"
status = "works"
use = "atlas_demo.method:Tidal"
experiment = "atlas_demo.experiment"
example = "atlas_demo.method:example"
summary = "Works, and has no record."
evidence = "real"
null = { tidal = "plain" }
[[paper.claim]]
says = "is quiet"
reported = "quiet"
measure = "tidal.loss"
holds = "<= 1"

[[comparison]]
id = "demo-compare"
question = "Which of the two is quicker?"
members = ["demo-held", "demo-works"]
experiment = "atlas_demo.experiment"
plot = ["bytes", "loss"]
evidence = "generated"
"""
METHOD = '''"""Tidal averaging: weights move with the tide.

The idea in *one* paragraph, with ``code``, a < b and :math:`\\\\frac{a}{b}`.

    loss = tide * loss

*Source*: nowhere.

*Departures*: the tide is a sine; ``moon`` is left out.

*Cost*: none.
"""


class Tidal:
    """It averages."""


def example():
    raise NotImplementedError
'''
EXPERIMENT = '''"""The demo's experiment."""


def run(trial):
    for arm in trial.arms("plain", "tidal"):
        tidal = arm.name == "tidal"
        arm.log(loss=(0.5 if tidal else 1.0) + 0.01 * trial.seed, bytes=100.0 + tidal)
'''


def _build(folder: Path) -> None:
    from neurarium import catalog, lab
    from neurarium.catalog import load_files
    from neurarium.catalog.library import join
    from neurarium.site import build

    package, records = folder / "packages" / "atlas_demo", folder / "records"
    package.mkdir(parents=True)
    for name, text in {"__init__": '"""Demo."""\n', "method": METHOD, "experiment": EXPERIMENT}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "learn.toml").write_text(CATALOG, encoding="utf-8")
    sys.path.insert(0, str(package.parent))
    try:
        demo = load_files([folder / "learn.toml"], package="atlas_demo")
        shutil.copytree(ROOT / "records", records)
        for subject in (demo.get("demo-held"), demo.comparisons[0]):
            record = lab.run(subject, engine="inline", seeds=3, out=folder / "runs", progress=False)
            lab.publish(record, records)
        # Seconds of nothing differ by nothing: what takes no time is shown as such.
        started = time.perf_counter()
        build(folder / "site", catalog=join(catalog.load(), demo), records=records, cache=folder / "cache")
        (folder / "built.json").write_text(json.dumps({"seconds": time.perf_counter() - started}))
    finally:
        sys.path.remove(str(package.parent))


@dataclasses.dataclass(frozen=True)
class Built:
    folder: Path
    seconds: float

    def url(self, page: str) -> str:
        return (self.folder / page).as_uri()


@pytest.fixture(scope="session")
def built(tmp_path_factory, request) -> Built:
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # shared by the processes of pytest-xdist
    folder = base / "atlas"
    with (base / "atlas.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _build(folder)
    return Built(folder / "site", json.loads((folder / "built.json").read_text())["seconds"])


@pytest.fixture(scope="session")
def chromium():
    pytest.importorskip("playwright")
    from neurarium.site.screenshots import browser
    from neurarium.site.screenshots import chromium as find

    if find() is None:
        pytest.skip("no Chromium on the PATH")
    with browser() as running:
        yield running


def abandoned(request) -> bool:
    """A picture that was still loading when a test left the page: the browser gives it up, nothing is wrong with it."""
    return request.resource_type == "image" and request.failure == "net::ERR_ABORTED"


@pytest.fixture
def page(chromium):
    """A page that notes every request, and fails the test on any error in the console or request that leaves the disk."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", reduced_motion="reduce")
    page, asked, wrong = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}") if not abandoned(request) else None)
    yield page
    outside = [url for url in asked if not url.startswith(("file://", "data:", "blob:"))]
    context.close()
    assert not wrong, wrong
    assert not outside, outside
