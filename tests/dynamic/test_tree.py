"""What the engine asks of nests of tensors and of a network at every call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from neurarium.dynamic.exits import EarlyExit, ExitChain
from neurarium.dynamic.tree import has_nan, take


@pytest.mark.parametrize("at", [0, 5])
def test_nan_is_found_wherever_it_is(at):
    x = torch.zeros(2, 3)
    assert not has_nan((torch.arange(3), {"x": x}))
    x.view(-1)[at] = math.nan
    assert has_nan((torch.arange(3), {"x": x}))


def test_infinities_of_both_signs_and_an_overflow_are_no_nan():
    assert not has_nan(torch.tensor([math.inf, -math.inf, 1.0]))
    assert not has_nan(torch.full((4,), 6e4, dtype=torch.float16))
    assert has_nan(torch.tensor([math.inf, -math.inf, math.nan]))


def test_take_keeps_the_kind_of_a_nest():
    tree = (torch.arange(3), [torch.eye(3), {"a": torch.arange(6).view(3, 2)}], None, 5)
    first, (eye, inner), nothing, five = take(tree, torch.tensor([2, 0]))
    assert first.tolist() == [2, 0]
    assert eye.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert inner["a"].tolist() == [[4, 5], [0, 1]]
    assert (nothing, five) == (None, 5)


def test_prices_follow_layers_that_are_exchanged_between_two_calls():
    policy = EarlyExit(ExitChain([nn.Linear(4, 8), nn.Linear(8, 8)], [nn.Linear(8, 2), nn.Linear(8, 2)])).eval()
    x = torch.zeros(5, 4)
    assert policy.costs(x).steps == (2 * (4 * 8 + 8 * 2), 2 * (8 * 8 + 8 * 2))
    policy.staged.segments[1] = nn.Linear(8, 6)
    policy.staged.heads[1] = nn.Linear(6, 2)
    assert policy.costs(x).steps == (2 * (4 * 8 + 8 * 2), 2 * (8 * 6 + 6 * 2))


def test_rows_that_leave_late_come_back_in_their_order():
    """Nobody leaves at the first exit, some at the next two, the rest at the last: every kind of step that the engine makes."""
    torch.manual_seed(0)
    policy = EarlyExit(ExitChain([nn.Linear(4, 4) for _ in range(4)], [nn.Linear(4, 3) for _ in range(4)])).eval()
    x = torch.randn(40, 4)
    with torch.no_grad():
        sure = [y.softmax(-1).amax(-1) for y in policy.outputs(x)]
        late = sure[1] < sure[1].median()
        policy.tau.copy_(torch.tensor([2.0, float(sure[1].median()), float(sure[2][late].median()), 2.0]))
        one, rows = policy.decide(x), policy.decide(x, mode="loop")
    assert one.choice.unique().tolist() == [1, 2, 3]
    torch.testing.assert_close(one.output, rows.output)
    torch.testing.assert_close(one.score, rows.score)
    assert torch.equal(one.choice, rows.choice)
