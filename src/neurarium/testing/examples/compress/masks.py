"""Examples of the room `compress`."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from neurarium.compress import chita as prune
from neurarium.compress import explicit
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Flatten(), nn.Linear(36, 12), nn.GELU(),
        nn.LayerNorm(12), nn.Linear(12, 3),
    )  # fmt: skip


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def chita() -> Example:
    loader = [(*_inputs(24, 7), torch.arange(24) % 3)]
    return Example(
        "transform",
        apply=partial(prune, loader=loader, sparsity=0.6, samples=24),
        model=_model,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    )


def _cover(s: Subject) -> nn.Module:
    return prune(explicit(s.model), loader=s.loader, sparsity=0.5, samples=8, loss_fn=s.loss)


COVER = {"chita": _cover}
