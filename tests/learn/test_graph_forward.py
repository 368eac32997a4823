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
from neurarium.learn.graph_links import auc, link_loss, link_scores, non_edges, split_links
from neurarium.learn.local import gradient_alignment
from neurarium.meter import SavedBytes

pyg = pytest.importorskip("torch_geometric")
MODES = ("sf", "sf-top2loss", "sf-top2input", "ff-label", "ff-virtual")


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
    return GraphLayers(kind, 12 + 3 * (mode == "ff-label"), *hidden, top=3 if mode == "sf-top2input" else None)


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
    # states of upper layers are what "top to loss" sends down: values of the step before, no weights and no graph;
    # "top to input" sends those of the next layer alone
    assert same == {"sf-top2loss": [False, False], "sf-top2input": [True, False]}.get(mode, [True, True])


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
    "mode, epochs, least",
    [("sf", 30, 0.8), ("sf-top2loss", 40, 0.75), ("sf-top2input", 40, 0.7), ("ff-label", 100, 0.5), ("ff-virtual", 100, 0.5)],
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


def top_to_input(*hidden, seed=0, **settings):
    """A model with its rule, before any step."""
    model = layers("sf-top2input", hidden=hidden, seed=seed)
    rule = GraphForward(mode="sf-top2input", patience=None, **settings)
    rule.fit(model, [BATCH], epochs=0)
    return model, rule.predictor(model)


def test_a_layer_reads_its_neighbours_of_the_step_before_and_the_last_one_the_known_labels():
    model, state = top_to_input(10, 8, 6)
    y, h = BATCH[1], state.enter(BATCH[1])
    assert [conv.in_channels for conv in model.convs] == [12 + 8, 10 + 6, 8 + 3]
    before = [state.get_buffer(f"state{i}").clone() for i in range(3)]
    shares = torch.full((120, 3), 1 / 3)
    shares[G.train_mask] = torch.eye(3)[G.y[G.train_mask]]
    top = F.normalize(torch.cat([shares, torch.eye(3)]))
    below, above, after = [h, *before], [*before[1:], top], []
    for i, conv in enumerate(model.convs):
        z = state.through(i, h)
        torch.testing.assert_close(z, conv(torch.cat([below[i], above[i]], 1), state.ties).relu())
        loss = state.loss(i, z, y)
        after.append(F.normalize(z.detach()))
        model.zero_grad()
        loss.backward()
        heard = [any(p.grad is not None for p in other.parameters()) for other in model.convs]
        assert heard == [k == i for k in range(3)]
        h = torch.full_like(z, torch.nan)  # what this step put out is not read before the next
    for i in range(3):
        assert torch.equal(state.get_buffer(f"state{i}"), after[i])


def test_top_to_input_with_no_weight_on_what_is_above_is_single_forward():
    wide, top = top_to_input(16, 16)
    thin = layers()
    with torch.no_grad():
        for conv, other, below in zip(wide.convs, thin.convs, (12, 16)):
            conv.lin.weight[:, below:] = 0
            other.lin.weight.copy_(conv.lin.weight[:, :below])
    rule = GraphForward(patience=None)
    rule.fit(thin, [BATCH], epochs=0)
    plain, top = rule.predictor(thin), GraphForward(mode="sf-top2input", patience=None)
    top.fit(wide, [BATCH], epochs=0)
    top, y = top.predictor(wide), BATCH[1]
    assert torch.equal(top.virtual, plain.virtual)
    for a, b in zip(top.by_layer(G.x, G.edge_index), plain.by_layer(G.x, G.edge_index), strict=True):
        torch.testing.assert_close(a, b)
    h, g = top.enter(y), plain.enter(y)
    for i, (conv, other) in enumerate(zip(wide.convs, thin.convs)):
        z, losses = plain.through(i, g), []
        losses = [top.loss(i, top.through(i, h), y), plain.loss(i, z, y)]
        torch.testing.assert_close(*losses)
        (a,), (b,) = torch.autograd.grad(losses[0], conv.lin.weight), torch.autograd.grad(losses[1], other.lin.weight)
        torch.testing.assert_close(a[:, : b.shape[1]], b, rtol=1e-4, atol=1e-6)
        g = F.normalize(z.detach())


def test_a_prediction_of_top_to_input_knows_no_label_of_other_nodes():
    model, state = top_to_input(16, 16, rounds=3)
    want = state(G.x, G.edge_index)
    other = GraphForward(mode="sf-top2input", patience=5, rounds=3)
    lies = torch.where(G.val_mask, (G.y + 1) % 3, UNKNOWN)
    other.fit(model, [BATCH], epochs=0, val=[((G.x, G.edge_index), lies)])
    assert torch.equal(other.predictor(model)(G.x, G.edge_index), want)
    blank = state.top[:120][~G.train_mask]
    assert (blank == blank[0, 0]).all()


