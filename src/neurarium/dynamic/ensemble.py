"""What several networks say together: their vote, the mean of their probabilities, and a network that reads several views at once.

Members are an axis: logits are ``(n, T, classes)``, weights ``(T, inputs, outputs)``, so T networks run as one batched product.

- *vote*: the class that most members name; *pooled*: the mean probability.
- *fusion of m views* (VCDN): sigmoid of each view's C logits, their outer product as C^m numbers, Linear, LeakyReLU, Linear.

*Source.* The fusion is the view correlation discovery network of MOGONET (Wang et al. 2021), as SGUQ (arXiv 2410.11046) uses it.

*Cost.* A fusion costs 2 T width (C^m + C) FLOPs a row, with a width of C^m unless you choose one: for ten classes and three views, do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.gates import Gate, votes

__all__ = ["VCDN", "Pooled", "drawn", "pooled", "vote", "weighted_loss"]


def vote(members: Tensor) -> Tensor:
    """Log-probabilities ``(n, classes)`` of an ensemble's logits ``(n, members, classes)``: the majority's answer wins, among equals the
    one of largest mean probability. p_c = (votes for c + mean probability of c) / (members + 1)."""
    p = members.softmax(-1)
    share = (votes(p) + p.mean(1)) / (members.shape[1] + 1)
    return share.clamp(min=torch.finfo(p.dtype).tiny).log()


class Pooled(Gate):
    """Asks another gate about the mean probabilities of an ensemble."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, k: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        return self.gate(k, pooled(logits), memory)


def pooled(members: Tensor) -> Tensor:
    """Log of the mean probability, ``(n, members, classes) -> (n, classes)``."""
    p = members.softmax(-1).mean(1)
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


class VCDN(nn.Module):
    """T networks on the outer product of what m views say: m times ``(n, T, classes)`` logits to ``(n, T, classes)``.

    Args:
        width: of the hidden layer; classes^m by default, as in the paper.
    """

    def __init__(self, classes: int, views: int, members: int, width: int | None = None) -> None:
        super().__init__()
        size = classes**views
        width = size if width is None else width
        self.first, self.last = drawn(members, size, width), drawn(members, width, classes)
        self.bias = nn.ParameterList([torch.zeros(members, width), torch.zeros(members, classes)])

    def forward(self, said: Sequence[Tensor]) -> Tensor:
        h = self.product(said).transpose(0, 1)
        h = F.leaky_relu(torch.baddbmm(self.bias[0][:, None], h, self.first), 0.25)
        return torch.baddbmm(self.bias[1][:, None], h, self.last).transpose(0, 1)

    @staticmethod
    def product(said: Sequence[Tensor]) -> Tensor:
        """sigmoid(a) x sigmoid(b) x ..., flattened, the last view fastest."""
        p = said[0].sigmoid()
        for logits in said[1:]:
            p = (p[..., :, None] * logits.sigmoid()[..., None, :]).flatten(-2)
        return p


def weighted_loss(members: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with each sample weighted by the share of its class, mean over samples, summed over members."""
    n, t, classes = members.shape
    loss = F.cross_entropy(members.flatten(0, 1), y.repeat_interleave(t), reduction="none").view(n, t)
    share = torch.bincount(y, minlength=classes)[y].to(loss) / n
    return (loss * share[:, None]).mean(0).sum()


def drawn(*shape: int) -> nn.Parameter:
    """Xavier's normal draw for each member."""
    return nn.Parameter(torch.randn(shape) * (2 / (shape[-2] + shape[-1])) ** 0.5)
