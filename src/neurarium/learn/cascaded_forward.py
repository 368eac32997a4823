"""Cascaded Forward: leave the blocks alone and fit an independent linear predictor to the output of each.

Blocks are random and fixed, or trained once by direct feedback alignment. All learning that sees labels is linear: one predictor a block,
with a closed form for the squared error. The predictors vote.

*Equations.* Features ``F_i = flatten(block_i(...block_1(x)))``. ``loss="mse"``: ``W_i = (F'F + ridge I)^-1 F'Y`` with one-hot ``Y``.
``"ce"``, ``"sparsemax"``: gradient descent on that loss of ``F_i W_i``; sparsemax is the Euclidean projection onto the simplex. Prediction:
``argmax sum_i softmax(F_i W_i)``. Direct feedback: block i receives ``(softmax(model(x)) - onehot(y)) B_i`` in place of the gradient of
its output, with ``B_i`` random and fixed.

*Source.* Zhao et al., "The Cascaded Forward Algorithm for Neural Network Training" (arXiv 2303.09728), sections 3.1 to 3.3.

*Departures.* Any chain, not only the paper's three convolution blocks. Batch norms of random blocks get their statistics from one pass over
the data. Where the model ends in a linear head, that head is the last predictor, so ``model(x)`` alone works as well.

*Cost.* One pass of features (kept in memory), then for each block a solve of size min(samples, features), or ``epochs`` of a linear model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain
from neurarium.learn.fit import device_of, forked_rng, loop, to, trainable
from neurarium.learn.local import Facts, LocalLearner, LocalObjective, Readout, descend, eval_mode
from neurarium.roles import Loader

__all__ = ["CascadedForward", "ridge_regression", "sparsemax", "sparsemax_loss"]


@dataclass(frozen=True, kw_only=True)
class CascadedForward(LocalLearner):
    """Fit one linear predictor to each block.

    Args:
        loss: of the predictors: ``"mse"`` (closed form, one pass whatever ``epochs`` says), ``"ce"`` or ``"sparsemax"``.
        ridge: of the closed form; added to a sum over samples, not to a mean.
        blocks: ``"random"``: untouched; ``"dfa"``: first trained for ``epochs`` by direct feedback alignment (needs a linear head).

    Other arguments: :class:`~neurarium.learn.local.LocalLearner`; ``optimizer`` is that of one predictor, and of the blocks by feedback.
    """

    order: str = "greedy"
    loss: str = "mse"
    ridge: float = 1e-3
    blocks: str = "random"

    def objective(self, chain: Chain, facts: Facts) -> LocalObjective:
        for value, valid in ((self.loss, ("mse", "ce", "sparsemax")), (self.blocks, ("random", "dfa"))):
            if value not in valid:
                raise BadInput(f"{value!r} is not one of {valid}")
        if self.loss == "mse" and not (self.order == "greedy" and self.cache):
            raise BadInput("the closed form needs order='greedy' and cache=True; loss='ce' goes without")
        if self.blocks == "dfa" and chain.head is None:
            raise UnsupportedModel("direct feedback starts from the error of a linear head", module=chain.names[-1][-1])
        if not chain.hidden:
            raise UnsupportedModel("needs at least one block before the head", module=chain.names[0][0])
        classes = facts.classes if chain.head is None else chain.head.out_features
        if facts.classes > classes:
            raise BadInput(f"y holds class {facts.classes - 1}, but the model has {classes} outputs")
        return _CascadedForward(chain, classes, self)


class _Frozen(nn.Module):
    """A block as a fixed function."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), eval_mode(self.block):
            return self.block(x)


