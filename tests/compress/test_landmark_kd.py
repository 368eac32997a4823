from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress import ActiveShapeModel, LandmarkKD, SoftTargets, assistive_loss, landmark_kd_loss, main_loss, with_teachers
from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop
from neurarium.testing.architectures import subject
from neurarium.testing.examples.compress.fusion import COVER


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize(
    ("pred", "want"),
    [(0.5, 1.9 * 0.3), (-0.5, 1.9 * 0.3), (0.1, -0.45 * 0.1), (-0.1, -0.45 * 0.1), (0.02, 0.0), (0.0, 0.0)],
)
def test_the_three_regions_on_both_sides(pred: float, want: float) -> None:
    for sign in (1, -1):  # which side of the truth the teacher is on does not matter
        p, g, t = tensors(pred, 0.0, sign * 0.2)
        assert float(assistive_loss(p, g, t, 1.9, -0.45)) == pytest.approx(want)
    p, g, t = tensors(pred + 0.3, 0.3, 0.5)
    assert float(assistive_loss(p, g, t, 1.9, -0.45)) == pytest.approx(want)


def test_a_perfect_teacher_only_pulls() -> None:
    p, g = torch.randn(5, 6), torch.randn(5, 6)
    assert float(assistive_loss(p, g, g, 1.9, -0.45)) == pytest.approx(1.9 * float((p - g).abs().mean()), rel=1e-5)


def test_inside_it_is_pushed_to_the_truth_and_outside_too() -> None:
    for value in (0.5, 0.1, -0.1, -0.5):
        p, g, t = tensors(value, 0.0, 0.2)
        p.requires_grad_()
        assistive_loss(p, g, t, 1.9, -0.45).backward()
        assert math.copysign(1, float(p.grad)) == math.copysign(1, value)  # downhill is towards g


def test_the_main_loss_is_continuous_with_slopes_3_and_2d() -> None:
    limit, eps = 0.2, 1e-6
    g, t = tensors(0.0, limit)
    value = lambda d: float(main_loss(torch.tensor([d], dtype=torch.float64), g, t))  # noqa: E731
    assert value(limit - eps) == pytest.approx(value(limit + eps), abs=1e-5)
    for d, slope in ((limit - 0.01, 3.0), (limit + 0.01, 2 * (limit + 0.01)), (0.4, 0.8)):
        assert (value(d + eps) - value(d - eps)) / (2 * eps) == pytest.approx(slope, rel=1e-4)
        assert value(d) == pytest.approx(value(-d))


