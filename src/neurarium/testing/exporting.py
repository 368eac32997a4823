"""What every policy must keep to when it is compiled: :func:`check_export` on one policy and one batch.

The policy is split, its segments exported once with a free batch size, and every target must answer, choose and charge as the policy does
at batches of 0, 1, 2, 7 and all rows. A row may choose otherwise only where its score is within 1e-6 of the threshold, which no two
compilers agree about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from neurarium.dynamic.compile import Program, from_family, split
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.tree import rows, take
from neurarium.roles import Outcome
from neurarium.testing.state import close

__all__ = ["check_export", "check_program"]


@torch.no_grad()
def check_export(policy: Any, x: Any, *, backends: Sequence[str] = ("export", "onnx")) -> Program:
    """Raises AssertionError with what is wrong. ``policy`` is in evaluation mode; ``x`` has some 256 rows, or fewer if they are dear.

    A family is exported in its cheapest, its current and its dearest configuration only. Returns the program on the last target.
    """
    few = take(x, torch.arange(min(3, rows(x))))
    eager = program = split(policy, few)
    check_program(policy, eager, x)
    if isinstance(policy, FamilyPolicy):
        eager = from_family(policy, few, configs=(0, len(policy.configs) - 1))
    for backend in backends:
        program = eager.compile(backend)  # type: ignore[arg-type]
        check_program(policy, program, x)
    return program


@torch.no_grad()
def check_program(policy: Any, program: Program, x: Any) -> None:
    """The program against the policy, at its setting and, where the plan has a menu of budgets, at three more."""
    whole = _decided(policy, x)
    for n in sorted({0, 1, 2, 7, rows(x)}):
        part = take(x, torch.arange(min(n, rows(x))))
        _compare(program, program.decide(part), whole, n)
    menu = program.plan.menu
    for i in sorted({0, len(menu) // 2, len(menu) - 1}) if menu else ():
        budget, seven = float(menu[i]["cost"]), take(x, torch.arange(min(7, rows(x))))
        if isinstance(policy, FamilyPolicy) and policy.pick(x, budget=budget) != menu[i]["setting"]:
            continue  # only some configurations were exported
        want = _decided(policy, seven, budget=budget)
        _compare(program, program.decide(seven, budget=budget), want, rows(seven), f" (budget {budget:.0f})")


def _decided(policy: Any, x: Any, **setting: float) -> Outcome:
    """What the program must say. A policy with ``exports_masked`` has a program that runs, and charges, everything."""
    outcome: Outcome = policy.decide(x, **setting)
    if not getattr(policy, "exports_masked", False):
        return outcome
    return replace(outcome, cost=policy.decide(x, mode="masked", **setting).cost)


def _compare(program: Program, got: Outcome, whole: Outcome, n: int, where: str = "") -> None:
    where = f"{program.backend}, batch {n}{where}"
    output, want = tree_leaves(got.output)[0], tree_leaves(whole.output)[0]
    assert output.shape == (n, *want.shape[1:]), f"{where}: the output is of shape {tuple(output.shape)}, not {(n, *want.shape[1:])}"
    assert output.dtype == want.dtype, f"{where}: the output is {output.dtype}, the policy's {want.dtype}"
    assert got.cost.shape[0] == n, f"{where}: costs of {got.cost.shape[0]} rows"
    if n == 0:
        return
    same = (got.choice == whole.choice[:n]).reshape(n, -1).all(1)
    assert bool((same | _near(program, got.score, whole.score, n)).all()), f"{where}: {int((~same).sum())} rows choose otherwise"
    assert torch.equal(got.cost[same], whole.cost[:n][same]), f"{where}: rows that choose alike are charged otherwise"
    assert close(output[same], want[:n][same], rtol=1e-3, atol=1e-4), f"{where}: the answers differ"
    if whole.price is not None and got.price is not None:
        assert close(got.price[same], whole.price[:n][same]), f"{where}: the prices differ"


def _near(program: Program, *scores: Any) -> Tensor:
    """Rows whose score is at the threshold, up to rounding."""
    *both, n = scores
    setting = program.plan.setting
    near = torch.zeros(n, dtype=torch.bool)
    if isinstance(setting, list):
        tau = torch.tensor([float(t) for t in setting], dtype=torch.float64)
        for score in both:
            if score is not None:
                near |= ((score[:n].double()[:, None] - tau).abs() <= 1e-6).any(1)
    return near
