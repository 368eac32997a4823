"""What every policy that stops early must keep to, as checks on one calibrated policy and one batch.

Each ``check_...(policy, x)`` raises AssertionError with what is wrong; :func:`check_policy` runs them all. They need of the policy
``decide(x, budget=, threshold=, mode=)``, ``outputs(x)`` and ``costs(x)``. The first two catch the two ways to cheat: computing everything
and picking afterwards, and charging less than was run.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neurarium.errors import BadInput
from neurarium.roles import Outcome
from neurarium.testing.state import close

__all__ = [
    "CHECKS",
    "budgets",
    "check_batches",
    "check_budgets",
    "check_cost",
    "check_errors",
    "check_forward",
    "check_loss",
    "check_masked_cost",
    "check_modes",
    "check_policy",
    "check_state",
    "check_thresholds",
]


def budgets(policy: Any, x: Tensor, n: int = 10) -> list[float]:
    """n budgets in FLOPs a row, evenly from the cheapest path to the dearest."""
    total = policy.costs(x).total
    return [total[0] + (total[-1] - total[0]) * i / (n - 1) for i in range(n)]


def _decide(policy: Any, x: Tensor, **options: Any) -> Outcome:
    with torch.no_grad():
        outcome: Outcome = policy.decide(x, **options)
    return outcome


def _counted(policy: Any, x: Tensor, **options: Any) -> tuple[Outcome, int]:
    _decide(policy, x, **options)  # prices are measured on first use
    with FlopCounterMode(display=False) as counter:
        outcome = _decide(policy, x, **options)
    return outcome, counter.get_total_flops()


def check_cost(policy: Any, x: Tensor) -> None:
    """A FLOP counter around ``decide`` shows the sum of the costs, to the last digit, at every budget."""
    for budget in (None, *budgets(policy, x, 5)):
        outcome, spent = _counted(policy, x, budget=budget)
        said = int(outcome.cost.sum())
        assert said == spent, f"decide charges {said} FLOPs and ran {spent} (budget {budget})"
        assert outcome.cost.dtype == torch.int64 and outcome.cost.shape == (len(x),), "cost is not int64, one a row"


def check_masked_cost(policy: Any, x: Tensor) -> None:
    """The masked form runs everything, and says so."""
    outcome, spent = _counted(policy, x, mode="masked")
    full = policy.costs(x).full
    assert spent == len(x) * full, f"the masked form ran {spent} FLOPs, {len(x)} full rows are {len(x) * full}"
    assert outcome.cost.tolist() == [full] * len(x), "the masked form does not charge every row the full cost"


def check_forward(policy: Any, x: Tensor) -> None:
    """forward(x) is decide(x).output."""
    with torch.no_grad():
        assert torch.equal(policy(x), _decide(policy, x).output), "forward(x) differs from decide(x).output"


def check_modes(policy: Any, x: Tensor) -> None:
    """compact, masked and loop answer and choose alike."""
    for budget in (None, *budgets(policy, x, 4)):
        want = _decide(policy, x, budget=budget)
        for mode in ("masked", "loop"):
            got = _decide(policy, x, budget=budget, mode=mode)
            assert torch.equal(got.choice, want.choice), f"{mode} chooses otherwise than compact (budget {budget})"
            assert close(got.output, want.output), f"{mode} answers otherwise than compact (budget {budget})"
            if mode == "loop":
                assert torch.equal(got.cost, want.cost), "loop charges otherwise than compact"


def check_budgets(policy: Any, x: Tensor) -> None:
    """More budget never makes a single row cheaper, and a budget below the cheapest path is refused."""
    last: Tensor | None = None
    for budget in budgets(policy, x, 10):
        cost = _decide(policy, x, budget=budget).cost
        assert last is None or bool((cost >= last).all()), f"a row costs less at the larger budget {budget:.6g}"
        last = cost
    try:
        _decide(policy, x, budget=0.5 * policy.costs(x).total[0])
    except BadInput:
        return
    raise AssertionError("a budget below the cheapest path was accepted")


def check_batches(policy: Any, x: Tensor) -> None:
    """Rows do not influence each other: parts, and another order, give every row the same."""
    whole = _decide(policy, x)
    for n in (1, 2, 7):
        part = _decide(policy, x[:n])
        assert torch.equal(part.choice, whole.choice[:n]), f"the first {n} rows choose otherwise alone"
        assert close(part.output, whole.output[:n]), f"the first {n} rows get another answer alone"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mixed = _decide(policy, x[order])
    assert torch.equal(mixed.choice, whole.choice[order]) and torch.equal(mixed.cost, whole.cost[order]), "permuted rows decide otherwise"
    assert close(mixed.output, whole.output[order]), "permuted rows get other answers"


def check_thresholds(policy: Any, x: Tensor) -> None:
    """Never to stop is the plain model; always to stop is the first readout."""
    with torch.no_grad():
        readouts = policy.outputs(x)
    never, always = _decide(policy, x, threshold=2.0), _decide(policy, x, threshold=-1.0)
    assert bool((never.choice == len(readouts) - 1).all()), "threshold 2 lets a row leave early"
    assert bool((always.choice == 0).all()), "threshold -1 does not let every row leave at once"
    assert torch.equal(never.output, readouts[-1]), "without early exits the output is not the last readout"
    assert torch.equal(always.output, readouts[0]), "with everything leaving at once the output is not the first readout"


def check_state(policy: Any, x: Tensor) -> None:
    """Copies decide alike, the state carries thresholds and curve, and other dtypes work."""
    budget = budgets(policy, x, 3)[1]
    want, generous = _decide(policy, x), _decide(policy, x, budget=budget)
    blank = copy.deepcopy(policy)
    for tensor in [*blank.parameters(), *blank.buffers()]:
        nn.init.zeros_(tensor)
    blank.load_state_dict(policy.state_dict())
    for what, twin in {"state_dict": blank, "deepcopy": copy.deepcopy(policy), "pickle": pickle.loads(pickle.dumps(policy))}.items():
        got, same = _decide(twin, x), _decide(twin, x, budget=budget)
        assert torch.equal(got.output, want.output) and torch.equal(got.choice, want.choice), f"a {what} copy decides otherwise"
        assert torch.equal(same.choice, generous.choice), f"a {what} copy lost its calibration"
    for dtype in (torch.float64, torch.bfloat16):
        out = _decide(copy.deepcopy(policy).to(dtype), x.to(dtype) if x.is_floating_point() else x).output
        assert out.dtype == dtype and bool(torch.isfinite(out).all()), f"the output in {dtype} is {out.dtype} or not finite"


def check_errors(policy: Any, x: Tensor) -> None:
    """An empty batch, and a budget together with a threshold, are refused."""
    cases: dict[str, Callable[[], Any]] = {
        "an empty batch": lambda: _decide(policy, x[:0]),
        "a budget together with a threshold": lambda: _decide(policy, x, budget=budgets(policy, x)[-1], threshold=0.5),
    }
    for what, case in cases.items():
        try:
            case()
        except BadInput:
            continue
        raise AssertionError(f"{what} was accepted")


def check_loss(policy: Any, x: Tensor, y: Tensor, steps: Iterable[int] = range(8)) -> None:
    """Over a few steps the loss reaches every trainable parameter, and no step moves what it does not name."""
    policy = copy.deepcopy(policy)
    wanted = {name for name, p in policy.named_parameters() if p.requires_grad}
    reached: set[str] = set()
    for step in steps:
        policy.zero_grad(set_to_none=True)
        loss = policy.loss(x, y, step)
        assert loss.ndim == 0 and bool(torch.isfinite(loss)), f"the loss of step {step} is no finite number"
        loss.backward()
        named = {id(p) for p in policy.trainable(step)}
        for name, p in policy.named_parameters():
            if p.grad is not None and bool(p.grad.any()):
                assert id(p) in named, f"the loss of step {step} reaches {name}, which trainable({step}) does not name"
                reached.add(name)
    assert reached == wanted, f"the loss never reaches {sorted(wanted - reached)}"


#: every check that needs no labels
CHECKS: tuple[Callable[[Any, Tensor], None], ...] = (
    check_cost, check_masked_cost, check_forward, check_modes, check_budgets, check_batches, check_thresholds, check_state, check_errors,
)  # fmt: skip


def check_policy(policy: Any, x: Tensor, y: Tensor | None = None) -> None:
    """All checks on a calibrated policy in evaluation mode; ``x`` has at least 8 rows."""
    for check in CHECKS:
        check(policy, x)
    if y is not None:
        check_loss(policy, x, y)
