"""Named differential equations on which methods of this room are tried, with reference solutions.

References are computed once a process and hold at least ten times tighter than what a network reaches here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from neurarium.errors import BadInput
from neurarium.physics.problem import Box, Condition, Fields, Names, Problem
from neurarium.physics.reference import Reference, cole_hopf_burgers, etdrk4, ode, relative_l2

__all__ = ["allen_cahn", "burgers", "kuramoto_sivashinsky", "lorenz"]


def allen_cahn(*, diffusion: float = 1e-4, horizon: float = 1.0) -> Problem:
    """``u_t - d u_xx + 5 u^3 - 5 u = 0`` on [-1, 1], periodic, ``u_0 = x^2 cos(pi x)``: slow layers between u = -1 and u = 1."""

    def residual(f: Fields, c: Names, p: Names) -> torch.Tensor:
        return f.d("u", "t") - p.diffusion * f.d("u", "xx") + 5 * f.u**3 - 5 * f.u

    return Problem(
        name="allen-cahn",
        domain=Box(x=(-1, 1), t=(0, horizon), time="t", periodic=("x",)),
        fields=("u",),
        residual=residual,
        initial=lambda c: {"u": c.x**2 * torch.cos(math.pi * c.x)},
        parameters={"diffusion": diffusion},
        reference=lambda: _allen_cahn(diffusion, horizon),
    )


@lru_cache(maxsize=8)
def _allen_cahn(diffusion: float, horizon: float, times: int = 101, n: int = 512) -> Reference:
    def solve(n: int, steps: int) -> np.ndarray:
        x = np.linspace(-1, 1, n, endpoint=False)
        symbol = 5 - diffusion * (np.pi * np.arange(n // 2 + 1)) ** 2
        cubic = lambda u: -5 * np.fft.rfft(u**3)  # noqa: E731
        return etdrk4(symbol, cubic, x**2 * np.cos(np.pi * x), np.linspace(0, horizon, times), steps=steps)

    fine, coarse = solve(n, 10), solve(n // 2, 5)
    keep = np.arange(0, n, 4)
    error = relative_l2(coarse[:, ::2], fine[:, ::4])
    return Reference({"x": np.linspace(-1, 1, n, endpoint=False)[keep], "t": np.linspace(0, horizon, times)}, {"u": fine[:, keep].T}, error)


def kuramoto_sivashinsky(*, horizon: float = 0.5) -> Problem:
    """``u_t + 5 u u_x + 0.5 u_xx + 0.005 u_xxxx = 0`` on [-1, 1], periodic, ``u_0 = -sin(pi x)``: the regular regime."""

    def residual(f: Fields, c: Names, p: Names) -> torch.Tensor:
        return f.d("u", "t") + 5 * f.u * f.d("u", "x") + 0.5 * f.d("u", "xx") + 0.005 * f.d("u", "xxxx")

    return Problem(
        name="kuramoto-sivashinsky",
        domain=Box(x=(-1, 1), t=(0, horizon), time="t", periodic=("x",)),
        fields=("u",),
        residual=residual,
        initial=lambda c: {"u": -torch.sin(math.pi * c.x)},
        reference=lambda: _kuramoto_sivashinsky(horizon),
    )


@lru_cache(maxsize=8)
def _kuramoto_sivashinsky(horizon: float, times: int = 51, n: int = 256) -> Reference:
    def solve(n: int, steps: int) -> np.ndarray:
        k = np.pi * np.arange(n // 2 + 1)
        alias = np.where(np.arange(n // 2 + 1) < n / 3, -2.5j * k, 0)  # 5 u u_x = 2.5 (u^2)_x, without aliases
        x = np.linspace(-1, 1, n, endpoint=False)
        square = lambda u: alias * np.fft.rfft(u * u)  # noqa: E731
        return etdrk4(0.5 * k**2 - 0.005 * k**4, square, -np.sin(np.pi * x), np.linspace(0, horizon, times), steps=steps)

    fine, coarse = solve(n, 40), solve(n // 2, 20)
    x = np.linspace(-1, 1, n // 2, endpoint=False)
    return Reference({"x": x, "t": np.linspace(0, horizon, times)}, {"u": fine[:, ::2].T}, relative_l2(coarse, fine[:, ::2]))


def burgers(*, viscosity: float = 0.01 / math.pi, hard: bool = True) -> Problem:
    """``u_t + u u_x = nu u_xx`` on [-1, 1] x [0, 1] with ``u_0 = -sin(pi x)`` and ``u = 0`` at both ends: a front forms at x = 0.

    ``hard`` lets the start and both ends hold exactly, by ``u = -sin(pi x) + t (1 - x^2) N``; else they are penalties.
    """
    start = lambda c: {"u": -torch.sin(math.pi * c.x)}  # noqa: E731

    def ansatz(f: Names, c: Names) -> dict[str, object]:
        return {"u": start(c)["u"] + c.t * (1 - c.x**2) * f.u}

    return Problem(
        name="burgers",
        domain=Box(x=(-1, 1), t=(0, 1), time="t"),
        fields=("u",),
        residual=lambda f, c, p: f.d("u", "t") + f.u * f.d("u", "x") - p.viscosity * f.d("u", "xx"),
        initial=start,
        hard=hard,
        ansatz=ansatz if hard else None,
        conditions=() if hard else (Condition.dirichlet("u", 0.0, x=-1), Condition.dirichlet("u", 0.0, x=1)),
        initial_weight=1.0,
        parameters={"viscosity": viscosity},
        reference=lambda: _burgers(viscosity),
    )


@lru_cache(maxsize=8)
def _burgers(viscosity: float) -> Reference:
    x, t = np.linspace(-1, 1, 161), np.linspace(0, 1, 26)
    fine, coarse = (cole_hopf_burgers(viscosity, x, t, nodes=n) for n in (200, 100))
    return Reference({"x": x, "t": t}, {"u": fine}, relative_l2(coarse, fine))


def lorenz(
    *,
    start: tuple[float, float, float] = (1.0, 1.0, 1.0),
    horizon: float = 3.0,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 8 / 3,
) -> Problem:
    """Lorenz' system ``x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z``: chaotic, so early errors grow."""
    if len(start) != 3:
        raise BadInput(f"Lorenz' system starts from three numbers, got {start}")

    def residual(f: Fields, c: Names, p: Names) -> tuple[torch.Tensor, ...]:
        return (
            f.d("x", "t") - p.sigma * (f.y - f.x),
            f.d("y", "t") - (f.x * (p.rho - f.z) - f.y),
            f.d("z", "t") - (f.x * f.y - p.beta * f.z),
        )

    return Problem(
        name="lorenz",
        domain=Box(t=(0, horizon), time="t"),
        fields=("x", "y", "z"),
        residual=residual,
        initial=lambda c: dict(zip("xyz", start)),
        parameters={"sigma": sigma, "rho": rho, "beta": beta},
        scales=dict.fromkeys("xyz", 30.0),  # the attractor's size; of unit scale, networks fall into the rest point 0 instead
        reference=lambda: _lorenz(start, horizon, sigma, rho, beta),
    )


@lru_cache(maxsize=8)
def _lorenz(start: tuple[float, ...], horizon: float, sigma: float, rho: float, beta: float) -> Reference:
    def f(t: float, s: np.ndarray) -> np.ndarray:
        return np.array([sigma * (s[1] - s[0]), s[0] * (rho - s[2]) - s[1], s[0] * s[1] - beta * s[2]])

    t = np.linspace(0, horizon, 301)
    fine, coarse = (ode(f, np.array(start), t, tolerance=tolerance) for tolerance in (1e-12, 1e-10))
    return Reference({"t": t}, dict(zip("xyz", fine)), max(relative_l2(c, d) for c, d in zip(coarse, fine)))
