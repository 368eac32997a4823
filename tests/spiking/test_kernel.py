"""The fused scan against the loop of ordinary operations, closed forms, and the peers' neurons."""

from __future__ import annotations

import itertools

import pytest
import torch

from neurarium.errors import BadInput
from neurarium.meter import SavedBytes
from neurarium.spiking import kernel
from neurarium.spiking.kernel import lif_loop, lif_sequence
from neurarium.spiking.neuron import IF, LIF
from neurarium.spiking.surrogate import ATan, GaussianSG, Rectangle, SigmoidSG, SuperSpike, Triangle, spike

RESETS = ("soft", "hard", "none", "delayed")
VARIANTS = list(itertools.product(RESETS, (True, False), (True, False)))
SURROGATES = [Triangle(), Triangle(0.5), Rectangle(), ATan(), SigmoidSG(), SuperSpike(), GaussianSG(0.1, 0.4)]


def _both(run, reset, detach_reset, detach_time, *, dtype=torch.float64, strict=False, numbers=False, rest=False):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 3, 4, 2, 2, generator=g, dtype=dtype).mul_(1.5).requires_grad_()
    v0 = torch.randn(3, 4, 2, 2, generator=g, dtype=dtype).requires_grad_()
    leak = torch.rand(4, 1, 1, generator=g, dtype=dtype).requires_grad_()
    threshold = (0.5 + torch.rand(4, 1, 1, generator=g, dtype=dtype)).requires_grad_()
    w, u = torch.randn(5, 3, 4, 2, 2, generator=g, dtype=dtype), torch.randn(3, 4, 2, 2, generator=g, dtype=dtype)
    wrt = [x, v0, leak, threshold]
    if numbers:
        leak, threshold, wrt = 0.7, 0.9, [x, v0]
    if rest:
        v0, wrt = None, [a for a in wrt if a is not v0]
    spikes, v = run(
        x, v0, leak=leak, threshold=threshold, reset=reset, v_reset=0.1 if reset == "hard" else 0.0, surrogate=ATan(),
        detach_reset=detach_reset, detach_time=detach_time, strict=strict,
    )  # fmt: skip
    return spikes, v, torch.autograd.grad((spikes * w).sum() + (v * u).sum(), wrt, allow_unused=True)


@pytest.mark.parametrize(("reset", "detach_reset", "detach_time"), VARIANTS)
def test_equals_the_loop_in_values_and_all_gradients(reset, detach_reset, detach_time, monkeypatch):
    for block, options in itertools.product((2**16, 32), ({}, {"strict": True}, {"numbers": True}, {"rest": True})):
        monkeypatch.setattr(kernel, "BLOCK", block)  # with 32, two rows of the batch at a time: 2 + 1
        ours = _both(lif_sequence, reset, detach_reset, detach_time, **options)
        loop = _both(lif_loop, reset, detach_reset, detach_time, **options)
        assert torch.equal(ours[0], loop[0])
        torch.testing.assert_close(ours[1], loop[1], rtol=1e-14, atol=1e-14)
        for a, b in zip(ours[2], loop[2]):
            if a is None or b is None:  # cut: one of the two may say so by None, the other by zeros
                assert all(c is None or not c.any() for c in (a, b))
            else:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reset", ["soft", "none"])
def test_is_bit_for_bit_the_loop_in_float32(reset):
    """With the paper's neuron (numbers, detached reset), also the gradients."""
    for detach_time in (True, False):
        ours = _both(lif_sequence, reset, True, detach_time, dtype=torch.float32, numbers=True, rest=True)
        loop = _both(lif_loop, reset, True, detach_time, dtype=torch.float32, numbers=True, rest=True)
        assert torch.equal(ours[0], loop[0])
        assert torch.equal(ours[2][0], loop[2][0])


def test_chained_calls_equal_one_call():
    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    for reset in RESETS:
        whole, v = lif_sequence(x, leak=0.6, reset=reset, detach_reset=False)
        first, middle = lif_sequence(x[:2], leak=0.6, reset=reset, detach_reset=False)
        second, last = lif_sequence(x[2:], middle, leak=0.6, reset=reset, detach_reset=False)
        parts = torch.cat([first, second])
        assert torch.equal(whole, parts)
        assert torch.equal(v, last)
        w = torch.randn_like(whole)
        a, b = (torch.autograd.grad((s * w).sum(), x, retain_graph=True)[0] for s in (whole, parts))
        torch.testing.assert_close(a, b)


