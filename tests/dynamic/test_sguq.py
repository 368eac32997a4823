"""SGUQ: graphs, encoders, fusion, ensemble, thresholds, acquisition."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from neurarium import data
from neurarium.dynamic.acquisition import SGUQ, search
from neurarium.dynamic.compile import split
from neurarium.dynamic.ensemble import VCDN, Pooled, vote, weighted_loss
from neurarium.dynamic.gates import MaxProb, Spread
from neurarium.dynamic.sample_graph import Encoder, SampleGraph
from neurarium.errors import BadInput
from neurarium.testing.examples.dynamic.acquisition import _policy, _views, sguq
from neurarium.testing.exits import check_loss


@pytest.fixture(scope="module")
def policy() -> SGUQ:
    return sguq().make(0)


@given(st.integers(3, 40), st.floats(0.5, 6), st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_the_bound_gives_the_asked_degree_and_rows_sum_to_one(n, neighbours, seed):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    graph = SampleGraph(5, neighbours).double().build(x)
    similarity = graph.points @ graph.points.T
    degree = ((similarity >= graph.bound).sum() - n).item() / n
    assert abs(degree - min(n - 1, neighbours)) <= 1 + 1e-9
    a = graph.adjacency()
    torch.testing.assert_close(a.sum(1), torch.ones(n, dtype=torch.float64))
    edges, total = graph.attach(torch.randn(4, 5, dtype=torch.float64))
    torch.testing.assert_close(edges.sum(1, keepdim=True) + 1, total)


def encoder(members=2, dim=4, hidden=(6, 5)) -> Encoder:
    torch.manual_seed(0)
    e = Encoder(dim, 3, members, 2.0, hidden, 0.5).double().eval()
    for b in e.biases:
        nn.init.normal_(b)
    return e


def test_without_edges_the_graph_network_is_an_mlp():
    e, x = encoder(), torch.randn(7, 4, dtype=torch.float64)
    for t in range(2):
        layers: list[nn.Module] = []
        for w, b in zip(e.weights, e.biases):
            layer = nn.Linear(*w.shape[1:]).double()
            layer.weight.data, layer.bias.data = w[t].T, b[t]
            layers += [layer, nn.LeakyReLU(0.25)]
        torch.testing.assert_close(e.over(torch.eye(7, dtype=torch.float64), x)[:, t], nn.Sequential(*layers[:-1])(x))


def test_propagation_is_that_of_torch_geometric():
    gnn = pytest.importorskip("torch_geometric.nn")
    e, x = encoder(members=1, hidden=(6,)), torch.randn(9, 4, dtype=torch.float64)
    a = e.graph.build(x).adjacency()
    conv = gnn.DenseGCNConv(4, 6).double()
    conv.lin.weight.data, conv.bias.data = e.weights[0][0].T, e.biases[0][0]
    want = F.leaky_relu(conv(x, a, add_loop=False)[0], 0.25) @ e.weights[1][0] + e.biases[1][0]
    torch.testing.assert_close(e.over(a, x)[:, 0], want)


def test_a_new_patient_reads_the_training_states_and_changes_nothing():
    e, x, new = encoder(), torch.randn(12, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    a = e.graph.build(x).adjacency()
    e.settle(x)
    bound, got = e.graph.bound.item(), e(new)
    for i, t in itertools.product(range(5), range(2)):  # by hand, layer by layer
        s = F.cosine_similarity(new[i : i + 1], x)
        s = torch.where((s >= bound) & (s > 0), s, 0.0)
        row, h, train = s / (1 + s.sum()), new[i], x
        for w, b in zip(e.weights[:-1], e.biases[:-1]):
            h = F.leaky_relu(row @ (train @ w[t]) + (h @ w[t]) / (1 + s.sum()) + b[t], 0.25)
            train = F.leaky_relu(a @ train @ w[t] + b[t], 0.25)
        torch.testing.assert_close(got[i, t], h @ e.weights[-1][t] + e.biases[-1][t])
    assert torch.equal(e(new[:1]), got[:1]) or torch.allclose(e(new[:1]), got[:1], atol=1e-12)
    new = x[:5] + 0.3 * torch.randn(5, 4, dtype=torch.float64)
    together, alone = e.transduce(new), torch.cat([e.transduce(new[i : i + 1]) for i in range(5)])
    assert not torch.allclose(together, alone)  # the published graph lets new patients influence each other


def test_transduction_by_brute_force():
    e, x, new = encoder(), torch.randn(8, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    e.graph.build(x)
    e.settle(x)
    everything = torch.cat([x, new])
    a = torch.eye(11, dtype=torch.float64)
    for i, j in itertools.product(range(8), range(3)):
        s = F.cosine_similarity(x[i], new[j], dim=0)
        a[i, 8 + j] = a[8 + j, i] = s if s >= e.graph.bound and s > 0 else 0.0
    torch.testing.assert_close(e.transduce(new), e.over(a / a.sum(1, keepdim=True), everything)[8:])


def test_fusion_reads_the_outer_product():
    torch.manual_seed(0)
    said = [torch.randn(4, 2, 2, dtype=torch.float64) for _ in range(3)]
    got = VCDN.product(said)
    for n, t in itertools.product(range(4), range(2)):
        p = [s[n, t].sigmoid() for s in said]
        want = [p[0][a] * p[1][b] * p[2][c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        torch.testing.assert_close(got[n, t], torch.stack(want))
    fusion = VCDN(2, 3, 2).double()
    want = F.leaky_relu(got[:, 1] @ fusion.first[1] + fusion.bias[0][1], 0.25) @ fusion.last[1] + fusion.bias[1][1]
    torch.testing.assert_close(fusion(said)[:, 1], want)


def test_vote_and_spread():
    p = torch.tensor([[[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]], [[0.7, 0.3], [0.7, 0.3], [0.7, 0.3]]], dtype=torch.float64)
    answer = vote(p.log())
    assert answer.argmax(1).tolist() == [1, 0]  # the majority, although the mean says 0
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert answer[0, 1].exp().item() == pytest.approx((2 + (0.1 + 0.6 + 0.55) / 3) / 4)
    score, memory = Spread()(0, p.log(), None)
    assert memory is None and score[1].item() == pytest.approx(1)
    assert score[0].item() == pytest.approx(1 - torch.tensor([0.1, 0.6, 0.55]).std(correction=0).item(), abs=1e-6)
    tie = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]]).log()
    assert vote(tie).argmax().item() == 0
    assert Pooled(MaxProb())(0, p.log(), None)[0].tolist() == pytest.approx([1.75 / 3, 0.7])


def test_extreme_thresholds_are_the_single_view_and_all_views(policy):
    x, _ = _views(20, 5)
    first, every = policy.decide(x, threshold=-1.0), policy.decide(x, threshold=2.0)
    one = policy.staged.encoders[policy.staged.order[0]](x[policy.staged.order[0]])
    assert torch.equal(first.output, vote(one)) and (first.price == policy.prices[policy.staged.order[0]]).all()
    said = [policy.staged.encoders[v](x[v]) for v in policy.staged.order]
    torch.testing.assert_close(every.output, vote(policy.staged.fusions[-1](said)))
    assert (every.price == 7).all() and (policy.decide(x).price <= 7).all()
    assert (policy.decide(x, mode="masked").price == 7).all()


def test_compact_masked_and_loop_agree(policy):
    x, _ = _views(15, 8)
    table = policy.costs(x)
    for budget in torch.linspace(table.total[0], table.full, 4).tolist():
        want = policy.decide(x, budget=budget)
        for mode in ("masked", "loop"):
            got = policy.decide(x, budget=budget, mode=mode)
            assert torch.equal(got.choice, want.choice)
            torch.testing.assert_close(got.output, want.output)
        assert torch.equal(got.cost, want.cost) and torch.equal(got.price, want.price)
        assert (policy.decide(x, budget=budget, mode="masked").cost == table.full).all()
    torch.testing.assert_close(policy.masked(x), policy(x))
    program = torch.export.export(policy, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), policy(x))


def test_a_view_that_is_not_bought_is_not_read(policy):
    x, _ = _views(30, 6)
    out = policy.decide(x, price=3.0)
    assert 0 < (out.choice == 0).sum() < 30
    order = policy.staged.order
    hidden = [v.clone() for v in x]
    for k, v in enumerate(order):
        hidden[v][out.choice < k] = 1e6
    again = policy.decide(tuple(hidden), price=3.0)
    assert torch.equal(again.output, out.output) and torch.equal(again.choice, out.choice)


def test_budgets_for_data(policy):
    x, _ = _views(40, 1)
    before, last = policy.tau.clone(), torch.zeros(40, dtype=torch.float64)
    for price in (1.0, 2.0, 3.5, 5.0, 7.0):
        out = policy.decide(x, price=price)
        assert out.price.mean() <= price + 1e-9 and (out.price >= last).all()  # these rows are the calibration rows
        last = out.price
    assert (last == 7).all() and torch.equal(policy.tau, before)
    with pytest.raises(BadInput, match="smallest feasible one is 1"):
        policy.decide(x, price=0.5)
    with pytest.raises(BadInput, match="one of them"):
        policy.decide(x, price=2.0, threshold=0.5)
    assert policy.use(price=1.0).tau[0] == float("-inf")
    policy.tau.copy_(before)


def test_thresholds_by_brute_force():
    torch.manual_seed(0)
    scores, correct = torch.rand(9, 2, dtype=torch.float64), (torch.rand(9, 3) < 0.6).double()
    spent = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)

    def judge(tau):
        choice = [next((k for k in range(2) if row[k] >= tau[k]), 2) for row in scores]
        return sum(correct[i, c].item() for i, c in enumerate(choice)), -sum(spent[c].item() for c in choice)

    levels = [[-1.0, *((a + b) / 2 for a, b in itertools.pairwise(scores[:, k].sort().values.tolist())), 2.0] for k in (0, 1)]
    assert judge(search(scores, correct, spent)) == max(judge(t) for t in itertools.product(*levels))
    assert search(scores[:, :0], correct[:, :1], spent[:1]).tolist() == [float("-inf")]


def test_classes_weigh_as_their_share():
    torch.manual_seed(0)
    said, y = torch.randn(4, 2, 3), torch.tensor([0, 0, 0, 2])
    want = sum(w * F.cross_entropy(said[i, t], y[i]) for i, w in enumerate((0.75, 0.75, 0.75, 0.25)) for t in range(2)) / 4
    torch.testing.assert_close(weighted_loss(said, y), want)


def test_order_is_the_best_view_then_the_best_pair_with_it():
    torch.manual_seed(0)
    y = torch.randint(2, (90,))
    clear, half, none = (F.one_hot(y, 2) + s * torch.randn(90, 2) for s in (0.2, 0.6, 5.0))
    p = SGUQ((2, 2, 2), 2, members=2, hidden=(8,), neighbours=1)
    views = (none, clear, half)
    p.fit([v[:60] for v in views], y[:60], val=([v[60:] for v in views], y[60:]), epochs=(20, 20), rates=(1e-2, 1e-2, 1e-2))
    assert p.staged.order[0] == 1
    with torch.no_grad():
        assert (p.eval().decide([v[60:] for v in views]).output.argmax(1) == y[60:]).double().mean() > 0.9


def test_fit_is_repeatable_and_leaves_the_generator_alone():
    states = []
    for _ in range(2):
        p, before = _policy(order=(2, 0, 1)), torch.get_rng_state()
        p.fit(*_views(20, 0), epochs=(2, 2))
        assert torch.equal(before, torch.get_rng_state())
        states.append(torch.cat([q.flatten() for q in p.parameters()]))
    assert torch.equal(*states) and p.staged.order == (2, 0, 1)


def test_the_loss_reaches_everything():
    check_loss(_policy(), *_views(20, 0), steps=range(1))


def test_a_state_goes_into_an_untrained_policy(policy):
    x, _ = _views(9, 3)
    other = _policy(7)
    other.load_state_dict(policy.state_dict())
    a, b = policy.decide(x), other.eval().decide(x)
    assert torch.equal(a.output, b.output) and torch.equal(a.cost, b.cost) and torch.equal(a.price, b.price)


def test_the_compiled_form_agrees(policy):
    x, _ = _views(12, 4)
    want, got = policy.decide(x), split(policy, x).decide(x)
    assert torch.equal(want.choice, got.choice) and torch.equal(want.cost, got.cost) and torch.equal(want.price, got.price.double())
    torch.testing.assert_close(got.output, want.output)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_other_numbers_of_views(views):
    torch.manual_seed(0)
    x, y = [torch.randn(16, 3) for _ in range(views)], torch.randint(2, (16,))
    p = SGUQ((3,) * views, 2, members=2, hidden=(4,), gate=MaxProb())
    p.fit(x, y, val=(x, y), epochs=(1, 2))
    out = p.eval().decide(x, budget=float(p.costs(tuple(x)).full))
    assert out.output.shape == (16, 2) and out.price.max() <= views


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x, y: p.decide(x[:2]),
        lambda p, x, y: p.decide(x[0]),
        lambda p, x, y: p.decide((x[1], x[0], x[2])),
        lambda p, x, y: p.decide((x[0], x[1], x[2][:3])),
        lambda p, x, y: p.decide(tuple(v[:0] for v in x)),
        lambda p, x, y: p.decide((x[0] * float("nan"), *x[1:])),
        lambda p, x, y: p.decide(x, budget=1.0),
        lambda p, x, y: _policy().decide(x),
        lambda p, x, y: _policy().fit(x, y),
        lambda p, x, y: _policy(order=(0, 1, 2)).fit(x, y + 1),
        lambda p, x, y: _policy(order=(0, 1, 2)).fit((x[0] * float("inf"), *x[1:]), y),
        lambda p, x, y: _policy(order=(0, 1, 2)).fit(x, y, epochs=(0, 0)),
        lambda p, x, y: _policy(order=(0, 0, 1)),
        lambda p, x, y: _policy(neighbours=0),
        lambda p, x, y: SGUQ((3,), 1),
        lambda p, x, y: SGUQ((3, 3), 2, prices=(1.0,)),
        lambda p, x, y: SGUQ((3, 3), 2, dropout=1.0),
        lambda p, x, y: copy.deepcopy(p).calibrate([]),
        lambda p, x, y: p.loss(x, y.float()),
        lambda p, x, y: SampleGraph(3).build(torch.zeros(1, 3)),
    ],
)
def test_bad_input_is_refused(call, policy):
    x, y = _views(6, 2)
    y[0] = 2
    with pytest.raises(BadInput):
        call(policy, x, y)


def test_generated_patients_have_views_that_say_nothing():
    a, b = (
        data.multi_omics(400, (30, 20), strengths=(1.0, 0.5), noise=0.1, seed=3),
        data.multi_omics(50, (30, 20), strengths=(1.0, 0.5), seed=4),
    )
    assert a.dims == (30, 20) and b.y.unique().tolist() == [0, 1]
    size = a.x[0].norm(dim=1)
    assert size[~a.informative[:, 0]].max() < 1 < size[a.informative[:, 0]].median()
    assert 0.25 < (~a.informative).double().mean() < 0.45
    train, rest = a.split(300, seed=1)
    assert (len(train), len(rest)) == (300, 100)
    train, rest = train.standardise(rest)
    assert train.x[0].mean(0).abs().max() < 1e-5 and (train.x[0].std(0) - 1).abs().max() < 1e-4
    assert sum(len(y) for _, y in rest.batches(30)) == 100
    digits = data.digit_views()
    assert digits.dims == (32, 64, 40) and len(digits) == 1797
    for bad in ({"n": 1}, {"dims": ()}, {"silent": 1.0}, {"strengths": (1.0,)}):
        with pytest.raises(BadInput):
            data.multi_omics(**bad)
    with pytest.raises(BadInput):
        a.split(400)
