"""Two looks at a hypernetwork: where it stands in the review's taxonomy, and how its output follows the size of its input.

:func:`design` answers the five questions of arXiv 2306.06955. :func:`magnitude_probe` measures what arXiv 2304.07645 found: the norm of
generated weights against the norm of the condition, on logarithmic axes, and how unequal gradients are over conditions.

*Cost.* One generation, and one backward pass a condition if gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput
from neurarium.learn.hyper import HyperNetwork
from neurarium.roles import Report

__all__ = ["Design", "Magnitude", "design", "magnitude_probe"]


@dataclass(frozen=True)
class Design(Report):
    """The review's five questions, answered for one hypernetwork, and its size beside the target's."""

    input: str
    outputs: str
    input_changes: str
    output_changes: str
    architecture: str
    parameters: int
    target_parameters: int


def design(hypernet: HyperNetwork) -> Design:
    """Where a hypernetwork stands in the review's taxonomy."""
    encoded = {None: "as it is", "cos_sin": "encoded to constant norm", "z_1mz": "encoded as [c, 1 - c]"}[hypernet.encoding]
    made = {"all": "all at once", "multihead": "one head a layer", "components": "one output row at a time", "chunks": "in chunks"}
    widths = [m.out_features for m in hypernet.trunk if isinstance(m, nn.Linear)]
    return Design(
        input=f"a vector of {hypernet.condition_dim}, {encoded}",
        outputs=made[hypernet.output] + (", as changes of learned weights" if hypernet.residual else ""),
        input_changes="with the caller's condition",
        output_changes="static: one set of weights a condition",
        architecture=f"MLP {' - '.join(map(str, widths)) or 'without hidden layer'}",
        parameters=sum(p.numel() for p in hypernet.parameters()),
        target_parameters=sum(hypernet.sizes.values()),
    )


@dataclass(frozen=True)
class Magnitude(Report):
    """How the target depends on the size of the condition.

    ``slope`` and ``correlation`` are of log ``||theta||`` against log ``||c||``, biases left out (1 and 1: proportional).
    ``grad_variance`` is the variance over conditions of the norm of the hypernetwork's gradient, in units of its squared mean.
    """

    slope: float
    correlation: float
    grad_variance: float


def magnitude_probe(
    hypernet: HyperNetwork, conditions: Tensor, batch: tuple[Any, ...] = (), loss: Callable[..., Tensor] | None = None
) -> Magnitude:
    """Read how strongly the generated weights (and gradients) follow the magnitude of the condition.

    Args:
        conditions: (n, condition_dim), of different norms, none of them zero.
        batch: ``(*inputs, y)`` for the gradients; without it, or without ``loss``, ``grad_variance`` is NaN.
        loss: function of ``(output, y)``.
    """
    norms = conditions.norm(dim=-1)
    if len(conditions) < 3 or not bool((norms > 0).all()) or bool((norms == norms[0]).all()):
        raise BadInput("conditions must be at least three vectors of different norms, none zero")
    with torch.no_grad():
        made = hypernet.weights(conditions)
        matrices = [w.flatten(1) for n, w in made.items() if len(hypernet.target.shapes[n]) > 1] or [w.flatten(1) for w in made.values()]
        x, y = norms.double().log(), torch.cat(matrices, 1).double().norm(dim=1).clamp_min(1e-300).log()
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / x.square().sum())
    correlation = float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300))
    spread = float("nan")
    if batch and loss is not None:
        parameters = [p for p in hypernet.parameters() if p.requires_grad]
        found = []
        for c in conditions:
            grads = torch.autograd.grad(loss(hypernet(c, *batch[:-1]), batch[-1]), parameters, allow_unused=True)
            found.append(torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt())
        sizes = torch.stack(found)
        spread = float(sizes.var(unbiased=False) / sizes.mean().square().clamp_min(1e-300))
    return Magnitude(slope, correlation, spread)
