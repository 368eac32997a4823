"""Rank and bit plans survive JSON, describe themselves, count what they cost and name what does not fit."""

from __future__ import annotations

import pytest
from torch import nn

from neurarium.compress import BitPlan, RankPlan
from neurarium.errors import BadInput


def test_plans_survive_json() -> None:
    rank = RankPlan({"a.0": (2, 3, 1), "": (1, 1, 0)}, {"a.0": 0.25}, {"b": "it is an Embedding"})
    assert RankPlan.from_json(rank.to_json()) == rank
    assert "0.25" in rank.describe()
    assert "b: left alone, it is an Embedding" in rank.describe()
    for cost in (1024.0, float("nan")):
        bit = BitPlan({"a.0": (4, 8)}, {"a.0": 1e-3}, cost, {"b": "first layer"})
        back = BitPlan.from_json(bit.to_json())
        assert (back.bits, back.perturbation, back.skipped) == (bit.bits, bit.perturbation, bit.skipped)
        assert back.cost == cost or (back.cost != back.cost and cost != cost)
    assert "0.001" in bit.describe()
    for plan, other in ((RankPlan, bit), (BitPlan, rank)):
        with pytest.raises(BadInput, match="not a"):
            plan.from_json(other.to_json())


def test_a_bit_plan_counts_bytes_bits_and_operations() -> None:
    shared = nn.Linear(3, 5, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4))
    plan = BitPlan({"0": (3, 8), "2": (8, 4)})
    assert plan.weight_bytes(model) == 6 + 20  # 45 bits are 6 bytes
    assert plan.mean_bits(model) == pytest.approx((15 * 3 + 20 * 8) / 35)
    assert plan.bops({"0": 10, "2": 100}) == 10 * 24 + 100 * 32
    for name, message in {"7": "does not have", "1": "1: a ReLU", "3": "3: a BatchNorm1d"}.items():
        with pytest.raises(BadInput, match=message):
            BitPlan({name: (4, 4)}).check(model)
    with pytest.raises(BadInput, match=r"each 1\.\.32"):
        BitPlan({"0": (0, 8)})
