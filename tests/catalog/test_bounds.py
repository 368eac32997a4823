"""Bounds: what they contain, and that what is printed reads back the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurarium.catalog import Bound
from neurarium.errors import BadInput


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("<= 0.30", [0.3, -5], [0.30001, math.nan, math.inf]),
        ("< 1", [0.999], [1, 2]),
        (">= 1e-3", [0.001, math.inf], [0, -1]),
        ("> -.5", [0], [-0.5]),
        ("== 1", [1.0], [0.999, 1.001, math.nan]),
        (">= 0.8 and < 1.2", [0.8, 1.19], [1.2, 0.79]),
        ("in [0.8, 1.2]", [0.8, 1.2], [1.21]),
        ("<= 1 and < 1", [0.9], [1]),
        (">= 1 and > 1", [1.1], [1]),
        ("  <=0.3  ", [0.3], [0.4]),
    ],
)
def test_contains(text: str, inside: list[float], outside: list[float]):
    bound = Bound.parse(text)
    assert all(bound.contains(value) for value in inside)
    assert not any(bound.contains(value) for value in outside)
    assert Bound.parse(str(bound)) == bound


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10), st.sampled_from(["<", "<=", ">", ">="]))
def test_an_interval_is_contained_when_every_point_is(a: float, b: float, end: float, sign: str):
    low, high = sorted((a, b))
    bound = Bound.parse(f"{sign} {end!r}")
    points = [low + (high - low) * i / 10 for i in range(11)]
    if bound.contains_interval(low, high):
        assert all(bound.contains(min(max(point, low), high)) for point in points)
    else:
        assert not (bound.contains(low) and bound.contains(high))


@pytest.mark.parametrize(
    "text",
    ["", "0.3", "<= ", "=< 3", "<= x", "<= 1 or > 2", "in [1]", "in (0, 1)", "<= nan", "<= inf", "<= 1_0", "<= 0x1", "<= ٣"],
)
def test_what_is_no_bound_is_refused_with_the_syntax(text: str):
    with pytest.raises(BadInput, match="write it as"):
        Bound.parse(text)


@pytest.mark.parametrize("text", ["> 1 and < 1", "> 1 and <= 1", "in [2, 1]", "== 1 and == 2"])
def test_an_empty_bound_is_refused(text: str):
    with pytest.raises(BadInput, match="no value satisfies"):
        Bound.parse(text)
