"""Tiny example of exits on a latent branch."""

from __future__ import annotations

from torch import nn

from neurarium.dynamic.perceiver import DistilledExit, DynPerceiver
from neurarium.testing.example import Example
from neurarium.testing.examples.dynamic.exits import _batch


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU())


def _policy() -> DistilledExit:
    stages = [_stage(4, 6, 1), _stage(6, 8, 2), _stage(8, 8, 1)]
    network = DynPerceiver(
        stages, (4, 6, 8, 8), num_classes=3, stem=_stage(1, 4, 1), latents=8, blocks=(1, 0, 1), heads=(1, 2), pool=3, out_pool=2
    )
    return DistilledExit(network)


def dyn_perceiver() -> Example:
    """Three stages, calibrated at half of the range of costs."""

    def make(seed: int) -> DistilledExit:
        x, y = _batch(64, seed)
        policy = _policy().eval()
        for p in policy.staged.heads.parameters():
            nn.init.normal_(p)  # answers that differ from row to row
        policy.calibrate([(x, y)])
        table = policy.costs(x)
        policy.use(x, budget=(table.total[0] + table.full) / 2)
        return policy

    return Example("policy", make=make, inputs=lambda batch, seed: (_batch(batch, seed)[0],))
