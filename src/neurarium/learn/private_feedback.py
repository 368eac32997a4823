"""Private direct feedback alignment: the noise of an analog projection, calibrated, hides each sample's label.

An optical projection of the error is noisy anyway. If what it may say of one sample is clipped, and the noise is known, then a network
that learns from it is differentially private: the noise that the accountant asks for costs nothing, the light brings it.

*Equations.* Sample i sends ``f_i = clip(B e_i, tau) + N(0, sigma^2 I)`` to the hidden blocks (one L2 clip over all of them together) and
``clip(e_i, tau_e) + N(0, sigma^2 I)`` to the last; the update is that of :class:`~neurarium.learn.feedback.DFA` with these in the place of
``B e_i`` and ``e_i``. In the weights' updates, the inputs of linear and convolution layers are bounded entrywise,
``clamp(h + tau_min / sqrt(n), -tau_max / sqrt(n), tau_max / sqrt(n))``, so that ``|h| <= tau_max``; the forward pass is left as it is.
The aggregated noise of unit k is Gaussian with covariance ``(sigma / m)^2 sum_i f'(a_ik)^2 h_i h_i^T``: it depends on the data.

*Two accountants.* ``analysis="label"``, the sound one: inputs are public, labels are private. All that training sees of label i are the
two noisy releases above, each of sensitivity ``2 tau``, once an epoch; the rest is post-processing. Renyi divergence of order a:
``a (2 tau)^2 / (2 sigma^2)`` a release, summed over releases and epochs. ``analysis="published"`` also covers the inputs and composes
over steps, but it needs the aggregated noise to be spread evenly over all directions, which is an **assumption**: with a batch smaller
than the layer the covariance has not even full rank. It is returned with its assumptions and proves nothing without them.

*Source.* Ohana et al., "Photonic Differential Privacy with Direct Feedback Alignment" (arXiv 2106.03645). Conversion of Renyi to
approximate privacy: Canonne, Kamath, Steinke (arXiv 2004.00010), proposition 12; the classic one for ``"published"``.

*Departures.* One clip over all layers' feedback, where the paper clips each; noise on the last layer's error too, without which there is
no guarantee at all; the published constants are reconstructed. Accuracy and loss in the training history are **not** private.

*Cost.* That of DFA. :class:`DPSGD`, the usual way to private training, holds a gradient for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain
from neurarium.learn.feedback import DFA
from neurarium.learn.fit import Backprop, find_loss

__all__ = ["DPSGD", "PrivacySpent", "PrivateDFA", "epsilon", "rdp_gaussian", "rdp_to_dp"]

ORDERS = (*(1 + i / 100 for i in range(1, 10)), *(1 + i / 10 for i in range(1, 100)), *range(11, 65), 128, 256, 512)
LABEL = (
    "the inputs are public, each label is one person's",
    "every sample is in at most one batch an epoch",
    "the order of the batches does not depend on labels",
    "nothing else is published that was computed from the labels: no training accuracy, no early stopping, no tuning on them",
)
PUBLISHED = (
    "the noise that a batch adds to a layer's update has the standard deviation sigma * |f'| * tau_max / sqrt(batch) in every direction",
    "the covariance of that noise is the same for neighbouring data sets",
    "the last layer's update is covered as one more layer with the same clips",
)


@dataclass(frozen=True, kw_only=True)
class PrivateDFA(DFA):
    """Direct feedback alignment from clipped, noisy errors.

    Args:
        sigma: standard deviation of the noise on each number that is released.
        feedback_clip: largest L2 norm of what one sample feeds back to all hidden blocks together.
        error_clip: largest L2 norm of one sample's error at the last block.
        activation_clip: largest L2 norm of a layer's input in the update of its weights; ``inf`` leaves inputs alone.
        activation_offset: what is added to those inputs, as an L2 norm, to keep them away from 0.

    Other arguments: :class:`~neurarium.learn.feedback.DFA`. Batch norms are refused, and so is an optical projector whose exposure adapts
    to the batch: both let one sample show in what the others release.
    """

    sigma: float = 0.1
    feedback_clip: float = 1.0
    error_clip: float = 1.0
    activation_clip: float = 1.0
    activation_offset: float = 1e-6

    @property
    def sensitivity_to_noise(self) -> float:
        """How far one label can move all that is released of it in one epoch, in standard deviations."""
        return 2 * math.hypot(self.feedback_clip, self.error_clip) / self.sigma if self.sigma else math.inf

    def accept(self, chain: Chain, feedback: Any) -> None:
        for name in ("sigma", "activation_offset"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"{name} must be >= 0, not {getattr(self, name)}")
        for name in ("feedback_clip", "error_clip", "activation_clip"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} must be > 0, not {getattr(self, name)}")
        for block, names in zip(chain.blocks, chain.names):
            refuse_batch_norm(block, names[0])
        if hasattr(feedback, "saturation") and feedback.saturation is None:
            raise BadInput("the projector's exposure adapts to the batch, so samples are not apart: set its saturation=")

    def gradients(self, chain: Chain, feedback: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with bounded_inputs(chain, self.activation_clip, self.activation_offset):
            return super().gradients(chain, feedback, x, y)

    def signals(self, feedback: Any, e: Tensor, widths: Sequence[int]) -> list[Tensor]:
        *hidden, top = super().signals(feedback, e, widths)
        top = self.release(top, self.error_clip)
        return [*self.release(torch.cat(hidden, 1), self.feedback_clip).split(list(widths), 1), top] if hidden else [top]

    def release(self, values: Tensor, clip: float) -> Tensor:
        """One row a sample: clipped to the L2 norm ``clip``, plus noise."""
        if math.isfinite(clip):
            values = values * (clip / values.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
        return values + self.sigma * torch.randn_like(values) if self.sigma else values


@dataclass(frozen=True, kw_only=True)
class DPSGD(Backprop):
    """Backpropagation with each sample's gradient clipped and noise on their sum, the baseline of private training.

    Args:
        sigma: standard deviation of the noise on the sum of a batch's gradients.
        gradient_clip: largest L2 norm of one sample's gradient of all parameters together.
    """

    sigma: float = 1.0
    gradient_clip: float = 1.0

    @property
    def sensitivity_to_noise(self) -> float:
        return 2 * self.gradient_clip / self.sigma if self.sigma else math.inf

    def gradients(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        refuse_batch_norm(model, type(model).__name__)
        loss = find_loss(self.loss)
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def one(values: dict[str, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            output = functional_call(model, values, (a[None],))
            return loss_of(loss, output, b[None]), output[0]

        with torch.no_grad():
            values = {n: p.detach() for n, p in learned.items()}
            found = vmap(grad_and_value(one, has_aux=True), in_dims=(None, 0, 0), randomness="different")(values, x, y)
            gradients, (losses, output) = found
            norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]).norm(dim=0)
            weights = (self.gradient_clip / norms.clamp_min(1e-12)).clamp_max(1) / len(x)
            for n, p in learned.items():
                p.grad = torch.tensordot(weights, gradients[n], 1)
                if self.sigma:
                    p.grad += self.sigma / len(x) * torch.randn_like(p)
        return losses.mean(), output


def loss_of(loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, y: Tensor) -> Tensor:
    # Checks that look at values cannot run inside vmap.
    return F.cross_entropy(output, y) if loss is find_loss("cross_entropy") else loss(output, y)


@dataclass(frozen=True)
class PrivacySpent:
    """(epsilon, delta)-differential privacy, provided that ``assumptions`` hold."""

    epsilon: float
    delta: float
    order: float
    assumptions: tuple[str, ...]


def epsilon(
    learner: PrivateDFA | DPSGD, *, n: int, batch: int, steps: int, layers: int = 3, delta: float = 1e-5, analysis: str = "label"
) -> PrivacySpent:
    """What ``steps`` batches of ``batch`` out of ``n`` samples have given away.

    Args:
        layers: that have weights; only the published analysis asks.
        analysis: ``"label"`` (sound) or ``"published"`` (needs strong assumptions, see the module's text).
    """
    if not 0 < delta < 1 or min(n, batch) < 1 or steps < 0 or batch > n:
        raise BadInput(f"needs 0 < delta < 1, 1 <= batch <= n, steps >= 0; got delta={delta}, batch={batch}, n={n}, steps={steps}")
    if analysis == "label":
        passes = math.ceil(steps / math.ceil(n / batch))
        rdp = [passes * rdp_gaussian(learner.sensitivity_to_noise, 1.0, a) for a in ORDERS]
        return PrivacySpent(*rdp_to_dp(rdp, ORDERS, delta), assumptions=LABEL)
    if analysis != "published" or not isinstance(learner, PrivateDFA):
        raise BadInput(f"analysis must be 'label', or 'published' for a PrivateDFA, not {analysis!r}")
    if not learner.sigma:
        return PrivacySpent(math.inf, delta, ORDERS[0], PUBLISHED)
    # Update of one layer: sensitivity 2 tau_f tau_max g / m, noise sigma tau_max g / sqrt(m); tau_max and g = max|f'| cancel.
    sensitivity = 2 * learner.feedback_clip * layers**0.5 / batch
    rdp = [steps * rdp_gaussian(sensitivity, learner.sigma / batch**0.5, a) for a in ORDERS]
    return PrivacySpent(*rdp_to_dp(rdp, ORDERS, delta, classic=True), assumptions=PUBLISHED)


def rdp_gaussian(sensitivity: float, sigma: float, alpha: float) -> float:
    """Renyi divergence of order ``alpha`` between two Gaussians of standard deviation ``sigma`` whose means are ``sensitivity`` apart."""
    return alpha * (sensitivity / sigma) ** 2 / 2 if sigma else math.inf


def rdp_to_dp(rdp: Sequence[float], orders: Sequence[float], delta: float, *, classic: bool = False) -> tuple[float, float, float]:
    """The smallest epsilon at ``delta`` over all orders; returns ``(epsilon, delta, order)``."""
    found = []
    for r, a in zip(rdp, orders, strict=True):
        if a <= 1:
            raise BadInput(f"orders must be above 1, not {a}")
        extra = -math.log(delta) / (a - 1) if classic else math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        found.append((max(r + extra, 0.0), a))
    best, order = min(found)
    return best, delta, order


def refuse_batch_norm(module: nn.Module, name: str) -> None:
    for inner, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            where = f"{name}.{inner}" if inner else name
            raise UnsupportedModel("a batch norm mixes samples, so no clip bounds what one of them does; use a group norm", module=where)


@contextmanager
def bounded_inputs(chain: Chain, clip: float, offset: float) -> Iterator[None]:
    """Gradients of linear and convolution weights see bounded inputs; outputs are what they were."""
    if math.isinf(clip) and not offset:
        yield
        return

    def swap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (h,) = args
        root = h[0].numel() ** 0.5
        weights = apply(module, (h.detach() + offset / root).clamp(-clip / root, clip / root), module.weight, module.bias)
        bias = None if module.bias is None else module.bias.detach()
        inputs = apply(module, h, module.weight.detach(), bias) if h.requires_grad else output.detach()
        return inputs + (weights - weights.detach())  # the value is that of the inputs as they are

    def apply(module: nn.Module, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(h, weight, bias) if isinstance(module, nn.Linear) else module._conv_forward(h, weight, bias)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [m.register_forward_hook(swap) for block in chain.blocks for m in block.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
