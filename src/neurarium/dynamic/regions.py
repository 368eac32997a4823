"""Regions of a program without a branch, as syntax trees: how they are joined, and the code that they become.

The graph of regions comes from :mod:`neurarium.dynamic.rewrite`. Here are the passes on it: skip what is empty, join a region with the only
one that leads to it (:func:`fuse`), drop statements that nobody reads (:func:`prune`), leave copies to the host (:func:`rename`).

*Source.* Chen, Wei, Zhao, Wu, Yang, arXiv 2307.04963. *Departures.* The passes are reconstructed from the paper's description.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neurarium.dynamic.syntax import names_written, read_first

__all__ = ["ANSWER", "RESULT", "Code", "Region", "fuse", "plain_result", "prune", "rename", "settle"]


@dataclass
class Region:
    """Statements without a branch, and how they end: ``("go", node)``, ``("ask", yes, no)`` on ``ANSWER``, or ``("return", structure)``."""

    start: dict[str, Any]  # samples of the variables at the beginning
    code: list[ast.stmt] = field(default_factory=list)
    live: set[str] = field(default_factory=set)  # read after it
    renamed: dict[str, str] = field(default_factory=dict)  # after the code: which variables are the same as which
    end: tuple[Any, ...] = ()


ANSWER, RESULT = "_answer", "_result"


class Code(nn.Module):
    """Generated code with what it uses; ``source`` can be read."""

    def __init__(self, source: str, held: dict[str, Any], space: dict[str, Any]) -> None:
        super().__init__()
        self.source, self.space, self.held = source, space, tuple((n, id(v)) for n, v in held.items())
        for name, value in held.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.add_module(name, value)
        self._build()

    def _build(self) -> None:
        space = dict(self.space)
        exec(compile(self.source, "<segment>", "exec"), space)
        self.function = space["forward"]

    def forward(self, argument: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.function(self, *argument)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["function"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build()


def leaf_names(name: str, value: Any) -> list[str]:
    return [name] if isinstance(value, Tensor) else [f"{name}.{i}" for i in range(len(tree_leaves(value)))]


def ways_out(region: Region) -> list[int]:
    return [] if region.end[0] == "return" else list(region.end[1:])


def plain_result(region: Region) -> list[str] | None:
    """The variables that a region returns, if it returns nothing else."""
    if region.end[0] != "return" or not region.code:
        return None
    value, made = region.code[-1].value, region.end[1]
    parts = value.elts if isinstance(value, ast.Tuple) else [value]
    leaves = made if isinstance(value, ast.Tuple) else [made]
    if all(isinstance(part, ast.Name) for part in parts) and all(isinstance(leaf, Tensor) for leaf in leaves):
        return [part.id for part in parts]
    return None


def needs(code: Sequence[ast.stmt]) -> set[str]:
    """Variables that are read before they are written."""
    return read_first(code, set())


def settle(regions: list[Region]) -> list[int]:
    fuse(regions)
    return prune(regions)


def rename(region: Region) -> None:
    """Take out assignments of one variable to another: the host only renames."""
    code, alias = [], {}
    for i, stmt in enumerate(region.code):
        later = set().union(*(names_written(s) for s in region.code[i + 1 :]))
        for node in ast.walk(stmt):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                node.id = alias.get(node.id, node.id)
        match stmt:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=source)) if (
                name not in (ANSWER, RESULT) and not {name, source} & later
            ):
                alias[name] = source
            case _:
                code.append(stmt)
    region.code = code
    region.renamed = {name: source for name, source in alias.items() if name in region.live}


def fuse(regions: list[Region]) -> None:
    """Skip regions without statements; join a region with the only one that leads to it."""

    for region in regions:
        if region.end[0] == "ask" and region.end[1] == region.end[2]:
            region.end = "go", region.end[1]

    def target(r: int) -> int:
        seen = set()
        while not regions[r].code and regions[r].end[0] == "go" and r not in seen:
            seen.add(r)
            r = regions[r].end[1]
        return r

    for region in regions:
        if region.end[0] != "return":
            region.end = region.end[0], *(target(r) for r in region.end[1:])
            if len(set(region.end[1:])) == 1:
                region.end = "go", region.end[1]  # whatever the answer is
    changed = True
    while changed:
        changed = False
        reached = _reach(regions)
        before = [w for r in reached for w in ways_out(regions[r])]
        for r in reached:
            region = regions[r]
            if region.end[0] == "go" and region.end[1] != r and region.end[1] != 0 and before.count(region.end[1]) == 1:
                after = regions[region.end[1]]
                region.code, region.end, changed = [*region.code, *after.code], after.end, True
                break


def _reach(regions: list[Region]) -> list[int]:
    """Regions in an order in which a loop's body comes before what follows the loop."""
    done: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(reversed(ways_out(regions[0]))))]
    while stack:
        way = next(stack[-1][1], None)
        if way is None:
            done.append(stack.pop()[0])
        elif way not in seen:
            seen.add(way)
            stack.append((way, iter(reversed(ways_out(regions[way])))))
    return done[::-1]


def prune(regions: list[Region]) -> list[int]:
    """Drop statements whose results nobody reads; note what is read after each region."""
    order = _reach(regions)
    before: dict[int, set[str]] = {r: set() for r in order}
    changed = True
    while changed:
        changed = False
        for r in reversed(order):
            region = regions[r]
            region.live = set().union(*(before[w] for w in ways_out(region)))
            out = region.live | {"ask": {ANSWER}, "return": {RESULT}}.get(region.end[0], set())
            now = _needed(region.code, out)[1]
            if now != before[r]:
                before[r], changed = now, True
    for r in order:
        region = regions[r]
        out = region.live | {"ask": {ANSWER}, "return": {RESULT}}.get(region.end[0], set())
        region.code = _needed(region.code, out)[0]
    return order


def _needed(code: Sequence[ast.stmt], out: set[str]) -> tuple[list[ast.stmt], set[str]]:
    kept: list[ast.stmt] = []
    for stmt in reversed(code):
        if names_written(stmt) & out:
            kept.append(stmt)
            out = read_first([stmt], out)
    return kept[::-1], out
