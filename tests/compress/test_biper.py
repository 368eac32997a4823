"""Signs that are signs, gradients by formula, the closed-form error, one bit a weight."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import (
    BiPerConv2d,
    BiPerLinear,
    SignActivation,
    SignConv2d,
    SignLinear,
    binarize,
    biper_error,
    biper_penalty,
    laplace_error,
    pack_binary,
    set_sharpness,
    set_stage,
    xnor_product,
)  # fmt: skip
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import stored_bytes
from neurarium.testing.architectures import ARCHITECTURES, subject
from neurarium.testing.examples.compress.lowbit import COVER


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_stage_one_has_the_exact_gradient_of_a_sine() -> None:
    torch.manual_seed(0)
    layer = BiPerLinear(4, 3, activations=None, frequency=3.0).double()
    x = draw(5, 4).double()
    torch.autograd.gradcheck(lambda w, a: torch.func.functional_call(layer, {"weight": w, "alpha": a}, (x,)), (layer.weight, layer.alpha))
    torch.testing.assert_close(layer.effective(), layer.alpha[:, None] * torch.sin(3 * layer.weight))


def test_stage_two_has_signs_and_the_derivative_omega_cos_omega_w() -> None:
    torch.manual_seed(0)
    layer = BiPerConv2d(2, 3, 3, stage=2, frequency=7.0, activations=None, bias=False)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 0.0  # the sine is 0 here: +1
    assert set(layer.values().unique().tolist()) == {-1.0, 1.0}
    assert layer.values()[0, 0, 0, 0] == 1
    assert torch.equal(layer.values(), layer.bits())
    upstream = draw(3, 2, 3, 3)
    (grad,) = torch.autograd.grad((layer.effective() * upstream).sum(), layer.weight)
    want = upstream * layer.alpha.view(3, 1, 1, 1) * 7 * torch.cos(7 * layer.weight)
    torch.testing.assert_close(grad, want)


def test_at_a_low_frequency_it_is_an_ordinary_convolution() -> None:
    plain = nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1)
    layer = BiPerConv2d(3, 4, 3, stride=2, padding=1, activations=None, frequency=1e-3)
    with torch.no_grad():
        layer.weight.copy_(plain.weight), layer.bias.copy_(plain.bias), layer.alpha.fill_(1 / 1e-3)
    x = draw(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_activations_sign_does_not_see_the_scale_and_has_the_piecewise_slope() -> None:
    sign = SignActivation(3)
    x = draw(2, 3, 4, 4).requires_grad_()
    assert torch.equal(sign.train()(x), sign.eval()(x))
    assert torch.equal(sign(x * 100), sign(x))
    assert sign(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]
    sign.train()(x)[0, 0, 0, 0].backward()
    # through x / s alone: the slope at the normalised value, times the derivative of x_0 / s(x)
    s = (x[0].detach().var(correction=0) + 1e-5).sqrt()
    a = x[0].detach() / s
    slope = float((2 - 2 * a[0, 0, 0].abs()).clamp_min(0))
    want = torch.zeros_like(a)
    want[0, 0, 0] = slope / s
    want -= slope * a[0, 0, 0] / s * (x[0].detach() - x[0].detach().mean()) / (s * a.numel())
    torch.testing.assert_close(x.grad[0], want, rtol=1e-4, atol=1e-6)
    assert not x.grad[1].any()


def test_the_quantisation_error_of_laplace_weights_is_the_closed_form() -> None:
    u = torch.rand(2, 500_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = 0.1 * (u[0].log() - u[1].log())
    for a in (0.2, 1.0, 5.0):
        assert biper_error(w, a / 0.1) == pytest.approx(laplace_error(a / 0.1, 0.1), rel=0.02)
        wave = torch.sin(w * a / 0.1)  # and by its definition
        gamma = wave.abs().mean()
        assert biper_error(w, a / 0.1) == pytest.approx(float((wave - gamma * wave.sign()).square().mean()), rel=1e-9)
    assert laplace_error(1e6, 1.0) == pytest.approx(0.5 - 4 / math.pi**2, rel=1e-4)
    assert max(laplace_error(a / 50, 1.0) for a in range(1, 500)) == pytest.approx(0.103, abs=2e-3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(16),
        nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


@pytest.mark.parametrize("activations", ["sign", None])
def test_packed_is_one_bit_a_weight_and_the_same_function(activations: str | None) -> None:
    model = set_stage(binarize(network().eval(), activations=activations), 2)
    packed = pack_binary(model)
    x = draw(4, 1, 8, 8)
    torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-5)
    weights, channels = 16 * 4 * 9 + 12 * 144, 16 + 12
    # one bit a weight in the place of a float; alpha and the table of two values are 4 bytes a number
    assert stored_bytes(packed) == stored_bytes(network()) - 4 * weights + weights // 8 + 4 * channels + 2 * 2 * 4
    assert model.plan.bits == dict.fromkeys(("3", "6"), (1, 1 if activations else 32))


def test_popcounts_give_the_product_of_signs() -> None:
    x, w = draw(5, 27).sign(), draw(6, 27, seed=1).sign()
    assert torch.equal(xnor_product(x, w), (x @ w.T).long())
    with pytest.raises(BadInput, match=r"\+1 and -1"):
        xnor_product(x * 2, w)


def test_a_binarised_layer_is_the_nearest_multiple_of_its_signs() -> None:
    """Least squares in each channel: a hundred other scales are all worse; in stage 2 the scale is the mean absolute weight."""
    model = network()
    for stage in (1, 2):
        layer = binarize(model, stage=stage, activations=None)[3]
        error = (layer.effective() - model[3].weight).square().flatten(1).sum(1)
        for factor in torch.linspace(0.5, 1.5, 100):
            other = (factor * layer.effective() - model[3].weight).square().flatten(1).sum(1)
            assert (error <= other + 1e-7).all()
        assert (layer.effective() * model[3].weight).sum() > 0
    small = binarize(model, stage=2, activations=None, frequency=1.0)[3]
    with torch.no_grad():
        small.weight.mul_(0.1)  # no weight beyond half a period: sign(sin) is sign
    assert torch.equal(small.bits(), torch.where(model[3].weight >= 0, 1.0, -1.0))


def test_stages_keep_the_size_of_the_weights_and_the_penalty_is_its_formula() -> None:
    model = binarize(network())
    before = [model[i].effective().abs().flatten(1).mean(1) for i in (3, 6)]
    want = sum((torch.sin(20 * model[i].weight) ** 2).mean().item() for i in (3, 6))
    assert biper_penalty(model, 0.5).item() == pytest.approx(0.5 * want, rel=1e-5)
    set_stage(model, 2)
    for i, b in zip((3, 6), before, strict=True):
        torch.testing.assert_close(model[i].effective().abs().flatten(1).mean(1), b)
    with pytest.raises(BadInput, match="no BiPer"):
        biper_penalty(network(), 0.1)


@pytest.mark.parametrize(
    ("surrogate", "slope"),
    [
        ("ste", lambda w: (w.abs() <= 1).float()),
        ("polynomial", lambda w: (2 - 2 * w.abs()).clamp_min(0)),
        ("tanh", lambda w: 3 * (1 - torch.tanh(3 * w) ** 2)),
    ],
)
def test_the_baselines_have_their_surrogate_gradients(surrogate: str, slope) -> None:
    torch.manual_seed(0)
    layer = SignLinear(40, 5, surrogate=surrogate, activations=None)
    set_sharpness(layer, 3.0)
    up = draw(5, 40)
    (grad,) = torch.autograd.grad((layer.values() * up).sum(), layer.weight)
    torch.testing.assert_close(grad, up * slope(layer.weight.detach()))
    assert torch.equal(layer.values(), layer.bits())


def test_two_stages_learn_with_binary_weights_and_activations() -> None:
    torch.manual_seed(0)
    x = draw(256, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), BiPerConv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 2)
    )
    rest = [p for p in model.parameters() if p is not model[2].weight]
    optimizer = torch.optim.Adam([{"params": [model[2].weight], "lr": 1e-3}, {"params": rest, "lr": 5e-3}])
    for stage, steps in ((1, 60), (2, 40)):
        set_stage(model, stage)
        for _ in range(steps):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + biper_penalty(model, 0.037)).backward()
            optimizer.step()
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_bad_input_is_named() -> None:
    for make, word in (
        (lambda: BiPerLinear(3, 3, frequency=0.0), "frequency"), (lambda: BiPerLinear(3, 3, stage=3), "stage"),
        (lambda: BiPerConv2d(3, 3, 3, activations="relu"), "activations"), (lambda: SignConv2d(3, 3, 3, surrogate="x"), "surrogate"),
        (lambda: set_stage(network(), 0), "stage"), (lambda: set_sharpness(network(), -1.0), "sharpness"),
        (lambda: laplace_error(0.0, 1.0), "positive"), (lambda: pack_binary(network()), "no binary layer"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            make()
    with pytest.raises(UnsupportedModel, match="no layer to quantise"):
        binarize(nn.Sequential(nn.LSTM(3, 3)))
    once = binarize(network())
    again = binarize(once)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    if name in ("llama", "opt", "gpt2"):
        pytest.importorskip("transformers")
    s = subject(name)
    want, before = s.run(), copy.deepcopy(s.model.state_dict())
    result = COVER["biper"](s)
    assert s.run(result).shape == want.shape
    assert torch.isfinite(s.run(result)).all()
    torch.testing.assert_close(s.run(pack_binary(result)), s.run(result), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), s.model.state_dict().values(), strict=True))
