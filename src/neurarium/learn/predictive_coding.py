"""Predictive coding in a feed-forward network: activities settle first, weights then learn from the errors that are left.

Every block predicts the activity above it. With the target held at the top, activities move until the errors are spread over the layers,
and each block's weights descend on the error at its own output. Nothing but neighbouring layers ever meets in one gradient.

*Equations.* Activities ``x_0`` (input), ``x_1 ... x_{L-1}`` free, predictions ``f_l(x_{l-1})``, errors ``e_l = x_l - f_l(x_{l-1})``, energy
``F = sum_{l<L} pi_l / 2 |e_l|^2 + pi_L loss(f_L(x_{L-1}), y)``. From the forward pass, where all inner errors are 0, ``inference_steps``
times ``x_l <- x_l - rate dF/dx_l``; then one optimizer step on ``dF/dtheta``. A precision that is learned follows the inverse mean square
of its block's errors; their scale is that of the average block, so that the loss at the top keeps its weight.

Where the errors are small (``pi_L`` small) the settled errors are the deltas of backpropagation, and so are the gradients.

*Source.* Rao and Ballard 1999, Whittington and Bogacz 2017; as the deep-network use of pyhgf (arXiv 2410.09206), whose nodes also carry
posterior precisions.

*Departures.* Any chain of blocks instead of fully connected layers, any loss at the top, activities settle by gradient steps as in the
literature on predictive coding and not in one sweep of closed-form updates.

*Cost.* ``inference_steps + 1`` forward and backward passes through single blocks a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.fit import Learner, Loss, device_of, evaluate, find_loss, forked_rng, loop, to, trainable
from neurarium.learn.local import generator_state
from neurarium.roles import History, Loader

__all__ = ["PredictiveCoding", "PredictiveCodingMLP"]

ADAM: Callable[..., Optimizer] = partial(Adam, lr=1e-3)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


class PredictiveCodingMLP(nn.Sequential):
    """Linear layers of these sizes with activations between them: the network of the literature. Any other chain trains as well."""

    def __init__(self, sizes: Sequence[int], activation: str = "tanh") -> None:
        if len(sizes) < 2 or activation not in ACTIVATIONS:
            raise BadInput(f"at least two sizes and an activation out of {sorted(ACTIVATIONS)}; got {list(sizes)} and {activation!r}")
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])


@dataclass(frozen=True)
class PredictiveCoding(Learner):
    """Let activities settle, then update each block from its own prediction error.

    Args:
        inference_steps: gradient steps of the activities; at least the number of blocks, or the lowest ones see no error.
        precision_learning: let each block's precision follow its errors; otherwise all are 1.
        rate: of the activities' steps.
        output_precision: weight of the loss at the top.
        loss: at the top: ``"cross_entropy"``, ``"mse"``, or a function of ``(output, y)`` that averages over the batch.
        optimizer: of the weights.
        blocks: see :func:`~neurarium.learn.chain.as_chain`.
    """

    inference_steps: int = 20
    precision_learning: bool = False
    rate: float = 0.2
    output_precision: float = 1.0
    loss: str | Loss = "cross_entropy"
    optimizer: Callable[..., Optimizer] = ADAM
    blocks: Sequence[str | Sequence[str]] | None = None

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if self.inference_steps < 1 or self.rate <= 0 or self.output_precision <= 0:
            raise BadInput(f"inference_steps={self.inference_steps}, rate={self.rate} and output_precision must be positive")
        if device is not None:
            model.to(device)
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise UnsupportedModel("draws anew at each step, so that activities cannot settle; set its p to 0", module=name)
        optimizer = self.optimizer(trainable(model))
        chain = as_chain(model, _first(loader, device_of(model), seed), self.blocks)
        precisions = _Precisions(len(chain.blocks) - 1)

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            loss, output, errors = self.gradients(chain, precisions.values, x, y)
            if torch.isfinite(loss):
                optimizer.step()
                if self.precision_learning:
                    precisions.follow(errors)
            return loss, output

        return loop(
            model, loader, epochs=epochs, step=step, parts={"optimizer": optimizer, "precisions": precisions}, val=val,
            evaluator=partial(evaluate, model, loss=self.loss), seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip

    def gradients(self, chain: Chain, precisions: Sequence[float], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Settle, then leave ``dF/dtheta`` in ``.grad``. Returns the loss and the output of the forward pass, and the settled errors."""
        top = find_loss(self.loss)
        with torch.no_grad():
            forward = chain.forward(x)
            loss = top(forward[-1], y)
        values = [h.clone().requires_grad_() for h in forward[:-1]]
        n = len(x)
        for _ in range(self.inference_steps if values else 0):
            energy, _ = self.energy(chain, precisions, x, values, y, top)
            steps = torch.autograd.grad(n * energy, values)
            values = [(v - self.rate * g).detach().requires_grad_() for v, g in zip(values, steps)]
        values = [v.detach() for v in values]
        energy, errors = self.energy(chain, precisions, x, values, y, top)
        energy.backward()
        return loss, forward[-1], errors

    def energy(
        self, chain: Chain, precisions: Sequence[float], x: Tensor, values: list[Tensor], y: Tensor, top: Loss
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean over the batch, and the errors of the inner blocks."""
        below = [x, *values]
        predictions = [block(h) for block, h in zip(chain.blocks, below)]
        errors = [v - p for v, p in zip(values, predictions)]
        energy = self.output_precision * top(predictions[-1], y)
        for pi, e in zip(precisions, errors):
            energy = energy + 0.5 * pi * e.square().sum() / len(x)
        return energy, [e.detach() for e in errors]


class _Precisions:
    """One number a block: the mean square error of the average block over a running one of its own, within bounds."""

    def __init__(self, blocks: int, speed: float = 0.05, bound: float = 10.0) -> None:
        self.speed, self.bound = speed, bound
        self.squares: list[float] = []
        self.values = [1.0] * blocks

    def follow(self, errors: Sequence[Tensor]) -> None:
        now = [max(float(e.square().mean()), 1e-12) for e in errors]
        self.squares = [s + self.speed * (v - s) for s, v in zip(self.squares or now, now)]
        typical = sum(self.squares) / max(len(self.squares), 1)
        self.values = [min(max(typical / s, 1 / self.bound), self.bound) for s in self.squares]

    def state_dict(self) -> dict[str, Any]:
        return {"squares": list(self.squares), "values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.squares, self.values = list(state["squares"]), list(state["values"])


def _first(loader: Loader, device: torch.device, seed: int) -> Tensor:
    """The first batch's input; the loader's order is as before afterwards."""
    state = generator_state(loader)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    with forked_rng(device):
        torch.manual_seed(seed)
        x = next((x for x, _ in loader if len(x)), None)
    if state is not None:
        loader.generator.set_state(state)  # type: ignore[attr-defined]
    if x is None:
        raise BadInput("the loader yielded no samples")
    if not isinstance(x, Tensor) or not bool(torch.isfinite(x).all()):
        raise BadInput("x must be one tensor of finite values")
    return to(x, device)
