"""Tiny examples: rules that send the output error down through random matrices."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import SGD, Adam

from neurarium.data import TensorData
from neurarium.learn.feedback import DFA
from neurarium.learn.photonic import OPU
from neurarium.learn.private_feedback import PrivateDFA
from neurarium.testing import Example

__all__ = ["light_in_the_loop", "photonic_dp"]


class _Skip(nn.Module):
    """A skip connection across layers: no chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.head(h + self.second(h).tanh())


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def _loader(seed: int):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))
    return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)


def light_in_the_loop() -> Example:
    """Ternary errors through a noisy optical projection."""
    return Example(
        "learner",
        make=lambda: DFA(optimizer=partial(Adam, lr=1e-2), ternary=0.4, projector=partial(OPU, noise=0.1)),
        model=_model,
        loader=_loader,
        unsupported=_Skip,
    )


def photonic_dp() -> Example:
    """Clipped and noisy feedback."""
    return Example(
        "learner",
        make=lambda: PrivateDFA(optimizer=partial(SGD, lr=0.1, momentum=0.9), sigma=0.5),
        model=_model,
        loader=_loader,
        unsupported=lambda: nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)),
    )
