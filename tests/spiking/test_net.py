"""The executor: two orders, states, checkpoints, any module; coding and the layers that save bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import SavedBytes
from neurarium.spiking import nn as snn
from neurarium.spiking.encode import direct, latency, poisson
from neurarium.spiking.linear import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from neurarium.spiking.net import OverTime, SpikingSequential, reset, split, step, unroll
from neurarium.spiking.neuron import IF, LI, LIF


class Block(nn.Module):
    """A residual block with a forward of its own, a nested Sequential, and one neuron used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Sequential(nn.GroupNorm(2, width), LIF(0.7)))
        self.last = LIF(0.4, detach_reset=False)
        self.gate = LIF(0.6)

    def forward(self, x):
        y = self.gate(self.body(x)) + self.gate(x)
        return self.last(y + x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Linear(4, 3)
        self.readout = LI(0.9)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.head(x.mean((2, 3))))


def _residual():
    torch.manual_seed(0)
    return Residual().double(), 2 * torch.randn(5, 2, 1, 6, 6, dtype=torch.float64)


def _gradients(model, loss):
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]


def _close(a, b, **tolerance):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, **tolerance)


def test_both_orders_checkpoints_and_chunks_agree_on_any_module():
    model, x = _residual()
    y, state = unroll(model, x)
    want = _gradients(model, y.square().sum())
    assert set(state) == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("body.1.1", "gate", "gate#1", "last")} | {"readout"}
    runs = {"step": {"order": "step"}, "checkpoint": {"checkpoint": True}, "both": {"order": "step", "checkpoint": 2}}
    for options in runs.values():
        other, left = unroll(model, x, **options)
        _close([y], [other])
        _close(list(state.values()), [left[k] for k in state])
        _close(want, _gradients(model, other.square().sum()), rtol=1e-9, atol=1e-11)
    outputs, carried = [], None
    for x_t in x:
        y_t, carried = step(model, x_t, carried)
        outputs.append(y_t)
    _close([y], [torch.stack(outputs)])


def test_rows_of_a_batch_do_not_meet():
    model, x = _residual()
    y, _ = unroll(model, x)
    for i in range(2):
        _close([y[:, i : i + 1]], [unroll(model, x[:, i : i + 1])[0]])


def test_cutting_time_is_the_same_in_both_orders():
    model, x = _residual()
    a = _gradients(model, unroll(model, x, detach_time=True)[0].square().sum())
    b = _gradients(model, unroll(model, x, order="step", detach_time=True)[0].square().sum())
    _close(a, b, rtol=1e-9, atol=1e-11)
    whole = _gradients(model, unroll(model, x)[0].square().sum())
    assert any(not torch.allclose(c, d) for c, d in zip(a, whole))


def test_state_is_the_callers():
    model, x = _residual()
    y, _ = unroll(model, x)
    _, state = unroll(model, x[:2])
    before = {k: v.clone() for k, v in state.items()}
    second, _ = unroll(model, x[2:], state)
    _close([y[2:]], [second])
    assert all(torch.equal(state[k], v) for k, v in before.items())
    reset(model)
    assert torch.equal(y, unroll(model, x)[0])  # nothing was left behind
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}
    with pytest.raises(BadInput, match="nowhere"):
        unroll(model, x, {"nowhere": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"blocks\.0\.last"):
        unroll(model, x[:, :1], {"blocks.0.last": state["blocks.0.last"]})


def test_a_checkpointed_run_updates_statistics_and_draws_noise_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), LIF(0.5), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    results = []
    for options in ({}, {"checkpoint": 2}):
        net = copy.deepcopy(model)
        torch.manual_seed(7)
        y, _ = unroll(net, x, order="step", **options)
        results.append((y, _gradients(net, y.square().sum()), dict(net.named_buffers())))
    (y, want, buffers), (other, got, others) = results
    assert torch.equal(y, other)
    _close(want, got)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, others[name]), name
    assert buffers["1.num_batches_tracked"] == 6


def test_checkpoints_save_memory():
    x = direct(torch.rand(4, 1, 16, 16), 16)
    model = snn.vgg_small(1, 10, (4, 8, 8))
    peaks = {}
    for name, options in {"all": {}, "sqrt": {"checkpoint": True}}.items():
        with SavedBytes() as meter:
            unroll(model, x, order="step", **options)[0].sum().backward()
        peaks[name] = meter.peak
    assert 0.25 < peaks["sqrt"] / peaks["all"] < 0.5  # four steps of sixteen, and the states between


