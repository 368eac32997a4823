"""Random features: a function of two vectors, split into a part that sees the input only and a part that sees the weights only.

    k(x, (w, b)) = E[psi(w, b) . phi(x)],   phi(x) and psi(w, b) of m numbers each, from m random directions g_1..g_m

The estimate is unbiased for every m and its variance falls like 1/m. Of a layer it makes something linear in psi: it can be trained as
it is, multiplied with the next layer, or solved in closed form (:mod:`.kernel_layer`); of softmax attention it makes a linear cost.

* :class:`URF`: **f(w.x + b)** for any f with a Fourier transform F. With f(z) = int F(xi) exp(2 pi i xi z) d xi and
  E exp(g.(u + v)) = exp(|u + v|^2 / 2), which also holds for complex u = 2 pi i xi s w (squares without conjugation), v = x / s:
  ``phi(x)_j = exp(g_j.x/s - |x|^2/2s^2) / sqrt(m)``,
  ``psi(w, b)_j = Re sum_l a_l exp(2 pi i xi_l (b + s g_j.w) + 2 (pi xi_l s |w|)^2) / sqrt(m)``. phi never sees xi.
* :class:`ArcCos`: the mean over all directions of h(g.u) h(g.v), h the step (order 0) or ReLU (order 1).
* :class:`RFF`: the Gaussian kernel exp(-|u - v|^2 / 2 s^2). :class:`PositiveExp`: exp(u.v / s^2), the softmax kernel, never negative.
* :class:`Poly`: (u.v / s^2)^p.

Except in ``URF``, where b is a phase, u = (x, 1) and v = (w, b).

*Source*: Sehanobish et al., "Scalable Neural Network Kernels" (2023), universal random features; Cho and Saul (2009), arc-cosine; Rahimi
and Recht (2007), RFF; Choromanski et al. (2021), positive and orthogonal features; Kar and Karnick (2012), polynomials.

*Departures*: a function without an integrable Fourier transform (ReLU, GELU) is multiplied by a Gaussian window and, on request, smoothed
by a Gaussian, which keeps high frequencies from blowing up psi; its spectrum comes from one FFT, and all its frequencies are used unless
``frequencies=k`` asks to sample k of them in proportion to |F|.

*Cost*: phi is one product with the m x d matrix G. G is a buffer: fixed, saved with the model, but a function of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput

__all__ = ["RFF", "URF", "ArcCos", "Poly", "PositiveExp", "RandomFeatures", "orthogonal_gaussian"]


def orthogonal_gaussian(m: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """m rows that are each N(0, I_d) and, in blocks of d, orthogonal to one another (m, d): the variance of most features is smaller."""
    blocks = []
    for start in range(0, m, d):
        q, r = torch.linalg.qr(torch.randn(d, min(d, m - start), generator=generator))
        blocks.append((q * r.diagonal().sign()).T)  # the sign makes the directions uniform
    norms = torch.randn(m, d, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks) * norms if blocks else norms


class RandomFeatures(nn.Module):
    """m random directions and what is computed with them; calling it is :meth:`phi`.

    Args:
        in_features, num_features: d and m.
        orthogonal: directions in orthogonal blocks; independent ones otherwise.
        seed: of the directions.
        scale: s.
        bias: whether x is extended by a constant 1, which meets b.
    """

    pointwise = False  # phi(x) = h(G x + g), with h applied to each number on its own: what bundling needs

    def __init__(
        self, in_features: int, num_features: int, *, orthogonal: bool = True, seed: int = 0, scale: float = 1.0, bias: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        if in_features < 1 or num_features < 1 or not scale > 0:
            raise BadInput(f"in_features = {in_features} and num_features = {num_features} must be at least 1, scale = {scale} above 0")
        self.in_features, self.num_features, self.orthogonal, self.scale, self.bias = in_features, num_features, orthogonal, scale, bias
        self.register_buffer("G", torch.empty(num_features, in_features))
        self.register_buffer("offset", torch.empty(num_features))
        self.redraw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New directions (from a CPU generator). Whatever was trained on the old ones is lost."""
        g = self._directions(self.num_features, generator)
        self.G.copy_(g[:, : self.in_features])
        self.offset.copy_(g[:, self.in_features] if self.bias else torch.zeros(len(g)))

    def _directions(self, m: int, generator: torch.Generator | None) -> Tensor:
        d = self.in_features + self.bias
        return (orthogonal_gaussian(m, d, generator) if self.orthogonal else torch.randn(m, d, generator=generator)) / self.scale

    def project(self, x: Tensor) -> Tensor:
        """G x + g (..., m)."""
        if x.shape[-1] != self.in_features:
            raise BadInput(f"{type(self).__name__} has {self.in_features} inputs, the last axis of x {tuple(x.shape)} is another")
        return functional.linear(x, self.G, self.offset)

    def phi(self, x: Tensor) -> Tensor:
        """Features of the input (..., d) -> (..., m)."""
        raise NotImplementedError

    def psi(self, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Features of the weights (..., d), (...) -> (..., m). Here the same as the input's; b in the place of the constant 1."""
        return self._of_projection(self._project_weights(w, b), w, b)

    def kernel(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """What psi(w, b) . phi(x) estimates, exactly: (..., d), (..., d), (...) -> (...)."""
        raise NotImplementedError

    def variance(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Of that estimate, with independent directions."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_features}, scale={self.scale:.4g}, orthogonal={self.orthogonal}"

    def _project_weights(self, w: Tensor, b: Tensor | None) -> Tensor:
        flat = functional.linear(w, self.G)
        return flat if b is None else flat + b[..., None] * self.offset

    def _of_projection(self, p: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _lift(self, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """|u|^2, |v|^2 and u.v of the extended vectors."""
        ones = float(self.bias)
        b = torch.zeros((), dtype=w.dtype, device=w.device) if b is None or not self.bias else b
        return x.square().sum(-1) + ones, w.square().sum(-1) + b.square(), (x * w).sum(-1) + ones * b


class _Pointwise(RandomFeatures):
    pointwise = True

    def activate(self, p: Tensor) -> Tensor:
        """h of the projections, with its factor."""
        raise NotImplementedError

    def phi(self, x: Tensor) -> Tensor:
        return self.activate(self.project(x))

    def _of_projection(self, p: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return self.activate(p)


class ArcCos(_Pointwise):
    """Steps (``order=0``) or ReLUs (1) of random projections.

    E = (pi - t) / 2 pi, or |u| |v| (sin t + (pi - t) cos t) / 2 pi, where t is the angle between u and v.
    """

    def __init__(self, in_features: int, num_features: int, order: int = 1, **options: Any) -> None:
        if order not in (0, 1):
            raise BadInput(f"order is 0 or 1, not {order}")
        super().__init__(in_features, num_features, **options)
        self.order = order

    def activate(self, p: Tensor) -> Tensor:
        return (functional.relu(p) if self.order else (p > 0).to(p.dtype)) / math.sqrt(self.num_features)

    def kernel(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        uu, vv, uv = self._lift(x, w, b)
        norms, t = self._angle(uu, vv, uv)
        if self.order == 0:
            return (math.pi - t) / (2 * math.pi)
        return norms * (t.sin() + (math.pi - t) * t.cos()) / (2 * math.pi * self.scale**2)

    def variance(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        norms, t = self._angle(*self._lift(x, w, b))
        mean = self.kernel(x, w, b)
        square = mean  # of a product of steps
        if self.order:
            square = norms**2 * (3 * t.sin() * t.cos() + (math.pi - t) * (1 + 2 * t.cos() ** 2)) / (2 * math.pi * self.scale**4)
        return (square - mean**2) / self.num_features

    @staticmethod
    def _angle(uu: Tensor, vv: Tensor, uv: Tensor) -> tuple[Tensor, Tensor]:
        norms = (uu * vv).sqrt()
        return norms, (uv / norms).clamp(-1, 1).acos()


class RFF(_Pointwise):
    """Cosines of random projections with random phases: E = exp(-|u - v|^2 / 2 s^2)."""

    def redraw(self, generator: torch.Generator | None = None) -> None:
        super().redraw(generator)
        if not hasattr(self, "phase"):
            self.register_buffer("phase", torch.empty(self.num_features))
        self.phase.copy_(2 * math.pi * torch.rand(self.num_features, generator=generator))

    def activate(self, p: Tensor) -> Tensor:
        return (p + self.phase).cos() * math.sqrt(2 / self.num_features)

    def kernel(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        uu, vv, uv = self._lift(x, w, b)
        return ((2 * uv - uu - vv) / (2 * self.scale**2)).exp()

    def variance(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        k = self.kernel(x, w, b)
        return (1 + k**4 / 2 - k**2) / self.num_features


class PositiveExp(RandomFeatures):
    """exp(g.u - |u|^2 / 2): never negative, E = exp(u.v / s^2). The variance grows like exp(|u + v|^2 / s^2): keep inputs small."""

    def phi(self, x: Tensor) -> Tensor:
        return self._exponential(self.project(x), x.square().sum(-1) + float(self.bias))

    def _of_projection(self, p: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return self._exponential(p, w.square().sum(-1) + (0 if b is None or not self.bias else b.square()))

    def _exponential(self, p: Tensor, squares: Tensor) -> Tensor:
        return (p - squares[..., None] / (2 * self.scale**2)).exp() / math.sqrt(self.num_features)

    def kernel(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return (self._lift(x, w, b)[2] / self.scale**2).exp()

    def variance(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        uu, vv, uv = (t / self.scale**2 for t in self._lift(x, w, b))
        return ((uu + vv + 4 * uv).exp() - (2 * uv).exp()) / self.num_features


class Poly(RandomFeatures):
    """Products of ``degree`` random projections: E = (u.v / s^2)^degree."""

    def __init__(self, in_features: int, num_features: int, degree: int = 2, **options: Any) -> None:
        if degree < 1:
            raise BadInput(f"degree = {degree} must be at least 1")
        self.degree = degree
        super().__init__(in_features, num_features, **options)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New directions: G has the ``degree`` factors stacked along its rows."""
        g = torch.cat([self._directions(self.num_features, generator) for _ in range(self.degree)])
        if len(self.G) != len(g):
            self.G, self.offset = self.G.new_empty(len(g), self.in_features), self.offset.new_empty(len(g))
        self.G.copy_(g[:, : self.in_features])
        self.offset.copy_(g[:, self.in_features] if self.bias else torch.zeros(len(g)))

    def phi(self, x: Tensor) -> Tensor:
        return self._of_projection(self.project(x), x, None)

    def _of_projection(self, p: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return p.unflatten(-1, (self.degree, self.num_features)).prod(-2) / math.sqrt(self.num_features)

    def kernel(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return (self._lift(x, w, b)[2] / self.scale**2) ** self.degree

    def variance(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        uu, vv, uv = (t / self.scale**2 for t in self._lift(x, w, b))
        return ((uu * vv + 2 * uv**2) ** self.degree - uv ** (2 * self.degree)) / self.num_features


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "gelu": functional.gelu, "tanh": torch.tanh}


class URF(RandomFeatures):
    """f(w.x + b) for f = "sin", "cos", "relu", "gelu", "tanh" or a function of a tensor.

    sin and cos are exact, being single frequencies. Any other f is multiplied by exp(-z^2 / 2 window^2) and smoothed by a Gaussian of
    width ``smooth``; :meth:`kernel` is that function. psi holds exp(2 (pi xi)^2 (s^2 |w|^2 - smooth^2)): a ``smooth`` of at least
    s |w| bounds it, a smaller one lets high frequencies dominate the variance. ``frequencies=k`` samples k of them, proportionally to |F|;
    :meth:`variance` is over the directions, given the frequencies.
    """

    def __init__(
        self, in_features: int, num_features: int, f: str | Callable[[Tensor], Tensor] = "cos", *, window: float = 3.0,
        smooth: float = 0.0, frequencies: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        spectrum = _spectrum(f, window, smooth)
        options.setdefault("bias", False)  # b is a phase
        if options["bias"]:
            raise BadInput("the bias of URF is a phase of psi: there is no constant input, bias=True means nothing here")
        if frequencies is not None and frequencies < 1:
            raise BadInput(f"frequencies = {frequencies} must be at least 1")
        self.frequencies = frequencies
        self._whole = spectrum
        super().__init__(in_features, num_features, **options)
        for name, value in zip(("all_xi", "all_re", "all_im"), self._whole):
            self.register_buffer(name, value, persistent=False)
        del self._whole

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        super().redraw(generator)
        xi, re, im = self._whole if hasattr(self, "_whole") else (self.all_xi.cpu(), self.all_re.cpu(), self.all_im.cpu())
        if self.frequencies is not None:
            size = torch.hypot(re, im)
            pick = torch.multinomial(size, self.frequencies, replacement=True, generator=generator)
            factor = size.sum() / (self.frequencies * size[pick])
            xi, re, im = xi[pick], re[pick] * factor, im[pick] * factor
        for name, value in (("xi", xi), ("re", re), ("im", im)):
            if not hasattr(self, name):
                self.register_buffer(name, torch.empty_like(value))
            getattr(self, name).copy_(value)

    def phi(self, x: Tensor) -> Tensor:
        return (self.project(x) - x.square().sum(-1, keepdim=True) / (2 * self.scale**2)).exp() / math.sqrt(self.num_features)

    def _of_projection(self, p: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        # p = G w / s, so s g.w = s^2 p
        argument = self.scale**2 * p if b is None else self.scale**2 * p + b[..., None]
        angle = 2 * math.pi * argument[..., None] * self.xi  # (..., m, k)
        growth = (2 * (math.pi * self.scale * self.xi) ** 2 * w.square().sum(-1)[..., None, None]).exp()
        return (growth * (self.re * angle.cos() - self.im * angle.sin())).sum(-1) / math.sqrt(self.num_features)

    def _project_weights(self, w: Tensor, b: Tensor | None) -> Tensor:
        return functional.linear(w, self.G)

    def kernel(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        z = (x * w).sum(-1) + (0 if b is None else b)
        angle = 2 * math.pi * z[..., None] * self.all_xi
        return (self.all_re * angle.cos() - self.all_im * angle.sin()).sum(-1)

    def variance(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        # One feature is X = Re sum_l Y_l, X^2 = Re(sum_lk Y_l Y_k* + Y_l Y_k) / 2; every product is again the exponential of a Gaussian.
        z = (x * w).sum(-1)[..., None, None]
        ww, xx = w.square().sum(-1)[..., None, None], x.square().sum(-1)[..., None, None]
        phase = torch.zeros_like(z) if b is None else b[..., None, None]
        amplitude, t = torch.complex(self.re, self.im), 2 * math.pi * self.xi
        square: Tensor = torch.zeros(())
        for sign, other in ((1, amplitude.conj()), (-1, amplitude)):
            size = (sign * t[:, None] * t * self.scale**2 * ww + xx / self.scale**2).exp()
            angle = (t[:, None] - sign * t) * (2 * z + phase)
            product = amplitude[:, None] * other
            square = square + (size * (product.real * angle.cos() - product.imag * angle.sin())).sum((-1, -2)) / 2
        angle = (x * w).sum(-1)[..., None] * t + (0 if b is None else b[..., None] * t)
        mean = (self.re * angle.cos() - self.im * angle.sin()).sum(-1)
        return (square - mean**2) / self.num_features


def _spectrum(f: str | Callable[[Tensor], Tensor], window: float, smooth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies xi >= 0 and complex amplitudes (two real tensors) with f(z) = Re sum a exp(2 pi i xi z)."""
    if f in ("sin", "cos"):
        return torch.tensor([1 / (2 * math.pi)]), torch.tensor([float(f == "cos")]), torch.tensor([-float(f == "sin")])
    if isinstance(f, str) and f not in _FUNCTIONS:
        raise BadInput(f"f is 'sin', 'cos', {', '.join(map(repr, _FUNCTIONS))} or a function, not {f!r}")
    if not window > 0 or smooth < 0:
        raise BadInput(f"window = {window} must be above 0 and smooth = {smooth} not below it")
    half, n = 8 * window, 4096
    z = (torch.arange(n, dtype=torch.float64) - n // 2) * (2 * half / n)
    values = (_FUNCTIONS[f] if isinstance(f, str) else f)(z) * torch.exp(-(z**2) / (2 * window**2))
    if values.shape != z.shape or not torch.isfinite(values).all():
        raise BadInput("f must map a tensor to finite values of its shape")
    xi = torch.arange(n // 2) / (2 * half)
    amplitude = torch.fft.rfft(torch.fft.ifftshift(values))[: n // 2] / n * torch.exp(-2 * (math.pi * xi * smooth) ** 2)
    amplitude[1:] *= 2  # the negative frequencies
    keep = amplitude.abs() > 1e-7 * amplitude.abs().sum()
    return xi[keep].float(), amplitude.real[keep].float(), amplitude.imag[keep].float()
