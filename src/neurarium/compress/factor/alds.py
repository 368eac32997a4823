"""ALDS: which layers get how much of one budget, and into how many slices is each of them cut before it is decomposed?

A layer's input channels are cut into k slices and each slice's folded weight W_i is truncated to rank j: k j (rows) + j (columns) weights
instead of rows x columns. More slices follow the weight more closely at a higher price a rank, and neither k nor j is best everywhere.
The singular values alone tell the relative error of every pair in the operator norm,

    eps(k, j) = max_i sigma_(j+1)(W_i) / sigma_1(W),

so no data and no training are needed to minimise the largest eps over layers under one budget of weights, by turns:

- *global*: with each layer's k fixed, the ranks j = #{i : eps_i > e}, with the e that just spends the budget;
- *local*: with each layer's share fixed, the k (and folding scheme) whose error at that size is least.

A few turns from many starts (the same k everywhere, or random ones); the least eps wins.

*Source*: Liebenwein et al., Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition (NeurIPS 2021),
sections 2 and 3, Theorem 1; schemes other than 0 are its ALDS+. The authors' public code was read for the starts and for the rounding.

*Departures*: Theorem 1 bounds the layer's error by sqrt(k) eps(k, j). The authors' code minimises eps without the root, which is the
default here as well; ``bound="theorem"`` is the sound bound. A layer stays dense where its factors would not be smaller, and that counts
as one more level of its curve. One start is k = 1 everywhere, so the result is never worse (in eps) than error allocation alone.
Layers that are of low rank already keep their factors and pay for them.

*Cost*: one singular value decomposition a layer, k and scheme; then seeds x iterations sorts of all error curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from neurarium.compress.allocate import minimax_bisect, uniform
from neurarium.compress.blocks import opened
from neurarium.compress.factor.fold import max_rank, rank_size, svd_curve
from neurarium.compress.factor.lowrank import LowRankConv2d, LowRankLinear, apply_ranks, decomposable
from neurarium.compress.rank_plan import RankPlan
from neurarium.errors import BadInput

__all__ = ["alds", "plan_alds", "plan_svd"]

_BOUNDS = ("operator", "theorem")
_KINDS = (nn.Conv2d, nn.Linear)


def alds(
    model: nn.Module,
    *,
    keep: float = 0.5,
    schemes: Sequence[int] = (0,),
    max_splits: int | None = None,
    seeds: int = 15,
    iterations: int = 4,
    bound: str = "operator",
    modules: Sequence[type] = _KINDS,
    seed: int = 0,
) -> nn.Module:
    """A copy of the model whose layers are replaced by thinner pairs, with ``result.plan``; train it on as you trained it before.

    Args:
        keep: share of the weights of all layers that can be decomposed (biases and norms are not counted), at most.
        schemes: foldings to choose among for each convolution (:mod:`neurarium.compress.factor.fold`); (0, 1, 2, 3) is ALDS+.
        max_splits: largest k; 1 allocates the budget only.
        seeds: starts of the search.
        iterations: turns from each start.
        bound: "operator" or "theorem".
        modules: kinds of layers to decompose.
        seed: of the random starts.

    Attention of ``nn.TransformerEncoderLayer`` and Hugging Face's Conv1D are opened (:func:`~neurarium.compress.explicit`) first.

    Raises:
        UnsupportedModel: no layer can be decomposed.
        BadInput: a budget below the least possible (rank 1 everywhere), a weight that is not finite.
    """
    model = opened(model)
    plan = plan_alds(
        model, keep=keep, schemes=schemes, max_splits=max_splits, seeds=seeds, iterations=iterations, bound=bound, modules=modules,
        seed=seed,
    )  # fmt: skip
    result = apply_ranks(model, plan)
    result.plan = plan  # type: ignore[assignment]
    return result


def plan_alds(
    model: nn.Module,
    *,
    keep: float = 0.5,
    schemes: Sequence[int] = (0,),
    max_splits: int | None = None,
    seeds: int = 15,
    iterations: int = 4,
    bound: str = "operator",
    modules: Sequence[type] = _KINDS,
    seed: int = 0,
) -> RankPlan:
    """The plan of :func:`alds`; its names are those of ``explicit(model)`` where that differs from the model."""
    if bound not in _BOUNDS:
        raise BadInput(f"bound must be one of {', '.join(_BOUNDS)}, got {bound!r}")
    for name, value in (("seeds", seeds), ("iterations", iterations), ("max_splits", max_splits or 1)):
        if value < 1:
            raise BadInput(f"{name} must be at least 1, got {value}")
    layers = _Layers(opened(model), keep, modules, schemes, max_splits, bound)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[list[float], dict[str, int], dict[str, int]] | None = None
    seen: set[tuple[int, ...]] = set()
    for start in range(seeds):
        choice = layers.start(start, generator)
        for _ in range(iterations):
            if tuple(choice.values()) in seen or not layers.possible(choice):
                break
            seen.add(tuple(choice.values()))
            levels = layers.share(choice)
            errors = sorted((layers.options[n][choice[n]].errors[levels[n]] for n in choice), reverse=True)
            if best is None or errors < best[0]:
                best = errors, choice, levels
            choice = layers.settle(choice, levels)
    if best is None:
        raise BadInput(f"keep={keep:g} is too little: rank 1 everywhere takes {layers.least():.3g} of the weights")
    return layers.plan(*best[1:])


def plan_svd(
    model: nn.Module,
    *,
    keep: float = 0.5,
    allocation: str = "uniform",
    splits: int | str = 1,
    scheme: int = 0,
    modules: Sequence[type] = _KINDS,
) -> RankPlan:
    """The plans that ALDS is compared with.

    Args:
        keep: as of :func:`alds`.
        allocation: "uniform", the same share in each layer; "energy", the same share of squared singular values in each layer.
        splits: k, or "best": after the allocation each layer takes the k of least error at its size, and the budget is shared once more.
    """
    if allocation not in ("uniform", "energy"):
        raise BadInput(f"allocation must be 'uniform' or 'energy', got {allocation!r}")
    most = None if splits == "best" else int(splits)
    layers = _Layers(opened(model), keep, modules, (scheme,), most, "frobenius" if allocation == "energy" else "operator")
    choice = layers.nearest(1 if most is None else most)
    if not layers.possible(choice):
        raise BadInput(f"keep={keep:g} is too little: rank 1 everywhere takes {layers.least():.3g} of the weights")
    by = "cost" if allocation == "uniform" else "error"
    levels = layers.share(choice, by=by)
    if splits == "best":
        choice = layers.settle(choice, levels)
        levels = layers.share(choice, by=by)
    return layers.plan(choice, levels)


@dataclass(frozen=True)
class _Option:
    """One way to cut and fold a layer: what each rank costs, and its error. The last level may be the dense layer (rank 0 here)."""

    splits: int
    scheme: int
    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    errors: tuple[float, ...]

    def level(self, size: int) -> int:
        """The level whose size is nearest to this one."""
        if size >= self.costs[-1]:
            return len(self.costs) - 1
        rank = int(size / self.costs[0] + 0.5)
        return min(max(rank, 1), len(self.ranks) - 1) - 1


class _Layers:
    """Every layer's options, and the two steps of the search."""

    def __init__(
        self, model: nn.Module, keep: float, modules: Sequence[type], schemes: Sequence[int], most: int | None, bound: str
    ) -> None:
        if not 0 < keep <= 1:
            raise BadInput(f"keep must be above 0 and at most 1, got {keep}")
        if not schemes:
            raise BadInput("schemes is empty")
        found, self.skipped = decomposable(model, modules)
        self.options: dict[str, list[_Option]] = {}
        total = 0
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear | LowRankConv2d):
                cost = module.rank * rank_size(module.shape, module.splits, module.scheme)
                self.options[name] = [_Option(module.splits, module.scheme, (module.rank,), (cost,), (0.0,))]
                total += torch.Size(module.shape).numel()
            elif name in found:
                try:
                    self.options[name] = _options(module.weight, schemes, most, bound)
                except BadInput as error:
                    raise BadInput(f"{name or type(module).__name__}: {error}") from None
                total += module.weight.numel()
        self.total, self.budget = total, keep * total

    def start(self, number: int, generator: torch.Generator) -> dict[str, int]:
        """k = 1 everywhere, then 3, 5, 7, 9 (nearest possible), then random ones."""
        if number < 5:
            return self.nearest((1, 3, 5, 7, 9)[number])
        return {n: int(torch.randint(len(options), (), generator=generator)) for n, options in self.options.items()}

    def nearest(self, splits: int) -> dict[str, int]:
        return {n: min(range(len(o)), key=lambda i, o=o: abs(o[i].splits - splits)) for n, o in self.options.items()}

    def possible(self, choice: Mapping[str, int]) -> bool:
        return sum(o[choice[n]].costs[0] for n, o in self.options.items()) <= self.budget * (1 + 1e-12)

    def least(self) -> float:
        return sum(min(o.costs[0] for o in options) for options in self.options.values()) / self.total

    def share(self, choice: Mapping[str, int], *, by: str = "error") -> dict[str, int]:
        """The global step: a level for each layer."""
        costs = {n: options[choice[n]].costs for n, options in self.options.items()}
        if by == "cost":
            return uniform(costs, self.budget)
        return minimax_bisect({n: options[choice[n]].errors for n, options in self.options.items()}, costs, self.budget)

    def settle(self, choice: Mapping[str, int], levels: Mapping[str, int]) -> dict[str, int]:
        """The local step: the option with the least error at each layer's size, among those whose first rank it pays."""
        result = {}
        for name, options in self.options.items():
            size = options[choice[name]].costs[levels[name]]
            fits = [i for i, o in enumerate(options) if o.costs[0] <= size]
            result[name] = min(fits, key=lambda i, o=options, s=size: o[i].errors[o[i].level(s)])
        return result

    def plan(self, choice: Mapping[str, int], levels: Mapping[str, int]) -> RankPlan:
        ranks, errors, skipped = {}, {}, dict(self.skipped)
        for name, options in self.options.items():
            option = options[choice[name]]
            if rank := option.ranks[levels[name]]:
                ranks[name] = (option.splits, rank, option.scheme)
                errors[name] = option.errors[levels[name]]
            else:
                skipped[name] = "stays dense: no smaller factors are as close as the budget allows"
        return RankPlan(ranks, errors, skipped)


def _options(weight: torch.Tensor, schemes: Sequence[int], most: int | None, bound: str) -> list[_Option]:
    shape, dense = tuple(weight.shape), weight.numel()
    result = []
    for scheme in dict.fromkeys(schemes if weight.ndim == 4 and shape[2:] != (1, 1) else (0,)):
        for k in range(1, shape[1] + 1):
            if shape[1] % k or (most is not None and k > most):
                continue
            unit = rank_size(shape, k, scheme)
            count = min(max_rank(shape, k, scheme), (dense - 1) // unit)
            if not count:
                continue  # even rank 1 is no smaller than the layer
            errors = [round(e, 6) for e in svd_curve(weight, k, scheme, norm=bound)[:count].tolist()]  # ties are broken by the order
            ranks = range(1, count + 1)
            result.append(_Option(k, scheme, (*ranks, 0), (*(unit * j for j in ranks), dense), (*errors, 0.0)))
    return result or [_Option(1, 0, (0,), (dense,), (0.0,))]

