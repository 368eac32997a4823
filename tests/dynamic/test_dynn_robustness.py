"""Attacks: closed forms, what they leave alone, and what their success means."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.dynamic.attacks import early_attack, hesitation, pgd, slowdown
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.exits import EarlyExit, with_exits
from neurarium.dynamic.robustness import dynn_robustness, transfer
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.examples.dynamic.attacks import trained
from neurarium.testing.examples.dynamic.exits import _batch


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


def test_early_attack_by_an_independent_judge():
    policy, static = trained(0)
    x, _ = _batch(24, 5)
    found = early_attack(policy, x, c=500.0, steps=150, lr=0.05, clip=(-1.0, 2.0))
    assert found.rate > 0.2 and ((found.x >= -1) & (found.x <= 2)).all()
    torch.testing.assert_close(found.norm, (found.x - x).flatten(1).norm(dim=1))
    chain = policy.staged  # its segments and heads by hand, the final answer by the static twin, which has the same weights
    first = chain.heads[0](chain.segments[0](found.x)).argmax(1)
    second = chain.heads[1](chain.segments[1](chain.segments[0](found.x))).argmax(1)
    judged = (first != found.label) & (second != found.label) & (static(found.x).argmax(1) == found.label)
    assert torch.equal(judged, found.success)
    assert torch.equal(found.label, static(x).argmax(1))
    alone = early_attack(lambda z: policy.outputs(z), x[:3], c=500.0, steps=150, lr=0.05, clip=(-1.0, 2.0))  # rows do not see each other
    torch.testing.assert_close(alone.x, found.x[:3], rtol=1e-3, atol=1e-3)


def test_early_attack_minimises_what_it_says():
    torch.manual_seed(0)
    policy, x = EarlyExit(with_exits(small(), batch()[0], cuts=1)).eval(), batch()[0]

    def objective(z: torch.Tensor, label: torch.Tensor, alpha: float, c: float) -> list[float]:
        values = []
        for i, r in enumerate(label.tolist()):
            p = [out[i].softmax(0) for out in policy.outputs(z)]
            hold = sum(max(0.0, (p[-1][r] - p[-1][j]).item()) for j in range(3) if j != r)
            values.append((z[i] - x[i]).square().sum().item() + c * (sum(q[r].item() for q in p[:-1]) - alpha * hold))
        return values

    label = policy.outputs(x)[-1].argmax(1)
    for alpha in (0.01, 1.0):
        end = early_attack(policy, x, alpha=alpha, steps=100, clip=None)
        for before, after in zip(objective(x, label, alpha, 5.0), objective(end.x, label, alpha, 5.0)):
            assert after < before
    small_steps = early_attack(policy, x, steps=1, lr=1e-4, clip=None).x - x  # Adam's first step is the sign of the gradient
    z = x.clone().requires_grad_()
    p = [out.softmax(1) for out in policy.outputs(z)]
    at = p[-1].gather(1, label[:, None])
    loss = 5 * (p[0].gather(1, label[:, None]).squeeze(1) - (at - p[-1]).relu().sum(1))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    large = gradient.abs() > 1e-5
    assert torch.equal(small_steps[large].sign(), -gradient[large].sign())


def test_slowdown_makes_rows_go_further():
    policy, _ = trained(0)
    x, _ = _batch(40, 5)
    policy.use(x, budget=0.6 * policy.costs(x).full)
    assert slowdown(policy, x, eps=0.0, clip=None).inflation == 1.0
    found = slowdown(policy, x, eps=0.2, clip=None)
    assert found.inflation > 1.15 and (found.x - x).abs().max() <= 0.2 + 1e-6
    assert torch.equal(found.attacked, policy.decide(found.x).cost)
    assert (hesitation(policy.outputs(found.x)) >= hesitation(policy.outputs(x)) - 1e-6).all()
    assert hesitation([torch.zeros(2, 5), torch.ones(2, 5)]).tolist() == pytest.approx([1.0, 1.0])


def test_transfer_to_a_copy_is_the_own_success():
    policy, static = trained(0)
    data = _batch(60, 5)
    attack = partial(transfer, data=data, eps=0.3, steps=4, clip=None)
    own = attack(static, copy.deepcopy(static))
    assert own.rate == own.success and own.success > 0
    never = copy.deepcopy(policy).use(threshold=2.0)  # never stops early: the static network itself
    there, back = attack(static, never), attack(never, static)
    assert there.rate == own.rate == back.rate and there.rows == own.rows
    assert attack(static, policy, eps=0.0).rate == 0 == attack(static, policy, eps=0.0).success


def test_flops_of_an_attack_by_hand():
    policy, static = trained(0)
    data = _batch(60, 5)
    for steps in (1, 3):  # a forward pass a step and one at the end, and for each step as much again backwards, to the input alone
        one = transfer(static, policy, data, eps=0.3, steps=steps, clip=None)
        assert one.flops == one.rows * (2 * steps + 1) * CostTable.measure([static], data[0]).full
    first = copy.deepcopy(policy).use(threshold=0.0)
    early = transfer(first, static, data, eps=0.3, steps=3, clip=None)
    assert early.flops == early.rows * 7 * policy.costs(data[0]).total[0]
    assert early.flops_per_success == early.flops / round(early.success * early.rows)


def test_the_report_is_what_its_parts_say():
    policy, static = trained(0)
    data = _batch(60, 5)
    report = dynn_robustness(
        policy, static, data, eps=(0.1, 0.3), steps=3, clip=None, early={"c": 500.0, "steps": 100, "lr": 0.05}, early_rows=20
    )
    there = transfer(static, policy, data, eps=0.3, steps=3, clip=None)
    back = transfer(policy, static, data, eps=0.3, steps=3, clip=None)
    assert (report.success_static[1], report.static_to_dynamic[1]) == (there.success, there.rate)
    assert (report.success_dynamic[1], report.dynamic_to_static[1]) == (back.success, back.rate)
    assert report.flops_dynamic[1] == back.flops_per_success and report.rows == back.rows
    assert report.seconds_static == () and report.early_kept == 1.0 and report.noise_success <= 0.1 < report.early_success
    assert report.inflation[1] > report.inflation[0] > 1
    with pytest.raises(UnsupportedModel, match="is no policy"):
        dynn_robustness(static, static, data)
    with pytest.raises(BadInput, match="no row is right"):
        dynn_robustness(policy, static, (data[0], (static(data[0]).argmax(1) + 1) % 3))
    with pytest.raises(BadInput, match="labels"):
        dynn_robustness(policy, static, (data[0], data[1] + 7))
    with pytest.raises(BadInput, match="only one"):
        early_attack(lambda z: [static(z)], data[0])
    with pytest.raises(BadInput, match="classes"):
        early_attack(lambda z: [z, z], data[0])
    with pytest.raises(BadInput, match="smallest"):
        early_attack(policy, data[0], clip=(1.0, 0.0))
