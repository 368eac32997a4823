"""The question asked between stages: how sure is this readout?

``gate(k, logits, memory) -> (score, memory)``: a score in [0, 1] for each row, higher means stop, and what the gate must remember of the
row's earlier readouts (any nest of batch-first tensors, ``None`` at stage 0). The engine keeps the memory in step with the rows that are
still running. Scores never depend on thresholds: that is what makes budgets monotone row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput

__all__ = [
    "FEATURES",
    "Entropy",
    "Gate",
    "LearnedGate",
    "Margin",
    "MaxProb",
    "Patience",
    "Spread",
    "confidence",
    "exit_probabilities",
    "votes",
]


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


#: name -> a number that says how sure a distribution over classes (..., classes) is
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_prob": lambda p: p.amax(-1),
    "entropy": _entropy,
    "margin": lambda p: -p.topk(2, -1).values.diff(dim=-1).squeeze(-1),
    "power_entropy": lambda p: _entropy(p.square() / p.square().sum(-1, keepdim=True)),
}


def confidence(logits: Tensor, names: Sequence[str] = tuple(FEATURES)) -> Tensor:
    """``(..., classes)`` logits to ``(..., len(names))`` numbers, see :data:`FEATURES`."""
    p = logits.softmax(-1)
    return torch.stack([FEATURES[name](p) for name in names], -1)


class Gate(nn.Module):
    """Base of all gates."""

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """Score of readout k, ``(n, classes) -> (n,)``, and the memory for the next question."""
        raise NotImplementedError


class MaxProb(Gate):
    """The largest softmax probability."""

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        return FEATURES["max_prob"](logits.softmax(-1)), memory


class Entropy(Gate):
    """1 - H(p) / log(classes)."""

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        return (1 - _entropy(logits.softmax(-1)) / math.log(logits.shape[-1])).clamp(0, 1), memory


class Margin(Gate):
    """The largest softmax probability minus the second largest."""

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        return FEATURES["margin"](logits.softmax(-1)), memory


class Patience(Gate):
    """How many readouts in a row have agreed with the one before them, as a share of ``patience``."""

    def __init__(self, patience: int = 1) -> None:
        super().__init__()
        if patience < 1:
            raise BadInput(f"patience must be at least 1 agreement, not {patience}")
        self.patience = patience

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        answer = logits.argmax(-1)
        if memory is None:
            agreed = torch.zeros_like(answer)
        else:
            before, count = memory
            agreed = torch.where(answer == before, count + 1, 0)
        return (agreed.to(logits.dtype) / self.patience).clamp(max=1), (answer, agreed)


class LearnedGate(Gate):
    """One logistic unit an exit on how sure its readout is: g_l = sigmoid(w_l . m_l + b_l), m_l see :func:`confidence`, detached.

    The score is the probability of leaving here for a row that has come this far, P_l / (1 - sum_{j<l} P_j), with P from
    :func:`exit_probabilities`; the memory is the probability already spent.
    """

    def __init__(self, exits: int, features: Sequence[str] = tuple(FEATURES)) -> None:
        super().__init__()
        if unknown := set(features) - set(FEATURES):
            raise BadInput(f"gate feature {sorted(unknown)[0]!r} is not one of {sorted(FEATURES)}")
        if exits < 1 or not features:
            raise BadInput(f"a learned gate needs at least one early exit and one feature, not {exits} and {len(features)}")
        self.features = tuple(features)
        self.weight = nn.Parameter(torch.empty(exits, len(self.features)))
        self.bias = nn.Parameter(torch.empty(exits))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every exit, the last included, gets the same share of every row."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, -math.log(len(self.bias)))

    def logits(self, readouts: Tensor) -> Tensor:
        """Gate logits ``(n, exits)`` of the readouts ``(n, exits or more, classes)``; the last readout has no gate."""
        m = confidence(readouts[:, : len(self.bias)].detach(), self.features)
        return (m * self.weight).sum(-1) + self.bias

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        m = confidence(logits.detach(), self.features)
        g = F.linear(m, self.weight[k : k + 1], self.bias[k : k + 1]).sigmoid().squeeze(-1)
        left = torch.ones_like(g) if memory is None else 1 - memory
        p = torch.minimum(g, left)
        score = torch.where(left > 0, p / left.clamp(min=torch.finfo(g.dtype).tiny), 1.0)
        return score, 1 - left + p

    def extra_repr(self) -> str:
        return f"exits={len(self.bias)}, features={self.features}"


def votes(p: Tensor) -> Tensor:
    """How many members name each class, ``(n, members, classes) -> (n, classes)``."""
    return (p.argmax(-1, keepdim=True) == torch.arange(p.shape[-1], device=p.device)).to(p.dtype).sum(1)


class Spread(Gate):
    """How well an ensemble agrees: 1 - the standard deviation, over its members, of the winner's probability.

    The readouts are the members' logits ``(n, members, classes)``; the winner is the class that most members name, and among equals the
    one of largest mean probability.
    """

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        p = logits.softmax(-1)
        winner = (votes(p) + p.mean(1)).argmax(-1)
        given = p.gather(-1, winner.view(-1, 1, 1).expand(-1, p.shape[1], 1)).squeeze(-1)
        return 1 - given.std(1, correction=0), memory


def exit_probabilities(g: Tensor) -> Tensor:
    """P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)), the rest for the last exit: ``(n, exits) -> (n, exits + 1)``."""
    spent = F.pad(g.cumsum(1).clamp(max=1), (1, 1))
    spent[:, -1] = 1
    return spent.diff(dim=1)
