"""A graph over training samples, and graph networks that new samples join without changing it.

*Graph.* Edges between the pairs of largest cosine similarity, as many as give each training sample ``neighbours`` on average, none of
negative similarity; A = similarity on the edges + I, rows divided by their sums. A new sample has edges to the training samples of a
similarity above the same bound.

*Encoder.* H <- LeakyReLU_{1/4}(A H W + b) for each hidden layer, logits = H W + b; T independent draws of the weights side by side. What
training samples contribute to a new one, their H W at each layer, is computed once (``settle``), so a new row only reads it: no row
influences another, and each has a price of its own.

*Source.* The patient graphs of MOGONET (Wang et al. 2021) and SGUQ (arXiv 2410.11046); graph convolution by Kipf and Welling, 2017.

*Cost.* A row costs 2 n (d + T sum w) FLOPs for its edges to n training samples plus the dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.ensemble import drawn
from neurarium.errors import BadInput

__all__ = ["Encoder", "SampleGraph"]


class SampleGraph(nn.Module):
    """Edges between the training samples of most similar direction, and from new samples to them.

    Args:
        dim: features of a sample.
        neighbours: k, edges of a training sample on average; the smallest similarity that has an edge follows from it.
    """

    def __init__(self, dim: int, neighbours: float = 2) -> None:
        super().__init__()
        if not neighbours > 0:
            raise BadInput(f"neighbours must be positive, not {neighbours}")
        self.neighbours = neighbours
        self.register_buffer("points", torch.empty(0, dim))  # training samples, of length 1
        self.register_buffer("bound", torch.zeros(()))

    def build(self, x: Tensor) -> SampleGraph:
        """Take ``x`` (n, dim) as the training samples."""
        n = len(x)
        if n < 2:
            raise BadInput(f"a graph needs at least 2 samples, not {n}")
        points = F.normalize(x.to(self.bound), dim=1)
        edges = min(n * (n - 1), round(self.neighbours * n))
        similarity = (points @ points.T)[~torch.eye(n, dtype=torch.bool, device=x.device)]
        self.points, self.bound = points, similarity.topk(edges).values[-1]
        return self

    def adjacency(self) -> Tensor:
        """A between the training samples, ``(n, n)``, rows sum to 1."""
        similarity = self._edges(self.points).fill_diagonal_(0)
        return F.normalize(torch.maximum(similarity, similarity.T) + torch.eye(len(similarity)).to(similarity), p=1, dim=1)

    def attach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of new samples: their edges to the training samples ``(m, n)``, and what a row of A divides them by, ``(m, 1)``: the sum of
        the edges and of the 1 of the sample itself."""
        edges = self._edges(F.normalize(x, dim=1))
        return edges, edges.sum(1, keepdim=True) + 1

    def transduce(self, x: Tensor) -> Tensor:
        """A over training and new samples together, edges only between old and new ones, both ways: ``(n + m, n + m)``."""
        edges = self._edges(F.normalize(x, dim=1))
        m, n = edges.shape
        both = torch.cat([torch.cat([edges.new_zeros(n, n), edges.T], 1), torch.cat([edges, edges.new_zeros(m, m)], 1)])
        return F.normalize(both + torch.eye(n + m).to(both), p=1, dim=1)

    def _edges(self, points: Tensor) -> Tensor:
        similarity = (points @ self.points.T).relu()
        return similarity * (similarity >= self.bound)


class Encoder(nn.Module):
    """T graph networks on one view: ``(m, dim) -> (m, T, classes)``."""

    def __init__(self, dim: int, classes: int, members: int, neighbours: float, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        widths = (dim, *hidden)
        self.graph = SampleGraph(dim, neighbours)
        self.weights = nn.ParameterList(drawn(members, a, b) for a, b in zip(widths, (*hidden, classes)))
        # All members read the same features: kept in memory so that their first weights side by side are one matrix without a copy.
        self.weights[0].data = self.weights[0].data.transpose(0, 1).contiguous().transpose(0, 1)
        self.biases = nn.ParameterList(torch.zeros(members, b) for b in (*hidden, classes))
        self.dropout = dropout
        for i, width in enumerate(hidden):  # what new samples read: the training samples' H W at each layer, (n, T, width)
            self.register_buffer(f"known_{i}", torch.empty(0, members, width))

    def forward(self, x: Tensor) -> Tensor:
        edges, total = self.graph.attach(x)
        share = (1 / total)[:, :, None]
        h = self._linear(0, x)
        for i in range(len(self.weights) - 1):
            near = torch.addmm(h.flatten(1), edges, getattr(self, f"known_{i}").flatten(1)).view_as(h)
            h = self._linear(i + 1, F.leaky_relu(torch.addcmul(self.biases[i], near, share), 0.25))
        return h + self.biases[-1]

    def over(self, adjacency: Tensor, x: Tensor) -> Tensor:
        """The network over a whole graph. Dropout in training mode."""
        h = self._linear(0, x)
        for i in range(len(self.weights) - 1):
            mixed = torch.mm(adjacency, h.flatten(1)).unflatten(1, h.shape[1:])
            h = self._linear(i + 1, F.dropout(self._bend(i, mixed), self.dropout if i < len(self.weights) - 2 else 0.0, self.training))
        return h + self.biases[-1]

    def settle(self, x: Tensor) -> None:
        """Compute what new samples will read."""
        h, adjacency = self._linear(0, x), self.graph.adjacency()
        for i in range(len(self.weights) - 1):
            setattr(self, f"known_{i}", h.contiguous())  # else each call would copy it
            h = self._linear(i + 1, self._bend(i, (adjacency @ h.flatten(1)).unflatten(1, h.shape[1:])))

    def transduce(self, x: Tensor) -> Tensor:
        """New samples and training samples in one graph without edges between training samples."""
        adjacency, n = self.graph.transduce(x), len(self.graph.points)
        h = torch.cat([self.known_0, self._linear(0, x)])
        for i in range(len(self.weights) - 1):
            h = self._linear(i + 1, self._bend(i, (adjacency @ h.flatten(1)).unflatten(1, h.shape[1:])))
        return h[n:] + self.biases[-1]

    def _linear(self, i: int, h: Tensor) -> Tensor:
        """H W_i, ``(m, d)`` or ``(m, T, d) -> (m, T, e)``."""
        w = self.weights[i]
        if h.ndim == 2:  # all members read the same features
            return (h @ w.transpose(0, 1).flatten(1)).unflatten(1, (len(w), -1))
        return torch.bmm(h.transpose(0, 1), w).transpose(0, 1)

    def _bend(self, i: int, h: Tensor) -> Tensor:
        return F.leaky_relu(h + self.biases[i], 0.25)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        fit_buffers(self, state, prefix)
        fit_buffers(self.graph, state, f"{prefix}graph.")
        super()._load_from_state_dict(state, prefix, *rest)


def fit_buffers(module: nn.Module, state: Any, prefix: str) -> None:
    """Give ``module``'s own buffers the shapes that ``state`` has for them: how many samples were trained on is part of what is loaded."""
    for name, old in list(module.named_buffers(recurse=False)):
        new = state.get(prefix + name)
        if new is not None and new.shape != old.shape:
            setattr(module, name, old.new_empty(new.shape))
