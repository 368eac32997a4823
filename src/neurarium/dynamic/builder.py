"""Writing a program down: pieces that only compute, wired by the names of what they take and give.

What a piece does not read is no input of it, and what only repeats another value is no output: both are found by tracing it once
(:func:`wiring`). What nobody reads later is dropped when the program is finished. See :mod:`neurarium.dynamic.compile`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten, treespec_dumps

from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.plan import Plan, Rows, liveness
from neurarium.dynamic.program import Program
from neurarium.dynamic.tree import rows as count
from neurarium.dynamic.tree import take
from neurarium.errors import UnsupportedModel

__all__ = ["Builder", "Piece", "sample"]

SAMPLE = 4  # rows that segments are traced with: exporters treat 0 and 1 as constants


def sample(example: Any) -> Any:
    """A few rows of ``example``."""
    n = count(example)
    return take(example, torch.arange(max(SAMPLE, min(n, SAMPLE))) % n)


class Piece(nn.Module):
    """A segment: tensors in, a tuple of tensors out, no control flow. ``takes`` and ``gives`` say which leaves of the body's argument and
    result these are; other leaves of the argument are constants."""

    def __init__(self, body: nn.Module, argument: Any) -> None:
        super().__init__()
        self.body = body
        leaves, self.spec = tree_flatten(argument)
        self.fill = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.takes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.gives: list[int] | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.fill)
        for i, tensor in zip(self.takes, tensors):
            leaves[i] = tensor
        out = tree_leaves(self.body(tree_unflatten(leaves, self.spec)))
        return tuple(out if self.gives is None else (out[i] for i in self.gives))


class Builder:
    """Writes a program down step by step: what ``policy.program(example)`` of a policy with a structure of its own uses::

        def program(self, example):
            build = Builder(example)
            state, y, score = build.call(self.first, build.inputs, cost=...)    # names of values, nested as the module's result
            build.leave_if(score, tau=0, output=y, choice=0, score=score)      # rows with score >= tau[0] leave
            build.leave(build.call(self.second, state, cost=...), choice=1)
            return build.program(setting=[0.5], menu=[{"cost": c, "setting": [t]} for c, t in ...])

    A module gets one argument (a nest of values) and must only compute: no ``.item()``, no Python branch on a tensor. ``choice``,
    ``score``, ``price`` and ``more`` (FLOPs beside the sum of what was called) of a leaving row are numbers or names of values.
    """

    def __init__(self, example: Any, *, rows: Rows = "each") -> None:
        self.rows = rows
        self.samples: dict[str, Tensor] = {}
        self.nodes: list[dict[str, Any]] = []
        self.segments: list[Piece] = []
        self.examples: list[tuple[Tensor, ...]] = []
        self.inputs = tree_map(self._name, sample(example) if rows == "each" else example)
        self.names = list(self.samples)
        self._switch: dict[str, Any] | None = None
        self._structure: TreeSpec | None = None

    def _name(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"v{len(self.samples)}"
        self.samples[name] = value.detach()
        return name

    def call(self, body: nn.Module, argument: Any, *, cost: int) -> Any:
        """Run ``body`` on the values that ``argument`` names; returns the names of what comes out, nested alike."""
        sample = tree_map(lambda v: self.samples.get(v, v) if isinstance(v, str) else v, argument)
        names = [v for v in tree_leaves(argument) if isinstance(v, str) and v in self.samples]
        piece = Piece(body, sample)
        with torch.no_grad(), evaluating(body):
            result = body(sample)
            leaves, structure = tree_flatten(result)
            where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            piece.gives = where
            used, same = wiring(piece, [self.samples[n] for n in names])
        given: list[Any] = list(leaves)
        fresh: list[str] = []
        kept: list[int] = []
        for i, position in enumerate(where):
            kind, source = same.get(i, ("new", 0))
            if kind == "new":
                given[position] = self._name(leaves[position])
                fresh.append(given[position])
                kept.append(position)
            else:
                given[position] = names[source] if kind == "input" else given[where[source]]
        every, piece.gives, piece.takes = piece.takes, kept, [piece.takes[i] for i in used]
        inputs = [names[i] for i in used]
        try:
            with torch.no_grad(), evaluating(body):
                piece(*(self.samples[v] for v in inputs))
        except (AttributeError, TypeError):  # it asks for the shape of an input that it does not compute with
            piece.takes, inputs = every, names
        if self.rows == "each" and any(len(self.samples[v]) != SAMPLE for v in inputs + fresh if self.samples[v].ndim):
            raise UnsupportedModel("puts out a tensor that is not batch-first", module=type(body).__name__)
        self.segments.append(piece)
        self.examples.append(tuple(self.samples[v] for v in inputs))
        node = {"do": "call", "segment": len(self.segments) - 1, "in": inputs, "out": fresh, "cost": int(cost), "next": len(self.nodes) + 1}
        self.nodes.append(node)
        return tree_unflatten(given, structure)

    def leave_if(self, on: str, *, tau: int | None = None, output: Any, choice: Any, score: Any = None, price: Any = None) -> None:
        """Rows whose value ``on`` reaches threshold number ``tau`` (without one: is true) leave with ``output``."""
        here = len(self.nodes)
        self.nodes.append({"do": "ask", "on": on, "tau": tau, "yes": here + 1, "no": here + 2})
        self.leave(output, choice=choice, score=score, price=price)

    def leave(self, output: Any, *, choice: Any = 0, score: Any = None, price: Any = None, more: Any = None) -> None:
        """All rows that get here leave."""
        names, self._structure = tree_flatten(output)
        self.nodes.append({"do": "return", "out": names, "choice": choice, "score": score, "price": price, "more": more})

    def switch(self, settings: Sequence[int]) -> None:
        """Go on where :meth:`at` says for the current setting."""
        self._switch = {"do": "switch", "to": {str(s): -1 for s in settings}}
        self.nodes.append(self._switch)

    def at(self, setting: int) -> None:
        """What follows is for this setting."""
        assert self._switch is not None
        self._switch["to"][str(setting)] = len(self.nodes)

    def program(self, *, setting: Any = None, menu: Sequence[Mapping[str, Any]] = (), settings: Sequence[int] = ()) -> Program:
        """Drop what nobody reads and finish."""
        live = liveness(self.nodes)
        for node, alive in zip(self.nodes, live):
            node["live"] = sorted(alive)
        for node in self.nodes:
            if node["do"] == "call":
                needed = live[node["next"]]
                piece = self.segments[node["segment"]]
                kept = [i for i, name in enumerate(node["out"]) if name in needed]
                node["out"], piece.gives = [node["out"][i] for i in kept], [piece.gives[i] for i in kept]
        final = next(node for node in self.nodes if node["do"] == "return")
        output = [(list(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in (self.samples[v] for v in final["out"])]
        assert self._structure is not None
        plan = Plan(
            self.nodes, self.names, output, treespec_dumps(self._structure), rows=self.rows, setting=setting, settings=list(settings),
            menu=list(menu),
        )  # fmt: skip
        return Program(self.segments, plan, self.examples)


def wiring(piece: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[int], dict[int, tuple[str, int]]]:
    """Which inputs are read at all; and which outputs only repeat an input or an earlier output."""
    try:
        graph = make_fx(lambda *t: piece(*t))(*inputs).graph
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise UnsupportedModel(
            "decides inside a segment (.item(), or an if on a tensor): " + str(error).splitlines()[0], module=type(piece).__name__
        ) from error
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    outputs, same = list(results), {}
    for i, node in enumerate(outputs):
        if node in holders:
            same[i] = "input", holders.index(node)
        elif node in outputs[:i]:
            same[i] = "output", outputs.index(node)
    used = [i for i, node in enumerate(holders) if any(user.op != "output" for user in node.users)]
    return used, same
