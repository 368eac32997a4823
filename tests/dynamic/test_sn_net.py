"""Stitched networks: the least-squares map, where stitches are, and that they compute and cost what their parts do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from neurarium.dynamic.backbones import BackboneS, VisionTransformerS
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.stitch import Anchor, anchor, least_squares, stitch, windows
from neurarium.dynamic.train import fit_policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.families import check_family


def vit(width: int, depth: int = 3, seed: int = 0, patch: int = 4) -> VisionTransformerS:
    torch.manual_seed(seed)
    return VisionTransformerS(1, 8, patch, width=width, depth=depth, heads=2, classes=3).eval()


def cnn(width: int, depth: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    for k in range(depth):
        layers += [nn.Conv2d(width, width, 3, 2 if k == 1 else 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)).eval()


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def labels(n: int = 12) -> torch.Tensor:
    return torch.arange(n) % 3


def test_least_squares_is_numpys():
    g = torch.Generator().manual_seed(0)
    given, wanted = torch.randn(50, 7, generator=g), torch.randn(50, 4, generator=g)
    weight, bias = least_squares(given, wanted)
    full = np.concatenate([given.numpy(), np.ones((50, 1))], 1).astype(np.float64)
    solution = np.linalg.lstsq(full, wanted.double().numpy(), rcond=None)[0]
    torch.testing.assert_close(weight, torch.from_numpy(solution[:-1].T).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, torch.from_numpy(solution[-1]).float(), rtol=1e-5, atol=1e-6)


def test_least_squares_of_repeated_columns_is_the_one_of_least_norm():
    base = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    weight, bias = least_squares(torch.cat([base, base], 1), base @ torch.eye(3) * 2 + 1)
    torch.testing.assert_close(weight, torch.eye(3).repeat(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, torch.ones(3), rtol=1e-4, atol=1e-5)


def test_ridge_is_the_normal_equations_and_leaves_the_bias_free():
    g = torch.Generator().manual_seed(2)
    given, wanted = torch.randn(40, 5, generator=g).double(), torch.randn(40, 2, generator=g).double() + 3
    weight, bias = least_squares(given, wanted, ridge=0.7)
    x = given - given.mean(0)
    expected = torch.linalg.solve(x.T @ x + 0.7 * 40 * torch.eye(5).double(), x.T @ (wanted - wanted.mean(0)))
    torch.testing.assert_close(weight, expected.T)
    torch.testing.assert_close(bias, wanted.mean(0) - given.mean(0) @ expected)


@pytest.mark.parametrize("depth", [2, 3, 6, 12])
def test_windows_of_two_are_3L_minus_2_pairs_each_once(depth):
    pairs = [pair for window in windows(depth, depth) for pair in window]
    assert len(pairs) == len(set(pairs)) == 3 * depth - 2
    assert all(abs(a - b) <= 1 and min(a, b) >= 0 and max(a, b) < depth for a, b in pairs)
    first = windows(depth, depth)[0]
    assert set(first) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_windows_of_unequal_depth_meet_at_equal_shares():
    pairs = [pair for window in windows(3, 6) for pair in window]
    assert {a for a, _ in pairs} == set(range(3)) and {b for _, b in pairs} == set(range(6))
    assert all(abs(a / 3 - b / 6) <= 1 / 3 for a, b in pairs)
    assert windows(1, 1) == [[(0, 0)]]


def test_three_anchors_of_twelve_blocks_are_71_networks(x):
    tiny = [VisionTransformerS(1, 8, 8, width=w, depth=12, heads=2, mlp=1, classes=3) for w in (2, 4, 6)]
    policy = stitch(tiny, x[:2])
    assert len(policy.configs) == 71 == 2 * (3 * 12 - 2) + 3
    assert len(policy.family.maps) == 2 * 11
    short = [vit(w, depth=2) for w in (2, 4, 6)]
    assert len(stitch(short, x[:2], nearest=False).configs) == 3 * 4 + 3
    assert len(stitch(short, x[:2], shared=False).family.maps) == 2 * 4


@pytest.mark.parametrize("make", [vit, cnn])
def test_anchors_are_bit_equal_and_the_users_models_stay(make, x):
    models = [make(4), make(8)]
    before = copy.deepcopy([m.state_dict() for m in models])
    policy = stitch(models, x[:2]).eval().init_stitches(x)
    assert len(policy.anchors) == 2
    with torch.no_grad():
        for index, model in zip(policy.anchors, models):
            assert torch.equal(policy.decide(x, config=index).output, model(x))
    fit_policy(policy, [(x, labels())], epochs=3)
    for model, state in zip(models, before):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("make", [vit, cnn])
def test_stitched_to_itself_at_the_same_cut_is_the_identity(make, x):
    model = make(4)
    many = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    shifted = stitch([model, model], x[:2]).eval()
    given = shifted.family.anchors[0].features(many)
    # after block a comes block a + 1, which is given what block a puts out
    pair = next(c for c in shifted.configs if c.back is not None and c.first == c.last + 1)
    features = [f.movedim(1, -1).flatten(0, -2) if f.ndim == 4 else f.flatten(0, -2) for f in given]
    weight, bias = least_squares(features[pair.last + 1], features[pair.first])
    settled = features[pair.last + 1] @ weight.T + bias
    torch.testing.assert_close(settled, features[pair.first], rtol=1e-4, atol=1e-5)
    shifted.family.maps[pair.layer].weight.data.copy_(weight.view_as(shifted.family.maps[pair.layer].weight))
    shifted.family.maps[pair.layer].bias.data.copy_(bias)
    torch.testing.assert_close(shifted.decide(x, config=shifted.configs.index(pair)).output, model(x), rtol=1e-4, atol=1e-4)


def test_a_shared_map_starts_as_the_mean_of_its_pairs_solutions(x):
    policy = stitch([vit(4), vit(8, seed=1)], x[:2]).eval().init_stitches(x)
    features = [[f.flatten(0, -2) for f in a.features(x)] for a in policy.family.anchors]
    pairs = [c for c in policy.configs if c.layer == "0_1_0"]
    assert len(pairs) == 4
    # block b is given what block b - 1 (the stem for b = 0) puts out
    solutions = [least_squares(features[0][c.last + 1], features[1][c.first]) for c in pairs]
    torch.testing.assert_close(policy.family.maps["0_1_0"].weight, torch.stack([w for w, _ in solutions]).mean(0))
    torch.testing.assert_close(policy.family.maps["0_1_0"].bias, torch.stack([b for _, b in solutions]).mean(0))


def test_a_configuration_costs_its_blocks_and_its_map(x):
    models = [vit(4), vit(8, seed=1)]
    policy = stitch(models, x[:2]).eval()
    tables = [CostTable.measure([a.stem, *a.blocks, a.tail], x) for a in policy.family.anchors]
    for price, c in zip(policy.prices(x).tolist(), policy.configs):
        if c.back is None:
            assert price == tables[c.front].full
        else:
            tokens = 4
            assert price == tables[c.front].total[c.last + 1] + 2 * tokens * 4 * 8 + sum(tables[1].steps[c.first + 1 :])


@pytest.mark.parametrize(
    "models",
    [
        lambda: [vit(4), vit(8)],
        lambda: [cnn(4), cnn(8)],
        lambda: [vit(4, depth=2), vit(8, depth=5)],
        lambda: [BackboneS(classes=3), BackboneS(classes=3)],
        lambda: [mlp(8), mlp(16)],
    ],
    ids=["vit", "cnn", "depths", "exits", "vectors"],
)
def test_every_kind_of_chain_keeps_the_contract(models, x):
    anchors = models()
    data = x.flatten(1) if isinstance(anchors[0], nn.Sequential) and isinstance(anchors[0][0], nn.Linear) else x
    policy = stitch(anchors, data[:2]).eval().init_stitches(data)
    policy.calibrate([(data, labels())])
    check_family(policy, data, most=5)
    outputs = policy.outputs(data)
    for i in (0, len(outputs) // 2, -1):
        assert torch.equal(outputs[i], policy.family.run(data, policy.configs[i]))


def test_slow_to_fast_starts_in_the_large_network(x):
    policy = stitch([vit(4), vit(8)], x[:2], fast_to_slow=False)
    assert all((c.front, c.back) == (1, 0) for c in policy.configs if c.back is not None)


def test_training_draws_every_configuration_and_the_teacher_counts(x):
    policy = stitch([vit(4), vit(8)], x[:2])
    drawn = [policy.drawn(step) for step in range(400)]
    assert set(drawn) == set(range(len(policy.configs))) and drawn == [policy.drawn(step) for step in range(400)]
    assert max(np.bincount(drawn)) < 3 * 400 / len(policy.configs)
    plain, y = policy.loss(x, labels(), 3), labels()
    policy.teacher = (lambda batch: nn.functional.one_hot((y + 1) % 3, 3).float(),)
    logits = policy.family.run(x, policy.configs[policy.drawn(3)])
    torch.testing.assert_close(policy.loss(x, y, 3), (plain + nn.functional.cross_entropy(logits, (y + 1) % 3)) / 2)
    reached = set()
    for step in range(60):
        policy.zero_grad(set_to_none=True)
        policy.loss(x, y, step).backward()
        reached |= {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in policy.named_parameters()}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: stitch([vit(4)], x), BadInput),
        (lambda x: stitch([vit(8), vit(4)], x), BadInput),
        (lambda x: stitch([vit(4), cnn(8)], x), (BadInput, UnsupportedModel)),
        (lambda x: stitch([vit(4), vit(8)], x, kernel=0), BadInput),
        (lambda x: stitch([vit(4), vit(8)], x * float("nan")), BadInput),
        (lambda x: stitch([vit(4), vit(8)], x).init_stitches(x[:0]), BadInput),
        (lambda x: stitch([vit(4), vit(8)], x).init_stitches(x * float("nan")), BadInput),
        (lambda x: stitch([vit(4), vit(8)], x).loss(x, labels() + 7), BadInput),
        (lambda x: stitch([vit(4), VisionTransformerS(1, 8, 4, width=8, depth=2, heads=2, classes=5)], x), BadInput),
        (lambda x: stitch([vit(4), vit(8, patch=2)], x), UnsupportedModel),
        (lambda x: anchor(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), x), UnsupportedModel),
        (lambda x: Anchor(nn.Identity(), [], nn.Identity()), BadInput),
        (lambda x: stitch([vit(4), vit(8)], x).decide(x, budget=1e9), BadInput),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, x):
    with pytest.raises(error):
        call(x)
