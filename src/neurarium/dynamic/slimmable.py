"""Universally slimmable networks: the sandwich rule with in-place distillation, which later families are compared with.

Each step trains the largest network on the labels, and the smallest and a few others on the largest one's (detached) soft answers: the
largest and the smallest bound what all others can do.

*Equations.* L = CE(f_largest(x), y) + sum_{c drawn} [d KL(softmax f_largest(x) || softmax f_c(x)) + (1 - d) CE(f_c(x), y)], over the number
of terms; d = 1 in the paper.

*Source.* Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", arXiv 1903.05134.

*Departures.* The terms are averaged instead of summed, so that learning rates mean the same as those of one network. ``distil`` below 1
mixes in the labels: in short trainings the largest network is for long no teacher.

*Cost.* A step costs the sum of its draws, the largest among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.dynamic.elastic import ElasticFamily
from neurarium.dynamic.samplers import Sampler, Sandwich
from neurarium.dynamic.sorted import ElasticPolicy
from neurarium.errors import BadInput

__all__ = ["Slimmable"]


class Slimmable(ElasticPolicy):
    """A family trained by sandwiches.

    Args:
        draws: configs a step besides the largest and the smallest.
        sampler: another choice; its first config is the teacher of the others.
        distil: d, the share of the teacher in what the others learn; the rest are the labels.
    """

    def __init__(
        self, family: ElasticFamily, *, draws: int = 2, sampler: Sampler | None = None, distil: float = 1.0, seed: int = 0
    ) -> None:
        if not 0 <= distil <= 1:
            raise BadInput(f"distil must be a share between 0 and 1, not {distil}")
        super().__init__(family, sampler or Sandwich(family.configs, draws), seed=seed)
        self.distil = distil

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        teacher, *others = self.draw(step)
        answer = self.family.run(x, teacher)
        terms = [self.criterion(answer, y)]
        target = answer.detach().log_softmax(-1)
        for config in others:
            out = self.family.run(x, config)
            soft = F.kl_div(out.log_softmax(-1), target, reduction="batchmean", log_target=True)
            terms.append(soft if self.distil == 1 else self.distil * soft + (1 - self.distil) * self.criterion(out, y))
        return torch.stack(terms).mean()
