"""Depth-muP: closed-form growth of features, muP at depth one, rates that do not count twice, and updates that add up to O(1)."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.depth import MeanSubtraction, depth_mup_, diversity, feature_diversity, with_depth
from neurarium.learn.parametrize import MuAdam, MuSGD, infer_shapes, mup_, mup_groups
from neurarium.learn.sweep import best_rate, sweep


class Absolute(nn.Module):
    def forward(self, x):
        return x.abs()


class Residual(nn.Module):
    def __init__(self, width, depth, phi=nn.ReLU, inputs=12):
        super().__init__()
        self.stem = nn.Linear(inputs, width, bias=False)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False), phi(), MeanSubtraction()) for _ in range(depth))
        self.head = nn.Linear(width, 5, bias=False)
        for b in self.branches:
            nn.init.normal_(b[0].weight, std=(2 / width) ** 0.5)

    def stream(self, x):
        found = [self.stem(x)]
        for branch in self.branches:
            found.append(found[-1] + branch(found[-1]))
        return found

    def forward(self, x):
        return self.head(self.stream(x)[-1])


def names(depth):
    return [f"branches.{i}" for i in range(depth)]


def deep(width, depth, seed=0, zero_readout=True, phi=nn.ReLU, **settings):
    torch.manual_seed(seed)
    model = Residual(width, depth, phi)
    return model, depth_mup_(model, infer_shapes(model), names(depth), zero_readout=zero_readout, **settings)


X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 5


def variance_of(phi):
    """Variance of phi of a standard normal variable, by summation."""
    x = np.linspace(-9, 9, 200_001)
    w = np.exp(-(x**2) / 2)
    w = w / w.sum()
    return float((phi(x) ** 2 * w).sum() - (phi(x) * w).sum() ** 2)


@pytest.mark.parametrize(
    ("phi", "function", "closed"), [(nn.ReLU, lambda x: np.maximum(x, 0), 1 / 2 - 1 / (2 * math.pi)), (Absolute, np.abs, 1 - 2 / math.pi)]
)
def test_features_grow_over_depth_like_the_exponential(phi, function, closed):
    assert variance_of(function) == pytest.approx(closed, rel=1e-6)
    model, _ = deep(512, 128, phi=phi)
    with torch.no_grad():
        stream = model.stream(X)
    q = torch.stack([x.square().mean() for x in stream])
    for at in (32, 64, 128):  # weights of variance 2/n: dq/dt = 2 c q, and its Euler steps
        want = (1 + 2 * closed / 128) ** at
        assert float(q[at] / q[0]) == pytest.approx(want, rel=0.04)
        assert want == pytest.approx(math.exp(2 * closed * at / 128), rel=0.01)


def test_the_limits_of_other_exponents():
    def end(alpha):
        model, _ = deep(256, 64, block_exponent=alpha, lr_exponent=0.0)
        with torch.no_grad():
            return diversity(torch.stack(model.stream(X)))

    ode, walk, standard = end(1.0), end(0.5), end(0.0)
    assert ode.cosine > 0.9998 > walk.cosine > 0.99 > standard.cosine
    assert walk.exponent == pytest.approx(0.5, abs=0.06)


def test_diversity_of_known_streams():
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(65, 4, 500, generator=g).cumsum(0)
    assert diversity(walk).exponent == pytest.approx(0.5, abs=0.02)
    line = torch.arange(65.0).view(-1, 1, 1) * torch.randn(4, 50, generator=g) / 64
    assert diversity(line).exponent == pytest.approx(0.0, abs=1e-6)
    watched = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(16)))
    report = feature_diversity(watched, X, [str(i) for i in range(16)])
    assert len(report.distance) == 3 and report.lags == (1 / 16, 2 / 16, 4 / 16)
    for bad, match in ((walk[:4], "too few"), (walk * torch.nan, "finite")):
        with pytest.raises(BadInput, match=match):
            diversity(bad)
    with pytest.raises(BadInput, match="no module"):
        feature_diversity(watched, X, ["77"])


def test_at_base_depth_it_is_mup():
    a = torch.manual_seed(0) and Residual(16, 3)
    b = copy.deepcopy(a)
    shapes = infer_shapes(a, 2)
    found = depth_mup_(a, shapes, names(3), base_depth=3)
    mup_(b, shapes)
    assert dict(found) == dict(shapes) and torch.equal(a(X), b(X))
    for family in ("adam", "sgd", "muon"):
        ours, theirs = mup_groups(a, found, 0.1, family=family), mup_groups(b, shapes, 0.1, family=family)
        assert [g["lr"] for g in ours] == [g["lr"] for g in theirs]


def test_rates_follow_the_exponents_and_sgd_does_not_count_twice():
    model = Residual(8, 16)

    def rates(family, **settings):
        shapes = with_depth(model, infer_shapes(model), names(16), **settings)
        found = {g["role"]: g["lr"] for g in mup_groups(model, shapes, 1.0, family=family)}
        return found["hidden"], found["input"], found["output"], next(iter(shapes.branches.values()))

    assert rates("adam") == (1 / 4, 1, 1, 1 / 4) and rates("muon") == (1 / 4, 1, 1, 1 / 4)
    assert rates("sgd") == (1, 1, 1, 1 / 4)
    assert rates("adam", block_exponent=1) == (1, 1, 1, 1 / 16) and rates("sgd", block_exponent=1) == (16, 1, 1, 1 / 16)
    assert rates("adam", block_exponent=0, lr_exponent=0) == (1, 1, 1, 1)
    assert rates("adam", base_depth=4, multiplier=3.0) == (1 / 2, 1, 1, 3 / 2)


@pytest.mark.parametrize(("family", "lr"), [("adam", 0.01), ("sgd", 0.1)])
def test_the_first_step_moves_the_function_alike_at_every_depth(family, lr):
    def moved(depth, alpha=0.5, gamma="auto"):
        model, shapes = deep(96, depth, zero_readout=False, block_exponent=alpha, lr_exponent=gamma)
        hidden = {n: s for n, s in shapes.items() if s.role == "hidden"}
        optimizer = {"adam": MuAdam, "sgd": MuSGD}[family]([(n, p) for n, p in model.named_parameters() if n in hidden], shapes, lr)
        before = model(X)
        F.cross_entropy(before, Y).backward()
        optimizer.step()
        return float((model(X) - before).detach().square().mean().sqrt())

    depths = (8, 32, 128)
    slope = np.polyfit(np.log(depths), np.log([moved(d) for d in depths]), 1)[0]
    assert abs(slope) < 0.1, slope
    assert abs(np.polyfit(np.log(depths), np.log([moved(d, 1.0) for d in depths]), 1)[0]) < 0.15  # the ODE limit is stable too
    wrong = np.polyfit(np.log(depths), np.log([moved(d, 0.5, 0.0) for d in depths]), 1)[0]
    assert wrong > 0.3  # without the smaller rate it grows like sqrt(L)


def test_twice_is_once_and_it_exports():
    model, shapes = deep(8, 4, zero_readout=False)
    out = model(X)
    again = depth_mup_(model, infer_shapes(model), names(4))
    assert again == shapes and torch.equal(model(X), out) and torch.equal(copy.deepcopy(model)(X), out)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), out)
    with pytest.raises(BadInput, match="already"):
        depth_mup_(model, infer_shapes(model), names(4), block_exponent=1)


def test_branches_that_return_tuples():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix, self.head = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

        def forward(self, x, scale=1.0):
            h = self.stem(x).unsqueeze(1)
            return self.head((h + scale * self.mix(h, h, h)[0]).squeeze(1))

    torch.manual_seed(0)
    model = Attend()
    want = model(X, 0.5)
    depth_mup_(model, infer_shapes(model), ["mix"], base_depth=0.25, zero_readout=False)
    torch.testing.assert_close(model(X), want)


def test_refusals():
    model = Residual(8, 4)
    shapes = infer_shapes(model)
    for blocks, error, match in (
        ([], BadInput, "each once"), (["branches.0", "branches.0"], BadInput, "each once"), (["nope"], BadInput, "no module"),
        (["branches", "branches.1"], UnsupportedModel, "other blocks"), (["head"], UnsupportedModel, "readout"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            with_depth(model, shapes, blocks)
    with pytest.raises(BadInput, match="positive"):
        with_depth(model, shapes, names(4), base_depth=0)
    with pytest.raises(BadInput, match="lr_exponent"):
        with_depth(model, shapes, names(4), lr_exponent="x")
    model.branches[1][0].weight = model.branches[0][0].weight
    with pytest.raises(UnsupportedModel, match="another block"):
        with_depth(model, infer_shapes(model), names(4))


# Many learning rates in one loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "momentum"), [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9), ("muon", 0.0), ("root", 0.0)])
def test_a_sweep_is_the_plain_loops(optimizer, momentum):
    from neurarium.learn.orthogonal import ROOT, Muon

    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).double()
        return mup_(model, infer_shapes(model, 4), zero_readout=False)

    family = {"root": "muon"}.get(optimizer, optimizer)
    batches = [(X.double()[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16, 24)] * 2
    models, lrs = [made(0), made(1)], [0.001, 0.02]
    losses, params = sweep(
        models, lambda m: mup_groups(m, infer_shapes(m, 4), 1.0, family=family), lrs, batches, optimizer=optimizer, momentum=momentum
    )
    for i, seed in enumerate((0, 1)):
        for j, lr in enumerate(lrs):
            model = made(seed)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), models[i].parameters(), strict=True))  # left as they were
            groups = mup_groups(model, infer_shapes(model, 4), lr, family=family)
            plain = {
                "adam": lambda g: torch.optim.Adam(g), "sgd": lambda g: torch.optim.SGD(g, momentum=momentum),
                "muon": lambda g: Muon(g, weight_decay=0.0, betas=(0.9, 0.999)),
                "root": lambda g: ROOT(g, weight_decay=0.0, betas=(0.9, 0.999)),
            }[optimizer](groups)  # fmt: skip
            for step, (x, y) in enumerate(batches):
                plain.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                plain.step()
                assert float(losses[i, j, step]) == pytest.approx(float(loss.detach()), rel=1e-7)
            for name, p in model.named_parameters():
                torch.testing.assert_close(params[name][i, j], p.detach(), rtol=1e-6, atol=1e-8)


def test_a_copy_that_diverges_stays_infinite_and_alone():
    def groups(model):
        return [{"params": list(model.parameters()), "lr": 1.0}]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [(100 * X, Y)] * 6
    both, _ = sweep([model], groups, [1e-4, 1e30], batches, optimizer="sgd")
    alone, params = sweep([model], groups, [1e-4], batches, optimizer="sgd")
    assert both[0, 1, -1] == torch.inf and torch.equal(both[0, 0], alone[0, 0]) and all(torch.isfinite(p).all() for p in params.values())
    x, y = torch.stack([X, 2 * X]), torch.stack([Y, Y.flip(0)])  # data of their own
    own, _ = sweep([model, model], groups, [1e-2], [(x, y)] * 3)
    for i in range(2):
        want, _ = sweep([model], groups, [1e-2], [(x[i], y[i])] * 3)
        torch.testing.assert_close(own[i], want[0])


def test_sweep_refuses():
    model = nn.Sequential(nn.Linear(12, 5))
    groups = lambda m: [{"params": list(m.parameters()), "lr": 1.0}]  # noqa: E731
    for match, call in {
        "optimizer": lambda: sweep([model], groups, [0.1], [(X, Y)], optimizer="x"),
        "at least": lambda: sweep([model], groups, [], [(X, Y)]),
        "no batch": lambda: sweep([model], groups, [0.1], []),
        "leave out": lambda: sweep([model], lambda m: [{"params": [m[0].weight], "lr": 1.0}], [0.1], [(X, Y)]),
    }.items():
        with pytest.raises(BadInput, match=match):
            call()


def test_best_rate_is_the_vertex():
    lrs = [2.0**k for k in range(-6, 1)]
    losses = [math.exp(0.3 * (math.log2(lr) + 2.3) ** 2) for lr in lrs]
    assert best_rate(lrs, losses) == pytest.approx(2**-2.3)
    assert math.isnan(best_rate(lrs, list(range(7)))) and math.isnan(best_rate(lrs, [math.inf] * 7))
    assert 0.125 < best_rate(lrs, [math.inf, math.inf, 3.0, 2.0, 1.0, math.inf, math.inf]) <= 0.25
