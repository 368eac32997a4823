"""Tiny examples of the room `spiking`, for the conformance suite."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from neurarium.spiking import nn as snn
from neurarium.spiking.train import SLTT
from neurarium.testing import Example


def _batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(6, 1, 8, 8, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(3)]


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return snn.vgg_small(1, 3, (4, 6), steps=4)


def sltt() -> Example:
    return Example(
        role="learner",
        make=partial(SLTT, k=2),
        model=_net,
        loader=_batches,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.RNN(64, 3)),
    )
