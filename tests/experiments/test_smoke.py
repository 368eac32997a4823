"""Every working paper's experiment runs through at smoke scale: no arm crashes, every claim can be evaluated, the figure draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurarium import catalog, lab

WORKING = [paper for paper in catalog.load().papers if paper.status == "works"]


@pytest.mark.parametrize("paper", WORKING, ids=lambda paper: paper.id)
def test_smoke(paper: catalog.Paper, tmp_path: Path) -> None:
    record = lab.run(paper, scale="smoke", seeds=1, out=tmp_path, progress=False)
    crashed = {run.arm: run.error for run in record.runs if run.status != "done"}
    assert not crashed, "\n".join(f"{arm}: {error}" for arm, error in crashed.items())
    for verdict in lab.judge(paper, record):
        assert verdict.verdict == "not judged"
        assert verdict.measured is not None, f"{verdict.measure} could not be evaluated: {verdict.reason}"
    assert (tmp_path / paper.id / "smoke" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("paper", WORKING, ids=lambda paper: paper.id)
def test_the_published_record_is_valid(paper: catalog.Paper) -> None:
    report = lab.verify([paper]).to_json()["papers"][0]
    assert report["valid"], report.get("why")
    assert any(claim["null_fails"] for claim in report["claims"]), "no claim tells the method from its baseline"
