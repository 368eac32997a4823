"""Examples of the hyperbolic layers."""

from __future__ import annotations

import torch

from neurarium.nn.hyperbolic import PoincareBall, PoincareResNet
from neurarium.testing.example import Example


def poincare_resnet() -> Example:
    """The smallest residual network of the family, with a learnt curvature."""

    def make(seed: int) -> torch.nn.Module:
        return PoincareResNet((2, 3, 4), 8, 3, in_channels=2, init="centre", ball=PoincareBall(0.5, learnable=True))

    def inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 2, 6, 5, generator=torch.Generator().manual_seed(seed)),)

    return Example("layer", make=make, inputs=inputs)
