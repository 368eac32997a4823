"""Layers that take the place of the standard ones, and what every such layer needs.

The lowest room: every other room may import it. A layer here is a *weight recipe* plus a fixed operator (a convolution whose kernel is a
sum of Kronecker products, a dot product of random features, ...). What users need is then the same for all of them and is written
once: put the layer into an existing model (:mod:`.replace`), keep the scale of the signal (:mod:`.signal`), get exact gradients
(:mod:`.autograd`).
"""

from neurarium.nn.hypercomplex import PHConv1d, PHConv2d, PHConv3d, PHLinear, QuaternionConv2d, dense, hypercomplex
from neurarium.nn.replace import ReplaceReport, Rule, replace_layers
from neurarium.nn.signal import gain_, signal_report

__all__ = [
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHLinear",
    "QuaternionConv2d",
    "dense",
    "ReplaceReport",
    "Rule",
    "gain_",
    "hypercomplex",
    "replace_layers",
    "signal_report",
]
