"""What a hypernetwork is conditioned on, and how it keeps what it generated for earlier conditions.

* :class:`TaskEmbedding`: a learned vector a task. * :class:`NoiseCondition`: draws from a standard normal; every draw is a set of weights,
  all draws together a distribution over networks. * :class:`DataCondition`: the mean of an encoder's features of a few examples.

:class:`OutputPenalty` is continual learning with hypernetworks. Before task T the weights generated for tasks 1..T-1 are written down, and
while task T is learned they are held: ``beta / (T - 1) * sum_t ||h(e_t; phi) - h(e_t; phi*)||^2``. No data of earlier tasks are kept, and
what is kept grows by one embedding a task (the written-down weights can be recomputed from a copy of the hypernetwork).

*Source.* Taxonomy of inputs: arXiv 2306.06955. Penalty: von Oswald et al., "Continual learning with hypernetworks" (arXiv 1906.00695).
*Departures.* The penalty is taken at the present parameters, not one tentative step ahead. *Cost.* One generation an earlier task a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput
from neurarium.learn.hyper import HyperNetwork

__all__ = ["DataCondition", "NoiseCondition", "OutputPenalty", "TaskEmbedding"]


class TaskEmbedding(nn.Module):
    """``n`` learned vectors of length ``dim``: ``embedding(3)`` is (dim,), ``embedding([0, 3])`` is (2, dim).

    Each is a parameter of its own, so that the optimizer's momentum moves none that is frozen (:meth:`freeze`).
    """

    def __init__(self, n: int, dim: int, *, std: float = 1.0) -> None:
        super().__init__()
        if n < 1 or dim < 1:
            raise BadInput(f"n and dim must be at least 1, not {n} and {dim}")
        self.vectors = nn.ParameterList(nn.Parameter(std * torch.randn(dim)) for _ in range(n))

    def forward(self, task: int | list[int] | Tensor) -> Tensor:
        if isinstance(task, Tensor):
            task = task.tolist()
        return self.vectors[task] if isinstance(task, int) else torch.stack([self.vectors[t] for t in task])

    def freeze(self, task: int) -> None:
        """A task that is done keeps its vector."""
        self.vectors[task].requires_grad_(False)


class NoiseCondition(nn.Module):
    """``noise(n)``: n draws of a standard normal of length ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, self.dim, generator=generator, dtype=self.like.dtype, device=self.like.device)


class DataCondition(nn.Module):
    """The mean of ``encoder(x)`` over a support set ``x`` (n, ...) -> (dim,): the same for any order of the examples."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).mean(0)


class OutputPenalty:
    """``penalty()`` is the weighted squared distance from the weights that were generated for ``conditions`` when it was made.

    Args:
        conditions: (earlier tasks, condition_dim); a detached copy is kept. With no rows the penalty is 0.
        beta: weight of the mean over tasks.
    """

    def __init__(self, hypernet: HyperNetwork, conditions: Tensor, beta: float) -> None:
        self.hypernet, self.beta = hypernet, beta
        self.conditions = conditions.detach().clone()
        training = hypernet.training
        with torch.no_grad():
            self.weights = hypernet.eval().flat(self.conditions)
        hypernet.train(training)

    def __call__(self) -> Tensor:
        if not len(self.conditions):
            return self.weights.new_zeros(())
        return self.beta * (self.hypernet.flat(self.conditions) - self.weights).square().sum(-1).mean()
