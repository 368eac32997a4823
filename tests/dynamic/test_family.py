"""Policies over families: prices, budgets, state; and that the contract's check catches cheats."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from neurarium.dynamic.family import FamilyPolicy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.families import check_family


class Prefixes(nn.Module):
    """Linear layers of which the first c are run."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.configs = tuple(range(1, depth + 1))

    def run(self, x, config):
        for layer in self.layers[:config]:
            x = torch.tanh(layer(x))
        return x

    def extract(self, config):
        return nn.Sequential(*(m for layer in self.layers[:config] for m in (copy.deepcopy(layer), nn.Tanh())))


class Plain(FamilyPolicy):
    def loss(self, x, y, step=0):
        return nn.functional.cross_entropy(self.outputs(x)[step % len(self.configs)], y)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Plain(Prefixes()).eval()


X = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 6


def test_contract(policy):
    policy.calibrate([(X, Y)])
    check_family(policy, X)


def test_a_budget_buys_the_best_that_fits_not_the_dearest(policy):
    policy.calibrate([(X, Y)])
    policy.scores = torch.tensor([0.1, 0.7, 0.3, 0.7], dtype=torch.float64)
    price = policy.prices(X)
    assert price.tolist() == [72, 144, 216, 288]
    assert [policy.pick(X, budget=b) for b in (72, 143.9, 144, 250, 1e9)] == [0, 0, 1, 1, 1]  # of two equal ones the cheaper
    assert policy.front(X) == (0, 1)


def test_search_free_families_need_no_calibration(policy):
    with pytest.raises(BadInput, match="calibrate"):
        policy.decide(X, budget=200)
    policy.search_free = True
    assert policy.pick(X, budget=250) == 2
    with pytest.raises(BadInput, match="72"):
        policy.decide(X, budget=71)


def test_state_carries_setting_and_scores(policy):
    policy.calibrate([(X, Y)])
    policy.use(config=1)
    other = Plain(Prefixes()).eval()
    other.load_state_dict(policy.state_dict())
    for twin in (other, copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.setting == 1 and torch.equal(twin.scores, policy.scores)
        assert torch.equal(twin(X), policy(X))


def test_what_is_no_family_is_refused():
    with pytest.raises(UnsupportedModel):
        Plain(nn.Linear(2, 2))
    with pytest.raises(BadInput):
        Plain(Prefixes(0))


def test_nan_and_empty_calibration_are_refused(policy):
    with pytest.raises(BadInput, match="no samples"):
        policy.calibrate([])
    with pytest.raises(BadInput, match="NaN"):
        policy.decide(X * float("nan"))


class MasksOnly(Prefixes):
    """Runs all layers and throws some away."""

    def run(self, x, config):
        super().run(x, self.configs[-1])
        return super().run(x, config)


class SharesWeights(Prefixes):
    def extract(self, config):
        return nn.Sequential(*(m for layer in self.layers[:config] for m in (layer, nn.Tanh())))


class MixesRows(Prefixes):
    def run(self, x, config):
        return super().run(x, config) + x.mean(0)


class ChargesLess(Plain):
    def prices(self, example):
        return super().prices(example) - 1


@pytest.mark.parametrize("family", [SharesWeights, MixesRows])
def test_cheating_families_are_caught(family):
    with pytest.raises(AssertionError):
        check_family(Plain(family()).eval(), X)


def test_a_family_that_runs_more_than_it_needs_pays_for_it():
    prices = Plain(MasksOnly()).prices(X)
    assert prices.tolist() == [72 * (4 + c) for c in (1, 2, 3, 4)]


def test_a_policy_that_charges_less_is_caught(policy):
    policy.__class__ = ChargesLess
    policy.search_free = True
    with pytest.raises(AssertionError, match="is charged"):
        check_family(policy, X)
