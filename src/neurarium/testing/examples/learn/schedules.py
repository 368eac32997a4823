"""Tiny examples: schedules, on an optimizer of torch that takes its cycle along."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD

from neurarium.learn.balance import Recipe
from neurarium.learn.schedule import OneCycle
from neurarium.testing import Example

__all__ = ["disciplined_hparams", "super_convergence"]


class Cycled(SGD):
    """SGD that steps its own cycle, and keeps it in its ``state_dict``: a schedule as the checks of an optimizer see it."""

    def __init__(self, params: Any, schedule: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.cycle = schedule(self)

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if hasattr(self, "cycle"):
            self.cycle.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "cycle": self.cycle.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.cycle.load_state_dict(state.pop("cycle"))
        super().load_state_dict(state)


def super_convergence() -> Example:
    """A cycle that the forty steps of the check just fill; each group's own rate is its peak."""
    return Example("optimizer", make=lambda params: Cycled(params, lambda o: OneCycle(o, None, 40), lr=0.2, momentum=0.9))


def disciplined_hparams() -> Example:
    """The optimizer and the cycle of a recipe that a search has found."""

    def make(params: Any) -> torch.optim.Optimizer:
        def sgd(params: Any, **settings: Any) -> torch.optim.Optimizer:
            return Cycled(params, lambda o: recipe.schedule(o, 40), momentum=0.9, **settings)

        recipe = Recipe(0.2, (0.95, 0.85), 1e-4, 0, (), None, sgd)
        return recipe.optimizer(params)

    return Example("optimizer", make=make)
