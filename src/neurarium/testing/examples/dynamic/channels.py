"""Examples of policies that choose channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.channel import FTWT
from neurarium.testing.example import Example


def _images(batch: int, seed: int) -> tuple[Tensor]:
    """Patterns of graded strength, so that rows excite different filters."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 8, 8, generator=g) * torch.rand(batch, 1, 1, 1, generator=g) * 2
    return (x + torch.randn(batch, 1, 1, 8, generator=g),)


def ftwt() -> Example:
    """A small convolutional network whose predictors answer differently from row to row."""

    def make(seed: int) -> FTWT:
        (x,) = _images(24, seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip
        model(x)  # statistics of the normalisation
        policy = FTWT(model, granularity=2, whole_below=40, embedding=16)
        for p in policy.predictors():
            nn.init.normal_(p, std=1.0)
        policy.eval().calibrate([(x, torch.arange(24) % 3)], grid=3)
        return policy

    return Example("policy", make=make, inputs=_images)
