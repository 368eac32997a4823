"""Claim measures: arithmetic over ``arm.metric``, and nothing else.

``sltt.peak_saved / bptt.peak_saved``, ``median(early.cost) / full.cost[0]``, ``slope(log10(a.sizes), log10(a.seconds))``.

The text is parsed into a syntax tree in which only numbers, ``arm.metric`` (with one constant index), ``+ - * / **`` and the
functions below are allowed; the tree is walked, never compiled. So a measure can read what was logged and nothing more, whoever wrote
the catalog. All arithmetic is in floating point: a large power is infinite, not slow, and a division by zero is not finite, which no
claim survives.

Lists (metrics that are lists) are taken element by element; the whole must come out as one number.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from neurarium.errors import BadInput
from neurarium.lab.names import check_name

__all__ = ["FUNCTIONS", "Expression", "Lookup"]

#: Gives the value of a metric of an arm, or raises BadInput that lists what exists.
Lookup: TypeAlias = "Callable[[str, str], Any]"

MAX_LENGTH, MAX_NODES, MAX_DEPTH, MAX_INDEX = 500, 200, 25, 1000


def _reduced(reduce: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of one list or of several numbers."""

    def call(*values: Any) -> Any:
        if len(values) != 1 and any(np.ndim(v) for v in values):
            raise BadInput("takes one list, or several numbers")
        numbers = np.atleast_1d(values[0] if len(values) == 1 else np.array(values, dtype=float))
        if not numbers.size:
            raise BadInput("was given an empty list")
        return reduce(numbers)

    return call


def _pair(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of two lists of one length, at least two."""

    def checked(xs: Any, ys: Any) -> Any:
        if np.ndim(xs) != 1 or np.shape(xs) != np.shape(ys) or len(xs) < 2:
            raise BadInput("takes two lists of one length, at least 2")
        return call(xs, ys) if np.isfinite(xs).all() and np.isfinite(ys).all() else np.float64(np.nan)

    return checked


def _slope(xs: Any, ys: Any) -> Any:
    dx = xs - xs.mean()
    return (dx * (ys - ys.mean())).sum() / (dx * dx).sum()


def _corr(xs: Any, ys: Any) -> Any:
    dx, dy = xs - xs.mean(), ys - ys.mean()
    return (dx * dy).sum() / np.sqrt((dx * dx).sum() * (dy * dy).sum())


def _ranks(values: Any) -> Any:
    """Ranks from 0; ties share their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]


def _interp(x: Any, xs: Any, ys: Any) -> Any:
    """Linear between the points, in any order; NaN outside them, where nothing was measured."""
    order = np.argsort(xs, kind="stable")
    return np.interp(x, xs[order], ys[order], left=np.nan, right=np.nan)


#: name -> (function, least and greatest number of arguments)
FUNCTIONS: Mapping[str, tuple[Callable[..., Any], int, int]] = {
    "abs": (np.abs, 1, 1),
    "min": (_reduced(np.min), 1, 20),
    "max": (_reduced(np.max), 1, 20),
    "mean": (_reduced(np.mean), 1, 20),
    "median": (_reduced(np.median), 1, 20),
    "sum": (_reduced(np.sum), 1, 20),
    "sqrt": (np.sqrt, 1, 1),
    "log": (np.log, 1, 1),
    "log10": (np.log10, 1, 1),
    "exp": (np.exp, 1, 1),
    "len": (lambda values: np.float64(np.atleast_1d(values).size), 1, 1),
    "interp": (lambda x, xs, ys: _pair(lambda a, b: _interp(x, a, b))(xs, ys), 3, 3),
    "slope": (_pair(_slope), 2, 2),
    "corr": (_pair(_corr), 2, 2),
    "spearman": (_pair(lambda xs, ys: _corr(_ranks(xs), _ranks(ys))), 2, 2),
}

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}


