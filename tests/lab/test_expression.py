"""Measures: what they compute, and that they cannot do anything else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neurarium.errors import BadInput
from neurarium.lab import Expression

DATA = {"a": {"x": 2.0, "n": 3, "ok": True, "list": [1.0, 4.0, 9.0], "nan": math.nan}, "b": {"x": 8.0, "list": [3.0, 1.0, 2.0], "none": []}}


def lookup(arm, metric):
    if arm not in DATA:
        raise BadInput(f"no arm {arm!r}; there are {', '.join(DATA)}")
    if metric not in DATA[arm]:
        raise BadInput(f"arm {arm!r} has no metric {metric!r}; it logged {', '.join(DATA[arm])}")
    return DATA[arm][metric]


def value(text):
    return Expression.parse(text).evaluate(lookup)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.x / b.x", 0.25),
        ("-a.x + 3 * b.x ** 2", 190.0),
        ("(a.x - 1) * a.n", 3.0),
        ("a.ok + 1", 2.0),
        ("a.list[1] - a.list[-1]", -5.0),
        ("mean(a.list)", 14 / 3),
        ("median(a.list)", 4.0),
        ("sum(a.list) - len(a.list)", 11.0),
        ("max(a.x, b.x, 3)", 8.0),
        ("min(a.list)", 1.0),
        ("mean(a.list / b.list)", (1 / 3 + 4 + 4.5) / 3),
        ("abs(a.x - b.x)", 6.0),
        ("sqrt(a.x * b.x)", 4.0),
        ("log10(100) + 0 * a.x", 2.0),
        ("exp(log(a.x))", 2.0),
        ("len(a.x)", 1.0),
        ("interp(2.5, a.list, b.list)", 2.0),
        ("interp(1.5, b.list, a.list)", 6.5),  # points in any order
        ("slope(a.list, 2 * a.list)", 2.0),
        ("slope(log10(a.list), log10(a.list ** 2))", 2.0),
        ("corr(a.list, -a.list)", -1.0),
        ("spearman(a.list, exp(a.list))", 1.0),
        ("max(mean(a.list), b.x)", 8.0),
    ],
)
def test_values(text, expected):
    assert value(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["a.x / 0", "a.x / (b.x - 8)", "(0 - a.x) ** 0.5", "log(0 * a.x)", "9 ** 9 ** 9 * a.x", "a.nan * 0", "interp(99, a.list, b.list)"],
)
def test_undefined_arithmetic_is_not_finite_and_not_slow(text):
    assert not math.isfinite(value(text))


def test_spearman_agrees_with_scipy_with_ties():
    from scipy import stats

    random = np.random.default_rng(0)
    xs, ys = random.integers(0, 5, 30).tolist(), random.integers(0, 5, 30).tolist()
    found = Expression.parse("spearman(p.x, p.y)").evaluate(lambda _, metric: {"x": xs, "y": ys}[metric])
    assert found == pytest.approx(stats.spearmanr(xs, ys).statistic)


def test_names_are_those_it_reads():
    assert Expression.parse("a.x / (b.x + a.x)").names == (("a", "x"), ("b", "x"))
    assert Expression.parse("a.x / (b.x + a.y)").arms == ("a", "b")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__[0].__subclasses__()",
        "a.__class__",
        "a.x.real",
        "a.x.__class__.__mro__",
        "a['x']",
        "open('/etc/passwd')",
        "eval('1')",
        "getattr(a, 'x')",
        "lambda: a.x",
        "[x for x in a.list]",
        "a.x if a.x else b.x",
        "a.x > 1",
        "a.x and b.x",
        "not a.x",
        "~a.n",
        "a.n << 1000000",
        "a.n % 2",
        "a.n // 2",
        "a.x @ b.x",
        "(a := 1)",
        "f'{a.x}'",
        "'text' * 3",
        "b'x'",
        "1j * a.x",
        "None",
        "True + a.x",
        "a.list[0:2]",
        "a.list[a.n]",
        "a.list[True]",
        "a.list[0.5]",
        "a.list[10 ** 9]",
        "mean(a.list, axis=0)",
        "max(*a.list)",
        "a",
        "1 + 1",
        "",
        "a.x; b.x",
        "import os",
        "a.x +",
        "lambda.x",
        "é.x",
        "mean()",
        "slope(a.list)",
        "yield a.x",
        "await a.x",
        "...",
        "{a.x}",
        "(a.x, b.x)",
        "a.x" + " + a.x" * 200,
        "(" * 240 + "a.x" + ")" * 240,
        "-" * 60 + "a.x",
        "a.x * 1" + "0" * 310,
        "a.x\0",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(BadInput, match="measure"):
        Expression.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("c.x", "no arm 'c'; there are a, b"),
        ("a.speed", "arm 'a' has no metric 'speed'; it logged x, n, ok"),
        ("a.list", "is a list of 3 numbers; reduce it"),
        ("a.x[0]", "is one number"),
        ("a.list[7]", r"has 3 numbers and no \[7\]"),
        ("mean(b.none)", "empty list"),
        ("max(a.list, 1)", "one list, or several numbers"),
        ("slope(a.list, b.none)", "two lists of one length"),
        ("mean(a.list + a.list[0] * b.none)", "measure"),
    ],
)
def test_what_does_not_fit_is_said(text, why):
    with pytest.raises(BadInput, match=why):
        value(text)


def test_a_function_that_is_nearly_right_is_suggested():
    with pytest.raises(BadInput, match="did you mean 'median'"):
        Expression.parse("medain(a.list)")
