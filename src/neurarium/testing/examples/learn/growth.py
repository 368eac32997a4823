"""Tiny examples: networks that grow."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import Adam

from neurarium.data import TensorData
from neurarium.learn.grow import ExpandableCNN, SelfExpanding
from neurarium.testing import Example

__all__ = ["self_expanding"]


def self_expanding() -> Example:
    """It widens before the second epoch, whatever the score says; the names of weights stay as they are."""

    def loader(seed: int):
        x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        return TensorData(x, (x[:, 0, 2, 2] > 0).long()).batches(8, seed=seed)

    return Example(
        "learner",
        make=lambda: SelfExpanding(tau=0.0, cooldown=1, samples=8, max_per_block=1, optimizer=partial(Adam, lr=1e-2)),
        model=lambda seed: ExpandableCNN((4, 4), classes=2, in_channels=1),
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
    )
