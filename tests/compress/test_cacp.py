"""Targets are met whatever the agent does, the agent finds what brute force finds, and the target is what makes its plans differ."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from neurarium import meter
from neurarium.compress import ChannelGraph, ChannelPlan, ConditionalPruner, apply_channels, cacp
from neurarium.compress.prune.conditional import _Agent, _Step
from neurarium.compress.prune.units import budget, refresh_norms, unit_norms
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import subject


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


LOADER = [(torch.randn(12, 20, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4)]
EXAMPLE = LOADER[0][0][:1]


def worth(counts: tuple[int, ...]) -> float:
    return float(np.exp(np.log(np.array(counts) / (24, 16, 12)) @ (0.1, 0.3, 0.4)))


def reward(model: nn.Module) -> float:
    return worth((model[0].out_features, model[2].out_features, model[4].out_features))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "gpt"])
def test_costs_of_many_candidates_are_those_of_the_graph(name: str) -> None:
    case = subject(name)
    graph = ChannelGraph.trace(case.model, case.inputs)
    sizes = np.array([g.size for g in graph.groups])
    counts = np.random.default_rng(0).integers(1, sizes + 1, (5, len(sizes)))
    found = graph.macs(counts)
    for row, macs in zip(counts, found, strict=True):
        assert macs == graph.cost({g.id: range(k) for g, k in zip(graph.groups, row, strict=True)}).macs


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_every_actor_meets_every_target(name: str) -> None:
    case = subject(name)
    pruner = ConditionalPruner(case.model, example=case.inputs)
    unit = max(pruner.full - pruner.graph.macs(pruner.sizes - np.eye(len(pruner.sizes), dtype=int)[i]) for i in range(len(pruner.sizes)))
    draw = np.random.default_rng(0)
    for _ in range(150):
        rate, style = draw.uniform(0.1, 0.7), draw.uniform(0, 1)
        counts, steps = pruner.walk(rate, lambda state, low, high, s=style: draw.uniform(0, 0.8) if s < 0.5 else float(s > 0.75) * 0.8)
        cost = float(pruner.graph.macs(counts))
        assert (1 - rate) * pruner.full - unit <= cost <= (1 - rate) * pruner.full * (1 + 1e-9)
        assert (counts >= pruner.floors).all() and len(steps) == len(pruner.sizes)


def test_the_agent_finds_what_brute_force_finds() -> None:
    pruner = ConditionalPruner(mlp(), example=EXAMPLE, rates=(0.5,), reward=reward, episodes=150).fit(LOADER)
    target = 0.5 * pruner.full
    every = list(itertools.product(range(5, 25), range(4, 17), range(3, 13)))
    costs = pruner.graph.macs(np.array(every))
    values = np.array([worth(c) for c, cost in zip(every, costs, strict=True) if cost <= target * (1 + 1e-9)])
    best, found = values.max(), worth(tuple(len(k) for k in pruner.plan(0.5).kept.values()))
    assert found >= 0.97 * best
    actor = worth(tuple(len(k) for k in pruner.plan(0.5, best=False).kept.values()))
    first = np.mean([r for _, _, r in pruner.history[:37]])
    assert actor > first + 0.5 * (best - first)  # the agent itself, not only the best of its search


def test_only_an_agent_that_sees_the_target_acts_on_it() -> None:
    wish = {}
    for conditional in (True, False):
        pruner = ConditionalPruner(
            mlp(), example=EXAMPLE, rates=(0.3, 0.7), reward=reward, episodes=12, conditional=conditional, warmup=0.3
        ).fit(LOADER)  # fmt: skip
        states = [pruner.walk(rate, lambda state, low, high: low)[1][0].state for rate in (0.3, 0.7)]
        wish[conditional] = [pruner._agent.act(state) for state in states]
    assert wish[False][0] == wish[False][1] and wish[True][0] != wish[True][1]


def test_the_actor_climbs_only_where_the_constraint_lets_it() -> None:
    """One state, reward = action: the actor goes up to the bound and does not run away beyond it."""
    agent = _Agent(0, 0.8, 1, bootstrap=False)
    state, draw = torch.ones(12), np.random.default_rng(0)
    for _ in range(60):
        action = draw.uniform(0.1, 0.5)
        agent.remember([_Step(state, (0.1, 0.5), action)], action, 0)
    start = agent.act(state)
    agent.learn(200)
    assert start < agent.act(state) < 0.6 and agent.act(state) > 0.45


def test_same_seed_same_plan_and_other_rates_work_too() -> None:
    first, second = (ConditionalPruner(mlp(), example=EXAMPLE, episodes=6, seed=3).fit(LOADER) for _ in range(2))
    assert first.history == second.history
    for rate in (0.3, 0.42, 0.7):
        plan = first.plan(rate)
        assert plan.to_json() == second.plan(rate).to_json()
        assert 0.9 * (1 - rate) <= plan.cost_after.macs / plan.cost_before.macs <= 1 - rate + 1e-9


def test_results_carry_plans_that_tell_the_truth() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = cacp(model, LOADER, rates=(0.3, 0.6), episodes=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for small in found.values():
        assert small.plan.cost_after.macs == meter.macs(small, EXAMPLE)
        again = apply_channels(model, ChannelPlan.from_json(small.plan.to_json()))
        assert torch.equal(again(EXAMPLE), small(EXAMPLE))


def test_the_largest_l1_norms_stay() -> None:
    model = mlp()
    small = cacp(model, LOADER, rates=(0.4,), episodes=2)[0.4]
    norms = model[0].weight.detach().abs().sum(1)
    kept = small.plan.kept["0"]
    gone = torch.tensor([i for i in range(24) if i not in kept.tolist()], dtype=torch.int64)
    assert not len(gone) or norms[kept].min() >= norms[gone].max()


def test_statistics_are_renewed_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(16, 3, 6, 6)
    refresh_norms(model, x)
    y = model[0](x)
    assert torch.allclose(model[1].running_mean, y.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[1].running_var, y.transpose(0, 1).flatten(1).var(1), atol=1e-5)
    assert not model[1].training and model[1].momentum == 0.1


def test_a_threshold_keeps_within_the_budget() -> None:
    model = mlp()
    graph = ChannelGraph.trace(model, EXAMPLE)
    plan = graph.plan(budget(graph, unit_norms(model, graph), 0.6))
    assert plan.cost_after.macs <= 0.6 * plan.cost_before.macs


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="out of reach"):
        ConditionalPruner(mlp(), example=EXAMPLE, rates=(0.99,))
    with pytest.raises(BadInput, match="at least one rate"):
        ConditionalPruner(mlp(), example=EXAMPLE, rates=())
    with pytest.raises(BadInput, match="empty"):
        cacp(mlp(), [])
    with pytest.raises(BadInput, match="not finite"):
        cacp(mlp(), [(torch.full((4, 20), torch.nan), torch.zeros(4).long())])
    with pytest.raises(BadInput, match="reward"):
        ConditionalPruner(mlp(), example=EXAMPLE, reward=lambda model: float("nan"), episodes=2).fit(LOADER)
    with pytest.raises(BadInput, match="fit"):
        ConditionalPruner(mlp(), example=EXAMPLE).plan(0.5)
    with pytest.raises(UnsupportedModel):
        cacp(nn.Sequential(nn.Linear(20, 4)), LOADER)
