"""The comparison's own pieces: every cut stays within its FLOPs."""

from __future__ import annotations

import pytest
import torch

from neurarium import meter
from neurarium.data import ImageTask, TensorData
from neurarium.dynamic.backbones import VisionTransformerS
from neurarium.errors import BadInput
from neurarium.experiments.dynamic import where_to_cut
from neurarium.experiments.dynamic.transformer_inference_survey import Bench


@pytest.fixture(scope="module")
def bench():
    g = torch.Generator().manual_seed(0)
    part = TensorData(torch.randn(80, 1, 8, 8, generator=g), torch.arange(80) % 4)
    torch.manual_seed(0)
    model = VisionTransformerS(1, 8, 2, width=48, depth=4, heads=4, mlp=2, classes=4).eval()
    return Bench(model, ImageTask("noise", part, part, 4, ""), part, part, 0)


@pytest.mark.parametrize("way", [way for way in where_to_cut.WAYS if way not in ("exits", "bits")])
def test_a_cut_stays_within_its_flops(bench, way):
    x = bench.task.test.x[:1]
    cuts = where_to_cut.WAYS[way](bench, meter.flops(bench.model, x), 5)
    for (_, cost, model), share in zip(cuts, where_to_cut.TARGETS):
        assert 0.1 < cost <= share
        assert model(x).shape == (1, 4)


def test_bisection_finds_the_largest_network_that_fits():
    def make(level: float):
        return torch.nn.Linear(10, max(1, int(100 * level)), bias=False)

    found = where_to_cut.within(make, 20 * 37, torch.randn(1, 10))
    assert 36 <= found.out_features <= 37
    with pytest.raises(BadInput):
        where_to_cut.within(make, 10, torch.randn(1, 10))
