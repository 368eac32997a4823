"""Who gets how much: one budget, shared among layers.

A layer offers *levels* 0, 1, 2, ... (ranks, kept channels, bit widths), each with a cost and a harm. Five ways to pick a level for each:

- :func:`uniform`: every layer reaches the same share of its full cost;
- :func:`global_threshold`: units of all layers are ranked together by score, the best stay;
- :func:`minimax_bisect`: the largest error over layers becomes as small as the budget allows;
- :func:`milp`: the smallest *sum* of harms under one or several budgets (an integer linear program);
- :func:`knapsack_dp`: the same with one integer budget by dynamic programming, exact by construction.

The first three are the same greedy filling: levels are climbed one step at a time, in an order fixed beforehand, while the budget
lasts. A step that does not fit closes its layer and the others go on, so less than one step of the budget is left. For ``minimax_bisect``
the order (largest present error first) makes that exact: the error can fall below e only if every step out of an error >= e is taken.

Ties go to the lower index: to the earlier layer among steps, and to the first choice in lexicographic order among assignments whose
summed harms agree to 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["global_threshold", "knapsack_dp", "milp", "minimax_bisect", "uniform"]

Curves = Mapping[str, Sequence[float]]
_SAME = 1e-9  # sums of harms that differ by less, relatively, are equal


def uniform(costs: Curves, budget: float) -> dict[str, int]:
    """The same share of its full cost for every layer.

    Args:
        costs: layer -> cost of each level, not decreasing; the last level is the full layer, the first the least possible.
        budget: of the summed cost.

    Returns:
        layer -> level.
    """
    cost = _curves(costs, "cost")
    for name, c in zip(costs, cost, strict=True):
        if (np.diff(c) < 0).any():
            raise BadInput(f"{name}: the costs of its levels decrease")
    return dict(zip(costs, _climb([-c[1:] / max(c[-1], 1e-300) for c in cost], cost, budget), strict=True))


def minimax_bisect(errors: Curves, costs: Curves, budget: float) -> dict[str, int]:
    """The levels that minimise the largest error over layers.

    With residual energies (1 - the share of squared singular values that is kept) as errors this is "the same energy in every layer".

    Args:
        errors: layer -> error of each level, not increasing.
        costs: layer -> cost of each level, not decreasing.
        budget: of the summed cost.
    """
    error, cost = _curves(errors, "error"), _curves(costs, "cost")
    if list(errors) != list(costs):
        raise BadInput("errors and costs must name the same layers in the same order")
    for name, e, c in zip(errors, error, cost, strict=True):
        if len(e) != len(c):
            raise BadInput(f"{name}: {len(e)} errors but {len(c)} costs")
        if (np.diff(e) > 0).any() or (np.diff(c) < 0).any():
            raise BadInput(f"{name}: along its levels errors must not increase and costs not decrease")
    return dict(zip(errors, _climb([e[:-1] for e in error], cost, budget), strict=True))


def global_threshold(
    scores: Mapping[str, Tensor],
    budget: float,
    *,
    cost: Mapping[str, float] | Callable[[dict[str, Tensor]], float] | None = None,
    minimum: float = 1,
) -> dict[str, Tensor]:
    """Keeps the units of largest score over all layers together.

    Args:
        scores: layer -> (units,).
        budget: how much may stay: units, or summed cost.
        cost: layer -> cost of one of its units (default 1), or a function of the masks for a cost that is not a sum, such as the MACs of
            channels that are one layer's outputs and the next one's inputs; it must not fall when units are added.
        minimum: units that every layer keeps whatever their score; below 1 a share of the layer.

    Returns:
        layer -> bool mask, True = stays.
    """
    order = {}
    for name, s in scores.items():
        if s.ndim != 1 or not len(s) or not bool(torch.isfinite(s).all()):
            raise BadInput(f"{name}: scores must be a vector of finite numbers, got {tuple(s.shape)}")
        order[name] = torch.argsort(s.detach().cpu().double(), descending=True, stable=True)
    floor = [min(len(o), math.ceil(minimum * len(o)) if minimum < 1 else int(minimum)) for o in order.values()]
    ranked = [scores[name].detach().cpu().double()[o].numpy()[f:] for (name, o), f in zip(order.items(), floor, strict=True)]

    def masks(counts: Sequence[int]) -> dict[str, Tensor]:
        kept = {name: torch.zeros(len(o), dtype=torch.bool) for name, o in order.items()}
        for (name, o), count in zip(order.items(), counts, strict=True):
            kept[name][o[:count]] = True
        return kept

    if callable(cost):
        layer = _sequence(ranked)[0]

        def first(n: int) -> list[int]:
            return [f + int(c) for f, c in zip(floor, np.bincount(layer[:n], minlength=len(order)), strict=True)]

        if (least := cost(masks(first(0)))) > _upper(budget):
            raise BadInput(f"the budget is {budget:g}, but the least that must stay costs {least:g}")
        low, high = 0, len(layer)  # cost(low) fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(masks(first(middle))) <= _upper(budget) else (low, middle - 1)
        return masks(first(low))
    price = [1.0 if cost is None else float(cost[name]) for name in order]
    steps = [p * np.arange(f, len(o) + 1) for p, f, o in zip(price, floor, order.values(), strict=True)]
    return masks([f + n for f, n in zip(floor, _climb(ranked, steps, budget), strict=True)])


def milp(
    harm: Curves, costs: Mapping[str, Curves], budget: Mapping[str, float], *, ties: Iterable[Sequence[str]] = ()
) -> dict[str, int]:
    """One choice a layer with the least summed harm under every budget (HiGHS through :func:`scipy.optimize.milp`).

    Args:
        harm: layer -> harm of each choice; ``inf`` forbids a choice.
        costs: resource -> layer -> cost of each choice, e.g. ``{"bytes": ..., "bops": ...}``.
        budget: resource -> most.
        ties: groups of layers that must take the same choice.

    Returns:
        layer -> choice. HiGHS works with absolute tolerances of 1e-6; harms are therefore scaled to the optimum's own size (choices
        worse than the whole optimum are dropped and the problem solved again), and every solution is checked in float64: one that
        only fits within the solver's tolerance is cut off.
    """
    if not budget or set(costs) != set(budget):
        raise BadInput(f"costs are given for {sorted(costs)}, budgets for {sorted(budget)}")
    groups, harms, loads = _grouped(harm, costs, ties)
    sizes = [len(h) for h in harms]
    start = np.concatenate([[0], np.cumsum(sizes)])
    lowest = np.array([h.min() for h in harms])
    if not np.isfinite(lowest).all():
        raise BadInput(f"{groups[int(np.argmin(np.isfinite(lowest)))][0]}: every choice is forbidden")
    excess = np.concatenate(harms) - np.repeat(lowest, sizes)
    rows = np.stack([np.concatenate(loads[r]) for r in budget])
    most = np.array([_upper(float(b)) for b in budget.values()])
    one = np.zeros((len(sizes), len(excess)))
    for g, size in enumerate(sizes):
        one[g, start[g] : start[g] + size] = 1
    low, high = np.zeros(len(excess)), np.isfinite(excess).astype(float)
    finite = np.where(high > 0, excess, 0.0)
    cuts: list[np.ndarray] = []

    def solve(objective: np.ndarray, limit: float) -> np.ndarray | None:
        """The chosen variable of each group, or None. Its exact excess is at most `limit`."""
        bound = np.where(np.abs(most) > 0, np.abs(most), 1.0)
        matrix, top = [rows / bound[:, None]], [most / bound]
        if 0 < limit < np.inf:
            matrix.append(1e3 * finite[None] / limit), top.append(np.array([1e3]))
        while True:
            extra = [np.stack(cuts)] if cuts else []
            upper = [np.full(len(cuts), len(sizes) - 1.0)] if cuts else []
            found = optimize.milp(
                objective,
                constraints=[
                    optimize.LinearConstraint(one, 1, 1),
                    optimize.LinearConstraint(np.concatenate([*matrix, *extra]), -np.inf, np.concatenate([*top, *upper])),
                ],
                integrality=np.ones(len(excess)),
                bounds=optimize.Bounds(low, high),
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                if found.status == 2:  # infeasible
                    return None
                raise RuntimeError(f"scipy.optimize.milp: {found.message}")
            chosen = start[:-1] + np.array([int(np.argmax(found.x[a:b])) for a, b in pairwise(start)])
            if (rows[:, chosen].sum(1) <= most).all():
                return chosen if finite[chosen].sum() <= limit else None
            cuts.append(np.isin(np.arange(len(excess)), chosen).astype(float))

    best = solve(finite * 1e3 / max(finite.max(), 1e-300), np.inf)
    if best is None:
        need = ", ".join(f"{r}: at least {sum(c.min() for c in loads[r]):g} of {b:g}" for r, b in budget.items())
        raise BadInput(f"no assignment meets the budgets ({need})")
    scale = finite.max()
    while (total := finite[best].sum()) > 0:
        high[finite > total * (1 + _SAME)] = 0
        if (finite * high).max() > scale / 10:
            break
        scale = (finite * high).max()
        better = solve(finite * high * 1e3 / scale, np.inf)
        best = best if better is None or finite[better].sum() >= total else better
    limit = finite[best].sum() * (1 + _SAME)
    high[finite > limit] = 0
    spent = 0.0
    for g, (a, b) in enumerate(pairwise(start)):  # the first optimum in lexicographic order
        if any(high[v] and spent + finite[v] <= limit for v in range(a, best[g])):
            objective = np.zeros(len(excess))
            objective[a:b] = np.arange(b - a)
            if (earlier := solve(objective, limit)) is not None and earlier[g] < best[g]:
                best = earlier
        low[best[g]] = 1
        spent += finite[best[g]]
    choice = {name: int(v - a) for group, v, a in zip(groups, best, start, strict=False) for name in group}
    return {name: choice[name] for name in harm}


def knapsack_dp(harm: Curves, cost: Mapping[str, Sequence[int]], budget: int, *, ties: Iterable[Sequence[str]] = ()) -> dict[str, int]:
    """One choice a layer with the least summed harm under one integer budget, by dynamic programming over the budget.

    Exact; time and memory grow with layers x budget (after dividing by the costs' common divisor).
    """
    groups, harms, loads = _grouped(harm, {"cost": cost}, ties)
    if any((c != np.round(c)).any() for c in loads["cost"]):
        raise BadInput("knapsack_dp needs integer costs; milp takes any")
    loads_int = [c.astype(np.int64) for c in loads["cost"]]
    divisor = math.gcd(*(int(v) for c in loads_int for v in c)) or 1
    size = min(math.floor(budget), sum(int(c.max()) for c in loads_int)) // divisor
    if size < 0 or (size + 1) * (len(groups) + 1) > 5e7:
        raise BadInput(f"a table of {len(groups)} layers x {size} budget units cannot be made; use milp")
    best = [np.zeros(size + 1)]
    for h, c in zip(reversed(harms), reversed(loads_int), strict=True):
        table = np.full(size + 1, np.inf)
        for value, load in zip(h, c // divisor, strict=True):
            if load <= size:
                table[load:] = np.minimum(table[load:], value + best[-1][: size + 1 - load])
        best.append(table)
    best.reverse()  # best[g][b]: the least harm of groups g, g+1, ... with b left
    if not np.isfinite(best[0][size]):
        raise BadInput(f"no assignment meets the budget of {budget}; the least is {sum(int(c.min()) for c in loads_int)}")
    spent, left, choice = 0.0, size, {}
    limit = best[0][size] + _SAME * (best[0][size] - sum(h.min() for h in harms))
    for g, (group, h, c) in enumerate(zip(groups, harms, loads_int, strict=True)):
        loads_g = c // divisor
        rest = [spent + h[o] + best[g + 1][left - w] if w <= left else np.inf for o, w in enumerate(loads_g)]
        o = next(o for o, r in enumerate(rest) if r <= max(limit, min(rest)))
        spent, left = spent + h[o], left - int(loads_g[o])
        choice.update(dict.fromkeys(group, o))
    return {name: choice[name] for name in harm}


def _upper(budget: float) -> float:
    """The budget with room for the rounding of a sum of decimal fractions."""
    return budget + 1e-12 * abs(budget)


def _curves(curves: Curves, what: str) -> list[np.ndarray]:
    if not curves:
        raise BadInput(f"no layer has a {what}")
    result = []
    for name, values in curves.items():
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1 or not len(array) or np.isnan(array).any():
            raise BadInput(f"{name}: its {what}s must be a list of numbers, got {array.tolist() if array.size < 9 else array.shape}")
        if what == "cost" and not ((array >= 0) & np.isfinite(array)).all():
            raise BadInput(f"{name}: costs must be finite and not negative")
        result.append(array)
    return result


def _sequence(priority: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All steps in their order, as (layer, step of the layer): larger priority first, ties by layer. In a layer none may increase."""
    layer = np.concatenate([np.full(len(p), i) for i, p in enumerate(priority)])
    step = np.concatenate([np.arange(len(p)) for p in priority])
    order = np.lexsort((step, layer, -np.concatenate(priority)))
    return layer[order], step[order]


def _climb(priority: Sequence[np.ndarray], cost: Sequence[np.ndarray], budget: float) -> list[int]:
    """The level of each layer: steps in order of priority while they fit, a layer whose step does not fit stays where it is."""
    left = _upper(budget) - sum(c[0] for c in cost)
    if not left >= 0:
        raise BadInput(f"the budget is {budget:g}, but the least that must stay costs {sum(c[0] for c in cost):g}")
    layer, step = _sequence(priority)
    if not len(layer):
        return [0] * len(cost)
    price = np.concatenate([np.diff(c) for c in cost])[np.concatenate([[0], np.cumsum([len(p) for p in priority])])[layer] + step]
    spent = np.cumsum(price)
    fits = int(np.searchsorted(spent, left, side="right"))
    level = np.bincount(layer[:fits], minlength=len(cost))
    left -= spent[fits - 1] if fits else 0.0
    closed: set[int] = set()
    for i, p in zip(layer[fits:].tolist(), price[fits:].tolist(), strict=True):
        if i not in closed and p <= left:
            level[i] += 1
            left -= p
        else:
            closed.add(i)
            if len(closed) == len(cost):
                break
    return level.tolist()


def _grouped(
    harm: Curves, costs: Mapping[str, Curves], ties: Iterable[Sequence[str]]
) -> tuple[list[list[str]], list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Tied layers as one: groups of names in order of their first member, summed harms, summed costs by resource."""
    root = {name: name for name in harm}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for tie in ties:
        if unknown := [name for name in tie if name not in root]:
            raise BadInput(f"ties name {unknown[0]!r}, which has no harm")
        for name in tie[1:]:
            root[find(name)] = find(tie[0])
    members: dict[str, list[str]] = {}
    for name in harm:
        members.setdefault(find(name), []).append(name)
    groups = list(members.values())
    harms = dict(zip(harm, _curves(harm, "harm"), strict=True))
    loads = {}
    for resource, curves in costs.items():
        if set(curves) != set(harm):
            raise BadInput(f"the costs in {resource} must name the same layers as the harms")
        loads[resource] = dict(zip(curves, _curves(curves, "cost"), strict=True))
        for name, c in loads[resource].items():
            if len(c) != len(harms[name]):
                raise BadInput(f"{name}: {len(harms[name])} harms but {len(c)} costs in {resource}")
    for group in groups:
        if len({len(harms[n]) for n in group}) > 1:
            raise BadInput(f"tied layers must have the same choices: {', '.join(group)}")
    return (
        groups,
        [np.sum([harms[n] for n in group], axis=0) for group in groups],
        {r: [np.sum([c[n] for n in group], axis=0) for group in groups] for r, c in loads.items()},
    )
