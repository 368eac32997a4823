"""Causal training of physics-informed networks: no time slice is learned before the ones that it grows from.

A physics-informed network minimises the residual at all times at once. Nothing in that sum says that time runs forward: late residuals
may become small around a wrong early solution, which is then locked in. Causal training weights each time slice by how well all
*earlier* slices are already solved, so that the solution is found as it evolves, from the initial data on.

With slices t_1 < ... < t_N and L_i the mean squared residual on slice i,

    loss = (1/N) sum_i w_i L_i,      w_i = exp(-eps * sum_{k < i} L_k),

where no gradient flows through w. If the initial data are a penalty, it counts as the slice before the first and joins the loss. eps is
annealed from lax to strict: a value is left when ``min_i w_i > delta``, and training has converged when the last value is. That
smallest weight is at once a measure of convergence (``solution.history["min_weight"]``). Long horizons are solved window by window.

*Source*: Wang, Sankaran and Perdikaris, Respecting causality is all you need for training physics-informed neural networks (2022),
arXiv 2203.07404: equations 3.3-3.6, algorithm 1. The weights serve Levenberg-Marquardt as well, which the paper does not use: rows are
multiplied by ``sqrt(w_i)``.
*Departures*: time slices are stratified (one random instant in each of N equal intervals), initial data hold exactly by default, and an
eps that is not solved after its share of the steps is left as if it were.
*Cost*: that of the plain solver; the weights are a cumulative sum.
*Licence*: the authors' repository states that a patent covers commercial use of this training algorithm.
"""

from __future__ import annotations

from typing import Any

from neurarium.physics.pinn import PINN
from neurarium.physics.sampling import Slices
from neurarium.physics.weighting import Causal

__all__ = ["CausalPINN"]


class CausalPINN(PINN):
    """A :class:`~neurarium.physics.pinn.PINN` with causal weights, and time slices of 64 points as its sampler::

        solution = CausalPINN(causal=Causal(eps=(10.0, 100.0))).solve(allen_cahn(), steps=60)
        solution.error(), solution.history["min_weight"][-1]

    Args: ``causal`` the weighting (its ``chunks`` are the time slices); ``windows`` solves the horizon in so many pieces, each a new
    network; the rest is :class:`PINN`'s.
    """

    def __init__(self, net: Any = "mlp", *, causal: Causal | None = None, windows: int = 1, **settings: Any) -> None:
        causal = causal or Causal()
        settings.setdefault("sampler", Slices(causal.chunks, 64))
        super().__init__(net, weights=causal, windows=windows, **settings)
