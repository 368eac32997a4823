"""Private feedback: the accountant is right, the noise has the covariance of the formula, and no attack finds more than was promised."""

from copy import deepcopy
from functools import partial
from math import inf, isinf, log

import pytest
import torch
from dp_accounting import dp_event, rdp
from scipy.stats import beta
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import as_chain
from neurarium.learn.feedback import DFA, RandomFeedback
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.photonic import OPU
from neurarium.learn.private_feedback import DPSGD, ORDERS, PrivateDFA, epsilon, rdp_gaussian, rdp_to_dp
from neurarium.testing.locality import assert_feedback_local

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
TRAIN, VAL = TensorData(X.float() / 16, Y).split(1200, seed=0)
VALID = VAL.batches(300, shuffle=False)
BATCH = TRAIN[:64]
OPEN = {"sigma": 0.0, "feedback_clip": inf, "error_clip": inf, "activation_clip": inf, "activation_offset": 0.0}


def mlp(*widths, inputs=64, classes=10, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in zip((inputs, *widths), widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


@pytest.mark.parametrize("sigma", [0.7, 2.0, 10.0])
def test_the_accountant_agrees_with_an_independent_one(sigma):
    for steps, delta in ((1, 1e-5), (30, 1e-6)):
        accountant = rdp.RdpAccountant(ORDERS).compose(dp_event.GaussianDpEvent(sigma), steps)
        ours, _, _ = rdp_to_dp([steps * rdp_gaussian(1.0, sigma, a) for a in ORDERS], ORDERS, delta)
        assert ours == pytest.approx(accountant.get_epsilon(delta), rel=1e-6, abs=1e-6)
        assert ours <= rdp_to_dp([steps * rdp_gaussian(1.0, sigma, a) for a in ORDERS], ORDERS, delta, classic=True)[0]


def test_the_label_analysis_counts_two_releases_an_epoch():
    learner = PrivateDFA(sigma=4.0, feedback_clip=0.5, error_clip=1.5)
    accountant = rdp.RdpAccountant(ORDERS)
    accountant.compose(dp_event.GaussianDpEvent(4.0 / 1.0), 3).compose(dp_event.GaussianDpEvent(4.0 / 3.0), 3)
    spent = epsilon(learner, n=1000, batch=64, steps=48)  # 16 batches an epoch
    assert spent.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    assert epsilon(learner, n=1000, batch=64, steps=49).epsilon > spent.epsilon  # one batch of a fourth pass has seen somebody again
    assert epsilon(learner, n=1000, batch=64, steps=33).epsilon == spent.epsilon
    assert isinf(epsilon(PrivateDFA(sigma=0.0), n=100, batch=10, steps=1).epsilon)
    assert any("public" in a for a in spent.assumptions)


def test_the_published_analysis_carries_its_assumptions():
    spent = epsilon(PrivateDFA(sigma=1.0), n=1000, batch=50, steps=200, layers=3, analysis="published")
    per_step = [a * 3 * (2 / 50) ** 2 / (2 / 50) for a in ORDERS]
    assert spent.epsilon == pytest.approx(min(200 * r - log(1e-5) / (a - 1) for r, a in zip(per_step, ORDERS)))
    assert any("every direction" in a for a in spent.assumptions)
    with pytest.raises(BadInput, match="published"):
        epsilon(DPSGD(), n=10, batch=5, steps=1, analysis="published")


@pytest.mark.parametrize("ternary", [None, 0.15])
def test_without_clips_and_noise_it_is_dfa_bit_for_bit(ternary):
    ours, theirs = mlp(32, 24), mlp(32, 24)
    settings = {"optimizer": partial(Adam, lr=1e-3), "ternary": ternary}
    PrivateDFA(**settings, **OPEN).fit(ours, TRAIN.batches(64), epochs=1)
    DFA(**settings).fit(theirs, TRAIN.batches(64), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_is_released_of_a_sample_is_clipped_before_the_noise():
    rule, calls = PrivateDFA(sigma=0.0, feedback_clip=0.3, error_clip=0.2), RandomFeedback(10, 50)
    e = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    e[0] *= 1e-3
    first, second, top = rule.signals(calls, e, [20, 30])
    both = torch.cat([first, second], 1)
    assert float(both.norm(dim=1).max()) <= 0.3 + 1e-6
    assert float(top.norm(dim=1).max()) <= 0.2 + 1e-6
    torch.testing.assert_close(both[0], calls.project(e)[0])  # a small one is left as it is


def test_updates_see_bounded_inputs_and_the_forward_pass_does_not():
    model, clip, offset = mlp(16), 0.5, 0.1
    trained = deepcopy(model)
    x, y = BATCH
    rule = PrivateDFA(**{**OPEN, "activation_clip": clip, "activation_offset": offset}, optimizer=partial(SGD, lr=1.0))
    history = rule.fit(trained, [BATCH], epochs=1)
    assert history.last["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-6)
    with torch.no_grad():
        h = model[1](model[0](x))
        e = model[2](h).softmax(1) - F.one_hot(y, 10)
        seen = (h + offset / 4).clamp(-clip / 4, clip / 4)
        assert float(seen.norm(dim=1).max()) <= clip + 1e-6
    torch.testing.assert_close(trained[2].weight, model[2].weight - e.T @ seen / 64, rtol=0, atol=1e-6)


def test_layers_inside_a_block_still_hear_each_other_when_inputs_are_bounded():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 8), block, nn.Flatten(), nn.Linear(64, 10))
    before = block.linear1.weight.clone()
    PrivateDFA(sigma=0.1).fit(model, [BATCH], epochs=1)
    assert not torch.equal(before, block.linear1.weight)


def test_the_noise_of_an_update_has_the_covariance_of_the_formula():
    model = mlp(3, inputs=4, classes=3).double()
    x, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 2])
    rule = PrivateDFA(sigma=0.7, activation_clip=inf, activation_offset=0.0)
    chain, feedback, draws = as_chain(model, x), RandomFeedback(3, 3).double(), []
    torch.manual_seed(0)
    for _ in range(4000):
        model.zero_grad()
        rule.gradients(chain, feedback, x, y)
        draws.append(model[0].weight.grad.clone())
    found = torch.stack(draws)
    slope = 1 - torch.tanh(model[0](x)).detach() ** 2  # (samples, units)
    for k in range(3):
        expected = sum((0.7 / 2) ** 2 * slope[i, k] ** 2 * torch.outer(x[i], x[i]) for i in range(2))
        assert float((torch.cov(found[:, k].T) - expected).norm() / expected.norm()) < 0.05


