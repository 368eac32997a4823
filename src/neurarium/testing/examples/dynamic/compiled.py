"""Tiny examples of compiling what decides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.compile import split
from neurarium.testing.example import Example


class _Branching(nn.Module):
    """An exit, and a loop that runs until it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.exit, self.step, self.last = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = self.exit(h)
        if y.softmax(-1).amax(-1) > 0.45:
            return y
        while h.norm(dim=-1) > 0.7:
            h = 0.7 * torch.tanh(self.step(h))
        return self.last(h)


class _Keeping(nn.Module):
    """What a forward pass leaves behind cannot be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def _inputs(batch: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed)),)


def dycl() -> Example:
    """A module with an early return and a loop of unknown length."""
    return Example(
        "transform",
        apply=lambda model: split(model, _inputs(4, 0)[0]),
        model=lambda seed: _Branching(),
        inputs=_inputs,
        unsupported=_Keeping,
        skip={"export": "a program is exported segment by segment, which its own tests do; torch.export has no graph for the whole"},
    )
