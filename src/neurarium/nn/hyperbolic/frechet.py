"""The Fréchet mean in the Poincaré ball: the point of least summed squared distance, by iteration.

There is no closed form. With u, v in the unit ball (points times sqrt c) and ``p = |u - v|^2 / ((1 - |u|^2)(1 - |v|^2))`` the squared
distance is ``arcosh(1 + 2p)^2``, a concave function l of p. Replacing l by its tangent at the present guess gives an upper bound whose
minimum *is* in closed form, so that each step lowers the sum of squares:

    alpha_i = w_i l'(p_i)/(1 - |x_i|^2),   s = sum alpha_i (1 + |x_i|^2),   b = sum alpha_i x_i,   m = 2 b / (s + sqrt(s^2 - 4 |b|^2))

With l' = 1 the very first step is the gyromidpoint: the closed-form mean is one step of this iteration.

*Source*: Lou et al., "Differentiating through the Fréchet Mean" (2020), in the role that "Poincaré ResNet" (2023) compares with.

*Cost*: 5 to 30 passes over the points, and for the gradient one linear system of the size of the dimension: the mean is where the summed
logarithms vanish, so its derivative follows from one Newton step at the solution, whose matrix is known in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.errors import BadInput
from neurarium.nn.hyperbolic.ball import PoincareBall
from neurarium.nn.hyperbolic.smooth import sinhc

__all__ = ["frechet_mean"]


def frechet_mean(x: Tensor, ball: PoincareBall, *, weights: Tensor | None = None, tol: float = 1e-6, steps: int = 200) -> Tensor:
    """The mean (d,) of points (n, d); ``weights`` (n,) default to equal. Stops when it moves by less than ``tol`` (times 1/sqrt c)."""
    if x.dim() != 2 or len(x) == 0:
        raise BadInput(f"frechet_mean takes points (n, d) with n >= 1, got shape {tuple(x.shape)}")
    c = ball.c.to(x.dtype)
    w = x.new_full((len(x), 1), 1 / len(x)) if weights is None else (weights / weights.sum()).to(x.dtype)[:, None]
    with torch.no_grad():
        mean = _iterate(x * c.sqrt(), w.detach(), tol, steps) / c.sqrt()
    if not (x.requires_grad or c.requires_grad or w.requires_grad):
        return mean

    logs = ball.logmap0(ball.mobius_add(-mean, x))
    with torch.no_grad():
        slope = -ball.scale_at(mean) / 2 * _bending(logs.detach(), w.detach(), c)
    return mean - torch.linalg.solve(slope, (w * logs).sum(0))


def _bending(logs: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The mean Hessian (d, d) of half the squared distance: 1 towards each point, r coth r across, where r is sqrt c times the distance."""
    square = (logs * logs).sum(-1, keepdim=True)
    f = sinhc(4 * c * square)
    across = (1 + 4 * c * square * f * f).sqrt() / f
    radial = w * (1 - across) / square.clamp_min(torch.finfo(logs.dtype).tiny)
    return (w * across).sum() * torch.eye(logs.shape[1], dtype=logs.dtype, device=logs.device) + logs.mT @ (radial * logs)


def _iterate(u: Tensor, w: Tensor, tol: float, steps: int) -> Tensor:
    uu = (u * u).sum(-1, keepdim=True)
    mean = u.new_zeros(u.shape[1])
    for _ in range(steps):
        p = (u - mean).square().sum(-1, keepdim=True) / ((1 - uu) * (1 - (mean * mean).sum()))
        # l'(p) = 2 arcosh(1 + 2p)/sqrt(p (1 + p)) = 4 arsinh(sqrt p)/sqrt(p (1 + p)), up to the factor 4 below
        root = p.clamp_min(1e-12).sqrt()
        alpha = w * torch.asinh(root) / (root * (1 + p).sqrt()) / (1 - uu)
        s, b = (alpha * (1 + uu)).sum(), (alpha * u).sum(0)
        new = 2 * b / (s + (s * s - 4 * (b * b).sum()).clamp_min(0).sqrt())
        moved = (new - mean).norm()
        mean = new
        if moved < tol:
            break
    return mean
