"""The comparison's own pieces: one grid of rates, one purse, and what a fixed exit and the plain network score."""

from __future__ import annotations

import torch

from neurarium.data import TensorData
from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.exits import EarlyExit
from neurarium.experiments.dynamic import one_axis
from neurarium.lab.trial import Trial


def _bench(steps: int) -> one_axis.Bench:
    g = torch.Generator().manual_seed(0)
    part = TensorData(torch.randn(100, 1, 8, 8, generator=g), torch.arange(100) % 10)
    static = CostTable.measure([BackboneS(1)], part.x[:1]).full
    return one_axis.Bench(part, part, part, static, one_axis.BACKWARD * one_axis.BATCH * steps * static, 3)


def test_every_way_has_its_rate_from_the_same_four():
    assert set(one_axis.RATES) == {"backbone", "exits", *one_axis.ARMS}
    assert set(one_axis.RATES.values()) <= {2e-3, 5e-3, 1.2e-2, 3e-2}
    assert {*one_axis.RATES, "static", "exits_by_budget"} - {"backbone"} == set(one_axis.LABELS)


def test_a_way_that_begins_with_a_trained_network_pays_for_it():
    b, trial = _bench(20), Trial(0, "smoke")
    for name in one_axis.TRUNK:
        assert abs(one_axis.ARMS[name](b, trial)[1] / b.purse - 1) <= 0.1, name


def test_by_budget_all_rows_leave_at_the_best_exit_that_is_affordable():
    b = _bench(1)
    policy = EarlyExit(BackboneS(1)).eval()
    total = policy.costs(b.test.x).total
    fixed, x = one_axis.ByBudget(policy, [0.5, 0.4, 0.6, 0.9]), b.test.x[:7]
    with torch.no_grad():
        readouts = policy.outputs(x)
        for budget, best in ((total[0], 0), (total[1], 0), (total[2], 2), (total[3] - 1, 2), (total[3], 3)):
            outcome = fixed.decide(x, budget=float(budget))
            assert (outcome.cost == total[best]).all() and torch.allclose(outcome.output, readouts[best], atol=1e-5)
