"""Verdicts on numbers made by hand: the interval decides, and the null check tells evidence from parity."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neurarium.catalog import Claim
from neurarium.errors import BadInput
from neurarium.lab import judge
from neurarium.lab.verdict import interval, judge_claim


def claim(measure="method.value / base.value", holds="<= 0.5", direction=None, **more):
    return Claim("it is so", "half", measure, holds, direction, **more)


def verdict_of(make_record, method, *, base=(1.0, 1.0, 1.0), null=None, scale="laptop", errors=None, **fields):
    record = make_record({"base": {"value": list(base)}, "method": {"value": list(method)}}, scale=scale, errors=errors)
    return judge_claim(claim(**fields), record, {"method": "base"} if null is None else null)


def test_the_interval_is_students():
    mean, low, high = interval([0.42, 0.44, 0.43])
    assert mean == pytest.approx(0.43)
    assert (low, high) == pytest.approx((0.43 - 4.302652729911275 * 0.01 / math.sqrt(3), 0.43 + 4.302652729911275 * 0.01 / math.sqrt(3)))
    assert interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1), "equal values have no width, whatever rounding does to their mean"


@pytest.mark.parametrize(
    ("method", "fields", "verdict", "within"),
    [
        ((0.42, 0.44, 0.43), {}, "held", False),
        ((0.5, 0.5, 0.5), {}, "held", False),  # no variance: the bound itself is met
        ((0.5, 0.5, 0.5), {"holds": "< 0.5"}, "failed", False),
        ((0.40, 0.50, 0.45), {}, "failed", True),  # the mean satisfies it, the interval does not
        ((0.40, 0.50, 0.45), {"direction": "< 1"}, "weaker", True),
        ((0.70, 0.72, 0.71), {"direction": "< 1"}, "weaker", False),
        ((0.90, 1.20, 1.05), {"direction": "< 1"}, "failed", False),
        ((1.50, 1.52, 1.51), {"direction": "< 1"}, "failed", False),
        ((0.45, 0.55, 0.65), {}, "failed", True),  # the mean misses it, the interval reaches it
        ((0.99, 1.01, 1.00), {"holds": "in [0.9, 1.1]"}, "held", False),
        ((0.80, 1.20, 1.00), {"holds": "in [0.9, 1.1]"}, "failed", True),
        ((0.1, 0.2, 0.3), {"measure": "method.value - base.value", "holds": ">= 0"}, "failed", False),
    ],
)
def test_the_interval_decides(method, fields, verdict, within, make_record):
    found = verdict_of(make_record, method, **fields)
    assert (found.verdict, found.within_noise) == (verdict, within)
    assert found.n == 3
    assert found.measured == pytest.approx(np.mean(list(found.values.values())))


def test_seeds_are_paired(make_record):
    """A ratio of means would be 1; seed by seed the method is always half of its own baseline."""
    found = verdict_of(make_record, (1.0, 10.0, 100.0), base=(2.0, 20.0, 200.0))
    assert found.values == {0: 0.5, 1: 0.5, 2: 0.5}
    assert found.verdict == "held"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails(value, make_record):
    found = verdict_of(make_record, (0.1, value, 0.1), direction="< 1")
    assert found.verdict == "failed"
    assert "not finite at seed 1" in found.reason
    assert found.to_dict()["measured"] is None
    assert found.to_dict()["interval"] is None


def test_a_crash_fails_the_claims_that_read_the_arm_and_is_named(make_record):
    found = verdict_of(make_record, (0.1, None, 0.1))
    assert (found.verdict, found.reason) == ("failed", "arm method crashed at seed 1")
    assert found.values == {0: 0.1, 2: 0.1}
    assert verdict_of(make_record, (0.1, 0.1, 0.1), base=(1.0, None, 1.0)).verdict == "failed"
    untouched = verdict_of(make_record, (0.1, None, 0.1), measure="base.value", holds="== 1")
    assert untouched.verdict == "held"


def test_every_seed_crashed(make_record):
    found = verdict_of(make_record, (None, None, None))
    assert (found.verdict, found.measured, found.interval, found.n) == ("failed", None, None, 0)


@pytest.mark.parametrize(
    ("changes", "why"), [({"scale": "smoke"}, "smoke scale"), ({"method": (0.1, 0.1), "base": (1.0, 1.0)}, "2 seeds; a verdict needs 3")]
)
def test_too_little_is_not_judged(changes, why, make_record):
    found = verdict_of(make_record, **{"method": (0.1, 0.1, 0.1), **changes})
    assert found.verdict == "not judged"
    assert why in found.reason
    assert found.null_fails is None


class TestNull:
    def test_a_claim_of_a_difference_is_evidence(self, make_record):
        found = verdict_of(make_record, (0.42, 0.44, 0.43))
        assert found.null_fails is True
        assert found.null_measured == 1.0

    def test_parity_is_not(self, make_record):
        found = verdict_of(make_record, (1.0, 1.01, 0.99), holds="in [0.9, 1.1]")
        assert (found.verdict, found.null_fails) == ("held", False)

    def test_a_claim_that_fails_has_a_null_of_its_own(self, make_record):
        assert verdict_of(make_record, (0.9, 0.9, 0.9)).null_fails is True
        assert verdict_of(make_record, (2.0, 2.0, 2.0), holds="<= 1").null_fails is False

    def test_a_baseline_that_lacks_the_metric_leaves_it_open(self, make_record):
        record = make_record({"base": {"value": [1.0] * 3}, "method": {"exits": [2.0] * 3}})
        found = judge_claim(claim("method.exits", ">= 2"), record, {"method": "base"})
        assert (found.verdict, found.null_fails) == ("held", None)
        assert "did not log" in found.reason

    def test_a_measure_without_method_arms_leaves_it_open(self, make_record):
        found = verdict_of(make_record, (0.1, 0.1, 0.1), measure="base.value", holds="== 1")
        assert found.null_fails is None
        assert verdict_of(make_record, (0.1, 0.1, 0.1), null={}).null_fails is None

    def test_a_null_without_a_finite_value_is_no_evidence(self, make_record):
        found = verdict_of(make_record, (0.1, 0.1, 0.1), measure="1 / (base.value - method.value)", holds=">= 1")
        assert (found.verdict, found.null_fails) == ("held", None)

    def test_a_claims_own_null_goes_before_the_papers(self, make_paper, make_record):
        record = make_record({"base": {"value": [1.0] * 3}, "method": {"value": [0.4] * 3}, "other": {"value": [0.4] * 3}})
        paper = make_paper(claims=(claim(), claim(null={"method": "other"})))
        assert [v.null_fails for v in judge(paper, record)] == [True, False]


def test_a_reason_of_the_catalog_is_told_where_a_claim_does_not_hold(make_record):
    assert "too small" in verdict_of(make_record, (0.9, 0.9, 0.9), reason="the network is too small").reason
    assert "too small" not in verdict_of(make_record, (0.1, 0.1, 0.1), reason="the network is too small").reason


def test_shorter_lists_of_a_smoke_run_are_no_mistake(make_record):
    arms = {"method": {"many": [[1.0, 2.0]] * 3}}
    found = judge_claim(claim("method.many[3]"), make_record(arms, scale="smoke"), {})
    assert found.verdict == "not judged"
    assert "has 2 numbers and no [3]" in found.reason
    with pytest.raises(BadInput, match=r"no \[3\]"):
        judge_claim(claim("method.many[3]"), make_record(arms), {})
    with pytest.raises(BadInput, match="no metric 'mayn'"):
        judge_claim(claim("method.mayn[3]"), make_record(arms, scale="smoke"), {})


@pytest.mark.parametrize(
    ("measure", "why"),
    [("methd.value", "no arm 'methd'.*there are base, method"), ("method.valeu", "no metric 'valeu'; it logged value, seconds")],
)
def test_a_wrong_name_lists_what_there_is(measure, why, make_record):
    with pytest.raises(BadInput, match=why):
        verdict_of(make_record, (0.1, 0.1, 0.1), measure=measure)


def test_a_record_of_something_else_is_refused(make_paper, make_record):
    with pytest.raises(BadInput, match="not of paper 'toy'"):
        judge(make_paper(), make_record({"a": {"x": [1.0]}}, id="other"))
