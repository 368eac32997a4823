"""Tiny examples: second-order learners."""

from __future__ import annotations

import torch
from torch import nn

from neurarium.data import TensorData
from neurarium.learn.two_stage import OIGHWO, TwoLayerMLP
from neurarium.testing import Example

__all__ = ["optimal_input_gain"]


def optimal_input_gain() -> Example:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TwoLayerMLP(4, 6, 2)

    def loader(seed: int):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 4, generator=generator)
        return TensorData(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)).batches(16, seed=seed)

    return Example(
        "learner",
        make=OIGHWO,
        model=model,
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)),
    )
