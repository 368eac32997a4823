"""Rank plans: how every layer is to be decomposed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from neurarium.compress.factor.fold import max_rank, rank_size
from neurarium.compress.factor.lowrank import LowRankConv2d, LowRankLinear, why_not_low_rank
from neurarium.errors import BadInput

__all__ = ["RankPlan"]


@dataclass(frozen=True)
class RankPlan:
    """Splits, rank and folding scheme of each layer; :func:`~neurarium.compress.factor.lowrank.apply_ranks` carries it out.

    Attributes:
        ranks: module name -> (splits k, rank j, scheme), see :mod:`neurarium.compress.factor.fold`. Layers not named stay dense.
        errors: module name -> the planner's error of that choice.
        skipped: module name -> why it was left alone.
    """

    ranks: Mapping[str, tuple[int, int, int]]
    errors: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Raises BadInput naming the first module that is missing or cannot be decomposed so."""
        modules = dict(model.named_modules())
        for name, entry in self.ranks.items():
            if name not in modules:
                raise BadInput(f"the plan names {name!r}, which the model does not have")
            module = modules[name]
            if isinstance(module, (LowRankLinear, LowRankConv2d)):
                if module.entry != tuple(entry):
                    raise BadInput(f"{name}: the plan says (splits, rank, scheme) = {tuple(entry)}, the layer has {module.entry} already")
                continue
            if reason := why_not_low_rank(module):
                raise BadInput(f"{name}: {reason}")
            splits, rank, scheme = entry
            shape = tuple(module.weight.shape)
            if len(shape) == 2 and scheme:
                raise BadInput(f"{name}: a linear layer has scheme 0 alone, the plan says {scheme}")
            try:
                most = max_rank(shape, splits, scheme)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None
            if not 1 <= rank <= most:
                raise BadInput(f"{name}: the plan's rank is {rank}, a weight {shape} in {splits} slices has ranks 1..{most}")

    def weights(self, model: nn.Module) -> int:
        """Weights (without biases) of the planned layers once decomposed; a shared module counts once."""
        modules = {name: model.get_submodule(name) for name in self.ranks}
        sizes = {
            m: self.ranks[name][1] * rank_size(tuple(m.weight.shape), self.ranks[name][0], self.ranks[name][2])
            for name, m in modules.items()
        }
        return sum(sizes.values())

    def describe(self) -> str:
        """A table: layer, splits, rank, scheme, error."""
        rows = [f"{'layer':30} {'splits':>6} {'rank':>6} {'scheme':>6} {'error':>10}"]
        for name, (splits, rank, scheme) in self.ranks.items():
            error = f"{self.errors[name]:.4g}" if name in self.errors else "-"
            rows.append(f"{name or '(model)':30} {splits:>6} {rank:>6} {scheme:>6} {error:>10}")
        return "\n".join([*rows, *(f"{name}: left alone, {why}" for name, why in self.skipped.items())])

    def to_json(self) -> str:
        """The plan as text; :meth:`from_json` reads it."""
        ranks = {name: list(entry) for name, entry in self.ranks.items()}
        return json.dumps({"kind": "rank", "ranks": ranks, "errors": dict(self.errors), "skipped": dict(self.skipped)})

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """The plan that :meth:`to_json` wrote."""
        data = json.loads(text)
        if data.get("kind") != "rank":
            raise BadInput(f"not a rank plan: kind is {data.get('kind')!r}")
        return cls({name: tuple(entry) for name, entry in data["ranks"].items()}, data["errors"], data["skipped"])
