"""The search finds the best ranks and splits there are, spends the budget and never more, and leaves alone what it must."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import GPT, LowRankConv2d, alds, apply_ranks, factors, plan_alds, plan_svd, svd_curve
from neurarium.compress.factor.fold import max_rank, rank_size
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import parameters


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _decaying(rows: int, columns: int, power: float, seed: int) -> Tensor:
    """Singular values 1, 2^-power, 3^-power, ..."""
    u, _, v = torch.linalg.svd(_rand(rows, columns, seed=seed), full_matrices=False)
    return u * torch.arange(1, u.shape[1] + 1) ** -power @ v


def _sliced(rows: int, columns: int, splits: int, rank: int, seed: int) -> Tensor:
    """Each of `splits` slices of columns has this rank exactly, the whole has more."""
    parts = [_rand(rows, rank, seed=seed + i) @ _rand(rank, columns // splits, seed=seed + 50 + i) for i in range(splits)]
    return torch.cat(parts, 1)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def _mixed() -> nn.Sequential:
    """Three layers that want different ranks and different slices."""
    return nn.Sequential(_linear(_decaying(24, 24, 1.5, 0)), _linear(_sliced(24, 24, 4, 1, 3)), _linear(_rand(24, 24, seed=2)))


def test_search_matches_brute_force_over_splits_and_ranks() -> None:
    for bound, keep, schemes in itertools.product(("operator", "theorem"), (0.45, 0.7), ((0,),)):
        model = nn.Sequential(_linear(_decaying(12, 12, 1.0, 0)), _linear(_sliced(12, 12, 3, 1, 3)), _linear(_rand(12, 12, seed=2)))
        curves = []  # of each layer: (cost, error) of every (k, j) and of the dense layer
        for layer in model:
            shape = tuple(layer.weight.shape)
            pairs = [(144, 0.0)]
            for k in (1, 2, 3, 4, 6, 12):
                errors = svd_curve(layer.weight, k, norm=bound)
                pairs += [(j * rank_size(shape, k), float(errors[j - 1])) for j in range(1, max_rank(shape, k) + 1)]
            curves.append(pairs)
        best = min(
            max(e for _, e in combination)
            for combination in itertools.product(*curves)
            if sum(c for c, _ in combination) <= keep * 3 * 144
        )
        plan = plan_alds(model, keep=keep, bound=bound, schemes=schemes, seeds=60, iterations=8)
        assert max(plan.errors.values()) == pytest.approx(best, abs=2e-6)


def test_more_freedom_is_never_worse_and_each_layer_gets_what_it_needs() -> None:
    model = _mixed()
    worst = {k: max(plan_alds(model, keep=0.5, max_splits=k).errors.values()) for k in (1, 4, None)}
    assert worst[None] <= worst[1]
    alone = plan_alds(model[1], keep=0.21)
    assert alone.ranks == {"": (4, 1, 0)}  # the slices that the layer was made of
    assert alone.errors[""] < 1e-6
    assert plan_alds(model[1], keep=0.21, max_splits=2).errors[""] > 0.1
    for needs in (plan_alds(model, keep=0.5, max_splits=1), plan_svd(model, keep=0.5, allocation="energy")):
        assert needs.ranks["0"][1] <= 3  # a fast decay
        assert "2" in needs.skipped  # none at all: the rest of the budget
    uniform = plan_svd(model, keep=0.25)
    assert {j for _, j, _ in uniform.ranks.values()} == {3}
    sliced = plan_svd(model, keep=0.25, splits="best")
    assert sliced.errors["1"] < uniform.errors["1"]


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_budget_is_spent_and_equals_what_the_layers_hold(keep: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, (3, 1), bias=False), nn.Flatten(), nn.Linear(64, 16))
    total = sum(m.weight.numel() for m in model if hasattr(m, "weight"))
    plans = [
        plan_alds(model, keep=keep), plan_alds(model, keep=keep, schemes=(0, 1, 2, 3)), plan_svd(model, keep=keep),
        plan_svd(model, keep=keep, allocation="energy"), plan_svd(model, keep=keep, splits="best"),
    ]  # fmt: skip
    for plan in plans:
        result = apply_ranks(model, plan)
        size = parameters(result) - 32 - 16
        assert size <= keep * total
        assert size >= 0.85 * keep * total
        assert result(_rand(2, 8, 6, 3)).shape == (2, 16)


def test_theorem_bounds_the_true_error_and_the_operator_curve_does_not() -> None:
    broken = 0
    for seed in range(200):
        weight, (k, rank) = _rand(8, 12, seed=seed).double(), ((2, 2), (4, 1), (6, 1))[seed % 3]
        left, right = factors(weight, rank, k)
        error = weight - torch.einsum("asr,src->asc", left, right).flatten(1)
        true = torch.linalg.matrix_norm(error, 2) / torch.linalg.matrix_norm(weight, 2)
        assert true <= svd_curve(weight, k, norm="theorem")[rank - 1] * (1 + 1e-9)
        broken += bool(true > svd_curve(weight, k)[rank - 1] * 1.001)
    assert broken > 100


def test_everything_kept_changes_nothing_and_a_second_time_neither() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 10)), _rand(3, 4, 4, 4)
    before = copy.deepcopy(model.state_dict())
    assert plan_alds(model, keep=1.0).ranks == {}
    assert torch.equal(alds(model, keep=1.0)(x), model(x))
    once = alds(model, keep=0.6)
    twice = alds(once, keep=0.6)
    assert once.plan.ranks == twice.plan.ranks
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())
    assert alds(model, keep=0.6).plan == once.plan
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_that_cannot_be_decomposed_stay_and_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(),
                          nn.Linear(32, 2))  # fmt: skip
    result = alds(model, keep=0.5)
    assert isinstance(result[0], LowRankConv2d)
    assert torch.equal(result[1].weight, model[1].weight)
    assert {"1", "2"} <= set(result.plan.skipped)
    assert "groups" in result.plan.skipped["1"]
    with pytest.raises(UnsupportedModel, match="no layer that can be"):
        alds(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)))


def test_transformers_are_opened_so_that_every_map_is_reached() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 5))
    gpt = GPT(11, width=16, heads=2, layers=1, context=8).eval()
    result = alds(gpt, keep=0.5)
    assert result(ids).shape == (2, 5, 11)
    assert len(result.plan.ranks) == 6
    assert "tied" in result.plan.skipped["head"]
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    torch.testing.assert_close(alds(encoder, keep=1.0)(_rand(2, 3, 16)), encoder(_rand(2, 3, 16)))
    assert len(alds(encoder, keep=0.5).plan.ranks) >= 5


def test_bad_input_is_named_before_anything_is_done() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for options, message in {
        "keep=0": ({"keep": 0.0}, "keep must"),
        "keep=.1": ({"keep": 0.1}, r"too little: rank 1 everywhere takes 0\.25"),
        "bound": ({"bound": "frobenius"}, "bound must"),
        "seeds": ({"seeds": 0}, "seeds must"),
        "schemes": ({"schemes": ()}, "schemes is empty"),
    }.values():
        with pytest.raises(BadInput, match=message):
            alds(model, **options)
    with pytest.raises(BadInput, match="allocation"):
        plan_svd(model, allocation="best")
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"^1: .*not finite"):
        alds(model)
