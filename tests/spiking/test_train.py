"""SLTT and BPTT: where their gradients must be equal, what SLTT's is, and what they keep in memory."""

from __future__ import annotations

import copy
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import evaluate
from neurarium.meter import SavedBytes
from neurarium.spiking import nn as snn
from neurarium.spiking import train as train_module
from neurarium.spiking.encode import direct
from neurarium.spiking.net import OverTime, unroll
from neurarium.spiking.neuron import LI, LIF
from neurarium.spiking.surrogate import ATan
from neurarium.spiking.train import BPTT, SLTT, StepLoss


def _task(leak=0.5, *, reset="soft", norm="bn", dtype=torch.float64, steps=None):
    """A small network, a sequence of *different* images (batch, time, ...), and labels."""
    torch.manual_seed(1)
    neuron = partial(LIF, leak, reset=reset, surrogate=ATan())
    model = snn.vgg_small(1, 4, (4, 6), neuron=neuron, norm=norm).to(dtype)
    return OverTime(model, steps), 2 * torch.rand(5, 4, 1, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 3, 0])


def _gradient(rule, model, x, y):
    model = copy.deepcopy(model)
    loss, output = rule.gradients(model, x, y)
    return loss, output, [p.grad for p in model.parameters()]


def _close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_one_step_is_plain_backpropagation_for_both():
    model, x, y = _task(0.9)
    x = x[:, :1]
    reference = copy.deepcopy(model.net)
    StepLoss()(unroll(reference, x.transpose(0, 1))[0][0], y).backward()
    want = [p.grad for p in reference.parameters()]
    for rule in (SLTT(), SLTT(k=1), BPTT(order="step"), BPTT(), BPTT(checkpoint=True)):
        got = _gradient(rule, model, x, y)[2]
        assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_without_temporal_paths_the_rules_agree_for_every_number_of_steps():
    """leak = 0: nothing reaches the next step, whatever the reset."""
    for reset in ("hard", "soft"):
        for steps in (2, 3, 4):
            model, x, y = _task(0.0, reset=reset)
            (a, p, g), (b, q, h) = (_gradient(rule, model, x[:, :steps], y) for rule in (SLTT(), BPTT(order="step")))
            _close([a, p, *g], [b, q, *h], rtol=1e-10, atol=1e-13)


def test_the_gradient_is_the_sum_of_the_steps_own_bit_for_bit():
    model, x, y = _task(0.8, dtype=torch.float32)
    got = _gradient(SLTT(), model, x, y)[2]
    net, state, want = copy.deepcopy(model.net), {}, None
    for x_t in x.transpose(0, 1):
        state = {k: v.detach() for k, v in state.items()}
        o, state = unroll(net, x_t[None], state, order="step")
        grads = torch.autograd.grad(StepLoss()(o[0], y) / x.shape[1], list(net.parameters()))
        want = grads if want is None else [a + b for a, b in zip(want, grads)]
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert any(not torch.equal(a, b) for a, b in zip(got, _gradient(BPTT(order="step"), model, x, y)[2]))


def test_equals_the_fused_scan_with_time_detached():
    """The whole sequence at once through the fused kernel with the temporal path cut: another road to the same gradient."""
    model, x, y = _task(0.8, norm=None)
    want = _gradient(SLTT(), model, x, y)[2]
    outputs, _ = unroll(model.net, x.transpose(0, 1), order="layer", detach_time=True)
    torch.stack([StepLoss()(o, y) for o in outputs]).mean().backward()
    _close([p.grad for p in model.parameters()], want, rtol=1e-9, atol=1e-12)


def test_constant_images_give_the_gradient_of_the_repeated_ones():
    """With direct coding the first layers run once: the same gradient, and running statistics updated once."""
    model, x, y = _task(0.8, steps=4)
    for rule in (SLTT(), BPTT(order="step"), BPTT(order="step", checkpoint=3)):
        net = copy.deepcopy(model)
        rule.gradients(net, x[:, 0], y)
        assert [int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == [1, 4]
        once = _gradient(rule, model, x[:, 0], y)[2]
        each = _gradient(rule, OverTime(model.net, None), x[:, :1].repeat(1, 4, 1, 1, 1), y)[2]
        _close(once, each, rtol=1e-9, atol=1e-12)


def test_the_mean_over_all_subsets_of_k_steps_is_unbiased(monkeypatch):
    model, x, y = _task(0.8)
    model.eval()  # batch statistics fixed, so that a step does not see the others
    whole = _gradient(SLTT(), model, x, y)[2]
    subsets, drawn = list(combinations(range(4), 2)), []
    for subset in subsets:
        monkeypatch.setattr(train_module.torch, "randperm", lambda n, s=subset: torch.tensor([*s, *(set(range(n)) - set(s))]))
        drawn.append(_gradient(SLTT(k=2), model, x, y)[2])
    _close([torch.stack(g).mean(0) for g in zip(*drawn)], [g * 2 / 4 for g in whole], rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b) for a, b in zip(drawn[0], drawn[-1]))


