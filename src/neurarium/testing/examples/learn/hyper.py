"""Tiny examples: hypernetworks."""

from __future__ import annotations

import torch
from torch import nn

from neurarium.learn.hyper import HyperNetwork, mip
from neurarium.testing import Example

__all__ = ["hypernetwork", "magnitude_invariant"]


def target() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))


def inputs(batch: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 2, generator=generator), torch.randn(batch, 4, generator=generator)


def hypernetwork() -> Example:
    """In chunks, a condition a row."""
    return Example(
        "layer", make=lambda seed: HyperNetwork(target(), 2, hidden=(8,), output="chunks", chunk_size=16, chunk_embedding=4), inputs=inputs
    )


def magnitude_invariant() -> Example:
    """Encoded to constant norm, changes of learned weights."""
    return Example("layer", make=lambda seed: mip(target(), 2, hidden=(8,)), inputs=inputs)
