"""A rearranged network is the same function; the search finds what brute force finds; a sparse convolution is the dense one with zeros."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.compress import (
    Block,
    SparseConv2d,
    Unstructured,
    finalise,
    group_mask,
    load_sparse,
    magnitude,
    plan_groups,
    rearrange_channels,
    sparsebyte,
    to_dense_runtime,
    to_sparse_runtime,
)
from neurarium.compress.runtime.rearrange import best_order
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop
from neurarium.testing.architectures import subject


def worth(rows: torch.Tensor, order: torch.Tensor, size: int, sparsity: float) -> float:
    sums = rows[order].double().view(-1, size, rows.shape[1]).sum(1).flatten()
    return float(sums.sort(descending=True).values[: len(sums) - round(sparsity * len(sums))].sum())


def splits(n: int, size: int) -> list[torch.Tensor]:
    rest = [(0, *c) for c in itertools.combinations(range(1, n), size - 1)]
    return [torch.tensor([*c, *(i for i in range(n) if i not in c)]) for c in rest]


def test_the_search_against_all_35_splits() -> None:
    exact = 0
    for seed in range(20):
        rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).square()
        every = [worth(rows, order, 4, 0.5) for order in splits(8, 4)]
        assert len(every) == 35
        found = worth(rows, best_order([rows], 4, 0.5), 4, 0.5)
        assert found >= worth(rows, torch.arange(8), 4, 0.5)
        assert found >= 0.97 * max(every)
        exact += found >= max(every) * (1 - 1e-9)
    assert exact >= 14


def test_interleaved_supports_are_told_apart() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(32, 20)
    rows[::2, :10] = 1 + torch.rand(16, 10, generator=g)
    rows[1::2, 10:] = 1 + torch.rand(16, 10, generator=g)
    order = best_order([rows], 16, 0.5)
    assert {frozenset((order[:16] % 2).tolist()), frozenset((order[16:] % 2).tolist())} == {frozenset({0}), frozenset({1})}
    assert worth(rows, order, 16, 0.5) == pytest.approx(float(rows.sum()))  # nothing is lost
    best = best_order([rows[order]], 16, 0.5)
    assert torch.equal(best, torch.arange(32))  # what is good stays as it is


def test_two_layers_share_an_order_and_odd_numbers_of_rows_are_fine() -> None:
    g = torch.Generator().manual_seed(1)
    kinds = torch.arange(22) % 2
    a, b = torch.rand(22, 6, generator=g) * 0.1, torch.rand(22, 30, generator=g) * 0.1
    a[kinds == 0, :3] += 1
    b[kinds == 1, 15:] += 1
    order = best_order([a, b], 11, 0.75)
    assert sorted(order.tolist()) == list(range(22))
    assert len(set(kinds[order[:11]].tolist())) == 1
    assert sorted(best_order([a[:13], b[:13]], 5, 0.4).tolist()) == list(range(13))
    for bad in ([], [-a], [a, b[:3]]):
        with pytest.raises(BadInput, match="scores"):
            best_order(bad, 4, 0.5)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "unet", "vit", "gpt"])
def test_rearranged_it_is_the_same_function(name: str) -> None:
    case = subject(name)
    before = copy.deepcopy(case.model.state_dict())
    result = rearrange_channels(case.model, group=(4, 1), example=case.inputs)
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    torch.testing.assert_close(case.run(result), case.run(), atol=1e-4, rtol=1e-4)
    assert result.order, "nothing was rearranged"
    plain, better = (kept_norm(m) for m in (case.model, result))
    assert better > plain
    assert {k: v.shape for k, v in result.state_dict().items()} == {k: v.shape for k, v in before.items()}


def kept_norm(model: nn.Module) -> float:
    plan = plan_groups(model, sparsity=0.5, group=(4, 1))
    parts = [(model.get_submodule(n).weight.detach().double().square(), m) for n, m in plan.masks.items()]
    return sum(float((w * m).sum() / w.sum()) for w, m in parts)


def test_masks_of_the_limits() -> None:
    weight = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_mask(weight, (1, 1), 0.6), Unstructured().mask(weight.double().square(), 0.6))
    whole = group_mask(weight, (32, 1), 0.5)  # a group of all filters: inputs are removed
    norms = weight.square().sum(0)
    assert whole.all(0).sum() == 5
    assert torch.equal(whole.all(0), norms >= norms.sort(descending=True).values[4])
    assert Block(16, 1).holds(group_mask(weight, (16, 1), 0.5))
    kernels = group_mask(torch.randn(20, 6, 3, 3), (16, 1), 0.5)
    assert kernels.shape == (20, 6, 3, 3)
    units = kernels.flatten(2).float().mean(2)
    assert set(units.unique().tolist()) <= {0.0, 1.0}
    assert (units[:16] == units[0]).all()
    assert (units[16:] == units[16]).all()
    assert round(float(units[0].sum() + units[16].sum())) == 6


CONVS = [
    nn.Conv2d(10, 20, 1),
    nn.Conv2d(10, 20, 1, stride=2, bias=False),
    nn.Conv2d(10, 20, 1, padding=1),
    nn.Conv2d(10, 20, 3, padding=1),
    nn.Conv2d(10, 20, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    nn.Conv2d(10, 20, 2, padding="same"),
]


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: f"{c.kernel_size}-{c.stride}-{c.padding}")
def test_a_sparse_convolution_is_the_dense_one_with_zeros(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)
    conv = copy.deepcopy(conv)
    conv.weight.data *= group_mask(conv.weight, (4, 1), 0.7)
    for block in ((16, 1), (4, 1), (1, 1)):
        sparse = SparseConv2d.from_conv(conv, block)
        for x in (torch.randn(3, 10, 9, 8), torch.randn(2, 10, 9, 8).contiguous(memory_format=torch.channels_last), torch.randn(10, 9, 8)):
            torch.testing.assert_close(sparse(x), conv(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(sparse.weight, conv.weight)
    x, y = torch.randn(2, 10, 9, 8, requires_grad=True), torch.randn(2, 10, 9, 8, requires_grad=True)
    y.data.copy_(x.data)
    sparse(x).square().sum().backward()
    conv(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    back = sparse.to_linear()
    torch.testing.assert_close(back(y), conv(y))


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU(),
        nn.Conv2d(32, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def batches(n: int = 4) -> list:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 4, (8,), generator=g)) for _ in range(n)]


def test_the_whole_way_keeps_the_pattern_through_training() -> None:
    model, data = small(), batches()
    before = copy.deepcopy(model.state_dict())
    result = sparsebyte(model, data, sparsity=0.5, group=(4, 1), epochs=6, every=3, learner=Backprop(), planner="always")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plan = result.plan
    assert plan.sparsity == {"4": 0.5, "6": 0.5, "10": 0.5}
    assert isinstance(result[4], SparseConv2d)
    assert plan.runtime.formats["4"] == "4x1"
    for name in plan.sparsity:
        kept = (result.get_submodule(name).weight != 0).flatten(2 if name != "10" else 1).unflatten(0, (-1, 4))
        assert ((kept.float().mean(1) == 0) | (kept.float().mean(1) == 1)).all()
        assert kept.float().mean() == 0.5
    assert "reads an image" in plan.skipped["0"]
    assert "groups" in plan.skipped["2"]
    x = data[0][0]
    dense = to_dense_runtime(result)
    torch.testing.assert_close(dense(x), result(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_sparse(small(1), result.state_dict())(x), result(x), atol=1e-5, rtol=1e-5)


def test_without_training_it_is_the_group_pruned_rearranged_network() -> None:
    model, data = small(), batches(1)
    moved = rearrange_channels(model, group=(4, 1), sparsity=0.5, example=data[0][0])
    want = copy.deepcopy(moved)
    for name, mask in plan_groups(moved, sparsity=0.5, group=(4, 1)).masks.items():
        want.get_submodule(name).weight.data *= mask
    for planner in ("always", "measure"):
        got = sparsebyte(model, data, sparsity=0.5, group=(4, 1), planner=planner)
        torch.testing.assert_close(got(data[0][0]), want(data[0][0]), atol=1e-5, rtol=1e-5)
    straight = sparsebyte(model, sparsity=0.5, group=(4, 1), rearrange=False, planner="always")
    assert not straight.plan.order
    for name, mask in plan_groups(model, sparsity=0.5, group=(4, 1)).masks.items():
        torch.testing.assert_close(straight.get_submodule(name).weight, model.get_submodule(name).weight * mask)


def test_the_runtime_takes_masked_convolutions() -> None:
    model = small()
    masked = magnitude(model, sparsity=0.8, scope="layer")
    x = batches(1)[0][0]
    for planner in ("always", "measure"):
        runs = to_sparse_runtime(masked, planner=planner, example=x)
        torch.testing.assert_close(runs(x), finalise(masked)(x), atol=1e-5, rtol=1e-5)
        assert "groups" in runs.plan.skipped["2"]
        assert not any("Masked" in type(m).__name__ for m in runs.modules() if m is not runs[2])
    assert isinstance(to_sparse_runtime(masked, planner="always")[4], SparseConv2d)
    reflecting = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    reflecting[0].weight.data *= 0
    assert "reflect" in to_sparse_runtime(reflecting, planner="always").plan.skipped["0"]


def test_bad_requests() -> None:
    model, data = small(), batches(1)
    for options, match in (
        ({"group": (4, 2)}, "group"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"schedule": "linear"}, "schedule"),
        ({"every": 0}, "every"),
        ({"skip": ("nine",)}, "nine"),
    ):
        with pytest.raises(BadInput, match=match):
            sparsebyte(model, data, **options)
    with pytest.raises(BadInput, match="example"):
        sparsebyte(model, group=(4, 1))
    with pytest.raises(BadInput, match="empty"):
        sparsebyte(model, [], group=(4, 1))
    with pytest.raises(BadInput, match="not finite"):
        sparsebyte(model, [(data[0][0] * torch.nan, data[0][1])], group=(4, 1))
    with pytest.raises(BadInput, match="needs a loader"):
        sparsebyte(model, epochs=1, example=data[0][0])
    with pytest.raises(UnsupportedModel, match="fewer than a group of 64"):
        sparsebyte(model, data, group=(64, 1))


def test_a_network_that_cannot_be_rearranged_is_pruned_as_it_lies() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x).cumsum(1)))  # an order that matters

    torch.manual_seed(0)
    model, x = Odd(), torch.randn(3, 8)
    got = sparsebyte(model, [(x, x)], sparsity=0.5, group=(4, 1), planner="always")
    assert "(rearrangement)" in got.plan.skipped
    assert not got.plan.order
    assert (got.a.weight == 0).float().mean() == 0.5
