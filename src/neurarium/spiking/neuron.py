"""Spiking neurons as modules that hold no state between calls.

A neuron maps currents (time, batch, ...) to spikes of the same shape: called by itself it starts from rest, every time. Inside a network
the executor (:func:`neurarium.spiking.net.unroll`) opens a :class:`Pass`, in which each neuron finds its incoming state by its path and
leaves the new one; the surrounding layers then see the steps folded into the batch, so that any module of ordinary layers works
unchanged. There is nothing to reset, and nothing that a forgotten reset could leak.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.spiking.kernel import Reset, lif_sequence
from neurarium.spiking.surrogate import ATan, SigmoidSG, Surrogate, Triangle

__all__ = ["IF", "LI", "LIF", "Neuron", "Pass", "State"]

#: path of a neuron -> what it carries from one step to the next
State = dict[str, Tensor]

_current = threading.local()


class Pass:
    """One run of a network over ``steps`` steps folded into the batch; collects the states that its neurons leave in ``left``."""

    def __init__(
        self, paths: Mapping[nn.Module, str], steps: int, state: Mapping[str, Tensor], *, detach_time: bool = False, constant: bool = False
    ) -> None:
        self.paths, self.steps, self.state, self.detach_time = paths, steps, state, detach_time
        self.constant = constant  # the first neuron gets one step's input, (batch, ...), that stands for all
        self.left: State = {}
        self._calls: Counter[str] = Counter()

    @contextmanager
    def open(self) -> Iterator[Pass]:
        outer = getattr(_current, "run", None)
        _current.run = self
        try:
            yield self
        finally:
            _current.run = outer

    @staticmethod
    def current() -> Pass | None:
        """The pass that is under way in this thread."""
        return getattr(_current, "run", None)

    def through(self, neuron: Neuron, x: Tensor) -> Tensor:
        """Runs ``neuron`` over ``x``: (steps * batch, ...), between its incoming and its new state."""
        path = self.paths.get(neuron)
        if path is None:
            raise UnsupportedModel("is not registered as a submodule of the network that runs it", module=type(neuron).__name__)
        calls = self._calls[path]
        self._calls[path] += 1
        key = f"{path}#{calls}" if calls else path  # a neuron used twice in one step is two populations
        if self.constant:
            x, self.constant = x.expand(self.steps, *x.shape), False
        elif x.dim() < 1 or x.shape[0] % self.steps:
            raise UnsupportedModel(
                f"got {tuple(x.shape)}, whose first dimension is not {self.steps} steps x batch: the layers before must keep it first",
                module=path,
            )
        else:
            x = x.unflatten(0, (self.steps, -1))
        state = self.state.get(key)
        if state is not None and state.shape != x.shape[1:]:
            raise BadInput(f"the state {key!r} has shape {tuple(state.shape)}, this input needs {tuple(x.shape[1:])}")
        y, self.left[key] = neuron.run(x, state, detach_time=self.detach_time)
        return y.flatten(0, 1)


class Neuron(nn.Module):
    """Base of all modules that carry something from step to step. A subclass gives :meth:`run`."""

    def run(self, x: Tensor, state: Tensor | None = None, *, detach_time: bool = False) -> tuple[Tensor, Tensor]:
        """``x``: (time, batch, ...) and the state before it (rest if None) -> outputs (time, batch, ...) and the state after it.

        ``detach_time`` leaves the values alone and cuts the gradient between the steps.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        run = Pass.current()
        return self.run(x)[0] if run is None else run.through(self, x)


