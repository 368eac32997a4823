"""Tiny examples of networks that run tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.mobile import Block, MobileConfig, mobile_net
from neurarium.dynamic.patch import PatchedModel, patch_inference
from neurarium.dynamic.patch_quant import quantmcu
from neurarium.dynamic.quantised import QuantisedModel
from neurarium.testing.example import Example


def _images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


def _model(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mobile_net(MobileConfig(8, (Block(1, 8), Block(3, 8), Block(3, 12, 2), Block(3, 12)), 0, 3))


def mcunetv2() -> Example:
    """Inverted residuals, of which the first three run in 2x2 tiles."""

    def apply(model: nn.Module) -> PatchedModel:
        return patch_inference(model, _images(1, 0), patches=(2, 2), split="2")

    return Example(
        "transform",
        model=_model,
        apply=apply,
        inputs=lambda n, seed: (_images(n, seed),),
        unsupported=lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)),
    )


def quantmcu_() -> Example:
    """The same network with few bits where the values of a tile allow it."""

    def apply(model: nn.Module) -> QuantisedModel:
        return quantmcu(patch_inference(model, _images(1, 0), patches=(2, 2), split="2"), _images(8, 1), lam=0.3, outlier_z=float("inf"))

    return Example(
        "transform",
        model=_model,
        apply=apply,
        inputs=lambda n, seed: (_images(n, seed),),
        unsupported=lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)),
    )
