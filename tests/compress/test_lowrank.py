"""Folding is a bijection, low-rank layers are exact at full rank and optimal below it, and cost what the closed forms say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import (
    LowRankConv2d,
    LowRankLinear,
    RankPlan,
    apply_ranks,
    decomposable,
    factors,
    fold,
    low_rank,
    rank_macs,
    svd_curve,
    unfold,
)
from neurarium.compress.factor.fold import folded_shape, max_rank, rank_size, singular_values
from neurarium.compress.factor.lowrank import GroupedLinear
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import macs, parameters

SCHEMES = (0, 1, 2, 3)


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _conv(**options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 5, (3, 2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fold_is_a_bijection_with_the_documented_entries(scheme: int) -> None:
    w = torch.arange(5 * 6 * 3 * 2).reshape(5, 6, 3, 2)
    matrix = fold(w, scheme)
    assert torch.equal(unfold(matrix, w.shape, scheme), w)
    f, c, a, b = 3, 4, 2, 1
    row, column = [(f, (c * 3 + a) * 2 + b), (f * 3 + a, c * 2 + b), (f * 2 + b, c * 3 + a), ((f * 3 + a) * 2 + b, c)][scheme]
    assert matrix[row, column] == w[f, c, a, b]
    assert rank_size(w.shape, 2, scheme) == 2 * matrix.shape[0] + matrix.shape[1]


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"padding": "same", "bias": False},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    ],
    ids=["plain", "strided", "same", "reflect"],
)
def test_full_rank_reproduces_the_convolution_at_the_cost_of_the_closed_form(scheme: int, splits: int, options: dict) -> None:
    layer, x = _conv(**options), _rand(2, 6, 9, 8)
    full = max_rank(layer.weight.shape, splits, scheme)
    result = low_rank(layer, full, splits=splits, scheme=scheme)
    torch.testing.assert_close(result(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.weight, layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.to_dense()(x), layer(x), rtol=1e-5, atol=1e-5)
    for rank in (1, full):
        thin = low_rank(layer, rank, splits=splits, scheme=scheme)
        bias = 0 if layer.bias is None else 5
        assert parameters(thin) == rank * rank_size(layer.weight.shape, splits, scheme) + bias
        assert macs(thin, x) == 2 * rank_macs(layer, rank, (9, 8), splits=splits, scheme=scheme)
        assert thin(x).shape == layer(x).shape


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_linear_layers_of_full_rank_and_their_cost(splits: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5), _rand(3, 4, 8)
    result = low_rank(layer, max_rank((5, 8), splits), splits=splits)
    torch.testing.assert_close(result(x), layer(x), rtol=1e-5, atol=1e-6)
    thin = low_rank(layer, 1, splits=splits)
    assert parameters(thin) == 8 + splits * 5 + 5
    assert macs(thin, x) == 12 * rank_macs(layer, 1, splits=splits)
    assert thin.to_dense().weight.shape == (5, 8)
    assert LowRankLinear(8, 5, 1, splits=splits)(x).shape == (3, 4, 5)


def test_grouped_linear_is_block_diagonal() -> None:
    layer, x = GroupedLinear(6, 4, 2), _rand(3, 6)
    dense = torch.block_diag(*layer.weight.detach().chunk(2))
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_truncation_is_optimal_and_the_curve_tells_its_error(scheme: int) -> None:
    w = _rand(5, 6, 3, 2).double()
    values, matrix = singular_values(w, 1, scheme)[0], fold(w, scheme)
    operator, frobenius = svd_curve(w, 1, scheme), svd_curve(w, 1, scheme, norm="frobenius")
    assert len(operator) == len(values) == min(folded_shape(w.shape, scheme))
    for rank in (1, 2, 4):
        left, right = factors(w, rank, 1, scheme)
        error = matrix - left[:, 0] @ right[0]
        torch.testing.assert_close(torch.linalg.matrix_norm(error, 2) / values[0], operator[rank - 1])  # Eckart-Young
        torch.testing.assert_close(error.norm() / matrix.norm(), frobenius[rank - 1])
        for seed in range(20):  # no nearby factors do better
            noise = 0.05 * _rand(*left[:, 0].shape, seed=seed).double()
            other = matrix - (left[:, 0] + noise) @ right[0]
            assert other.norm() >= error.norm()
            assert torch.linalg.matrix_norm(other, 2) >= torch.linalg.matrix_norm(error, 2) - 1e-12
    assert operator[-1] == frobenius[-1] == 0


def test_error_of_slices_lies_between_its_two_bounds() -> None:
    tight = 0
    for seed in range(100):
        w = _rand(6, 12, seed=seed).double()
        left, right = factors(w, 2, 4)
        error = w - torch.einsum("asr,src->asc", left, right).flatten(1)
        true = torch.linalg.matrix_norm(error, 2) / torch.linalg.matrix_norm(w, 2)
        assert svd_curve(w, 4)[1] <= true * (1 + 1e-9)
        assert true <= svd_curve(w, 4, norm="theorem")[1] * (1 + 1e-9)
        torch.testing.assert_close(error.norm() / w.norm(), svd_curve(w, 4, norm="frobenius")[1])
        tight += bool(true > svd_curve(w, 4)[1] * 1.01)
    assert tight > 50  # the maximum over slices alone is not a bound


def test_a_weight_of_rank_r_is_exact_at_rank_r_also_by_the_gram_matrix() -> None:
    layer = nn.Conv2d(6, 5, 3)
    with torch.no_grad():
        layer.weight.copy_(unfold(_rand(15, 2) @ _rand(2, 18, seed=1), (5, 6, 3, 3), 1))
    assert svd_curve(layer.weight, 1, 1)[1] < 1e-6
    torch.testing.assert_close(low_rank(layer, 2, scheme=1).weight, layer.weight, rtol=1e-4, atol=1e-5)
    large = _rand(256, 300)
    torch.testing.assert_close(singular_values(large)[0], torch.linalg.svdvals(large.double()), rtol=1e-9, atol=1e-7)
    assert svd_curve(torch.zeros(3, 4)).tolist() == [0, 0, 0]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=6)
        self.again = self.conv
        self.body = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        self.head, self.tied = nn.Linear(6, 4), nn.Linear(6, 4)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.body(y).mean(1))


def test_apply_replaces_what_it_can_and_names_the_rest() -> None:
    torch.manual_seed(0)
    model, x = _Net().eval(), _rand(2, 4, 6, 6)
    before = copy.deepcopy(model.state_dict())
    found, skipped = decomposable(model)
    assert list(found) == ["conv", "body.linear1", "body.linear2"]
    assert set(skipped) == {"depthwise", "body.self_attn.out_proj", "head", "tied"}
    assert "groups" in skipped["depthwise"]
    assert "tied to tied" in skipped["head"]
    plan = RankPlan({name: (2, max_rank(m.weight.shape, 2), 0) for name, m in found.items()}, skipped=skipped)
    result = apply_ranks(model, plan)
    assert result.again is result.conv
    assert isinstance(result.conv, LowRankConv2d)
    assert not result.conv.training
    for grad in (True, False):  # without gradients PyTorch fuses the transformer layer and reads its layers' weights
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    thin = (result.conv, result.body.linear1, result.body.linear2)
    assert plan.weights(model) == plan.weights(result) == sum(parameters(m) - len(m.bias) for m in thin)
    assert decomposable(result)[0] == {}
    again = apply_ranks(result, plan)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in result.state_dict().items())
    fresh = apply_ranks(_Net(), plan)
    fresh.load_state_dict(result.state_dict())
    loss = result.train()(x).square().sum()
    loss.backward()
    assert result.conv.first.weight.grad is not None
    assert isinstance(apply_ranks(nn.Linear(4, 4), RankPlan({"": (1, 2, 0)})), LowRankLinear)
    with pytest.raises(UnsupportedModel, match="no layer that can be"):
        decomposable(nn.Sequential(nn.ReLU(), nn.Embedding(3, 3)))


def test_decomposing_leaves_the_global_random_state_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 3))
    state = torch.get_rng_state()
    apply_ranks(model, RankPlan({"0": (2, 1, 0), "1": (1, 2, 0)}))
    assert torch.equal(state, torch.get_rng_state())


def test_bad_ranks_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2))
    for entry, message in {
        ("7", 1, 1, 0): "does not have",
        ("0", 3, 1, 0): "0: 4 input channels",
        ("0", 1, 7, 0): r"0: the plan's rank is 7.*1\.\.6",
        ("0", 1, 1, 4): "0: scheme",
        ("1", 1, 1, 2): "1: a linear layer",
        ("2", 1, 1, 0): "2: ReLU",
        ("3", 1, 1, 0): "3: its 2 groups",
    }.items():
        with pytest.raises(BadInput, match=message):
            RankPlan({entry[0]: entry[1:]}).check(model)
    done = apply_ranks(model, RankPlan({"0": (1, 2, 0)}))
    with pytest.raises(BadInput, match=r"0: the plan says .* already"):
        apply_ranks(done, RankPlan({"0": (1, 3, 0)}))
    with pytest.raises(BadInput, match="not finite"):
        svd_curve(torch.full((2, 2), float("nan")))
