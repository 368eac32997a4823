r"""Training a spiking network with backpropagation through time (BPTT), or with the spatial part of its gradient alone (SLTT).

*The idea.* BPTT keeps every step of the forward pass until the backward pass, so memory grows with the steps. But all that a spiking
neuron hands to the next step is its membrane, scaled by the leak and reset by spikes: seen backwards, the error that travels through time
is multiplied at each step by :math:`\lambda J`, which is small, while the error that travels down through the layers is not. Leaving the
temporal paths out changes the direction of the gradient very little. Then each step's gradient needs that step alone: it is computed
at once and the step's graph is freed, so that memory is that of one step however many there are.

*Equations.* With outputs :math:`o[t]` of the last layer, both rules minimise :math:`L = \frac1T \sum_t \ell(o[t], y)`,
:math:`\ell = (1-a)\,\text{CE} + a\,\text{MSE}` (:class:`StepLoss`). SLTT uses

.. math::
   \frac{\partial L}{\partial W^l} \approx \sum_t \delta^l[t]\, s^{l-1}[t]^\top, \qquad
   \delta^l[t] = (W^{l+1\top} \delta^{l+1}[t]) \odot \sigma'(h^l[t] - \theta),

without a term from :math:`t+1`. SLTT-K (``k``) differentiates K steps only, drawn anew for every batch without replacement; the loss is
still divided by T.

*Source.* Meng, Xiao, Yan, Wang, Lin, Luo, "Towards Memory- and Time-Efficient Backpropagation for Training Spiking Neural Networks",
ICCV 2023, arXiv 2302.14311.

*Departures.* The K steps are drawn from torch's global generator, which ``fit`` seeds, so that a resumed run draws the same ones.

*Cost.* SLTT: saved memory of one step; the time of BPTT in step order less the temporal part of its backward pass. SLTT-K: K backward steps
instead of T. BPTT in layer order is the fastest exact rule on most machines and normalises batches over all steps together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, Loss, find_loss
from neurarium.roles import History
from neurarium.spiking.encode import direct
from neurarium.spiking.net import Order, OverTime, check, split, unroll
from neurarium.spiking.neuron import LI, Pass, State

__all__ = ["BPTT", "SLTT", "StepLoss"]


@dataclass(frozen=True)
class StepLoss:
    """``(1 - mse) * cross entropy + mse * squared error`` of one step's output (batch, classes) against class indices.

    The squared error pulls all outputs to the threshold (``target="ones"``, a regulariser) or to the one-hot label.
    """

    mse: float = 0.05
    target: Literal["ones", "one_hot"] = "ones"

    def __post_init__(self) -> None:
        if not 0 <= self.mse <= 1:
            raise BadInput(f"mse is a share between 0 and 1, not {self.mse}")
        if self.target not in ("ones", "one_hot"):
            raise BadInput(f"target must be 'ones' or 'one_hot', not {self.target!r}")

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(output, y)
        if self.mse == 0:
            return loss
        target = torch.ones_like(output) if self.target == "ones" else F.one_hot(y, output.shape[1]).to(output.dtype)
        return (1 - self.mse) * loss + self.mse * F.mse_loss(output, target)


@dataclass(frozen=True)
class _OverTimeRule(Backprop):
    """What the two rules share: the model is one step's network, or an :class:`OverTime` around one, whose steps and coding are used."""

    loss: str | Loss = field(default_factory=StepLoss)
    steps: int | None = field(default=None, kw_only=True)
    encode: Callable[[Tensor, int], Tensor] = field(default=direct, kw_only=True)

    def predictor(self, model: nn.Module) -> OverTime:
        """The classifier of whole inputs (batch, ...): averages the outputs over the steps."""
        return model if isinstance(model, OverTime) else OverTime(model, self.steps, encode=self.encode)

    def fit(self, model, loader, **options: Any) -> History:
        """See :meth:`neurarium.learn.fit.Learner.fit`. Trains a bare one-step network as well as an :class:`OverTime`.

        Raises:
            UnsupportedModel: a module other than a spiking neuron carries something over time, or none does; it is named.
        """
        model = self.predictor(model)
        self.accepts(model.net)
        return super().fit(model, loader, **options)

    def sequence(self, model: OverTime, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):  # a neuron would turn NaN into silence, and the loss would look fine
            raise BadInput("the batch: x holds a value that is not finite")
        return model.sequence(x)

    def accepts(self, net: nn.Module) -> None:
        if not check(net):
            raise UnsupportedModel("has no spiking neuron: nothing happens over time", module=type(net).__name__)


