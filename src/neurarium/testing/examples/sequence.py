"""Examples of room `sequence`."""

from __future__ import annotations

import torch

from neurarium.sequence.forecast import ARNet
from neurarium.testing.example import Example


def ar_net() -> Example:
    """An auto-regression of order 12 for three steps, with a hidden layer."""

    def inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed)),)

    return Example("model", make=lambda seed: ARNet(12, 3, hidden=(8,), sparsity=0.25), inputs=inputs)