SPLIT = split_links(G.edge_index, 120, val=0.1, test=0.2, generator=torch.Generator().manual_seed(0))
LINKS = ((G.x, SPLIT.edge_index), SPLIT.train)
LINK_VAL = [((G.x, SPLIT.edge_index), SPLIT.val)]


def test_auc_by_hand():
    scores, truth = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.7]), torch.tensor([1, 1, 0, 0, 0])
    assert auc(scores, truth) == pytest.approx((3 + 1.5) / 6)  # .9 above all three; .5 ties one, above one, below one
    g = torch.Generator().manual_seed(0)
    scores, truth = torch.randint(5, (40,), generator=g).float(), torch.rand(40, generator=g) < 0.3
    a, b = scores[truth][:, None], scores[~truth]
    assert auc(scores, truth) == pytest.approx(float(((a > b).float() + 0.5 * (a == b).float()).mean()))
    for wrong in (torch.ones(5), torch.zeros(5)):
        with pytest.raises(BadInput, match="both kinds"):
            auc(torch.arange(5.0), wrong)


def test_held_out_edges_carry_no_message():
    def pairs(edges):
        return {tuple(sorted(e)) for e in edges[:2].T.tolist()}

    every, messages = pairs(G.edge_index), pairs(SPLIT.edge_index)
    held = [pairs(part[:, part[2] == 1]) for part in (SPLIT.val, SPLIT.test)]
    assert messages == pairs(SPLIT.train) and messages | held[0] | held[1] == every
    assert not messages & (held[0] | held[1]) and not held[0] & held[1]
    assert [len(h) for h in held] == [round(len(every) * share) for share in (0.1, 0.2)]
    for part in (SPLIT.val, SPLIT.test):
        none = part[:, part[2] == 0]
        assert none.shape[1] == part.shape[1] // 2 and not pairs(none) & every and (none[0] != none[1]).all()
    adjacency = torch.zeros(120, 120)
    adjacency[SPLIT.edge_index[1], SPLIT.edge_index[0]] = 1
    assert torch.equal(adjacency, adjacency.T)
    model, rule = layers(hidden=(16,)), GraphForward(task="link", patience=None)
    rule.fit(model, [LINKS], epochs=1)
    u, v = next(e for e in SPLIT.test[:2, SPLIT.test[2] == 1].T.tolist() if not adjacency[:, e[0]][adjacency[:, e[1]] > 0].any())
    moved = G.x.clone()
    moved[v] += 1.0  # what v says does not reach u along the edge that is to be found
    with torch.no_grad():
        one, two = (model.convs[0](F.normalize(x), SPLIT.edge_index) for x in (G.x, moved))
    assert torch.equal(one[u], two[u]) and not torch.equal(one[v], two[v])


def test_pairs_drawn_against_edges_are_none_of_them():
    none = non_edges(G.edge_index, 120, 3000)
    taken = {tuple(e) for e in G.edge_index.T.tolist()}
    assert none.shape == (2, 3000) and not taken & {tuple(e) for e in none.T.tolist()}
    assert not (none[0] == none[1]).any()
    nodes = torch.arange(8)
    assert non_edges(torch.cartesian_prod(nodes, nodes).T, 8, 50).shape == (2, 0)


def test_one_layer_of_links_is_logistic_regression_on_products():
    class Shifted(nn.Linear):  # every output stays positive, so that relu is the identity
        def forward(self, x, edge_index):
            return super().forward(x) + 10

    model, rule = nn.ModuleList([Shifted(12, 5)]), GraphForward(task="link", patience=None)
    nn.init.normal_(model[0].weight, std=0.1)
    with torch.no_grad():
        model[0].bias.fill_(-9.8)
    y = SPLIT.val  # its pairs without an edge are given, so nothing is drawn
    rule.fit(model, [((G.x, SPLIT.edge_index), y)], epochs=0)
    state = rule.predictor(model)
    h = F.normalize(G.x)
    z = (h @ model[0].weight.T + model[0].bias + 10).detach().relu()
    u, v, truth = z[y[0]], z[y[1]], y[2].float()
    logit = (u * v).sum(1)
    loss = state.loss(0, state.through(0, state.enter(y)), y)
    by_hand = -(truth * logit.sigmoid().log() + (1 - truth) * (1 - logit.sigmoid()).log()).mean()
    torch.testing.assert_close(loss.detach(), by_hand)
    error = (logit.sigmoid() - truth)[:, None] / len(truth)  # of logistic regression, then the product rule
    want = ((error * v) * (u > 0)).T @ h[y[0]] + ((error * u) * (v > 0)).T @ h[y[1]]
    (found,) = torch.autograd.grad(loss, model[0].weight)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_links_are_found_and_every_layer_alone():
    model, rule = layers(hidden=(16, 16)), GraphForward(task="link", optimizer=FAST)
    history = rule.fit(model, [LINKS], epochs=60, val=LINK_VAL)
    assert history.train[59]["loss"] < history.train[0]["loss"] and {e["block"] for e in history.val} == {0, 1}
    state, pairs = rule.predictor(model), SPLIT.test[:2]
    found = state(G.x, SPLIT.edge_index, pairs)
    torch.testing.assert_close(found, torch.stack(state.by_layer(G.x, SPLIT.edge_index, pairs)).mean(0))
    with torch.no_grad():
        h = G.x
        byhand = []
        for conv in model.convs:
            h = conv(F.normalize(h), SPLIT.edge_index).relu()
            byhand.append((h[pairs[0]] * h[pairs[1]]).sum(1).sigmoid())
    torch.testing.assert_close(found, sum(byhand) / 2)
    assert auc(found, SPLIT.test[2]) > 0.65
    h = state.enter(SPLIT.train)
    loss = state.loss(1, state.through(1, F.normalize(state.through(0, h).detach())), SPLIT.train)
    model.zero_grad()
    loss.backward()
    assert all(p.grad is None for p in model.convs[0].parameters()) and all(p.grad is not None for p in model.convs[1].parameters())
    twin = layers(hidden=(16, 16))
    Backprop(loss=link_loss, optimizer=FAST).fit(twin, [LINKS], epochs=40)
    with torch.no_grad():
        assert auc(link_scores(twin(G.x, SPLIT.edge_index), pairs), SPLIT.test[2]) > 0.65


