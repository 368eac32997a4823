"""Examples of the room `compress`: quantised weights and integer networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from neurarium.compress import requant as quantise
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


def requant() -> Example:
    return Example(
        "transform",
        apply=partial(quantise, bits=4, activations=[_inputs(16, 7)[0]]),
        model=_model,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    )


#: paper -> the method with mild arguments
COVER: dict[str, Callable[[Subject], nn.Module]] = {
    "requant": lambda s: quantise(s.model, bits=6, activations=s.loader, act_bits=8),
}
