"""Tiny examples of the room trust."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.testing.example import Example
from neurarium.trust.explain import class_activation

__all__ = ["smooth_gradcampp"]


def _cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 16, 3),
    )  # fmt: skip


def _images(batch: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def smooth_gradcampp() -> Example:
    return Example(
        role="probe",
        apply=lambda model, x: class_activation(model, x, samples=4),
        model=_cnn,
        inputs=_images,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.Linear(2 * 64, 3)),
    )
