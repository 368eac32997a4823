"""Examples of policies that stop early along stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.exits import with_exits
from neurarium.dynamic.jei import JEIDNN
from neurarium.testing.example import Example


def _batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three blobs with noise of graded strength, so that some rows are easy."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    x = 0.3 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(n, 1, 8, 8, generator=g)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 2 * label : 2 * label + 3] += 1
    return x, y


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def jei_dnn() -> Example:
    """A policy whose gates answer differently from row to row."""

    def make(seed: int) -> JEIDNN:
        x, y = _batch(64, seed)
        policy = JEIDNN(with_exits(_network(), x[:2], cuts=2), tradeoff=0.5, alternate=2)
        nn.init.normal_(policy.gate.weight, std=1.0)
        policy.eval().calibrate([(x, y)])
        policy.use(x, budget=0.6 * policy.costs(x).full)
        return policy

    return Example("policy", make=make, inputs=lambda batch, seed: (_batch(batch, seed)[0],))