def test_links_resume_and_come_from_torch_geometrics_split():
    from torch_geometric.data import Data
    from torch_geometric.transforms import RandomLinkSplit

    torch.manual_seed(0)
    train, val, test = RandomLinkSplit(num_val=0.1, num_test=0.2, is_undirected=True)(Data(x=G.x, edge_index=G.edge_index))
    rule, states = GraphForward(task="link", optimizer=FAST), []
    for batch in (train, [LINKS]):
        whole, parts = layers(), layers(seed=1)
        states.clear()
        rule.fit(whole, batch, epochs=4, val=val, callbacks=[lambda p: states.append(p.state())])
        want = rule.predictor(whole)(test.x, test.edge_index, test.edge_label_index)
        for state in (states[1], states[5]):
            rule.fit(parts, batch, epochs=4, val=val, resume=state)
            assert torch.equal(rule.predictor(parts)(test.x, test.edge_index, test.edge_label_index), want)


def test_refusals_of_top_to_input_and_of_links():
    from torch_geometric.nn import GCNConv

    def wide(*sizes):
        return nn.ModuleList([GCNConv(a, b) for a, b in sizes])

    upper = GraphForward(mode="sf-top2input", patience=None)
    upper.fit(wide((12 + 8, 16), (16 + 3, 8)), [BATCH], epochs=1)
    for model, why in (
        (wide((12, 16), (16 + 3, 8)), r"^0: takes 12 inputs; .* 12 from below \+ 8 from above"),
        (wide((20, 16), (16, 8)), r"^1: takes 16 inputs; .* 16 from below \+ 3"),
        (nn.ModuleList([nn.Bilinear(3, 4, 5)]), r"^0: has no in_channels"),
    ):
        with pytest.raises(UnsupportedModel, match=why):
            upper.fit(model, [BATCH], epochs=1)
    with pytest.raises(BadInput, match="rounds"):
        GraphForward(mode="sf-top2input", rounds=0).fit(layers("sf-top2input"), [BATCH], epochs=1)
    with pytest.raises(BadInput, match="task must be"):
        GraphForward(task="edge").fit(layers(), [LINKS], epochs=1)
    with pytest.raises(BadInput, match="for task 'link'"):
        GraphForward(task="link", mode="ff-label").fit(layers(), [LINKS], epochs=1)
    rule, x = GraphForward(task="link"), LINKS[0]
    complete = torch.cartesian_prod(torch.arange(120), torch.arange(120)).T
    untrue = torch.cat([SPLIT.train, SPLIT.train[:1] + 2])
    for pairs, why in ((SPLIT.train.float(), "int64"), (SPLIT.train + 200, "names node"), (SPLIT.train[:, :0], "pairs"),
                       (BATCH[1], "pairs"), (untrue, "third row"), (complete, "no pair")):  # fmt: skip
        with pytest.raises(BadInput, match=why):
            rule.fit(layers(), [(x, pairs)], epochs=1)
    with pytest.raises(BadInput, match=r"\(3, pairs\)"):
        rule.fit(layers(), [LINKS], epochs=1, val=[LINKS])
    with pytest.raises(BadInput, match="edge_label_index"):
        rule.fit(layers(), SimpleNamespace(x=G.x, edge_index=G.edge_index), epochs=1)
    with pytest.raises(BadInput, match="cannot be split"):
        split_links(G.edge_index[:, :3], 120)
    with pytest.raises(BadInput, match="too dense"):
        split_links(complete, 120)


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
