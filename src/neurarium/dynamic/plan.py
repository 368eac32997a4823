"""The plan of a compiled network: what is called, what is asked between the calls, and where each answer leads, as plain data.

A plan is all that :class:`~neurarium.dynamic.host.Host` needs beside the segments; it is saved as JSON. See
:mod:`neurarium.dynamic.compile`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Plan", "Rows", "liveness"]

Rows = Literal["each", "batch"]


@dataclass(frozen=True)
class Plan:
    """What the host interprets, as plain data.

    Attributes:
        nodes: each a mapping with ``do``: ``call`` (``segment``, ``in``, ``out``, ``cost`` in FLOPs a row, ``next``), ``name`` (``out``,
            ``in``, ``next``: the same value under another name), ``ask`` (``on``,
            ``tau``: the number of the threshold, or none if the value is true or false; ``yes``, ``no``), ``switch`` (``to``: by
            setting), ``return`` (``out``, ``choice``, ``score``, ``price``, ``more``); and with ``live``: the values needed from here on.
        inputs: names of the inputs.
        output: shape (of one row) and dtype of each output.
        rows: ``"each"`` or ``"batch"``.
        setting: the current thresholds, or the current configuration.
        settings: the configurations that there are.
        menu: ``cost`` and ``setting``, cheapest first: what a budget buys.
        segments: file names, once saved.
    """

    nodes: list[dict[str, Any]]
    inputs: list[str]
    output: list[tuple[list[int], str]]
    structure: str
    rows: Rows = "each"
    setting: Any = None
    settings: Sequence[int] = ()
    menu: Sequence[Mapping[str, Any]] = ()
    segments: Sequence[str] = ()

    def to_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))

    def listing(self) -> str:
        """The program as a list of steps."""
        lines = [f"takes {', '.join(self.inputs)}"]
        for i, node in enumerate(self.nodes):
            match node["do"]:
                case "call":
                    text = f"{', '.join(node['out'])} = segment_{node['segment']}({', '.join(node['in'])})"
                    text += f"    # {node['cost']:,} FLOPs a row" + ("" if node["next"] == i + 1 else f", then {node['next']}")
                case "name":
                    text = f"{', '.join(node['out'])} = {', '.join(node['in'])}" + (
                        "" if node["next"] == i + 1 else f"    # then {node['next']}"
                    )
                case "ask":
                    asked = node["on"] if node["tau"] is None else f"{node['on']} >= tau[{node['tau']}]"
                    text = f"if {asked}: go to {node['yes']}, else to {node['no']}"
                case "switch":
                    text = "by setting: " + ", ".join(f"{k} to {v}" for k, v in node["to"].items())
                case _:
                    text = f"return {', '.join(node['out'])}    # choice {node['choice']}"
            lines.append(f"{i:3}: {text}")
        return "\n".join(lines)


def _finite(tree: Any) -> Any:
    """JSON has no infinity: as text, which float() reads."""
    if isinstance(tree, Mapping):
        return {k: _finite(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(v) for v in tree]
    return str(tree) if isinstance(tree, float) and tree in (float("inf"), float("-inf")) else tree


def liveness(nodes: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """The values that each node, or one after it, reads before they are written."""
    live: list[set[str]] = [set() for _ in nodes]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(nodes))):
            node = nodes[i]
            match node["do"]:
                case "call" | "name":
                    now = live[node["next"]] - set(node["out"]) | set(node["in"])
                case "ask":
                    now = {node["on"]} | live[node["yes"]] | live[node["no"]]
                case "switch":
                    now = set().union(*(live[j] for j in node["to"].values()))
                case _:
                    now = {*node["out"], *(v for v in (node.get(k) for k in ("choice", "score", "price", "more")) if isinstance(v, str))}
            if now != live[i]:
                live[i], changed = now, True
    return live
