"""From regions to a program: each becomes a segment with inputs and outputs, each end a node of the plan.

See :mod:`neurarium.dynamic.rewrite`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, treespec_dumps
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.builder import Piece
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.plan import Plan, liveness
from neurarium.dynamic.program import Program
from neurarium.dynamic.regions import ANSWER, RESULT, Code, Region, leaf_names, needs, plain_result, rename, settle
from neurarium.dynamic.scope import Scope
from neurarium.dynamic.syntax import names_read, names_written
from neurarium.errors import UnsupportedModel

__all__ = ["assemble"]


def assemble(regions: list[Region], scope: Scope, inputs: dict[str, Any]) -> Program:
    """The program of a graph of regions; ``inputs`` are samples of what the module takes, by name."""
    order: list[int] = []
    while order != (order := settle(regions)):
        pass
    for r in order:
        rename(regions[r])
    return _Assembler(scope, inputs).program(regions, order)


class _Assembler:
    def __init__(self, scope: Scope, inputs: dict[str, Any]) -> None:
        self.scope, self.inputs = scope, inputs
        self.nodes: list[dict[str, Any]] = []
        self.segments: list[Piece] = []
        self.examples: list[tuple[Tensor, ...]] = []
        self.shared: dict[Any, int] = {}  # equal segments are one
        self.structure: str | None = None
        self.output: list[tuple[list[int], str]] = []
        self.returns = 0

    def program(self, regions: list[Region], order: list[int]) -> Program:
        entry: dict[int, int] = {}  # the first node of each region
        for r in order:
            entry[r] = len(self.nodes)
            self.add(regions[r])
        for node in self.nodes:
            if node.pop("open", False):  # it names regions, not nodes
                for way in ("next", "yes", "no"):
                    if way in node:
                        node[way] = entry[node[way]]
        for node, alive in zip(self.nodes, liveness(self.nodes)):
            node["live"] = sorted(alive)
        inputs = [leaf_name for name, v in self.inputs.items() for leaf_name in leaf_names(name, v)]
        plan = Plan(self.nodes, inputs, self.output, self.structure or "", rows=self.scope.rows)
        return Program(self.segments, plan, self.examples)

    def add(self, region: Region) -> None:
        """The call of a region's code, its copies, and its end."""
        plain = plain_result(region)
        if plain is not None:
            region.code = region.code[:-1]
        made = self.call(region, plain) if region.code else {}
        if region.renamed:
            kinds = {**region.start, **made}
            pairs = [pair for to, of in region.renamed.items() for pair in zip(leaf_names(to, kinds[of]), leaf_names(of, kinds[of]))]
            to, of = map(list, zip(*pairs))
            self.nodes.append({"do": "name", "out": to, "in": of, "next": len(self.nodes) + 1})
        match region.end:
            case ("ask", yes, no):
                self.nodes.append({"do": "ask", "on": ANSWER, "tau": None, "yes": yes, "no": no, "open": True})
            case ("go", to):
                if not region.code and not region.renamed:
                    raise self.scope.refuse("never ends")
                self.nodes[-1].update(next=to, open=True)
            case ("return", result):
                self.leave(result, leaf_names(RESULT, result) if plain is None else list(plain))

    def call(self, region: Region, plain: list[str] | None) -> dict[str, Any]:
        """A segment of the region's code: it takes what the code reads, and gives what is read later. Returns samples of that."""
        takes = [name for name in region.start if name in needs(region.code)]
        gives = {"ask": [ANSWER], "return": [RESULT] if plain is None else []}.get(region.end[0], [])
        read = region.live | set(plain or ()) | set(region.renamed.values())
        gives += sorted(set().union(*(names_written(s) for s in region.code)) & read - set(gives))
        argument = tuple(region.start[name] for name in takes)
        body = self.code(region.code, takes, gives)
        piece = Piece(body, argument)
        tensors = tuple(tree_leaves(argument))
        with torch.no_grad():
            results = body(argument)
        names = [leaf_name for name, v in zip(gives, results) for leaf_name in leaf_names(name, v)]
        ins = [leaf_name for name, v in zip(takes, argument) for leaf_name in leaf_names(name, v)]
        self.check([*zip(ins, tensors), *zip(names, tree_leaves(results))])
        key = body.source, tuple(body.held), tuple((t.shape, t.dtype) for t in tensors)
        if key not in self.shared:
            self.shared[key] = len(self.segments)
            self.segments.append(piece)
            self.examples.append(tensors)
        node = {"do": "call", "segment": self.shared[key], "in": ins, "out": names, "cost": self.cost(piece, tensors)}
        self.nodes.append({**node, "next": len(self.nodes) + 1})
        return dict(zip(gives, results))

    def leave(self, result: Any, names: list[str]) -> None:
        spec = treespec_dumps(tree_flatten(result)[1])
        if self.structure not in (None, spec):
            raise UnsupportedModel("returns results of different structure", module=type(self.scope.module).__name__)
        self.structure = spec
        self.output = [(list(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in tree_leaves(result)]
        self.nodes.append({"do": "return", "out": names, "choice": self.returns})
        self.returns += 1

    def check(self, values: Sequence[tuple[str, Tensor]]) -> None:
        for name, t in values:
            if self.scope.rows == "each" and not (t.ndim and len(t) == self.scope.n):
                raise UnsupportedModel(
                    f"the variable {name.split('.')[0]!r} of shape {tuple(t.shape)} does not have one entry a row; for one decision a "
                    "batch say rows='batch'",
                    module=type(self.scope.module).__name__,
                )

    def cost(self, piece: Piece, tensors: tuple[Tensor, ...]) -> int:
        if self.scope.rows == "each":
            return CostTable.measure([lambda t: piece(*t)], tensors).full
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            piece(*tensors)
        return counter.get_total_flops() // self.scope.n

    def code(self, statements: list[ast.stmt], takes: list[str], gives: list[str]) -> Code:
        names = set().union(*(names_read(s) for s in statements))
        used = {
            n.attr
            for s in statements
            for n in ast.walk(s)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
        }
        lines = [f"def forward(self, {', '.join(takes)}):".replace(", )", ")")]
        lines += [f"    {line}" for s in statements for line in ast.unparse(ast.fix_missing_locations(s)).splitlines()]
        lines += [f"    return ({', '.join(gives)},)", ""]
        space = {name: self.scope.space[name] for name in sorted(names & set(self.scope.space))}
        return Code("\n".join(lines), {name: v for name, v in self.scope.held.items() if name in used}, space)
