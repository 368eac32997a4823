"""Examples of policies that train many networks in one and take one by budget."""

from __future__ import annotations

from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.elastic import ElasticFamily, grid
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.tips import TIPS
from neurarium.testing.example import Example
from neurarium.testing.examples.dynamic.exits import _batch


def _network() -> ElasticBackbone:
    return ElasticBackbone(classes=3, widths=(4, 6), strides=(2, 1), blocks=(0, 1))


def sortednet() -> Example:
    """Three widths with and without the last block; ready without calibration."""

    def make(seed: int) -> SortedNet:
        x, _ = _batch(2, seed)
        return SortedNet(_network(), x, widths=(0.3, 0.7, 1.0), seed=seed).eval()

    return Example("policy", make=make, inputs=lambda batch, seed: (_batch(batch, seed)[0],))


def tips() -> Example:
    """Paths of a small super-network, calibrated."""

    def make(seed: int) -> TIPS:
        x, y = _batch(32, seed)
        model = _network()
        policy = TIPS(ElasticFamily(model, grid(model, (0.5, 1.0)), x), x, levels=3, per_level=2, seed=seed).eval()
        policy.calibrate([(x, y)])
        return policy

    return Example("policy", make=make, inputs=lambda batch, seed: (_batch(batch, seed)[0],))
