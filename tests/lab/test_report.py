"""Reports and figures: drawn from the record alone, evidence first, everything escaped."""

from __future__ import annotations

import dataclasses
import re

import pytest

from neurarium.catalog import Comparison
from neurarium.errors import BadInput
from neurarium.lab import as_html, as_markdown, as_text, draw
from neurarium.lab.figures import lower_is_better, pareto_front, render
from neurarium.lab.report import number


@pytest.fixture
def record(make_record):
    return make_record({"base": {"value": [1.0, 1.1, 0.9], "many": [[1.0, 2.0]] * 3}, "method": {"value": [0.5, 0.51, 0.49]}})


def text(record, paper, width=160):
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as shown:
        console.print(as_text(record, paper))
    return shown.get()


def test_text_tells_evidence_claim_both_figures_and_verdict(record, toy):
    shown = text(record, toy)
    assert shown.index("Evidence: generated data. made by hand") < shown.index("the method halves the value")
    for part in ("50 %", "0.5027 [0.4022, 0.6032]", "held", "fails", "3 seeds", "a processor", "2025-01-31"):
        assert part in shown


def test_a_smoke_run_is_shown_as_not_judged(toy, make_record):
    shown = text(make_record({"base": {"value": [1.0]}, "method": {"value": [0.5]}}, scale="smoke"), toy)
    assert "not judged" in shown
    assert "only shows that the experiment runs through" in shown


def test_a_reason_that_several_claims_share_is_told_once(toy, make_record):
    paper = dataclasses.replace(toy, claims=toy.claims * 3)
    shown = text(make_record({"base": {"value": [1.0]}, "method": {"value": [0.5]}}, scale="smoke"), paper)
    assert shown.count("smoke scale only shows") == 1
    assert "3 claims: smoke scale" in shown


def test_noise_and_crashes_are_told(toy, make_record):
    assert "within noise" in text(make_record({"base": {"value": [1.0] * 3}, "method": {"value": [0.5, 0.9, 0.7]}}), toy)
    assert "arm method crashed at seed 1" in text(make_record({"base": {"value": [1.0] * 3}, "method": {"value": [0.5, None, 0.5]}}), toy)


HOSTILE = "<script>alert(1)</script> [bold]x[/bold] | `y` \" ' & ](javascript:z)"


@pytest.fixture
def hostile(record, toy):
    claim = dataclasses.replace(toy.claims[0], says=HOSTILE, reported=HOSTILE)
    paper = dataclasses.replace(toy, title=HOSTILE, summary=HOSTILE, claims=(claim,))
    return dataclasses.replace(record, evidence_note=HOSTILE), paper


def test_html_asks_nobody_and_escapes_everything(hostile):
    page = as_html(*hostile)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert re.findall(r'(?:src|href)\s*=\s*"([^"]{5})', page) == ["data:"]
    assert "url(" not in page
    assert "@import" not in page
    assert 'src="data:image/png;base64,iVBOR' in page
    assert "default-src 'none'" in page


def test_markdown_escapes_everything(hostile):
    page = as_markdown(*hostile, figure="figures/toy.png")
    assert "<script" not in page
    assert not re.search(r"(?<!\\)[\[\]](?!\()", page.replace("![", "!"))
    assert not re.search(r"(?<!\\)\]\(javascript", page)
    assert "![" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table[:3]} == {7}


def test_the_terminal_takes_nothing_for_markup(hostile):
    assert "[bold]x[/bold]" in text(*hostile, width=400)


def test_a_figure_is_drawn_from_the_record_alone(record, toy, tmp_path):
    assert draw(record, toy, tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    svg = draw(record, toy, tmp_path / "toy.svg").read_bytes()
    assert b"<svg" in svg
    assert svg == render(record, toy, "svg"), "the same record makes the same file"
    with pytest.raises(BadInput, match=r"\.png, \.svg or \.pdf"):
        draw(record, toy, tmp_path / "toy.exe")
    with pytest.raises(BadInput, match="not of 'other'"):
        draw(record, dataclasses.replace(toy, id="other"), tmp_path / "toy.png")


def test_an_experiment_without_a_figure_gets_a_plain_one(record, toy, code):
    source = code / f"{toy.experiment}.py"
    source.write_text(source.read_text().partition("def figure")[0])
    assert render(record, toy).startswith(b"\x89PNG")


def test_a_figure_that_lays_itself_out_is_laid_out_by_the_lab(record, toy, code, recwarn):
    source = code / f"{toy.experiment}.py"
    own = "axis = fig.subplots(); fig.colorbar(axis.imshow([[1.0, 2.0]])); fig.tight_layout()"
    source.write_text(source.read_text().replace("axis = fig.subplots()", own))
    assert render(record, toy).startswith(b"\x89PNG")
    assert not [w for w in recwarn if "layout" in str(w.message)]


def test_a_figure_that_fails_does_not_cost_the_page(record, toy, code):
    source = code / f"{toy.experiment}.py"
    source.write_text(source.read_text().replace("axis = fig.subplots()", "raise KeyError('x')"))
    with pytest.raises(KeyError):
        render(record, toy)
    assert "data:image/png" in as_html(record, toy)


def test_a_comparison_shows_its_arms(record, toy, code):
    comparison = Comparison("speed", "Which?", ("a", "b"), toy.experiment, "nn", plot=("seconds", "value"))
    source = code / f"{toy.experiment}.py"
    source.write_text(source.read_text().partition("def figure")[0])
    record = dataclasses.replace(record, id="speed", kind="comparison")
    shown = text(record, comparison)
    assert "Which?" in shown
    assert "1 ± 0.2484" in shown
    assert render(record, comparison).startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="has both 'seconds' and 'speed'"):
        render(record, dataclasses.replace(comparison, plot=("seconds", "speed")))
    assert as_html(record, comparison).count("<table>") == 1


def test_the_pareto_front():
    points = {"a": (1.0, 1.0), "b": (2.0, 3.0), "c": (3.0, 2.0), "d": (4.0, 3.5)}
    assert pareto_front(points) == ["a", "b", "d"]
    assert pareto_front(points, y_lower=True) == ["a"]
    assert lower_is_better("peak_saved_bytes")
    assert lower_is_better("test_error")
    assert not lower_is_better("accuracy")


@pytest.mark.parametrize(
    ("value", "expected"), [(0.123456, "0.1235"), (123456.0, "123,456"), (1e-9, "1e-09"), (None, "-"), (float("nan"), "not finite")]
)
def test_numbers_are_short(value, expected):
    assert number(value) == expected
