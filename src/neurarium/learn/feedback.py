"""Direct feedback alignment: each block learns from a fixed random projection of the output error, not from the block above it.

Backpropagation sends the error down through the transposes of all weights above a layer. Direct feedback alignment sends it straight to
every layer through a random matrix that never changes. The forward weights then turn until what is fed back points the way of the gradient
(it *aligns*), so the network learns although no layer knows another's weights, and all layers can be updated at once.

*Equations.* Error ``e = dL/d(output)`` of each sample (``softmax(a_L) - onehot(y)`` for cross-entropy). Block l with output
``h_l = F_l(h_{l-1}; w_l)`` receives ``delta_l = B_l e`` in the place of ``dL/dh_l``; its update is the vector-Jacobian product of **that
block alone**, ``dw_l = (1/n) sum (dF_l/dw_l)^T delta_l``, which for a layer ``f(W h + b)`` is ``(1/n) (B_l e * f'(a_l)) h_{l-1}^T``. The
last block gets its exact gradient. The rows of all ``B_l`` are one matrix, drawn once, so that one projection serves the whole network.
*Ternary error*: ``sign(e) [|e| > t]``, what a modulator that can only show -1, 0 and 1 projects.

*Source.* Launay et al., "Light-in-the-loop" (arXiv 2006.01475); the rule itself is Noekland's (arXiv 1609.01596).

*Departures.* A block may be anything differentiable (a convolution, a residual or attention block): feedback arrives at its output and
is differentiated within it. Whether that teaches it is another question: filters that are shared over positions align badly, and random
convolutions are hard to beat this way.

*Cost.* The FLOPs of backpropagation with the products by the transposed weights replaced by one product of ``classes x sum of widths``.
The activations are kept until the error is known, as in backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.fit import History, Learner, Loss, device_of, evaluate, find_loss, forked_rng, loop, to, trainable
from neurarium.learn.local import ADAM, eval_mode, generator_state
from neurarium.roles import Loader

__all__ = ["DFA", "Projector", "RandomFeedback", "ternarise"]


class Projector(Protocol):
    """A fixed map of errors (n, in_dim) to feedback (n, out_dim); an ``nn.Module``, so that its matrix is saved with a run."""

    def project(self, e: Tensor) -> Tensor: ...


class RandomFeedback(nn.Module):
    """The plain projector: one random matrix, drawn from ``seed`` once.

    Args:
        distribution: of the entries: ``"gaussian"`` or ``"uniform"``, both with mean 0.
        scale: their standard deviation; ``in_dim ** -0.5`` by default, so that feedback is as large as the error.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, distribution: str = "gaussian", scale: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        if distribution == "gaussian":
            matrix = torch.randn(out_dim, in_dim, generator=generator)
        elif distribution == "uniform":
            matrix = (2 * torch.rand(out_dim, in_dim, generator=generator) - 1) * 3**0.5
        else:
            raise BadInput(f"distribution must be 'gaussian' or 'uniform', not {distribution!r}")
        self.register_buffer("matrix", matrix * (in_dim**-0.5 if scale is None else scale))

    def project(self, e: Tensor) -> Tensor:
        return e @ self.matrix.T


def ternarise(e: Tensor, threshold: float) -> Tensor:
    """``sign(e)`` where ``|e| > threshold``, else 0."""
    return e.sign() * (e.abs() > threshold)


