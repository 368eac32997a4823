"""Verification of published records, and where they live."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import neurarium
from neurarium.catalog import Comparison
from neurarium.errors import RecordError
from neurarium.lab import fingerprint, publish, published, record_path, records_root, verify
from neurarium.lab.record import Measured


@pytest.fixture
def good(toy, make_record):
    """A sound record of the toy."""
    record = make_record({"base": {"value": [1.0, 1.0, 1.0]}, "method": {"value": [0.5, 0.51, 0.49]}}, fingerprint=fingerprint(toy))
    return dataclasses.replace(record, claims=tuple(Measured(c.measure, c.holds, c.direction) for c in toy.claims))


def test_a_sound_record_is_valid_with_these_keys(toy, good, tmp_path):
    publish(good, tmp_path)
    report = verify([toy], tmp_path)
    (paper,) = report.to_json()["papers"]
    assert list(paper) == ["id", "valid", "stale", "seconds", "seeds", "claims"]
    assert (paper["id"], paper["valid"], paper["stale"], paper["seconds"], paper["seeds"]) == ("toy", True, False, 4.5, 3)
    (claim,) = paper["claims"]
    assert list(claim) == ["says", "reported", "measured", "interval", "verdict", "null_fails"]
    assert (claim["verdict"], claim["null_fails"]) == ("held", True)
    assert report.to_json()["totals"] == {"held": 1, "weaker": 0, "failed": 0, "invalid": 0, "stale": 0}
    assert report.exit_code == 0
    json.dumps(report.to_json(), allow_nan=False)


def test_a_paper_without_a_record_is_invalid_and_planned_ones_are_passed_over(toy, make_paper, tmp_path):
    report = verify([toy, make_paper(id="later", status="planned")], tmp_path)
    assert [paper.id for paper in report.papers] == ["toy"]
    assert "no published record" in report.papers[0].why
    assert report.totals["invalid"] == report.exit_code == 1
    assert report.to_json()["papers"][0]["seconds"] is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"id": "other"}, "field 'id': is 'other', must be 'toy'"),
        ({"room": "graph"}, "field 'room'"),
        ({"kind": "comparison"}, "field 'kind'"),
        ({"scale": "smoke"}, "smoke scale"),
    ],
)
def test_a_record_of_something_else_is_invalid(changes, why, toy, good, tmp_path):
    path = record_path(toy, tmp_path)
    path.parent.mkdir(parents=True)
    dataclasses.replace(good, **changes).save(path)
    (paper,) = verify([toy], tmp_path).papers
    assert not paper.valid
    assert why in paper.why


def test_a_damaged_record_is_invalid(toy, tmp_path):
    path = record_path(toy, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1')
    assert "not valid JSON" in verify([toy], tmp_path).papers[0].why


def test_few_seeds_failed_seeds_and_parity_are_invalid(toy, make_record, tmp_path):
    def why(record):
        publish(dataclasses.replace(record, fingerprint=fingerprint(toy)), tmp_path)
        (paper,) = verify([toy], tmp_path).papers
        assert not paper.valid
        return paper.why

    assert "2 seeds" in why(make_record({"base": {"value": [1.0] * 2}, "method": {"value": [0.5] * 2}}))
    assert "failed outside" in why(make_record({"base": {"value": [1.0] * 3}, "method": {"value": [0.5] * 3}}, errors={1: "Boom"}))
    wrong = make_record({"base": {"valeu": [1.0] * 3}, "method": {"value": [0.5] * 3}})
    assert "no metric 'value'; it logged valeu" in why(wrong)


def test_a_claim_that_the_baseline_meets_too_is_no_evidence(toy, make_record, tmp_path):
    parity = dataclasses.replace(toy, claims=(dataclasses.replace(toy.claims[0], holds="<= 2"),))
    publish(make_record({"base": {"value": [1.0] * 3}, "method": {"value": [0.5] * 3}}, fingerprint=fingerprint(toy)), tmp_path)
    (paper,) = verify([parity], tmp_path).papers
    assert not paper.valid
    assert "nothing here is evidence" in paper.why


def test_a_crash_is_valid_but_fails_its_claims(toy, make_record, tmp_path):
    record = make_record({"base": {"value": [1.0] * 3}, "method": {"value": [0.5] * 3}, "third": {"value": [1.0, None, 1.0]}})
    claims = (*toy.claims, dataclasses.replace(toy.claims[0], measure="third.value"))
    publish(dataclasses.replace(record, fingerprint=fingerprint(toy)), tmp_path)
    (paper,) = verify([dataclasses.replace(toy, claims=claims)], tmp_path).papers
    assert paper.valid
    assert [v.verdict for v in paper.claims] == ["held", "failed"]


def test_changed_code_makes_a_record_stale_not_invalid(toy, good, code, tmp_path):
    publish(good, tmp_path)
    source = code / f"{toy.experiment}.py"
    source.write_text(source.read_text().replace("0.5 if", "0.4 if"))
    report = verify([toy], tmp_path)
    assert (report.papers[0].valid, report.papers[0].stale) == (True, True)
    assert report.totals["stale"] == 1
    assert report.exit_code == 0
    source.write_text("def run(trial:\n")
    assert "cannot be followed" in verify([toy], tmp_path).papers[0].why


def test_a_bound_that_was_moved_shows(toy, good, tmp_path):
    publish(dataclasses.replace(good, claims=()), tmp_path)
    report = verify([toy], tmp_path)
    assert report.papers[0].moved == ("the method halves the value",)
    assert report.to_json()["papers"][0]["stale"]


def test_only_laptop_records_are_published(make_record, tmp_path):
    with pytest.raises(RecordError, match="smoke record is not published"):
        publish(make_record({"a": {"x": [1.0]}}, scale="smoke"), tmp_path)
    path = publish(make_record({"a": {"x": [1.0]}}), tmp_path)
    assert path == tmp_path / "nn" / "toy.json"
    comparison = make_record({"a": {"x": [1.0]}}, kind="comparison", id="speed")
    assert publish(comparison, tmp_path) == tmp_path / "nn" / "compare-speed.json"


def test_a_link_in_the_place_of_a_room_is_refused(good, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "records").mkdir()
    (tmp_path / "records/nn").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="symbolic link"):
        publish(good, tmp_path / "records")


def test_records_are_found_in_this_order(tmp_path, monkeypatch, toy, good):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEURARIUM_RECORDS", raising=False)
    (tmp_path / "records").mkdir()  # any folder of that name that happens to be here
    assert records_root() == Path(neurarium.__file__).parents[2] / "records"
    monkeypatch.setenv("NEURARIUM_RECORDS", str(tmp_path / "mine"))
    assert records_root() == tmp_path / "mine"
    publish(good)
    assert published(toy).to_bytes() == good.to_bytes()


def test_a_comparison_needs_a_whole_record_of_todays_code(toy, good, make_record, tmp_path):
    both = Comparison("both", "Which?", ("toy", "other"), toy.experiment, toy.room)

    def found():
        (one,) = verify([], tmp_path, comparisons=[both]).comparisons
        return one

    assert not found().valid and "no published record" in found().why
    assert verify([], tmp_path, comparisons=[both]).exit_code == 1
    whole = dataclasses.replace(good, id="both", kind="comparison", claims=(), fingerprint=fingerprint(both))
    publish(whole, tmp_path)
    assert (found().valid, found().stale) == (True, False)
    assert verify([], tmp_path, comparisons=[both]).to_json()["comparisons"][0]["id"] == "both"
    publish(dataclasses.replace(whole, fingerprint="0" * 64), tmp_path)
    assert found().valid and found().stale
    crashed = make_record({"base": {"value": [1.0, None, 1.0]}, "method": {"value": [0.5] * 3}})
    publish(dataclasses.replace(crashed, id="both", kind="comparison"), tmp_path)
    assert not found().valid and "an arm crashed: base" in found().why
