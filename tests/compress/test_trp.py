"""Truncation happens before the gradient, the pull is the nuclear norm's gradient, and decomposition meets its rule."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from neurarium.compress import LowRankConv2d, LowRankLinear, TRPCallback, apply_ranks, decompose, fold, plan_decompose, rank_macs, trp
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop
from neurarium.meter import macs


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(),
                         nn.Linear(72, 4))  # fmt: skip


def _loader() -> list[tuple[Tensor, Tensor]]:
    return [(_rand(8, 3, 8, 8, seed=i), torch.arange(8) % 4) for i in range(3)]


OPTIMIZER = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)


def test_without_truncation_and_pull_it_is_plain_training_bit_for_bit() -> None:
    model = _net()
    want = copy.deepcopy(model)
    Backprop(optimizer=OPTIMIZER).fit(want, _loader(), epochs=2, seed=3)
    options = {"epochs": 2, "optimizer": OPTIMIZER, "seed": 3, "decompose": False, "period": 2}
    got = trp(model, _loader(), energy=1.0, nuclear=0.0, **options)
    assert all(torch.equal(v, got.state_dict()[k]) for k, v in want.state_dict().items())
    for changed in ({"energy": 0.9, "nuclear": 0.0}, {"energy": 1.0, "nuclear": 1e-2}):
        other = trp(model, _loader(), **changed, **options)
        assert not torch.equal(other[0].weight, want[0].weight)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in _net().state_dict().items())


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_pull_is_the_gradient_of_the_nuclear_norm(scheme: str) -> None:
    layer = nn.Conv2d(3, 4, 3).double()
    number = {"channel": 0, "spatial": 2}[scheme]
    callback = TRPCallback(layer, energy=1.0, nuclear=1.0, scheme=scheme)
    layer.weight.grad = torch.zeros_like(layer.weight)
    callback.before_step()
    callback.after_backward()
    direction = _rand(*layer.weight.shape).double()

    def nuclear(t: float) -> Tensor:
        return torch.linalg.matrix_norm(fold(layer.weight.detach() + t * direction, number), "nuc")

    slope = (nuclear(1e-5) - nuclear(-1e-5)) / 2e-5
    torch.testing.assert_close((layer.weight.grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_the_pull_alone_shrinks_all_singular_values_alike() -> None:
    layer = nn.Linear(6, 5, bias=False).double()
    before = torch.linalg.svdvals(layer.weight.detach())
    callback, optimizer = TRPCallback(layer, period=2, energy=1.0, nuclear=0.01), SGD(layer.parameters(), lr=0.5)
    for step in range(4):
        callback.before_step()
        layer.weight.grad = torch.zeros_like(layer.weight)
        callback.after_backward()
        optimizer.step()
        shrunk = before - (step // 2 + 1) * 0.5 * 0.01  # on every second step only
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach()), shrunk, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_taken_at_the_truncated_weight_of_least_rank() -> None:
    model, x = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)), _rand(5, 10)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    u, s, vh = torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False)
    share = (s.square().cumsum(0) / s.square().sum()).tolist()
    callback = TRPCallback(model, energy=0.9, nuclear=0.0)
    callback.before_step()
    rank = callback.ranks["0"]
    assert share[rank - 2] < 0.9 <= share[rank - 1]
    torch.testing.assert_close(model[0].weight.detach(), ((u[:, :rank] * s[:rank]) @ vh[:rank]).float())
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], momentum)
    fresh = copy.deepcopy(model)
    for m in (model, fresh):
        m.zero_grad()
        m(x).square().sum().backward()
    callback.after_backward()
    assert torch.equal(model[0].weight.grad, fresh[0].weight.grad)


def test_training_with_truncation_leaves_less_to_cut() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = _rand(64, 20)
    loader = [(x, (x[:, :2] > 0).long() @ torch.tensor([1, 2]))]
    common = {"epochs": 60, "optimizer": partial(SGD, lr=0.1, momentum=0.9), "period": 5, "decompose": False}
    plain = trp(model, loader, energy=1.0, nuclear=0.0, **common)
    low = trp(model, loader, energy=0.95, nuclear=1e-2, **common)
    error = [max(plan_decompose(m, rank=6).errors.values()) for m in (plain, low)]
    assert error[1] < 0.5 * error[0]
    thin = trp(model, loader, energy=0.95, nuclear=1e-2, threshold=0.1, **(common | {"decompose": True}))
    assert any(isinstance(m, LowRankLinear) for m in thin)
    torch.testing.assert_close(thin.plan.ranks, plan_decompose(low, threshold=0.1).ranks)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_decomposition_is_exact_where_the_rank_allows_and_meets_its_rule(scheme: str) -> None:
    model, x = _net().eval(), _rand(2, 3, 8, 8)
    callback = TRPCallback(model, energy=0.6, nuclear=0.0, scheme=scheme)
    callback.before_step()
    thin = decompose(model, threshold=1e-4, scheme=scheme)
    assert isinstance(thin[3], LowRankConv2d)
    torch.testing.assert_close(thin(x), model(x), rtol=1e-4, atol=1e-5)
    assert {n: j for n, (_, j, _) in thin.plan.ranks.items()}.items() <= callback.ranks.items()
    model = _net().eval()
    for energy in (0.5, 0.8):
        plan = plan_decompose(model, energy=energy, scheme=scheme)
        for name, (_, rank, entry) in plan.ranks.items():
            s = torch.linalg.svdvals(fold(model.get_submodule(name).weight.detach().double(), entry)).square()
            assert s[: rank - 1].sum() < energy * s.sum() <= s[:rank].sum() * (1 + 1e-6)
    assert {j for _, j, _ in plan_decompose(model, rank=2, scheme=scheme).ranks.values()} == {2}


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_speedup_is_measured_in_multiply_adds(scheme: str) -> None:
    model, x = _net().eval(), _rand(1, 3, 8, 8)
    result = decompose(model, speedup=2.2, example=x, scheme=scheme)
    ratio = macs(model, x) / macs(result, x)
    assert 2.2 <= ratio < 2.7
    again = decompose(result, speedup=2.2, example=x, scheme=scheme)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in result.state_dict().items())
    whole = decompose(model, speedup=1.0, example=(x,), scheme=scheme)
    torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-5)
    assert rank_macs(model[5], 1) == 76
    assert apply_ranks(model, result.plan)(x).equal(result(x))


def test_bad_input_is_named() -> None:
    model = _net()
    bad = {"energy": 0.0, "period": 0, "nuclear": -1.0, "epochs": 0, "scheme": "rows", "skip": ("9",)}
    for name, value in bad.items():
        with pytest.raises(BadInput, match=f"^{name}"):
            trp(model, _loader(), **({"epochs": 1} | {name: value}))
    with pytest.raises(BadInput, match="no samples"):
        trp(model, [], epochs=1)
    with pytest.raises(BadInput, match="exactly one"):
        decompose(model)
    with pytest.raises(BadInput, match="example"):
        decompose(model, speedup=2.0)
    with pytest.raises(UnsupportedModel):
        trp(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), _loader(), epochs=1)
    skipped = decompose(model, rank=1, skip=("0",))
    assert type(skipped[0]) is nn.Conv2d
    assert "0" in skipped.plan.skipped
    with torch.no_grad():
        model[3].weight[0] = float("nan")
    with pytest.raises(BadInput, match="3: the weight"):
        trp(model, _loader(), epochs=1)