def test_gradients_reach_the_student_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    p, g, t, s = (torch.rand(4, 6, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(4))
    total, parts = landmark_kd_loss(p, g.detach(), t, s)
    assert float(total.detach()) == pytest.approx(float((2 * parts["main"] + parts["tough"] + parts["tolerant"]).detach()))
    total.backward()
    assert p.grad is not None
    assert t.grad is None
    assert s.grad is None
    assert torch.autograd.gradcheck(lambda x: landmark_kd_loss(x, g.detach(), t.detach(), s.detach())[0], p)


def shapes(n: int = 60, points: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    both = torch.randn(n + 1, 2 * points, generator=draw, dtype=torch.float64)
    return both[0] + 0.1 * both[1:]


@pytest.mark.parametrize("align", [True, False])
def test_with_all_components_shapes_stay(align: bool) -> None:
    model = ActiveShapeModel(variance=1.0, limit=100, align=align).fit(shapes())
    torch.testing.assert_close(model.smooth(shapes()), shapes())
    assert model.variance_kept == pytest.approx(1)


def test_smooth_shapes_lie_in_the_span_and_within_the_limit() -> None:
    model = ActiveShapeModel(3, align=False).fit(shapes())
    smooth = model.smooth(10 * shapes())
    c = (smooth - model.mean) @ model.components.T
    torch.testing.assert_close(model.mean + c @ model.components, smooth)
    assert (c.abs() <= 3 * model.spread + 1e-9).all()
    again = model.smooth(smooth)
    torch.testing.assert_close(again, smooth)
    kept = [ActiveShapeModel(variance=v).fit(shapes()).variance_kept for v in (0.5, 0.8, 0.95)]
    assert all(k >= v for k, v in zip(kept, (0.5, 0.8, 0.95), strict=True))


def test_place_size_and_angle_do_not_matter_to_the_smoothing() -> None:
    model = ActiveShapeModel(2).fit(shapes())
    z = torch.view_as_complex(shapes().view(60, -1, 2))
    moved = torch.view_as_real(z * (1.5 * torch.exp(torch.tensor(0.7j))) + (2 - 1j)).flatten(1)
    want = torch.view_as_complex(model.smooth(shapes()).view(60, -1, 2)) * (1.5 * torch.exp(torch.tensor(0.7j))) + (2 - 1j)
    torch.testing.assert_close(model.smooth(moved), torch.view_as_real(want).flatten(1))


def network(seed: int = 0, out: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, out))


def points(n: int = 20) -> TensorData:
    draw = torch.Generator().manual_seed(3)
    return TensorData(torch.randn(n, 6, generator=draw), torch.rand(n, 4, generator=draw) - 0.5)


def test_cached_teachers_give_the_same_student() -> None:
    tough, tolerant, a, b = network(1), network(2), network(), network()
    before = {k: v.clone() for k, v in tough.state_dict().items()}
    history = LandmarkKD(tough, tolerant).fit(a, points().batches(5), epochs=2)
    LandmarkKD().fit(b, with_teachers(points(), tough, tolerant).batches(5), epochs=2)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert tough.training
    assert all(torch.equal(v, before[k]) for k, v in tough.state_dict().items())
    total = [2 * m + t + s for m, t, s in zip(*(history.extra[f"{k}_loss"] for k in ("main", "tough", "tolerant")), strict=True)]
    assert total == pytest.approx(list(history.extra["loss"]), rel=1e-4)


def test_soft_targets_are_cross_entropy_where_the_weight_is_zero() -> None:
    data = TensorData(points().x, torch.arange(20) % 4)
    a, b, teacher = network(), network(), network(1)
    SoftTargets(teacher, weight=0.0, optimizer=torch.optim.SGD).fit(a, data.batches(5), epochs=1)
    Backprop(optimizer=torch.optim.SGD).fit(b, data.batches(5), epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    x, model = points().x, nn.Linear(6, 4)
    soft = (a.eval()(x) / 3).log_softmax(1)
    want = 9 * F.kl_div((model(x) / 3).log_softmax(1), soft, log_target=True, reduction="batchmean")
    got = SoftTargets(a, weight=1.0, temperature=3.0).fit(model, [(x, data.y)], epochs=1).extra["loss"][0]
    assert got == pytest.approx(float(want.detach()), rel=1e-5)


def test_what_cannot_be_is_refused() -> None:
    tough, tolerant, student = network(1), network(2), network()
    with pytest.raises(BadInput, match="both"):
        LandmarkKD(tough)
    with pytest.raises(UnsupportedModel, match="own teacher"):
        LandmarkKD(student, tolerant).fit(student, points().batches(5), epochs=1)
    with pytest.raises(BadInput, match="truth, tough"):
        LandmarkKD().fit(student, points().batches(5), epochs=1)
    with pytest.raises(BadInput, match="truth has shape"):
        LandmarkKD(tough, tolerant).fit(student, [(points().x, points().y[:, :2])], epochs=1)
    with pytest.raises(BadInput, match="teacher's answer"):
        LandmarkKD(network(1, 3), network(2, 3)).fit(student, points().batches(5), epochs=1)
    for options in ({"weights": (1.0,)}, {"assist": (1.0,)}, {"margin": 2.0}):
        with pytest.raises(BadInput, match="margin"):
            LandmarkKD(tough, tolerant, **options)
    for options in ({"temperature": 0.0}, {"weight": 2.0}):
        with pytest.raises(BadInput, match="temperature"):
            SoftTargets(tough, **options)
    model = ActiveShapeModel()
    with pytest.raises(BadInput, match="fit"):
        model.smooth(shapes())
    for bad in (torch.zeros(0, 4), torch.zeros(3, 5), torch.zeros(4), torch.full((3, 4), float("nan")), torch.zeros(1, 4)):
        with pytest.raises(BadInput, match="shape"):
            model.fit(bad)
    with pytest.raises(BadInput, match="numbers"):
        model.fit(shapes()).smooth(torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["mlp", "resnet", "unet", "lstm"])
def test_any_architecture_can_be_a_student(name: str) -> None:
    one = subject(name)
    before = one.run()
    out = one.run(COVER["landmark-kd"](one))
    assert out.shape == before.shape
    assert torch.isfinite(out).all()
    assert not torch.equal(out, before)
