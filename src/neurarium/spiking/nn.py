"""Small spiking networks, ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from neurarium.errors import BadInput
from neurarium.spiking.linear import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from neurarium.spiking.net import OverTime, SpikingSequential
from neurarium.spiking.neuron import LIF

__all__ = ["mlp", "vgg_small"]


def vgg_small(
    in_channels: int = 1,
    classes: int = 10,
    widths: Sequence[int] = (32, 64, 64),
    *,
    neuron: Callable[[], nn.Module] | None = None,
    norm: str | None = "bn",
    steps: int | None = None,
) -> nn.Module:
    """3x3 convolutions, each with normalisation, a neuron and 2x2 average pooling; the last is pooled to 2x2 and read out linearly.

    Takes one step (batch, in_channels, height, width) with height and width at least ``2 ** len(widths)`` and gives (batch, classes).
    With ``steps`` it is wrapped in :class:`~neurarium.spiking.net.OverTime`: an ordinary classifier of still images.
    ``neuron`` makes a neuron; LIF with tau = 1.1 by default.
    """
    if norm not in ("bn", None):
        raise BadInput(f"norm must be 'bn' or None, not {norm!r}")
    if not widths:
        raise BadInput("widths is empty: give the channels of at least one convolution")
    neuron = neuron or _lif
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        conv = nn.Conv2d if i == 0 else SpikeConv2d
        layers.append(conv(in_channels, width, 3, padding=1, bias=norm is None, **({"levels": 4} if i else {})))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [neuron(), SpikeAvgPool2d(2) if i < len(widths) - 1 else nn.AdaptiveAvgPool2d(2)]
        in_channels = width
    return _wrap([*layers, nn.Flatten(), nn.Linear(4 * in_channels, classes)], steps)


def mlp(
    in_features: int,
    classes: int,
    widths: Sequence[int] = (128,),
    *,
    neuron: Callable[[], nn.Module] | None = None,
    steps: int | None = None,
) -> nn.Module:
    """Linear layers with neurons in between: (batch, in_features) of one step, flattened if need be, to (batch, classes).

    ``neuron`` and ``steps`` as in :func:`vgg_small`.
    """
    neuron = neuron or _lif
    layers: list[nn.Module] = [nn.Flatten()]
    for i, width in enumerate(widths):
        layers += [(SpikeLinear if i else nn.Linear)(in_features, width), neuron()]
        in_features = width
    return _wrap([*layers, SpikeLinear(in_features, classes)], steps)


def _lif() -> LIF:
    return LIF(tau=1.1)


def _wrap(layers: list[nn.Module], steps: int | None) -> nn.Module:
    net = SpikingSequential(*layers).to(memory_format=torch.channels_last)  # a quarter faster on CPUs, the same numbers
    return net if steps is None else OverTime(net, steps)
