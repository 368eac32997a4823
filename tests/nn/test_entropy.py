"""Range entropy against its limits and the exact entropy, the hull against Qhull, and attention that computes what it did before."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.stats import entropy
from torch import nn

from neurarium.errors import BadInput
from neurarium.experiments.nn.entropy_net import exact_entropy
from neurarium.nn.entropy import (
    EntropyAttention,
    EntropyNet,
    RangeEntropy,
    attention_calls,
    attention_range_entropy,
    chamfer,
    cover,
    halfspace_entropy,
    range_entropy_attention,
    segments,
    soft_entropy,
)
from neurarium.nn.hull import instance_optimal_hull
from neurarium.nn.replace import replace_layers


def test_limits_of_the_ball_surrogate():
    anchors = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]], dtype=torch.float64)
    x = anchors.repeat_interleave(5, 0) + 0.1 * torch.randn(20, 2, dtype=torch.float64)
    torch.testing.assert_close(soft_entropy(x, anchors, 1.0), torch.tensor(math.log(4), dtype=torch.float64))
    assert soft_entropy(x[:5], anchors, 1.0) < 1e-12
    cloud = torch.randn(200, 2, dtype=torch.float64)
    spread = torch.randn(7, 2, dtype=torch.float64)
    counts = np.bincount(torch.cdist(cloud, spread).argmin(1), minlength=7)
    torch.testing.assert_close(soft_entropy(cloud, spread, 1e7).item(), float(entropy(counts)), rtol=1e-6, atol=1e-9)
    weights = torch.randint(1, 4, (200,))
    repeated = cloud.repeat_interleave(weights, 0)
    torch.testing.assert_close(soft_entropy(cloud, spread, 3.0, weights.double()), soft_entropy(repeated, spread, 3.0))
    batch = torch.stack([cloud, 2 * cloud])
    torch.testing.assert_close(soft_entropy(batch, spread, 3.0)[1], soft_entropy(2 * cloud, spread, 3.0))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 6), d=st.integers(1, 4), alpha=st.floats(0.1, 30), scale=st.floats(0.2, 5))
def test_bounds_and_invariances(n, k, d, alpha, scale):
    x, c, shift = (torch.randn(m, d, dtype=torch.float64) for m in (n, k, 1))
    h = soft_entropy(x, c, alpha)
    assert -1e-12 <= h <= math.log(k) + 1e-12
    torch.testing.assert_close(soft_entropy(x.flip(0), c, alpha), h)
    torch.testing.assert_close(soft_entropy(x + shift, c + shift, alpha), h)
    torch.testing.assert_close(soft_entropy(scale * x, scale * c, alpha / scale**2), h)


def test_scale_alone_changes_it_and_gradients():
    x, c = torch.randn(6, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    assert abs(soft_entropy(3 * x, 3 * c, 1.0) - soft_entropy(x, c, 1.0)) > 1e-3
    assert torch.autograd.gradcheck(lambda a, b: soft_entropy(a, b, 2.0), (x.requires_grad_(), c.requires_grad_()))
    planes, offsets = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    fn = lambda a, w, b: halfspace_entropy(a, w, b, 0.5)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, planes.requires_grad_(), offsets.requires_grad_()))


def test_halfspaces():
    x = torch.randn(300, 2, dtype=torch.float64)
    planes = torch.tensor([[2.0, 0], [0, 1], [0, 5]], dtype=torch.float64)  # quadrants
    cells = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    want = float(entropy(np.bincount(cells, minlength=4)))
    torch.testing.assert_close(halfspace_entropy(x, planes, torch.zeros(3, dtype=torch.float64), 1e-7).item(), want, rtol=1e-5, atol=1e-7)
    module = RangeEntropy(2, 8, "halfspace").double()
    torch.testing.assert_close(module.memberships(x).sum(-1), torch.ones(300, dtype=torch.float64))
    with pytest.raises(BadInput, match="power of two"):
        RangeEntropy(2, 6, "halfspace")
    with pytest.raises(BadInput, match="n >= 1"):
        module(x[:0])


def test_cover_and_exact_entropy():
    x = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [5, 5], [5.1, 5], [9, 0]])
    assert len(cover(x, 0.2)) == 3
    third = [3 / 6, 2 / 6, 1 / 6]
    assert exact_entropy(x.double().numpy(), 0.2) == pytest.approx(entropy(third))
    torch.testing.assert_close(soft_entropy(x, cover(x, 0.2), 1e4).item(), float(entropy(third)), rtol=1e-5, atol=1e-6)
    assert exact_entropy(x.double().numpy(), 100.0) == 0
    # by brute force over all partitions of five points
    points = np.random.default_rng(0).random((5, 2))

    def partitions(items):
        if not items:
            yield []
            return
        for rest in partitions(items[1:]):
            yield [[items[0]], *rest]
            for i in range(len(rest)):
                yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]

    def fits(piece):  # a disc of radius 0.3 around some point of a fine grid
        grid = np.stack(np.meshgrid(np.linspace(-0.1, 1.1, 241), np.linspace(-0.1, 1.1, 241)), -1).reshape(-1, 2)
        return (((points[piece][:, None] - grid) ** 2).sum(-1).max(0) <= 0.302**2).any()

    best = min(entropy([len(p) / 5 for p in parts]) for parts in partitions(list(range(5))) if all(fits(p) for p in parts))
    assert exact_entropy(points, 0.3) == pytest.approx(best)


def test_refit_counts_clusters():
    centres = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4]])
    x = centres.repeat_interleave(25, 0) + 0.1 * torch.randn(100, 2)
    module = RangeEntropy(2, 4, alpha=50.0).refit(x)
    torch.testing.assert_close(module(x).item(), math.log(4), rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="ball"):
        RangeEntropy(2, 4, "halfspace").refit(x)


def test_entropy_net_moves_little_and_lowers_entropy():
    torch.manual_seed(0)
    net = EntropyNet(ranges=8, max_shift=0.05)
    x = torch.rand(4, 100, 2)
    assert (net(x) - x).abs().max() < 0.01
    assert torch.equal(net(x[:, torch.arange(99, -1, -1)]), net(x).flip(1))
    net.entropy.refit(x.flatten(0, 1))
    net.entropy.alpha, before = 30.0, net.entropy(x).mean()
    optimizer = torch.optim.Adam([*net.points.parameters(), *net.head.parameters()], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        net.loss(x, 20.0).backward()
        optimizer.step()
    assert net.entropy(net(x)).mean() < before - 0.01
    assert (net(x) - x).abs().max() <= 0.05 + 1e-6
    assert chamfer(x, x).abs().max() < 1e-6


@settings(max_examples=80, deadline=None)
@given(n=st.integers(3, 40), kind=st.sampled_from(["normal", "grid"]), cells=st.integers(0, 5), seed=st.integers(0, 10_000))
def test_hull_equals_qhull(n, kind, cells, seed):
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(n, 2)) if kind == "normal" else rng.integers(0, 8, (n, 2)).astype(float)  # duplicates and collinear points
    if np.linalg.matrix_rank(p - p[0]) < 2:
        return
    found, _ = instance_optimal_hull(torch.from_numpy(p), rng.integers(0, cells, n) if cells else None)
    want = ConvexHull(p)
    corners = [tuple(p[i]) for i in found.tolist()]
    assert set(corners) == {tuple(p[i]) for i in want.vertices} and len(set(corners)) == len(corners)
    x, y = np.array(corners).T
    assert 0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) == pytest.approx(want.volume)  # counter-clockwise


def test_hull_of_degenerate_sets_and_refusals():
    line = np.stack([np.arange(5.0), 2 * np.arange(5.0)], 1)
    assert sorted(instance_optimal_hull(line)[0].tolist()) == [0, 4]
    assert len(instance_optimal_hull(np.ones((4, 2)))[0]) == 1
    assert sorted(instance_optimal_hull(line[:, [0, 0]] * [0, 1])[0].tolist()) == [0, 4]  # vertical
    for bad, word in ((np.ones((0, 2)), "n >= 1"), (np.ones((3, 3)), r"\(n, 2\)"), (np.array([[0, np.nan]]), "finite")):
        with pytest.raises(BadInput, match=word):
            instance_optimal_hull(bad)


def test_hull_work():
    rng, n = np.random.default_rng(0), 5000
    angle = 2 * np.pi * rng.random(n)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    for p in (rng.random((n, 2)), rng.normal(size=(n, 2)), ring, ring * np.sqrt(rng.random(n))[:, None]):
        found, work = instance_optimal_hull(p)
        assert work.orientation_tests <= 3 * n * math.log2(len(found) + 1)
    inside = np.concatenate([[[-3.0, -3], [9, -3], [-3, 9]], rng.random((n, 2))])
    _, work = instance_optimal_hull(inside)
    assert work.orientation_tests <= 2 * len(inside) + 10  # one triangle: linear
    found, work = instance_optimal_hull(inside, np.minimum(np.arange(n + 3), 3))
    assert work.certified == n and work.orientation_tests < 80 and len(found) == 3


def test_attention_entropy():
    attn = torch.full((2, 3, 8), 1 / 8)
    torch.testing.assert_close(attention_range_entropy(attn, None, segments(8, 2)).item(), math.log(4))
    focused = torch.zeros(1, 1, 8)
    focused[..., 2:4] = 0.5  # broad inside one range
    assert attention_range_entropy(focused, None, segments(8, 2)) == 0
    each = torch.eye(8)
    row = torch.softmax(torch.randn(4, 8), -1)
    torch.testing.assert_close(attention_range_entropy(row, None, each).item(), float(entropy(row.numpy(), axis=1).mean()))
    grad = torch.autograd.grad(attention_range_entropy(focused.requires_grad_(), None, segments(8, 2)), focused)[0]
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_the_old_one(batch_first):
    old = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    nn.init.normal_(old.in_proj_bias)
    new = replace_layers(nn.Sequential(old), range_entropy_attention(size=2))[0]
    q, kv = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 3:] = True
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.ones(4, 5).triu(2).bool()}, {"attn_mask": torch.randn(6, 4, 5)},
                    {"average_attn_weights": False}, {"need_weights": False}):  # fmt: skip
        for a, b in zip(new(q, kv, kv, **options), old(q, kv, kv, **options)):
            torch.testing.assert_close(a, b) if b is not None else None
            assert (a is None) == (b is None)
    torch.testing.assert_close(new(q[:, 0], kv[:, 0], kv[:, 0])[0], old(q[:, 0], kv[:, 0], kv[:, 0])[0])


def test_attention_inside_a_transformer_calls_and_cuts():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False)
    x = torch.randn(3, 6, 8)
    new = replace_layers(encoder, range_entropy_attention(size=3), example=x)
    assert len(new.replace_report.replaced) == 2 and not new.replace_report.skipped
    for mode in (True, False):
        torch.testing.assert_close(new.train(mode)(x), encoder.train(mode)(x))
    with attention_calls() as calls:
        new.eval()(x)
    assert [c.weights.shape for c in calls] == [(3, 2, 6, 6)] * 2
    sum(c.penalty for c in calls).backward()
    assert new.layers[0].self_attn.in_proj_weight.grad.abs().sum() > 0
    for layer in new.layers:
        layer.self_attn.keep = 0.5
    with torch.no_grad(), attention_calls() as cut:
        out = new(x)
    assert ((cut[0].weights > 0).sum(-1) == 3).all()
    torch.testing.assert_close(cut[0].weights.sum(-1), torch.ones(3, 2, 6))
    assert not torch.allclose(out, encoder(x))
    balls = replace_layers(encoder, range_entropy_attention(ranges=4), example=x)
    with attention_calls() as calls:
        balls(x)
    calls[0].penalty.backward()
    assert balls.layers[0].self_attn.entropy.anchors.grad.abs().sum() > 0
    with torch.no_grad():
        exported = torch.export.export(new, (x,)).module()
        torch.testing.assert_close(exported(x), new(x))


def test_attention_refusals():
    kept = replace_layers(
        nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4), nn.MultiheadAttention(8, 2, add_zero_attn=True)), range_entropy_attention()
    ).replace_report.skipped
    assert "another size" in kept[0].why and "no range" in kept[1].why
    layer = EntropyAttention(8, 2, keep=0.0)
    with pytest.raises(BadInput, match="share"):
        layer(torch.randn(2, 1, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8))


@pytest.mark.slow
def test_entropy_modules_export_to_onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    x = torch.rand(2, 20, 2)
    for module in (RangeEntropy(2, 4), EntropyNet(ranges=4)):
        with torch.no_grad():
            program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False)
            torch.testing.assert_close(program(x)[0], module(x), rtol=1e-5, atol=1e-6)
