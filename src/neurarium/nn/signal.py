"""How the scale of the signal changes from layer to layer, forward and backward, and how to set it.

A recipe that starts at the wrong scale trains badly wherever no normalisation hides it. :func:`signal_report` measures every leaf of a
model on real inputs; :func:`gain_` rescales one layer's weight, from its variance alone or from a batch.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import Report

__all__ = ["Signal", "SignalReport", "gain_", "signal_report"]


@dataclass(frozen=True)
class Signal:
    """One leaf module: root mean squares and their ratios. ``backward_gain``: gradient at the input over gradient at the output."""

    name: str
    kind: str
    input_rms: float
    output_rms: float
    backward_gain: float  # NaN where no gradient reaches the input
    dead: float  # share of output features (axis 1) that are zero on the whole batch

    @property
    def gain(self) -> float:
        return self.output_rms / self.input_rms if self.input_rms else math.nan


@dataclass(frozen=True)
class SignalReport(Report):
    """Every leaf in the order of execution."""

    layers: tuple[Signal, ...]

    @property
    def gain(self) -> float:
        """From the first leaf's input to the last leaf's output."""
        return self.layers[-1].output_rms / self.layers[0].input_rms

    def describe(self) -> str:
        """A table, one line a leaf."""
        rows = [f"{'layer':<28}{'kind':<18}{'in':>10}{'out':>10}{'gain':>8}{'back':>8}{'dead':>7}"]
        for s in self.layers:
            rows.append(
                f"{s.name or '(model)':<28}{s.kind:<18}{s.input_rms:>10.3g}{s.output_rms:>10.3g}"
                f"{s.gain:>8.3g}{s.backward_gain:>8.3g}{s.dead:>7.1%}"
            )
        return "\n".join(rows)


def signal_report(model: nn.Module, x: Tensor, *, seed: int = 0) -> SignalReport:
    """Root-mean-square gains of every leaf of ``model`` on the batch ``x``, forward and backward.

    The backward pass starts from unit Gaussian cotangents. The model itself is only read: a copy runs, in the model's own train/eval
    mode, under its own random numbers. A leaf called several times is reported once a call.
    """
    if x.numel() == 0:
        raise BadInput("signal_report needs at least one input row, x is empty")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _measure(copy.deepcopy(model), x.detach().clone().requires_grad_(x.is_floating_point()))


def _measure(model: nn.Module, x: Tensor) -> SignalReport:
    calls: list[tuple[str, nn.Module, Tensor, Tensor, float, float, float]] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and inputs[0].is_floating_point():
            calls.append((names[module], module, inputs[0], output, _rms(inputs[0]), _rms(output), _dead(output)))

    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # an in-place activation would overwrite the input that is measured here
        if not any(True for _ in module.children()):
            module.register_forward_hook(note)
    with torch.enable_grad():
        out = model(x)
        if not calls:
            raise UnsupportedModel("no leaf module maps one floating-point tensor to another", module=type(model).__name__)
        ends = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        points = [t for call in calls for t in call[2:4] if t.requires_grad]
        grads = torch.autograd.grad(ends, points, [torch.randn_like(t) for t in ends], allow_unused=True) if ends else ()
    grad_of = {id(t): g for t, g in zip(points, grads) if g is not None}

    def back(i: Tensor, o: Tensor) -> float:
        return _rms(grad_of[id(i)]) / _rms(grad_of[id(o)]) if id(i) in grad_of and id(o) in grad_of and _rms(grad_of[id(o)]) else math.nan

    return SignalReport(tuple(Signal(n, type(m).__name__, a, b, back(i, o), d) for n, m, i, o, a, b, d in calls))


def _rms(t: Tensor) -> float:
    return t.detach().double().square().mean().sqrt().item()


def _dead(t: Tensor) -> float:
    features = t.detach().transpose(0, 1).flatten(1) if t.dim() > 1 else t.detach()[None]
    return (features == 0).all(1).double().mean().item()


@torch.no_grad()
def gain_(module: nn.Module, target: float = 1.0, x: Tensor | None = None) -> nn.Module:
    """Rescale the weight of one affine layer in place so that it multiplies the signal's root mean square by ``target``.

    Without ``x`` in closed form, for inputs whose entries are uncorrelated with zero mean and away from padded borders:
    ``gain^2 = fan_in * mean(weight^2)``. With
    ``x`` from the layer's response to that batch; the bias, which is no gain, is left out of the measure and as it was. A recipe offers
    ``rescale_(factor)`` beside ``weight``; a standard layer's ``weight`` is multiplied itself.

    Raises ``UnsupportedModel`` for a layer without a weight of shape (out, in, ...), ``BadInput`` where the present gain is zero or NaN.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or getattr(module, "transposed", False):
        raise UnsupportedModel("gain_ rescales layers with a weight of shape (out, in, ...)", module=type(module).__name__)
    if x is None:
        now = math.sqrt(weight[0].numel()) * _rms(weight)
    else:
        now = _rms(module(x) - module(torch.zeros_like(x))) / _rms(x) if x.numel() else math.nan
    if not (math.isfinite(now) and now > 0):
        raise BadInput(f"{type(module).__name__} has gain {now}: there is nothing to rescale")
    if hasattr(module, "rescale_"):
        module.rescale_(target / now)
    else:
        weight.mul_(target / now)
    return module
