"""Examples of layers that choose experts."""

from __future__ import annotations

import torch
from torch import nn

from neurarium.dynamic.lora_experts import DynMoLE
from neurarium.testing.example import Example


def dynmole() -> Example:
    """Experts and a router that are not where they start, so that tokens differ in how many they use."""

    def make(seed: int) -> DynMoLE:
        del seed
        layer = DynMoLE(nn.Linear(6, 5), experts=3, rank=2, entropy_threshold=0.8, dispatch="sparse")
        nn.init.normal_(layer.up)
        nn.init.normal_(layer.router)
        return layer

    return Example(
        "layer", make=make, inputs=lambda batch, seed: (torch.randn(batch, 7, 6, generator=torch.Generator().manual_seed(seed)),)
    )