def test_constant_current_fires_at_the_closed_form_rate():
    """An integrate-and-fire neuron with soft reset fires floor(t * current / threshold) times in t steps."""
    current = torch.tensor([[0.125, 0.3125, 0.5, 1.0]]).expand(64, 1, 4)
    spikes, v = lif_sequence(current, leak=1.0)
    t = torch.arange(1, 65).view(-1, 1, 1)
    assert torch.equal(spikes.cumsum(0), (t * current).floor())
    assert torch.equal(v, 64 * current[0] - spikes.sum(0))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_surrogates_are_bumps(surrogate):
    x = torch.linspace(-400, 400, 800_001, dtype=torch.float64)
    g = surrogate.grad(x)
    assert (g >= 0).all()
    assert abs(float(x[g.argmax()]) - getattr(surrogate, "mu", 0.0)) < (0.51 if isinstance(surrogate, Rectangle) else 1e-3)
    area = {SuperSpike: 2 / 10}.get(type(surrogate), 1.0)
    assert float(torch.trapezoid(g, x)) == pytest.approx(area, rel=5e-3)
    y = torch.tensor([-0.2, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    s = spike(y, surrogate)
    assert s.tolist() == [0, 1, 1]
    assert torch.equal(torch.autograd.grad(s.sum(), y)[0], surrogate.grad(y.detach()))


def test_saves_one_tensor_of_the_inputs_size():
    x = torch.randn(8, 4, 16, 8, 8, requires_grad=True)
    for reset in ("soft", "hard"):
        with SavedBytes() as meter:
            spikes, v = lif_sequence(x, leak=0.5, reset=reset, detach_reset=False)
        assert meter.peak == x.numel() * 4
        del spikes, v
        assert meter.live == 0
    with torch.no_grad(), SavedBytes() as meter:
        lif_sequence(x, leak=0.5)
    assert meter.peak == 0


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
def test_equals_snntorch(reset_mechanism):
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    x = torch.randn(12, 5, 7, dtype=torch.float64).requires_grad_()
    peer = snntorch.Leaky(beta=0.8, threshold=0.9, reset_mechanism=reset_mechanism).double()
    mem, out = torch.zeros(5, 7, dtype=torch.float64), []
    for x_t in x:
        s, mem = peer(x_t, mem)
        out.append(s)
    theirs = torch.stack(out)
    ours = LIF.like_snntorch(float(peer.beta), float(peer.threshold), reset_mechanism)(x)
    assert 0.05 < float(ours.detach().mean()) < 0.6
    assert torch.equal(ours, theirs.double())
    w = torch.randn_like(ours)
    a, b = (torch.autograd.grad((s * w).sum(), x)[0] for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # the peer's spikes are float32 whatever the input


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
def test_equals_spikingjelly(decay_input, detach_reset, v_reset):
    pytest.importorskip("loguru")  # which spikingjelly imports
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    x = (1.5 * torch.randn(12, 5, 7, dtype=torch.float64) + 0.5).requires_grad_()
    options = {"tau": 1.6, "decay_input": decay_input, "v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    theirs = neuron.LIFNode(**options, step_mode="m")(x)
    ours = LIF.like_spikingjelly(**options)
    if v_reset:  # rest is where the membrane leaks to; the peer starts at v_reset too
        assert ours.threshold == pytest.approx(1.05)
    ours = ours(x)
    assert 0.05 < float(ours.detach().mean()) < 0.6
    assert torch.equal(ours, theirs)
    w = torch.randn_like(ours)
    a, b = (torch.autograd.grad((s * w).sum(), x)[0] for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_learned_settings_get_gradients_per_channel():
    lif = LIF(0.5, learn_leak=True, learn_threshold=True, per_channel=3).double()
    x = torch.randn(6, 2, 3, 4, dtype=torch.float64)
    lif(x).sum().backward()
    assert lif.leak_logit.grad.shape == lif.level.grad.shape == (3,)
    alone = LIF(0.5, learn_leak=True, learn_threshold=True).double()
    alone(x[:, :, 1:2]).sum().backward()
    torch.testing.assert_close(alone.leak_logit.grad, lif.leak_logit.grad[1])
    torch.testing.assert_close(alone.level.grad, lif.level.grad[1])


def test_nothing_is_carried_between_calls():
    lif = IF()
    x = torch.full((3, 1, 1), 0.4)
    assert torch.equal(lif(x), lif(x))
    assert not list(lif.buffers())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lif_sequence(torch.zeros(0, 2, 3), leak=0.5), "at least one step"),
        (lambda: lif_sequence(torch.zeros(3), leak=0.5), "time, batch"),
        (lambda: lif_sequence(torch.zeros(2, 2, dtype=torch.int64), leak=0.5), "floating-point"),
        (lambda: lif_sequence(torch.zeros(2, 2, 3), torch.zeros(2, 4), leak=0.5), "state"),
        (lambda: lif_sequence(torch.zeros(2, 2), leak=0.5, reset="gentle"), "'delayed'"),
        (lambda: LIF(), "either leak or tau"),
        (lambda: LIF(0.5, tau=2.0), "either leak or tau"),
        (lambda: LIF(1.5), "leak must lie"),
        (lambda: LIF(tau=0.5), "tau"),
        (lambda: LIF(0.5, threshold=0.0), "threshold"),
        (lambda: LIF(0.5, learn_leak=True, per_channel=3)(torch.zeros(2, 2, 4)), "3 channels"),
        (lambda: Triangle(width=0.0), "width"),
    ],
)
def test_errors_say_what_would_be_right(call, words):
    with pytest.raises(BadInput, match=words):
        call()
