"""TIPS: the chain against simulation and closed forms, and what training draws."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch

from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.elastic import ElasticFamily, at, flops, full, grid
from neurarium.dynamic.tips import TIPS, fill, operations, path_importance
from neurarium.errors import BadInput
from neurarium.testing.families import check_family

LAYERED = [list(enumerate(options)) for options in product((1, 2, 4), (1, 2), (2, 3, 4))]
SKIPPING = [*LAYERED, *([a, c] for a, _, c in LAYERED)]


def test_rows_are_probabilities_and_layers_are_passed_once():
    found = path_importance(LAYERED)
    torch.testing.assert_close(found.transition.sum(1), torch.ones(len(found.nodes) + 2, dtype=torch.float64))
    for layer in range(3):
        assert sum(h for (l, _), h in found.visits.items() if l == layer) == pytest.approx(1)
        assert found.mass[layer, min(o for l, o in found.nodes if l == layer)] == pytest.approx(1)
    skipped = path_importance(SKIPPING).visits
    assert 0 < skipped[1, 1] + skipped[1, 2] < 1 and skipped[0, 1] + skipped[0, 2] + skipped[0, 4] == pytest.approx(1)


def test_visits_equal_those_of_simulated_walks():
    found, walks = path_importance(SKIPPING, usage=[1 + i % 5 for i in range(len(SKIPPING))]), 100_000
    g = torch.Generator().manual_seed(0)
    here, seen = torch.zeros(walks, dtype=torch.long), torch.zeros(len(found.nodes) + 2)
    for _ in range(5):
        here = torch.multinomial(found.transition[here].float(), 1, generator=g).squeeze(1)
        if _ < 4:
            seen += torch.bincount(here[here < len(found.nodes) + 1], minlength=len(seen))
    assert (here == len(found.nodes) + 1).all()
    for i, node in enumerate(found.nodes):
        h = found.visits[node]
        assert abs(seen[i + 1] / walks - h) < 3 * (h * (1 - h) / walks) ** 0.5 + 1e-9, node


def test_transition_by_brute_force():
    """Two layers of two options: every weight by hand."""
    paths = [[(0, 1), (1, 1)], [(0, 1), (1, 2)], [(0, 2), (1, 1)], [(0, 2), (1, 2)]]
    got = path_importance(paths)
    assert got.nodes == ((0, 1), (0, 2), (1, 1), (1, 2))
    want = torch.tensor([
        [0, 1 / 3, 2 / 3, 0, 0, 0],  # two networks each, overlaps 1/2 and 1
        [0, 0, 0, 1 / 2, 1 / 2, 0], [0, 0, 0, 1 / 3, 2 / 3, 0],
        [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1],
    ], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(got.transition, want)
    h = (1 / 3) * (1 / 2) + (2 / 3) * (1 / 3)
    assert got.visits[1, 1] == pytest.approx(h) and got.mass[1, 1] == pytest.approx(1) and got.mass[1, 2] == pytest.approx(1 - h)
    assert got.score(paths[0]) == pytest.approx(math.log(1 / 3 * 1 / 2))


def test_a_path_scores_the_probability_of_its_walk():
    for paths in (LAYERED, SKIPPING):  # all walks are paths
        found = path_importance(paths)
        assert sum(math.exp(found.score(p)) for p in {tuple(p): p for p in paths}.values()) == pytest.approx(1)
    even = path_importance(LAYERED, overlap=lambda a, b: 1.0)
    assert even.score(LAYERED[3]) == pytest.approx(sum(math.log(even.visits[node]) for node in LAYERED[3]))
    skipped = path_importance([[(0, 1)], [(0, 1), (1, 1)]])
    assert skipped.score([(0, 1)]) == skipped.score([(0, 1), (1, 1)])  # no path is better for being short
    assert skipped.score([(0, 1), (1, 2)]) == skipped.score([(1, 1)]) == -math.inf


def test_limits():
    assert set(path_importance([[(0, 1), (1, 3), (2, 1)]]).visits.values()) == {1.0}
    flat = path_importance(LAYERED, overlap=lambda a, b: 1.0).visits
    assert flat[0, 1] == pytest.approx(1 / 3) and flat[1, 2] == pytest.approx(1 / 2) and flat[2, 4] == pytest.approx(1 / 3)
    only = path_importance(LAYERED, usage=[1.0] + [0.0] * (len(LAYERED) - 1))
    assert only.score(LAYERED[0]) == 0 and only.score(LAYERED[1]) == -float("inf")
    for paths, usage in (([], None), ([[]], None), ([[(1, 1), (0, 1)]], None), (LAYERED, [1.0]), (LAYERED, [0.0] * len(LAYERED))):
        with pytest.raises(BadInput):
            path_importance(paths, usage)


def supernet() -> tuple[ElasticFamily, torch.Tensor]:
    torch.manual_seed(0)
    model = ElasticBackbone(classes=3, widths=(8, 12), strides=(2, 1), blocks=(1, 1)).eval()
    x = torch.randn(6, 1, 8, 8)
    return ElasticFamily(model, grid(model, (0.5, 1.0)), x), x


def test_a_config_runs_through_its_widths_without_what_is_skipped():
    family, _ = supernet()
    path = operations(family.model)
    assert path(full(family.model)) == [(0, 8), (1, 8), (2, 12), (3, 12)]
    assert path(at(family.model, 0.5, (1.0, 0.0))) == [(0, 4), (1, 4), (2, 6)]
    assert path(at(family.model, 1.0, 0.0)) == [(0, 8), (2, 12)]


def test_bins_keep_the_best_and_cover_all_costs():
    family, x = supernet()
    prices = dict(zip(family.configs, flops(family.model, family.configs, x)))
    kept = fill(family.configs, list(prices.values()), lambda c: -abs(c.widths[0] - 4), 4, 3)
    assert all(len(b) <= 3 for b in kept)
    edges = [(min(prices[c] for c in b), max(prices[c] for c in b)) for b in kept if b]
    assert all(a[1] <= b[0] for a, b in pairwise(edges))
    assert all(c.widths[0] == 4 for c in kept[0])


def test_policy_draws_what_matters_and_keeps_the_contract():
    family, x = supernet()
    y = torch.arange(6) % 3
    policy = TIPS(family, x, levels=3, per_level=2).eval()
    assert len(policy.draw(0)) == 4 and policy.draw(0)[:2] == [family.configs[-1], family.configs[0]]
    assert {c for s in range(50) for c in policy.draw(s)} <= set(policy.configs) and len(policy.configs) <= 8
    with pytest.raises(BadInput, match="calibrate"):
        policy.decide(x, budget=1e9)
    policy.calibrate([(x, y)])
    check_family(policy, x)
    policy.loss(x, y).backward()
    with pytest.raises(BadInput):
        TIPS(family, x, accumulate=1)
    inverse = TIPS(family, x, levels=3, per_level=2, score=lambda c: -float(sum(c.widths)))
    assert inverse.configs != policy.configs
