"""Hyperbolic layers: the Poincaré ball with exact gradients, and networks whose features live in it."""

from neurarium.nn.hyperbolic.ball import PoincareBall
from neurarium.nn.hyperbolic.frechet import frechet_mean
from neurarium.nn.hyperbolic.layers import PMLR, PBatchNorm, PConv2d, PLinear, PResidual, hyperbolic
from neurarium.nn.hyperbolic.resnet import PoincareBlock, PoincareResNet

__all__ = [
    "PMLR",
    "PBatchNorm",
    "PConv2d",
    "PLinear",
    "PResidual",
    "PoincareBall",
    "PoincareBlock",
    "PoincareResNet",
    "frechet_mean",
    "hyperbolic",
]
