"""Parameters and bytes, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

from neurarium import meter


def test_parameters_shared_and_frozen() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7, bias=False))
    assert meter.parameters(model) == 42 + 56 + 49
    model[2].weight = model[1].weight
    assert meter.parameters(model) == 42 + 56
    model[0].requires_grad_(False)
    assert meter.parameters(model, trainable=True) == 56
    assert meter.stored_bytes(model) == 4 * (42 + 56)


def test_nonzero_parameters_by_value_and_by_mask() -> None:
    model = nn.Linear(10, 10)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    assert meter.nonzero_parameters(model) == 100
    with torch.no_grad():
        model.weight[:3] = 0.0
        model.weight[9, 9] = float("nan")
    assert meter.nonzero_parameters(model) == 70
    prune.l1_unstructured(model, "weight", amount=50)  # the 30 zeros and 20 more
    assert meter.nonzero_parameters(model) == 50
    prune.remove(model, "weight")
    assert meter.nonzero_parameters(model) == 50


def test_buffers_count_where_they_are_saved() -> None:
    norm = nn.BatchNorm2d(6)
    assert meter.stored_bytes(norm) == 4 * 4 * 6 + 8  # weight, bias, mean, variance; the batch counter is an int64
    norm.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert meter.stored_bytes(norm) == 4 * 4 * 6 + 8
    assert meter.stored_bytes(norm.to(torch.bfloat16)) == 2 * 4 * 6 + 8


@pytest.mark.filterwarnings("ignore:.*(deprecated|beta)")
def test_packed_quantised_sparse_and_wrapped_tensors_count_with_what_they_hold() -> None:
    bits = torch.zeros(64, 16, dtype=torch.uint8)  # 64 x 128 binary weights, eight a byte
    assert meter.stored_bytes({"packed": bits}) == 1024
    dense = torch.randn(8, 12)
    assert meter.stored_bytes({"q": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)}) == 96 + 16
    channels = torch.quantize_per_channel(dense, torch.full((8,), 0.1), torch.zeros(8, dtype=torch.int64), 0, torch.qint8)
    scales = channels.q_per_channel_scales().element_size()
    assert meter.stored_bytes({"q": channels}) == 96 + 8 * (scales + 8)
    sparse = torch.eye(10).to_sparse()
    assert meter.stored_bytes({"s": sparse}) == 10 * 4 + 20 * 8
    assert meter.stored_bytes({"s": torch.eye(10).to_sparse_csr()}) == 10 * 4 + (11 + 10) * 8
    assert meter.stored_bytes({"w": TwoTensor(torch.zeros(5), torch.zeros(5))}) == 40
    assert meter.stored_bytes([dense, (dense, [dense.half()])]) == 96 * 4 + 96 * 2  # type: ignore[list-item]


def test_views_and_overlaps_count_once() -> None:
    big = torch.zeros(1000)
    assert meter.stored_bytes([big[:10]]) == 40
    assert meter.stored_bytes([big[:10], big[:10], big[990:]]) == 80
    assert meter.stored_bytes([big, big[:10], big.view(10, 100)]) == 4000
    assert meter.stored_bytes([torch.zeros(1).expand(1000)]) == 4


@pytest.mark.parametrize("meta", [True, False])
def test_a_model_on_the_meta_device_can_be_sized(meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        assert meter.stored_bytes(nn.Linear(1000, 500)) == 4 * 500_500
