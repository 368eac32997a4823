"""Links of a graph by forward learning: each layer learns alone which pairs of nodes belong together.

No virtual nodes here: a layer's outputs say by themselves how likely a link is, so every layer has a loss of its own, and a prediction asks
all of them. An edge that is to be found must not carry messages, or the layer reads the answer: :func:`split_links` takes held-out edges
away in both directions.

*Equations.* ``z = relu(conv(h, edges))``, ``h`` of rows of length one; ``p(u, v) = sigmoid(sum z_u * z_v)``; a layer's loss is the binary
cross-entropy of edges against as many pairs that are none; prediction: the mean of ``p`` over the layers.

*Source.* Park et al., "Forward Learning of Graph Neural Networks" (arXiv 2403.11004), section 4: link prediction.

*Departures.* Pairs that are no edges are drawn anew at each step unless they are given. The training edges carry messages while they are
learned. Greedy single-forward order alone: no top-down signal, no Forward-Forward.

*Cost.* A pass of one layer, and a product of two rows for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.learn.graph_forward import Batch, _Rule
from neurarium.learn.local import eval_mode

__all__ = ["LinkForward", "LinkSplit", "auc", "link_loss", "link_scores", "non_edges", "split_links"]


def link_scores(z: Tensor, pairs: Tensor) -> Tensor:
    """``sum z_u * z_v`` of pairs (2, n)."""
    return (z[pairs[0]] * z[pairs[1]]).sum(1)


def link_loss(z: Tensor, y: Tensor, edges: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of links, of one layer or, as ``Backprop(loss=link_loss)``, of a whole network.

    Args:
        z: a row a node.
        y: edges (2, n), against as many pairs drawn anew that are neither in ``y`` nor in ``edges``; or pairs (3, n), whose third row is 1
            for an edge and 0 for none.
    """
    if len(y) == 2:
        none = non_edges(y if edges is None else torch.cat([y, edges], 1), len(z), y.shape[1])
        pairs, truth = torch.cat([y, none], 1), (torch.arange(y.shape[1] + none.shape[1], device=y.device) < y.shape[1])
    else:
        pairs, truth = y[:2], y[2]
    return F.binary_cross_entropy_with_logits(link_scores(z, pairs), truth.to(z))


def non_edges(edges: Tensor, nodes: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """At most ``count`` random pairs (2, n) of two different nodes that no edge joins in either direction; fewer if the graph is dense."""
    drawn = torch.randint(nodes, (2, 2 * count), generator=generator).to(edges.device)
    taken = torch.cat([edges[0] * nodes + edges[1], edges[1] * nodes + edges[0]])
    free = (drawn[0] != drawn[1]) & ~torch.isin(drawn[0] * nodes + drawn[1], taken)
    return drawn[:, free][:, :count]


@dataclass(frozen=True)
class LinkSplit:
    """``edge_index`` carries messages (both directions of the ``train`` edges); ``val`` and ``test`` (3, n) hold edges and non-edges."""

    edge_index: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


def split_links(
    edge_index: Tensor, nodes: int, *, val: float = 0.05, test: float = 0.1, generator: torch.Generator | None = None
) -> LinkSplit:
    """Hold out shares of the undirected edges, with as many pairs that are no edge of the whole graph."""
    once = torch.unique(edge_index.sort(0).values, dim=1)
    once = once[:, once[0] != once[1]]
    n, held = once.shape[1], [round(share * once.shape[1]) for share in (val, test)]
    if min(held) < 1 or sum(held) >= n:
        raise BadInput(f"{n} edges cannot be split by val={val}, test={test}")
    once = once[:, torch.randperm(n, generator=generator).to(once.device)]
    *parts, train = once.split([*held, n - sum(held)], 1)
    none = non_edges(once, nodes, sum(held), generator)
    if none.shape[1] < sum(held):
        raise BadInput(f"the graph is too dense: {none.shape[1]} pairs without an edge found, {sum(held)} needed")
    found = [
        torch.cat([torch.cat([part, other], 1), (torch.arange(2 * part.shape[1]) < part.shape[1]).long()[None].to(part.device)])
        for part, other in zip(parts, none.split(held, 1), strict=True)
    ]
    return LinkSplit(torch.cat([train, train.flip(0)], 1), train, *found)


def auc(scores: Tensor, truth: Tensor) -> float:
    """How often an edge scores above a non-edge; a tie counts one half."""
    truth = truth.bool()
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative or not torch.isfinite(scores).all():
        raise BadInput(f"the AUC needs finite scores of both kinds; there are {positive} edges and {negative} other pairs")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0).double()[place]
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


class LinkForward(_Rule):
    """What ``GraphForward(task="link")`` does; called ``(x, edge_index, pairs)``, the probability of each pair, also of another graph.

    A batch is ``((x, edge_index), y)`` with ``y`` as in :func:`link_loss`; that of ``val`` has three rows. An object (as
    torch-geometric's ``RandomLinkSplit`` makes three of) has ``x``, ``edge_index``, ``edge_label_index`` and maybe ``edge_label``.
    """

    metric = "auc"

    def begin(self, y: Tensor) -> None:
        if len(y) == 2 and not non_edges(torch.cat([y, self.edges], 1), self.nodes, max(y.shape[1], 64)).numel():
            raise BadInput("no pair of nodes without an edge was found to learn from")

    @staticmethod
    def read(graph: Any) -> Batch:
        pairs, truth = getattr(graph, "edge_label_index", None), getattr(graph, "edge_label", None)
        if pairs is None:
            raise BadInput("the graph has no edge_label_index: give one, or a batch ((x, edge_index), pairs)")
        return (graph.x, graph.edge_index), pairs if truth is None else torch.cat([pairs, truth.long()[None]])

    @staticmethod
    def check_target(y: Tensor, x: Tensor, seen: bool) -> None:
        rows = (3,) if seen else (2, 3)
        if y.ndim != 2 or len(y) not in rows or y.dtype != torch.int64 or not y.numel():
            raise BadInput(f"links are int64 ({' or '.join(map(str, rows))}, pairs), not {y.dtype} {tuple(y.shape)}")
        if int(y[:2].min()) < 0 or int(y[:2].max()) >= len(x):
            raise BadInput(f"a link names node {int(y[:2].max())} of {len(x)}")
        if len(y) == 3 and not torch.isin(y[2], torch.tensor([0, 1], device=y.device)).all():
            raise BadInput("the third row of links is 1 for an edge and 0 for none")

    def enter(self, y: Tensor) -> Tensor:
        del y
        return F.normalize(self.x)

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        del i
        return link_loss(z, y, self.edges)

    def measure(self, z: Tensor, y: Tensor) -> dict[str, float]:
        return {"auc": auc(link_scores(z, y), y[2])}

    @torch.no_grad()
    def forward(self, x: Tensor, edge_index: Tensor, pairs: Tensor) -> Tensor:
        return torch.stack(self.by_layer(x, edge_index, pairs)).mean(0)

    @torch.no_grad()
    def by_layer(self, x: Tensor, edge_index: Tensor, pairs: Tensor) -> Sequence[Tensor]:
        """Probabilities of the pairs, one row a layer; their mean is the prediction."""
        h, found = x, []
        for layer in self.layers:
            with eval_mode(layer):
                h = layer(F.normalize(h), edge_index).relu()
            found.append(link_scores(h, pairs).sigmoid())
        return found
