"""Which configurations a training step of a family uses: ``sample(step, generator) -> list[Config]``.

``configs`` are ordered from the cheapest to the dearest, as those of every family. Configurations may be of any type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["Important", "Progressive", "Sampler", "Sandwich", "Sorted", "Uniform"]


class Sampler(Protocol):
    """What trains a family."""

    def sample(self, step: int, generator: torch.Generator | None = None) -> list[Any]:
        """The configurations whose gradients one step accumulates."""


def _some(configs: Sequence[Any]) -> tuple[Any, ...]:
    if not configs:
        raise BadInput("a sampler needs at least one configuration")
    return tuple(configs)


def _draw(weights: Tensor, n: int, generator: torch.Generator | None, replacement: bool = True) -> list[int]:
    return torch.multinomial(weights, n, replacement, generator=generator).tolist()


class Uniform:
    """n configurations, each alike likely."""

    def __init__(self, configs: Sequence[Any], n: int = 1) -> None:
        self.configs, self.n = _some(configs), n
        self.weights = torch.ones(len(self.configs))

    def sample(self, step: int, generator: torch.Generator | None = None) -> list[Any]:
        del step
        return [self.configs[i] for i in _draw(self.weights, self.n, generator)]


class Sandwich:
    """The largest, the smallest, and n others (universally slimmable networks)."""

    def __init__(self, configs: Sequence[Any], n: int = 2) -> None:
        self.configs, self.n = _some(configs), n

    def sample(self, step: int, generator: torch.Generator | None = None) -> list[Any]:
        del step
        inner = self.configs[1:-1] or self.configs
        drawn = _draw(torch.ones(len(inner)), self.n, generator) if self.n else []
        return [self.configs[-1], self.configs[0], *(inner[i] for i in drawn)]


class Sorted:
    """n nested sub-networks by the probabilities P_B; without replacement n different ones (SortedNet).

    n equal to the number of configurations and no replacement is the exact sum over all.
    """

    def __init__(
        self, configs: Sequence[Any], n: int = 2, probabilities: Sequence[float] | Tensor | None = None, replacement: bool = True
    ) -> None:
        self.configs, self.n, self.replacement = _some(configs), n, replacement
        self.probabilities = torch.ones(len(self.configs)) if probabilities is None else torch.as_tensor(probabilities, dtype=torch.float)
        p = self.probabilities
        if p.shape != (len(self.configs),) or not bool(torch.isfinite(p).all()) or bool((p < 0).any()) or not bool(p.sum() > 0):
            raise BadInput(f"need a probability >= 0 for each of the {len(self.configs)} configurations")
        if not replacement and n > int((p > 0).sum()):
            raise BadInput(f"cannot draw {n} different configurations out of {int((p > 0).sum())}")

    def sample(self, step: int, generator: torch.Generator | None = None) -> list[Any]:
        del step
        return [self.configs[i] for i in _draw(self.probabilities, self.n, generator, self.replacement)]


class Progressive:
    """Phases that open one dimension after another, each with its own configurations and number of draws (ProARD, once-for-all).

    Args:
        phases: ``(steps, configs, n)``: so many steps draw n of these configurations uniformly. The last phase goes on for ever.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[Any], int]]) -> None:
        if not phases or any(steps < 0 or n < 1 for steps, _, n in phases):
            raise BadInput("need at least one phase (steps, configs, n) with steps >= 0 and n >= 1")
        self.phases = [(steps, _some(configs), n) for steps, configs, n in phases]

    def phase(self, step: int) -> int:
        """Which phase a step belongs to."""
        for i, (steps, _, _) in enumerate(self.phases[:-1]):
            if step < steps:
                return i
            step -= steps
        return len(self.phases) - 1

    def sample(self, step: int, generator: torch.Generator | None = None) -> list[Any]:
        _, configs, n = self.phases[self.phase(step)]
        return [configs[i] for i in _draw(torch.ones(len(configs)), n, generator)]


class Important:
    """The largest, the smallest, and n whose bin of cost is drawn uniformly and which in it are drawn by softmax(score / temperature).

    Args:
        bins: configurations by cost, cheapest bin first; empty bins are left out.
        scores: one for each of them.
    """

    def __init__(
        self,
        bins: Sequence[Sequence[Any]],
        scores: Sequence[Sequence[float]],
        *,
        largest: Any,
        smallest: Any,
        n: int = 2,
        temperature: float = 0.5,
    ) -> None:
        if temperature <= 0:
            raise BadInput(f"temperature must be positive, not {temperature}")
        if [len(b) for b in bins] != [len(s) for s in scores]:
            raise BadInput("every configuration of every bin needs a score")
        kept = [(tuple(b), torch.tensor(s, dtype=torch.float64)) for b, s in zip(bins, scores) if len(b)]
        if not kept:
            raise BadInput("all bins are empty")
        self.bins = tuple(b for b, _ in kept)
        self.weights = tuple((s / temperature).softmax(0) for _, s in kept)
        self.largest, self.smallest, self.n = largest, smallest, n

    def sample(self, step: int, generator: torch.Generator | None = None) -> list[Any]:
        del step
        chosen = [self.largest, self.smallest]
        for b in torch.randint(len(self.bins), (self.n,), generator=generator).tolist():
            chosen.append(self.bins[b][_draw(self.weights[b], 1, generator)[0]])
        return chosen
