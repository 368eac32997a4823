"""Discrete wavelet transforms of images and signals as plain convolutions: exact, invertible, differentiable, exportable.

One level splits an axis into a coarse half (lo) and a detail half (hi), each the signal filtered and every second value kept:

    lo[k] = sum_j h[j] x[2k + 1 - j],   hi[k] = sum_j g[j] x[2k + 1 - j]

An image gives LL (coarse in both) and three detail bands; the next level transforms LL. For Haar, lo = (a + b)/sqrt 2 and hi =
(a - b)/sqrt 2 of neighbours a, b: an orthonormal change of basis, which keeps energy and loses nothing. With an orthonormal
wavelet the gradient of the transform is its inverse.

*Bands* of an image are (LH, HL, HH), the first letter for the way along a row, the second for the way down a column: LH sees horizontal
edges. That is PyWavelets' (cH, cV, cD), in its order.

*Modes* say what lies beyond the border: ``"zero"``, ``"periodization"`` (the shortest output, orthonormal), ``"symmetric"`` (edge value
repeated) and ``"reflect"`` (not repeated). Outputs equal PyWavelets' to rounding.

*Source*: Haar (1910), Daubechies (1992), Mallat (1989).

*Cost*: two products of filter length a value and axis; no parameters. Filters are constants of the call, so modules hold nothing
that could be left behind on another device.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput

__all__ = ["HaarDWT2d", "HaarIDWT2d", "dwt1", "dwt2", "idwt1", "idwt2", "wavelet_filters"]

MODES = ("zero", "periodization", "symmetric", "reflect")
Bands = tuple[Tensor, Tensor, Tensor]


def wavelet_filters(name: str = "haar", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The analysis filters (h, g) of an orthonormal wavelet: ``haar``, ``db1`` to ``db10`` or ``sym2`` to ``sym4``.

    They are computed, not tabulated: the coarse filter of order p is a square root of the half-band polynomial with p zeros at pi,
    extremal phase (db: all roots inside the unit circle) or the most linear phase among all choices of roots (sym).
    """
    kind, order = ("db", "1") if name == "haar" else (name[:-1], name[-1]) if not name.endswith("10") else (name[:-2], "10")
    if kind not in ("db", "sym") or order not in [str(p) for p in (range(1, 11) if kind == "db" else range(2, 5))]:
        raise BadInput(f"wavelet {name!r} is none of haar, db1 to db10, sym2 to sym4")
    h = torch.tensor(_orthonormal(kind, int(order)), dtype=dtype or torch.get_default_dtype())
    sign = torch.ones_like(h)
    sign[::2] = -1
    return h, sign * h.flip(0)


def dwt1(x: Tensor, wavelet: str = "haar", levels: int = 1, mode: str = "zero") -> tuple[Tensor, list[Tensor]]:
    """``(..., time) -> (coarse, [details of level 1, 2, ...])``, finest details first."""
    h, g = _filters(x, wavelet)
    _check(x, levels, mode, 1)
    details = []
    for _ in range(levels):
        x, hi = _analyse(x, h, g, mode, -1)
        details.append(hi)
    return x, details


def idwt1(coarse: Tensor, details: list[Tensor], wavelet: str = "haar", mode: str = "zero", size: int | None = None) -> Tensor:
    """The inverse of :func:`dwt1`; ``size`` is the signal's length if it is odd."""
    h, g = _filters(coarse, wavelet)
    for hi in reversed(details):
        coarse = _synthesise(coarse[..., : hi.shape[-1]], hi, h, g, mode, -1)
    return coarse if size is None else coarse[..., :size]


def dwt2(x: Tensor, wavelet: str = "haar", levels: int = 1, mode: str = "zero") -> tuple[Tensor, list[Bands]]:
    """``(..., height, width) -> (LL, [(LH, HL, HH) of level 1, 2, ...])``, finest details first; each level halves both sides."""
    h, g = _filters(x, wavelet)
    _check(x, levels, mode, 2)
    details = []
    for _ in range(levels):
        lo, hi = _analyse(x, h, g, mode, -2)
        x, hl = _analyse(lo, h, g, mode, -1)
        lh, hh = _analyse(hi, h, g, mode, -1)
        details.append((lh, hl, hh))
    return x, details


def idwt2(
    coarse: Tensor, details: list[Bands], wavelet: str = "haar", mode: str = "zero", size: tuple[int, int] | None = None
) -> Tensor:  # fmt: skip
    """The inverse of :func:`dwt2`; ``size`` is the image's height and width if one of them is odd."""
    h, g = _filters(coarse, wavelet)
    for lh, hl, hh in reversed(details):
        coarse = coarse[..., : lh.shape[-2], : lh.shape[-1]]  # a level whose input was odd gave one value too many
        lo, hi = _synthesise(coarse, hl, h, g, mode, -1), _synthesise(lh, hh, h, g, mode, -1)
        coarse = _synthesise(lo, hi, h, g, mode, -2)
    return coarse if size is None else coarse[..., : size[0], : size[1]]


