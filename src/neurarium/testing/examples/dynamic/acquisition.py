"""Tiny example of a policy that buys views."""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.dynamic.acquisition import SGUQ
from neurarium.testing.example import Example

_Batch = tuple[tuple[Tensor, ...], Tensor]


def _views(n: int, seed: int) -> _Batch:
    """Three views of three classes with noise of graded strength."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    centre = torch.eye(3)[y]
    x = tuple(torch.cat([centre, centre], 1)[:, :d] + torch.rand(n, 1, generator=g) * torch.randn(n, d, generator=g) for d in (4, 5, 6))
    return x, y


def _policy(seed: int = 0, **options: object) -> SGUQ:
    torch.manual_seed(seed)
    return SGUQ((4, 5, 6), 3, members=3, hidden=(6, 5), prices=(1.0, 2.0, 4.0), **options)  # type: ignore[arg-type]


def sguq() -> Example:
    """Three views, a few epochs, calibrated."""

    def make(seed: int) -> SGUQ:
        policy = _policy(seed, order=(0, 1, 2))
        policy.fit(*_views(30, seed), val=_views(40, seed + 1), epochs=(3, 5))
        return policy.eval()

    return Example("policy", make=make, inputs=lambda batch, seed: (_views(batch, seed)[0],))
