"""Single-forward learning of graph networks against backpropagation and two kinds of Forward-Forward, on Cora.

The 600 most frequent words. Random splits, 64 % of the nodes for training, 16 for validation, 20 for testing. Links: 5 % of the edges for
validation, 10 % for testing, which carry no message. Adam's learning rate was chosen for each kind of arm from three (0.003, 0.01, 0.03)
on splits that are not used here; all arms make the same number of updates of each layer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim import Adam

from neurarium import data, meter
from neurarium.errors import MissingData
from neurarium.learn.fit import Backprop
from neurarium.learn.graph_forward import UNKNOWN, GraphForward, GraphLayers, SingleForward, augment, graph_batch
from neurarium.learn.graph_links import auc, link_loss, link_scores, split_links

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

DEPTH, WORDS = 4, 600
LABELS = {
    "bp": "backpropagation", "sf": "single forward", "sf_isolated": "virtual nodes without edges", "sf_top2loss": "top to loss",
    "sf_mlp": "single forward, no graph", "ff_label": "Forward-Forward, label in features", "ff_virtual": "Forward-Forward, virtual nodes",
    "sf_top2input": "top to input",
}  # fmt: skip
LINKS = {"link_bp": "backpropagation", "link_sf": "single forward"}


@dataclass(frozen=True, kw_only=True)
class Isolated(GraphForward):
    """Virtual nodes that are tied to nothing."""

    def rule(self):
        class Loose(SingleForward):
            def tied(self, x, edges, y):
                return augment(x, edges, torch.full_like(y, UNKNOWN), self.virtual)

        return Loose


def adam(lr: float, **options):
    return partial(Adam, lr=lr, **options)


BP = Backprop(optimizer=adam(1e-2, weight_decay=5e-4))
RULES = {
    "sf": GraphForward(optimizer=adam(1e-2)),
    "sf_isolated": Isolated(optimizer=adam(1e-2)),
    "sf_top2loss": GraphForward(mode="sf-top2loss", optimizer=adam(3e-3), clip=1.0),
    "sf_mlp": GraphForward(optimizer=adam(1e-2)),
    "ff_label": GraphForward(mode="ff-label", optimizer=adam(3e-2)),
    "ff_virtual": GraphForward(mode="ff-virtual", optimizer=adam(3e-2)),
    "sf_top2input": GraphForward(mode="sf-top2input", optimizer=adam(3e-3)),
}
DEPTHS = {"sf": DEPTH, "sf_isolated": 2, "sf_top2loss": 2, "sf_mlp": 2, "ff_label": 2, "ff_virtual": 2, "sf_top2input": 2}
LINK_BP = Backprop(loss=link_loss, optimizer=adam(1e-2, weight_decay=5e-4))
LINK_SF = GraphForward(task="link", optimizer=adam(1e-2))


def run(trial: Trial) -> None:
    graph = split(trial)
    train, val = graph_batch(graph, graph.train_mask), [graph_batch(graph, graph.val_mask)]
    epochs, hidden = trial.scale(smoke=(2, 8), laptop=(100, 64))
    features = graph.x.shape[1]

    def net(kind: str, *widths: int, top: int | None = None):
        return GraphLayers(kind, *widths, top=top).to(trial.device)

    def accuracy(scores, mask) -> float:
        return float((scores[mask].argmax(1) == graph.y[mask]).float().mean())

    for arm in trial.arms("bp", *RULES):
        kind = "linear" if arm.name == "sf_mlp" else "gcn"
        tests, vals = [], []
        if arm.name == "bp":
            for depth in range(1, DEPTH + 1):
                model = net(kind, features, *[hidden] * (depth - 1), graph.classes)
                BP.fit(model, [train], epochs=epochs, seed=trial.seed)
                with torch.no_grad():
                    scores = model(graph.x, graph.edge_index)
                tests.append(accuracy(scores, graph.test_mask))
                vals.append(accuracy(scores, graph.val_mask))
            rule, probe = BP, net(kind, features, hidden, hidden, graph.classes)
        else:
            rule, first = RULES[arm.name], features + (graph.classes if arm.name == "ff_label" else 0)
            top = graph.classes if arm.name == "sf_top2input" else None
            model = net(kind, first, *[hidden] * DEPTHS[arm.name], top=top)
            history = rule.fit(model, [train], epochs=epochs, val=val if arm.name == "sf" else None, seed=trial.seed)
            if arm.name == "sf":
                for block in range(DEPTH):
                    arm.curve(f"layer{block + 1}", y=[e["accuracy"] for e in history.val if e["block"] == block])
            predictor = rule.predictor(model)
            if isinstance(predictor, SingleForward):
                found = list(torch.stack(predictor.by_layer(graph.x, graph.edge_index)).cumsum(0))
            else:
                found = [predictor(graph.x, graph.edge_index)]
            tests, vals = ([accuracy(s, mask) for s in found] for mask in (graph.test_mask, graph.val_mask))
            probe = net(kind, first, hidden, hidden, hidden)
        arm.log(accuracy=tests[int(np.argmax(vals))], by_depth=tests)
        if arm.name in ("bp", "sf", "ff_label", "ff_virtual"):
            arm.log(passes=passes(rule, probe, train), saved_bytes=saved_bytes(rule, probe, train))

    links = split_links(graph.edge_index, len(graph.y), generator=trial.generator())
    known = (graph.x, links.edge_index)
    for arm in trial.arms(*LINKS):
        model = net("gcn", features, hidden, hidden)
        rule = {"link_bp": LINK_BP, "link_sf": LINK_SF}[arm.name]
        rule.fit(model, [(known, links.train)], epochs=epochs, seed=trial.seed)
        with torch.no_grad():
            for name, pairs in (("val_auc", links.val), ("auc", links.test)):
                scores = link_scores(model(*known), pairs) if arm.name == "link_bp" else LINK_SF.predictor(model)(*known, pairs)
                arm.log(**{name: auc(scores, pairs[2])})


def split(trial: Trial) -> SimpleNamespace:
    """Cora with rows of length one and a random split; without a copy of it here, three random communities."""
    try:
        task = data.graph("cora")
        x, edges, y, classes = task.x, task.edge_index, task.y, task.classes
        x = x[:, (x > 0).sum(0).argsort(descending=True, stable=True)[:WORDS]]
    except MissingData:
        trial.stand_in("a random graph of three communities instead of Cora, which is not here")
        y, classes = torch.arange(600) % 3, 3
        link = (torch.rand(600, 600) < torch.where(y[:, None] == y, 0.02, 0.004)).triu(1)
        edges, x = torch.nonzero(link | link.T).T.contiguous(), (torch.rand(600, 60) < 0.1 + 0.1 * F.one_hot(y, 60)).float()
    order = torch.randperm(len(y), generator=trial.generator())
    place = torch.empty(len(y)).scatter_(0, order, torch.linspace(0, 1, len(y)))
    device = trial.device
    masks = {"train_mask": place < 0.64, "val_mask": (place >= 0.64) & (place < 0.8), "test_mask": place >= 0.8}
    tensors = {"x": F.normalize(x), "edge_index": edges, "y": y, **masks}
    return SimpleNamespace(**{k: v.to(device) for k, v in tensors.items()}, classes=classes)


def passes(rule, model, train) -> int:
    """How many copies of the graph the first layer sees for one update of it."""
    rows, trained = [], deepcopy(model)
    epochs = 3
    trained.convs[0].register_forward_hook(lambda m, args, out: rows.append(len(out)) if torch.is_grad_enabled() else None)
    rule.fit(trained, [train], epochs=epochs)
    return round(sum(rows) / epochs / len(train[1]))


def saved_bytes(rule, model, train) -> int:
    """Peak bytes that a step of three layers keeps for the backward pass; an activation counts, whether on a graph or not, data do not."""
    trained = deepcopy(model)
    if isinstance(rule, Backprop):
        with meter.SavedBytes() as kept:
            rule.fit(trained, [train], epochs=1)
        return kept.peak
    rule.fit(trained, [train], epochs=1)
    made, y, most = rule.predictor(trained), train[1], 0
    h = made.enter(y)
    for i in range(len(made.layers)):
        with meter.SavedBytes() as kept:
            z = made.through(i, h if i == 0 else h.clone())
            loss = made.loss(i, z, y)
        most = max(most, kept.peak)
        h = F.normalize(z.detach())
        del z, loss
    return most


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against depth, every arm, what a step keeps, and links."""
    colours = dict(zip(LABELS, ("#000000", "#D55E00", "#E69F00", "#CC79A7", "#999999", "#0072B2", "#56B4E9", "#009E73")))
    fig.set_size_inches(15, 4.2)
    fig.set_layout_engine("constrained")
    depth, ends, memory, links = fig.subplots(1, 4, width_ratios=(1, 1.2, 0.8, 0.45))
    for arm in ("bp", "sf", "sf_isolated"):
        if arm in record.arms:
            y = 100 * record.values(arm, "by_depth")
            depth.errorbar(range(1, y.shape[1] + 1), y.mean(0), y.std(0), fmt="o-", capsize=3, color=colours[arm], label=LABELS[arm])
    depth.set(xlabel="layers", ylabel="test accuracy (%)", title="depth", xticks=range(1, DEPTH + 1))
    depth.legend(fontsize=8, loc="lower right")
    depth.grid(alpha=0.3)
    arms = [a for a in LABELS if a in record.arms]
    for i, arm in enumerate(arms):
        values = 100 * record.values(arm, "accuracy")
        ends.errorbar(values.mean(), i, xerr=values.std(), fmt="o", ms=6, capsize=3, color=colours[arm], mec="k")
        ends.plot(values, np.full(len(values), i), "k|", ms=9, alpha=0.5)
    ends.set_yticks(range(len(arms)), [LABELS[a] for a in arms], fontsize=8)
    ends.invert_yaxis()
    ends.set(xlabel="test accuracy (%)", title="every arm, a mark for each split")
    ends.grid(alpha=0.3, axis="x")
    shown = [a for a in ("bp", "sf", "ff_label", "ff_virtual") if a in record.arms]
    values = [record.mean(a, "saved_bytes") / 2**20 for a in shown]
    bars = memory.bar(range(len(shown)), values, color=[colours[a] for a in shown])
    memory.bar_label(bars, [f"{record.mean(a, 'passes'):.0f} pass" + "es" * (record.mean(a, "passes") > 1) for a in shown], fontsize=8)
    short = {"bp": "back-\npropagation", "sf": "single\nforward", "ff_label": "FF, label\nin features", "ff_virtual": "FF, virtual\nnodes"}
    memory.set_xticks(range(len(shown)), [short[a] for a in shown], fontsize=7)
    memory.set(ylabel="kept for the backward pass (MiB)", title="a step of three layers")
    shown = [a for a in LINKS if a in record.arms]
    for i, arm in enumerate(shown):
        values = record.values(arm, "auc")
        links.errorbar(i, values.mean(), values.std(), fmt="o", ms=6, capsize=3, color=colours[arm.removeprefix("link_")], mec="k")
        links.plot(np.full(len(values), i), values, "k_", ms=9, alpha=0.5)
    links.set_xticks(range(len(shown)), [{"link_bp": "back-\npropagation", "link_sf": "single\nforward"}[a] for a in shown], fontsize=7)
    links.set(ylabel="AUC", title="held-out links", xlim=(-0.6, len(shown) - 0.4))
    links.grid(alpha=0.3, axis="y")
