"""The contract of everything that decides: :class:`Policy`, and what a model offers to one (:class:`Staged`, :class:`Family`).

What a decision returns is :class:`neurarium.roles.Outcome`. Inputs and states are any nest of batch-first tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.tree import parameter_shapes, rows, shapes
from neurarium.errors import BadInput
from neurarium.roles import Loader, Outcome

__all__ = ["Family", "Mode", "Outcome", "Policy", "Staged"]

Mode = Literal["compact", "masked", "loop"]
Segment = Callable[[Any], Any]


@runtime_checkable
class Staged(Protocol):
    """A network cut into stages, each with a readout. ``stage(k, state)`` may reuse what earlier stages left in the state."""

    n_stages: int

    def start(self, x: Any) -> Any:
        """The state before stage 0: any nest of batch-first tensors."""

    def stage(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """The state after stage k, and readout k."""


@runtime_checkable
class Family(Protocol):
    """A set of configurations that share weights, sorted by measured cost."""

    configs: tuple[Any, ...]

    def run(self, x: Any, config: Any) -> Tensor:
        """The output of one configuration."""

    def extract(self, config: Any) -> nn.Module:
        """A stand-alone module with copied weights that computes the same."""


class Policy(nn.Module, ABC):
    """Decides per input, or per budget, what to run.

    Call ``eval()`` before deciding, as with any module: dropout and batch normalisation follow the module's mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[Any, CostTable] = {}

    def forward(self, x: Any) -> Tensor:
        """The output under the current setting. ``torch.export`` sees the masked form, which is one graph without branches."""
        if torch.compiler.is_exporting():
            return self.masked(x)
        return self.decide(x).output

    @abstractmethod
    def decide(self, x: Any, *, budget: float | None = None, threshold: float | None = None, mode: Mode = "compact") -> Outcome:
        """Run x. ``budget``: mean FLOPs a row (needs :meth:`calibrate`); ``threshold``: how sure to be; neither: the current setting.

        ``mode``: ``"compact"`` computes only what is needed, ``"masked"`` everything (and charges it), ``"loop"`` row after row.
        """

    @abstractmethod
    def masked(self, x: Any) -> Tensor:
        """The output under the current setting as one graph: everything is run, nothing branches."""

    @abstractmethod
    def outputs(self, x: Any) -> list[Tensor]:
        """All readouts, nothing skipped."""

    @abstractmethod
    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        """The training objective for one batch."""

    @abstractmethod
    def calibrate(self, loader: Loader, *, grid: int = 64) -> Any:
        """One dense pass over ``(x, y)`` batches; afterwards ``budget=`` works. Returns the measured trade-off."""

    @abstractmethod
    def segments(self) -> Sequence[Segment]:
        """What is run, in order, each on what the one before it returned: the units that :meth:`costs` prices."""

    def trainable(self, step: int = 0) -> list[nn.Parameter]:
        """The parameters that the loss of ``step`` may change."""
        return [p for p in self.parameters() if p.requires_grad]

    def begin_epoch(self, epoch: int, step: int, loader: Loader) -> None:
        """Called before each epoch with what the policy may look at (validation data if there is any, else the training data)."""
        del epoch, step, loader

    def costs(self, example: Any) -> CostTable:
        """FLOPs of each path, measured on one row shaped like ``example``'s and kept per shape (of the input and of the parameters)."""
        if rows(example) == 0:
            raise BadInput("an empty batch has no cost: pass at least one row")
        key = shapes(example), parameter_shapes(self)
        if key not in self._tables:
            with evaluating(self):
                self._tables[key] = CostTable.measure(self.segments(), example)
        return self._tables[key]

    def __getstate__(self) -> dict[str, Any]:
        # A copy may be pruned or rewired before it is asked again, so prices are not copied.
        return {**super().__getstate__(), "_tables": {}}
