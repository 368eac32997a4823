"""Costs, gates, budgets, exits and cached training, each against something known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.budget import calibrate
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.exits import EarlyExit, ExitChain, freeze_backbone, head, with_exits
from neurarium.dynamic.gates import FEATURES, Entropy, LearnedGate, Patience, confidence
from neurarium.dynamic.staged import best_chunk
from neurarium.dynamic.train import CachedStages, cached, fit_policy, measure
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.examples.dynamic.exits import _batch


def test_backbone_costs_what_one_computes_by_hand():
    table = EarlyExit(BackboneS()).costs(torch.zeros(5, 1, 28, 28))
    conv = [2 * 9 * (1 * 16 + 16 * 16) * 196, 2 * 9 * 16 * 32 * 196, 2 * 9 * 32 * 48 * 49, 2 * 9 * 48 * 64 * 49]
    assert table.steps == tuple(c + 2 * 4 * w * 10 for c, w in zip(conv, (16, 32, 48, 64)))
    assert table.full == 6_843_008
    assert table.uncounted[0]["aten.relu"] == 2 * 16 * 196


def test_a_segment_that_mixes_rows_has_no_price():
    with pytest.raises(BadInput, match=r"segment 1 .* mixes rows"):
        CostTable.measure([nn.Linear(4, 4), lambda x: x @ x.T], torch.zeros(2, 4))


def test_pricing_leaves_modes_and_statistics_alone():
    policy = EarlyExit(BackboneS()).train()
    policy.staged.heads[1].eval()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    policy.costs(torch.rand(2, 1, 28, 28))
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert policy.training and not policy.staged.heads[1].training and policy.staged.heads[0].training


def test_confidence_of_known_distributions():
    m = confidence(torch.tensor([[0.8, 0.15, 0.05]]).log())[0]
    q = torch.tensor([0.64, 0.0225, 0.0025]) / 0.665
    p = torch.tensor([0.8, 0.15, 0.05])
    want = torch.stack([p[0], -(p * p.log()).sum(), torch.tensor(0.65), -(q * q.log()).sum()])
    torch.testing.assert_close(m, want)
    sure = confidence(torch.tensor([[float("-inf"), 0.0, float("-inf")]]))[0]
    assert sure.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert tuple(FEATURES) == ("max_prob", "entropy", "margin", "power_entropy")
    assert Entropy()(0, torch.zeros(1, 7))[0].item() == pytest.approx(0, abs=1e-6)


def test_patience_counts_agreements_in_a_row():
    gate, memory, scores = Patience(2), None, []
    for answer in (0, 0, 1, 1, 1):
        score, memory = gate(0, nn.functional.one_hot(torch.tensor([answer]), 3).float(), memory)
        scores.append(score.item())
    assert scores == [0, 0.5, 0, 0.5, 1]


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_curve_is_monotone_for_any_scores(seed, stages, n):
    g = torch.Generator().manual_seed(seed)
    scores = (torch.rand(n, stages - 1, generator=g) * 8).round() / 8  # with ties
    curve = calibrate(scores, torch.rand(n, stages, generator=g) < 0.5, grid=16)
    assert (curve.tau.diff(dim=0)[:, :-1].nan_to_num(0) >= 0).all()
    table = CostTable(tuple(range(1, stages + 1)))
    assert (curve.cost(table).diff() >= -1e-12).all()
    assert curve.cost(table)[0] == 1 and curve.cost(table)[-1] == table.full
    for budget in (1, 1.7, table.full / 2 + 1, table.full):
        assert curve.cost(table)[curve.pick(budget, table)] <= budget * (1 + 1e-9)
    with pytest.raises(BadInput, match="smallest feasible one is 1"):
        curve.pick(0.9, table)


@pytest.mark.parametrize("n", [10, 100])
def test_curve_uses_every_exit(n):
    scores = torch.rand(n, 4, generator=torch.Generator().manual_seed(n))
    curve = calibrate(scores, torch.ones(n, 5) > 0, grid=32)
    assert (curve.share.max(0).values >= 0.15).all()
    assert len(curve.share.unique(dim=0)) >= min(n, 20)  # and budgets in between


def test_budgets_between_the_cheapest_and_everything_where_many_scores_are_equal():
    """As of a gate that counts agreements: nobody has any at the first exit, some have one at the second, and so on."""
    scores = torch.tensor([[0.0, a >= 1, a >= 2] for a in (0, 0, 1, 1, 1, 1, 2, 2, 2, 2)]).double().cummax(1).values
    curve = calibrate(scores, torch.ones(10, 4))
    used = {tuple(row) for row in curve.share.tolist()}
    assert {(1, 0, 0, 0), (0, 0.8, 0.2, 0), (0, 0, 0.8, 0.2), (0, 0, 0, 1)} <= used
    assert all(abs(sum(row) - 1) < 1e-12 for row in used)


def test_curve_matches_brute_force_on_its_own_rows():
    g = torch.Generator().manual_seed(0)
    scores, correct = torch.rand(50, 2, generator=g), torch.rand(50, 3, generator=g) < 0.6
    curve = calibrate(scores, correct, grid=12)
    for tau, share, accuracy in zip(curve.tau, curve.share, curve.accuracy):
        exits = [next((k for k in range(2) if row[k] >= tau[k]), 2) for row in scores.double()]
        assert share.tolist() == pytest.approx([exits.count(k) / 50 for k in range(3)])
        assert accuracy.item() == pytest.approx(sum(bool(correct[i, k]) for i, k in enumerate(exits)) / 50)
    packed = type(curve).unpack(curve.pack())
    assert torch.equal(packed.tau, curve.tau) and torch.equal(packed.accuracy, curve.accuracy)


def user_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 3),
    )  # fmt: skip


def test_exits_on_a_users_model_keep_it_as_it_is():
    model, (x, _) = user_model().eval(), _batch(6, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = with_exits(model, x, cuts=2)
    policy = EarlyExit(net, threshold=2.0).eval()
    assert net.n_stages == 3 and torch.equal(policy(x), model(x)) and torch.equal(net(x), model(x))
    net.segments[0][0].weight.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_exits_by_name_and_by_share():
    model, (x, _) = user_model(), _batch(6, 0)
    net = with_exits(model, x, cuts=["6", "0"])
    assert [type(h) for h in net.heads] == [nn.Sequential, nn.Linear, nn.Identity]
    assert net.heads[1].in_features == 20
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    assert [len(s) for s in with_exits(deep, torch.zeros(2, 8), cuts=3).segments] == [2, 2, 2, 2]
    with pytest.raises(BadInput, match="cannot exit after '8'"):
        with_exits(model, x, cuts=["8"])
    with pytest.raises(BadInput, match="1 to 3 exits"):
        with_exits(model, x, cuts=4)


def test_what_is_no_chain_is_refused_by_name():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(x + self.first(x))

    with pytest.raises(UnsupportedModel, match="second"):
        with_exits(Skip(), torch.rand(2, 4), cuts=1)
    with pytest.raises(UnsupportedModel, match="exits need"):
        with_exits(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), torch.rand(2, 1, 8, 8), cuts=1)
    with pytest.raises(UnsupportedModel, match="Linear: has no n_stages"):
        EarlyExit(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="no early head"):
        freeze_backbone(ExitChain([nn.Linear(2, 2)] * 2, [nn.Identity(), nn.Identity()]))
    with pytest.raises(BadInput, match="no standard head"):
        head(torch.zeros(2, 3, 4, 4, 4), 2)


def test_sequence_heads_average_over_time():
    net = with_exits(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), nn.Flatten(), nn.Linear(24, 2)), torch.rand(3, 4, 5), cuts=1)
    y = net.heads[0](h := torch.rand(3, 4, 6))
    torch.testing.assert_close(y, net.heads[0][1](h.mean(1)))


def test_cached_features_train_as_the_network_does():
    data = [_batch(16, seed) for seed in range(4)]
    results = []
    for cache in (False, True):
        torch.manual_seed(0)
        policy = EarlyExit(BackboneS(classes=3), frozen=True)
        with torch.no_grad():  # statistics of a network that has seen data
            policy.staged.train()(data[0][0])
        policy.train()
        if cache:
            with cached(policy, data[0][0]) as features:
                history = fit_policy(policy, [(features.features(x), y) for x, y in data], epochs=3)
                shared = measure(policy, [(features.features(x), y) for x, y in data], threshold=0.5)
        else:
            history = fit_policy(policy, data, epochs=3)
        results.append((history.extra["loss"], measure(policy.eval(), data, threshold=0.5), policy.staged.heads[0][2].weight))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert shared == pytest.approx(results[1][1], rel=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2])


def test_a_frozen_backbone_does_not_move():
    policy = EarlyExit(BackboneS(classes=3), frozen=True)
    before = {k: v.clone() for k, v in policy.staged.state_dict().items()}
    fit_policy(policy, [_batch(16, 0)], epochs=2)
    moved = {k for k, v in policy.staged.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"heads.{k}.2.{w}" for k in range(3) for w in ("weight", "bias")}


def test_a_cache_keeps_what_learns_or_counts_in_the_head():
    net = ExitChain(
        [nn.Identity(), nn.Identity()], [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)), nn.Linear(4, 2)]
    )
    cache = CachedStages(net, CostTable((1, 1)), torch.rand(3, 4))
    assert [len(h) for h in cache.heads] == [2, 1] and cache.features(torch.rand(5, 4)).shape == (5, 8)


def test_learned_gate_starts_with_equal_shares():
    gate = LearnedGate(3)
    from neurarium.dynamic.gates import exit_probabilities

    assert exit_probabilities(gate.logits(torch.randn(5, 4, 10)).sigmoid()).flatten().tolist() == pytest.approx([0.25] * 20)
    with pytest.raises(BadInput, match="gate feature 'loss'"):
        LearnedGate(3, ("loss",))


def test_best_chunk_puts_the_setting_back():
    policy = EarlyExit(BackboneS(classes=3)).eval()
    assert best_chunk(policy, _batch(8, 0)[0], (2, None), repeats=1) in (2, None) and policy.chunk is None


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_charged_on_the_cpu_forward_and_backward(causal):
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    if causal:
        k, v = k[:, :, :5], v[:, :, :5]
    products = 2 * 2 * 3 * 5 * k.shape[2] * 8 * 2
    with FlopCounterMode(display=False) as counter:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert counter.get_total_flops() == products
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2.5 * products  # scores once more, and the gradients of four factors
