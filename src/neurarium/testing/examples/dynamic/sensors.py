"""Examples of pruning sensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.sensors import DynST
from neurarium.testing.example import Example


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))


def _loader(seed: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(24, 2, 4, 5, generator=torch.Generator().manual_seed(seed))
    return [(part, part.roll(1, 3).mean(1, keepdim=True)) for part in x.split(8)]


def dynst() -> Example:
    return Example(
        "learner", make=lambda: DynST(sparsity=0.5, rounds=2), model=_model, loader=_loader,
        unsupported=lambda: nn.Sequential(nn.AvgPool2d(1)),
    )  # fmt: skip
