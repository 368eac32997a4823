"""DSnoT's swaps against brute force, a slow loop, and the cases in which it must do nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import NM, calibrate, dsnot, finalise, magnitude, plan_dsnot, sparsegpt, wanda
from neurarium.compress.prune import dsnot as module
from neurarium.compress.prune.dsnot import reselect, row_error
from neurarium.errors import BadInput, UnsupportedModel

Case = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]


def case(seed: int, rows: int = 40, columns: int = 24, sparsity: float = 0.5) -> Case:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    mean, var = (torch.rand(columns, generator=g, dtype=torch.float64) + 0.1 for _ in range(2))
    mask = torch.rand(rows, columns, generator=g).argsort(1) >= round(sparsity * columns)
    stats = tuple(v.expand(rows, -1) for v in (mean, var, (100 * (var + mean**2)).sqrt()))
    return w, mask, stats  # type: ignore[return-value]


def errors(w: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return torch.where(mask, 0, w * mean).sum(1)


def slowly(w: Tensor, mask: Tensor, mean: Tensor, var: Tensor, norm: Tensor, cycles: int, threshold: float, power: float) -> Tensor:
    """Row by row with two pointers into lists that are sorted once."""
    new = mask.clone()
    for r in range(len(w)):
        e = float((w[r] * mean[r])[~mask[r]].sum())
        s = 1 if e > 0 else -1
        grow = sorted((j for j in range(w.shape[1]) if not mask[r, j]), key=lambda j: -s * float(w[r, j] * mean[r, j] / var[r, j] ** power))
        prune = sorted((j for j in range(w.shape[1]) if mask[r, j]), key=lambda j: float(w[r, j].abs() * norm[r, j]))
        prune = [j for j in prune if s * float(w[r, j] * mean[r, j]) < 0]
        for g, q in list(zip(grow, prune, strict=False))[:cycles]:
            after = e - float(w[r, g] * mean[r, g]) + float(w[r, q] * mean[r, q])
            if abs(e) <= threshold or s * float(w[r, g] * mean[r, g]) <= 0 or after * s < 0:
                break
            new[r, g], new[r, q], e = True, False, after
    return new


@pytest.mark.parametrize(("cycles", "threshold", "power"), [(50, 1e-4, 1.0), (3, 0.0, 0.0), (4, 0.5, 0.5)])
def test_both_ways_agree_with_the_two_pointer_loop(monkeypatch: pytest.MonkeyPatch, cycles: int, threshold: float, power: float) -> None:
    for seed in range(4):
        w, mask, stats = case(seed)
        options = {"cycles": cycles, "threshold": threshold, "var_power": power}
        new = reselect(w, mask, stats, **options)
        assert torch.equal(new, slowly(w, mask, *stats, cycles, threshold, power))
        assert not torch.equal(new, mask)
        assert torch.equal(new, reselect(w, mask, stats, nm=NM(23, 24), **options) if mask.sum(1).max() <= 23 else new)


def test_rows_keep_their_number_and_the_error_never_rises() -> None:
    for seed in range(4):
        w, mask, stats = case(seed, sparsity=0.7)
        before = errors(w, mask, stats[0])
        last = before.abs()
        for cycles in range(1, 8):
            new = reselect(w, mask, stats, cycles=cycles)
            now = errors(w, new, stats[0])
            assert torch.equal(new.sum(1), mask.sum(1))
            assert bool((now.abs() <= last + 1e-12).all())
            assert bool((now * before >= -1e-12).all()), "the error turned its sign"
            assert int((new & ~mask).sum(1).max()) <= cycles
            last = now.abs()
        assert float(last.mean()) < 0.5 * float(before.abs().mean())


def test_a_single_swap_is_the_best_under_the_rule() -> None:
    for seed in range(6):
        w, mask, stats = case(seed, rows=10, columns=8)
        mean, var, norm = stats
        new = reselect(w, mask, stats, cycles=1, threshold=0.0)
        for r in range(len(w)):
            e = float(errors(w[r : r + 1], mask[r : r + 1], mean[:1])[0])
            s = 1 if e > 0 else -1
            d = w[r] * mean[r]
            gains = {g: s * float(d[g] / var[r, g]) for g in range(8) if not mask[r, g] and s * d[g] > 0}
            prices = {q: float(w[r, q].abs() * norm[r, q]) for q in range(8) if mask[r, q] and s * d[q] < 0}
            expected = mask[r].clone()
            if gains and prices:
                g, q = max(gains, key=gains.__getitem__), min(prices, key=prices.__getitem__)
                if (e - float(d[g]) + float(d[q])) * s >= 0:
                    expected[g], expected[q] = True, False
            assert torch.equal(new[r], expected)


def test_without_means_nothing_happens_and_equal_variances_do_not_matter() -> None:
    w, mask, (mean, var, norm) = case(0)
    assert torch.equal(reselect(w, mask, (0 * mean, var, norm)), mask)
    same = torch.full_like(var, 0.7)
    assert torch.equal(reselect(w, mask, (mean, same, norm), var_power=2.0), reselect(w, mask, (mean, same, norm), var_power=0.0))
    dead = torch.arange(24) < 6
    mean, var = torch.where(dead, 0.0, mean), torch.where(dead, 0.0, var)
    new = reselect(w, mask, (mean, var, norm))
    assert not (new & ~mask)[:, dead].any(), "a weight on a dead input was grown"
    assert not torch.equal(new, mask)


def test_patterns_are_kept() -> None:
    w, _, stats = case(1)
    mask = NM(2, 4).mask(w.abs())
    new = reselect(w, mask, stats, nm=NM(2, 4))
    assert torch.equal(new.view(-1, 4).sum(1), mask.view(-1, 4).sum(1))
    assert not torch.equal(new, mask)
    assert bool((errors(w, new, stats[0]).abs() <= errors(w, mask, stats[0]).abs() + 1e-12).all())
    with pytest.raises(BadInput, match="2:4"):
        reselect(w, case(1)[1], stats, nm=NM(2, 4))


def test_without_the_sign_rule_no_weight_is_used_twice() -> None:
    w, mask, stats = case(2)
    new = reselect(w, mask, stats, same_sign=False, threshold=0.0)
    assert torch.equal(new.sum(1), mask.sum(1))
    turned = errors(w, new, stats[0]) * errors(w, mask, stats[0]) < 0
    assert turned.any()
    assert not torch.equal(new, reselect(w, mask, stats, threshold=0.0))


def net() -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    return model.eval(), [(torch.rand(16, 1, 8, 8), None) for _ in range(2)]


@pytest.mark.parametrize("start", ["wanda", "magnitude", "sparsegpt"])
def test_on_a_network_the_mean_output_of_a_layer_comes_closer_to_the_dense_one(start: str) -> None:
    model, loader = net()
    make = {
        "wanda": lambda: wanda(model, loader, sparsity=0.6), "sparsegpt": lambda: sparsegpt(model, loader, sparsity=0.6, scope="row"),
        "magnitude": lambda: magnitude(model, sparsity=0.6, scope="row"),
    }  # fmt: skip
    sparse = make[start]()
    stored, dense = copy.deepcopy(sparse.state_dict()), copy.deepcopy(model.state_dict())
    result = dsnot(sparse, model, loader, modules=["2", "5"])
    assert all(torch.equal(v, stored[k]) for k, v in sparse.state_dict().items())
    assert all(torch.equal(v, dense[k]) for k, v in model.state_dict().items())
    assert torch.equal(result[0].weight, sparse[0].weight)
    stats = calibrate(model, loader)
    for i in (2, 5):
        old, new = sparse[i].weight * sparse[i].mask, result[i].weight
        same = (new != 0) & (old != 0)
        assert torch.equal(new[same], old[same])
        grown = (new != 0) & (old == 0)
        assert torch.equal(new[grown], model[i].weight[grown])
        assert torch.equal((new != 0).flatten(1).sum(1), (old != 0).flatten(1).sum(1))
        mean = module.per_weight(stats[str(i)].mean, model[i])
        before, after = (row_error(model[i].weight, w, mean).abs() for w in (old, new))
        assert bool((after <= before + 1e-9).all())
        assert grown.any() or start == "sparsegpt", "it leaves hardly an error of the mean"
        if start == "wanda":
            assert float(after.mean()) < 0.6 * float(before.mean())
    plain = dsnot(finalise(sparse), model, loader, modules=["2", "5"])
    torch.testing.assert_close(plain(loader[0][0]), result(loader[0][0]))
    again = dsnot(sparse, model, loader, modules=["2", "5"], sequential=True)
    behind = calibrate(nn.Sequential(again[:5], sparse[5]), loader)["1"].mean
    before, after = (row_error(model[5].weight, m[5].weight, behind.expand(10, -1)).abs() for m in (sparse, again))
    assert bool((after <= before + 1e-9).all())


def test_what_cannot_be_done_is_said() -> None:
    model, loader = net()
    sparse = wanda(model, loader, sparsity=0.5)
    with pytest.raises(BadInput, match="no weight of the chosen layers is removed"):
        dsnot(model, model, loader)
    with pytest.raises(BadInput, match="empty"):
        dsnot(sparse, model, [])
    with pytest.raises(BadInput, match="not finite"):
        dsnot(sparse, model, [torch.full((2, 1, 8, 8), torch.nan)])
    with pytest.raises(BadInput, match="'down'"):
        dsnot(sparse, model, loader, modules=["down"])
    other = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3))
    with pytest.raises(BadInput, match=r"2: its weight is \(8, 3, 3, 3\)"):
        dsnot(sparse, other, loader)
    with pytest.raises(UnsupportedModel):
        dsnot(nn.ReLU(), nn.ReLU(), loader)
    assert plan_dsnot(sparse, model, loader, modules=["5"]).skipped["0"] == "was not asked for"
