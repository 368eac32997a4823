"""Forward learning of graphs: what the virtual nodes see, what a layer learns, and that no layer hears of another."""

import sys
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from neurarium.errors import BadInput, MissingExtra, UnsupportedModel
from neurarium.learn.fit import Backprop, Diverged
from neurarium.learn.graph_forward import UNKNOWN, GraphForward, GraphLayers, augment, graph_batch
from neurarium.learn.local import gradient_alignment
from neurarium.meter import SavedBytes

pyg = pytest.importorskip("torch_geometric")
MODES = ("sf", "sf-top2loss", "ff-label", "ff-virtual")


def blocks_graph(nodes=120, classes=3, features=12, seed=0):
    """A stochastic block model whose features say a little about the class; 40 % of the nodes are labelled."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % classes
    same = y[:, None] == y
    link = (torch.rand(nodes, nodes, generator=g) < torch.where(same, 0.12, 0.01)).triu(1)
    edges = torch.nonzero(link | link.T).T.contiguous()
    x = torch.randn(nodes, features, generator=g) + 1.2 * torch.eye(classes, features)[y]
    order = torch.rand(nodes, generator=g)
    return SimpleNamespace(
        x=x, edge_index=edges, y=y, train_mask=order < 0.4, val_mask=(order >= 0.4) & (order < 0.6), test_mask=order >= 0.6
    )


G = blocks_graph()
BATCH = graph_batch(G, G.train_mask)
VAL = [graph_batch(G, G.val_mask)]
FAST = partial(Adam, lr=1e-2)


def layers(mode="sf", kind="gcn", hidden=(16, 16), seed=0):
    torch.manual_seed(seed)
    return GraphLayers(kind, 12 + 3 * (mode == "ff-label"), *hidden)


def accuracy(scores, mask=G.test_mask):
    return float((scores[mask].argmax(1) == G.y[mask]).float().mean())


def test_virtual_nodes_are_tied_to_the_training_nodes_of_their_class_and_to_no_others():
    virtual = torch.randn(3, 12)
    x, edges = augment(G.x, G.edge_index, BATCH[1], virtual)
    n, known = len(G.x), int(G.train_mask.sum())
    assert x.shape == (n + 3, 12) and edges.shape[1] == G.edge_index.shape[1] + 2 * known
    ties = edges[:, G.edge_index.shape[1] :]
    assert {tuple(t) for t in ties.T.tolist()} == {tuple(t[::-1]) for t in ties.T.tolist()}
    below = ties.min(0).values
    assert G.train_mask[below].all() and torch.equal(ties.max(0).values - n, G.y[below])
    degree = torch.bincount(edges[1], minlength=n + 3)
    assert torch.equal(degree[n:], torch.bincount(G.y[G.train_mask], minlength=3))
    assert torch.equal(degree[:n], torch.bincount(G.edge_index[1], minlength=n) + G.train_mask)


def test_a_layer_is_torch_geometrics_own_on_the_augmented_graph():
    model, rule = layers(), GraphForward()
    rule.fit(model, [BATCH], epochs=1)
    state = rule.predictor(model)
    x, edges = augment(G.x, G.edge_index, BATCH[1], state.virtual)
    adjacency = torch.zeros(123, 123)
    adjacency[edges[1], edges[0]] = 1
    adjacency += torch.eye(123)
    scale = adjacency.sum(1).rsqrt()  # degrees with the new edges
    with torch.no_grad():
        conv = model.convs[0]
        want = (scale[:, None] * adjacency * scale) @ (F.normalize(x) @ conv.lin.weight.T) + conv.bias
        torch.testing.assert_close(state.through(0, state.enter(BATCH[1])), want.relu(), rtol=1e-4, atol=1e-5)


def test_with_frozen_prototypes_one_layer_is_multinomial_logistic_regression():
    """A linear layer on nodes (every output shifted to stay positive, so that relu is the identity): the textbook gradient."""

    class Shifted(nn.Linear):
        def forward(self, x, edge_index):
            return super().forward(x) + 10

    model, rule = nn.ModuleList([Shifted(12, 5)]), GraphForward(optimizer=partial(SGD, lr=1.0), patience=None)
    fixed = nn.ModuleList([deepcopy(model[0])])
    rule.fit(model, [BATCH], epochs=1)
    virtual = rule.predictor(model).virtual
    w = fixed[0].weight.detach().clone().requires_grad_()
    known = BATCH[1] != UNKNOWN
    h = F.normalize(G.x[known])
    prototypes = (F.normalize(virtual) @ fixed[0].weight.T + fixed[0].bias + 10).detach()
    z = h @ w.T + fixed[0].bias.detach() + 10
    p = (z @ prototypes.T).softmax(1).detach()
    by_hand = ((p - F.one_hot(G.y[known], 3)) @ prototypes).T @ h / int(known.sum())
    F.cross_entropy(z @ prototypes.T, G.y[known]).backward()
    torch.testing.assert_close(w.grad, by_hand, rtol=1e-3, atol=1e-5)
    state = rule.predictor(model)  # the rule's own loss has the same gradient where the prototypes do not move
    layer = deepcopy(fixed[0])
    state.layers = (layer,)
    z = state.through(0, state.enter(BATCH[1]))
    (g,) = torch.autograd.grad(F.cross_entropy(z[:120][known] @ z[120:].detach().T, G.y[known]), layer.weight)
    torch.testing.assert_close(g, by_hand, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_no_layer_hears_of_the_weights_above_it(mode):
    def updated(model):
        before = deepcopy(model)
        GraphForward(mode=mode, optimizer=partial(SGD, lr=0.1), patience=None).fit(model, [BATCH], epochs=1)
        return [[a - b for a, b in zip(p.parameters(), q.parameters())] for p, q in zip(model.convs, before.convs)]

    plain = updated(layers(mode, hidden=(16, 16, 16)))
    assert all(any(float(u.detach().abs().max()) > 0 for u in layer) for layer in plain)
    disturbed = layers(mode, hidden=(16, 16, 16))
    with torch.no_grad():
        for p in disturbed.convs[2].parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    found = updated(disturbed)
    same = [all(torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip(plain[:2], found[:2])]
    # states of upper layers are what "top to loss" sends down: values of the step before, no weights and no graph
    assert same == ([False, False] if mode == "sf-top2loss" else [True, True])


def test_the_memory_of_a_step_is_that_of_the_largest_layer():
    def kept(*hidden):
        model = layers(hidden=hidden)
        with SavedBytes() as meter:
            GraphForward(patience=None).fit(model, [BATCH], epochs=1)
        return meter.peak

    assert kept(16, 16, 16, 16) <= 1.1 * kept(16, 16)


def test_the_two_copies_of_forward_forward_do_not_touch():
    for mode in ("ff-label", "ff-virtual"):
        model, rule = layers(mode), GraphForward(mode=mode, patience=None)
        rule.fit(model, [BATCH], epochs=1)
        state = rule.predictor(model)
        with torch.no_grad():
            torch.manual_seed(5)
            both = state.through(0, state.enter(BATCH[1]))
            torch.manual_seed(5)
            y = BATCH[1]
            wrong = torch.where(y == UNKNOWN, y, (y + torch.randint_like(y, 1, 3)) % 3)
            assert not (wrong == y)[G.train_mask].any()
            apart = []
            for labels in (y, wrong):
                h, edges = state.labelled(G.x, G.edge_index, labels)
                apart.append(model.convs[0](F.normalize(h), edges).relu())
        torch.testing.assert_close(both, torch.cat(apart), rtol=1e-5, atol=1e-6)


def test_predictions_know_no_label_but_those_of_training():
    for mode in MODES:
        model, rule = layers(mode), GraphForward(mode=mode, patience=None, optimizer=FAST)
        rule.fit(model, [BATCH], epochs=3)
        state = rule.predictor(model)
        assert int((state.y != UNKNOWN).sum()) == int(G.train_mask.sum())
        with pytest.raises(BadInput, match="119 nodes"):
            state(G.x[:119], G.edge_index)


@pytest.mark.parametrize(
    "mode, epochs, least", [("sf", 30, 0.8), ("sf-top2loss", 40, 0.75), ("ff-label", 100, 0.5), ("ff-virtual", 100, 0.5)]
)
def test_every_mode_learns(mode, epochs, least):
    model, rule = layers(mode), GraphForward(mode=mode, patience=None, optimizer=FAST)
    history = rule.fit(model, [BATCH], epochs=epochs)
    assert history.train[-1]["loss"] < history.train[-epochs]["loss"]
    assert accuracy(rule.predictor(model)(G.x, G.edge_index)) > least


@pytest.mark.parametrize("kind", ["sage", "gat", "linear"])
def test_other_layers_and_graphs_as_objects(kind):
    from torch_geometric.data import Data

    graph = Data(x=G.x, edge_index=G.edge_index, y=G.y, train_mask=G.train_mask, val_mask=G.val_mask)
    model, rule = layers(kind=kind), GraphForward(optimizer=FAST, patience=5)
    history = rule.fit(model, graph, epochs=30)
    assert "accuracy" in history.val[0] and accuracy(rule.predictor(model)(G.x, G.edge_index)) > (0.3 if kind == "linear" else 0.5)


def test_early_stopping_keeps_the_best_layer():
    model, rule = layers(), GraphForward(optimizer=partial(Adam, lr=0.1), patience=3)
    history = rule.fit(model, [BATCH], epochs=40, val=VAL)
    last = [e["accuracy"] for e in history.val if e["block"] == 1]
    assert len(last) < 40 or len([e for e in history.val if e["block"] == 0]) < 40
    state = rule.predictor(model)
    scores = state.by_layer(G.x, G.edge_index)[1]
    assert accuracy(scores, G.val_mask) == pytest.approx(max(last))


@pytest.mark.parametrize("mode", MODES)
def test_resuming_is_seamless(mode):
    rule = GraphForward(mode=mode, optimizer=FAST, patience=None)
    whole, parts, states = layers(mode), layers(mode), []
    rule.fit(whole, [BATCH], epochs=4)
    want = rule.predictor(whole)(G.x, G.edge_index)
    rule.fit(layers(mode), [BATCH], epochs=4, callbacks=[lambda p: states.append(p.state())])
    for state in (states[1], states[len(states) // 2]):
        rule.fit(parts, [BATCH], epochs=4, resume=state)
        for a, b in zip(whole.parameters(), parts.parameters()):
            assert torch.equal(a, b)
        assert torch.equal(rule.predictor(parts)(G.x, G.edge_index), want)


def test_the_same_batch_trains_by_backpropagation_and_alignment_is_measured():
    model = layers(hidden=(16, 3))
    Backprop(optimizer=FAST).fit(model, [BATCH], epochs=40)
    assert accuracy(model(G.x, G.edge_index)) > 0.8
    found = gradient_alignment(GraphForward(mode="sf-top2loss", patience=None), layers(hidden=(3, 3)), BATCH)
    assert all(-1.001 <= v <= 1.001 for v in found.values()) and len(found) == 4


def test_refusals(monkeypatch):
    for wrong, why in (([], "0 graphs"), ([BATCH, BATCH], "2 graphs"), ([((G.x * torch.nan, G.edge_index), G.y)], "finite"),
                       ([((G.x, G.edge_index + 5), G.y)], "names node"), ([((G.x, G.edge_index.float()), G.y)], "int64"),
                       ([((G.x, G.edge_index), torch.full_like(G.y, UNKNOWN))], "labels no node"),
                       ([((G.x, G.edge_index), G.y.float())], "integer class"),
                       (SimpleNamespace(x=G.x, edge_index=G.edge_index, y=G.y), "train_mask")):  # fmt: skip
        with pytest.raises(BadInput, match=why):
            GraphForward().fit(layers(), wrong, epochs=1)
    with pytest.raises(BadInput, match="mode"):
        GraphForward(mode="up").fit(layers(), [BATCH], epochs=1)
    with pytest.raises(UnsupportedModel, match="ModuleList"):
        GraphForward().fit(nn.Linear(12, 3), [BATCH], epochs=1)
    with pytest.raises(UnsupportedModel, match=r"^convs\.1: cannot be called"):
        broken = layers()
        broken.convs[1] = nn.Linear(16, 16)
        GraphForward().fit(broken, [BATCH], epochs=1)
    with pytest.raises(UnsupportedModel, match=r"^convs\.1: has 8 outputs"):
        GraphForward(mode="sf-top2loss").fit(layers(hidden=(16, 8)), [BATCH], epochs=1)
    from torch_geometric.nn import GCNConv

    with pytest.raises(UnsupportedModel, match="cached"):
        GraphForward().fit(nn.ModuleList([GCNConv(12, 8, cached=True)]), [BATCH], epochs=1)
    spoilt = layers()
    with torch.no_grad():
        spoilt.convs[1].bias[0] = torch.inf
    with pytest.raises(Diverged):
        GraphForward(patience=None).fit(spoilt, [BATCH], epochs=1)
    with pytest.raises(BadInput, match="kind"):
        GraphLayers("transformer", 3, 4)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(MissingExtra, match="graphs"):
        GraphLayers("gcn", 3, 4)
