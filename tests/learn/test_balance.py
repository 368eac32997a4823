"""Curves of known kind are read as what they are, and a search follows the recipe and counts what it spends."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from neurarium.data import TensorData
from neurarium.errors import BadInput
from neurarium.learn.balance import First, balance_search, clues
from neurarium.learn.fit import evaluate

T = np.linspace(0, 1, 40)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("scale", [1.0, 0.1, 30.0])
def test_synthetic_curves_are_classified(noise, scale):
    rng = np.random.default_rng(0)
    shaken = [scale * noise * rng.standard_normal(40) for _ in range(2)]
    train = scale * (0.2 + 2 * np.exp(-5 * T)) + shaken[0]
    under = clues(scale * (2.5 - 1.2 * T) + shaken[0], scale * (2.6 - 1.2 * T) + shaken[1])
    assert under.underfit
    assert under.overfit_from is under.divergence_at is None
    assert not under.plateau
    over = clues(train, scale * (0.4 + 1.8 * np.exp(-8 * T) + 0.8 * T**2) + shaken[1])
    assert 8 <= over.overfit_from <= 20
    assert not over.underfit
    assert not over.plateau
    right = clues(scale * (0.2 + 2 * np.exp(-12 * T)) + shaken[0], scale * (0.3 + 2 * np.exp(-12 * T)) + shaken[1])
    assert right.plateau
    assert right.overfit_from is right.divergence_at is None
    assert not right.underfit
    high = clues(train + scale * 20 * np.maximum(T - 0.7, 0) ** 2, train, lr=10 * T)
    assert 20 <= high.divergence_at <= 34
    assert "learning rate below" in high.advice[0]


def test_a_loss_that_is_not_finite_is_divergence():
    train = np.where(T > 0.5, np.nan, 2 - T)
    assert clues(train, 2 - T).divergence_at == 20
    assert clues([np.inf] * 4, [1.0] * 4).divergence_at == 0
    with pytest.raises(BadInput, match="one length"):
        clues([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(BadInput, match="one length"):
        clues(T, T[1:])


torch.manual_seed(0)
X = torch.randn(320, 6)
DATA = TensorData(X, X[:, :3].argmax(1))
TRAIN, VAL = DATA.take(torch.arange(256)).batches(32), DATA.take(torch.arange(256, 320)).batches(64, shuffle=False)


def net():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


@pytest.mark.parametrize(("optimizer", "lrs"), [(SGD, "range"), (AdamW, [1e-2, 1e-3])])
def test_a_search_follows_the_recipe_and_counts_its_steps(optimizer, lrs):
    state = torch.get_rng_state()
    search = partial(balance_search, net, TRAIN, VAL, steps=16, lrs=lrs, momenta=(0.97, 0.9), decays=(1e-2, 1e-4, 0.0), range_steps=30)
    recipe = search(optimizer=optimizer)
    assert torch.equal(state, torch.get_rng_state())
    runs = 2 + 1 + 2 + (0 if lrs == "range" else 2)
    assert len(recipe.trials) == runs
    assert recipe.steps == 16 * runs + (len(recipe.range_test.lrs) if lrs == "range" else 0)
    best = min(recipe.trials, key=lambda t: t["loss"])
    assert (recipe.max_lr, recipe.momentum, recipe.weight_decay) == (best["lr"], best["momentum"], best["weight_decay"])
    by_momentum = {t["momentum"]: t["lr"] for t in recipe.trials}
    assert by_momentum[0.97, 0.97] / by_momentum[0.9, 0.9] == pytest.approx(0.03 / 0.1)
    assert search(optimizer=optimizer) == recipe
    model = net()
    recipe.learner(40).fit(model, First(TRAIN, 40), epochs=1)
    assert evaluate(model, VAL)["accuracy"] > 0.6
    made = recipe.optimizer(model)
    assert made.param_groups[0]["weight_decay"] == recipe.weight_decay
    assert recipe.schedule(made, 10).total_steps == 10


def test_a_search_refuses_what_it_cannot_use():
    with pytest.raises(BadInput, match="at least one"):
        balance_search(net, TRAIN, VAL, decays=())
    with pytest.raises(BadInput, match="'range'"):
        balance_search(net, TRAIN, VAL, lrs="best")
    with pytest.raises(BadInput, match="diverged"):
        balance_search(net, [(X * 1e30, DATA.y)], VAL, steps=4, lrs=[1e6])
    with pytest.raises(BadInput, match="no samples"):
        list(First([], 3))
