"""From a batch of values to a sequence: what a spiking network sees at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["direct", "latency", "poisson"]


def direct(x: Tensor, steps: int) -> Tensor:
    """The same real-valued ``x`` (batch, ...) at every step: (steps, batch, ...), a view that takes no memory.

    The first layer then turns currents into spikes; also called constant-current coding.
    """
    return x.unsqueeze(0).expand(_positive(steps), *x.shape)


def poisson(x: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent spikes at each step with probability ``x`` in [0, 1]: (steps, batch, ...)."""
    _unit_interval(x)
    return (torch.rand((_positive(steps), *x.shape), generator=generator, device=x.device) < x).to(x.dtype)


def latency(x: Tensor, steps: int) -> Tensor:
    """One spike each, the earlier the larger ``x`` in [0, 1]: 1 fires at the first step, 0 never. (steps, batch, ...)."""
    _unit_interval(x)
    when = ((1 - x) * _positive(steps)).floor().clamp_max(steps - 1)
    fires = torch.arange(steps, device=x.device, dtype=x.dtype).view(-1, *[1] * x.dim()) == when
    return (fires & (x > 0)).to(x.dtype)


def _positive(steps: int) -> int:
    if steps < 1:
        raise BadInput(f"steps must be at least 1, not {steps}")
    return steps


def _unit_interval(x: Tensor) -> None:
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise BadInput("spike coding takes values in [0, 1] (and no NaN): rescale x first")