class _CascadedForward(LocalObjective):
    """Fixed blocks and predictors in turn, so that a predictor's inputs are computed once."""

    def __init__(self, chain: Chain, classes: int, rule: CascadedForward) -> None:
        super().__init__([m for block in chain.hidden for m in (_Frozen(block), nn.Identity())])
        self.rule, self.classes, self.chain = rule, classes, chain
        shapes = chain.shapes[: len(chain.hidden)]
        self.own = nn.ModuleList(Readout(s, classes, bias=True) for s in (shapes if chain.head is None else shapes[:-1]))
        example = next(iter(chain.hidden[0].parameters()), torch.zeros(()))
        self.own.to(example.device, example.dtype)
        self.readouts: list[nn.Module] = [*self.own] if chain.head is None else [*self.own, chain.head]

    def learned(self, i: int) -> list[nn.Parameter]:
        return [p for p in self.readouts[i // 2].parameters() if p.requires_grad] if i % 2 else []

    def loss(self, i: int, h_in: Tensor, h_out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        del h_in
        scores = self.readouts[i // 2](h_out)
        return (sparsemax_loss if self.rule.loss == "sparsemax" else F.cross_entropy)(scores, y), scores

    def solve(self, i: int, inputs: Tensor, y: Tensor) -> Mapping[str, float] | None:
        if self.rule.loss != "mse":
            return None
        readout = self.readouts[i // 2]
        features = readout.features(inputs) if isinstance(readout, Readout) else inputs
        linear = readout.linear if isinstance(readout, Readout) else readout
        targets = F.one_hot(y, self.classes).to(features.dtype)
        with torch.no_grad():
            linear.weight.copy_(ridge_regression(features, targets, self.rule.ridge).T)
            if linear.bias is not None:
                linear.bias.zero_()
            scores = linear(features)
        return {"loss": float(F.mse_loss(scores, targets)), "accuracy": float((scores.argmax(1) == y).float().mean())}

    def prepare(self, model: nn.Module, loader: Loader, *, epochs: int, seed: int) -> None:
        device = device_of(model)
        if self.rule.blocks == "dfa":
            return self._direct_feedback(model, loader, epochs=epochs, seed=seed)
        norms = [m for block in self.chain.hidden for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        norms = [m for m in norms if m.track_running_stats]
        if norms:  # one pass in train mode, averaging the batch statistics
            kept = [(m, m.training, m.momentum) for m in norms]
            for m in norms:
                m.reset_running_stats()
                m.training, m.momentum = True, None
            with torch.no_grad(), forked_rng(device):
                for x, _ in loader:
                    self.chain.forward(to(x, device), upto=len(self.chain.hidden))
            for m, training, momentum in kept:
                m.training, m.momentum = training, momentum

    def _direct_feedback(self, model: nn.Module, loader: Loader, *, epochs: int, seed: int) -> None:
        chain, head = self.chain, self.chain.head
        optimizer = self.rule.optimizer(trainable(model))
        like = head.weight
        feedback = [
            torch.randn(self.classes, s.numel(), device=like.device, dtype=like.dtype) / s.numel() ** 0.5 for s in chain.shapes[:-1]
        ]

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outputs = chain.forward(x)
            logits = outputs[-1]
            error = (logits.detach().softmax(1) - F.one_hot(y, self.classes)) / len(y)
            signals = [(error @ b).view_as(h) for h, b in zip(outputs, feedback)]
            loss = F.cross_entropy(logits, y)
            # A surrogate whose gradient at each output is its signal: one backward pass, which the detached chain keeps inside the blocks.
            taught = sum((h * s).sum() for h, s in zip(outputs, signals))
            descend(loss + taught, [optimizer])
            return loss, logits

        loop(model, loader, epochs=epochs, step=step, parts={}, seed=seed)

    def predictor(self, model: nn.Module) -> nn.Module:
        del model
        return _Vote(self.chain.hidden, self.readouts)


class _Vote(nn.Module):
    """Log of the mean of the predictors' probabilities."""

    def __init__(self, blocks, readouts) -> None:
        super().__init__()
        self.blocks, self.readouts = nn.ModuleList(blocks), nn.ModuleList(readouts)

    def forward(self, x: Tensor) -> Tensor:
        votes = []
        for block, readout in zip(self.blocks, self.readouts):
            x = block(x)
            votes.append(readout(x).log_softmax(1))
        return torch.stack(votes).logsumexp(0) - torch.tensor(float(len(votes))).log()


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """``(F'F + ridge I)^-1 F'Y`` of shape (features, outputs), solved in float64 on the smaller side of ``features`` (n, features)."""
    if ridge <= 0:
        raise BadInput(f"ridge must be positive, not {ridge}")
    f, t = features.double(), targets.double()
    n, d = f.shape
    if d <= n:
        gram = f.T @ f
        gram.diagonal().add_(ridge)
        weights = torch.cholesky_solve(f.T @ t, torch.linalg.cholesky(gram))
    else:
        gram = f @ f.T
        gram.diagonal().add_(ridge)
        weights = f.T @ torch.cholesky_solve(t, torch.linalg.cholesky(gram))
    return weights.to(targets.dtype)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of each row onto the probability simplex."""
    ordered = scores.sort(1, descending=True).values
    sums = ordered.cumsum(1) - 1
    k = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    support = (k * ordered > sums).sum(1, keepdim=True)
    return (scores - sums.gather(1, support - 1) / support).clamp(min=0)


def sparsemax_loss(scores: Tensor, y: Tensor) -> Tensor:
    """The convex loss whose gradient is ``sparsemax(scores) - onehot(y)``; zero once the true class leads by 1."""
    p = sparsemax(scores.detach())
    conjugate = (scores * p).sum(1) - 0.5 * p.square().sum(1)
    return (conjugate - scores.gather(1, y[:, None]).squeeze(1) + 0.5).mean()
