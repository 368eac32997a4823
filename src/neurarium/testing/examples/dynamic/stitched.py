"""Examples of networks stitched together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.stitch import SNNet, stitch
from neurarium.testing.example import Example


def _network(width: int) -> nn.Sequential:
    blocks = [m for _ in range(3) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3))


def _images(batch: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def sn_net() -> Example:
    """Two small convolutional networks and the networks between them."""

    def make(seed: int) -> SNNet:
        (x,) = _images(32, seed)
        policy = stitch([_network(4), _network(8)], x[:2]).init_stitches(x)
        policy.eval().calibrate([(x, torch.arange(32) % 3)])
        policy.use(config=2)
        return policy

    return Example("policy", make=make, inputs=_images)
