"""Localisation and faithfulness against brute force and cases with a known answer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.trust.explain import faithfulness, localise, peaks


def boxes(*corners: tuple[int, int], size: int = 4, edge: int = 16) -> Tensor:
    masks = torch.zeros(1, len(corners), edge, edge, dtype=torch.bool)
    for i, (top, left) in enumerate(corners):
        masks[0, i, top : top + size, left : left + size] = True
    return masks


def test_a_perfect_map_has_perfect_scores() -> None:
    objects = boxes((0, 0), (10, 10))
    got = localise(objects.any(1).float(), objects, radius=4)
    assert (got.pointing.item(), got.energy.item(), got.iou.item(), got.hit.item()) == (1, 1, 1, 1)
    assert got.entropy.item() == pytest.approx(math.log(32) / math.log(256))


def test_flat_and_empty_maps() -> None:
    objects = boxes((5, 5))
    flat = localise(torch.ones(1, 16, 16), objects, radius=2)
    assert flat.energy.item() == flat.iou.item() == pytest.approx(16 / 256)
    assert flat.entropy.item() == pytest.approx(1.0)
    assert flat.hit.item() == 0.0  # its single peak is the first pixel: a flat map earns no hit by covering everything
    empty = localise(torch.zeros(1, 16, 16), objects, radius=2)
    assert [v.item() for v in (empty.pointing, empty.energy, empty.iou, empty.hit, empty.entropy)] == [0, 0, 0, 0, 1]


def test_hits_need_a_peak_an_object() -> None:
    objects = boxes((0, 0), (10, 10), (0, 10))
    maps = torch.zeros(1, 16, 16)
    maps[0, 1, 1], maps[0, 2, 2], maps[0, 12, 12], maps[0, 7, 7] = 1.0, 0.9, 0.5, 0.8
    assert localise(maps, objects, radius=2).hit.item() == pytest.approx(2 / 3)  # 0.9 is too near the first peak; 0.8 misses
    two = torch.cat([objects[:, :2], torch.zeros(1, 1, 16, 16, dtype=torch.bool)], 1)
    assert localise(maps, two, radius=2).hit.item() == pytest.approx(1 / 2)  # two objects, two peaks: 1.0 and 0.8


def test_iou_is_the_best_over_thresholds() -> None:
    objects = boxes((4, 4))
    maps = objects.any(1).float()
    maps[:, 12:, :] = 0.5
    assert localise(maps, objects, radius=2).iou.item() == 1.0
    maps[:, 4:8, 4:8] = 0.5
    assert localise(maps, objects, radius=2).iou.item() == pytest.approx(16 / 80)


def test_peaks_against_brute_force() -> None:
    maps = torch.rand(5, 9, 7, generator=torch.Generator().manual_seed(0))
    got = peaks(maps, 4, 2)
    for n in range(5):
        order = sorted(itertools.product(range(9), range(7)), key=lambda p: -maps[n, p[0], p[1]].item())
        chosen: list[tuple[int, int]] = []
        for p in order:
            if all(max(abs(p[0] - q[0]), abs(p[1] - q[1])) > 2 for q in chosen):
                chosen.append(p)
        assert got[n].tolist() == [7 * i + j for i, j in chosen[:4]]
    assert peaks(torch.zeros(1, 4, 4), 2, 1).tolist() == [[-1, -1]]


class Linear(nn.Module):
    """Two logits: w . x and 0."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_for_a_linear_model_the_curves_are_partial_sums_and_the_true_order_is_the_best() -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.rand(1, 1, 2, 2, generator=g), torch.rand(1, 1, 2, 2, generator=g) + 0.1
    truth = (w * x)[:, 0]
    best = faithfulness(Linear(w), x, truth, 0, score="logit", steps=4)
    parts = truth.flatten().sort(descending=True).values
    inserted = torch.cat([torch.zeros(1), parts.cumsum(0)])
    assert torch.allclose(best.insertion_curve[0], inserted, atol=1e-6)
    assert torch.allclose(best.deletion_curve[0], parts.sum() - inserted, atol=1e-6)
    assert best.insertion.item() == pytest.approx(torch.trapezoid(inserted, dx=0.25).item())
    for order in itertools.permutations(range(4)):
        other = faithfulness(Linear(w), x, torch.tensor(order).float().view(1, 2, 2), 0, score="logit", steps=4)
        assert other.deletion.item() >= best.deletion.item() - 1e-6
        assert other.insertion.item() <= best.insertion.item() + 1e-6


