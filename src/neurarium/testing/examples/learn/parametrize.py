"""Tiny examples: parametrisations. Their optimizers know parameters by name; here names are found by shape, as no two are alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from neurarium.learn.depth import with_depth
from neurarium.learn.parametrize import MuAdam
from neurarium.learn.widths import Parametrization, infer_shapes
from neurarium.testing import Example

__all__ = ["depth_mup", "mup"]


def network(width: int) -> nn.Module:
    """Of the same tensors as the regression that the checks train, if the width is 4."""
    first, second = nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, 3)
    return nn.Sequential(nn.Conv1d(2, width, 3), nn.Tanh(), nn.Flatten(), first, nn.Tanh(), second)


def optimizer(params: Any, shapes: Parametrization) -> Any:
    names = {tuple(p.shape): name for name, p in network(4).named_parameters()}
    groups = [g if isinstance(g, Mapping) else {"params": [g]} for g in params]
    return MuAdam([{**g, "params": [(names[tuple(p.shape)], p) for p in g["params"]]} for g in groups], shapes, lr=2e-2)


def mup() -> Example:
    """Adam with the rates of a network twice as wide as its base, in the form without a multiplier in the forward pass."""
    shapes = infer_shapes(network(4), network(2), table=3)
    return Example("optimizer", make=lambda params: optimizer(params, shapes))


def depth_mup() -> Example:
    """The same with the hidden layer as one of two residual blocks of a network whose base has one."""
    shapes = with_depth(network(4), infer_shapes(network(4), network(2), table=3), ["3"], base_depth=0.5)
    return Example("optimizer", make=lambda params: optimizer(params, shapes))
