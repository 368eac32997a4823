"""Checks of the role `policy`: decide(x) -> Outcome whose cost is what was really spent."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.family import FamilyPolicy
from neurarium.errors import BadInput
from neurarium.roles import Outcome
from neurarium.testing.example import Example, Skipped
from neurarium.testing.exits import check_policy
from neurarium.testing.families import check_family
from neurarium.testing.modules import build, feed, to_dtype
from neurarium.testing.state import assert_same, close, unchanged_rng

__all__ = ["CHECKS"]


def _decide(policy: Any, *inputs: Tensor, **options: Any) -> Outcome:
    with torch.no_grad():
        outcome = policy.decide(*inputs, **options)
    assert isinstance(outcome, Outcome), f"decide returned {type(outcome).__name__}, not an Outcome"
    return outcome


def _budgets(policy: Any, *inputs: Tensor, n: int = 8) -> list[float]:
    """Budgets from the smallest to the largest feasible one, found by asking for far too little."""
    try:
        _decide(policy, *inputs, budget=1e-9)
    except BadInput:
        pass
    else:
        raise AssertionError("a budget of almost nothing was accepted")
    full = float(_decide(policy, *inputs).cost.max())
    most = max(full, float(getattr(policy, "full_cost", full)))
    feasible = []
    for i in range(1, 4 * n + 1):
        budget = most * i / (4 * n)
        try:
            _decide(policy, *inputs, budget=budget)
        except BadInput:
            continue
        feasible.append(budget)
    assert feasible, "not even the full cost is a feasible budget"
    return feasible


def forward_is_decide(example: Example) -> None:
    """forward(x) is decide(x).output; cost and choice have one entry a row."""
    policy, inputs = build(example).eval(), feed(example, 5)
    outcome = _decide(policy, *inputs)
    with torch.no_grad():
        assert_same(policy(*inputs), outcome.output, "forward(x) differs from decide(x).output")
    assert outcome.cost.shape == (5,) and outcome.cost.dtype == torch.int64, "cost is not int64 of shape (batch,)"
    assert outcome.choice.shape[0] == 5, "choice has not one entry a row"


def cost_is_true(example: Example) -> None:
    """The FLOP counter around decide equals the sum of the costs exactly."""
    policy, inputs = build(example).eval(), feed(example, 16)
    _decide(policy, *inputs)
    for budget in (None, *_budgets(policy, *inputs, n=2)):
        with FlopCounterMode(display=False) as counter:
            outcome = _decide(policy, *inputs, **({} if budget is None else {"budget": budget}))
        said, spent = int(outcome.cost.sum()), counter.get_total_flops()
        assert said == spent, f"decide reports {said} FLOPs and spent {spent} (budget {budget})"


def rows_are_independent(example: Example) -> None:
    """Any batch size and any order of rows gives each row the same output, cost and choice."""
    policy, inputs = build(example).eval(), feed(example, 7)
    whole = _decide(policy, *inputs)
    for rows in (1, 2):
        part = _decide(policy, *tree_map(lambda t, rows=rows: t[:rows], inputs))
        assert close(part.output, whole.output[:rows]), f"the first {rows} of 7 rows give another output alone"
        assert_same((part.cost, part.choice), (whole.cost[:rows], whole.choice[:rows]), f"the first {rows} rows decide otherwise alone")
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    mixed = _decide(policy, *tree_map(lambda t: t[order], inputs))
    assert_same((mixed.cost, mixed.choice), (whole.cost[order], whole.choice[order]), "permuted rows decide otherwise")
    assert close(mixed.output, whole.output[order]), "permuted rows give other outputs"


def batch_size_decides_nothing(example: Example) -> None:
    """256 rows at once, in sevens and one by one: the same choices and costs."""
    policy, inputs = build(example).eval(), feed(example, 256)
    whole = _decide(policy, *inputs)
    for size, most in ((7, 256), (1, 24)):
        for i in range(0, most, size):
            part = _decide(policy, *tree_map(lambda t, i=i, size=size: t[i : i + size], inputs))
            want = whole.choice[i : i + size], whole.cost[i : i + size]
            assert_same((part.choice, part.cost), want, f"rows {i} to {i + size - 1} decide otherwise in a batch of {size} than among 256")


def budgets_are_monotone(example: Example) -> None:
    """More budget never costs a row less."""
    policy, inputs = build(example).eval(), feed(example, 12)
    last: Tensor | None = None
    for budget in _budgets(policy, *inputs):
        cost = _decide(policy, *inputs, budget=budget).cost
        assert last is None or bool((cost >= last).all()), f"a row costs less at the larger budget {budget:.6g}"
        last = cost


def keeps_state(example: Example) -> None:
    """state_dict carries the setting; deepcopy and pickle keep the decisions."""
    policy, other, inputs = build(example, 0).eval(), build(example, 1).eval(), feed(example, 6)
    want = _decide(policy, *inputs)
    other.load_state_dict(policy.state_dict())
    for what, twin in (("state_dict", other), ("deepcopy", copy.deepcopy(policy)), ("pickle", pickle.loads(pickle.dumps(policy)))):
        got = _decide(twin, *inputs)
        assert_same((got.choice, got.cost, got.output), (want.choice, want.cost, want.output), f"a {what} round trip decides otherwise")


def dtypes(example: Example) -> None:
    """float64 and bfloat16 policies decide and keep the dtype."""
    for dtype in (torch.float64, torch.bfloat16):
        out = _decide(build(example).to(dtype).eval(), *to_dtype(feed(example, 3), dtype)).output
        assert out.dtype == dtype and torch.isfinite(out).all(), f"the output in {dtype} is {out.dtype} or not finite"


def deterministic(example: Example) -> None:
    """The same seed gives the same decisions, and deciding leaves inputs and the global RNG alone."""
    first, second, inputs = build(example, 0).eval(), build(example, 0).eval(), feed(example, 6)
    given = tree_map(torch.clone, inputs)
    with unchanged_rng("decide"):
        a, b = _decide(first, *inputs), _decide(second, *inputs)
    assert_same((a.output, a.choice), (b.output, b.choice), "two policies of one seed decide differently")
    assert_same(given, inputs, "decide changed its input in place")


def cuda(example: Example) -> None:
    """The policy decides the same on CUDA."""
    if not torch.cuda.is_available():
        raise Skipped("no CUDA device here")
    policy, inputs = build(example).eval(), feed(example, 6)
    want = _decide(policy, *inputs)
    got = _decide(policy.cuda(), *tree_map(Tensor.cuda, inputs))
    assert close(got.output.cpu(), want.output, rtol=5e-3, atol=5e-3), "the policy gives another output on CUDA"


def stops_early(example: Example) -> None:
    """A policy over stages keeps the stricter contract of :mod:`neurarium.testing.exits` (three modes of execution, thresholds, errors)."""
    policy, inputs = build(example).eval(), feed(example, 16)
    if not isinstance(policy, EarlyExit) or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise Skipped("the policy does not stop early along the stages of one tensor")
    check_policy(policy, inputs[0])


def picks_a_configuration(example: Example) -> None:
    """A policy over a family keeps the stricter contract of :mod:`neurarium.testing.families`."""
    policy, inputs = build(example).eval(), feed(example, 6)
    if not isinstance(policy, FamilyPolicy):
        raise Skipped("the policy is not one over a family")
    check_family(policy, *inputs)


CHECKS = {
    "forward_is_decide": forward_is_decide,
    "cost_is_true": cost_is_true,
    "rows_are_independent": rows_are_independent,
    "batch_size_decides_nothing": batch_size_decides_nothing,
    "budgets_are_monotone": budgets_are_monotone,
    "keeps_state": keeps_state,
    "dtypes": dtypes,
    "deterministic": deterministic,
    "stops_early": stops_early,
    "picks_a_configuration": picks_a_configuration,
    "cuda": cuda,
}
