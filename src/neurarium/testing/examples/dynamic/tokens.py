"""Examples of thinning out tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from neurarium.dynamic.pose import VideoPoseTransformer
from neurarium.dynamic.tokens import hourglass
from neurarium.testing.example import Example


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return VideoPoseTransformer(8, 3, 8, 4, 2)


def _inputs(batch: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, 8, 3, 2, generator=torch.Generator().manual_seed(seed)),)


def hot() -> Example:
    apply = partial(hourglass, keep=3, at=1)
    return Example("transform", apply=apply, model=_model, inputs=_inputs, unsupported=lambda: nn.Sequential(nn.Linear(2, 2)))


def h2ot() -> Example:
    apply = partial(hourglass, keep=[6, 4, 3], at=[1, 2, 3], prune="uniform", recover="interpolate")
    return Example("transform", apply=apply, model=_model, inputs=_inputs, unsupported=lambda: nn.Sequential(nn.Linear(2, 2)))
