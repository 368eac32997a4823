"""Class activation maps against the published formulas, written out in loops, and against the limits that they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.trust.explain import METHODS, class_activation

LAYER = "4"


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(6 * 36, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def head_gradient(model: nn.Sequential, image: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """A and dY/dA (channels, h, w) of one image."""
    a = model[:5](image[None]).detach().requires_grad_()
    (g,) = torch.autograd.grad(model[5:](a)[0, target], a)
    return a[0].detach(), g[0]


def scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)


def plus_plus(a: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> Tensor:
    """The map, position by position."""
    channels, height, width = a.shape
    total = torch.zeros(height, width)
    for k in range(channels):
        w = 0.0
        for i in range(height):
            for j in range(width):
                below = 2 * d2[k, i, j] + a[k].sum() * d3[k, i, j]
                alpha = d2[k, i, j] / below if below.abs() > 1e-12 else 0.0
                w = w + alpha * max(d1[k, i, j], torch.tensor(0.0))
        total += w * a[k]
    return scaled(total.relu())


def test_grad_cam_and_grad_cam_plus_plus_by_loops(model: nn.Sequential, x: Tensor) -> None:
    model.eval()
    first, second = (class_activation(model, x, 0, layer=LAYER, method=m, upsample=False) for m in ("gradcam", "gradcam++"))
    assert (first.map.amax((1, 2)) == 1.0).all()  # none of these maps is empty
    for n in range(len(x)):
        a, g = head_gradient(model, x[n], 0)
        want = (g.mean((1, 2))[:, None, None] * a).sum(0).relu()
        assert torch.allclose(first.map[n], scaled(want), atol=1e-5)
        assert torch.allclose(first.weights[n], g.mean((1, 2)), atol=1e-7)
        assert torch.allclose(second.map[n], plus_plus(a, g, g**2, g**3), atol=1e-4)
    assert torch.allclose(first.logits, model(x), atol=1e-6)


@pytest.mark.parametrize("activation", ["clean", "mean"])
def test_the_smooth_map_averages_derivatives_over_noisy_copies(model: nn.Sequential, x: Tensor, activation: str) -> None:
    model.eval()
    got = class_activation(model, x, 1, layer=LAYER, samples=7, noise=0.3, seed=5, activation=activation, upsample=False)
    noise = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(5))
    for n in range(len(x)):
        spread = 0.3 * (x[n].max() - x[n].min())
        pairs = [head_gradient(model, x[n] + spread * e, 1) for e in noise]
        g, a = torch.stack([p[1] for p in pairs]), torch.stack([p[0] for p in pairs]).mean(0)
        a = head_gradient(model, x[n], 1)[0] if activation == "clean" else a
        assert torch.allclose(got.map[n], plus_plus(a, g.mean(0), (g**2).mean(0), (g**3).mean(0)), atol=1e-4)


def test_averaging_maps_is_another_method(model: nn.Sequential, x: Tensor) -> None:
    model.eval()
    got = class_activation(model, x[:1], 1, layer=LAYER, method="averaged_gradcam", samples=7, noise=0.3, seed=5, upsample=False).map[0]
    noise = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(5))
    spread = 0.3 * (x[0].max() - x[0].min())
    maps = []
    for e in noise:
        a, g = head_gradient(model, x[0] + spread * e, 1)
        maps.append((g.mean((1, 2))[:, None, None] * a).sum(0).relu())
    want = torch.stack(maps).mean(0)
    assert torch.allclose(got, scaled(want), atol=1e-5)
    smooth = class_activation(model, x[:1], 1, layer=LAYER, samples=7, noise=0.3, seed=5, upsample=False).map[0]
    assert not torch.allclose(got, smooth, atol=1e-2)


def test_without_noise_it_is_grad_cam_plus_plus(model: nn.Sequential, x: Tensor) -> None:
    want = class_activation(model, x, layer=LAYER, method="gradcam++")
    for samples in (1, 25):
        got = class_activation(model, x, layer=LAYER, samples=samples, noise=0.0)
        assert torch.equal(got.map, want.map)
        assert torch.equal(got.target, model.eval()(x).argmax(1))


def pooled() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def test_behind_global_average_pooling_grad_cam_is_cam(x: Tensor) -> None:
    model = pooled()
    report = class_activation(model, x, 3, method="gradcam", upsample=False)
    assert report.layer == "1"
    want = torch.einsum("k,nkij->nij", model[4].weight[3], model[:2](x)).relu()
    scale = want.amax((1, 2), keepdim=True) - want.amin((1, 2), keepdim=True)
    assert torch.allclose(report.map, (want - want.amin((1, 2), keepdim=True)) / scale, atol=1e-5)
    # there g is constant over a map, so alpha is too: w_k = relu(g) h w / (2 + g sum A)
    g, a = model[4].weight[3] / 36, model[:2](x).sum((2, 3))
    plus = class_activation(model, x, 3, method="gradcam++")
    assert torch.allclose(plus.weights, 36 * g.relu() / (2 + g * a), rtol=1e-4, atol=1e-7)


def test_restricted_to_channels_and_neurons(model: nn.Sequential, x: Tensor) -> None:
    model.eval()
    whole = class_activation(model, x, 0, layer=LAYER, upsample=False)
    same = class_activation(model, x, 0, layer=LAYER, upsample=False, channels=range(6), neurons=torch.ones(6, 6))
    assert torch.allclose(whole.map, same.map)
    assert torch.allclose(class_activation(model, x, 0, layer=LAYER, upsample=False, channels=6).map, whole.map)
    some = class_activation(model, x, 0, layer=LAYER, upsample=False, channels=[1, 4])
    assert torch.allclose(some.weights[:, [1, 4]], whole.weights[:, [1, 4]])
    assert (some.weights[:, [0, 2, 3, 5]] == 0).all()
    top = class_activation(model, x, 0, layer=LAYER, upsample=False, channels=2)
    assert torch.equal(top.weights.ne(0).sum(1), torch.tensor([2, 2, 2]))
    assert torch.equal(top.weights.amax(1), whole.weights.amax(1))
    left, right = torch.zeros(6, 6), torch.zeros(6, 6)
    left[:, :3], right[:, 3:] = 1, 1
    halves = [class_activation(model, x, 0, layer=LAYER, neurons=m).weights for m in (left, right)]
    assert torch.allclose(halves[0] + halves[1], whole.weights, rtol=1e-4, atol=1e-7)  # w_k is a sum over positions


def test_an_images_map_depends_on_neither_its_neighbours_nor_the_chunks(model: nn.Sequential, x: Tensor) -> None:
    whole = class_activation(model, x, layer=LAYER, samples=6)
    for size in (1, 4, 13):
        assert torch.allclose(class_activation(model, x, layer=LAYER, samples=6, batch_size=size).map, whole.map, atol=1e-5)
    for n in range(3):
        assert torch.allclose(class_activation(model, x[[n]], layer=LAYER, samples=6).map[0], whole.map[n], atol=1e-5)
    assert not torch.allclose(class_activation(model, x, layer=LAYER, samples=6, seed=1).map, whole.map, atol=1e-4)


def test_several_targets_share_the_forward_pass(model: nn.Sequential, x: Tensor) -> None:
    targets = torch.tensor([[0, 1], [2, 3], [1, 1]])
    both = class_activation(model, x, targets, layer=LAYER, samples=4)
    assert both.map.shape == (3, 2, 6, 6)
    for j in range(2):
        assert torch.allclose(both.map[:, j], class_activation(model, x, targets[:, j], layer=LAYER, samples=4).map, atol=1e-5)


def test_maps_lie_in_the_unit_interval_and_have_the_images_size(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 3))
    for method in ("gradcam", "gradcam++", "smooth_gradcam++", "averaged_gradcam"):
        report = class_activation(model, x, method=method)
        assert report.map.shape == (3, 6, 6)
        assert 0.0 <= report.map.min() <= report.map.max() <= 1.0


def test_cancelling_and_vanishing_derivatives_give_finite_maps() -> None:
    # g = -1 and sum A = 2 make alpha's denominator exactly 0; a dead relu makes all derivatives 0
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.init.constant_(model[2].weight, -1.0)
    x = torch.full((1, 1, 2, 2), 0.5)
    for image in (x, torch.zeros_like(x)):
        report = class_activation(model, image, 0, layer="0", noise=0.0)
        assert (report.map == 0).all()
        assert (report.weights == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(model: nn.Sequential, x: Tensor, dtype: torch.dtype) -> None:
    want = class_activation(model, x, 1, layer=LAYER, method="gradcam++").map
    got = class_activation(model.to(dtype), x.to(dtype), 1, layer=LAYER, method="gradcam++").map
    assert (got.float() - want).abs().max() < (1e-5 if dtype == torch.float64 else 0.15)


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.zeros(0, 2, 6, 6)},
        {"x": torch.full((1, 2, 6, 6), float("nan"))},
        {"x": torch.zeros(2, 6, 6)},
        {"x": torch.zeros(1, 2, 6, 6, dtype=torch.int64)},
        {"target": 4},
        {"target": torch.tensor([0, 1])},
        {"target": torch.tensor([0.0, 1.0, 2.0])},
        {"method": "cam"},
        {"samples": 0},
        {"noise": float("inf")},
        {"noise": -0.1},
        {"activation": "noisy"},
        {"channels": 7},
        {"channels": [6]},
        {"channels": []},
        {"neurons": torch.ones(5, 6)},
        {"layer": "nowhere"},
    ],
)
def test_unusable_arguments_are_refused(model: nn.Sequential, x: Tensor, arguments: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        class_activation(model, **{"x": x, "layer": LAYER, **arguments})  # type: ignore[arg-type]


def test_unsupported_models_are_named(model: nn.Sequential, x: Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="n, channels, height, width"):
        class_activation(model, x, layer="6")
    with pytest.raises(UnsupportedModel, match="logits"):
        class_activation(model[:5], x)
    with pytest.raises(UnsupportedModel, match="feature maps"):
        class_activation(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), x)


@pytest.mark.parametrize("method", METHODS)
def test_so_many_channels_restrict_every_method(model: nn.Sequential, x: Tensor, method: str) -> None:
    whole, all_of_them, one = (
        class_activation(model, x, 0, layer=LAYER, method=method, samples=5, upsample=False, channels=c) for c in (None, 6, 1)
    )
    assert torch.allclose(whole.map, all_of_them.map, atol=1e-6)
    assert not torch.allclose(whole.map, one.map, atol=1e-2)
    clean = class_activation(model, x, 0, layer=LAYER, method=method, noise=0.0, upsample=False, channels=2)
    assert (clean.weights.ne(0).sum(1) <= 2).all()
