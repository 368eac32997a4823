"""Running a network of ordinary layers and spiking neurons over time.

*The idea.* In a spiking network only the neurons know about time. So a network may be any ``nn.Module`` made for one step, (batch, ...)
in and (batch, ...) out; :func:`unroll` runs it over a sequence and carries the neurons' states, which it takes and returns as a plain
dictionary from the path of a neuron to its tensor. Two orders give the same result:

- ``"layer"``: all steps are folded into the batch and each layer runs once, each neuron as one scan. Fast; memory grows with the steps.
- ``"step"``: all layers for one step, then the next. What streaming, early exits and step-local learning need.

Both are one mechanism: the module is called on all steps, or on one, folded into the batch, and the neurons unfold them. Batch
normalisation is the one layer that can tell: in training, layer order normalises over all steps together. Where the input is the same at
every step (:func:`~neurarium.spiking.encode.direct`), both run the layers before the first neuron once.

``checkpoint=n`` keeps for the backward pass only the states between segments of ``n`` steps and runs each segment once more: exact, with
memory for ``n`` steps plus the states in between, least near ``n = sqrt(steps)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.spiking.encode import direct
from neurarium.spiking.neuron import Neuron, Pass, State

__all__ = ["OverTime", "SpikingSequential", "State", "check", "reset", "split", "step", "unroll"]

Order = Literal["layer", "step"]

#: Layers that give the same rows for the same rows: before the first neuron they need to see a constant input only once.
_REPEATABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Flatten, nn.Identity, nn.ReLU,
    nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


class SpikingSequential(nn.Sequential):
    """``nn.Sequential`` that takes a whole sequence (time, batch, ...) when it is called by itself, from rest every time."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if Pass.current() is not None else unroll(self, input)[0]


class OverTime(nn.Module):
    """Makes an ordinary classifier or regressor of a network for one step: encode, unroll, average the outputs over the steps.

    Args:
        net: takes (batch, ...) of one step.
        steps: how many steps to show an input; ``None`` if inputs are sequences (batch, time, ...) already.
        encode: ``encode(x, steps)`` gives the sequence (time, batch, ...).
        order: see :func:`unroll`.
    """

    def __init__(self, net: nn.Module, steps: int | None, *, encode: Any = direct, order: Order = "layer") -> None:
        super().__init__()
        self.net, self.steps, self.encode, self.order = net, steps, encode, order

    def sequence(self, x: Tensor) -> Tensor:
        """The input of ``net``, (time, batch, ...)."""
        if self.steps is not None:
            return self.encode(x, self.steps)
        if x.dim() < 3:
            raise BadInput(f"without steps= the input is a sequence (batch, time, ...), not {tuple(x.shape)}")
        return x.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return unroll(self.net, self.sequence(x), order=self.order)[0].mean(0)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, order={self.order!r}"


def unroll(
    model: nn.Module,
    x_seq: Tensor,
    state: Mapping[str, Tensor] | None = None,
    *,
    order: Order = "layer",
    checkpoint: int | bool | None = None,
    detach_time: bool = False,
) -> tuple[Tensor, State]:
    """Runs ``model`` over ``x_seq``: (time, batch, ...) and returns its outputs (time, batch, ...) and the states after the last step.

    Args:
        state: the states before the first step, as an earlier call returned them; rest if None. Never modified.
        order: ``"layer"`` or ``"step"``, see the module's docstring.
        checkpoint: steps a segment; ``True`` for about the square root of all.
        detach_time: cut the gradient between the steps; values are unaffected.

    Raises:
        UnsupportedModel: a module carries something over time that is no neuron of this library; it is named.
    """
    if order not in ("layer", "step"):
        raise BadInput(f"order must be 'layer' or 'step', not {order!r}")
    if x_seq.dim() < 2 or x_seq.shape[0] == 0 or x_seq.shape[1] == 0:
        raise BadInput(f"unroll takes (time, batch, ...) with at least one step and one row, not {tuple(x_seq.shape)}")
    if checkpoint is not None and checkpoint is not True and checkpoint < 1:
        raise BadInput(f"checkpoint must be at least 1 step, not {checkpoint}")
    paths = check(model)
    state = dict(state or {})
    if unknown := [key for key in state if key.partition("#")[0] not in paths.values()]:
        raise BadInput(f"the state has entries for {unknown}, which are no neurons of this model; it has {sorted(paths.values())}")
    if checkpoint and torch.is_grad_enabled():
        length = math.isqrt(len(x_seq) - 1) + 1 if checkpoint is True else checkpoint
        return _segments(model, paths, x_seq, state, order, length, detach_time)
    return _run(model, paths, x_seq, state, order, detach_time)


