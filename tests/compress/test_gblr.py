"""Masks are boxcars where they must be, structures reduce to the known ones, and the packed layer is the masked one, only smaller."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import GPT, BlockLowRankLinear, GaudiGBLR, WidthShrink, box_mask, gaudi_mask, gblr, pack_blocks
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import macs


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _scattered(n_in: int = 20, n_out: int = 14, rank: int = 1, seed: int = 0) -> GaudiGBLR:
    """Random widths and locations: dead, short, wrapping and full boxes."""
    torch.manual_seed(seed)
    layer = GaudiGBLR(n_in, n_out, 12, rank, budget=0.5)
    with torch.no_grad():
        for p in layer.structure():
            p.copy_(torch.rand(12))
        layer.out_width[:2] = layer.in_width[:2] = 1.0
        layer.in_width[2], layer.out_width[3] = 0.01, 0.0
        layer.in_width[4], layer.out_width[4] = 0.06, 0.08  # one entry
        layer.in_width[5] = 1.0
        layer.u.normal_(), layer.v.normal_(), layer.bias.normal_()
    return layer.eval()


@pytest.mark.parametrize("n", [7, 12, 33])
def test_fourier_series_is_the_cyclic_boxcar_at_every_point_of_the_grid(n: int) -> None:
    length, start = torch.meshgrid(torch.arange(n + 1), torch.arange(n), indexing="ij")
    mask = gaudi_mask(length.double() / n, start.double() / n, n)
    direct = torch.zeros(n + 1, n, n, dtype=torch.float64)
    for i in range(n + 1):
        for s in range(n):
            direct[i, s, [(s + j) % n for j in range(i)]] = 1
    torch.testing.assert_close(mask, direct, rtol=0, atol=1e-10)
    assert torch.equal(box_mask(length / n, start / n, n), direct.bool())


def test_mask_mean_shift_and_length() -> None:
    w, at = torch.rand(5).double(), torch.rand(5).double()
    for sigma in (None, 3.0):
        mask = gaudi_mask(w, at, 16, sigma)
        torch.testing.assert_close(mask.mean(-1), w)
        torch.testing.assert_close(gaudi_mask(w, at + 1 / 16, 16, sigma), mask.roll(1, -1))
    for n in (1000, 4096):  # in single precision too
        w, at = torch.tensor([0.25, 1.0]), torch.tensor([0.5, 0.0])
        torch.testing.assert_close(gaudi_mask(w, at, n), box_mask(w, at, n).float(), rtol=0, atol=2e-3)
    blurred = gaudi_mask(torch.tensor([0.5]), torch.tensor([0.25]), 64, 2.0)[0]
    assert blurred[10] > 1e-2  # a gradient reaches beyond the edge, which is at 16


@pytest.mark.parametrize("n", [6, 9])
def test_mask_is_differentiable(n: int) -> None:
    w = torch.tensor([0.3, 0.71, 0.05], dtype=torch.float64, requires_grad=True)
    at = torch.tensor([0.1, 0.55, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: gaudi_mask(a, b, n, 4.0), (w, at))
    assert torch.autograd.gradcheck(lambda a, b: gaudi_mask(a, b, n), (w, at))


def test_a_box_is_found_from_afar() -> None:
    target = box_mask(torch.tensor([0.25]), torch.tensor([0.5]), 64).double()
    w = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
    at = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w, at], lr=0.04)
    for step in range(150):
        optimizer.zero_grad()
        (gaudi_mask(w, at, 64, 2.0 * 50 ** (step / 150)) - target).square().mean().backward()
        optimizer.step()
    assert torch.equal(box_mask(w.detach(), at.detach(), 64), target.bool())


def test_special_cases_are_low_rank_and_block_diagonal() -> None:
    torch.manual_seed(0)
    layer, weight = GaudiGBLR(12, 9, rank=1, init="lowrank", budget=0.6).eval(), _rand(9, 12)
    layer.set_weight(weight)
    rank = int(0.6 * 108 / 21)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(layer.weight, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-4, atol=1e-5)
    assert layer.cost() == rank * 21
    dense = GaudiGBLR(12, 9, init="dense").eval()
    dense.set_weight(weight)
    torch.testing.assert_close(dense.weight, weight, rtol=1e-4, atol=1e-5)
    blocks = GaudiGBLR(12, 9, 3, rank=3, bias=False).eval()
    with torch.no_grad():
        for p, value in zip(blocks.structure(), (1 / 3, torch.arange(3) / 3, 1 / 3, torch.arange(3) / 3), strict=True):
            p.copy_(torch.as_tensor(value))
        blocks.u.normal_(), blocks.v.normal_()
    w = blocks.weight
    mask = torch.block_diag(*[torch.ones(3, 4)] * 3).bool()
    assert bool((w[~mask] == 0).all())
    assert bool((w[mask] != 0).all())


@pytest.mark.parametrize("rank", [1, 2])
def test_packed_layer_has_the_same_function_and_really_costs_what_is_said(rank: int) -> None:
    for seed in range(5):
        layer, x = _scattered(rank=rank, seed=seed), _rand(3, 4, 20, seed=seed)
        thin = pack_blocks(layer)
        assert isinstance(thin, BlockLowRankLinear)
        torch.testing.assert_close(thin(x), layer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(thin.weight, layer.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-4, atol=1e-5)
        assert thin.cost() == layer.cost() == sum(p.numel() for p in thin.parameters()) - 14
        a, b = layer.sizes()
        assert layer.cost() == int(torch.minimum((a + b) * rank, a * b).sum())
        assert macs(thin, x[:1, :1]) <= 2 * layer.cost()  # padding within groups of like size
    clone = copy.deepcopy(thin)
    clone.load_state_dict(thin.state_dict())
    clone(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in clone.parameters())
    if rank == 1:
        exported = torch.export.export(thin, (x,)).module()
        torch.testing.assert_close(exported(x), thin(x))
    empty = GaudiGBLR(4, 3)
    with torch.no_grad():
        empty.in_width.zero_()
    assert torch.equal(pack_blocks(empty)(torch.ones(2, 4)), empty.bias.expand(2, 3))


def test_widths_shrink_until_the_goal_and_stay_in_range() -> None:
    layers = nn.Sequential(GaudiGBLR(16, 16, init="dense"), GaudiGBLR(16, 8, init="dense"))
    shrink = WidthShrink(layers, budget=0.5, threshold=0.1)
    before = layers[0].out_width.detach().clone()
    shrink.step(0.2)
    torch.testing.assert_close(layers[0].out_width.detach(), before - 0.02)
    with torch.no_grad():
        layers[0].in_location[0], layers[0].in_location[1], layers[1].in_width[0] = -0.25, 0.999, 1.5
    shrink.step(0.0)
    assert layers[0].in_location[0] == 0.75
    assert layers[0].in_location[1] == 0  # rounds to the whole length
    assert layers[1].in_width[0] == 1
    shrink.trim()
    assert 0.45 < shrink.share() <= 0.5
    kept = layers[0].out_width.detach().clone()
    shrink.step(1.0)
    assert torch.equal(kept, layers[0].out_width)  # the goal is met
    by_width = WidthShrink([layers[0]], 0.2)
    by_width.trim()
    assert 0.15 < by_width.mean_width() <= 0.2
    for arguments in (({}, "either"), ({"budget": 0.5, "target": 0.1}, "either")):
        with pytest.raises(BadInput, match=arguments[1]):
            WidthShrink(layers, **arguments[0])
    with pytest.raises(BadInput, match="no GaudiGBLR"):
        WidthShrink(nn.ReLU(), 0.1)


def test_a_planted_structure_is_found_by_gradient_descent() -> None:
    torch.manual_seed(0)
    target = torch.zeros(24, 24)
    target[2:10, 12:20], target[14:22, 1:9] = _rand(8, 1) @ _rand(1, 8, seed=1), _rand(8, 1, seed=2) @ _rand(1, 8, seed=3)
    model = nn.Sequential(nn.Linear(24, 24, bias=False))
    x = _rand(256, 24, seed=5)
    loader = [(x, x @ target.T)] * 50
    cost = 32 / 576
    result = gblr(model, loader, budget=1.5 * cost, start=3.0, epochs=8, optimizer=partial(torch.optim.AdamW, lr=0.02, weight_decay=0.0),
                  loss="mse", threshold=0.3)  # fmt: skip
    assert result[0].cost() <= 1.5 * cost * 576
    u, s, vh = torch.linalg.svd(target)
    low_rank = (target - s[0] * u[:, :1] @ vh[:1]).norm()  # rank 1 costs 48 = 1.5 x 32
    assert (result[0].weight - target).norm() < 0.5 * low_rank


def test_a_model_is_converted_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    model, ids = GPT(11, width=16, heads=2, layers=1, context=8), torch.randint(0, 11, (4, 6))
    before = copy.deepcopy(model.state_dict())

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())

    result = gblr(model, [(ids, ids)] * 6, budget=0.4, loss=loss, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    layers = [m for m in result.modules() if isinstance(m, GaudiGBLR)]
    assert len(layers) == 6
    assert sum(m.cost() for m in layers) <= 0.4 * sum(m.in_features * m.out_features for m in layers)
    assert "tied" in result.skipped["head"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    result.eval()
    packed = pack_blocks(result)
    torch.testing.assert_close(packed(ids), result(ids), rtol=1e-4, atol=1e-4)
    again = gblr(model, [(ids, ids)] * 6, budget=0.4, loss=loss, optimizer=partial(torch.optim.AdamW, lr=1e-2), packed=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in packed.state_dict().items())
    whole = gblr(model.eval(), budget=1.0, init="dense", skip=("blocks.0.up",))
    assert type(whole.blocks[0].up) is nn.Linear


def test_bad_input_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for name, value in {"budget": 0.0, "learn": 0.0, "skip": ("1",)}.items():
        with pytest.raises(BadInput, match=f"^{name}"):
            gblr(model, **({"budget": 0.5} | {name: value}))
    with pytest.raises(BadInput, match="no samples"):
        gblr(model, [], budget=0.5)
    with pytest.raises(BadInput, match="rank must"):
        GaudiGBLR(4, 4, rank=5)
    with pytest.raises(BadInput, match="init must"):
        GaudiGBLR(4, 4, init="zero")
    with pytest.raises(UnsupportedModel):
        gblr(nn.Sequential(nn.Conv2d(3, 3, 3)), budget=0.5)
    with pytest.raises(UnsupportedModel, match="no GaudiGBLR"):
        pack_blocks(model)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match="0: the weight"):
        gblr(model, budget=0.5)
