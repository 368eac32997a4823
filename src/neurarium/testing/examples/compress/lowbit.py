"""Examples of the room `compress`: codebooks, binary weights, precision that adapts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from neurarium import compress
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, bias=False), nn.Flatten(),
        nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 3),
    )  # fmt: skip


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def _loader(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(*_inputs(12, seed + i), torch.arange(12) % 3) for i in range(2)]


def dgms() -> Example:
    return Example(
        "transform",
        apply=partial(compress.dgms, loader=_loader(7), components=8, epochs=1, lr=1e-3),
        model=_model,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    )


class _Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = compress.BiPerConv2d(1, 4, 3, padding=1, stage=2, activations=None)
        self.head = compress.BiPerLinear(4, 3, stage=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((-1, -2)))  # type: ignore[no-any-return]


def biper() -> Example:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return _Binary()

    return Example("layer", make=make, inputs=_inputs)


def adapt_precision() -> Example:
    return Example(
        "learner",
        make=lambda: compress.AdaPT(lookback=(1, 3)),
        model=_model,
        loader=_loader,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    )


def _adapt(s: Subject) -> nn.Module:
    model = copy.deepcopy(s.model)
    compress.AdaPT(lookback=(1, 2), loss=s.loss).fit(model, s.loader, epochs=2)
    return model


COVER: dict[str, Callable[[Subject], nn.Module]] = {
    "dgms": lambda s: compress.dgms(s.model, s.loader, components=16, epochs=1, lr=1e-4, loss=s.loss),
    "biper": lambda s: compress.set_stage(compress.binarize(s.model, activations=None), 2),
    "adapt-precision": _adapt,
}
