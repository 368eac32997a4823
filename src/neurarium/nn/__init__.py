"""Layers that take the place of the standard ones, and what every such layer needs.

The lowest room: every other room may import it. A layer here is a *weight recipe* plus a fixed operator (a convolution whose kernel is a
sum of Kronecker products, a dot product of random features, ...). What users need is then the same for all of them and is written
once: put the layer into an existing model (:mod:`.replace`), keep the scale of the signal (:mod:`.signal`), get exact gradients
(:mod:`.autograd`).
"""

from neurarium.nn.autograd import assert_gradients, exact_function
from neurarium.nn.entropy import (
    EntropyAttention,
    EntropyNet,
    RangeEntropy,
    attention_calls,
    attention_range_entropy,
    halfspace_entropy,
    range_entropy_attention,
    soft_entropy,
)
from neurarium.nn.hull import instance_optimal_hull
from neurarium.nn.hyperbolic import (
    PMLR,
    PBatchNorm,
    PConv2d,
    PLinear,
    PoincareBall,
    PoincareResNet,
    PResidual,
    frechet_mean,
    hyperbolic,
)
from neurarium.nn.hypercomplex import (
    PadChannels,
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHLinear,
    QuaternionConv2d,
    algebra,
    decay_groups,
    dense,
    hypercomplex,
    kronecker_factors,
)
from neurarium.nn.replace import Replaced, ReplaceReport, Rule, Skipped, replace_layers
from neurarium.nn.signal import Signal, SignalReport, gain_, signal_report

__all__ = [
    "instance_optimal_hull",
    "soft_entropy",
    "range_entropy_attention",
    "halfspace_entropy",
    "attention_range_entropy",
    "attention_calls",
    "RangeEntropy",
    "EntropyNet",
    "EntropyAttention",
    "frechet_mean",
    "hyperbolic",
    "PoincareResNet",
    "PoincareBall",
    "PResidual",
    "PLinear",
    "PConv2d",
    "PBatchNorm",
    "PMLR",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHLinear",
    "PadChannels",
    "QuaternionConv2d",
    "ReplaceReport",
    "Replaced",
    "Rule",
    "Signal",
    "SignalReport",
    "Skipped",
    "algebra",
    "assert_gradients",
    "decay_groups",
    "dense",
    "exact_function",
    "gain_",
    "hypercomplex",
    "kronecker_factors",
    "replace_layers",
    "signal_report",
]
