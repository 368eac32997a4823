"""Cascaded Forward: leave the blocks alone and fit an independent linear predictor to the output of each.

Blocks are random and fixed, or trained once by direct feedback alignment. All learning that sees labels is linear: one predictor a block,
with a closed form for the squared error. The predictors vote.

*Equations.* Features ``F_i = flatten(block_i(...block_1(x)))``. ``loss="mse"``: ``W_i = (F'F + ridge I)^-1 F'Y`` with one-hot ``Y``.
``"ce"``, ``"sparsemax"``: gradient descent on that loss of ``F_i W_i``; sparsemax is the Euclidean projection onto the simplex. Prediction:
``argmax sum_i softmax(F_i W_i)``. Direct feedback: block i receives ``(softmax(model(x)) - onehot(y)) B_i`` in place of the gradient of its output,
with ``B_i`` random and fixed.

*Source.* Zhao et al., "The Cascaded Forward Algorithm for Neural Network Training" (arXiv 2303.09728), sections 3.1 to 3.3.

*Departures.* Any chain, not only the paper's three convolution blocks. Batch norms of random blocks get their statistics from one pass over
the data. Where the model ends in a linear head, that head is the last predictor, so ``model(x)`` alone works as well.

*Cost.* One pass of features (kept in memory), then for each block a solve of size min(samples, features), or ``epochs`` of a linear model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.fit import Backprop, History, Learner, device_of, evaluate, forked_rng, loop, to
from neurarium.learn.local import ADAM, Readout, descend, eval_mode, generator_state, survey

__all__ = ["CascadedForward", "ridge_regression", "sparsemax", "sparsemax_loss"]


@dataclass(frozen=True, kw_only=True)
class CascadedForward(Learner):
    """Fit one linear predictor to each block.

    Args:
        loss: of the predictors: ``"mse"`` (closed form), ``"ce"`` or ``"sparsemax"`` (``epochs`` passes each).
        ridge: of the closed form.
        blocks: ``"random"``: untouched; ``"dfa"``: first trained for ``epochs`` by direct feedback alignment (needs a linear head).
        optimizer: of one predictor, and of the blocks under ``"dfa"``.
        cut: how to cut the model, see :func:`~neurarium.learn.chain.as_chain`.
    """

    loss: str = "mse"
    ridge: float = 1e-3
    blocks: str = "random"
    optimizer: Callable[..., Optimizer] = ADAM
    cut: Sequence[str | Sequence[str]] | None = None
