"""Examples of room `nn`."""

from __future__ import annotations

import torch

from neurarium.nn.hypercomplex import PHConv2d
from neurarium.testing.example import Example


def phnn() -> Example:
    """A hypercomplex convolution with n = 3 and everything that a convolution can have."""

    def inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 6, 7, 5, generator=torch.Generator().manual_seed(seed)),)

    return Example("layer", make=lambda seed: PHConv2d(6, 9, 3, 3, stride=2, padding=1, padding_mode="reflect"), inputs=inputs)
