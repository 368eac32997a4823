"""Waves in complicated media, simulated: physical systems that compute for nothing, but whose gradient nobody knows.

Each takes a vector (n, in_dim) that shapes a wave and returns what detectors see (n, out_dim). They stand for experiments: noisy, drifting,
and not to be differentiated.

*Equations.* ``H``, ``T``, ``K``, ``v``, ``w`` are fixed random complex Gaussian. :class:`RandomScattering`: ``"saturable"``, an acoustic
cavity with nonlinear scatterers, ``|H2 u / (1 + |u|^2)|`` with ``u = H1 s``; ``"kerr"``, ``|H2 u exp(i |u|^2)|``; ``"intensity"``, a
multimode fibre behind a phase modulator, ``|T exp(i pi s)|^2``: the detector is what is nonlinear. :class:`Metasurface`: a microwave cavity
whose scatterers the input programs, ``|v_m^T (I - diag(exp(i pi s)) K)^-1 w|``: the wave equation is linear, but the input enters
through an inverse, since waves visit each scatterer many times.

*Source.* The three experiments of Momeni et al., "Backpropagation-free Training of Deep Physical Neural Networks" (arXiv 2304.11042).

*Departures.* Media are random matrices instead of measured devices. :meth:`drift` mixes a new medium into the old one at constant power.

*Cost.* Of the simulation: a product for scattering, a linear solve of size ``in_dim`` a sample for the metasurface.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput

__all__ = ["Metasurface", "RandomScattering"]


class _Medium(nn.Module):
    """Random complex matrices, kept as real and imaginary parts, and detectors with noise.

    Args:
        noise: standard deviation of a detector's error, relative to the root mean square of what all of them see.
    """

    def __init__(self, in_dim: int, out_dim: int, noise: float, seed: int) -> None:
        super().__init__()
        if min(in_dim, out_dim) < 1 or noise < 0:
            raise BadInput(f"needs in_dim, out_dim >= 1 and noise >= 0, not {in_dim}, {out_dim}, {noise}")
        self.in_dim, self.out_dim, self.noise = in_dim, out_dim, noise
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, rows: int, columns: int) -> Tensor:
        """Complex Gaussian (rows, columns, 2) that keeps the power of what it multiplies."""
        return torch.randn(rows, columns, 2, generator=self.generator) / (2 * columns) ** 0.5

    def drift(self, fraction: float) -> None:
        """Replace ``fraction`` of each matrix (in amplitude) by a new one, at constant power."""
        if not 0 <= fraction <= 1:
            raise BadInput(f"fraction must be in [0, 1], not {fraction}")
        for matrix in self.buffers():
            fresh = self.draw(*matrix.shape[:2]).to(matrix) * self.size(matrix)
            matrix.mul_((1 - fraction**2) ** 0.5).add_(fresh, alpha=fraction)

    def size(self, matrix: Tensor) -> float:
        """What :meth:`draw` is multiplied by to make ``matrix``."""
        del matrix
        return 1.0

    @torch.no_grad()
    def forward(self, s: Tensor) -> Tensor:
        if s.ndim != 2 or s.shape[1] != self.in_dim:
            raise BadInput(f"the system takes inputs (n, {self.in_dim}), not {tuple(s.shape)}")
        seen = self.detected(s)
        return seen + self.noise * seen.square().mean().sqrt() * torch.randn_like(seen) if self.noise else seen


class RandomScattering(_Medium):
    """A multiply scattering medium with a nonlinearity inside or at the detector.

    Args:
        nonlinearity: ``"saturable"``, ``"kerr"`` or ``"intensity"``.
    """

    def __init__(self, in_dim: int, out_dim: int, *, nonlinearity: str = "saturable", noise: float = 0.01, seed: int = 0) -> None:
        super().__init__(in_dim, out_dim, noise, seed)
        if nonlinearity not in ("saturable", "kerr", "intensity"):
            raise BadInput(f"nonlinearity must be 'saturable', 'kerr' or 'intensity', not {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        if nonlinearity != "intensity":
            # Inputs of unit length are amplified to amplitudes of about 1 at each of in_dim scatterers, where the nonlinearity bites.
            self.register_buffer("inside", self.draw(in_dim, in_dim) * in_dim**0.5)
        self.register_buffer("out", self.draw(out_dim, in_dim))

    def size(self, matrix: Tensor) -> float:
        return self.in_dim**0.5 if matrix is getattr(self, "inside", None) else 1.0

    def detected(self, s: Tensor) -> Tensor:
        out = torch.view_as_complex(self.out)
        if self.nonlinearity == "intensity":
            return power(torch.polar(torch.ones_like(s), torch.pi * s) @ out.T)
        u = s.to(out.dtype) @ torch.view_as_complex(self.inside).T
        strength = power(u)
        u = u * (1 / (1 + strength)) if self.nonlinearity == "saturable" else u * torch.polar(torch.ones_like(strength), strength)
        return power(u @ out.T).sqrt()


class Metasurface(_Medium):
    """A chaotic cavity whose scatterers the input programs.

    Args:
        coupling: how much of a wave comes back to the scatterers (spectral norm of ``K``), below 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, coupling: float = 0.8, noise: float = 0.01, seed: int = 0) -> None:
        super().__init__(in_dim, out_dim, noise, seed)
        if not 0 <= coupling < 1:
            raise BadInput(f"coupling must be in [0, 1), not {coupling}")
        self.coupling = coupling
        self.register_buffer("between", self.draw(in_dim, in_dim))
        self.register_buffer("source", self.draw(in_dim, 1) * 2**0.5)
        self.register_buffer("out", self.draw(out_dim, in_dim))

    def size(self, matrix: Tensor) -> float:
        return 2**0.5 if matrix is self.source else 1.0

    def detected(self, s: Tensor) -> Tensor:
        k = torch.view_as_complex(self.between)
        k = k * (self.coupling / torch.linalg.matrix_norm(k, 2))
        programmed = torch.polar(torch.ones_like(s), torch.pi * s)
        system = torch.eye(self.in_dim, dtype=k.dtype, device=k.device) - programmed[:, :, None] * k
        field = torch.linalg.solve(system, torch.view_as_complex(self.source).expand(len(s), -1, -1)).squeeze(-1)
        return power(field @ torch.view_as_complex(self.out).T).sqrt()


def power(z: Tensor) -> Tensor:
    """``|z|^2`` without the square root of ``abs``."""
    return z.real.square() + z.imag.square()
