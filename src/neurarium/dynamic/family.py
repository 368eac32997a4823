"""One network, many configurations: the policy that picks one by budget.

A :class:`~neurarium.dynamic.outcome.Family` offers configurations that share weights. Which one runs does not depend on the input but on
what there is to spend, so the whole batch takes the same; what a paper adds is how the weights are trained (its ``loss``). Switching is
picking another index: nothing is copied, nothing is allocated.

*Budgets.* ``calibrate`` measures every configuration once; ``budget=b`` then runs the most accurate one that costs at most b FLOPs a row. A
larger budget only adds candidates, so a configuration that wins later costs more than the one it replaces: cost is monotone in the budget.
Families whose larger members are better by construction (``search_free``) need no calibration: the dearest one that fits is run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.outcome import Family, Mode, Outcome, Policy, Segment
from neurarium.dynamic.tree import has_nan, parameter_shapes, rows, shapes, take
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import device_of, to
from neurarium.roles import Loader

__all__ = ["FamilyPolicy"]


class FamilyPolicy(Policy):
    """Runs one configuration of a family; ``Outcome.choice`` is its index in ``configs``.

    Args:
        family: a module with ``configs``, ``run(x, config)`` and ``extract(config)``.

    The ``setting`` is the last configuration, the dearest one, until :meth:`use` makes another one current; it and the calibrated
    ``scores`` are part of ``state_dict``. Subclasses add the loss of their method.
    """

    #: the dearest configuration that fits is the best one: budgets need no calibration
    search_free = False

    def __init__(self, family: nn.Module) -> None:
        super().__init__()
        if not isinstance(family, nn.Module) or not isinstance(family, Family):
            raise UnsupportedModel("has no configs, run and extract: it is no family of networks", module=type(family).__name__)
        if not family.configs:
            raise BadInput("a family needs at least one configuration")
        self.family = family
        self.setting = len(family.configs) - 1
        self.scores: Tensor | None = None
        self._prices: dict[Any, tuple[int, ...]] = {}

    @property
    def configs(self) -> tuple[Any, ...]:
        return self.family.configs

    def prices(self, example: Any) -> Tensor:
        """FLOPs a row of every configuration, in the order of ``configs``, int64, for inputs shaped like ``example``."""
        if rows(example) == 0:
            raise BadInput("an empty batch has no cost: pass at least one row")
        key = shapes(example), parameter_shapes(self)
        if key not in self._prices:
            with evaluating(self):
                run = self.family.run
                self._prices[key] = tuple(CostTable.measure([partial(run, config=c)], example).full for c in self.configs)
        return torch.tensor(self._prices[key], dtype=torch.int64)

    def costs(self, example: Any) -> CostTable:
        """The prices in rising order, as the steps between them."""
        ordered = self.prices(example).sort().values
        return CostTable(tuple(ordered.diff(prepend=ordered.new_zeros(1)).tolist()))

    def pick(self, x: Any, *, budget: float | None = None, threshold: float | None = None, config: int | None = None) -> int:
        """The index of the configuration that a budget stands for, of the current one if nothing is given."""
        return self._pick(None if budget is None else self.prices(x), budget, threshold, config)

    def _pick(self, prices: Tensor | None, budget: float | None, threshold: float | None, config: int | None) -> int:
        if threshold is not None:
            raise BadInput("one configuration serves the whole batch, no row is asked how sure it is: give budget= or config=")
        if budget is not None and config is not None:
            raise BadInput("give a budget or a configuration, not both")
        if config is not None:
            if not 0 <= config < len(self.configs):
                raise BadInput(f"config must be an index from 0 to {len(self.configs) - 1}, not {config}")
            return int(config)
        if budget is None or prices is None:
            return self.setting
        if not budget >= int(prices.min()):
            raise BadInput(
                f"a budget of {budget:g} FLOPs a row is below the cheapest configuration: the smallest feasible one is {int(prices.min())}"
            )
        if self.scores is None and not self.search_free:
            raise BadInput("a budget needs a calibrated policy, which knows how good its configurations are: call calibrate(loader) first")
        rank = prices.double() if self.scores is None else self.scores
        best = max((c for c in range(len(prices)) if prices[c] <= budget), key=lambda c: (float(rank[c]), -int(prices[c])))
        return int(best)

    def front(self, example: Any) -> tuple[int, ...]:
        """The configurations that some budget picks, cheapest first."""
        picked = (self.pick(example, budget=float(p)) for p in self.prices(example).sort().values)
        return tuple(dict.fromkeys(picked))

    def use(self, x: Any = None, *, budget: float | None = None, config: int | None = None) -> FamilyPolicy:
        """Make a configuration, or what a budget picks for inputs shaped like ``x``, the current one."""
        self.setting = self.pick(x, budget=budget, config=config)
        return self

    def decide(
        self,
        x: Any,
        *,
        budget: float | None = None,
        threshold: float | None = None,
        config: int | None = None,
        mode: Mode = "compact",
    ) -> Outcome:
        """As :meth:`Policy.decide`; no row decides for itself, so ``"masked"`` and ``"compact"`` are the same run."""
        if mode not in ("compact", "masked", "loop"):
            raise BadInput(f"mode must be 'compact', 'masked' or 'loop', not {mode!r}")
        n = rows(x)
        if n == 0:
            raise BadInput("an empty batch: pass at least one row")
        if has_nan(x):
            raise BadInput("the input has NaN")
        prices = self.prices(x)
        index = self._pick(prices, budget, threshold, config)
        price = int(prices[index])
        parts = [x] if mode != "loop" else [take(x, torch.tensor([i])) for i in range(n)]
        outputs = [self.family.run(part, self.configs[index]) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        cost, choice = (torch.full((n,), value, dtype=torch.int64, device=output.device) for value in (price, index))
        return Outcome(output, cost, choice)

    def masked(self, x: Any) -> Tensor:
        return self.family.run(x, self.configs[self.setting])

    def outputs(self, x: Any) -> list[Tensor]:
        return [self.family.run(x, config) for config in self.configs]

    def extract(self, config: int | None = None, *, example: Any = None, budget: float | None = None) -> nn.Module:
        """A stand-alone module of one configuration, by index or by what ``budget`` picks for inputs like ``example``."""
        return self.family.extract(self.configs[self.pick(example, budget=budget, config=config)])

    @torch.no_grad()
    def calibrate(self, loader: Loader, *, grid: int = 64) -> Tensor:
        """Accuracy of every configuration, ``(configs,)``, which is also what budgets go by afterwards."""
        del grid
        right, n = torch.zeros(len(self.configs), dtype=torch.float64), 0
        with evaluating(self):
            for x, y in loader:
                x = to(x, device_of(self))
                right += torch.stack([self.score(out, y.to(out.device)) for out in self.outputs(x)]).double().cpu()
                n += len(y)
        if n == 0:
            raise BadInput("the loader yielded no samples to calibrate on")
        if right.isnan().any():
            raise BadInput("a calibration score is NaN: a configuration's outputs are not numbers")
        self.scores = right / n
        return self.scores

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        """How good one batch of outputs is, summed over rows; more is better. Right answers, unless a method says otherwise."""
        return (output.argmax(-1) == y).sum()

    def segments(self) -> list[Segment]:
        return [self.masked]

    def get_extra_state(self) -> Tensor:
        known = torch.empty(0, dtype=torch.float64) if self.scores is None else self.scores
        return torch.cat([known.new_tensor([self.setting]), known])

    def set_extra_state(self, state: Tensor) -> None:
        state = state.cpu()
        self.setting, self.scores = int(state[0]), state[1:].clone() if len(state) > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prices": {}}
