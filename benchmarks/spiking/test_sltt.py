"""One training step of one network: our BPTT and SLTT beside BPTT in snntorch and spikingjelly. Time, and bytes kept for backward.

    pytest benchmarks/spiking -s

Same architecture, weights, data, neuron (leak 0.09, soft reset, arctangent surrogate), steps and loss everywhere; that the losses agree
is checked before anything is timed. One thread, the measured steps in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import data
from neurarium.meter import SavedBytes, latency
from neurarium.spiking import nn as snn
from neurarium.spiking.kernel import lif_loop, lif_sequence
from neurarium.spiking.neuron import LIF
from neurarium.spiking.surrogate import ATan
from neurarium.spiking.train import BPTT, SLTT

STEPS, BATCH, WIDTHS, TAU = 8, 32, (16, 32, 32), 1.1


def _ours(neuron: Callable[[], nn.Module], steps: int = STEPS) -> nn.Module:
    torch.manual_seed(0)
    return snn.vgg_small(1, 10, WIDTHS, neuron=neuron, steps=steps)


def _spikingjelly_neuron() -> LIF:
    return LIF.like_spikingjelly(TAU, False, 1.0, None, True, surrogate=ATan())


def _snntorch_neuron() -> LIF:
    return LIF.like_snntorch(1 - 1 / TAU, surrogate=ATan())


def _stack(conv: Any, norm: Any, neuron: Any, pool: Any, adaptive: Any, flatten: Any, linear: Any) -> list[nn.Module]:
    layers, channels = [], 1
    for i, width in enumerate(WIDTHS):
        layers += [conv(channels, width, 3, padding=1, bias=False), norm(width), neuron(), adaptive(2) if i == len(WIDTHS) - 1 else pool(2)]
        channels = width
    return [*layers, flatten(), linear(4 * channels, 10)]


class SnntorchStep:
    """The loop over time as its tutorials write it, states handed from step to step."""

    def __init__(self) -> None:
        import snntorch
        from snntorch import surrogate

        leaky = partial(snntorch.Leaky, beta=1 - 1 / TAU, spike_grad=surrogate.atan(alpha=2.0))
        self.net = nn.ModuleList(_stack(nn.Conv2d, nn.BatchNorm2d, leaky, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear))
        self.leaky = snntorch.Leaky

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        states = {m: m.reset_mem() for m in self.net if isinstance(m, self.leaky)}
        losses = []
        for _ in range(STEPS):
            a = x
            for m in self.net:
                if isinstance(m, self.leaky):
                    a, states[m] = m(a, states[m])
                else:
                    a = m(a)
            losses.append(F.cross_entropy(a, y))
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss


class SpikingjellyStep:
    """Its fast form: every layer on all steps at once (``step_mode="m"``)."""

    def __init__(self) -> None:
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        lif = partial(neuron.LIFNode, TAU, False, 1.0, None, surrogate.ATan(alpha=2.0), True)
        layers = _stack(layer.Conv2d, layer.BatchNorm2d, lif, layer.AvgPool2d, layer.AdaptiveAvgPool2d, layer.Flatten, layer.Linear)
        self.net, self.reset = nn.Sequential(*layers), functional.reset_net
        functional.set_step_mode(self.net, "m")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.net(x.unsqueeze(0).repeat(STEPS, 1, 1, 1, 1))
        loss = torch.stack([F.cross_entropy(o, y) for o in out]).mean()
        loss.backward()
        self.reset(self.net)
        return loss


def _load(peer: nn.Module, ours: nn.Module) -> None:
    theirs = [p for p in peer.parameters() if p.dim()]
    with torch.no_grad():
        for a, b in zip(theirs, ours.parameters(), strict=True):
            a.copy_(b)


def _ours_step(rule: BPTT | SLTT, neuron: Callable[[], nn.Module] = _spikingjelly_neuron) -> Callable[[Tensor, Tensor], Tensor]:
    net = _ours(neuron)
    return lambda x, y: rule.gradients(net, x, y)[0]


def test_one_training_step() -> None:
    torch.set_num_threads(1)
    task = data.images("mnist", train=BATCH, test=10, seed=0)
    x, y = task.train.x, task.train.y
    steps = {
        "BPTT, layer order": _ours_step(BPTT(loss="cross_entropy")),
        "BPTT, step order": _ours_step(BPTT(loss="cross_entropy", order="step")),
        "SLTT": _ours_step(SLTT(loss="cross_entropy")),
        "SLTT-2": _ours_step(SLTT(loss="cross_entropy", k=2)),
    }
    peers = {}
    for name, build, neuron, order in (
        ("snntorch, BPTT", SnntorchStep, _snntorch_neuron, "step"),
        ("spikingjelly, BPTT", SpikingjellyStep, _spikingjelly_neuron, "layer"),
    ):
        try:
            peer = build()
        except ImportError as error:
            print(f"\n{name} is left out: {error}")
            continue
        _load(peer.net, _ours(neuron))
        same = _ours_step(BPTT(loss="cross_entropy", order=order), neuron)
        torch.testing.assert_close(peer(x, y).detach(), same(x, y), rtol=1e-4, atol=1e-5)
        peers[name] = peer
    if not peers:
        pytest.skip("neither snntorch nor spikingjelly is here: pip install 'neurarium[bench]'")
    steps |= peers
    seconds = latency({name: partial(step, x, y) for name, step in steps.items()}, repeats=15, warmup=2)
    saved = {}
    for name, step in steps.items():
        with SavedBytes() as meter:
            step(x, y)
        saved[name] = meter.peak
    fastest, smallest = min(seconds[p].median for p in peers), min(saved[p] for p in peers)
    print(f"\n{'one step, T = 8, 32 images':28}{'ms':>8}{'to best peer':>14}{'MiB kept':>10}{'to best peer':>14}")
    for name in steps:
        ms, kept = seconds[name].median, saved[name]
        print(f"{name:28}{1e3 * ms:>8.1f}{ms / fastest:>14.2f}{kept / 2**20:>10.2f}{kept / smallest:>14.2f}")
    assert saved["SLTT"] < saved["BPTT, step order"] < smallest


@pytest.mark.parametrize("shape", [(8, 16, 32, 16, 16), (6, 64, 32, 14, 14), (6, 64, 16, 28, 28)], ids=str)
def test_fused_scan_beside_the_loop(shape: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def both(run: Callable[..., tuple[Tensor, Tensor]]) -> None:
        x.grad = None
        run(x, leak=0.5)[0].backward(g)

    times = latency({"loop": partial(both, lif_loop), "fused": partial(both, lif_sequence)}, repeats=20)
    saved = {}
    for name, run in {"loop": lif_loop, "fused": lif_sequence}.items():
        with SavedBytes() as meter:
            kept = run(x, leak=0.5)  # holds the graph while it is measured
        saved[name] = meter.peak
        del kept
    ms = {name: 1e3 * t.median for name, t in times.items()}
    print(f"\n{shape}: loop {ms['loop']:.1f} ms, fused {ms['fused']:.1f} ms, ratio {ms['loop'] / ms['fused']:.2f}; ", end="")
    print(f"kept {saved['loop'] / 2**20:.1f} MiB and {saved['fused'] / 2**20:.1f} MiB")
