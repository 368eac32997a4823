"""Examples of low-rank and structured factors."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import SGD

from neurarium.compress import GaudiGBLR
from neurarium.compress import alds as compress
from neurarium.compress import gblr as convert
from neurarium.compress import trp as train
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Flatten(), nn.Linear(54, 12), nn.GELU(),
        nn.LayerNorm(12), nn.Linear(12, 3),
    )  # fmt: skip


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def alds() -> Example:
    return Example(
        "transform", apply=partial(compress, keep=0.6), model=_model, inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    )  # fmt: skip


def trp() -> Example:
    loader = [(*_inputs(24, 7), torch.arange(24) % 3)]
    return Example(
        "transform", apply=partial(train, loader=loader, epochs=3, period=2, energy=0.9, threshold=0.3, optimizer=partial(SGD, lr=0.05)),
        model=_model, inputs=_inputs, unsupported=lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    )  # fmt: skip


def gblr() -> Example:
    return Example(
        "layer", make=lambda seed: GaudiGBLR(10, 6, budget=0.8),
        inputs=lambda batch, seed: (torch.randn(batch, 10, generator=torch.Generator().manual_seed(seed)),),
    )  # fmt: skip


def _cover_alds(s: Subject) -> nn.Module:
    return compress(s.model, keep=0.7)


def _cover_trp(s: Subject) -> nn.Module:
    optimizer = partial(SGD, lr=0.01, momentum=0.9)
    return train(s.model, s.loader, epochs=1, loss=s.loss, optimizer=optimizer, period=2, energy=0.9, threshold=0.4)


def _cover_gblr(s: Subject) -> nn.Module:
    return convert(s.model, s.loader, budget=0.7, loss=s.loss, packed=True)


COVER = {"alds": _cover_alds, "gblr": _cover_gblr, "trp": _cover_trp}
