"""SortedNet: all leading sub-networks of one network, trained in one run.

Sub-networks are nested along every dimension: the first m channels, the first h heads, the first d blocks. A larger one contains the
smaller ones, so what all of them need settles in front: units and blocks become sorted by importance. At run time no search is left to do:
take the largest sub-network that fits the budget.

*Equations.* b = (b_1, ..., b_J) truncates dimension j to its first b_j units, theta(b) are the weights that are left.

- *objective*: min over theta of 1/|B| sum_{b in B} L(x; theta(b)), estimated in every step by g_acc draws b_i ~ P_B:
  1/g_acc sum_i L(x; theta(b_i)). g_acc = 1 is stochastic training of sub-networks, all of B without replacement the exact sum.
- *inference*: the dearest b with cost(b) <= budget.

Weights outside theta(b_i) get a gradient of exactly zero from draw i. Classifier and last norm are shared by all depths. No distillation.

*Source.* Valipour et al., "SortedNet, a Place for Every Network and Every Network in its Place: Towards a Generalized Solution for Training
Many-in-One Neural Networks", arXiv 2309.00255. Sorting by random truncation: nested dropout (Rippel et al. 2014).

*Departures.* The paper accumulates gradients of draws one after another; here the draws of a step are one loss (the same gradient). Draws
depend on ``seed`` and the step alone, so that resumed training sees the same ones.

*Cost.* A step costs the sum of its draws; switching allocates nothing; one set of weights is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.dynamic.coupling import make_elastic
from neurarium.dynamic.elastic import Config, ElasticFamily, grid, slots
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.samplers import Sampler, Sorted
from neurarium.errors import BadInput
from neurarium.learn.fit import find_loss

__all__ = ["ElasticPolicy", "SortedNet", "as_family"]

EIGHTHS = tuple(i / 8 for i in range(1, 9))


def as_family(model: nn.Module, example: Any, configs: Sequence[Config] | None = None, widths: Sequence[float] = EIGHTHS) -> ElasticFamily:
    """An :class:`ElasticFamily` as it is; else one of the configs given, by default all widths at the same share, with every depth.

    A model without elastic layers is made elastic first, as far as it can be.
    """
    if isinstance(model, ElasticFamily):
        return model
    if not any(slots(model)):
        model = make_elastic(model, example)
    return ElasticFamily(model, grid(model, widths, together=True) if configs is None else configs, example)


class ElasticPolicy(FamilyPolicy):
    """A family and a sampler: the loss of a step is a mean over the configs that the sampler draws for it."""

    def __init__(self, family: ElasticFamily, sampler: Sampler, *, loss: Any = "cross_entropy", seed: int = 0) -> None:
        super().__init__(family)
        self.sampler, self.seed, self.criterion = sampler, seed, find_loss(loss)

    def draw(self, step: int) -> list[Config]:
        """The configs of a step."""
        return self.sampler.sample(step, torch.Generator().manual_seed(1_000_003 * self.seed + step))

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        return torch.stack([self.criterion(self.family.run(x, config), y) for config in self.draw(step)]).mean()


class SortedNet(ElasticPolicy):
    """One network trained to be many nested ones.

    Args:
        model: an elastic model, an :class:`~neurarium.dynamic.elastic.ElasticFamily`, or an ordinary model (an elastic copy is made).
        example: a batch that the model takes.
        configs: the sub-networks; by default the shares ``widths`` of all widths at once, with every depth.
        accumulate: draws a step, g_acc.
        probabilities: P_B, from the cheapest config to the dearest; uniform by default.
        sampler: another choice of each step's configs.
        loss: ``"cross_entropy"``, ``"mse"`` or a function of ``(output, y)``.

    ``budget=`` runs the dearest config that fits; after ``calibrate`` the most accurate one that does.
    """

    search_free = True

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        configs: Sequence[Config] | None = None,
        *,
        widths: Sequence[float] = EIGHTHS,
        accumulate: int = 2,
        probabilities: Sequence[float] | None = None,
        sampler: Sampler | None = None,
        loss: Any = "cross_entropy",
        seed: int = 0,
    ) -> None:
        if accumulate < 1:
            raise BadInput(f"a step needs at least one draw, not {accumulate}")
        family = as_family(model, example, configs, widths)
        super().__init__(family, sampler or Sorted(family.configs, accumulate, probabilities), loss=loss, seed=seed)
