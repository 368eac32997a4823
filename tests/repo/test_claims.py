"""What the catalog promises can be checked: every measure parses and every working paper has a null check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neurarium import catalog
from neurarium.lab import Expression

ROOT = Path(__file__).parents[2]
WORKING = [paper for paper in catalog.load().papers if paper.status == "works"]


@pytest.mark.parametrize("paper", WORKING, ids=lambda paper: paper.id)
def test_measures_parse_and_something_tells_the_method_from_its_baseline(paper: catalog.Paper) -> None:
    read = [set(Expression.parse(claim.measure).arms) for claim in paper.claims]
    nulls = [claim.null if claim.null is not None else paper.null for claim in paper.claims]
    assert any(arms & set(null) for arms, null in zip(read, nulls, strict=True))


@pytest.mark.parametrize("paper", WORKING, ids=lambda paper: paper.id)
def test_claims_about_seconds_are_measured_one_seed_after_another(paper: catalog.Paper) -> None:
    if any(re.search(r"\.\w*(seconds|slope|latency)", claim.measure) for claim in paper.claims):
        assert paper.timed, "a claim reads wall-clock time: set timed = true"


def test_the_readme_has_no_open_place() -> None:
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"<!-- (run|table|example):[a-z-]+ -->\s*(#|<!--|\Z)", text)