class LIF(Neuron):
    """Leaky integrate-and-fire neuron; see :mod:`neurarium.spiking.kernel` for its equations.

    Args:
        leak: factor by which the membrane decays in a step, in [0, 1].
        tau: the same as ``leak = 1 - 1 / tau``; give one of the two.
        threshold: membrane at which it fires.
        reset: ``"soft"`` (subtract the threshold), ``"hard"`` (to ``v_reset``), ``"none"``, ``"delayed"``.
        surrogate: stands in for the derivative of a spike.
        detach_reset: no gradient through the reset.
        learn_leak, learn_threshold: make them parameters (the leak as a logit, so that it stays in (0, 1)).
        per_channel: that many channels (dimension 1 of the input) have each their own.
        gain: factor on the input current.
        strict: fire at ``>`` instead of ``>=``.
    """

    def __init__(
        self,
        leak: float | None = None,
        *,
        tau: float | None = None,
        threshold: float = 1.0,
        reset: Reset = "soft",
        v_reset: float = 0.0,
        surrogate: Surrogate | None = None,
        detach_reset: bool = True,
        learn_leak: bool = False,
        learn_threshold: bool = False,
        per_channel: int | None = None,
        gain: float = 1.0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if (leak is None) == (tau is None):
            raise BadInput("give either leak or tau (leak = 1 - 1 / tau)")
        if tau is not None and not tau >= 1:
            raise BadInput(f"tau must be at least 1, not {tau}")
        leak = 1 - 1 / tau if leak is None else leak
        if not 0 <= leak <= 1 or (learn_leak and not 0 < leak < 1):
            raise BadInput(f"leak must lie in [0, 1], strictly inside if it is learned, not {leak}")
        if not threshold > 0:
            raise BadInput(f"threshold must be positive, not {threshold}")
        if reset not in ("soft", "hard", "none", "delayed"):
            raise BadInput(f"reset must be 'soft', 'hard', 'none' or 'delayed', not {reset!r}")
        if per_channel is not None and not (learn_leak or learn_threshold):
            raise BadInput("per_channel needs learn_leak or learn_threshold")
        self.reset, self.v_reset, self.detach_reset, self.gain, self.strict = reset, v_reset, detach_reset, gain, strict
        self.surrogate = surrogate or Triangle()
        self.initial = (float(leak), float(threshold))
        size = () if per_channel is None else (per_channel,)
        self.leak_logit = nn.Parameter(torch.empty(size)) if learn_leak else None
        self.level = nn.Parameter(torch.empty(size)) if learn_threshold else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        leak, threshold = self.initial
        with torch.no_grad():
            if self.leak_logit is not None:
                self.leak_logit.fill_(math.log(leak / (1 - leak)))
            if self.level is not None:
                self.level.fill_(threshold)

    @property
    def leak(self) -> float | Tensor:
        """The decay factor, as a number or, if learned, a tensor."""
        return self.initial[0] if self.leak_logit is None else torch.sigmoid(self.leak_logit)

    @property
    def threshold(self) -> float | Tensor:
        """The firing threshold, as a number or, if learned, a parameter."""
        return self.initial[1] if self.level is None else self.level

    def run(self, x: Tensor, state: Tensor | None = None, *, detach_time: bool = False) -> tuple[Tensor, Tensor]:
        return lif_sequence(
            x if self.gain == 1 else x * self.gain, state, leak=_per_channel(self.leak, x), threshold=_per_channel(self.threshold, x),
            reset=self.reset, v_reset=self.v_reset, surrogate=self.surrogate, detach_reset=self.detach_reset, detach_time=detach_time,
            strict=self.strict,
        )  # fmt: skip

    def extra_repr(self) -> str:
        leak, threshold = self.initial
        return f"leak={leak:.4g}, threshold={threshold:.4g}, reset={self.reset!r}, surrogate={self.surrogate}"

    @classmethod
    def like_snntorch(cls, beta: float, threshold: float = 1.0, reset_mechanism: str = "subtract", **options: Any) -> LIF:
        """The neuron that ``snntorch.Leaky`` is: fires above the threshold, subtracts one step later, ATan surrogate."""
        reset = {"subtract": "delayed", "zero": "hard", "none": "none"}
        if reset_mechanism not in reset:
            raise BadInput(f"reset_mechanism must be one of {sorted(reset)}, not {reset_mechanism!r}")
        return cls(beta, threshold=threshold, reset=reset[reset_mechanism], strict=True, **{"surrogate": ATan(2.0), **options})

    @classmethod
    def like_spikingjelly(
        cls, tau: float = 2.0, decay_input: bool = True, v_threshold: float = 1.0, v_reset: float | None = 0.0, detach_reset: bool = False,
        **options: Any,
    ) -> LIF:  # fmt: skip
        """The neuron that spikingjelly's ``LIFNode`` with these arguments is (``v_reset=None`` is its soft reset), sigmoid surrogate.

        Its membrane leaks towards ``v_reset``; here everything is measured from there, which gives the same spikes.
        """
        return cls(
            tau=tau, threshold=v_threshold - (v_reset or 0.0), reset="soft" if v_reset is None else "hard", detach_reset=detach_reset,
            gain=1 / tau if decay_input else 1.0, **{"surrogate": SigmoidSG(4.0), **options},
        )  # fmt: skip


class IF(LIF):
    """Integrate-and-fire neuron: a :class:`LIF` without leak. Takes the same arguments save ``leak`` and ``tau``."""

    def __init__(self, threshold: float = 1.0, **options: Any) -> None:
        super().__init__(1.0, threshold=threshold, **options)


class LI(Neuron):
    """Leaky integrator ``v[t] = leak * v[t-1] + x[t]`` that puts out its membrane and never fires: a readout."""

    def __init__(self, leak: float = 1.0) -> None:
        super().__init__()
        if not 0 <= leak <= 1:
            raise BadInput(f"leak must lie in [0, 1], not {leak}")
        self.leak = leak

    def run(self, x: Tensor, state: Tensor | None = None, *, detach_time: bool = False) -> tuple[Tensor, Tensor]:
        v, out = torch.zeros_like(x[0]) if state is None else state, []
        for x_t in x:
            v = self.leak * (v.detach() if detach_time else v) + x_t
            out.append(v)
        return torch.stack(out), v

    def extra_repr(self) -> str:
        return f"leak={self.leak:.4g}"


def _per_channel(value: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        return value.to(x.dtype)
    if x.dim() < 3 or x.shape[2] != len(value):
        raise BadInput(f"this neuron has {len(value)} channels, its input (time, batch, channels, ...) has shape {tuple(x.shape)}")
    return value.to(x.dtype).view(-1, *[1] * (x.dim() - 3))
