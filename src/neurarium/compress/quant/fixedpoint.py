"""Numbers as integers over a power of two: rescaling by multiply and shift, and fixed-point formats.

*Dyadic rescaling.* An integer network accumulates at scale s_w s_x and has to go on at scale s_y. The factor S = s_w s_x / s_y becomes
m / 2^e with a 31-bit integer m (relative error <= 2^-31), and ``(acc * m + 2^(e-1)) >> e`` is round-half-up(acc * m / 2^e) by one
multiplication, one addition and one arithmetic shift (which floors, hence adding half first is right for negative numbers too).

*Fixed point.* The format <WL, FL> holds the multiples of 2^-FL in [-2^(WL-FL-1), 2^(WL-FL-1) - 2^-FL]. Rounding stochastically, up with the
probability of the fraction, makes the expected value exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["Dyadic", "dyadic", "fixed_codes", "fixed_point"]


@dataclass(frozen=True)
class Dyadic:
    """The factor m / 2^e: ``multiplier`` in 0 .. 2^31 and ``shift`` in 1 .. 62, int64, a scalar or one a channel."""

    multiplier: Tensor
    shift: Tensor

    def value(self) -> Tensor:
        """m / 2^e in float64."""
        return torch.ldexp(self.multiplier.double(), -self.shift)

    def rescale(self, acc: Tensor, *, low: int | None = None, high: int | None = None, axis: int | None = None) -> Tensor:
        """round-half-up(acc m / 2^e), clipped to low..high, in integers only.

        Args:
            acc: integers of at most 32 bits (any integer dtype).
            axis: the dimension of acc along which the factors run, where there is one a channel.

        Returns:
            int64; the caller narrows it.
        """
        if acc.is_floating_point() or acc.is_complex() or acc.dtype == torch.bool:
            raise BadInput(f"rescale takes integers, got {acc.dtype}")
        m, e = self.multiplier, self.shift
        if axis is not None:
            shape = [1] * acc.ndim
            shape[axis] = -1
            m, e = m.view(shape), e.view(shape)
        half = torch.bitwise_left_shift(torch.ones_like(e), e - 1)
        y = torch.bitwise_right_shift(acc.to(torch.int64) * m + half, e)
        return y if low is None and high is None else torch.clamp(y, low, high)


def dyadic(scale: Tensor | float) -> Dyadic:
    """The dyadic number nearest to each scale, with 31 bits.

    Scales must lie in (0, 2^30). Below 2^-31 fewer bits remain (a 64-bit product must not overflow); the error is then at most 2^-63.
    """
    device = scale.device if isinstance(scale, Tensor) else None
    scale = torch.as_tensor(scale, dtype=None if device else torch.float64).detach().cpu().double()
    if not ((scale > 0) & (scale < 2.0**30)).all():
        raise BadInput("a scale must be in (0, 2^30)")
    exponent = torch.frexp(scale).exponent
    shift = (31 - exponent.to(torch.int64)).clamp_max(62)
    return Dyadic(torch.floor(torch.ldexp(scale, shift) + 0.5).to(device, torch.int64), shift.to(device))


def fixed_codes(
    x: Tensor, word: int, frac: int, *, rounding: str = "nearest", generator: torch.Generator | None = None
) -> Tensor:
    """The integers that stand for x in the format <word, frac>, int64, rounded ("nearest", halves to even, or "stochastic") and clipped."""
    if not 1 <= word <= 32 or not 0 <= frac <= 32:
        raise BadInput(f"a fixed-point format needs 1 <= word <= 32 and 0 <= frac <= 32, got <{word}, {frac}>")
    if rounding not in ("nearest", "stochastic"):
        raise BadInput(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    scaled = x.detach().double() * 2.0**frac
    if not torch.isfinite(scaled).all():
        raise BadInput("values that are not finite have no fixed-point code")
    if rounding == "stochastic":
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=generator.device if generator else x.device)
        scaled = torch.floor(scaled + noise.to(x.device))
    else:
        scaled = torch.round(scaled)
    return scaled.clamp(-(2.0 ** (word - 1)), 2.0 ** (word - 1) - 1).to(torch.int64)


def fixed_point(
    x: Tensor, word: int, frac: int, *, rounding: str = "stochastic", generator: torch.Generator | None = None
) -> Tensor:
    """x in the format <word, frac>, in x's dtype; the gradient passes straight through.

    A dtype of fewer than `word` significant bits (float32: 24) rounds once more.
    """
    codes = fixed_codes(x, word, frac, rounding=rounding, generator=generator)
    return (codes.double() * 2.0**-frac).to(x.dtype) + (x - x.detach())
