"""Examples of layers that mix by wavelets."""

from __future__ import annotations

import torch

from neurarium.nn.wavemix import WaveBlock
from neurarium.testing.example import Example


def wavemix() -> Example:
    """A block of two levels whose input's sides 4 does not divide."""

    def inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 8, 7, 10, generator=torch.Generator().manual_seed(seed)),)

    return Example("layer", make=lambda seed: WaveBlock(8, levels=2, dropout=0.1), inputs=inputs)