def test_k_steps_are_drawn_from_all(monkeypatch):
    """Which steps are differentiated: recorded where the loss of a step is asked for."""
    model, x, y = _task()
    seen = []

    def loss(output, y):
        seen.append(output.requires_grad)
        return F.cross_entropy(output, y)

    torch.manual_seed(0)
    for _ in range(60):
        SLTT(k=1, loss=loss).gradients(model, x[:1, :, :, :4, :4].repeat(1, 1, 1, 2, 2), y[:1])
    counts = torch.tensor(seen).view(60, 4).long()
    assert (counts.sum(1) == 1).all()
    assert (counts.sum(0) >= 6).all()


def test_loss_and_output_are_those_of_bptt():
    model, x, y = _task(0.8)
    for other in (SLTT(), SLTT(k=2), BPTT(order="step", checkpoint=True)):
        _close(_gradient(other, model, x, y)[:2], _gradient(BPTT(order="step"), model, x, y)[:2])
    plain = StepLoss(mse=0.0)(x[:, 0, 0, 0, :4], y)
    assert plain == F.cross_entropy(x[:, 0, 0, 0, :4], y)
    assert StepLoss(1.0, "one_hot")(F.one_hot(y, 4).double(), y) == 0
    assert StepLoss(1.0)(torch.ones(5, 4), y) == 0


def _peak(rule, steps, model=None):
    torch.manual_seed(0)
    model = model or snn.vgg_small(1, 10, (8, 16, 16), steps=steps)
    x, y = torch.rand(4, 1, 16, 16), torch.arange(4)
    with SavedBytes() as meter:
        rule.gradients(model, x, y)
    assert meter.live == 0
    return meter.peak


def test_memory_is_that_of_one_step():
    sltt = {t: _peak(SLTT(), t) for t in (2, 6, 24)}
    assert sltt[2] == sltt[6] == sltt[24] == _peak(SLTT(k=2), 24)
    assert sltt[6] <= 1.05 * _peak(SLTT(), 1) + 4096  # the first layers' graph stays open meanwhile; it is one step's part too
    for order in ("layer", "step"):
        bptt = {t: _peak(BPTT(order=order), t) for t in (2, 6, 24)}
        assert bptt[24] > 3.5 * bptt[6] > 8 * bptt[2]
        assert sltt[6] < 0.35 * bptt[6]
    assert sltt[24] < _peak(BPTT(order="step", checkpoint=True), 24) < 0.5 * bptt[24]


def _loader():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (24,), generator=g)
    x = torch.rand(24, 1, 8, 8, generator=g) * 0.3
    for i, label in enumerate(y):
        x[i, 0, :, 2 * label : 2 * label + 2] += 0.7
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


@pytest.mark.parametrize("rule", [SLTT, partial(SLTT, k=2), partial(BPTT, order="step"), BPTT], ids=["sltt", "sltt2", "bptt", "layer"])
def test_learns_and_resumes_bit_for_bit(rule):
    rule = rule(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), loss=StepLoss(), steps=3)
    nets, histories = [], []
    for stop in (None, 4):
        torch.manual_seed(0)
        net = snn.vgg_small(1, 4, (4, 8))
        net.insert(6, nn.Dropout(0.1))
        history = rule.fit(net, _loader(), epochs=stop or 10, seed=3)
        if stop:
            torch.manual_seed(99)
            history = rule.fit(net, _loader(), epochs=10, seed=3, resume=history.state)
        nets.append(net.state_dict())
        histories.append(history)
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert [e["loss"] for e in histories[0].train] == [e["loss"] for e in histories[1].train]
    assert evaluate(rule.predictor(net), _loader())["accuracy"] > 0.9


def test_models_that_do_not_fit_are_refused_by_name():
    readout = nn.Sequential(nn.Linear(4, 3), LIF(0.5), nn.Linear(3, 2))
    readout.total = LI(1.0)
    with pytest.raises(UnsupportedModel, match="total"):
        SLTT(steps=2).fit(readout, [], epochs=1)
    with pytest.raises(UnsupportedModel, match="no spiking neuron"):
        BPTT(steps=2).fit(nn.Linear(4, 2), [], epochs=1)
    with pytest.raises(UnsupportedModel, match=r"1: GRU"):
        SLTT(steps=2).fit(nn.Sequential(LIF(0.5), nn.GRU(3, 3)), [], epochs=1)


def test_bad_input_is_refused():
    with pytest.raises(BadInput, match="k must"):
        SLTT(k=0)
    with pytest.raises(BadInput, match="share"):
        StepLoss(1.5)
    net = nn.Sequential(nn.Linear(4, 3), LIF(0.5), nn.Linear(3, 2))
    x, y = torch.zeros(2, 4), torch.tensor([0, 1])
    with pytest.raises(BadInput, match="not finite"):
        SLTT(steps=2).fit(net, [(x * float("nan"), y)], epochs=1)
    with pytest.raises(BadInput, match="single number"):
        SLTT(steps=2, loss=partial(F.cross_entropy, reduction="none")).fit(net, [(x, y)], epochs=1)
    with pytest.raises(BadInput, match=r"batch, time"):
        SLTT().fit(net, [(x, y)], epochs=1)


def test_direct_coding_is_the_default():
    net = snn.mlp(16, 2, (8,))
    x = torch.rand(3, 16)
    assert torch.equal(SLTT(steps=5).predictor(net)(x), unroll(net, direct(x, 5))[0].mean(0))
