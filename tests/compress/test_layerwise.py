"""Wanda's score is the exact cost of a weight; SparseGPT's sweep is least squares, column by column."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neurarium.compress import (
    NM,
    Block,
    Pattern,
    Unstructured,
    calibrate,
    finalise,
    magnitude,
    plan_sparsegpt,
    plan_wanda,
    sparsegpt,
    wanda,
)
from neurarium.compress.prune.sparsegpt import obs_sweep
from neurarium.compress.prune.wanda import wanda_score
from neurarium.errors import BadInput, UnsupportedModel


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix + 0.5


def by_least_squares(x: Tensor, row: Tensor, mask: Tensor) -> Tensor:
    """The sweep by brute force: fix one column after the other and let those behind it answer optimally."""
    w, target = row.clone(), x @ row
    for i in range(len(row)):
        if not mask[i]:
            w[i] = 0
            if i + 1 < len(row):
                w[i + 1 :] = torch.linalg.lstsq(x[:, i + 1 :], target - x[:, : i + 1] @ w[: i + 1]).solution
    return w


@pytest.mark.parametrize("block", [1, 3, 128])
def test_the_sweep_is_least_squares_of_the_columns_to_come(block: int) -> None:
    x = correlated(60, 10)
    weight = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(2)) > 0.5
    gram = x.T @ x / len(x)
    found, _ = obs_sweep(weight, gram, 0.5, damping=0.0, block=block, mask=mask)
    for row, kept, new in zip(weight, mask, found, strict=True):
        torch.testing.assert_close(new, by_least_squares(x, row, kept), rtol=1e-8, atol=1e-9)
    # if the removed columns come first, nothing is fixed too early: the result is the least-squares fit on the support
    first = torch.arange(10) >= 4
    found, _ = obs_sweep(weight[:1], gram, 0.4, damping=0.0, block=block, mask=first[None])
    best = torch.linalg.lstsq(x[:, 4:], x @ weight[0]).solution
    torch.testing.assert_close(found[0, 4:], best, rtol=1e-8, atol=1e-9)


def test_the_choice_is_by_the_loss_that_remains_after_the_best_answer() -> None:
    """Row and 2:4 masks against the cost of fixing each weight at zero, computed by least squares."""
    x = correlated(60, 8, seed=3)
    row = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gram = x.T @ x / len(x)

    def cost(w: Tensor, i: int) -> float:
        """The residual if w_i becomes zero and the columns behind it answer."""
        rest, target = x[:, i + 1 :], x[:, i] * w[i]
        answer = rest @ torch.linalg.lstsq(rest, target).solution if rest.shape[1] else 0
        return float((target - answer).square().sum())

    _, mask = obs_sweep(row[None], gram, 0.5, damping=0.0)
    costs = torch.tensor([cost(row, i) for i in range(8)])
    assert set(mask[0].nonzero()[:, 0].tolist()) == set(costs.argsort()[4:].tolist())
    w, expected = row.clone(), torch.ones(8, dtype=torch.bool)
    for start in (0, 4):
        costs = torch.tensor([cost(w, i) for i in range(start, start + 4)])
        expected[start + costs.argsort()[:2]] = False
        for i in range(start, start + 4):
            if not expected[i]:
                before, w[i] = w[i].clone(), 0
                w[i + 1 :] += torch.linalg.lstsq(x[:, i + 1 :], x[:, i] * before).solution if i < 7 else 0
    for block in (1, 4, 128):
        found, mask = obs_sweep(row[None], gram, 0.5, pattern=NM(2, 4), damping=0.0, block=block)
        assert torch.equal(mask[0], expected)
        torch.testing.assert_close(found[0], w * expected, rtol=1e-8, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 0.99), st.sampled_from(["row", "layer"]), st.sampled_from([1, 5, 8, 128]),
    st.sampled_from([Unstructured(), Block(2, 2), Block(4, 1)]), st.integers(0, 99),
)  # fmt: skip
def test_counts_are_exact_for_every_block_size(sparsity: float, scope: str, block: int, pattern: Pattern, seed: int) -> None:
    x = correlated(30, 12, seed)
    weight = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    new, mask = obs_sweep(weight, x.T @ x, sparsity, pattern=pattern, scope=scope, block=block)
    assert pattern.holds(mask)
    assert torch.equal(new != 0, mask)
    size = {Unstructured(): 1}.get(pattern) or pattern.out * pattern.into
    if scope == "layer":
        assert int((~mask).sum()) == size * round(sparsity * 96 / size)
    else:
        across = 12 // getattr(pattern, "into", 1)
        assert ((~mask).sum(1) == getattr(pattern, "into", 1) * round(sparsity * across)).all()


def test_with_uncorrelated_equal_inputs_all_three_are_magnitude() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(16, 6, bias=False), torch.eye(16)
    expected = magnitude(model, sparsity=0.5, scope="row").weight
    assert torch.equal(wanda(model, [x], sparsity=0.5).weight, expected)
    torch.testing.assert_close(sparsegpt(model, [x], sparsity=0.5, scope="row", block=16).weight, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Conv2d(3, 3, 2, groups=3)])
def test_wandas_score_is_what_removing_a_single_weight_costs(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    shape = (5, 6) if isinstance(layer, nn.Linear) else (3, layer.in_channels, 5, 6)
    x = torch.randn(shape, dtype=torch.float64)
    score = wanda_score(layer, calibrate(layer, [x])[""])
    y = layer(x)
    for i in range(0, layer.weight.numel(), 5):
        with torch.no_grad():
            old = layer.weight.view(-1)[i].item()
            layer.weight.view(-1)[i] = 0
            torch.testing.assert_close((layer(x) - y).norm(), score.view(-1)[i], rtol=1e-8, atol=1e-10)
            layer.weight.view(-1)[i] = old


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_on_correlated_inputs_updates_beat_both_kinds_of_selection(pattern: Pattern | None, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = nn.Linear(32, 24), correlated(400, 32, seed=5).float() * torch.linspace(0.1, 3, 32)
    else:
        layer = nn.Conv2d(8, 24, (1, 2))  # four consecutive columns are two taps of two channels
        x = nn.functional.avg_pool2d(torch.randn(20, 8, 20, 20), 3, 1) * torch.linspace(0.1, 3, 8).view(8, 1, 1)
    sparsity = 0.5
    dense = layer(x)
    errors = {}
    for name, small in (
        ("magnitude", magnitude(layer, sparsity=sparsity, scope="layer", pattern=pattern)),
        ("wanda", wanda(layer, list(x.split(30)), sparsity=sparsity, pattern=pattern)),
        ("sparsegpt", sparsegpt(layer, list(x.split(30)), sparsity=sparsity, pattern=pattern)),
    ):
        assert pattern is None or pattern.holds(small.mask)
        assert int((~small.mask).sum()) == round(sparsity * small.mask.numel())
        assert finalise(small)(x).equal(small(x))
        errors[name] = float((small(x) - dense).detach().square().mean())
    assert errors["sparsegpt"] < 0.9 * min(errors["wanda"], errors["magnitude"])


def test_with_uncorrelated_inputs_no_mask_is_better_than_wandas() -> None:
    """Brute force over all masks of a row of eight, four kept, inputs of different loudness."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64))[0] * torch.logspace(-1, 1, 8)
    torch.manual_seed(0)
    model = nn.Linear(8, 3, bias=False).double()
    small = wanda(model, [x], sparsity=0.5)
    rows = ((small(x) - model(x)) ** 2).sum(0).detach()
    for row, weight in zip(rows, model.weight.detach(), strict=True):
        best = min(float((x[:, gone] @ weight[gone]).square().sum()) for gone in map(list, itertools.combinations(range(8), 4)))
        torch.testing.assert_close(row, torch.tensor(best, dtype=torch.float64))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late, self.unused, self.early = nn.Linear(24, 8), nn.Linear(3, 3), nn.Linear(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(torch.relu(self.early(x)))


def test_sequential_measures_behind_the_layers_already_pruned() -> None:
    torch.manual_seed(0)
    model, x = Net(), correlated(200, 12).float()
    before, batches = copy.deepcopy(model.state_dict()), list(x.split(50))
    plan = plan_sparsegpt(model, iter(batches), sparsity=0.6)
    assert list(plan.masks) == ["early", "late"]
    assert "never reached" in plan.skipped["unused"]
    behind = copy.deepcopy(model)
    behind.early.weight.data = plan.values["early"]
    stats = calibrate(behind, batches, modules=["late"], gram=True)["late"]
    expected, mask = obs_sweep(model.late.weight.detach(), stats.gram, 0.6)
    torch.testing.assert_close(plan.values["late"], expected.float())
    assert torch.equal(plan.masks["late"], mask)
    at_once = plan_sparsegpt(model, batches, sparsity=0.6, sequential=False)
    torch.testing.assert_close(at_once.values["early"], plan.values["early"])
    assert not torch.allclose(at_once.values["late"], expected.float(), atol=1e-3)
    scores = plan_wanda(model, batches, sparsity=0.6, sequential=True)
    pruned = copy.deepcopy(model)
    pruned.early.weight.data *= scores.masks["early"]
    score = wanda_score(model.late, calibrate(pruned, batches)["late"])
    assert torch.equal(scores.masks["late"], Unstructured().mask(score, 0.6, scope="row"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_dead_inputs_lose_their_weights_first() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3), torch.randn(50, 8)
    x[:, [1, 4]] = 0
    for small in (wanda(model, [x], sparsity=0.25), sparsegpt(model, [x], sparsity=0.25)):
        assert not small.weight[:, [1, 4]].any()
        assert small.weight[:, [0, 2, 3, 5, 6, 7]].all()


def test_what_cannot_be_done_is_named() -> None:
    model, x = Net(), torch.randn(20, 12)
    for method in (wanda, sparsegpt):
        with pytest.raises(BadInput, match="empty"):
            method(model, [], sparsity=0.5)
        with pytest.raises(BadInput, match="not finite"):
            method(model, [x / 0], sparsity=0.5)
        with pytest.raises(BadInput, match=r"sparsity must be in \[0, 1\), got None"):
            method(model, [x])
        with pytest.raises(BadInput, match="'lat', which is no prunable layer"):
            method(model, [x], sparsity=0.5, skip=["lat"])
        with pytest.raises(BadInput, match=r"2:4 has sparsity 0\.5"):
            method(model, [x], sparsity=0.6, pattern=NM(2, 4))
        with pytest.raises(BadInput, match="groups of 5"):
            method(model, [x], pattern=NM(2, 5))
        with pytest.raises(UnsupportedModel, match="no prunable layer"):
            method(nn.ReLU(), [x], sparsity=0.5)
        small = method(model, [x], sparsity=0.5, skip=["late"])
        assert torch.equal(small.late.weight, model.late.weight)
        assert type(small.late) is nn.Linear
    with pytest.raises(BadInput, match="singular"):
        sparsegpt(model, [x[:3]], sparsity=0.5, damping=0.0)
    with pytest.raises(BadInput, match="damping"):
        sparsegpt(model, [x], sparsity=0.5, damping=-1.0)