def test_constant_input_runs_the_first_layers_once():
    model = snn.vgg_small(1, 10, (4, 8)).double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    first, rest = split(model, direct(x, 5))
    assert [type(m) for m in first] == [nn.Conv2d, nn.BatchNorm2d]
    assert len(rest) + 2 == len(model)
    assert split(model, direct(x, 5).clone())[0] is None
    for order in ("layer", "step"):
        once = unroll(model, direct(x, 5), order=order)[0]
        each = unroll(model, direct(x, 5).clone(), order=order)[0]
        _close([once], [each])
        _close(_gradients(model, once.square().sum()), _gradients(model, each.square().sum()), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GRU(4, 4), "body.0"),
        (nn.LSTMCell(4, 4), "body.0"),
        (nn.MultiheadAttention(4, 1), "body.0"),
        (nn.TransformerEncoderLayer(4, 1, 8), "body.0.self_attn"),
        (OverTime(nn.Sequential(IF()), 3), "body.0"),
    ],
)
def test_modules_with_a_memory_of_their_own_are_named(module, name):
    model = nn.Sequential()
    model.body = nn.Sequential(module, LIF(0.5))
    with pytest.raises(UnsupportedModel, match=name) as error:
        unroll(model, torch.zeros(3, 2, 4))
    assert error.value.module == name


def test_neurons_of_peers_are_refused_by_name():
    snntorch = pytest.importorskip("snntorch")
    with pytest.raises(UnsupportedModel, match="like_snntorch"):
        unroll(nn.Sequential(nn.Linear(4, 4), snntorch.Leaky(0.5, init_hidden=True)), torch.zeros(3, 2, 4))


def test_a_layer_that_moves_the_batch_is_named():
    class Flip(nn.Module):
        def forward(self, x):
            return x.flatten()[:-1]

    with pytest.raises(UnsupportedModel, match="1: got"):
        unroll(nn.Sequential(Flip(), IF()), torch.zeros(3, 2, 5))


@pytest.mark.parametrize("x", [torch.zeros(0, 2, 5), torch.zeros(3, 0, 5), torch.zeros(3)])
def test_empty_input_is_refused(x):
    with pytest.raises(BadInput, match="at least one step"):
        unroll(nn.Sequential(IF()), x)


def test_whole_networks_are_ordinary_modules():
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    for model in (snn.vgg_small(1, 10, (4, 8), steps=4).eval(), snn.mlp(64, 10, (16, 16), steps=4)):
        y = model(x)
        assert y.shape == (3, 10)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)
        _close([unroll(model.net, direct(x, 4))[0].mean(0)], [y])
        exported = torch.export.export(model, (x,)).module()
        _close([exported(x)], [y])
    sequence = torch.rand(3, 6, 1, 8, 8)  # (batch, time, ...)
    net = snn.vgg_small(1, 10, (4, 8)).eval()
    _close([OverTime(net, None)(sequence)], [net(sequence.transpose(0, 1)).mean(0)])
    assert isinstance(net, SpikingSequential)


@pytest.mark.parametrize("values", ["spikes", "pooled", "real"])
def test_layers_that_save_bits_give_the_ordinary_gradient(values):
    torch.manual_seed(0)
    x = (torch.rand(6, 4, 8, 8) < 0.3).float()
    x = {"spikes": x, "pooled": nn.functional.avg_pool2d(x, 2), "real": torch.rand(6, 4, 8, 8)}[values]
    conv = SpikeConv2d(4, 8, 3, padding=1, stride=2, levels=4)
    plain = nn.Conv2d(4, 8, 3, padding=1, stride=2)
    linear, flat = SpikeLinear(x[0].numel(), 5, levels=4), nn.Linear(x[0].numel(), 5)
    plain.load_state_dict(conv.state_dict())
    flat.load_state_dict(linear.state_dict())
    for ours, theirs, at in ((conv, plain, x), (linear, flat, x.flatten(1))):
        results = []
        for layer in (ours, theirs):
            a = at.clone().requires_grad_()
            before = a * 1.0  # not a leaf, so that what is saved is counted
            with SavedBytes() as meter:
                y = layer(before)
            results.append((y, meter.peak, torch.autograd.grad(y.square().sum(), [a, *layer.parameters()])))
        assert torch.equal(results[0][0], results[1][0])
        for g, h in zip(results[0][2], results[1][2]):
            torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-6)
        assert results[0][1] == (x.numel() * (1 if values != "real" else 4))


@pytest.mark.parametrize("settings", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}])
def test_pooling_that_keeps_nothing_gives_the_ordinary_gradient(settings):
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        for layer in (SpikeAvgPool2d(**settings), nn.AvgPool2d(**settings)):
            a = x.to(memory_format=memory_format).requires_grad_()
            with SavedBytes() as meter:
                y = layer(a * 1.0)
            results.append((y, torch.autograd.grad(y.pow(3).sum(), a)[0], meter.peak))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert results[0][2] == 0 < results[1][2]


def test_coding():
    x = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    assert direct(x, 7).shape == (7, 1, 4)
    spikes = poisson(x.expand(1, 4), 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(spikes.mean(0), x, atol=0.03, rtol=0)
    once = latency(x, 5)
    assert once.sum(0).tolist() == [[0, 1, 1, 1]]
    assert once.argmax(0)[0, 1:].tolist() == [3, 2, 0]
    for code in (poisson, latency):
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            code(x - 0.5, 3)
    with pytest.raises(BadInput, match="steps"):
        direct(x, 0)
