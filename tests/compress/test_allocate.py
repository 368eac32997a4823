"""Allocators are exact against brute force, spend the budget to within one unit and break ties by index."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from neurarium.compress import global_threshold, knapsack_dp, milp, minimax_bisect, uniform
from neurarium.errors import BadInput


def _problem(seed: int, layers: int = 4, choices: int = 3) -> tuple[dict, dict, dict]:
    """Layers with falling errors and rising integer costs; every other seed is full of ties."""
    rng = np.random.default_rng(seed)
    errors, costs, second = {}, {}, {}
    for i in range(layers):
        n = int(rng.integers(1, choices + 1))
        e = rng.integers(0, 4, n) if seed % 2 else rng.random(n) * 10.0 ** rng.integers(-6, 3)
        errors[f"l{i}"] = np.sort(e)[::-1].astype(float).tolist()
        costs[f"l{i}"] = np.sort(rng.integers(0, 9, n)).tolist()
        second[f"l{i}"] = rng.integers(0, 9, n).tolist()
    return errors, costs, second


def _all(curves: dict) -> list[dict]:
    """Every assignment, in lexicographic order."""
    return [dict(zip(curves, levels, strict=True)) for levels in itertools.product(*(range(len(c)) for c in curves.values()))]


def _total(curves: dict, levels: dict) -> float:
    return sum(curves[k][v] for k, v in levels.items())


@pytest.mark.parametrize("seed", range(30))
def test_minimax_is_exact_and_spends_to_within_one_unit(seed: int) -> None:
    errors, costs, _ = _problem(seed)
    budget = 0.5 * (sum(c[0] for c in costs.values()) + sum(c[-1] for c in costs.values()))
    levels = minimax_bisect(errors, costs, budget)
    worst = max(errors[k][v] for k, v in levels.items())
    assert worst == min(max(errors[k][v] for k, v in a.items()) for a in _all(errors) if _total(costs, a) <= budget)
    for allocation in (levels, uniform(costs, budget)):
        spent = _total(costs, allocation)
        assert spent <= budget
        open_steps = [costs[k][v + 1] - costs[k][v] for k, v in allocation.items() if v + 1 < len(costs[k])]
        assert all(budget - spent < step for step in open_steps)  # every next step of every layer is too dear


def test_uniform_keeps_the_same_share_and_breaks_ties_by_index() -> None:
    costs = {"a": [10 * j for j in range(1, 11)], "b": [4 * j for j in range(1, 26)]}
    assert uniform(costs, 100) == {"a": 4, "b": 11} or uniform(costs, 100) == {"a": 4, "b": 12}
    shares = {k: costs[k][v] / 100 for k, v in uniform(costs, 100).items()}
    assert abs(shares["a"] - shares["b"]) <= 0.1
    same = {k: [1, 2, 3] for k in "xyz"}
    assert uniform(same, 7) == {"x": 2, "y": 1, "z": 1}
    assert minimax_bisect({k: [2.0, 1.0, 0.0] for k in "xyz"}, same, 5) == {"x": 1, "y": 1, "z": 0}
    assert uniform({"x": [0.1, 0.2], "y": [0.1, 0.2]}, 0.3) == {"x": 1, "y": 0}  # 0.1 + 0.2 > 0.3 in floats


@pytest.mark.parametrize("seed", range(16))
def test_milp_and_knapsack_find_the_first_optimum(seed: int) -> None:
    harm, cost, other = _problem(100 + seed)
    budget = int(0.6 * sum(map(max, cost.values())) + 0.4 * sum(map(min, cost.values())))
    ties = [("l0", "l2")] if len(harm["l0"]) == len(harm["l2"]) else []
    assignments = [a for a in _all(harm) if all(a[p] == a[q] for p, q in ties)]

    def first_optimum(feasible: list[dict]) -> dict:
        least = min(_total(harm, a) for a in feasible)
        base = sum(map(min, harm.values()))
        return next(a for a in feasible if _total(harm, a) - base <= (least - base) * (1 + 1e-9) + 1e-15)

    one = [a for a in assignments if _total(cost, a) <= budget]
    assert knapsack_dp(harm, cost, budget, ties=ties) == first_optimum(one)
    assert milp(harm, {"bytes": cost}, {"bytes": budget}, ties=ties) == first_optimum(one)
    room = int(np.median([_total(other, a) for a in one]))
    both = [a for a in one if _total(other, a) <= room]
    assert milp(harm, {"bytes": cost, "bops": other}, {"bytes": budget, "bops": room}, ties=ties) == first_optimum(both)


def test_milp_resolves_harms_of_very_different_size() -> None:
    """HiGHS stops at an absolute gap of 1e-6: without rescaling the small harms would be noise."""
    harm = {"a": [1e4, 0.0], "b": [3e-9, 1e-9], "c": [2.5e-9, 1e-9]}
    cost = {k: [1, 2] for k in harm}
    assert milp(harm, {"bytes": cost}, {"bytes": 5}) == knapsack_dp(harm, cost, 5) == {"a": 1, "b": 1, "c": 0}
    assert milp({**harm, "b": [0.0, np.inf]}, {"bytes": cost}, {"bytes": 6}) == {"a": 1, "b": 0, "c": 1}


def test_milp_agrees_with_the_dynamic_programme_on_twenty_layers() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(100, 4000, 20)
    trace = rng.lognormal(0, 2, 20)
    harm = {f"l{i}": [float(t * 4.0**-b) for b in (2, 4, 8)] for i, t in enumerate(trace)}
    cost = {f"l{i}": [int(n) * b for b in (2, 4, 8)] for i, n in enumerate(sizes)}
    budget = int(4.5 * sizes.sum())
    assert milp(harm, {"bits": cost}, {"bits": budget}) == knapsack_dp(harm, cost, budget)


def test_global_threshold_ranks_units_of_all_layers() -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([2.0, 0.5, 2.0, 0.1])}
    kept = {k: m.tolist() for k, m in global_threshold(scores, 4).items()}
    assert kept == {"a": [True, False, True], "b": [True, False, True, False]}
    assert global_threshold(scores, 3)["b"].tolist() == [True, False, False, False]  # ties: layer, then unit
    dear = global_threshold(scores, 10, cost={"a": 4.0, "b": 1.0})
    assert dear["a"].tolist() == [True, False, True]
    assert int(dear["b"].sum()) == 2
    floor = global_threshold({"a": torch.arange(20.0) + 100, "b": torch.arange(20.0)}, 12, minimum=0.05)
    assert floor["b"].nonzero().flatten().tolist() == [19]
    assert int(floor["a"].sum()) == 11


def test_global_threshold_with_a_cost_that_is_not_a_sum() -> None:
    scores = {k: torch.rand(12, generator=torch.Generator().manual_seed(i)) for i, k in enumerate("ab")}
    calls = 0

    def macs(kept: dict) -> float:
        nonlocal calls
        calls += 1
        return float(3 * kept["a"].sum() + kept["a"].sum() * kept["b"].sum() + kept["b"].sum() * 10)

    kept = global_threshold(scores, 120, cost=macs)
    assert macs(kept) <= 120
    assert calls < 10
    n = sum(int(m.sum()) for m in kept.values())
    assert macs(global_threshold(scores, n + 1)) > 120  # the next unit would not fit
    assert all(torch.equal(kept[k], m) for k, m in global_threshold(scores, n).items())


def test_what_cannot_be_allocated_is_named() -> None:
    with pytest.raises(BadInput, match="least that must stay costs 3"):
        uniform({"a": [1, 2], "b": [2, 3]}, 2)
    with pytest.raises(BadInput, match="b: along its levels"):
        minimax_bisect({"a": [1, 0], "b": [0, 1]}, {"a": [1, 2], "b": [1, 2]}, 4)
    with pytest.raises(BadInput, match="no assignment meets"):
        milp({"a": [1.0]}, {"bytes": {"a": [5]}}, {"bytes": 4})
    with pytest.raises(BadInput, match="no assignment meets"):
        knapsack_dp({"a": [1.0]}, {"a": [5]}, 4)
    with pytest.raises(BadInput, match="a: scores"):
        global_threshold({"a": torch.tensor([float("nan")])}, 1)
    with pytest.raises(BadInput, match="integer"):
        knapsack_dp({"a": [1.0]}, {"a": [0.5]}, 4)
    with pytest.raises(BadInput, match="same choices: a, b"):
        milp({"a": [1.0], "b": [1.0, 2.0]}, {"c": {"a": [1], "b": [1, 2]}}, {"c": 4}, ties=[("a", "b")])