def test_drop_and_increase() -> None:
    x = torch.tensor([[[[1.0, 1.0]]], [[[1.0, 1.0]]]])
    model = Linear(torch.tensor([[[[3.0, -1.0]]]]))
    maps = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    got = faithfulness(model, x, maps, 0, score="softmax", steps=1)
    p, only_good, only_bad = (1 / (1 + math.exp(-z)) for z in (2.0, 3.0, -1.0))
    assert got.drop.tolist() == pytest.approx([0.0, (p - only_bad) / p])
    assert got.increase.tolist() == [1.0, 0.0]
    assert only_good > p


def test_the_baseline_is_what_removed_pixels_become() -> None:
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    got = faithfulness(Linear(w), x, torch.rand(1, 2, 2), 0, score="logit", baseline=torch.full((1, 1, 2, 2), 0.5), steps=2)
    assert got.deletion_curve[0].tolist() == pytest.approx([4.0, 3.0, 2.0])
    assert got.insertion_curve[0].tolist() == pytest.approx([2.0, 3.0, 4.0])


def test_ties_go_in_a_seeded_random_order() -> None:
    w = torch.arange(64.0).view(1, 1, 8, 8)
    flat, x = torch.zeros(1, 8, 8), torch.ones(1, 1, 8, 8)
    areas = [faithfulness(Linear(w), x, flat, 0, score="logit", steps=8, seed=s).deletion.item() for s in range(30)]
    assert faithfulness(Linear(w), x, flat, 0, score="logit", steps=8, seed=0).deletion.item() == areas[0]
    assert sum(areas) / 30 == pytest.approx(w.sum().item() / 2, rel=0.05)  # raster order would give two thirds of it


@pytest.mark.parametrize(
    "call",
    [
        lambda: localise(torch.ones(1, 4, 4), torch.zeros(1, 2, 4, 4), radius=1),
        lambda: localise(-torch.ones(1, 4, 4), torch.ones(1, 2, 4, 4), radius=1),
        lambda: localise(torch.ones(1, 4, 5), torch.ones(1, 2, 4, 4), radius=1),
        lambda: localise(torch.full((1, 4, 4), float("nan")), torch.ones(1, 1, 4, 4), radius=1),
        lambda: faithfulness(Linear(torch.ones(1)), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 3), 0),
        lambda: faithfulness(Linear(torch.ones(1)), torch.ones(1, 1, 2, 2), torch.full((1, 2, 2), float("nan")), 0),
        lambda: faithfulness(Linear(torch.ones(1)), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), 0, score="relu"),
        lambda: faithfulness(Linear(torch.ones(1)), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), 0, steps=0),
        lambda: faithfulness(Linear(torch.ones(1)), torch.ones(0, 1, 2, 2), torch.ones(0, 2, 2), 0),
    ],
)
def test_unusable_arguments_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput):
        call()


@pytest.mark.parametrize("target", [2, -1, torch.tensor([0, 1]), torch.tensor([0.0]), torch.zeros(1, 1, dtype=torch.int64)])
def test_targets_of_faithfulness_are_checked(target: int | Tensor) -> None:
    with pytest.raises(BadInput, match="target"):
        faithfulness(Linear(torch.ones(1)), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), target)


def test_outputs_that_are_no_logits_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="logits"):
        faithfulness(nn.Identity(), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), 0)
