"""Reference solutions by classical methods, each with its own error estimate (by repeating it on a coarser grid).

:class:`Reference` is a grid solution: coordinates, fields, and the relative L2 difference to the coarser computation. Below it stand the
methods: exponential time differencing for stiff periodic equations, the Cole-Hopf formula of Burgers' equation, and high-order
Runge-Kutta for systems of ordinary differential equations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["Reference", "cole_hopf_burgers", "etdrk4", "ode"]

Array = np.ndarray


@dataclass(frozen=True)
class Reference:
    """``values[field]`` on the grid of ``axes`` (its order is that of the domain's coordinates); ``error`` is the largest relative L2
    difference of a field to a coarser computation."""

    axes: Mapping[str, Array]
    values: Mapping[str, Array]
    error: float

    def __post_init__(self) -> None:
        shape = tuple(len(a) for a in self.axes.values())
        for name, v in self.values.items():
            if v.shape != shape:
                raise BadInput(f"reference field {name} has shape {v.shape}, its axes {shape}")

    def points(self) -> Tensor:
        """All grid points, (n, coordinates), float64."""
        grids = np.meshgrid(*self.axes.values(), indexing="ij")
        return torch.from_numpy(np.stack([g.ravel() for g in grids], axis=1))

    def fields(self) -> Tensor:
        """The values at :meth:`points`, (n, fields), float64."""
        return torch.from_numpy(np.stack([np.asarray(v, dtype=float).ravel() for v in self.values.values()], axis=1))


def relative_l2(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def etdrk4(symbol: Array, nonlinear: Callable[[Array], Array], start: Array, times: Array, *, steps: int, contour: int = 32) -> Array:
    """``u_t = L u + N(u)`` on a periodic grid; L acts in Fourier space as multiplication by ``symbol`` (n/2 + 1,).

    ``nonlinear`` maps the grid values to ``N(u)`` in Fourier space (``np.fft.rfft`` convention). ``start`` (n,) is the state at
    ``times[0]``; ``times`` are equally spaced, with ``steps`` steps between two of them. Returns (len(times), n).

    The exponential Runge-Kutta scheme of fourth order; its coefficients have removable singularities at 0, so they are means over a
    circle around each eigenvalue. *Source*: Cox and Matthews (2002), Kassam and Trefethen (2005).
    """
    gaps = np.diff(times)
    if len(times) < 2 or not np.allclose(gaps, gaps[0]) or gaps[0] <= 0:
        raise BadInput("etdrk4 needs at least two equally spaced, rising times")
    n, h = len(start), gaps[0] / steps
    symbol = np.asarray(symbol)
    whole, half = np.exp(h * symbol), np.exp(h * symbol / 2)
    circle = np.exp(2j * np.pi * (np.arange(contour) + 0.5) / contour)
    z = h * symbol[:, None] + circle
    mean = (lambda f: f.mean(1)) if np.iscomplexobj(symbol) else (lambda f: f.mean(1).real)
    q = h * mean((np.exp(z / 2) - 1) / z)
    f1 = h * mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    f2 = h * mean((2 + z + np.exp(z) * (-2 + z)) / z**3)
    f3 = h * mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)
    v, out = np.fft.rfft(start), [np.asarray(start, dtype=float)]
    for _ in gaps:
        for _ in range(steps):
            nv = nonlinear(np.fft.irfft(v, n))
            a = half * v + q * nv
            na = nonlinear(np.fft.irfft(a, n))
            b = half * v + q * na
            nb = nonlinear(np.fft.irfft(b, n))
            c = half * a + q * (2 * nb - nv)
            nc = nonlinear(np.fft.irfft(c, n))
            v = whole * v + f1 * nv + 2 * f2 * (na + nb) + f3 * nc
        out.append(np.fft.irfft(v, n))
    return np.stack(out)


def cole_hopf_burgers(nu: float, x: Array, t: Array, *, nodes: int = 200) -> Array:
    """``u_t + u u_x = nu u_xx`` with ``u(x, 0) = -sin(pi x)``: the Cole-Hopf integral by Gauss-Hermite quadrature, (len(x), len(t)).

    ``u = -int sin(pi y) g dk / int g dk`` with ``y = x - k``, ``g = exp(-cos(pi y) / (2 pi nu))`` and k Gaussian of variance 2 nu t.
    """
    k, weight = np.polynomial.hermite.hermgauss(nodes)
    y = np.pi * (np.asarray(x)[:, None, None] - np.sqrt(4 * nu * np.asarray(t))[None, :, None] * k)
    power = -np.cos(y) / (2 * np.pi * nu)
    g = weight * np.exp(power - power.max(axis=-1, keepdims=True))
    return -(np.sin(y) * g).sum(-1) / g.sum(-1)


def ode(f: Callable[[float, Array], Array], start: Array, times: Array, *, tolerance: float = 1e-12) -> Array:
    """``y' = f(t, y)`` by the Dormand-Prince method of order 8 at this relative and absolute tolerance, (len(start), len(times))."""
    from scipy.integrate import solve_ivp

    answer = solve_ivp(f, (times[0], times[-1]), np.asarray(start, float), "DOP853", t_eval=times, rtol=tolerance, atol=tolerance)
    if not answer.success:
        raise BadInput(f"the system could not be integrated to t = {times[-1]}: {answer.message}")
    return answer.y
