r"""Surrogate derivatives: what stands in for the derivative of a spike.

A neuron fires when its membrane reaches the threshold: :math:`s = H(x)` with :math:`x = h - \theta`. The true derivative is zero almost
everywhere, so training uses a pseudo-derivative :math:`\sigma'(x)` in the backward pass and leaves the forward pass alone.

Every class has ``spike(x) -> {0, 1}`` and ``grad(x) -> Tensor``, the pseudo-derivative itself: public, since fused kernels, attacks and
tests all need it. :func:`spike` is the two together as one differentiable operation.

*Source.* The shapes are the usual ones: Neftci, Mostafa, Zenke, "Surrogate gradient learning in spiking neural networks", 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["ATan", "GaussianSG", "Rectangle", "SigmoidSG", "SuperSpike", "Surrogate", "Triangle", "spike"]


@dataclass(frozen=True)
class Surrogate:
    """Base of all surrogates; a subclass gives ``grad_``. ``x`` is the membrane minus the threshold."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "mu" and not value > 0:
                raise BadInput(f"{type(self).__name__}: {name} must be positive, not {value}")

    def spike(self, x: Tensor) -> Tensor:
        """1 where ``x >= 0``, in the dtype of ``x``. Not differentiable; see :func:`spike`."""
        return (x >= 0).to(x.dtype)

    def grad(self, x: Tensor) -> Tensor:
        """The pseudo-derivative at ``x``, a new tensor of the same shape."""
        return self.grad_(x.clone())

    def grad_(self, x: Tensor) -> Tensor:
        """The pseudo-derivative written over ``x``: what kernels call, since a fresh tensor costs more than the arithmetic."""
        raise NotImplementedError


@dataclass(frozen=True)
class Triangle(Surrogate):
    """``max(0, 1 - |x| / width) / width``."""

    width: float = 1.0

    def grad_(self, x: Tensor) -> Tensor:
        peak = 1 / self.width
        return x.abs_().mul_(-peak * peak).add_(peak).clamp_min_(0)


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """``1 / width`` where ``|x| < width / 2``, else 0."""

    width: float = 1.0

    def grad_(self, x: Tensor) -> Tensor:
        return x.abs_().lt_(self.width / 2).mul_(1 / self.width)


@dataclass(frozen=True)
class ATan(Surrogate):
    """``(alpha / 2) / (1 + (pi alpha x / 2)^2)``."""

    alpha: float = 2.0

    def grad_(self, x: Tensor) -> Tensor:
        return x.mul_(math.pi * self.alpha / 2).square_().add_(1).reciprocal_().mul_(self.alpha / 2)


@dataclass(frozen=True)
class SigmoidSG(Surrogate):
    """Derivative of ``sigmoid(alpha x)``."""

    alpha: float = 4.0

    def grad_(self, x: Tensor) -> Tensor:
        p = x.mul_(self.alpha).sigmoid_()
        return p.addcmul_(p, p, value=-1).mul_(self.alpha)


@dataclass(frozen=True)
class SuperSpike(Surrogate):
    """``1 / (1 + beta |x|)^2``."""

    beta: float = 10.0

    def grad_(self, x: Tensor) -> Tensor:
        return x.abs_().mul_(self.beta).add_(1).square_().reciprocal_()


@dataclass(frozen=True)
class GaussianSG(Surrogate):
    """The density of a normal distribution with mean ``mu`` and standard deviation ``sigma``."""

    mu: float = 0.0
    sigma: float = 1.0

    def grad_(self, x: Tensor) -> Tensor:
        return x.sub_(self.mu).div_(self.sigma).square_().mul_(-0.5).exp_().mul_(1 / (self.sigma * math.sqrt(2 * math.pi)))


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return surrogate.spike(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.surrogate.grad(x).mul_(grad), None


def spike(x: Tensor, surrogate: Surrogate) -> Tensor:
    """Spikes of ``x`` (membrane minus threshold), differentiable through the surrogate."""
    return _Spike.apply(x, surrogate)
