"""Patterns have exact counts, plans survive JSON, and what cannot carry a mask is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neurarium.compress import NM, Block, Group, MaskPlan, Unstructured, apply, magnitude, plan_magnitude
from neurarium.compress.plan import prunable
from neurarium.errors import BadInput


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.99), st.sampled_from(["row", "layer"]))
def test_unstructured_masks_have_the_exact_count_and_keep_the_largest(seed: int, sparsity: float, scope: str) -> None:
    score = torch.randint(0, 5, (6, 12), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    mask = Unstructured().mask(score, sparsity, scope=scope)
    rows = [(score, mask)] if scope == "layer" else list(zip(score, mask, strict=True))
    for s, m in rows:
        assert int((~m).sum()) == round(sparsity * m.numel())
        assert not m.any() or m.all() or s[m].min() >= s[~m].max()


def test_ties_go_to_the_lower_index() -> None:
    assert Unstructured().mask(torch.ones(1, 6), 0.5).tolist() == [[True, True, True, False, False, False]]


def test_structured_patterns() -> None:
    score = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    two_four = NM(2, 4).mask(score)
    assert NM(2, 4).holds(two_four)
    assert two_four.sum() == 64
    assert not NM(1, 4).holds(two_four)
    for pattern in (Block(4, 2), Group(8)):
        mask = pattern.mask(score, 0.5)
        assert pattern.holds(mask)
        assert mask.float().mean() == 0.5
        assert not pattern.holds(Unstructured().mask(score, 0.3))
    with pytest.raises(BadInput, match="blocks"):
        Block(3, 2).mask(score, 0.5)
    with pytest.raises(BadInput, match="groups of 3"):
        NM(1, 3).mask(score)
    with pytest.raises(BadInput, match="sparsity"):
        NM(2, 4).mask(score, 0.25)


def test_a_plan_survives_json_and_names_what_does_not_fit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5, 7), nn.Embedding(4, 4))
    plan = plan_magnitude(model, sparsity=0.37)
    assert "4" in plan.skipped
    values = {k: torch.randn(m.shape) * m for k, m in plan.masks.items()}
    plan = MaskPlan(plan.masks, values, skipped=plan.skipped)
    back = MaskPlan.from_json(plan.to_json())
    for name, mask in plan.masks.items():
        assert torch.equal(back.masks[name], mask)
        torch.testing.assert_close(back.values[name], values[name])
    assert "0.37" in plan.describe() or f"{plan.sparsity:.2f}" == "0.37"
    with pytest.raises(BadInput, match=r"0: the plan's mask"):
        plan.check(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5, 7)))
    with pytest.raises(BadInput, match="does not have"):
        plan.check(nn.Sequential(nn.Conv2d(3, 5, 3)))
    with pytest.raises(BadInput, match="kind"):
        MaskPlan.from_json('{"kind": "rank"}')


def test_applying_twice_changes_nothing_more() -> None:
    torch.manual_seed(0)
    once = magnitude(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), sparsity=0.5)
    twice = magnitude(once, sparsity=0.5)
    for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_shared_weight_is_planned_once_and_stays_shared() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found, _ = prunable(model)
    assert list(found) == ["0"]
    result = apply(model, plan_magnitude(model, sparsity=0.5))
    assert result[0] is result[2]
    twins = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    twins[2].weight = twins[0].weight
    found, skipped = prunable(twins)
    assert list(found) == ["3"]
    assert "tied to 2" in skipped["0"]
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    tied[1].weight = tied[0].weight
    found, skipped = prunable(tied)
    assert list(found) == ["2"]
    assert "tied to 0" in skipped["1"]
