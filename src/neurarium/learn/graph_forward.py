"""Forward learning of graph networks: each layer learns alone, against one virtual node a class that only labelled nodes know.

The *single-forward* rule adds one node for each class, with random features and edges to the training nodes of that class and no others. A
layer turns it into a prototype of its class, made of the same messages as everything else, so the layer's loss is the cross-entropy of
inner products with the prototypes: no negative samples, no second pass, no gradient to or from another layer. *Top to loss* updates all
layers on each step and lets a layer's loss see what the layers above it put out a step ago; *top to input* hands a layer what its two
neighbours put out a step ago, as values, and the topmost the known labels. The two adaptations of Forward-Forward, which the paper
compares, raise the goodness of a graph with true labels over that of one with wrong labels. Links instead of classes of nodes:
:mod:`~neurarium.learn.graph_links`.

*Equations.* ``h`` divided by its norm row by row, ``z = relu(conv(h, edges))``. Single forward: scores ``z_nodes z_virtual^T / t``,
cross-entropy over the training nodes, one layer after another; prediction ``argmax sum_l softmax(scores_l)``. Top to loss: ``z_l`` is
replaced by the mean of ``z_l`` and the states of the layers above it. Top to input: ``z_l = relu(conv([h_{l-1}; h_{l+1}], edges))`` of
states of the step before, ``h_0`` the features and ``h_{L+1}`` one-hot labels (a virtual node has its own, a node without one the
uniform distribution); a prediction starts from a pass with zeros above and repeats the step a fixed number of times. Forward-Forward:
goodness ``|z|^2`` of the training nodes, ``softplus(theta - g)`` for true and ``softplus(g - theta)`` for wrong labels, written behind the
features (``"ff-label"``; the other nodes carry the uniform distribution) or as edges to the class nodes (``"ff-virtual"``); prediction: the
label of most goodness.

*Source.* Park et al., "Forward Learning of Graph Neural Networks" (arXiv 2403.11004), sections 3 and 4.

*Departures.* Any layer called ``(x, edge_index)``. Forward-Forward draws one wrong label a node anew at each step and updates all layers on
it. At a prediction it attaches the labels it tries and those of training nodes, never those of validation nodes. Top to input moves all
layers at once, never even and odd ones in turn, and predicts by the last of its rounds.

*Cost.* Single forward: a step is one pass of one layer over nodes + classes; lower layers are computed once. Top to input: a step is a pass
of every (wider) layer, a prediction one more than there are rounds. Forward-Forward: two passes a
step, and as many as there are classes for a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from neurarium.errors import BadInput, MissingExtra, UnsupportedModel
from neurarium.learn.fit import EarlyStopping, History, Learner, copied, device_of, forked_rng, loop, to
from neurarium.learn.local import eval_mode

__all__ = ["GraphForward", "GraphLayers", "augment", "graph_batch"]

ADAM: Callable[..., Optimizer] = partial(Adam, lr=1e-3)
UNKNOWN = -100  # the label of a node that is not to be looked at, as in torch's cross-entropy
_RULES: WeakKeyDictionary[nn.Module, _Rule] = WeakKeyDictionary()  # what each model was last trained with
Graph = tuple[Tensor, Tensor, Tensor]
Batch = tuple[tuple[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class GraphForward(Learner):
    """Train the layers of a graph network, without a gradient between them, for the classes of nodes or for links.

    ``fit`` takes a graph in place of a loader: a ``torch_geometric.data.Data`` or anything with ``x``, ``edge_index``, ``y``,
    ``train_mask`` (and ``val_mask``), or a list of one batch ``((x, edge_index), y)`` where ``y`` is -100 at nodes without a label, as
    :func:`graph_batch` makes it (the same list trains the model by :class:`~neurarium.learn.fit.Backprop`). The model is an
    ``nn.ModuleList`` of layers or has one as ``.convs``. Predict with ``learner.predictor(model)(x, edge_index)``, for the same nodes.

    Args:
        mode: ``"sf"``, ``"sf-top2loss"``, ``"sf-top2input"``, ``"ff-label"`` (the first layer takes features + classes) or
            ``"ff-virtual"``. For ``"sf-top2input"`` each layer takes the outputs of the layer below + those of the layer above, the first
            the features + the outputs of the second, the last those of the one below + the classes: ``GraphLayers(..., top=classes)``.
        task: ``"node"``, or ``"link"`` (mode ``"sf"``), whose batches and predictor :mod:`~neurarium.learn.graph_links` describes.
        optimizer: of one layer.
        patience: epochs without progress of the validation accuracy after which a layer (``"sf"``), or the whole, is done; needs ``val``
            or a ``val_mask``. The best weights are kept.
        temperature: of single-forward scores.
        theta: goodness at which Forward-Forward says "true" with probability one half.
        clip: largest norm of the gradient of a layer.
        rounds: steps of states that a prediction of ``"sf-top2input"`` takes.

    In mode ``"sf"`` ``epochs`` is for each layer, ``history.train[i]["block"]`` says which it was, and a resumed run needs the same
    ``epochs``.
    """

    mode: str = "sf"
    task: str = "node"
    optimizer: Callable[..., Optimizer] = ADAM
    patience: int | None = 100
    temperature: float = 1.0
    theta: float = 2.0
    clip: float | None = None
    rounds: int = 8

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        kind = self.rule()
        if device is not None:
            model.to(device)
        if val is None and self.task == "node" and getattr(loader, "val_mask", None) is not None:
            val = [graph_batch(loader, loader.val_mask)]
        graph = _graph(loader, device_of(model), kind)
        watched = None if val is None else _graph(val, device_of(model), kind, seen=True)[2]
        with forked_rng(device_of(model)):
            torch.manual_seed(seed)
            rule = kind(self, _layers(model), *graph)
        _RULES[model] = rule
        callbacks = [*callbacks]
        if self.patience is not None and watched is not None:
            callbacks.append(EarlyStopping(self.patience, kind.metric, -1))
        run = self._greedy if self.mode == "sf" else self._parallel
        return run(model, rule, graph[2], watched, epochs=epochs, seed=seed, callbacks=callbacks, resume=resume)

    def rule(self) -> type[_Rule]:
        """What the mode does, as a class."""
        from neurarium.learn.graph_links import LinkForward  # a rule like those below, so it imports this module

        if self.task not in ("node", "link"):
            raise BadInput(f"task must be 'node' or 'link', not {self.task!r}")
        kinds: dict[str, type[_Rule]] = {
            "sf": SingleForward, "sf-top2loss": _TopToLoss, "sf-top2input": _TopToInput, "ff-label": _ForwardForwardLabel,
            "ff-virtual": _ForwardForwardVirtual,
        } if self.task == "node" else {"sf": LinkForward}  # fmt: skip
        if self.mode not in kinds:
            raise BadInput(f"mode must be one of {sorted(kinds)} for task {self.task!r}, not {self.mode!r}")
        if self.rounds < 1:
            raise BadInput(f"rounds must be >= 1, not {self.rounds}")
        return kinds[self.mode]

    def predictor(self, model: nn.Module) -> nn.Module:
        """A module of ``(x, edge_index)`` for the training graph's nodes: scores of the classes; of links, ``(x, edge_index, pairs)``."""
        if model not in _RULES:
            raise BadInput("this model was not trained by GraphForward in this process; fit it, or resume with the same epochs")
        return _RULES[model]

    def _step(self, layer: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(layer.parameters(), self.clip)
        if torch.isfinite(loss.detach()):
            optimizer.step()

    def _parallel(self, model, rule, y, watched, *, epochs, seed, callbacks, resume) -> History:
        optimizers = [self.optimizer(list(layer.parameters())) for layer in rule.layers]

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, None]:
            del x
            h, losses = rule.enter(y), []
            for i, layer in enumerate(rule.layers):
                z = rule.through(i, h)
                losses.append(rule.loss(i, z, y))
                self._step(layer, optimizers[i], losses[-1])
                h = F.normalize(z.detach())
            return next((loss for loss in losses if not torch.isfinite(loss)), losses[-1]), None

        def evaluator(labels: Tensor) -> dict[str, float]:
            return _accuracy(rule(rule.x, rule.edges), labels)

        parts = {"rule": rule} | {f"optimizer {i}": o for i, o in enumerate(optimizers)}
        return loop(
            model, [(rule.x, y)], epochs=epochs, step=step, parts=parts, val=watched, evaluator=evaluator,
            forward=lambda x: rule(x, rule.edges), seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip

    def _greedy(self, model, rule, y, watched, *, epochs, seed, callbacks, resume) -> History:
        if resume:
            if resume["epochs"] != epochs:
                raise BadInput(f"a run of epochs={resume['epochs']} for each layer cannot go on with epochs={epochs}")
            model.load_state_dict(resume["inner"]["parts"]["model"])
            rule.load_state_dict(resume["inner"]["parts"]["rule"])
        before = copied(resume["before"]) if resume else {"train": (), "val": (), "losses": ()}
        current, h, state = resume["block"] if resume else 0, rule.enter(y), dict(resume or {})
        for i, layer in enumerate(rule.layers):
            if i >= current:
                optimizer = self.optimizer(list(layer.parameters()))

                def step(h: Tensor, y: Tensor) -> tuple[Tensor, None]:
                    loss = rule.loss(i, rule.through(i, h), y)  # noqa: B023 (used in this round only)
                    self._step(layer, optimizer, loss)  # noqa: B023
                    return loss, None

                def evaluator(labels: Tensor) -> dict[str, float]:
                    with torch.no_grad(), eval_mode(layer):  # noqa: B023
                        return rule.measure(rule.through(i, h), labels)  # noqa: B023

                def whole(inner: Mapping[str, Any]) -> dict[str, Any]:
                    return {"block": i, "epochs": epochs, "before": copied(before), "inner": inner}  # noqa: B023

                history = loop(
                    model, [(h, y)], epochs=epochs, step=step, parts={"rule": rule, "optimizer": optimizer}, val=watched,
                    evaluator=evaluator, forward=partial(rule.through, i), seed=seed, callbacks=[_with_state(c, whole) for c in callbacks],
                    resume=resume["inner"] if resume and i == current else None,
                )  # fmt: skip
                state = whole(dict(history.state))
                before["train"] += tuple({**e, "block": i} for e in history.train)
                before["val"] += tuple({**e, "block": i} for e in history.val)
                before["losses"] += tuple(history.extra["loss"])
            with torch.no_grad(), eval_mode(layer):
                h = F.normalize(rule.through(i, h))
        return History(before["train"], before["val"], len(before["losses"]), {"loss": before["losses"]}, state)


def _with_state(callback, whole):
    if isinstance(callback, EarlyStopping):
        return callback

    return lambda progress: callback(replace(progress, state=lambda: whole(progress.state())))


class GraphLayers(nn.Module):
    """A graph network of plain layers with relu between them, on torch-geometric (extra ``graphs``).

    Args:
        kind: ``"gcn"``, ``"sage"``, ``"gat"`` (four heads), or ``"linear"``, which does not look at edges.
        widths: features, hidden widths, outputs.
        top: classes, for mode ``"sf-top2input"``: each layer also takes the outputs of the one above, the last one the labels. Called, it
            puts zeros there.
    """

    def __init__(self, kind: str, *widths: int, top: int | None = None) -> None:
        super().__init__()
        if kind == "linear":
            make: Callable[..., nn.Module] = _NoEdges
        else:
            try:
                from torch_geometric.nn import GATConv, GCNConv, SAGEConv
            except ImportError as error:
                raise MissingExtra("torch-geometric", "graphs") from error
            makers = {"gcn": GCNConv, "sage": SAGEConv, "gat": partial(GATConv, heads=4, concat=False)}
            if kind not in makers:
                raise BadInput(f"kind must be one of {sorted([*makers, 'linear'])}, not {kind!r}")
            make = makers[kind]
        self.above = [0] * (len(widths) - 1) if top is None else [*widths[2:], top]
        self.convs = nn.ModuleList(make(a + more, b) for (a, b), more in zip(pairwise(widths), self.above, strict=True))

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor | None = None) -> Tensor:
        if isinstance(x, tuple):
            x, edge_index = x
        for conv, above in zip(self.convs, self.above, strict=True):
            h = x if conv is self.convs[0] else x.relu()
            x = conv(F.pad(h, (0, above)) if above else h, edge_index)
        return x


