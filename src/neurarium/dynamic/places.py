"""Where in a program one is while its source is read, and what is known there.

A place is a stack of frames: the statement in each block, the turn of each loop, the calls. Two places with the same frames and the same
known values are one node of the graph, so branches meet again and loops close. See :mod:`neurarium.dynamic.rewrite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_flatten, tree_leaves

from neurarium.dynamic.syntax import read_by_loop, read_first

__all__ = ["NUMBERS", "ROWS", "Computed", "Env", "Frame", "Known", "mentions_rows", "place", "still_read", "tidy"]

NUMBERS = (bool, int, float)


@dataclass
class Known:
    """A variable whose value is known while the source is read."""

    value: Any


@dataclass
class Computed:
    """A variable that a segment computes: any nest of tensors, of which ``sample`` is an example."""

    sample: Any


Env = dict[str, Any]  # the variables, Known or Computed


class _Rows:
    """The number of rows, which is not known."""


ROWS = _Rows()


def mentions_rows(known: Any) -> bool:
    return isinstance(known, Known) and any(leaf is ROWS for leaf in tree_leaves(known.value))


@dataclass(frozen=True, eq=False)
class Frame:
    """Where one is: in a list of statements, in a turn of a loop, in a call, or below a branch on a tensor."""

    kind: str  # block, for, while, call, join
    node: Any = None  # list of statements, or the statement
    index: int = 0
    items: tuple[Any, ...] = ()

    @property
    def key(self) -> Any:
        return self.kind, id(self.node), self.index, tuple(_identity(v) for v in self.items)


def place(frames: Sequence[Frame], env: Env) -> tuple[Any, Any, Any]:
    """What tells one place from another: the frames, what is known, and the kinds of what is computed."""
    known = tuple(sorted((name, "known", _identity(v.value)) for name, v in env.items() if isinstance(v, Known)))
    kinds = tuple(
        sorted(
            (name, str(tree_flatten(v.sample)[1]), str([(t.shape, t.dtype) for t in tree_leaves(v.sample)]))
            for name, v in env.items()
            if isinstance(v, Computed)
        )
    )
    return tuple(f.key for f in frames), known, kinds


def _identity(value: Any) -> Any:
    if isinstance(value, (str, bytes, *NUMBERS, type(None))):
        return type(value).__name__, value
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_identity(v) for v in value)
    return id(value)


def still_read(frames: Sequence[Frame]) -> set[str]:
    out: set[str] = set()
    for frame in frames:
        if frame.kind == "block":
            out = read_first(frame.node[frame.index :], out)
        elif frame.kind == "for" and frame.index + 1 < len(frame.items):
            out = read_by_loop(frame.node, out)
    return out


def tidy(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """Without blocks at their end, and without what is only popped: two ways to say one place become the same."""
    tidy: list[Frame] = []
    for frame in frames:
        done = frame.kind == "block" and frame.index >= len(frame.node)
        if not done and not (frame.kind == "join" and tidy and tidy[-1].kind == "join"):
            tidy.append(frame)
    while tidy and tidy[-1].kind in ("join", "while"):
        tidy.pop()
    return tuple(tidy)
