"""Layer inputs are measured as numpy would on all rows at once, however the data is cut, and the model is left as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from neurarium.compress import calibrate
from neurarium.compress.calibrate import per_weight
from neurarium.errors import BadInput, UnsupportedModel


def close(a: torch.Tensor, b: np.ndarray | torch.Tensor) -> None:
    b = torch.as_tensor(b)
    torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6), st.floats(-1e3, 1e3))
def test_streaming_equals_two_passes_of_numpy_for_every_split(sizes: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 4, generator=generator) * torch.tensor([1.0, 1e-3, 0.0, 30.0]) + offset
    model = nn.Linear(4, 3)
    stats = calibrate(model, list(x.split(sizes)), gram=True, histogram=16)[""]
    a = x.double().numpy()
    assert stats.n == len(a)
    close(stats.mean, a.mean(0))
    close(stats.m2, ((a - a.mean(0)) ** 2).sum(0))
    close(stats.second, (a**2).mean(0))
    close(stats.norm, np.linalg.norm(a, axis=0))
    close(stats.absmax, abs(a).max(0))
    close(stats.gram, a.T @ a / len(a))
    torch.testing.assert_close(stats.covariance, torch.as_tensor(np.cov(a.T, bias=True)), rtol=1e-9, atol=1e-12 * max(1.0, offset**2) * 1e3)
    whole = calibrate(model, [x], gram=True, histogram=16)[""]
    close(stats.mean, whole.mean), close(stats.m2, whole.m2), close(stats.gram, whole.gram)
    assert torch.equal(stats.histogram.counts, whole.histogram.counts)
    assert stats.histogram.limit == whole.histogram.limit
    counts, _ = np.histogram(a, stats.histogram.edges.numpy())
    assert counts.tolist() == stats.histogram.counts.tolist()


def test_one_row_has_no_variance_and_a_constant_column_none() -> None:
    model = nn.Linear(2, 1)
    assert calibrate(model, [torch.ones(1, 2)])[""].variance.tolist() == [0, 0]
    x = torch.stack([torch.full((50,), 1234.567), torch.randn(50)], 1)
    variance = calibrate(model, list(x.split(7)))[""].variance
    assert variance[0] <= 1e-20
    close(variance[1:], x[:, 1:].double().var(0))


def test_histogram_quantiles() -> None:
    x = torch.linspace(-3.0, 3.0, 6001)[:, None]
    histogram = calibrate(nn.Linear(1, 1), [x], histogram=1024)[""].histogram
    assert histogram.limit == 4
    for q in (0.0, 0.01, 0.5, 0.99, 1.0):
        assert abs(histogram.quantile(q) - (6 * q - 3)) <= 8 / 1024
    assert calibrate(nn.Linear(1, 1), [x * 0, x], histogram=64)[""].histogram.counts.sum() == 2 * len(x)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3, 2, 1), (5, 3, 9, 8)),
    "groups, dilation": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=2, groups=2), (3, 4, 9, 8)),
    "same, circular": (nn.Conv2d(2, 4, 4, padding="same", padding_mode="circular"), (3, 2, 9, 8)),
    "depthwise": (nn.Conv1d(3, 6, 5, 3, groups=3), (4, 3, 20)),
    "volume": (nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 3, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_the_product_of_its_unfolded_input(name: str) -> None:
    """The mean and the Gram matrix of the unfolded input predict the mean and the second moment of the output."""
    conv, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    conv = copy.deepcopy(conv).double()
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    stats = calibrate(conv, list(x.split(2)), gram=True)[""]
    y = F.conv1d(x, conv.weight, None, conv.stride, 0, 1, conv.groups) if conv.weight.ndim == 3 else conv(x)
    y = y if conv.weight.ndim == 3 or conv.bias is None else y - conv.bias.view(-1, *[1] * (y.ndim - 2))
    y = y.detach().transpose(0, 1).flatten(1)
    assert stats.n == y.shape[1]
    weight = conv.weight.detach()
    close((weight * per_weight(stats.mean, conv)).flatten(1).sum(1), y.mean(1))
    grams = stats.gram.view(conv.groups, weight[0].numel(), weight[0].numel()).repeat_interleave(len(weight) // conv.groups, 0)
    flat = weight.flatten(1)
    close(torch.einsum("oi,oij,oj->o", flat, grams, flat), y.square().mean(1))


class Odd(nn.Module):
    """Layers under keyword arguments, an unused one, BatchNorm, dropout, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.late, self.early, self.unused = nn.Linear(3, 2), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.late(input=self.early(self.drop(self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2))))


def test_the_model_is_untouched_and_layers_come_in_the_order_of_their_calls() -> None:
    torch.manual_seed(0)
    model = Odd().train()
    state, ids, rng = copy.deepcopy(model.state_dict()), torch.randint(0, 7, (6, 5)), torch.get_rng_state()
    stats = calibrate(model, [(ids, None)])
    assert list(stats) == ["early", "late"]
    assert torch.equal(torch.get_rng_state(), rng)
    mask = torch.rand(6, 5) > 0.4
    masked = calibrate(model, [{"ids": ids[:2], "attention_mask": mask[:2]}, {"ids": ids[2:], "attention_mask": mask[2:]}])
    rows = model.eval().norm(model.embed(ids).transpose(1, 2)).transpose(1, 2)[mask].detach()
    close(masked["early"].mean, rows.double().mean(0))
    assert masked["early"].n == int(mask.sum())
    for loader, match in (
        ([], "empty"),
        ([torch.randn(2, 4)] * 2 + [torch.full((2, 4), float("nan"))], "batch 2 .* not finite"),
        ([["x"]], "expected x"),
    ):
        plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with pytest.raises(BadInput, match=match):
            calibrate(plain, loader)
        assert not any(m._forward_pre_hooks for m in plain.modules())
    exploding = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    exploding[0].weight.data.fill_(3e38)
    with pytest.raises(BadInput, match="1: its input is not finite at batch 0"):
        calibrate(exploding, [torch.full((2, 4), 1e30)])
    assert not any(m._forward_pre_hooks for m in exploding.modules())
    model.train()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_is_asked_for_is_found_or_named() -> None:
    model, ids = Odd(), torch.randint(0, 7, (6, 5))
    assert list(calibrate(model, [ids], modules=["late"])) == ["late"]
    assert list(calibrate(model, (ids for _ in range(9)), modules=[nn.Linear], batches=2)) == ["early", "late"]
    with pytest.raises(BadInput, match="unused: the model never called it"):
        calibrate(model, [ids], modules=["unused"])
    with pytest.raises(BadInput, match="no module 'lat'"):
        calibrate(model, [ids], modules=["lat"])
    with pytest.raises(UnsupportedModel, match="embed: a Embedding"):
        calibrate(model, [ids], modules=["embed"])
    with pytest.raises(UnsupportedModel, match="no linear"):
        calibrate(nn.ReLU(), [ids])
    with pytest.raises(BadInput, match="batches"):
        calibrate(model, [ids], batches=0)
    with pytest.raises(BadInput, match="power of two"):
        calibrate(model, [ids], histogram=10)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(calibrate(layer, [torch.randn(2, 3, 8)])) == ["linear1", "linear2"]
    with pytest.raises(BadInput, match="opens it"):
        calibrate(layer, [torch.randn(2, 3, 8)], modules=["self_attn.out_proj"])
