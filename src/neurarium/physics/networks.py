"""Networks of physics-informed solvers: (n, coordinates) -> (n, fields), on tensors and on jets alike.

Features first (:class:`BoxFeatures` makes periodicity exact), then a body. All are ordinary modules of ordinary torch functions; any
module written with functions that :mod:`neurarium.physics.jets` knows works in their place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput
from neurarium.physics.problem import Box

__all__ = ["MLP", "BoxFeatures", "FourierFeatures", "ModifiedMLP"]


class BoxFeatures(nn.Module):
    """Coordinates scaled to [-1, 1]; a periodic one becomes ``cos(k w x), sin(k w x)``, k = 1..modes, with w = 2 pi / period.

    Then the network repeats exactly, with all its derivatives, and no boundary term is needed.
    """

    def __init__(self, domain: Box, modes: int = 4) -> None:
        super().__init__()
        if modes < 1:
            raise BadInput(f"periodic features need at least one mode, got {modes}")
        self.domain, self.modes = domain, modes
        self.width = sum(2 * modes if name in domain.periodic else 1 for name in domain.coords)

    def forward(self, points: Any) -> Any:
        columns = []
        for i, (name, (lo, hi)) in enumerate(self.domain.bounds.items()):
            x = points[..., i]
            if name in self.domain.periodic:
                for k in range(1, self.modes + 1):
                    angle = x * (2 * math.pi * k / (hi - lo))
                    columns += [torch.cos(angle), torch.sin(angle)]
            else:
                columns.append((x - (lo + hi) / 2) * (2 / (hi - lo)))
        return torch.stack(columns, -1)


class FourierFeatures(nn.Module):
    """``cos(B x), sin(B x)`` of the scaled coordinates with a fixed Gaussian ``B`` of the given scale: against spectral bias."""

    B: Tensor

    def __init__(self, domain: Box, count: int = 32, scale: float = 1.0, modes: int = 4) -> None:
        super().__init__()
        self.scaled = BoxFeatures(domain, modes)
        self.register_buffer("B", scale * torch.randn(count, self.scaled.width))
        self.width = 2 * count

    def forward(self, points: Any) -> Any:
        angle = nn.functional.linear(self.scaled(points), self.B)
        return torch.cat([torch.cos(angle), torch.sin(angle)], -1)


def _dense(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """``depth`` tanh layers of ``width``, Glorot-initialised."""

    def __init__(self, inputs: int, outputs: int, width: int = 24, depth: int = 3) -> None:
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [_dense(inputs if i == 0 else width, width), nn.Tanh()]
        super().__init__(*layers, _dense(width if depth else inputs, outputs))


class ModifiedMLP(nn.Module):
    """An MLP whose every layer is gated by two encodings of the input: ``h <- a U + (1 - a) V`` with ``a = tanh(W h + b)``.

    *Source*: Wang, Teng and Perdikaris, Understanding and mitigating gradient pathologies in PINNs (2020), equations 42-45.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.first, self.second = _dense(inputs, width), _dense(inputs, width)
        self.hidden = nn.ModuleList(_dense(inputs if i == 0 else width, width) for i in range(depth))
        self.last = _dense(width if depth else inputs, outputs)

    def forward(self, x: Any) -> Any:
        u, v = torch.tanh(self.first(x)), torch.tanh(self.second(x))
        h, difference = x, u - v
        for layer in self.hidden:
            h = torch.tanh(layer(h)) * difference + v
        return self.last(h)
