"""Predictive coding in chains of blocks: backpropagation as its limit, and only neighbours in one gradient."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from neurarium import data
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn import Diverged, evaluate
from neurarium.learn.chain import as_chain
from neurarium.learn.predictive_coding import PredictiveCoding, PredictiveCodingMLP

TASK = data.images("digits", train=600)
BATCH = next(iter(TASK.train.batches(32)))


def net(*sizes, seed=0):
    torch.manual_seed(seed)
    return PredictiveCodingMLP(sizes or (64, 24, 16, 10)).double()


def batch():
    return BATCH[0].double(), BATCH[1]


def test_small_errors_settle_into_the_gradient_of_backpropagation():
    model, (x, y) = net(), batch()
    chain = as_chain(model, x)
    rule = PredictiveCoding(150, rate=0.5, output_precision=1e-4)
    loss, output, _ = rule.gradients(chain, [1.0, 1.0], x, y)
    found = [p.grad / 1e-4 for p in model.parameters()]
    want = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(output, y))


def test_one_block_is_backpropagation():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), batch()
    twin = deepcopy(model)
    PredictiveCoding(optimizer=partial(SGD, lr=0.5)).fit(model, [(x, y)], epochs=1)
    F.cross_entropy(twin(x), y).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.5 * b.grad)


def test_the_energy_falls_while_activities_settle_and_the_first_block_hears_of_the_error_last():
    model, (x, y) = net(), batch()
    chain, heard, energies = as_chain(model, x), [], []
    for steps in (1, 2, 3, 30):
        model.zero_grad()
        rule = PredictiveCoding(steps)
        rule.gradients(chain, [1.0, 1.0], x, y)
        heard.append([bool(p.grad.abs().max() > 1e-12) for name, p in model.named_parameters() if name.endswith("weight")])
        values = [h.clone().requires_grad_() for h in chain.forward(x)[:-1]]
        for _ in range(steps):
            energy, _ = rule.energy(chain, [1.0, 1.0], x, values, y, F.cross_entropy)
            values = [(v - rule.rate * g * len(x)).detach().requires_grad_() for v, g in zip(values, torch.autograd.grad(energy, values))]
        energies.append(float(rule.energy(chain, [1.0, 1.0], x, values, y, F.cross_entropy)[0]))
    assert heard == [[False, True, True], [True] * 3, [True] * 3, [True] * 3]
    assert energies == sorted(energies, reverse=True)


def test_a_blocks_gradient_is_its_own_error_times_its_own_input():
    model, (x, y) = net(64, 12, 10), batch()
    rule = PredictiveCoding(10)
    _, _, errors = rule.gradients(as_chain(model, x), [2.0], x, y)
    hidden = model[1](x.flatten(1))
    delta = -2 * errors[0] * (1 - hidden.tanh() ** 2) / len(x)
    torch.testing.assert_close(model[1].weight.grad, delta.T @ x.flatten(1))


@pytest.mark.parametrize("learning", [False, True])
def test_it_learns_digits_and_resumes(learning):
    rule = PredictiveCoding(4, learning, optimizer=partial(Adam, lr=1e-2))
    whole, half = (PredictiveCodingMLP((64, 48, 32, 10)) for _ in range(2))
    half.load_state_dict(whole.state_dict())
    rule.fit(whole, TASK.train.batches(32, seed=0), epochs=5)
    assert evaluate(whole, TASK.test.batches(500, shuffle=False))["accuracy"] > 0.85
    state = rule.fit(half, TASK.train.batches(32, seed=0), epochs=3).state
    assert (state["parts"]["precisions"]["values"] != [1.0, 1.0]) == learning
    fresh = PredictiveCodingMLP((64, 48, 32, 10))
    rule.fit(fresh, TASK.train.batches(32, seed=0), epochs=5, resume=state)
    for a, b in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_convolutions_and_regression():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 1))
    x = TASK.train.x[:64]
    y = x.mean((1, 2, 3))[:, None]
    history = PredictiveCoding(10, loss="mse", optimizer=partial(Adam, lr=1e-2)).fit(model, [(x, y)], epochs=30)
    assert history.last["loss"] < 0.2 * history.train[0]["loss"]


def test_what_cannot_settle_is_refused_by_name():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            return self.second(self.first(x.flatten(1)) + x.flatten(1))

    with pytest.raises(UnsupportedModel, match="draws anew") as refused:
        PredictiveCoding().fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Dropout(), nn.Linear(9, 10)), [BATCH], epochs=1)
    assert refused.value.module == "2"
    with pytest.raises(UnsupportedModel, match="skip connection") as refused:
        PredictiveCoding().fit(Residual(), [BATCH], epochs=1)
    assert refused.value.module == "first"
    for rule, loader, why in (
        (PredictiveCoding(0), [BATCH], "positive"),
        (PredictiveCoding(), [], "no samples"),
        (PredictiveCoding(), [(BATCH[0] * torch.nan, BATCH[1])], "finite"),
    ):
        with pytest.raises(BadInput, match=why):
            rule.fit(PredictiveCodingMLP((64, 10)), loader, epochs=1)
    with pytest.raises(BadInput, match="activation"):
        PredictiveCodingMLP((3, 4), "step")
    broken = PredictiveCodingMLP((64, 8, 10))
    with torch.no_grad():
        broken[3].weight[0, 0] = torch.inf
    with pytest.raises(Diverged, match=r"step 0.*'3\.weight'"):
        PredictiveCoding().fit(broken, [BATCH], epochs=1)