def step(model: nn.Module, x: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
    """One step: ``x`` (batch, ...) and the states before it -> output (batch, ...) and the states after it. For streams."""
    y, state = unroll(model, x.unsqueeze(0), state, order="step")
    return y[0], state


def reset(model: nn.Module) -> None:
    """Does nothing, and is here for code that comes from libraries whose neurons hold state: these hold none."""
    del model


def check(model: nn.Module) -> dict[nn.Module, str]:
    """The neurons of ``model`` and their paths; raises :class:`UnsupportedModel` for a module with a memory of its own."""
    paths: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if isinstance(module, Neuron):
            paths[module] = where
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            raise UnsupportedModel(f"{type(module).__name__} recurs over time by itself; only spiking neurons may", module=where)
        elif isinstance(module, OverTime) and module is not model:
            raise UnsupportedModel("OverTime runs over time by itself; give its net", module=where)
        elif isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise UnsupportedModel("attends over its first dimension, which holds time and batch here; use batch_first=True", module=where)
        elif hasattr(module, "init_hidden") or hasattr(module, "_memories"):  # snntorch's and spikingjelly's neurons
            hint = "use LIF.like_snntorch(...) or LIF.like_spikingjelly(...)"
            raise UnsupportedModel(f"{type(module).__name__} keeps a hidden state of its own; {hint}", module=where)
    if isinstance(model, OverTime):
        raise UnsupportedModel("runs over time by itself; give its .net", module="OverTime")
    return paths


def _run(
    model: nn.Module, paths: Mapping[nn.Module, str], x_seq: Tensor, state: State, order: str, detach_time: bool
) -> tuple[Tensor, State]:
    first, model = split(model, x_seq)
    once = None if first is None else first(x_seq[0])
    if order == "layer":
        constant = once is not None and len(model) > 0 and isinstance(model[0], Neuron)
        run = Pass(paths, len(x_seq), state, detach_time=detach_time, constant=constant)
        with run.open():
            y = model(once if constant else (x_seq if once is None else direct(once, len(x_seq))).flatten(0, 1))
        return y.unflatten(0, (len(x_seq), -1)), state | run.left
    outputs = []
    for x in x_seq if once is None else [once] * len(x_seq):
        run = Pass(paths, 1, {key: v.detach() for key, v in state.items()} if detach_time else state)
        with run.open():
            outputs.append(model(x))
        state = state | run.left
    return torch.stack(outputs), state


def split(model: nn.Module, x_seq: Tensor) -> tuple[nn.Module | None, nn.Module]:
    """The layers before the first neuron, and the rest. There are none of the first unless every step of ``x_seq`` is the same memory and
    ``model`` is a plain sequence of layers: only then is it safe to run them once for all steps.
    """
    if len(x_seq) == 1 or x_seq.stride(0) != 0 or type(model) not in (nn.Sequential, SpikingSequential):
        return None, model
    layers = list(model)
    n = next((i for i, layer in enumerate(layers) if not isinstance(layer, _REPEATABLE)), len(layers))
    return (nn.Sequential(*layers[:n]), nn.Sequential(*layers[n:])) if n else (None, model)


def _segments(
    model: nn.Module, paths: Mapping[nn.Module, str], x_seq: Tensor, state: State, order: str, length: int, detach_time: bool
) -> tuple[Tensor, State]:
    first, model = split(model, x_seq)
    if first is not None:
        x_seq = direct(first(x_seq[0]), len(x_seq))
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = []
    for x in x_seq.split(length):
        before, after = list(state), []

        def run(x: Tensor, *values: Tensor, before: list[str] = before, after: list[str] = after) -> tuple[Tensor, ...]:
            y, left = _run(model, paths, x, dict(zip(before, values)), order, detach_time)
            after[:] = left
            return y, *left.values()

        y, *values = _Segment.apply(run, model, len(before), x, *state.values(), *parameters)
        outputs.append(y)
        state = dict(zip(after, values))
    return torch.cat(outputs), state


class _Segment(torch.autograd.Function):
    """A stretch of time that is run without gradients, and again with them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Any, model: nn.Module, states: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.model, ctx.parameters = run, model, tensors[states:]
        ctx.rng = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        ctx.save_for_backward(x, *tensors[:states])
        ctx.set_materialize_grads(False)
        return run(x, *tensors[:states])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        saved = [a.detach().requires_grad_(n) for a, n in zip(ctx.saved_tensors, needed)]
        inputs = [*saved, *ctx.parameters]
        with torch.enable_grad(), _again(ctx.model, *ctx.rng, saved[0].device):
            outputs = ctx.run(*saved)
        pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
        wanted = [a for a, n in zip(inputs, needed) if n]
        if not pairs:
            return (None,) * (3 + len(inputs))
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return None, None, None, *(next(found) if n else None for n in needed)


@contextmanager
def _again(model: nn.Module, rng: Tensor, cuda_rng: Tensor | None, device: torch.device) -> Iterator[None]:
    """A second run of the same thing: the same random numbers, and no second update of running statistics."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=[device] if cuda_rng is not None else []):
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng, device)
        yield
    for buffer, before in buffers:
        buffer.data.copy_(before)  # .data: batch normalisation saved the buffer for its backward pass and never reads it there