class HaarDWT2d(nn.Module):
    """``(batch, channels, h, w) -> (batch, 4 channels, h/2, w/2)``: the bands LL, LH, HL, HH one after another, each of all channels.

    One level of :func:`dwt2` for even sides, in four additions a pixel. Without parameters or buffers.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            raise BadInput(f"sides {tuple(x.shape[-2:])} must be even: pad first")
        a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        top, bottom, left, right = a + b, c + d, a - b, c - d
        return torch.cat([top + bottom, top - bottom, left + right, left - right], 1) / 2


class HaarIDWT2d(nn.Module):
    """The inverse of :class:`HaarDWT2d`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 4:
            raise BadInput(f"{x.shape[1]} channels are not four bands")
        ll, lh, hl, hh = x.chunk(4, 1)
        top, bottom, left, right = ll + lh, ll - lh, hl + hh, hl - hh
        rows = [torch.stack([m + d, m - d], -1).flatten(-2) for m, d in ((top, left), (bottom, right))]
        return torch.stack(rows, -2).flatten(-3, -2) / 2


def _filters(x: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    if not x.is_floating_point():
        raise BadInput(f"a transform needs floating-point numbers, x is {x.dtype}")
    h, g = wavelet_filters(wavelet, torch.float64)
    return h.to(x), g.to(x)


def _check(x: Tensor, levels: int, mode: str, axes: int) -> None:
    if mode not in MODES:
        raise BadInput(f"mode {mode!r} is none of {', '.join(MODES)}")
    if levels < 1:
        raise BadInput(f"levels = {levels} must be at least 1")
    if x.ndim < axes or 0 in x.shape[-axes:]:
        raise BadInput(f"x {tuple(x.shape)} has no {axes} axes to transform")


def _analyse(x: Tensor, h: Tensor, g: Tensor, mode: str, axis: int) -> tuple[Tensor, Tensor]:
    """Coarse and detail halves along one axis."""
    x = x.movedim(axis, -1)
    n, taps = x.shape[-1], len(h)
    if mode == "periodization":
        x = torch.cat([x, x[..., -1:]], -1) if n % 2 else x
        count = x.shape[-1] // 2
        first = 2 - taps + taps // 2 - 1  # position of the first value that output 0 reads
        x = x[..., torch.arange(first, first + 2 * (count - 1) + taps) % x.shape[-1]]
    else:
        count = (n + taps - 1) // 2
        x = _extend(x, taps - 2, 2 * count - n, mode)
    kernel = torch.stack([h, g]).flip(1)[:, None]
    out = F.conv1d(x.reshape(-1, 1, x.shape[-1]), kernel, stride=2)
    lo, hi = out.view(*x.shape[:-1], 2, count).unbind(-2)
    return lo.movedim(-1, axis), hi.movedim(-1, axis)


def _extend(x: Tensor, before: int, after: int, mode: str) -> Tensor:
    if mode == "zero":
        return F.pad(x, (before, after))
    n = x.shape[-1]
    place = torch.arange(-before, n + after)
    if mode == "symmetric":
        place = place % (2 * n)
        place = torch.where(place < n, place, 2 * n - 1 - place)
    else:
        place = place % max(2 * n - 2, 1)
        place = torch.where(place < n, place, 2 * n - 2 - place)
    return x[..., place]


def _synthesise(lo: Tensor, hi: Tensor, h: Tensor, g: Tensor, mode: str, axis: int) -> Tensor:
    both = torch.stack([lo.movedim(axis, -1), hi.movedim(axis, -1)], -2)  # (..., 2, count)
    count, taps = both.shape[-1], len(h)
    kernel = torch.stack([h, g]).flip(1)[:, None]
    out = F.conv_transpose1d(both.reshape(-1, 2, count), kernel, stride=2)
    out = out.view(*both.shape[:-2], out.shape[-1])
    if mode == "periodization":  # what hangs over the ends belongs to the other side
        n = 2 * count
        first = 2 - taps + taps // 2 - 1
        place = torch.arange(first, first + out.shape[-1]) % n
        out = torch.zeros(*out.shape[:-1], n, dtype=out.dtype, device=out.device).index_add(-1, place.to(out.device), out)
    else:
        out = out[..., taps - 2 : out.shape[-1] - (taps - 2)]
    return out.movedim(-1, axis)


@functools.cache
def _orthonormal(kind: str, order: int) -> list[float]:
    """Daubechies' construction: roots in z of the half-band polynomial, one of each pair (z, 1/z)."""
    # P(y) = sum_k C(p - 1 + k, k) y^k with y = (2 - z - 1/z) / 4; z^k roots by substitution
    half = [math.comb(order - 1 + k, k) for k in range(order)]
    roots = []
    for y in np.roots(half[::-1]):
        b = 1 - 2 * y
        z = b + np.sqrt(b * b - 1 + 0j)
        roots.append(z if abs(z) < 1 else 1 / z)
    groups: list[list[complex]] = []  # conjugates go together, so that the filter is real
    for z in sorted(roots, key=lambda z: (abs(z), z.real, -z.imag)):
        if abs(z.imag) < 1e-10:
            groups.append([complex(z.real)])
        elif z.imag > 0:
            groups.append([z, z.conjugate()])
    best, straightest = None, math.inf
    choices = itertools.product((False, True), repeat=len(groups)) if kind == "sym" else [(False,) * len(groups)]
    w = np.linspace(0.1, np.pi - 0.1, 200)
    for choice in choices:
        chosen = [1 / z if out else z for group, out in zip(groups, choice) for z in group]
        h = np.real(np.poly([-1.0] * order + chosen))
        h *= math.sqrt(2) / h.sum()
        phase = np.unwrap(np.angle(np.exp(-1j * np.outer(w, np.arange(2 * order))) @ h))
        bend = float(np.abs(phase - np.polyval(np.polyfit(w, phase, 1), w)).max())
        if bend < straightest - 1e-9:
            best, straightest = h, bend
    return best[::-1].tolist()
