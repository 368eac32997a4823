"""A scalar carried over a torus by a fixed wind: a stand-in for weather whose informative places are known exactly.

A field q on a square grid follows q <- P q + forcing. P moves it along a wind that is the same for all sequences (a mean flow with eddies,
free of divergence), with bilinear interpolation, and lets it fade. A few hidden sources force it, each with a signal of its own that
changes from step to step; so the field lives in plumes behind the sources, and elsewhere there is little to see. Observations carry
noise, targets do not. P is linear and known, hence so is what a sensor is good for: see :attr:`FieldTask.influence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurarium.data.tensors import TensorData, generator
from neurarium.errors import BadInput

__all__ = ["FieldTask", "advected_field"]

_CHUNK = 20  # sequences drawn at a time, each with a generator of its own
_FADE, _MEMORY, _WARMUP = 0.85, 0.85, 40  # what a step leaves of the field and of a source's signal; steps before the first seen one


@dataclass(frozen=True, eq=False)
class FieldTask:
    """Past fields (n, before, size, size) with the ones to come (n, after, size, size), both in units of the field's deviation.

    ``influence`` (size, size): the deviation of the clean field in a cell times the norm of all the coming fields that a unit there
    makes, sqrt(sum_tau |P^tau e|^2). ``wind`` (2, size, size): cells a step, down and to the right. ``sources`` (k, 2): their cells.
    """

    train: TensorData
    test: TensorData
    influence: Tensor
    wind: Tensor
    sources: Tensor
    name: str = "advected-field"
    note: str = "a scalar in plumes behind hidden sources on a torus"


def advected_field(
    train: int = 600,
    test: int = 100,
    *,
    size: int = 24,
    before: int = 4,
    after: int = 4,
    sources: int = 6,
    noise: float = 0.05,
    seed: int = 0,
) -> FieldTask:
    """Sequences of a field that a fixed wind carries.

    Args:
        train, test: numbers of sequences.
        size: cells a side.
        before, after: steps seen and steps to predict.
        sources: how many force the field.
        noise: standard deviation of the error of a sensor; the field's is 1.
        seed: of everything, the wind and the sources included.
    """
    if min(train, test, before, after, sources) < 1 or size < 4 or sources > size * size or not 0 <= noise < math.inf:
        got = f"{train=}, {test=}, {size=}, {before=}, {after=}, {sources=}, {noise=}"
        raise BadInput(f"every number must be at least 1, size 4, noise 0 and the sources fit the grid; got {got}")
    g = generator(seed, 2, 0)
    wind = _wind(size, g)
    step = _FADE * _carry(wind)  # (cells, cells)
    places = torch.randperm(size * size, generator=g)[:sources]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    away = [((a - b[:, None, None] + size / 2) % size - size / 2).square() for a, b in ((y, places // size), (x, places % size))]
    shapes = (-(away[0] + away[1]) / 2).exp().flatten(1)  # (sources, cells)
    parts = []
    for part, n in enumerate((train, test)):
        drawn = [_draw(generator(seed, part, i), step, shapes, before, after) for i in range(-(-n // _CHUNK))]
        parts.append([torch.cat(t)[:n] for t in zip(*drawn, strict=True)])
    unit = parts[0][0].std()
    tasks = []
    for fields, errors in parts:
        fields = (fields / unit).unflatten(2, (size, size))
        seen = fields[:, :before] + noise * errors.unflatten(2, (size, size))
        tasks.append(TensorData(seen, fields[:, before:].contiguous()))
    spread = (parts[0][0] / unit).std((0, 1))
    reach, power = torch.zeros(size * size), step
    for _ in range(after):
        reach, power = reach + power.square().sum(0), power @ step
    influence = (spread * reach.sqrt()).view(size, size)
    return FieldTask(*tasks, influence, wind, torch.stack([places // size, places % size], 1))  # type: ignore[call-arg, arg-type]


def _wind(size: int, g: torch.Generator) -> Tensor:
    """A mean flow of one cell a step in a random direction, and eddies about as strong: the curl of a few long waves."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angle = 2 * math.pi * torch.rand((), generator=g)
    wind = torch.stack([angle.sin().expand(size, size), angle.cos().expand(size, size)])
    for wave in ((1, 0), (0, 1), (1, 1), (2, 1)):
        phase = 2 * math.pi * (wave[0] * y + wave[1] * x) / size + 2 * math.pi * torch.rand((), generator=g)
        strength = 0.7 * torch.randn((), generator=g) / math.hypot(*wave)
        wind = wind + strength * phase.cos() * torch.tensor([wave[1], -wave[0]])[:, None, None]
    return wind


def _carry(wind: Tensor) -> Tensor:
    """(cells, cells): each cell takes the value that lies upwind of it, bilinear between four cells."""
    size = wind.shape[1]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    up, left = y - wind[0], x - wind[1]
    matrix, row = torch.zeros(size * size, size * size), torch.arange(size * size)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - (up - up.floor() - dy).abs()) * (1 - (left - left.floor() - dx).abs())
            cell = (up.floor().long() + dy) % size * size + (left.floor().long() + dx) % size
            matrix.index_put_((row, cell.flatten()), weight.flatten(), accumulate=True)
    return matrix


def _draw(g: torch.Generator, step: Tensor, shapes: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Clean fields (chunk, before + after, cells), and errors of deviation 1 (chunk, before, cells)."""
    q, signal, seen = torch.zeros(_CHUNK, step.shape[0]), torch.zeros(_CHUNK, len(shapes)), []
    for _ in range(_WARMUP + before + after):
        signal = _MEMORY * signal + torch.randn(signal.shape, generator=g)
        q = q @ step.T + signal @ shapes
        seen.append(q)
    return torch.stack(seen[_WARMUP:], 1), torch.randn(_CHUNK, before, step.shape[0], generator=g)