@dataclass(frozen=True)
class BPTT(_OverTimeRule):
    """Backpropagation through time with a loss at every step.

    Args:
        loss: of one step's output; averaged over the steps.
        order: ``"layer"`` (fast) or ``"step"`` (batch statistics per step, as SLTT has them); see :func:`~neurarium.spiking.net.unroll`.
        checkpoint: steps a segment to keep memory small at the price of a second forward pass; ``True`` for about sqrt(steps).
        steps, encode: how an input becomes a sequence if the model is a bare one-step network; see :class:`OverTime`.

    Optimizer, schedule, clip and groups as in :class:`~neurarium.learn.fit.Backprop`.
    """

    order: Order = field(default="layer", kw_only=True)
    checkpoint: int | bool | None = field(default=None, kw_only=True)

    def gradients(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        model = self.predictor(model)
        outputs, _ = unroll(model.net, self.sequence(model, x), order=self.order, checkpoint=self.checkpoint)
        ell = find_loss(self.loss)
        loss = torch.stack([_scalar(ell(o, y)) for o in outputs]).mean()
        loss.backward()
        return loss.detach(), outputs.detach().mean(0)


@dataclass(frozen=True)
class SLTT(_OverTimeRule):
    """Spatial learning through time: backpropagation at each step alone.

    Args:
        k: differentiate this many steps, drawn at random for each batch; all of them by default.
        loss: of one step's output; summed over the steps and divided by their number.
        steps, encode: how an input becomes a sequence if the model is a bare one-step network; see :class:`OverTime`.

    Optimizer, schedule, clip and groups as in :class:`~neurarium.learn.fit.Backprop`.
    """

    k: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise BadInput(f"k must be at least 1 step, not {self.k}")

    def accepts(self, net: nn.Module) -> None:
        super().accepts(net)
        for name, module in net.named_modules():
            if isinstance(module, LI) and module.leak == 1:
                why = "sums the outputs of all steps; a step-local gradient needs each step's own output, so leave it out"
                raise UnsupportedModel(why, module=name or "LI")

    def gradients(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        model, ell = self.predictor(model), find_loss(self.loss)
        sequence, paths, state = self.sequence(model, x), check(model.net), State()
        steps = len(sequence)
        chosen = set(range(steps) if self.k is None or self.k >= steps else torch.randperm(steps)[: self.k].tolist())
        first, net = split(model.net, sequence)
        # Layers that see the same input at every step run once; their gradient is gathered at their output.
        current = None if first is None else first(sequence[0])
        entry = None if current is None else current.detach().requires_grad_(current.requires_grad)
        total, average = torch.zeros((), device=x.device), 0.0
        for t in range(steps):
            run = Pass(paths, 1, state)
            with torch.set_grad_enabled(t in chosen), run.open():
                output = net(sequence[t] if entry is None else entry)
                loss = _scalar(ell(output, y)) / steps
            if t in chosen:
                loss.backward()
            state = {path: v.detach() for path, v in run.left.items()}
            total, average = total + loss.detach(), average + output.detach() / steps
            del output, loss, run  # the graph of this step goes before the next one grows
        if current is not None and current.requires_grad:
            current.backward(entry.grad)
        return total, average


def _scalar(loss: Tensor) -> Tensor:
    if loss.dim():
        raise BadInput(f"the loss of one step must be a single number, not of shape {tuple(loss.shape)}")
    return loss
