"""Tiny examples: generators of weights."""

from __future__ import annotations

import torch

from neurarium.learn.generate import IGPG, WeightGPT
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.testing import Example

__all__ = ["igpg"]


def condition(instructions) -> torch.Tensor:
    return torch.tensor([[float(len(i.dataset)), float(len(i.architecture)), 1.0] for i in instructions])


def igpg() -> Example:
    """Three chunks of six weights a network, two codes a chunk."""

    def make(seed: int) -> IGPG:
        vq = GumbelVQ(6, codes=5, code_dim=4, tokens_per_chunk=2, hidden=8, places=(2, 3, 3))
        return IGPG(WeightTokenizer(6), vq, WeightGPT(5, condition_dim=3, layers=1, width=8, heads=2, context=8, longest=8), condition)

    def inputs(batch: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        place = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 2, 2]]).expand(batch, 3, 3)
        return torch.randn(batch, 3, 6, generator=generator), place, torch.randn(batch, 3, generator=generator)

    return Example("model", make=make, inputs=inputs)
