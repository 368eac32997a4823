"""Tiny examples: predictive coding."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import Adam

from neurarium.data import TensorData
from neurarium.learn.predictive import HGF, HGFLearner
from neurarium.learn.predictive_coding import PredictiveCoding, PredictiveCodingMLP
from neurarium.testing import Example

__all__ = ["hgf", "predictive_coding"]


def hgf() -> Example:
    def loader(seed: int):
        generator = torch.Generator().manual_seed(seed)
        series = torch.randn(6, 8, generator=generator, dtype=torch.float64).cumsum(1) / 3
        return TensorData(series, torch.ones(6)).batches(3, seed=seed)

    return Example(
        "learner",
        make=lambda: HGFLearner(["tonic_volatility", "u.log_precision"]),
        model=lambda seed: HGF(update="unbounded"),
        loader=loader,
        unsupported=lambda: nn.Linear(8, 8),
    )


def predictive_coding() -> Example:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return PredictiveCodingMLP((6, 8, 3))

    def loader(seed: int):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(24, 6, generator=generator)
        return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)

    return Example(
        "learner",
        make=lambda: PredictiveCoding(4, True, optimizer=partial(Adam, lr=1e-2)),
        model=model,
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)),
    )
