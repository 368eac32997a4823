"""Every working paper's experiment runs through at smoke scale: no arm crashes, every claim can be evaluated, the figure draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurarium import catalog, lab
from neurarium.errors import RecordError
from neurarium.lab.runner import folder_name

WORKING = [paper for paper in catalog.load().papers if paper.status == "works"]
COMPARISONS = list(catalog.load().comparisons)


@pytest.mark.parametrize("paper", WORKING + COMPARISONS, ids=lambda paper: paper.id)
def test_smoke(paper: catalog.Paper | catalog.Comparison, tmp_path: Path) -> None:
    try:
        record = lab.run(paper, scale="smoke", seeds=1, out=tmp_path, engine="inline", progress=False)
    except RecordError as error:
        if "MissingData" in str(error):
            pytest.skip(f"its data are not here: {error}")
        raise
    if any("MissingData" in error for _, _, error in record.crashes):
        pytest.skip("its data are not here, and NEURARIUM_OFFLINE forbids to download them")
    crashed = {run.arm: run.error for run in record.runs if run.status != "done"}
    assert not crashed, "\n".join(f"{arm}: {error}" for arm, error in crashed.items())
    for verdict in lab.judge(paper, record) if isinstance(paper, catalog.Paper) else ():
        assert verdict.verdict == "not judged"
        shorter = "and no [" in (verdict.reason or "")  # a list that is shorter at smoke scale
        assert verdict.measured is not None or shorter, f"{verdict.measure} could not be evaluated: {verdict.reason}"
    assert (tmp_path / folder_name(paper) / "smoke" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("paper", WORKING, ids=lambda paper: paper.id)
def test_the_published_record_is_valid(paper: catalog.Paper) -> None:
    report = lab.verify([paper]).to_json()["papers"][0]
    assert report["valid"]
    assert not report["stale"], "the code has changed since it was measured"
    assert any(claim["null_fails"] for claim in report["claims"]), "no claim tells the method from its baseline"


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.id)
def test_the_published_record_of_a_comparison_is_valid(comparison: catalog.Comparison) -> None:
    (found,) = lab.verify([], comparisons=[comparison]).comparisons
    assert found.valid, found.why
    assert not found.stale, "the code has changed since it was measured"
