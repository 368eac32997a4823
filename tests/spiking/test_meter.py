"""Spikes and synaptic operations, counted one by one on a small network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput
from neurarium.spiking.encode import direct
from neurarium.spiking.meter import SpikeMeter
from neurarium.spiking.net import SpikingSequential, unroll
from neurarium.spiking.neuron import LIF


def _by_hand(conv: nn.Conv2d, x: torch.Tensor) -> int:
    """Visits every product of the convolution that is not zero."""
    count, (kh, kw), per_group = 0, conv.kernel_size, conv.in_channels // conv.groups
    for row in x:
        padded = nn.functional.pad(row, [conv.padding[1]] * 2 + [conv.padding[0]] * 2)
        for i in range(0, padded.shape[1] - kh + 1, conv.stride[0]):
            for j in range(0, padded.shape[2] - kw + 1, conv.stride[1]):
                for out in range(conv.out_channels):
                    first = out // (conv.out_channels // conv.groups) * per_group
                    count += int((padded[first : first + per_group, i : i + kh, j : j + kw] != 0).sum())
    return count


@pytest.mark.parametrize("order", ["layer", "step"])
def test_counts_every_operation(order):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
    net = SpikingSequential(nn.Conv2d(1, 4, 1), LIF(0.5), conv, LIF(0.5), nn.Flatten(), nn.Linear(54, 5))
    x, seen = 3 * torch.randn(2, 1, 6, 6), {}
    for i in (1, 3):
        net[i].register_forward_hook(lambda m, a, y, i=i: seen.setdefault(i, []).append(y.detach().clone()))
    with SpikeMeter(net) as meter:
        unroll(net, direct(x, 4), order=order)
    unroll(net, direct(x, 4))  # no longer counted
    first, second = (torch.cat(seen[i])[:8] for i in (1, 3))
    assert meter.spikes == {"1": float(first.sum()), "3": float(second.sum())}
    assert meter.rate("1") == pytest.approx(float(first.mean()))
    assert meter.sops == {"2": _by_hand(conv, first), "5": 5 * float(second.sum())}
    assert meter.macs == {"0": 2 * 36 * 4}
    assert meter.joules() > 0
    with pytest.raises(BadInput, match="nowhere"):
        meter.rate("nowhere")
