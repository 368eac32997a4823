"""Tiny examples of this room's methods for the conformance suite."""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.physics import Causal, CausalPINN, Slices, allen_cahn
from neurarium.testing import Example

__all__ = ["causal_pinn"]


def causal_pinn() -> Example:
    """Six least-squares steps on Allen-Cahn; the residual is measured again by nested autograd."""
    problem = allen_cahn(horizon=0.2)
    solver = CausalPINN(causal=Causal(eps=(10.0, 100.0), chunks=8), width=6, depth=2, modes=2, sampler=Slices(8, 8))

    def residual(solution) -> float:
        points = problem.domain.points(torch.rand(512, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).requires_grad_(
            True
        )
        u = solution.pieces[0](points)[:, 0]
        gradient = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
        u_xx = torch.autograd.grad(gradient[:, 0].sum(), points)[0][:, 0]
        r = gradient[:, 1] - 1e-4 * u_xx + 5 * u**3 - 5 * u
        return float(r.detach().square().mean().sqrt())

    def inputs(n: int, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (problem.domain.points(torch.rand(n, 2, generator=generator, dtype=torch.float64)),)

    return Example("solver", solve=lambda seed: solver.solve(problem, steps=6, seed=seed), inputs=inputs, residual=residual)
