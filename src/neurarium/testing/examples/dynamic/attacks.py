"""Examples of attacks on networks that decide."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from neurarium.dynamic.exits import EarlyExit, with_exits
from neurarium.dynamic.robustness import DyNNReport, dynn_robustness
from neurarium.dynamic.train import fit_policy
from neurarium.testing.example import Example
from neurarium.testing.examples.dynamic.exits import _batch, _network


def trained(seed: int) -> tuple[EarlyExit, nn.Module]:
    """A calibrated policy at a middle budget, and its plain network with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = [_batch(64, 100 + i) for i in range(12)]
        policy = EarlyExit(with_exits(_network(), data[0][0][:2], cuts=2))
        fit_policy(policy, data, epochs=2, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
        policy.eval().calibrate(data[:2])
        policy.use(data[0][0], budget=0.6 * policy.costs(data[0][0]).full)
    return policy, copy.deepcopy(policy.staged)


def robustness() -> Example:
    """A short attack both ways on a handful of rows."""

    _, static = trained(0)

    def probe(policy: EarlyExit, x: Tensor, y: Tensor) -> DyNNReport:
        return dynn_robustness(policy, static, (x, y), eps=(0.2,), steps=2, clip=None, early={"steps": 5})

    return Example("probe", model=lambda seed: trained(seed)[0], inputs=_batch, apply=probe)
