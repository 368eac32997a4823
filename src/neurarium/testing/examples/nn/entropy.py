"""Examples of range entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.nn.entropy import EntropyNet
from neurarium.testing.example import Example


class _MovedAndMeasured(nn.Module):
    """The moved points, and their entropy over learned ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.net = EntropyNet(dim=3, hidden=8, ranges=4, max_shift=0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moved = self.net(x)
        return moved, self.net.entropy(moved)


def entropy_net() -> Example:
    """Point sets in, moved sets and their entropies out."""

    def inputs(batch: int, seed: int) -> tuple[Tensor]:
        return (torch.randn(batch, 12, 3, generator=torch.Generator().manual_seed(seed)),)

    return Example("layer", make=lambda seed: _MovedAndMeasured(), inputs=inputs)
