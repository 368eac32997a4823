"""Depth-muP: on top of muP, hyperparameters that stay good when residual blocks are added.

Every residual branch gets a factor ``1/sqrt(L)`` and every weight in it an update that is smaller by ``1/sqrt(L)``. Then the sum over L
branches moves by O(1) a step at any depth, and the features of neighbouring layers stay different: they change along the depth like a
random walk, not like a smooth curve that makes most layers redundant.

*Equations.* ``x_l = x_{l-1} + a L^-alpha MS(phi(W_l x_{l-1}))`` with ``MS(y) = y - mean(y)``, and a normalised update of W_l of size
``eta L^-gamma``. Here ``L`` counts in units of ``base_depth``. Adam normalises: its rate is ``eta L^-gamma``. SGD does not, and the
gradient has one factor ``L^-alpha`` already: its rate is ``eta L^(alpha - gamma)``. Stable networks that learn features have
``alpha + gamma = 1``, ``1/2 <= alpha <= 1``; depth-muP is (1/2, 1/2), the limit of an ordinary differential equation (1, 0), and standard
networks are (0, 0). Input and readout do not change with depth, nor do initial scales.
With weights of variance ``s^2/n`` the variance q of features grows like ``dq/dt = a^2 c s^2 q`` over depth t in [0, 1], where c is
the variance of phi of a normal variable: ``1/2 - 1/(2 pi)`` for ReLU and ``1 - 2/pi`` for the absolute value.

*Source.* arXiv 2310.02244. ``block_exponent=1`` is the choice of CompleteP for transformers, arXiv 2505.01618.

*Departures.* The branch factor is a hook on the branch, so that names of parameters stay. Blocks of several layers are taken too; the
paper shows that there no exponents give everything, and that optima then shift.

*Cost.* One multiplication a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import call
from neurarium.learn.parametrize import mup_
from neurarium.learn.widths import Parametrization
from neurarium.roles import Report

__all__ = ["FeatureDiversity", "MeanSubtraction", "depth_mup_", "feature_diversity", "with_depth"]


class MeanSubtraction(nn.Module):
    """Takes the mean over features away, last in a branch, so that a nonlinearity that is never negative cannot add up over depth."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(self.dim, keepdim=True)


def with_depth(
    model: nn.Module,
    shapes: Parametrization,
    blocks: Sequence[str],
    *,
    base_depth: float = 1,
    block_exponent: float = 0.5,
    lr_exponent: float | str = "auto",
    multiplier: float = 1.0,
) -> Parametrization:
    """``shapes`` that know of depth as well; for ``mup_`` and ``mup_groups``.

    Args:
        blocks: names of the branches: the modules whose output is added to the stream (not the module that does the addition, and not
            the stem). Their number is the depth.
        base_depth: the depth at which nothing changes.
        block_exponent: alpha.
        lr_exponent: gamma; ``"auto"``: ``1 - alpha``.
        multiplier: a, the factor of a branch at the base depth.
    """
    modules = dict(model.named_modules())
    if not blocks or len(set(blocks)) != len(blocks):
        raise BadInput("blocks are the names of the residual branches, each once")
    if base_depth <= 0 or multiplier <= 0:
        raise BadInput(f"base_depth={base_depth!r} and multiplier={multiplier!r} must be positive")
    for name in blocks:
        if not name or name not in modules:
            raise BadInput(f"blocks: the model has no module {name!r}")
        if any(other != name and other.startswith(f"{name}.") for other in blocks):
            raise UnsupportedModel("holds other blocks: name the branches only", module=name)
        if any(readout == name or readout.startswith(f"{name}.") for readout in shapes.readouts):
            raise UnsupportedModel("holds a readout, which is no part of a residual branch", module=name)
    depth = len(blocks) / base_depth
    gamma = 1 - block_exponent if lr_exponent == "auto" else lr_exponent
    if isinstance(gamma, str):
        raise BadInput(f"lr_exponent is a number or 'auto', not {gamma!r}")
    factor = multiplier * depth**-block_exponent
    inside = {f"{b}.{n}" for b in blocks for n, _ in modules[b].named_parameters()}
    if shared := sorted(inside - set(shapes)):  # listed once by the model, under another name
        raise UnsupportedModel("has a weight that another block has too; the depth of shared weights is not defined", module=shared[0])
    grown = {n: replace(s, branch=depth**-block_exponent, step=depth**-gamma) if n in inside else s for n, s in shapes.items()}
    return replace(shapes, shapes=grown, branches=dict.fromkeys(blocks, factor))


def depth_mup_(
    model: nn.Module,
    shapes: Parametrization,
    blocks: Sequence[str],
    *,
    base_depth: float = 1,
    block_exponent: float = 0.5,
    lr_exponent: float | str = "auto",
    multiplier: float = 1.0,
    **settings: Any,
) -> Parametrization:
    """Parametrise the model in place, return the shapes that the optimizer needs: :func:`with_depth`, then ``mup_`` with ``settings``."""
    deep = with_depth(
        model, shapes, blocks, base_depth=base_depth, block_exponent=block_exponent, lr_exponent=lr_exponent, multiplier=multiplier
    )
    mup_(model, deep, **settings)
    return deep


@dataclass(frozen=True)
class FeatureDiversity(Report):
    """How far features move along the depth: ``distance`` at each ``lag`` (a share of the depth) grows like ``lag^(1 - exponent)``.

    ``cosine``: mean cosine between features of adjacent layers.
    """

    lags: tuple[float, ...]
    distance: tuple[float, ...]
    exponent: float  # 1/2: a random walk; 0: a smooth curve
    cosine: float


def feature_diversity(model: nn.Module, x: Any, blocks: Sequence[str], *, longest: float = 0.25) -> FeatureDiversity:
    """Diversity exponent of the stream, from ``||x_{l+k} - x_l||`` at lags k = 1, 2, 4, ... up to ``longest`` of the depth.

    Args:
        blocks: names of the modules whose *outputs* are the stream after each block.
    """
    modules, stream = dict(model.named_modules()), []
    for name in blocks:
        if name not in modules:
            raise BadInput(f"blocks: the model has no module {name!r}")
    handles = [modules[name].register_forward_hook(lambda m, a, out: stream.append(out.detach())) for name in blocks]
    try:
        with torch.no_grad():
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return diversity(torch.stack(stream), longest=longest)


def diversity(stream: Tensor, *, longest: float = 0.25) -> FeatureDiversity:
    """The same from the features themselves, (layers, samples, ...)."""
    depth = len(stream)
    lags = [2**i for i in range(depth.bit_length()) if 2**i <= longest * depth]
    if len(lags) < 2:
        raise BadInput(f"{depth} layers are too few for lags of up to {longest} of the depth: two lags are needed")
    if not torch.isfinite(stream).all():
        raise BadInput("the stream of features is not finite")
    flat = stream.flatten(2).double() if stream.ndim > 2 else stream.unsqueeze(1).double()
    distance = [float((flat[k:] - flat[:-k]).square().mean().sqrt()) for k in lags]
    x, y = torch.tensor(lags, dtype=torch.float64).log(), torch.tensor(distance, dtype=torch.float64).clamp(min=1e-300).log()
    slope = float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())
    cosine = float(nn.functional.cosine_similarity(flat[1:], flat[:-1], dim=-1).mean())
    return FeatureDiversity(tuple(k / depth for k in lags), tuple(distance), 1 - slope, cosine)
