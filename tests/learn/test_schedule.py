"""One cycle is torch's and goes on where torch stops; the range test and the curvature estimate agree with closed forms."""

import random
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from neurarium.data import TensorData
from neurarium.errors import BadInput
from neurarium.learn.fit import Backprop, load_checkpoint, save_checkpoint
from neurarium.learn.orthogonal import ROOT
from neurarium.learn.schedule import CyclicalMomentum, HessianFreeLR, OneCycle, lr_range_test

SGDM = partial(SGD, lr=1e-3, momentum=0.9)


def optimizer(make=SGDM, groups=1):
    return make([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(groups)])


def walk(schedule, steps):
    """(rates, momenta) that each step is made with."""
    seen = []
    for _ in range(steps):
        groups = schedule.optimizer.param_groups
        seen.append([g["lr"] for g in groups] + [g["betas"][0] if "betas" in g else g.get("momentum", 0) for g in groups])
        schedule.optimizer.step()
        schedule.step()
    return np.array(seen)


@pytest.mark.parametrize("make", [SGDM, partial(Adam, lr=1e-3), partial(AdamW, lr=1.0)])
@pytest.mark.parametrize("shape", ["linear", "cos"])
@pytest.mark.parametrize(("steps", "up"), [(100, 0.45), (73, 0.3), (20, 0.4), (11, 0.4)])
def test_one_cycle_is_torchs_at_every_step(make, shape, steps, up):
    settings = {"div_factor": 12.0, "final_div_factor": 1e3, "anneal_strategy": shape, "max_momentum": 0.95, "base_momentum": 0.85}
    theirs = OneCycleLR(optimizer(make), 0.7, total_steps=steps, pct_start=up, three_phase=True, **settings)
    ours = OneCycle(optimizer(make), 0.7, steps, up=up, tail=1 - 2 * up, shape=shape)
    np.testing.assert_allclose(walk(ours, steps), walk(theirs, steps), rtol=1e-12, atol=1e-12)
    theirs = OneCycleLR(optimizer(make), 0.7, total_steps=steps, pct_start=up, three_phase=False, **settings)
    ours = OneCycle(optimizer(make), 0.7, steps, up=up, tail=0, shape=shape)
    np.testing.assert_allclose(walk(ours, steps), walk(theirs, steps), rtol=1e-12, atol=1e-12)


def test_groups_have_peaks_of_their_own_and_momentum_is_optional():
    theirs = OneCycleLR(optimizer(groups=2), [0.1, 0.5], total_steps=30, three_phase=True, pct_start=0.4, cycle_momentum=False,
                        div_factor=12.0, final_div_factor=1e3, anneal_strategy="linear")  # fmt: skip
    ours = OneCycle(optimizer(groups=2), [0.1, 0.5], 30, up=0.4, tail=0.2, momentum=None)
    np.testing.assert_allclose(walk(ours, 30), walk(theirs, 30), rtol=1e-12)
    mixed = SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.2, 0.6)], lr=1)
    rates = walk(OneCycle(mixed, None, 20), 20)[:, :2]
    np.testing.assert_allclose(rates[:, 1] / rates[:, 0], 3)
    assert rates.max() == pytest.approx(0.6)
    assert len(walk(OneCycle(optimizer(partial(Adagrad, lr=1)), 0.1, 10), 10)) == 10  # torch refuses an optimizer without momentum
    both = OneCycle(ROOT([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]), 0.1, 20)
    walk(both, 8)
    assert both.optimizer.param_groups[0]["momentum"] == both.optimizer.param_groups[0]["betas"][0] < 0.88


