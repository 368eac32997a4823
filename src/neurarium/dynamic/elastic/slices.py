"""The vocabulary of elastic networks: units that layers share (:class:`Width`), how many of them run (:class:`Config`), and layers that
use the leading slices of their tensors (:class:`Sliced`)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput

__all__ = ["Config", "Sliced", "Width", "adopt", "fits"]


@dataclass(frozen=True)
class Config:
    """How much of an elastic model runs: units of each :class:`Width` and blocks of each :class:`~neurarium.dynamic.elastic.layers.Depth`,
    in the order of :func:`~neurarium.dynamic.elastic.configs.slots`."""

    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[int, ...]:
        return (*self.widths, *self.depths)

    def within(self, other: Config) -> bool:
        """Whether every slice of this config lies in that of ``other``."""
        return len(self.key) == len(other.key) and all(a <= b for a, b in zip(self.key, other.key))


@dataclass(eq=False)
class Width:
    """Units that several layers share; ``active`` of ``size`` are in use, in multiples of ``step`` (a group norm's whole groups)."""

    name: str
    size: int
    step: int = 1
    active: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.step < 1 or self.size % self.step:
            raise BadInput(f"{self.name}: {self.size} units do not come in steps of {self.step}")
        self.active = self.active or self.size

    def at(self, ratio: float) -> int:
        """The units nearest to a share of all, at least one step."""
        return self.step * min(max(1, round(ratio * self.size / self.step)), self.size // self.step)

    @property
    def values(self) -> range:
        return range(self.step, self.size + 1, self.step)


class Sliced(nn.Module):
    """A layer whose tensors are used by their leading slices."""

    #: keeps batch statistics, of which each config has its own
    batch = False
    _axes: dict[str, dict[int, Width]]

    def axes(self) -> dict[str, dict[int, Width]]:
        """Which dimension of which tensor follows which width."""
        return self._axes

    def _track(self, axes: dict[str, dict[int, Width]]) -> None:
        self._axes = axes
        self.follows = tuple({id(w): w for dims in axes.values() for w in dims.values()}.values())

    def part(self, name: str) -> Tensor | None:
        """The slice of a parameter that is in use, a view."""
        tensor: Tensor | None = getattr(self, name, None)
        if tensor is not None:
            for dim, width in self._axes.get(name, {}).items():
                if width.active < width.size:
                    tensor = tensor.narrow(dim, 0, width.active * (tensor.shape[dim] // width.size))
        return tensor

    def plain(self) -> nn.Module:
        """The ordinary layer of the present slice, with copied weights."""
        raise NotImplementedError

    def _copy_to(self, layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor is not None:
                    own = getattr(layer, name)
                    value = tensor.detach().clone()
                    setattr(layer, name, nn.Parameter(value, tensor.requires_grad) if isinstance(own, nn.Parameter) else value)
        return layer.train(self.training)


def fits(width: Width | None, features: int, what: str) -> None:
    """Raise :class:`BadInput` unless so many features are a whole number for each unit."""
    if width is not None and features % width.size:
        raise BadInput(f"{features} {what} cannot follow {width.name!r} of {width.size} units")


def adopt(module: nn.Module, cls: type[nn.Module]) -> Any:
    """The same tensors as a module of another class; the original stays as it was."""
    new = cls.__new__(cls)
    new.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    return new
