"""DyCL: compile what decides, by moving the decisions out of what is compiled.

A compiler follows one path. Of a network that decides at run time it refuses to make a program, or it makes one that is wrong on every
other path without saying so. :func:`split` cuts the network at its decisions into *segments* that only compute, and a *plan* that only
decides: call a segment, ask, go on here or there, return. Any compiler takes a segment; a small host program of plain Python and numpy
interprets the plan::

    program = split(policy, x)                 # segments and plan; runs like the policy
    fast = program.compile("onnx")             # or "export", "inductor"
    fast.decide(x, budget=1e6)                 # output, cost and choice of every row: what the policy would have said
    program.save("folder")                     # .onnx, plan.json and a host.py that needs onnxruntime and numpy alone

*Where.* The plan is in :mod:`~neurarium.dynamic.plan`, what writes it in :mod:`~neurarium.dynamic.builder`, the program with its host in
:mod:`~neurarium.dynamic.program` and :mod:`~neurarium.dynamic.host`, the compilers in :mod:`~neurarium.dynamic.backends`.

*Front ends.* Policies are split along what they offer: stages and gates (:func:`from_staged`), configurations of a family
(:func:`from_family`), or a method ``program(example)`` that builds with :class:`Builder`. Of any other module the source is read
(:func:`~neurarium.dynamic.rewrite.from_source`).

*Rows.* With ``rows="each"`` (not in the paper, which runs one input at a time) every row goes its own way: the host parts the rows where
they answer differently, runs the next segment on those that need it, and lets them meet again, so that a batch costs what its rows cost.
Scores are computed inside segments, where the policy computes them, and only compared outside, in their own dtype.

*Source.* Chen, Wei, Zhao, Wu, Yang, "DyCL: Dynamic Neural Network Compilation Via Program Rewriting and Graph Optimization", arXiv
2307.04963.

*Departures.* The graph passes are reconstructed from the paper's description: segments that only one other one leads to are merged with it,
outputs that nobody reads are dropped, equal segments are compiled once, loops of known length are unrolled. Python numbers that change in
a loop of unknown length become tensors of the program.

*Cost.* Splitting runs each segment once on a few rows. The host adds some ten microseconds a segment. ``Outcome.cost`` is what the policy
charges.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from neurarium.dynamic.builder import Builder
from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.outcome import Policy
from neurarium.dynamic.plan import Plan, Rows
from neurarium.dynamic.program import Program, load_program
from neurarium.dynamic.staged import step
from neurarium.dynamic.tree import rows as count
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Builder", "Plan", "Program", "from_family", "from_staged", "load_program", "split"]


def split(module: nn.Module, example: Any, *, rows: Rows = "each") -> Program:
    """Cut ``module`` at its decisions.

    Args:
        module: a policy of this room, or any module whose source can be read. It is copied in evaluation mode, as it is now; later
            training does not reach the program.
        example: a batch that the module takes.
        rows: ``"each"``: every row goes its own way. ``"batch"``: one decision for the whole batch (for modules read from source).

    A policy of your own that is neither staged nor a family offers ``program(example) -> Program``, see :class:`Builder`.

    Raises:
        UnsupportedModel: names what, or which line, cannot be compiled.
    """
    if rows not in ("each", "batch"):
        raise BadInput(f"rows must be 'each' or 'batch', not {rows!r}")
    if count(example) == 0:
        raise BadInput("an empty batch cannot be split on: pass at least one row")
    own = getattr(module, "program", None)
    decides = callable(own) or isinstance(module, Policy)
    if decides and rows == "batch":
        raise BadInput("a policy decides for each row: rows='batch' is for modules that are read from source")
    if not decides:
        from neurarium.dynamic.rewrite import from_source

        return from_source(module, example, rows=rows)
    module = copy.deepcopy(module).eval()
    if callable(own):
        return module.program(example)
    if isinstance(module, FamilyPolicy):
        return from_family(module, example)
    if isinstance(module, EarlyExit):
        return from_staged(module, example)
    raise UnsupportedModel(
        "is neither an EarlyExit nor a FamilyPolicy: give it a method program(example) that returns a Program (see Builder)",
        module=type(module).__name__,
    )


def from_staged(policy: EarlyExit, example: Any) -> Program:
    """A segment a stage, its gate included. The thresholds and the calibrated curve are data of the plan."""
    build, table = Builder(example), policy.costs(example)
    carry: Any = build.inputs
    last = policy.staged.n_stages - 1
    for k in range(last + 1):
        y, score, carry = build.call(_Stage(policy, k), carry, cost=table.steps[k])
        if k < last:
            build.leave_if(score, tau=k, output=y, choice=k, score=score)
    build.leave(y, choice=last, score=1.0)
    menu = []
    if policy.curve is not None:
        prices = policy.curve.cost(table).tolist()
        menu = [{"cost": c, "setting": t} for c, t in zip(prices, policy.curve.tau.to(policy.tau).tolist())]
    return build.program(setting=policy.tau.tolist(), menu=menu)


class _Stage(nn.Module):
    def __init__(self, policy: EarlyExit, k: int) -> None:
        super().__init__()
        self.staged, self.gate, self.k = policy.staged, policy.gate, k

    def forward(self, carry: Any) -> Any:
        state, memory = (self.staged.start(carry), None) if self.k == 0 else carry
        state, y, score, memory = step(self.staged, self.gate, self.k, state, memory)
        return y, score, (state, memory)


def from_family(policy: FamilyPolicy, example: Any, *, configs: Iterable[int] | None = None) -> Program:
    """A segment a configuration: by default those that some budget picks, and the current one."""
    prices = policy.prices(example).tolist()
    known = policy.scores is not None or policy.search_free
    front = policy.front(example) if known else tuple(range(len(prices)))
    chosen = sorted({*(front if configs is None else configs), policy.setting})
    build = Builder(example)
    build.switch(chosen)
    for index in chosen:
        build.at(index)
        alone = policy.family.extract(policy.configs[index]).eval()
        build.leave(build.call(alone, build.inputs, cost=prices[index]), choice=index)
    menu = [{"cost": float(prices[i]), "setting": i} for i in front if i in chosen] if known else []
    return build.program(setting=policy.setting, menu=menu, settings=chosen)