def test_beyond_the_end_the_last_rate_stays_with_one_warning():
    schedule = OneCycle(optimizer(), 1.2, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(schedule, 10)
    with pytest.warns(UserWarning, match="10 steps"):
        rates = walk(schedule, 5)[:, 0]
    assert np.allclose(rates, 1.2 / 12 / 1e3)
    assert len(walk(OneCycle(optimizer(), 1.0, 1), 1)) == 1
    assert isinstance(schedule, LRScheduler)


@pytest.mark.parametrize("shape", ["linear", "cos"])
@pytest.mark.parametrize("at", [0, 3, 17, 20, 33, 38, 39])
@pytest.mark.parametrize("total", [60, 41, 400])
def test_extending_has_no_jump_and_ends_at_the_last_rate(shape, at, total):
    schedule = OneCycle(optimizer(), 1.0, 40, shape=shape)
    before = walk(schedule, at).reshape(at, 2)
    schedule.extend(total)
    after = walk(schedule, total - at)
    whole = np.concatenate([before, after])[:, 0]
    assert np.abs(np.diff(whole)).max() < (0.2 if total > 41 else 1)
    np.testing.assert_allclose(whole[at], OneCycle(optimizer(), 1.0, 40, shape=shape).at(at)[0], rtol=1e-12)
    assert whole[-1] == pytest.approx(1 / 12e3)
    if at == 39:  # nothing was left: another cycle
        assert after[:, 0].max() > 0.5 or total == 41
    schedule.extend(total + 7)
    with pytest.raises(BadInput, match="done"):
        schedule.extend(total - 1)


def test_shortening_squeezes_what_remains():
    schedule = OneCycle(optimizer(), 1.0, 100)
    walk(schedule, 10)
    schedule.extend(30)
    rates = walk(schedule, 20)[:, 0]
    assert rates.max() > 0.85
    assert rates[-1] == pytest.approx(1 / 12e3)


def test_resume_with_another_length_extends_the_cycle(tmp_path):
    whole = OneCycle(optimizer(), 1.0, 20)
    walk(whole, 7)
    state = whole.state_dict()
    save_checkpoint(tmp_path / "s.safetensors", {"schedule": state})
    state = load_checkpoint(tmp_path / "s.safetensors")["schedule"]
    same, longer = OneCycle(optimizer(), 1.0, 20), OneCycle(optimizer(), 1.0, 50)
    same.load_state_dict(state)
    longer.load_state_dict(state)
    assert same.state_dict() == whole.state_dict()
    assert longer.total_steps == 50
    whole.extend(50)
    assert longer.knots == whole.knots
    again = OneCycle(optimizer(), 1.0, 20)  # its own extend is kept by a resume that asks for what it asked for
    again.load_state_dict(whole.state_dict())
    assert again.knots == whole.knots
    with pytest.raises(BadInput, match="not the state"):
        same.load_state_dict(LambdaLR(optimizer(), lambda step: 1.0).state_dict())
    with pytest.raises(BadInput, match="groups"):
        OneCycle(optimizer(groups=2), 1.0, 20).load_state_dict(state)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


torch.manual_seed(1)
X = torch.randn(96, 6)
DATA = TensorData(X, X[:, :3].argmax(1))


def test_in_the_learner_a_resumed_run_ends_where_an_unbroken_one_does():
    learner = Backprop(optimizer=SGDM, schedule=partial(OneCycle, max_lr=0.3, total_steps=12))
    whole, parts = net(), net()
    learner.fit(whole, DATA.batches(32), epochs=4)
    state = learner.fit(parts, DATA.batches(32), epochs=1).state
    learner.fit(parts, DATA.batches(32), epochs=4, resume=state)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    longer = Backprop(optimizer=SGDM, schedule=partial(OneCycle, max_lr=0.3, total_steps=24))
    history = longer.fit(parts, DATA.batches(32), epochs=8, resume=state)
    assert history.state["parts"]["schedule"]["total_steps"] == 24
    assert history.state["parts"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.3 / 12e3)


def test_cyclical_momentum_beside_a_cyclical_rate_is_torchs_cyclic_lr():
    theirs = CyclicLR(optimizer(), 0.1, 1.0, step_size_up=7, step_size_down=11, cycle_momentum=True, base_momentum=0.8, max_momentum=0.9)
    opt = optimizer()
    rate, momentum = CyclicLR(opt, 0.1, 1.0, step_size_up=7, step_size_down=11, cycle_momentum=False), None
    momentum = CyclicalMomentum(opt, 7, 11, high=0.9, low=0.8)
    seen = []
    for _ in range(40):
        seen.append([opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]])
        opt.step()
        rate.step()
        momentum.step()
    np.testing.assert_allclose(seen, walk(theirs, 40), rtol=1e-9)
    with pytest.raises(BadInput, match="neither"):
        CyclicalMomentum(optimizer(partial(Adagrad, lr=1)), 3)


