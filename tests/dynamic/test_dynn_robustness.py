"""Attacks: closed forms, what they leave alone, and what their success means."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.dynamic.attacks import pgd
from neurarium.dynamic.exits import EarlyExit, with_exits
from neurarium.errors import BadInput, UnsupportedModel


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )


def batch(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=g), torch.randint(3, (n,), generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pgd_on_a_linear_model_is_the_closed_form(dtype):
    torch.manual_seed(0)
    w, x = torch.randn(12, dtype=dtype), torch.randn(5, 12, dtype=dtype)
    sign = torch.tensor([1, -1, 1, -1, 1], dtype=dtype)
    raise_margin = partial(pgd, lambda z: z @ w, x, sign, loss=lambda out, s: out * s)
    want = x + 0.3 * sign[:, None] * w.sign()
    torch.testing.assert_close(raise_margin(eps=0.3, step=0.1, steps=3), want)
    torch.testing.assert_close(raise_margin(eps=0.3, step=0.1, steps=7, start="uniform", generator=torch.Generator()), want)
    clipped = raise_margin(eps=0.3, step=0.1, steps=4, clip=(-1.0, 1.0))
    torch.testing.assert_close(clipped, torch.where(x.abs() > 1, clipped, want.clamp(-1, 1)))
    outside = x.abs() > 1  # stays, or moves towards what is allowed
    assert (clipped[outside].abs() <= x[outside].abs()).all()


@pytest.mark.parametrize("start", [0.0, 0.01, "uniform"])
def test_pgd_stays_inside_and_never_lowers_the_loss(start):
    net, (x, y) = small(), batch()
    ce = partial(F.cross_entropy, reduction="none")
    lo, hi = torch.tensor(0.1), torch.full((1, 1, 1, 1), 0.9)
    for eps in (0.0, 0.05, 0.4):

        def attack(steps, eps=eps):
            return pgd(net, x, y, eps=eps, step=1.0, steps=steps, start=start, generator=torch.Generator().manual_seed(1), clip=(lo, hi))

        begun, ended = attack(0), attack(6)  # steps that are far too long: the last point can be worse than the first
        assert (ended - x).abs().max() <= eps + 1e-6
        inside = (x > lo) & (x < hi)
        assert ((ended >= lo) & (ended <= hi))[inside].all()
        assert (ce(net.eval()(ended), y) >= ce(net(begun), y) - 1e-6).all()
    assert torch.equal(pgd(net, x, y, eps=0.0, step=1.0, steps=3, start=start), x)


def test_pgd_takes_soft_labels():
    net, (x, _) = small().eval(), batch()
    p = net(x).softmax(-1).detach()
    moved = pgd(net, x, p, eps=0.1, step=0.03, steps=5, loss="kl", start=1e-3, generator=torch.Generator().manual_seed(0))
    want = F.kl_div(net(moved).log_softmax(-1), p, reduction="none").sum(-1)
    assert (want > 1e-4).all()
    ours = pgd(
        net, x, p, eps=0.1, step=0.03, steps=5, start=1e-3, generator=torch.Generator().manual_seed(0),
        loss=lambda out, target: F.kl_div(out.log_softmax(-1), target, reduction="none").sum(-1),
    )  # fmt: skip
    torch.testing.assert_close(ours, moved)
    hard = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float()  # a certain target: KL is the cross-entropy
    torch.testing.assert_close(
        pgd(net, x, hard, eps=0.1, step=0.03, steps=5, loss="kl"), pgd(net, x, hard.argmax(1), eps=0.1, step=0.03, steps=5)
    )


def test_pgd_leaves_the_model_as_it_was():
    net, (x, y) = small().train(), batch()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():  # works there too
        first = pgd(net, x, y, eps=0.1, step=0.05, steps=3, start="uniform", generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and not net[1].training and all(p.grad is None for p in net.parameters())
    assert not first.requires_grad and not x.requires_grad
    closed = pgd(
        lambda z: net(z), x, y, eps=0.1, step=0.05, steps=3, start="uniform", generator=torch.Generator().manual_seed(0), module=net
    )
    assert torch.equal(first, closed)  # statistics of the batch were not used


def test_pgd_on_a_policy_attacks_the_exit_that_is_taken():
    (x, y) = batch(20)
    policy = EarlyExit(with_exits(small(), x, cuts=2)).eval()
    scores = policy.decide(x, threshold=2.0)
    assert (scores.choice == 2).all()
    first = policy.use(threshold=0.0)
    a = pgd(first, x, y, eps=0.1, step=0.05, steps=3)
    torch.testing.assert_close(a, pgd(lambda z: policy.outputs(z)[0], x, y, eps=0.1, step=0.05, steps=3))
    policy.use(threshold=2.0)
    torch.testing.assert_close(pgd(policy, x, y, eps=0.1, step=0.05, steps=3), pgd(policy.staged, x, y, eps=0.1, step=0.05, steps=3))


def test_pgd_refuses_what_it_cannot_attack():
    net, (x, y) = small(), batch()
    attack = partial(pgd, eps=0.1, step=0.1, steps=1)
    with pytest.raises(BadInput, match="empty batch"):
        attack(net, x[:0], y[:0])
    with pytest.raises(BadInput, match="NaN"):
        attack(net, x * float("nan"), y)
    with pytest.raises(BadInput, match="floating-point"):
        attack(net, y, y)
    with pytest.raises(BadInput, match="negative"):
        attack(net, x, y, eps=-1.0)
    with pytest.raises(BadInput, match="one number for each"):
        attack(net, x, y, loss=F.cross_entropy)
    with pytest.raises(BadInput, match="uniform"):
        attack(net, x, y, start="normal")
    with pytest.raises(UnsupportedModel, match="no gradient"):
        attack(lambda z: net(z.detach()), x, y)
    with pytest.raises(UnsupportedModel, match="no gradient"):
        attack(lambda z: torch.zeros(6, 3), x, y)
