"""Forward-Forward: each layer learns to be active on real data and quiet on data with a wrong label.

There is no error signal. The label is written into the input; a positive sample carries its true label, a negative one another class. Each
layer raises its *goodness* (mean squared activation) above a threshold on positives and lowers it on negatives. A sample is classified by
trying every label and taking the one under which the layers are most active.

*Equations.* Layer input ``h / rms(h)``, so that the goodness of the layer below cannot be read off its length; ``h' = block(h)``; goodness
``g = mean(h'^2)``; loss ``softplus(theta - g_pos) + softplus(g_neg - theta)``, for each layer alone. Prediction
``argmax_label sum_{l >= score_from} g_l``.

*Source.* Hinton, "The Forward-Forward Algorithm" (arXiv 2212.13345), sections 2 and 3.3.

*Departures.* Normalisation by the root mean square keeps activations of order one at any width. (With ``normalise="l2"`` and the mean,
goodness is of order 1/width and never reaches theta: use ``goodness="sum_square"`` there.) The model's own head is not used: predict
with ``learner.predictor(model)``.

*Cost.* Two forward passes a step, and one for every class a prediction; all labels of a prediction go through in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain
from neurarium.learn.local import Facts, LocalLearner, LocalObjective, eval_mode, goodness, overlay_label

__all__ = ["ForwardForward"]

ADAM: Callable[..., Optimizer] = partial(Adam, lr=3e-3)


@dataclass(frozen=True, kw_only=True)
class ForwardForward(LocalLearner):
    """Train every block by contrasting true with false labels.

    Args:
        theta: goodness at which a layer says "real" with probability one half; for the sum it is multiplied by the layer's width.
        goodness: ``"mean_square"`` or ``"sum_square"``.
        normalise: what a layer's input is divided by: its ``"rms"`` or its ``"l2"`` norm.
        negatives: ``"random"`` wrong labels, or ``"hard"``: drawn by how active the net is under them.
        score_from: first layer whose goodness counts in a prediction (layer 0 sees the label directly); the last layer always counts.
        per_label_batch: try all labels in one batch, or one label after another (less memory, slower, same result).

    Other arguments: :class:`~neurarium.learn.local.LocalLearner`. Inputs are never cached: negatives are drawn anew in each pass.
    """

    optimizer: Callable[..., Optimizer] = ADAM
    theta: float = 2.0
    goodness: str = "mean_square"
    normalise: str = "rms"
    negatives: str = "random"
    score_from: int = 1
    per_label_batch: bool = True

    def objective(self, chain: Chain, facts: Facts) -> LocalObjective:
        for value, valid in ((self.normalise, ("rms", "l2")), (self.negatives, ("random", "hard"))):
            if value not in valid:
                raise BadInput(f"{value!r} is not one of {valid}")
        if not chain.hidden:
            raise UnsupportedModel("Forward-Forward needs at least one block before the head", module=chain.names[0][0])
        if not facts.example.is_floating_point():
            raise UnsupportedModel("Forward-Forward writes the label into real-valued inputs, not into indices", module=chain.names[0][0])
        classes = facts.classes if chain.head is None else chain.head.out_features
        if classes < 2:
            raise BadInput("Forward-Forward needs at least two classes: with one there is no wrong label")
        net = _Sweep(chain.hidden, classes, facts.high, self.goodness, self.normalise, self.score_from, self.per_label_batch)
        self._check(net, chain, facts.example)
        return _ForwardForward(net, self.theta, self.negatives == "hard")

    @staticmethod
    def _check(net: _Sweep, chain: Chain, x: Tensor) -> None:
        """Labels fit, and every block's goodness can differ between inputs: after a layer norm it cannot."""
        with torch.no_grad():
            h = net.normalised(overlay_label(x, torch.arange(len(x), device=x.device) % net.classes, net.classes, net.high))
            for block, names in zip(chain.hidden, chain.names):
                with eval_mode(block):
                    h = block(h)
                g = goodness(h, net.kind)
                if len(g) > 1 and 0 < float(g.std()) < 1e-4 * float(g.mean()):
                    raise UnsupportedModel(
                        "its output is equally long for every input (a norm at its end), so goodness is constant", module=names[-1]
                    )
                h = net.normalised(h)


class _ForwardForward(LocalObjective):
    repeatable = False

    def __init__(self, net: _Sweep, theta: float, hard: bool) -> None:
        super().__init__(tuple(net.blocks))
        self.nets, self.theta, self.hard = (net,), theta, hard  # in a tuple: its blocks are the model's, not ours

    def enter(self, x: Tensor, y: Tensor) -> Tensor:
        (net,) = self.nets
        if self.hard:
            scores = net(x).scatter(1, y[:, None], -torch.inf)
            wrong = torch.multinomial(scores.softmax(1), 1).squeeze(1)
        else:
            wrong = (y + torch.randint_like(y, 1, net.classes)) % net.classes
        return self.between(torch.cat([overlay_label(x, label, net.classes, net.high) for label in (y, wrong)]))

    def between(self, h: Tensor) -> Tensor:
        return self.nets[0].normalised(h)

    def loss(self, i: int, h_in: Tensor, h_out: Tensor, y: Tensor) -> tuple[Tensor, None]:
        del i, h_in, y
        (net,) = self.nets
        theta = self.theta * (h_out[0].numel() if net.kind == "sum_square" else 1)
        positive, negative = goodness(h_out, net.kind).chunk(2)
        return (F.softplus(theta - positive) + F.softplus(negative - theta)).mean(), None

    def predictor(self, model: nn.Module) -> nn.Module:
        del model
        return self.nets[0]


class _Sweep(nn.Module):
    """Scores of the classes (n, classes): the goodness under each label."""

    def __init__(self, blocks, classes: int, high: float, kind: str, normalise: str, score_from: int, together: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.classes, self.high, self.kind, self.normalise, self.together = classes, high, kind, normalise, together
        self.first = min(score_from, len(self.blocks) - 1)

    def normalised(self, h: Tensor) -> Tensor:
        norm = h.flatten(1).norm(dim=1)
        if self.normalise == "rms":
            norm = norm / h[0].numel() ** 0.5
        return h / (norm + 1e-8).view(-1, *[1] * (h.ndim - 1))

    def score(self, x: Tensor) -> Tensor:
        """Goodness of inputs that carry a label: (n,)."""
        h, total = self.normalised(x), torch.zeros((), dtype=x.dtype, device=x.device)
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i >= self.first:
                total = total + goodness(h, self.kind)
            h = self.normalised(h)
        return total

    def forward(self, x: Tensor) -> Tensor:
        n, labels = x.shape[0], torch.arange(self.classes, device=x.device)
        if not self.together:
            return torch.stack([self.score(overlay_label(x, label.expand(n), self.classes, self.high)) for label in labels], 1)
        every = overlay_label(x.repeat_interleave(self.classes, 0), labels.repeat(n), self.classes, self.high)
        return self.score(every).view(n, self.classes)
