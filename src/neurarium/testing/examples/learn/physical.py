"""Tiny examples: training of physical networks."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import Adam

from neurarium.data import TensorData
from neurarium.learn.physical import PhysicalChain, PhysicalForwardForward, PhysicalLayer
from neurarium.learn.scattering import RandomScattering
from neurarium.testing import Example

__all__ = ["physical_ff"]


def physical_ff() -> Example:
    """A physical layer and a digital one."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return PhysicalChain([PhysicalLayer(RandomScattering(9, 8), 9, 12), nn.Sequential(nn.Linear(12, 12), nn.GELU())], 6, 3)

    def loader(seed: int):
        x = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))
        return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)

    return Example(
        "learner",
        make=lambda: PhysicalForwardForward(optimizer=partial(Adam, lr=1e-2), inner_steps=3),
        model=model,
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)),
    )
