"""Tiny examples: rules that bring a structure of their own along (a feedback network, a label diffusion)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import SGD

from neurarium.data import TensorData
from neurarium.learn.counter_current import CounterCurrent
from neurarium.learn.noprop import NoProp, NoPropNet
from neurarium.testing import Example

__all__ = ["counter_current", "noprop"]


def loader(seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 6, generator=generator)
    return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)


def counter_current() -> Example:
    """Two hidden levels; a model without a linear head is refused."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ELU(), nn.Linear(12, 12), nn.ELU(), nn.Linear(12, 3))

    return Example(
        "learner",
        make=lambda: CounterCurrent(optimizer=partial(SGD, lr=0.1)),
        model=model,
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Linear(6, 12), nn.ELU()),
    )


def noprop() -> Example:
    """Three steps in discrete time; a network that is no label diffusion is refused."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return NoPropNet(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), 3, torch.zeros(2, 6), steps=3, hidden=8)

    return Example("learner", make=NoProp, model=model, loader=loader, unsupported=lambda: nn.Sequential(nn.Linear(6, 3)))
