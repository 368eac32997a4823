"""Tiny examples: language models of which only a part is run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.sorted_llm import SortedFineTuning
from neurarium.testing.example import Example


def _ids(batch: int, seed: int, time: int = 7) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(seed))


def sorted_llama() -> Example:
    """A small decoder that is surer of some continuations than of others."""

    def make(seed: int) -> SortedFineTuning:
        decoder = Decoder(11, width=16, heads=2, layers=4, context=16)
        nn.init.normal_(decoder.head.weight, std=0.5)
        nn.init.normal_(decoder.token.weight)
        policy = SortedFineTuning(decoder, (1, 2, 4)).eval()
        ids = _ids(64, seed, time=8)
        policy.calibrate([(ids[:, :-1], ids[:, 1:])])
        x = ids[:, :-1]
        policy.use(x, budget=0.6 * policy.costs(x).full)
        return policy

    return Example("policy", make=make, inputs=lambda batch, seed: (_ids(batch, seed),))