@dataclass(frozen=True)
class Expression:
    """A parsed measure."""

    text: str
    tree: ast.expr
    names: tuple[tuple[str, str], ...]  # the (arm, metric) pairs that it reads

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Check and parse; :class:`~neurarium.errors.BadInput` that quotes what is not allowed."""
        return _parse(text)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it reads."""
        return tuple(dict.fromkeys(arm for arm, _ in self.names))

    def evaluate(self, lookup: Lookup) -> float:
        """The measure's value; NaN or infinite where the arithmetic is undefined."""
        with np.errstate(all="ignore"):
            try:
                value = _value(self.tree, lookup)
            except BadInput as error:
                raise BadInput(f"measure {self.text!r}: {error}") from None
            except (ValueError, IndexError, TypeError) as error:  # shapes that do not fit, an index outside
                raise BadInput(f"measure {self.text!r}: {error}") from None
        if np.ndim(value) != 0:
            raise BadInput(f"measure {self.text!r} is a list of {len(value)} numbers; reduce it with mean, median, min, max or an index")
        return float(value)


@lru_cache(maxsize=2048)
def _parse(text: str) -> Expression:
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise BadInput(f"a measure is a text of at most {MAX_LENGTH} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise BadInput(f"measure {text!r} cannot be parsed: {getattr(error, 'msg', None) or error}") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise BadInput(f"measure {text[:60]!r}... is too long: more than {MAX_NODES} parts")
    names: list[tuple[str, str]] = []
    try:
        _check(tree, names, 1)
    except BadInput as error:
        raise BadInput(f"measure {text!r}: {error}") from None
    if not names:
        raise BadInput(f"measure {text!r} reads no arm.metric")
    return Expression(text, tree, tuple(dict.fromkeys(names)))


def _check(node: ast.expr, names: list[tuple[str, str]], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise BadInput(f"nested more than {MAX_DEPTH} levels deep")
    match node:
        case ast.Constant(value=bool() | str() | bytes() | complex() | None):
            raise BadInput(f"{ast.unparse(node)} is not a number")
        case ast.Constant(value=int() | float() as number):
            if abs(number) > 1e300:
                raise BadInput("a number is too large")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            _check(node.operand, names, depth + 1)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            _check(node.left, names, depth + 1)
            _check(node.right, names, depth + 1)
        case ast.Attribute(value=ast.Name(id=arm), attr=metric):
            names.append((check_name(arm, "arm"), check_name(metric, "metric")))
        case ast.Subscript(value=ast.Attribute()):
            _index(node)
            _check(node.value, names, depth + 1)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            if name not in FUNCTIONS:
                raise BadInput(f"unknown function {name!r}{_near(name, FUNCTIONS)}")
            _, least, most = FUNCTIONS[name]
            if not least <= len(node.args) <= most:
                raise BadInput(f"{name} takes {least if least == most else f'{least} to {most}'} values, was given {len(node.args)}")
            for argument in node.args:
                _check(argument, names, depth + 1)
        case ast.Name(id=name):
            raise BadInput(f"{name!r} alone means nothing; write arm.metric")
        case _:
            raise BadInput(f"{ast.unparse(node)[:60]!r} is not allowed; use numbers, arm.metric, arm.metric[2], + - * / **, and functions")


def _index(node: ast.Subscript) -> int:
    match node.slice:
        case ast.Constant(value=int() as index) if not isinstance(index, bool) and index < MAX_INDEX:
            return index
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as index)) if not isinstance(index, bool) and index <= MAX_INDEX:
            return -index
    raise BadInput(f"an index is a whole number below {MAX_INDEX}, not {ast.unparse(node.slice)[:60]!r}")


def _value(node: ast.expr, lookup: Lookup) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return np.float64(number)
        case ast.UnaryOp(operand=operand, op=op):
            value = _value(operand, lookup)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, lookup), _value(right, lookup))
        case ast.Attribute(value=ast.Name(id=arm), attr=metric):
            return np.asarray(lookup(arm, metric), dtype=np.float64)[()]
        case ast.Subscript(value=inner):
            values, index = _value(inner, lookup), _index(node)
            if np.ndim(values) == 0:
                raise BadInput(f"{ast.unparse(inner)} is one number and has no [{index}]")
            if not -len(values) <= index < len(values):
                raise BadInput(f"{ast.unparse(inner)} has {len(values)} numbers and no [{index}]")
            return values[index]
        case ast.Call(func=ast.Name(id=name), args=args):
            try:
                return FUNCTIONS[name][0](*(_value(argument, lookup) for argument in args))
            except BadInput as error:
                raise BadInput(f"{name}(...): {error}") from None
    raise BadInput(f"{type(node).__name__} is not allowed")  # cannot be reached after _check


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
