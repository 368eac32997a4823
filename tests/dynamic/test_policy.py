"""The engine under the policy checks, and policies that cheat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.gates import Entropy, Gate, Margin, MaxProb, Patience
from neurarium.errors import BadInput
from neurarium.roles import Outcome
from neurarium.testing import exits as checks
from neurarium.testing.examples.dynamic.exits import _batch, jei_dnn


@pytest.fixture(scope="module")
def task():
    return _batch(40, 3)


def trained(gate: Gate, task) -> EarlyExit:
    """A few steps are enough for scores that differ from row to row."""
    torch.manual_seed(0)
    x, y = task
    policy = EarlyExit(BackboneS(classes=3), gate, threshold=0.5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(12):
        optimizer.zero_grad()
        policy.loss(x, y, step).backward()
        optimizer.step()
    policy.eval().calibrate([(x, y)])
    return policy.use(x, budget=0.6 * policy.costs(x).full)


@pytest.mark.parametrize("gate", [MaxProb(), Entropy(), Margin(), Patience(2)], ids=lambda g: type(g).__name__)
def test_every_gate_keeps_the_contract(gate, task):
    checks.check_policy(trained(gate, task), *task)


def test_jei_keeps_the_contract(task):
    checks.check_policy(jei_dnn().make(0), *task)


class PicksAfterwards(EarlyExit):
    """Runs everything, charges as if it had not."""

    def decide(self, x, *, budget=None, threshold=None, mode="compact") -> Outcome:
        everything = super().decide(x, budget=budget, threshold=threshold, mode="masked")
        return replace(everything, cost=self.costs(x).tensor()[everything.choice])


class ChargesLess(EarlyExit):
    """Forgets the price of the heads and gates."""

    def decide(self, x, *, budget=None, threshold=None, mode="compact") -> Outcome:
        outcome = super().decide(x, budget=budget, threshold=threshold, mode=mode)
        return replace(outcome, cost=outcome.cost - 8)


class Gossips(EarlyExit):
    """Lets a row leave if the batch is sure on average."""

    def decide(self, x, *, budget=None, threshold=None, mode="compact") -> Outcome:
        return super().decide(x - x.mean(0), budget=budget, threshold=threshold, mode=mode)


@pytest.mark.parametrize(
    ("cheat", "check"),
    [
        (PicksAfterwards, checks.check_cost),
        (ChargesLess, checks.check_cost),
        (ChargesLess, checks.check_masked_cost),
        (Gossips, checks.check_batches),
    ],
)
def test_cheats_are_caught(cheat, check, task):
    policy = trained(MaxProb(), task)
    policy.__class__ = cheat
    with pytest.raises(AssertionError):
        check(policy, task[0])


def test_a_budget_curve_that_is_not_monotone_is_caught(task):
    policy = trained(MaxProb(), task)
    policy.curve = replace(policy.curve, tau=policy.curve.tau.flip(0))
    with pytest.raises(AssertionError, match="costs less"):
        checks.check_budgets(policy, task[0])


def test_a_loss_that_moves_what_it_does_not_name_is_caught(task):
    policy = trained(MaxProb(), task)
    policy.trainable = lambda step=0: list(policy.staged.heads.parameters())
    with pytest.raises(AssertionError, match="does not name"):
        checks.check_loss(policy, *task)


@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
def test_chunks_change_no_decision(chunk, task):
    policy, x = trained(MaxProb(), task), task[0]
    whole = policy.decide(x)
    policy.chunk = chunk
    parts = policy.decide(x)
    assert torch.equal(parts.choice, whole.choice) and torch.equal(parts.cost, whole.cost)
    torch.testing.assert_close(parts.output, whole.output)


def test_gradients_through_compact_equal_those_through_masked(task):
    policy, x = trained(MaxProb(), task), task[0][:8]
    grads = []
    for mode in ("compact", "masked"):
        inputs = x.clone().requires_grad_()
        policy.decide(inputs, mode=mode).output.square().sum().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_exports_as_one_graph(task):
    policy, x = trained(MaxProb(), task), task[0]
    program = torch.export.export(policy, (x[:4],), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},))
    for n in (1, 2, 7, 40):
        torch.testing.assert_close(program.module()(x[:n]), policy(x[:n]), rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    n_stages = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 3) for _ in range(3))

    def start(self, x):
        return {"x": x.flatten(1), "seen": (x.new_zeros(len(x), 3),)}

    def stage(self, k, state):
        y = state["seen"][0] + self.layers[k](state["x"])  # reuses what earlier stages left
        return {"x": state["x"], "seen": (y,)}, y


def test_state_is_any_nest_of_tensors(task):
    torch.manual_seed(0)
    policy = EarlyExit(Pair()).eval()
    policy.calibrate([task])
    checks.check_policy(policy.use(task[0], budget=0.6 * policy.costs(task[0]).full), *task)


def test_a_pruned_copy_is_priced_anew(task):
    import copy

    policy, x = trained(MaxProb(), task), task[0]
    before = policy.costs(x).full
    twin = copy.deepcopy(policy)
    twin.staged.heads[0] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    assert twin.costs(x).full == before - 2 * 48 * 3
    policy.staged.heads[0] = twin.staged.heads[0]
    assert policy.costs(x).full == twin.costs(x).full


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x: p.decide(x, budget=float(p.costs(x).full), threshold=0.5),
        lambda p, x: p.decide(x[:0]),
        lambda p, x: p.decide(x, mode="fast"),
        lambda p, x: EarlyExit(BackboneS(classes=3)).decide(x, budget=1e9),
        lambda p, x: p.calibrate([]),
        lambda p, x: p.calibrate([(x * float("nan"), torch.zeros(len(x), dtype=torch.int64))]),
        lambda p, x: Patience(0),
    ],
)
def test_bad_input_is_refused(call, task):
    with pytest.raises(BadInput):
        call(trained(MaxProb(), task), task[0])
