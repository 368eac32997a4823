"""Uniform quantisation: evenly spaced levels, for a whole tensor or for each channel.

A grid maps a number to the integer code ``q = clip(round(x / s) + z, low, high)`` and the code back to ``s (q - z)``; round is to nearest,
halves to even. *Symmetric* grids have z = 0 and the codes -(2^(b-1) - 1) .. 2^(b-1) - 1 (one fewer than b bits allow, so that -x is on the
grid with x); *affine* ones shift an interval that contains 0 onto 0 .. 2^b - 1, and 0 stays exact.

Rounding has no useful gradient; the straight-through estimator takes 1. Then ``grid(x)`` has gradient 1 inside the range and 0 outside with
respect to x, and with respect to the scale ``round(x/s) - x/s`` inside and the clipped code outside: that of a learned step size (LSQ).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["UniformGrid", "affine_grid", "round_ste", "symmetric_grid"]


def round_ste(x: Tensor) -> Tensor:
    """Rounds to the nearest integer (halves to even); the gradient passes as if it had not."""
    return torch.round(x).detach() + (x - x.detach())


@dataclass(frozen=True)
class UniformGrid:
    """Levels s (q - z) for codes q in low..high.

    Attributes:
        scale: s > 0, a scalar or (channels,); may require a gradient.
        zero: z, integers of the same shape.
        low, high: least and largest code.
        axis: the channel dimension where there is one scale a channel, else None.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    axis: int | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.high - self.low).bit_length()

    def __call__(self, x: Tensor) -> Tensor:
        """x on the grid, in x's dtype, with the straight-through gradient."""
        scale, zero = self._along(x)
        return scale * (torch.clamp(round_ste(x / scale) + zero, self.low, self.high) - zero)

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes, int8, uint8 or int32, whichever is the smallest that holds them."""
        if not torch.isfinite(x).all():
            raise BadInput("values that are not finite have no code")
        scale, zero = self._along(x)
        q = torch.clamp(torch.round(x.detach() / scale.detach()) + zero, self.low, self.high)
        small = torch.int8 if self.low >= -128 and self.high <= 127 else torch.uint8 if self.low >= 0 and self.high <= 255 else torch.int32
        return q.to(small)

    def values(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for, in the scale's dtype."""
        scale, zero = self._along(codes)
        return scale * (codes.to(scale.dtype) - zero)

    def with_scale(self, scale: Tensor) -> UniformGrid:
        """The same codes with another step, e.g. a parameter that is learned."""
        return replace(self, scale=scale)

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if x.is_floating_point() else self.scale.dtype
        scale, zero = self.scale.to(dtype), self.zero.to(dtype)
        if self.axis is None:
            return scale, zero
        if x.shape[self.axis] != len(scale):
            raise BadInput(f"the grid has {len(scale)} channels along dimension {self.axis}, the tensor is {tuple(x.shape)}")
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return scale.view(shape), zero.view(shape)


def symmetric_grid(x: Tensor, bits: int, *, axis: int | None = None, shrink: float | Tensor = 1.0, unsigned: bool = False) -> UniformGrid:
    """The symmetric grid whose largest level is ``shrink`` times the largest |x| (of each channel along `axis`).

    With ``unsigned`` (activations after a ReLU) the codes are 0 .. 2^bits - 1. A channel of zeros gets scale 1.
    """
    _check(x, bits, least=1 if unsigned else 2)
    top = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    scale = _reduced(x.detach().abs(), axis, largest=True) * shrink / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return UniformGrid(scale, torch.zeros_like(scale, dtype=torch.int64), 0 if unsigned else -top, top, axis)


def affine_grid(low: Tensor | float, high: Tensor | float, bits: int, *, axis: int | None = None) -> UniformGrid:
    """The grid of 2^bits levels that spans [low, high], widened to contain 0. The ends are scalars, or (channels,) with `axis`."""
    low, high = torch.as_tensor(low, dtype=torch.get_default_dtype()), torch.as_tensor(high, dtype=torch.get_default_dtype())
    _check(low, bits, least=1), _check(high, bits, least=1)
    if (low > high).any():
        raise BadInput("a range must have low <= high")
    low, high = low.detach().clamp_max(0), high.detach().clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.clamp(torch.round(-low / scale), 0, 2**bits - 1).to(torch.int64)
    return UniformGrid(scale, zero, 0, 2**bits - 1, axis)


def _reduced(x: Tensor, axis: int | None, *, largest: bool) -> Tensor:
    if axis is None:
        return x.max() if largest else x.min()
    flat = x.movedim(axis, 0).flatten(1)
    return flat.amax(1) if largest else flat.amin(1)


def _check(x: Tensor, bits: int, *, least: int) -> None:
    if not least <= bits <= 24:
        raise BadInput(f"bits must be in {least}..24, got {bits}")
    if not x.numel() or not torch.isfinite(x).all():
        raise BadInput("a range needs at least one number, all of them finite")
