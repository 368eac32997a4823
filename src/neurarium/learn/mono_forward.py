"""Mono-Forward: each layer learns its own projection to class scores, and is trained by the cross-entropy of those scores alone.

Backpropagation holds every activation until the error comes back. Mono-Forward gives layer i a projection matrix M_i of its own: one
forward pass through the layer yields scores, a local loss, and a gradient that goes no further down. So layers can be trained one after
another, each on the cached output of the last, and nothing but one layer is ever in memory.

*Equations.* ``a_0 = x``, ``a_i = block_i(a_{i-1})``, scores ``G_i = M_i a_i``, loss ``CE(softmax(G_i), y)`` with gradient to
``block_i`` and ``M_i`` only. Prediction: ``argmax G_L`` (``predict="last"``) or ``argmax sum_i G_i`` (``"sum"``).

The last projection M_L is the model's own final linear layer, so after training ``model(x)`` is the prediction and nothing need be kept.
With one hidden layer the rule *is* backpropagation.

*Source.* Gong, Li, Abdulla, "Mono-Forward" (arXiv 2501.09238); the greedy schedule with early stopping for each layer follows the
comparison framework of arXiv 2509.19063.

*Departures.* The papers train plain MLPs (and flat CNNs). Here a block is whatever :func:`~neurarium.learn.chain.as_chain` cuts, with
sequences averaged over time before the projection. ``input_readout`` adds M_0 on the raw input (greedy, as in the framework).

*Cost.* A batch costs one forward and one backward of each block plus the projections: about the FLOPs of backpropagation without the
input gradients between blocks. Memory for gradients is that of the largest block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain
from neurarium.learn.local import ADAM, Facts, LocalLearner, LocalObjective, Readout

__all__ = ["MonoForward"]


@dataclass(frozen=True, kw_only=True)
class MonoForward(LocalLearner):
    """Train every block with the cross-entropy of its own readout.

    Args:
        optimizer: of one block and its readout.
        order: ``"greedy"`` (one block after another, the papers' way) or ``"parallel"`` (all blocks on each batch).
        input_readout: also train a readout on the raw input (it only matters to ``predict="sum"``).
        predict: ``"last"``: the model itself; ``"sum"``: the sum of all readouts' scores.

    Other arguments: :class:`~neurarium.learn.local.LocalLearner`.
    """

    optimizer: Callable[..., Optimizer] = ADAM
    order: str = "greedy"
    input_readout: bool = True
    predict: str = "last"

    def objective(self, chain: Chain, facts: Facts) -> LocalObjective:
        if self.predict not in ("last", "sum"):
            raise BadInput(f"predict must be 'last' or 'sum', not {self.predict!r}")
        return _MonoForward(chain, facts, self.input_readout, self.predict)


class _MonoForward(LocalObjective):
    def __init__(self, chain: Chain, facts: Facts, input_readout: bool, predict: str) -> None:
        if chain.head is None:
            raise UnsupportedModel("the last block must be a linear layer that gives one score a class", module=chain.names[-1][-1])
        classes = chain.head.out_features
        if facts.classes > classes:
            raise BadInput(f"y holds class {facts.classes - 1}, but the model has {classes} outputs")
        with_input = input_readout or not chain.hidden
        super().__init__((nn.Identity(), *chain.hidden) if with_input else chain.hidden)
        shapes = [chain.input_shape, *chain.shapes] if with_input else list(chain.shapes)
        self.own = nn.ModuleList(Readout(shape, classes) for shape in shapes[: len(self.blocks) - 1]).to(
            chain.head.weight.device, chain.head.weight.dtype
        )
        self.readouts: list[nn.Module] = [*self.own, chain.head]  # the head is the model's, not a copy
        self.predict = predict

    def loss(self, i: int, h_in: Tensor, h_out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        del h_in
        scores = self.readouts[i](h_out)
        return F.cross_entropy(scores, y), scores

    def learned(self, i: int) -> list[nn.Parameter]:
        return [*super().learned(i), *(p for p in self.readouts[i].parameters() if p.requires_grad)]

    def predictor(self, model: nn.Module) -> nn.Module:
        return model if self.predict == "last" else _Summed(self.blocks, self.readouts)


class _Summed(nn.Module):
    def __init__(self, blocks: tuple[nn.Module, ...], readouts: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.readouts = nn.ModuleList(blocks), nn.ModuleList(readouts)

    def forward(self, x: Tensor) -> Tensor:
        scores = []
        for block, readout in zip(self.blocks, self.readouts):
            x = block(x)
            scores.append(readout(x))
        return torch.stack(scores).sum(0)
