"""Maps as packed integer codes.

:class:`Grid` says which numbers the codes 0 .. 2^bits - 1 stand for: uniform, affine, with 0 on the grid. :class:`Coded` is a map stored
so, several codes in a byte: what a trace of the allocations then shows are the bytes of the codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Coded", "Grid", "byte_buffer"]


@dataclass(frozen=True)
class Grid:
    """x is round(x / scale) + zero, in 0 .. 2^bits - 1."""

    bits: int
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, bits: int) -> Grid:
        """The grid of this range, widened to contain 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(low.dtype).tiny)
        return cls(bits, scale, (-low / scale).round())

    def codes(self, x: Tensor) -> Tensor:
        return ((x / self.scale).round() + self.zero).clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero) * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """Rounded; gradients pass as if it had not been, inside the range."""
        rounded = self.values(self.codes(x))
        if not x.requires_grad:
            return rounded
        inside = self.values(torch.tensor([0.0, 2.0**self.bits - 1], dtype=x.dtype, device=x.device))
        passed = x.clamp(inside[0], inside[1])
        return passed + (rounded - passed).detach()


@dataclass(frozen=True)
class Coded:
    """A map as packed codes in a buffer of bytes, from the first byte on."""

    buffer: Tensor
    shape: tuple[int, ...]
    grid: Grid

    @staticmethod
    def size(numel: int, bits: int) -> int:
        """Bytes."""
        return -(-numel * bits // 8)

    def write(self, x: Tensor) -> None:
        codes, each = self.grid.codes(x).to(torch.uint8).flatten(), 8 // self.grid.bits
        if each > 1:
            codes = torch.cat([codes, codes.new_zeros(-len(codes) % each)]).view(-1, each)
            codes = (codes << _shifts(self.grid.bits, codes)).sum(1, dtype=torch.uint8)
        self.buffer[: len(codes)] = codes

    def read(self) -> Tensor:
        numel, bits = math.prod(self.shape), self.grid.bits
        codes = self.buffer[: self.size(numel, bits)]
        if bits < 8:
            codes = ((codes[:, None] >> _shifts(bits, codes)) & (2**bits - 1)).flatten()[:numel]
        return self.grid.values(codes.to(self.grid.scale.dtype)).view(self.shape)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def byte_buffer(like: Tensor, n: int) -> Tensor:
    """``n`` bytes where ``like`` is."""
    return torch.empty(n, dtype=torch.uint8, device=like.device)