def test_a_likelihood_ratio_attack_on_a_label_stays_below_epsilon():
    """The strongest attacker: knows the weights, the inputs, all other labels, and sees what training sees of the one label."""
    torch.manual_seed(0)
    model, delta, draws = mlp(24), 1e-5, 20_000
    feedback = RandomFeedback(10, 24)
    for sigma in (1.5, 4.0):
        rule = PrivateDFA(sigma=sigma)
        e = model(BATCH[0][:1]).softmax(1).detach()
        errors = [(e - F.one_hot(torch.tensor([label]), 10)) * 50 for label in (3, 8)]  # they saturate the clips: the worst case
        means = torch.cat([torch.cat(PrivateDFA(sigma=0.0).signals(feedback, error, [24]), 1) for error in errors])
        gap = means[1] - means[0]
        seen = [torch.cat(rule.signals(feedback, error.expand(draws, -1), [24]), 1) for error in errors]
        ratio = [(s - means.mean(0)) @ gap / sigma**2 for s in seen]
        spent = epsilon(rule, n=1, batch=1, steps=1, delta=delta).epsilon
        lower = 0.0
        for threshold in ratio[1].quantile(torch.linspace(0.05, 0.95, 19)).tolist():
            hits, false = int((ratio[1] > threshold).sum()), int((ratio[0] > threshold).sum())
            tpr, fpr = beta.ppf(1e-4, hits, draws - hits + 1), beta.ppf(1 - 1e-4, false + 1, draws - false)
            lower = max(lower, log(max(tpr - delta, 1e-12) / fpr))
        assert 0.2 * spent < lower <= spent  # sound, and the attack is not a straw man


def test_private_training_learns_and_nothing_comes_through_the_weights_above():
    model = mlp(48, 48)
    rule = PrivateDFA(optimizer=partial(SGD, lr=0.5, momentum=0.9), sigma=0.1)
    rule.fit(model, TRAIN.batches(32), epochs=6)
    assert evaluate(model, VALID)["accuracy"] > 0.85
    assert_feedback_local(rule, mlp(24, 16, 8), BATCH)
    optical = PrivateDFA(sigma=0.1, ternary=0.15, projector=partial(OPU, noise=0.0, saturation=3.0))
    optical.fit(model, TRAIN.batches(64), epochs=1)


def test_dpsgd_without_clip_and_noise_is_gradient_descent_and_its_clip_holds():
    ours, theirs, noisy = mlp(16), mlp(16), mlp(16)
    DPSGD(optimizer=partial(SGD, lr=0.1), sigma=0.0, gradient_clip=inf).fit(ours, TRAIN.batches(64), epochs=1)
    Backprop(optimizer=partial(SGD, lr=0.1)).fit(theirs, TRAIN.batches(64), epochs=1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    DPSGD(sigma=0.0, gradient_clip=0.01).gradients(noisy, *BATCH)
    assert torch.cat([p.grad.flatten() for p in noisy.parameters()]).norm() <= 0.01 + 1e-6
    singles = []
    for i in range(4):  # each sample by itself
        noisy.zero_grad()
        F.cross_entropy(noisy(BATCH[0][i : i + 1]), BATCH[1][i : i + 1]).backward()
        g = noisy[0].weight.grad.clone()
        singles.append(g * min(1, 0.5 / torch.cat([p.grad.flatten() for p in noisy.parameters()]).norm()))
    DPSGD(sigma=0.0, gradient_clip=0.5).gradients(noisy, BATCH[0][:4], BATCH[1][:4])
    torch.testing.assert_close(noisy[0].weight.grad, torch.stack(singles).mean(0))
    spent = [epsilon(rule, n=64, batch=64, steps=5).epsilon for rule in (DPSGD(sigma=2**-0.5), PrivateDFA(sigma=1.0))]
    assert spent[0] == pytest.approx(spent[1])


def test_what_would_break_the_guarantee_is_refused():
    normed = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    for rule in (PrivateDFA(), DPSGD()):
        with pytest.raises(UnsupportedModel, match="mixes samples"):
            rule.fit(normed, TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="saturation"):
        PrivateDFA(ternary=0.15, projector=OPU).fit(mlp(8), TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="sigma"):
        PrivateDFA(sigma=-1.0).fit(mlp(8), TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="feedback_clip"):
        PrivateDFA(feedback_clip=0.0).fit(mlp(8), TRAIN.batches(64), epochs=1)
    for bad in ({"delta": 0.0}, {"n": 0}, {"batch": 200}, {"analysis": "x"}):
        with pytest.raises(BadInput):
            epsilon(PrivateDFA(), **{"n": 100, "batch": 10, "steps": 5, **bad})