class Augmented:
    """A loader that draws from every random state there is."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.epoch += 1
        for x, y in DATA.batches(32, seed=self.epoch):
            yield x + 0.1 * (torch.randn(6) + float(np.random.randn()) + random.random()), y  # noqa: NPY002


@pytest.mark.parametrize(
    "loader",
    [
        Augmented(), DATA.batches(32), DataLoader(TensorDataset(DATA.x, DATA.y), 32, shuffle=True),
        DataLoader(TensorDataset(DATA.x, DATA.y), 32, shuffle=True, generator=torch.Generator().manual_seed(3)),
    ],
    ids=["augmented", "batches", "loader", "own-generator"],
)  # fmt: skip
def test_a_range_test_leaves_everything_as_it_was(loader):
    model = net()
    model[2].eval()
    sum(p.sum() for p in model.parameters()).backward()
    weights, grads = deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    inner = getattr(getattr(loader, "generator", None), "get_state", lambda: torch.zeros(1))
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), inner(), getattr(loader, "epoch", 0)  # noqa: NPY002
    first = lr_range_test(model, "cross_entropy", loader, SGDM, lo=1e-3, steps=30)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], inner(), getattr(loader, "epoch", 0)  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()
    assert torch.equal(before[3], after[3])
    assert before[4] == after[4]
    assert all(torch.equal(a, weights[k]) for k, a in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert model[0].training
    assert not model[2].training
    assert lr_range_test(model, "cross_entropy", loader, SGDM, lo=1e-3, steps=30) == first
    assert first.lrs[0] < first.suggestion < first.lowest <= first.lrs[-1]


class Bowl(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = torch.as_tensor(h, dtype=torch.float64)
        self.w = nn.Parameter(torch.ones_like(self.h))

    def forward(self, x):
        return 0.5 * (self.h * self.w**2).sum()


def plain(output, y):
    return output


NOTHING = [(torch.zeros(1), torch.zeros(1))]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_on_a_quadratic_the_test_diverges_at_the_limit_of_heavy_ball(momentum):
    h, grid = 4.0, 1.01
    limit = 2 * (1 + momentum) / h
    result = lr_range_test(
        Bowl([h, h / 2]), plain, NOTHING, partial(SGD, lr=1.0, momentum=momentum), lo=0.905 * limit, hi=0.905 * limit * grid**20, steps=21,
        dwell=40, smooth=0.0, stop=2.0,
    )  # fmt: skip
    assert limit <= result.divergence <= limit * grid**2
    assert result.divergence / 2 >= result.suggestion


def test_range_test_refuses_what_it_cannot_use():
    for loader, text in (([], "no samples"), ([(X * torch.nan, DATA.y)], "before the first step")):
        with pytest.raises(BadInput, match=text):
            lr_range_test(net(), "cross_entropy", loader, SGDM)
    with pytest.raises(BadInput, match="lo="):
        lr_range_test(net(), "cross_entropy", DATA.batches(32), SGDM, lo=1, hi=1)
    with pytest.raises(BadInput, match="scale="):
        lr_range_test(net(), "cross_entropy", DATA.batches(32), SGDM, scale="sqrt")


def test_groups_keep_their_ratio_in_a_range_test():
    kept = []

    def make(groups):
        kept.append(SGD(groups, lr=1.0))
        return kept[-1]

    lr_range_test(
        net(), "cross_entropy", DATA.batches(32), make, steps=5, lo=0.01, hi=0.1, scale="linear",
        groups=lambda m: [{"params": m[0].parameters(), "lr": 0.25}, {"params": m[4].parameters()}],
    )  # fmt: skip
    assert [g["lr"] for g in kept[0].param_groups] == pytest.approx([0.025, 0.1])


def test_the_curvature_estimate_is_exact_on_a_quadratic():
    h = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)
    model = Bowl(h)
    opt = SGD(model.parameters(), lr=0.01)
    estimate, last = HessianFreeLR(opt, every=1), None
    for i in range(30):
        w = model.w.detach().clone()
        opt.zero_grad()
        model(None).backward()
        opt.step()
        estimate.observe()
        if i:
            assert estimate.readings[-1] == pytest.approx(float((h * last).abs().sum() / (h * h * last).abs().sum()), rel=1e-9)
        last = w
    flat = Bowl([2.5] * 4)
    opt = SGD(flat.parameters(), lr=0.05)
    estimate = HessianFreeLR(opt, every=1)
    for _ in range(80):
        opt.zero_grad()
        flat(None).backward()
        opt.step()
        estimate.observe()
    assert estimate.estimate == pytest.approx(1 / 2.5, rel=0.01)


@pytest.mark.parametrize("bad", [{"up": 1.2}, {"up": 0.8, "tail": 0.3}, {"div": 0}, {"shape": "exp"}, {"momentum": (1.0, 0.8)}])
def test_bad_settings_are_named(bad):
    with pytest.raises(BadInput, match=next(reversed(bad)) + "="):
        OneCycle(optimizer(), 1.0, 10, **bad)
    with pytest.raises(BadInput, match="max_lr"):
        OneCycle(optimizer(groups=2), [1.0], 10)
    with pytest.raises(BadInput, match="total_steps"):
        OneCycle(optimizer(), 1.0, 0)
    with pytest.raises(BadInput, match="every"):
        HessianFreeLR(optimizer(), every=0)
