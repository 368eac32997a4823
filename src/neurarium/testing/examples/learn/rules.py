"""Tiny examples: layer-local learning rules."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import Adam

from neurarium.data import TensorData
from neurarium.learn.mono_forward import MonoForward
from neurarium.testing import Example

__all__ = ["mono_forward"]


def mono_forward() -> Example:
    """One block after another, the default."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))

    def loader(seed: int):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(24, 6, generator=generator)
        return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)

    return Example(
        "learner",
        make=lambda: MonoForward(optimizer=partial(Adam, lr=1e-2)),
        model=model,
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU()),
        skip={"resumes": "epochs are counted per block in greedy order"},
    )
