"""Layers that take the place of the standard ones, and what every such layer needs.

The lowest room: every other room may import it. A layer here is a *weight recipe* plus a fixed operator (a convolution whose kernel is a
sum of Kronecker products, a dot product of random features, ...). What users need is then the same for all of them and is written
once: put the layer into an existing model (:mod:`.replace`), keep the scale of the signal (:mod:`.signal`), get exact gradients
(:mod:`.autograd`)."""

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
from neurarium.nn.features import RFF, URF, ArcCos, Poly, PositiveExp, RandomFeatures, orthogonal_gaussian
from neurarium.nn.hull import instance_optimal_hull
from neurarium.nn.hyperbolic import PMLR, PBatchNorm, PConv2d, PLinear, PoincareBall, PoincareResNet, PResidual, frechet_mean, hyperbolic
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
from neurarium.nn.kernel_layer import KernelConv2d, KernelLinear, SNNKAdapter, bundle, fully_bundle, kernelise
from neurarium.nn.replace import Replaced, ReplaceReport, Rule, Skipped, replace_layers
from neurarium.nn.signal import Signal, SignalReport, gain_, signal_report
from neurarium.nn.wavelet import HaarDWT2d, HaarIDWT2d, dwt1, dwt2, idwt1, idwt2, wavelet_filters
from neurarium.nn.wavemix import WaveBlock, WaveMix, WaveMixLite, wave_mixing

__all__ = [
    "PMLR",
    "RFF",
    "URF",
    "ArcCos",
    "EntropyAttention",
    "EntropyNet",
    "HaarDWT2d",
    "HaarIDWT2d",
    "KernelConv2d",
    "KernelLinear",
    "PBatchNorm",
    "PConv2d",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHLinear",
    "PLinear",
    "PResidual",
    "PadChannels",
    "PoincareBall",
    "PoincareResNet",
    "Poly",
    "PositiveExp",
    "QuaternionConv2d",
    "RandomFeatures",
    "RangeEntropy",
    "ReplaceReport",
    "Replaced",
    "Rule",
    "SNNKAdapter",
    "Signal",
    "SignalReport",
    "Skipped",
    "WaveBlock",
    "WaveMix",
    "WaveMixLite",
    "algebra",
    "assert_gradients",
    "attention_calls",
    "attention_range_entropy",
    "bundle",
    "decay_groups",
    "dense",
    "dwt1",
    "dwt2",
    "exact_function",
    "frechet_mean",
    "fully_bundle",
    "gain_",
    "halfspace_entropy",
    "hyperbolic",
    "hypercomplex",
    "idwt1",
    "idwt2",
    "instance_optimal_hull",
    "kernelise",
    "kronecker_factors",
    "orthogonal_gaussian",
    "range_entropy_attention",
    "replace_layers",
    "signal_report",
    "soft_entropy",
    "wave_mixing",
    "wavelet_filters",
]
