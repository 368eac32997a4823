"""JEI-DNN: exit probabilities, targets, losses and schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.exits import ExitChain, with_exits
from neurarium.dynamic.gates import LearnedGate, exit_probabilities
from neurarium.dynamic.jei import JEIDNN, gate_targets, inference_loss, warmup_loss
from neurarium.dynamic.train import fit_policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.examples.dynamic.exits import _batch, _network


def policy(**options) -> JEIDNN:
    torch.manual_seed(0)
    return JEIDNN(BackboneS(classes=3), **options).eval()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_exit_probabilities_are_a_distribution(g):
    p = exit_probabilities(torch.tensor([g], dtype=torch.float64))[0]
    assert (p >= 0).all() and p.sum().item() == pytest.approx(1, abs=1e-12)
    spent = 0.0
    for l, share in enumerate(g):  # the recursion as it is written in the paper
        want = max(0.0, min(share, 1 - sum(g[:l])))
        assert p[l].item() == pytest.approx(want, abs=1e-12)
        spent += want
    assert p[-1].item() == pytest.approx(1 - spent, abs=1e-12)


def test_gate_scores_are_the_conditional_probabilities():
    torch.manual_seed(0)
    gate, y = LearnedGate(3).double(), 3 * torch.randn(50, 4, 5, dtype=torch.float64)
    nn.init.normal_(gate.weight, std=2)
    p, memory = exit_probabilities(gate.logits(y).sigmoid()), None
    left = torch.ones(50, dtype=torch.float64)
    for k in range(3):
        score, memory = gate(k, y[:, k], memory)
        some = left > 1e-9
        torch.testing.assert_close(score[some], (p[:, k] / left)[some])
        assert (score[~some] == 1).all()
        left = left * (1 - (p[:, k] / left.clamp(min=1e-12)).clamp(0, 1))


def test_targets_by_brute_force():
    torch.manual_seed(0)
    ce, price = torch.rand(5, 3), torch.tensor([0.2, 0.5, 1.0])
    for tradeoff in (0.0, 0.3, 1.0, 1e6):
        t = gate_targets(ce, price, tradeoff)
        for row, target in zip(ce, t):
            costs = [row[l].item() + tradeoff * price[l].item() for l in range(3)]
            best = min(range(3), key=costs.__getitem__)
            assert target.tolist() == [l >= best for l in range(2)]
        assert (t.int().diff(dim=1) >= 0).all()  # never "stay" after "leave"
    assert gate_targets(ce, price, 1e6).all()
    assert (gate_targets(ce, price, 0.0)[:, 0] == (ce.argmin(1) == 0)).all()


def test_gates_that_never_open_are_the_plain_backbone():
    p, (x, _) = policy(), _batch(9, 0)
    nn.init.zeros_(p.gate.weight)
    nn.init.constant_(p.gate.bias, float("-inf"))
    outcome = p.decide(x)
    assert torch.equal(outcome.output, p.staged(x)) and (outcome.choice == 3).all() and (outcome.cost == p.costs(x).full).all()


def test_classifier_loss_trains_the_exit_that_is_taken():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True), torch.randint(4, (6,))
    ce = F.cross_entropy(logits.transpose(1, 2), y[:, None].expand(-1, 3), reduction="none")
    taken = torch.tensor([0, 1, 2, 0, 1, 1])
    loss = inference_loss(ce, F.one_hot(taken, 3).double())
    assert loss.item() == pytest.approx(ce.sum(1).mean().item())  # the total is kept
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    for row, l in enumerate(taken.tolist()):
        (alone,) = torch.autograd.grad(ce[row, l], logits, retain_graph=True)
        scale = (ce[row].sum() / ce[row, l]).item() / 6
        torch.testing.assert_close(grad[row], alone[row] * scale)
        assert not grad[row, [k for k in range(3) if k != l]].any()
    (even,) = torch.autograd.grad(inference_loss(ce, torch.full((6, 3), 1 / 3).double()), logits, retain_graph=True)
    (plain,) = torch.autograd.grad(ce.sum(1).mean(), logits)
    torch.testing.assert_close(even, plain)  # equal shares: the plain sum of cross-entropies


def test_warmup_weighs_early_exits_more():
    assert warmup_loss(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).item() == 3 * 1 + 2 * 10 + 1 * 100 + 1000


def test_gate_and_classifier_steps_do_not_touch_each_other():
    p, (x, y) = policy(alternate=3), _batch(12, 0)
    for step, phase in ((0, "gate"), (2, "gate"), (3, "inference"), (6, "gate")):
        p.zero_grad(set_to_none=True)
        p.loss(x, y, step).backward()
        moved = {n for n, q in p.named_parameters() if q.grad is not None and q.grad.any()}
        assert p.phase(step) == phase
        assert moved == {
            n for n, _ in p.named_parameters() if n.startswith("gate." if phase == "gate" else "staged.heads.") and "heads.3" not in n
        }


def test_gate_loss_by_hand():
    p, (x, y) = policy(tradeoff=0.4, alternate=1), _batch(10, 1)
    nn.init.normal_(p.gate.weight)
    p.positive.copy_(torch.tensor([2.0, 0.5, 3.0]))
    outs = p.outputs(x)
    total = torch.tensor(p.costs(x).total) / p.costs(x).full
    terms = []
    for i, l in itertools.product(range(10), range(3)):
        best = min(range(4), key=lambda k: F.cross_entropy(outs[k][i], y[i]).item() + 0.4 * total[k].item())
        q = outs[l][i].softmax(0)
        s = q.square() / q.square().sum()
        top = q.sort(descending=True).values
        m = torch.stack([top[0], -(q * q.log()).sum(), top[0] - top[1], -(s * s.log()).sum()])
        g = torch.sigmoid(p.gate.weight[l] @ m + p.gate.bias[l])
        terms.append(-p.positive[l] * g.log() if l >= best else -(1 - g).log())
    torch.testing.assert_close(p.loss(x, y, 0), torch.stack(terms).mean())


def test_other_targets():
    readouts, y = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([0])
    right = 1 - torch.tensor([2.0, 0.0]).softmax(0)[0].item()
    assert policy(target="error").badness(readouts, y).tolist() == [[0, 1]]
    assert policy(target="confidence").badness(readouts, y).tolist() == [[pytest.approx(right), 1]]


def test_positives_are_weighted_by_zeros_over_ones():
    p, data = policy(tradeoff=0.2, warmup_epochs=0), [_batch(20, s) for s in range(3)]
    p.begin_epoch(0, 0, data)
    with torch.no_grad():
        t = torch.cat([gate_targets(p.badness(torch.stack(p.outputs(x), 1), y), p.relative_cost(x), 0.2) for x, y in data])
    ones = t.float().sum(0)
    torch.testing.assert_close(p.positive, (60 - ones + 1) / (ones + 1))


def test_warmup_ends_at_the_best_classifiers():
    p, data = policy(warmup_epochs=2), [_batch(30, 0)]
    x, y = data[0]
    heads = p.staged.heads
    p.begin_epoch(0, 0, data)
    assert p.phase(0) == "warmup" and {id(q) for q in p.trainable(0)} == {id(q) for q in heads[:-1].parameters()}
    with torch.no_grad():  # exit 0 gets the labels right, the others become useless
        for head in heads[1:-1]:
            nn.init.zeros_(head[2].weight)
            head[2].bias.copy_(torch.tensor([0.0, 0.0, 100.0]) if (y == 2).sum() < 5 else torch.tensor([-100.0, -100.0, 0.0]))
        scores = [(p.outputs(x)[k].argmax(1) == y).sum().item() for k in range(3)]
    good = [h[2].weight.clone() for h in heads[:-1]]
    p.begin_epoch(1, 1, data)
    with torch.no_grad():
        for head in heads[:-1]:
            nn.init.zeros_(head[2].weight)
            head[2].bias.copy_(-F.one_hot(y, 3).sum(0).float())  # the rarest class for every row
    p.begin_epoch(2, 2, data)
    assert p.phase(2) == "gate" and p.phase(2 + p.alternate) == "inference"
    after = [(p.outputs(x)[k].argmax(1) == y).sum().item() for k in range(3)]
    assert all(a >= s for a, s in zip(after, scores)) and torch.equal(heads[0][2].weight, good[0])


def test_lambda_moves_the_exits():
    data = [_batch(32, s) for s in range(8)]
    torch.manual_seed(0)
    net = with_exits(_network(), data[0][0], cuts=2)
    costs = []
    for tradeoff in (0.0, 1000.0):
        torch.manual_seed(1)
        p = JEIDNN(net, tradeoff=tradeoff, alternate=8, warmup_epochs=1)
        history = fit_policy(p, data, epochs=6, optimizer=lambda q: torch.optim.AdamW(q, lr=0.2), val=data)
        assert len(history.val) == 6 and {"loss", "accuracy", "cost"} <= set(history.val[-1])
        costs.append(history.val[-1]["cost"])
    x = data[0][0]
    assert costs[1] == p.costs(x).total[0] < costs[0]  # at a huge price all leave at once


def test_same_seed_same_policy():
    data, results = [_batch(16, s) for s in range(3)], []
    for _ in range(2):
        torch.manual_seed(0)
        p = JEIDNN(with_exits(_network(), data[0][0], cuts=2), alternate=2, warmup_epochs=1)
        fit_policy(p, data, epochs=3, seed=5)
        results.append(torch.cat([q.flatten() for q in p.parameters()]))
    assert torch.equal(*results)


def test_unusable_settings_are_refused():
    with pytest.raises(UnsupportedModel, match="heads"):

        class Headless(nn.Module):
            n_stages = 2

            def start(self, x):
                return x

            def stage(self, k, state):
                return state, state

        JEIDNN(Headless())
    one = ExitChain([nn.Linear(2, 2)], [nn.Linear(2, 2)])
    nan = float("nan")
    for call in (lambda: JEIDNN(one), lambda: policy(alternate=0), lambda: policy(target="luck")):
        with pytest.raises(BadInput):
            call()
    for wrong in (nan, -0.1, float("inf")):
        with pytest.raises(BadInput, match="tradeoff"):
            policy(tradeoff=wrong)
    with pytest.raises(BadInput, match="warmup_epochs"):
        policy(warmup_epochs=-1)


def test_unusable_batches_are_refused():
    p, (x, y) = policy(alternate=1, warmup_epochs=0), _batch(4, 0)
    for wrong in (y.float(), y + 2, y - 3, y[:3], y > 0):
        for step in (0, 1):
            with pytest.raises(BadInput, match="labels"):
                p.loss(x, wrong, step)
        with pytest.raises(BadInput, match="labels"):
            p.begin_epoch(0, 0, [(x, wrong)])
    x[1, 0, 2, 3] = float("nan")
    for mode in ("compact", "masked", "loop"):
        with pytest.raises(BadInput, match="NaN"):
            p.decide(x, mode=mode)


@pytest.mark.parametrize("alternate", [1, 10**9])  # jointly, and gates learned afterwards
def test_gate_steps_hold_the_classifiers_constant(alternate):
    torch.manual_seed(0)
    net = BackboneS(classes=3)
    for k, width in enumerate((16, 32, 48)):
        net.heads[k] = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(4 * width), nn.Dropout(0.5), nn.Linear(4 * width, 3)
        )
    p, (x, y) = JEIDNN(net, alternate=alternate, warmup_epochs=0).train(), _batch(12, 0)
    before = {k: v.clone() for k, v in p.staged.state_dict().items()}
    optimizer = torch.optim.AdamW([q for q in p.parameters() if q.requires_grad], lr=0.1)
    first = p.loss(x, y, 0)
    assert torch.equal(first, p.loss(x, y, 0))  # nothing random
    first.backward()
    optimizer.step()
    after = p.staged.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert p.gate.weight.any() and p.staged.heads[0][2].training and not p.staged.segments[0].training
    if alternate == 1:
        p.loss(x, y, 1)
        assert not torch.equal(before["heads.0.2.running_mean"], p.staged.state_dict()["heads.0.2.running_mean"])