class _NoEdges(nn.Linear):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        del edge_index
        return super().forward(x)


def graph_batch(graph: Any, mask: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """``((x, edge_index), y)`` with the labels of ``mask`` alone: what a learner, and :func:`~neurarium.learn.fit.evaluate`, are given."""
    return (graph.x, graph.edge_index), torch.where(mask, graph.y, UNKNOWN)


def augment(x: Tensor, edge_index: Tensor, y: Tensor, virtual: Tensor) -> tuple[Tensor, Tensor]:
    """Features and edges with one more node a class, tied in both directions to the nodes that ``y`` labels (-100: to none)."""
    known = torch.nonzero(y != UNKNOWN).flatten()
    ties = torch.stack([known, len(x) + y[known]])
    return torch.cat([x, virtual]), torch.cat([edge_index, ties, ties.flip(0)], 1)


class _Rule(nn.Module):
    """What one mode does; called, it predicts. The layers are the model's and only referred to."""

    metric = "accuracy"

    def __init__(self, settings: GraphForward, layers: Sequence[tuple[str, nn.Module]], x: Tensor, edges: Tensor, y: Tensor) -> None:
        super().__init__()
        self.settings, self.layers = settings, tuple(layer for _, layer in layers)
        self.x, self.edges, self.nodes = x, edges, len(x)
        self.begin(y)
        self.ties = edges  # what messages go along
        with torch.no_grad():
            h = self.enter(y)
            for i, (name, layer) in enumerate(layers):
                with eval_mode(layer):
                    try:
                        z = self.through(i, h)
                    except Exception as error:
                        raise UnsupportedModel(
                            f"cannot be called with {tuple(h.shape)} features and edge_index in mode {settings.mode!r}: {error}",
                            module=name,
                        ) from error
                self.check(name, layer, z)
                h = F.normalize(z)

    def begin(self, y: Tensor) -> None:
        self.classes = int(y.max()) + 1
        self.register_buffer("y", y)
        self.register_buffer("virtual", torch.randn(self.classes, self.x.shape[1]).to(self.x))

    @staticmethod
    def read(graph: Any) -> Batch:
        """The batch of a graph that is an object."""
        if getattr(graph, "train_mask", None) is None:
            raise BadInput("the graph has no train_mask: give one, or a batch ((x, edge_index), y) with -100 at nodes without a label")
        return graph_batch(graph, graph.train_mask)

    @staticmethod
    def check_target(y: Tensor, x: Tensor, seen: bool) -> None:
        """Refuse a ``y`` that the rule cannot learn, or be watched, by."""
        del seen
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise BadInput(f"y is one integer class a node, -100 where there is none; it is {y.dtype} {tuple(y.shape)} for {len(x)} nodes")
        known = y[y != UNKNOWN]
        if not len(known) or int(known.min()) < 0:
            raise BadInput("y labels no node" if not len(known) else f"y holds class {int(known.min())}; classes count from 0")

    def check(self, name: str, layer: nn.Module, z: Tensor) -> None:
        """Refuse a layer that the rule cannot use."""
        if getattr(layer, "cached", False):
            raise UnsupportedModel("keeps its first graph (cached=True), but the rule's edges are not those of the model", module=name)
        if not isinstance(z, Tensor) or z.ndim != 2:
            raise UnsupportedModel("does not give one vector a node", module=name)

    def through(self, i: int, h: Tensor) -> Tensor:
        """The output of one layer for rows of length one."""
        return self.layers[i](h, self.ties).relu()


class SingleForward(_Rule):
    """Nodes against the virtual nodes of the classes."""

    def enter(self, y: Tensor) -> Tensor:
        h, self.ties = self.tied(self.x, self.edges, y)
        return F.normalize(h)

    def tied(self, x: Tensor, edges: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return augment(x, edges, y, self.virtual)

    def scores(self, z: Tensor) -> Tensor:
        """Of the classes, from the output of one layer."""
        return z[: self.nodes] @ z[self.nodes :].T / self.settings.temperature

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        del i
        return F.cross_entropy(self.scores(z), y)

    def measure(self, z: Tensor, y: Tensor) -> dict[str, float]:
        """Of one layer alone."""
        return _accuracy(self.scores(z), y)

    @torch.no_grad()
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return torch.stack(self.by_layer(x, edge_index)).sum(0)

    @torch.no_grad()
    def by_layer(self, x: Tensor, edge_index: Tensor) -> list[Tensor]:
        """Probabilities of the classes, one matrix a layer; their sum is the prediction."""
        _same_nodes(x, self.nodes)
        h, ties = self.tied(x, edge_index, self.y)
        found = []
        for layer in self.layers:
            with eval_mode(layer):
                h = layer(F.normalize(h), ties).relu()
            found.append(self.scores(h).softmax(1))
        return found


class _TopToLoss(SingleForward):
    def __init__(self, *args: Any) -> None:
        self.seen: list[Tensor] = []
        super().__init__(*args)
        for i, z in enumerate(self.seen):  # of the step before, saved with a run
            self.register_buffer(f"state{i}", z)

    def check(self, name: str, layer: nn.Module, z: Tensor) -> None:
        super().check(name, layer, z)
        self.seen.append(z)
        if z.shape != self.seen[0].shape:
            raise UnsupportedModel(f"has {z.shape[1]} outputs, the first layer {self.seen[0].shape[1]}: states are averaged", module=name)

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        above = [self.get_buffer(f"state{k}") for k in range(i + 1, len(self.layers))]
        loss = super().loss(i, torch.stack([z, *above]).mean(0), y)
        self.register_buffer(f"state{i}", z.detach())  # read by layers below, whose turn this step is over
        return loss


class _TopToInput(SingleForward):
    """States of the step before: row by row of length one, those of the layers between features and labels."""

    def __init__(self, settings: GraphForward, layers: Sequence[tuple[str, nn.Module]], *graph: Tensor) -> None:
        self.takes = [_width(layer, name) for name, layer in layers]
        super().__init__(settings, layers, *graph)
        for i, z in enumerate(self.fresh):  # saved with a run
            self.register_buffer(f"state{i}", z)
        widths = [self.x.shape[1], *(z.shape[1] for z in self.fresh), self.classes]
        for (name, _), takes, below, above in zip(layers, self.takes, widths, widths[2:]):
            if takes != below + above:
                raise UnsupportedModel(
                    f"takes {takes} inputs; mode 'sf-top2input' gives it {below} from below + {above} from above", module=name
                )

    def begin(self, y: Tensor) -> None:
        super().begin(y)
        self.fresh: list[Tensor] = []
        labels = torch.cat([_shares(y, self.classes, self.x), torch.eye(self.classes).to(self.x)])
        self.top = F.normalize(labels)

    def check(self, name: str, layer: nn.Module, z: Tensor) -> None:
        super().check(name, layer, z)
        self.fresh.append(F.normalize(z))

    def through(self, i: int, h: Tensor) -> Tensor:
        if "state0" not in self._buffers:  # the pass that states begin with
            return super().through(i, F.pad(h, (0, self.takes[i] - h.shape[1])))
        states = [self.get_buffer(f"state{k}") for k in range(len(self.layers))]
        return super().through(i, torch.cat([(h, *states)[i], (*states, self.top)[i + 1]], 1))

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        self.fresh[i] = F.normalize(z.detach())
        if i + 1 == len(self.layers):  # all have read those of the step before
            for k, state in enumerate(self.fresh):
                self.register_buffer(f"state{k}", state)
        return super().loss(i, z, y)

    @torch.no_grad()
    def by_layer(self, x: Tensor, edge_index: Tensor) -> list[Tensor]:
        _same_nodes(x, self.nodes)
        h, ties = self.tied(x, edge_index, self.y)
        states = [F.normalize(h)]
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(eval_mode(layer))
            for layer, takes in zip(self.layers, self.takes):
                states.append(F.normalize(layer(F.pad(states[-1], (0, takes - states[-1].shape[1])), ties).relu()))
            for _ in range(self.settings.rounds):
                pairs = zip(self.layers, states, [*states[2:], self.top])
                found = [layer(torch.cat([below, above], 1), ties).relu() for layer, below, above in pairs]
                states = [states[0], *map(F.normalize, found)]
        return [self.scores(z).softmax(1) for z in found]


class _ForwardForward(_Rule):
    """Two copies of the graph side by side, the second with wrong labels."""

    def enter(self, y: Tensor) -> Tensor:
        wrong = torch.where(y == UNKNOWN, y, (y + torch.randint_like(y, 1, self.classes)) % self.classes)
        (h, ties), (other, more) = self.labelled(self.x, self.edges, y), self.labelled(self.x, self.edges, wrong)
        self.ties = torch.cat([ties, more + len(h)], 1)
        return F.normalize(torch.cat([h, other]))

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        del i
        known, theta = y != UNKNOWN, self.settings.theta
        right, wrong = (part[: self.nodes][known].square().sum(1) for part in z.chunk(2))
        return (F.softplus(theta - right) + F.softplus(wrong - theta)).mean()

    @torch.no_grad()
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        _same_nodes(x, self.nodes)
        found = []
        for c in range(self.classes):
            h, ties = self.labelled(x, edge_index, torch.where(self.y == UNKNOWN, c, self.y))
            total = torch.zeros(len(x), device=x.device)
            for layer in self.layers:
                with eval_mode(layer):
                    h = layer(F.normalize(h), ties).relu()
                total = total + h[: self.nodes].square().sum(1)
            found.append(total)
        return torch.stack(found, 1)


class _ForwardForwardLabel(_ForwardForward):
    def labelled(self, x: Tensor, edges: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, _shares(y, self.classes, x)], 1), edges


class _ForwardForwardVirtual(_ForwardForward):
    def labelled(self, x: Tensor, edges: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return augment(x, edges, y, self.virtual)


def _shares(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """One-hot labels, and the uniform distribution where there is none."""
    shares = torch.full((len(y), classes), 1 / classes, device=like.device, dtype=like.dtype)
    known = y != UNKNOWN
    shares[known] = F.one_hot(y[known], classes).to(like)
    return shares


def _width(layer: nn.Module, name: str) -> int:
    takes = getattr(layer, "in_channels", getattr(layer, "in_features", None))
    takes = takes[0] if isinstance(takes, tuple) else takes
    if not isinstance(takes, int) or takes < 1:
        raise UnsupportedModel("has no in_channels or in_features that say how many inputs it takes", module=name)
    return takes


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    convs, prefix = (model, "") if isinstance(model, nn.ModuleList) else (getattr(model, "convs", None), "convs.")
    if not isinstance(convs, nn.ModuleList) or not len(convs):
        raise UnsupportedModel(
            "its layers, each called (x, edge_index), must be an nn.ModuleList, or be one as .convs", module=type(model).__name__
        )
    for i, conv in enumerate(convs):
        if not any(p.requires_grad for p in conv.parameters()):
            raise UnsupportedModel("has no parameter to train", module=f"{prefix}{i}")
    return [(f"{prefix}{i}", conv) for i, conv in enumerate(convs)]


def _graph(loader: Any, device: torch.device, kind: type[_Rule], *, seen: bool = False) -> Graph:
    batches: list[Any] = [kind.read(loader)] if hasattr(loader, "edge_index") else list(loader)
    if len(batches) != 1:
        raise BadInput(f"the loader yielded {len(batches)} graphs; forward learning takes one whole graph")
    batch = batches[0]
    x, edges, y = (*batch[0], batch[1]) if isinstance(batch[0], (tuple, list)) else batch
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
        raise BadInput(f"edge_index is int64 (2, edges), not {edges.dtype} {tuple(edges.shape)}")
    if edges.numel() and not (int(edges.min()) >= 0 and int(edges.max()) < len(x)):
        raise BadInput(f"edge_index names node {int(edges.max())} of {len(x)}")
    if not torch.isfinite(x).all():
        raise BadInput("x holds a value that is not finite")
    kind.check_target(y, x, seen)
    return to(x, device), to(edges, device), to(y, device)


def _same_nodes(x: Tensor, nodes: int) -> None:
    if len(x) != nodes:
        raise BadInput(f"x has {len(x)} nodes, the training graph {nodes}: the rule predicts nodes of the graph that it was trained on")


def _accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    known = labels != UNKNOWN
    return {"accuracy": float((scores[known].argmax(1) == labels[known]).float().mean())}
