"""Tiny examples: learning on graphs."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import Adam

from neurarium.learn.graph_forward import UNKNOWN, GraphForward, GraphLayers
from neurarium.testing import Example

__all__ = ["forwardgnn"]


def forwardgnn() -> Example:
    """Two layers on a ring of 18 nodes; every third node has no label. A model without a list of layers is refused."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GraphLayers("gcn", 6, 8, 8)

    def loader(seed: int):
        x = torch.randn(18, 6, generator=torch.Generator().manual_seed(seed))
        nodes = torch.arange(18)
        ring = torch.stack([nodes, nodes.roll(1)])
        return [(x, torch.cat([ring, ring.flip(0)], 1), torch.where(nodes % 3 < 2, x[:, :3].argmax(1), UNKNOWN))]

    return Example(
        "learner",
        make=lambda: GraphForward(mode="sf-top2loss", optimizer=partial(Adam, lr=1e-2)),
        model=model,
        loader=loader,
        unsupported=lambda: nn.Linear(6, 3),
        skip={"batch_of_one": "a graph is one batch: its edges cannot be cut with its nodes"},
    )
