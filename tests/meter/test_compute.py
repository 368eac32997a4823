"""FLOPs against closed forms; the counter sees what fused kernels hide."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from neurarium import meter
from neurarium.errors import BadInput


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear(dtype: torch.dtype) -> None:
    layer = nn.Linear(7, 11, dtype=dtype)
    x = torch.randn(3, 5, 7, dtype=dtype)
    assert meter.flops(layer, x) == 2 * 15 * 7 * 11
    assert meter.macs(layer, x) == 15 * 7 * 11
    assert meter.flops(layer, x, backward=True) == 2 * 2 * 15 * 7 * 11  # the weight's gradient; the input asks for none
    assert meter.flops(layer, x.requires_grad_(), backward=True) == 3 * 2 * 15 * 7 * 11


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 4), (3, 1, 1, 1)])
def test_convolution(stride: int, padding: int, dilation: int, groups: int) -> None:
    layer = nn.Conv2d(4, 8, 3, stride, padding, dilation, groups)
    out = layer(torch.zeros(2, 4, 13, 17))
    assert meter.macs(layer, torch.zeros(2, 4, 13, 17)) == out.numel() * 9 * 4 // groups


def test_attention_is_seen_in_both_modes() -> None:
    tokens, width, heads, batch = 6, 8, 2, 3
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    x = torch.randn(batch, tokens, width)
    work = 2 * batch * tokens * width * width * 4 + 2 * batch * tokens * tokens * width * 2  # projections; scores and mixing
    for training in (True, False):
        for weights in (True, False):
            assert meter.flops(layer.train(training), x, x, x, need_weights=weights) == work
    q = torch.randn(batch, heads, tokens, 4)
    assert meter.flops(nn.functional.scaled_dot_product_attention, q, q, q) == 2 * 2 * batch * heads * tokens * tokens * 4


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_in_both_modes(kind: type[nn.Module], gates: int) -> None:
    layer = kind(4, 5)
    for training in (True, False):
        assert meter.flops(layer.train(training), torch.randn(7, 2, 4)) == 2 * 7 * 2 * gates * 5 * (4 + 5)


def test_products_that_the_counter_of_torch_misses() -> None:
    a, v = torch.randn(3, 4), torch.randn(4)
    assert meter.flops(torch.mv, a, v) == meter.flops(torch.addmv, torch.randn(3), a, v) == 24
    assert meter.flops(torch.dot, v, v) == 8
    assert meter.flops(torch.einsum, "bij,bjk->bik", torch.randn(2, 3, 4), torch.randn(2, 4, 5)) == 2 * 2 * 3 * 4 * 5


def test_a_skipped_branch_costs_nothing() -> None:
    layer = nn.Linear(4, 4)
    assert meter.flops(lambda x: layer(x) if len(x) else x, torch.zeros(0, 4)) == 0


def test_a_whole_training_step_can_be_counted() -> None:
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(5, 7)).square().sum().backward()
        optimizer.step()

    assert meter.flops(step) == 2 * 5 * (2 * 7 * 11 + 3 * 11 * 3)


class Noisy(nn.Module):
    """Draws from every random stream, keeps statistics, replaces a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + random.random() + np.random.rand()  # noqa: NPY002
        return self.body(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "measure",
    [
        lambda m, x: meter.flops(m, x),
        lambda m, x: meter.flops(m, x, backward=True),
        lambda m, x: meter.saved_bytes(m, x),
        lambda m, x: meter.profile(m, x, repeats=2),
    ],
)
def test_a_meter_leaves_no_trace(measure, training: bool) -> None:  # type: ignore[no-untyped-def]
    model, x = Noisy().train(training), torch.randn(8, 4)
    model.body[2].eval()
    model(x).sum().backward()
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}  # type: ignore[union-attr]
    state = {n: v.clone() for n, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    kernels = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    measure(model, x)
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert kernels == (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled())
    assert torch.equal(streams[0], torch.get_rng_state())
    assert streams[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002


def test_state_comes_back_after_an_error() -> None:
    model = Noisy()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        meter.flops(model, torch.randn(8, 5))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(BadInput, match="requires a gradient"):
        meter.flops(lambda: torch.zeros(3), backward=True)