@dataclass(frozen=True, kw_only=True)
class DFA(Learner):
    """Direct feedback alignment on any chain of differentiable blocks.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, or a function of ``(output, y)`` that is a mean over the batch.
        optimizer: makes the optimizer of all blocks.
        projector: ``projector(in_dim, out_dim, seed=seed)`` makes the :class:`Projector`: ``partial(RandomFeedback, scale=...)``,
            ``partial(OPU, noise=...)``. It is drawn from the ``seed`` of :meth:`fit` and saved in ``history.state``.
        ternary: an entry of a sample's error is sent as its sign if it is larger than this, else as 0. ``None``: the error itself. With
            cross-entropy it must be above ``1 / classes``: below, an untrained model sends +1 for nearly all classes of every sample,
            and this common part drives the hidden layers into saturation before they have learned anything.
        cut: the ``blocks`` to cut the model into, see :func:`~neurarium.learn.chain.as_chain`.
    """

    loss: str | Loss = "cross_entropy"
    optimizer: Callable[..., Optimizer] = ADAM
    projector: Callable[..., Any] = RandomFeedback
    ternary: float | None = None
    schedule: Callable[[Optimizer], Any] | None = None
    cut: Sequence[str | Sequence[str]] | None = None

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if self.ternary is not None and not self.ternary >= 0:
            raise BadInput(f"ternary is a threshold >= 0, not {self.ternary}")
        if device is not None:
            model.to(device)
        parameters = trainable(model)
        example = first_input(loader, device_of(model))
        chain = as_chain(model, example, self.cut)
        check(chain, model, example)
        width = sum(shape.numel() for shape, block in zip(chain.shapes[:-1], chain.blocks) if learns(block))
        feedback = self.projector(chain.shapes[-1].numel(), width, seed=seed) if width else None
        if feedback is not None:
            feedback.to(parameters[0].device, parameters[0].dtype)
        self.accept(chain, feedback)
        optimizer = self.optimizer(parameters)
        schedule = None if self.schedule is None else self.schedule(optimizer)

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            loss, output = self.gradients(chain, feedback, x, y)
            if torch.isfinite(loss):  # else the loop raises right after this returns
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            return loss, output

        return loop(
            model, loader, epochs=epochs, step=step, parts={"optimizer": optimizer, "schedule": schedule, "feedback": feedback},
            val=val, evaluator=partial(evaluate, model, loss=self.loss), seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip

    def accept(self, chain: Chain, feedback: Any) -> None:
        """Where a subclass refuses what it cannot train, or settings that make no sense."""

    def gradients(self, chain: Chain, feedback: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Leave each block's update in ``.grad`` of its parameters; return the loss and the output."""
        outputs = chain.forward(x)  # each on a graph of its own
        loss, e = output_error(find_loss(self.loss), outputs[-1], y)
        hidden = [h for h, block in zip(outputs[:-1], chain.blocks) if learns(block)]
        roots = [*hidden, outputs[-1]]
        signals = self.signals(feedback, e, [h[0].numel() for h in hidden])
        pairs = [(h, s.reshape(h.shape) / len(e)) for h, s in zip(roots, signals) if h.requires_grad]
        torch.autograd.backward([h for h, _ in pairs], [s for _, s in pairs])
        return loss, outputs[-1].detach()

    def signals(self, feedback: Any, e: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """What teaches each hidden block (n, width) and the last one (n, outputs), made of the samples' errors (n, outputs)."""
        if not widths:
            return [e]
        sent = e if self.ternary is None else ternarise(e, self.ternary)
        return [*feedback.project(sent).split(list(widths), 1), e]


def learns(block: nn.Module) -> bool:
    return any(p.requires_grad for p in block.parameters())


def check(chain: Chain, model: nn.Module, example: Tensor) -> None:
    """Refuse blocks that have weights, but an output without a gradient."""
    with torch.enable_grad(), eval_mode(model), forked_rng(example.device):
        for block, names, h in zip(chain.blocks, chain.names, chain.forward(example)):
            if learns(block) and not h.requires_grad:
                raise UnsupportedModel("its output carries no gradient to its weights, so feedback cannot teach it", module=names[0])


def output_error(loss: Loss, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and each sample's error (n, outputs): the gradient of its own loss by its output."""
    top = output.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(top, y)
        (e,) = torch.autograd.grad(value, top)
    return value.detach(), len(e) * e.flatten(1)


def first_input(loader: Loader, device: torch.device) -> Tensor:
    """The first batch of inputs; the loader's order is as before afterwards."""
    state = generator_state(loader)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    with forked_rng(device):
        x = next((x for x, _ in loader), None)
    if state is not None:
        loader.generator.set_state(state)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    if x is None:
        raise BadInput("the loader yielded no samples")
    if not isinstance(x, Tensor):
        raise BadInput("a rule of feedback to blocks needs batches (x, y) of one input tensor")
    return to(x, device)
