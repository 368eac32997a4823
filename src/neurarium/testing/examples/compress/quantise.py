"""Examples of the room `compress`: quantised weights and integer networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from neurarium.compress import quantize_integer
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


def _convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 3),
    )  # fmt: skip


def hawqv3() -> Example:
    return Example(
        "transform",
        apply=partial(quantize_integer, loader=[_inputs(16, 7)[0]], bits=6),
        model=_convolutions,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU()),
        skip={"trains_on": "an integer network has nothing to train: prepare_qat makes the network that trains for it"},
    )


#: paper -> the method with mild arguments
COVER: dict[str, Callable[[Subject], nn.Module]] = {
    "hawqv3": lambda s: quantize_integer(s.model, s.loader),
    "requant": lambda s: quantise(s.model, bits=6, activations=s.loader, act_bits=8),
}
