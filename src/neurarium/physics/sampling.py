"""Where the residual is asked to vanish: samplers of collocation points.

A sampler is called ``sampler(domain, generator, dtype) -> points`` (n, coordinates) each time that the engine wants fresh points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from neurarium.errors import BadInput
from neurarium.physics.problem import Box

__all__ = ["Slices", "Uniform"]


@dataclass(frozen=True)
class Uniform:
    """Independent uniform points."""

    points: int = 2048

    def __post_init__(self) -> None:
        if self.points < 1:
            raise BadInput(f"a sampler needs at least one point, got {self.points}")

    def __call__(self, domain: Box, generator: Generator, dtype: torch.dtype) -> Tensor:
        return domain.points(torch.rand(self.points, len(domain.coords), generator=generator, dtype=dtype))


@dataclass(frozen=True)
class Slices:
    """``times`` instants, one at random in each of as many equal intervals, with ``points`` random places at each."""

    times: int = 32
    points: int = 64

    def __post_init__(self) -> None:
        if self.times < 1 or self.points < 1:
            raise BadInput(f"slices need at least one time and one point, got {self.times} and {self.points}")

    def __call__(self, domain: Box, generator: Generator, dtype: torch.dtype) -> Tensor:
        if domain.time is None:
            raise BadInput("slices need a time coordinate, Box(..., time='t')")
        unit = torch.rand(self.times, self.points, len(domain.coords), generator=generator, dtype=dtype)
        jitter = torch.rand(self.times, 1, generator=generator, dtype=dtype)
        unit[:, :, domain.coords.index(domain.time)] = (torch.arange(self.times, dtype=dtype)[:, None] + jitter) / self.times
        return domain.points(unit.flatten(0, 1))
