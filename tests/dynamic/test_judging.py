"""What the room's experiments measure, by hand on ten rows."""

from __future__ import annotations

import math

import pytest
import torch

from neurarium.experiments.dynamic.judging import at_cost, best_exits, calibration_error, correlation, set_size

# probability of class 0 of two, and the label
ROWS = [(0.95, 0), (0.92, 0), (0.93, 1), (0.6, 0), (0.58, 1), (0.55, 1), (0.1, 1), (0.2, 1), (0.22, 0), (0.25, 1)]
P = torch.tensor([[p, 1 - p] for p, _ in ROWS], dtype=torch.float64)
Y = torch.tensor([y for _, y in ROWS])


def test_calibration_error_of_ten_rows():
    # Five bins of confidence: [0.4, 0.6) has 0.58, 0.55 (both wrong), [0.6, 0.8) has 0.6 (right), 0.78 (wrong), 0.75 (right),
    # [0.8, 1] has 0.95, 0.92 (right), 0.93 (wrong), 0.9, 0.8 (right). 0.6 * 5 is 3.0 in floating point, 0.8 * 5 is 4.0.
    gaps = 2 * abs(0.565 - 0), 3 * abs(0.71 - 2 / 3), 5 * abs(0.9 - 0.8)
    assert calibration_error(P, Y, bins=5) == pytest.approx(sum(gaps) / 10)
    assert calibration_error(P, Y, bins=1) == pytest.approx(abs(P.max(1).values.mean().item() - 0.6))
    assert calibration_error(torch.eye(2)[Y], Y) == 0 and calibration_error(torch.eye(2)[1 - Y], Y) == 1  # sure and right, sure and wrong


def test_conformal_sets_of_ten_rows():
    # 1 - p(label): .05 .08 .93 .4 .58 .55 .1 .2 .78 .25; sorted .05 .08 .1 .2 .25 .4 .55 .58 .78 .93
    tested = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.07, 0.03], [0.34, 0.33, 0.33]], dtype=torch.float64)
    # cover 0.5: rank ceil(11 * 0.5) = 6, q = 0.4, classes with p >= 0.6
    assert set_size(P, Y, tested, cover=0.5) == pytest.approx((0 + 1 + 0) / 3)
    # cover 0.8: rank 9, q = 0.78, p >= 0.22
    assert set_size(P, Y, tested, cover=0.8) == pytest.approx((2 + 1 + 3) / 3)
    # cover 0.95: rank ceil(10.45) = 11 of 10 rows: nothing finite covers
    assert set_size(P, Y, tested, cover=0.95) == 3


def test_best_exits_of_ten_rows():
    g = torch.Generator().manual_seed(0)
    badness, cost = torch.rand(10, 3, generator=g), torch.tensor([0.2, 0.5, 1.0])
    badness[0] = torch.tensor([0.5, 0.2, 0.1])
    for tradeoff in (0.0, 0.4, 1.5, 100.0):
        totals = [[badness[i, l].item() + tradeoff * cost[l].item() for l in range(3)] for i in range(10)]
        assert best_exits(badness, cost, tradeoff).tolist() == [row.index(min(row)) for row in totals]
    assert [best_exits(badness, cost, t)[0].item() for t in (0.0, 0.4, 1.5)] == [2, 1, 0]
    assert not best_exits(torch.ones(10, 3), cost, 0.0).any()  # equal: the earlier one


def test_a_curve_is_read_at_costs_it_reaches():
    cost, value = [0.9, 0.2, 0.4, 0.4], [3.0, 1.0, 1.0, 3.0]
    assert at_cost([0.2, 0.3, 0.4, 0.65], cost, value) == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert [math.isnan(v) for v in at_cost([0.19, 0.9, 0.91], cost, value)] == [True, False, True]


def test_correlation_of_exits_and_noise():
    noise = torch.arange(10.0)
    assert correlation((noise > 4).long(), noise) == pytest.approx(25 / math.sqrt(2.5 * 82.5) / 2)
    assert correlation(torch.zeros(10, dtype=torch.long), noise) == 0
