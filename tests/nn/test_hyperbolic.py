"""The Poincaré ball against its axioms and peers, its layers against their limits, hand-written gradients against autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from neurarium import meter
from neurarium.errors import BadInput
from neurarium.nn.autograd import assert_gradients
from neurarium.nn.hyperbolic import PMLR, PBatchNorm, PConv2d, PLinear, PoincareBall, PoincareResNet, PResidual, frechet_mean, hyperbolic
from neurarium.nn.hyperbolic.gyroplane import gyroplane
from neurarium.nn.hyperbolic.smooth import arsinh, asinhc, atanhc, sinhc, tanhc
from neurarium.nn.replace import replace_layers
from neurarium.nn.signal import signal_report


def points(ball, *shape, spread=0.6, seed=0, dtype=torch.float64):
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return ball.expmap0(v * spread / ball.c.sqrt().to(dtype))


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def bent(op, exact):
    """(tensors..., c) -> op(ball of curvature c, tensors...): the curvature as one more input."""

    class Bent(PoincareBall):
        @property
        def c(self):
            return self.given

    def run(*args):
        ball = Bent(exact=exact)
        ball.given = args[-1]
        return op(ball, *args[:-1])

    return run


@pytest.mark.parametrize("f, closed", [(tanhc, torch.tanh), (sinhc, torch.sinh), (asinhc, torch.asinh), (atanhc, torch.atanh)])
def test_even_functions_join_smoothly(f, closed):
    q = torch.tensor([1e-6, 1e-3, 0.0199, 0.0201, 0.3, 0.9], dtype=torch.float64)
    close(f(q), closed(q.sqrt()) / q.sqrt(), 1e-13)
    x = q.clone().requires_grad_()
    close(f.slope(q)[1], torch.autograd.grad(f(x).sum(), x)[0], 1e-11)
    at = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: f(t * t), at)
    wide = torch.linspace(-300, 300, 1001, dtype=torch.float64)
    close(arsinh(wide), torch.asinh(wide), 1e-12)


@settings(max_examples=20, deadline=None)
@given(c=st.sampled_from([0.05, 0.3, 1.0, 4.0]), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_axioms(c, d, seed):
    ball = PoincareBall(c)
    x, y, z = (points(ball, 5, d, seed=3 * seed + i) for i in range(3))
    v = torch.randn(5, d, dtype=torch.float64)
    close(ball.mobius_add(-x, ball.mobius_add(x, y)), y)
    close(ball.dist(ball.mobius_add(z, x), ball.mobius_add(z, y)), ball.dist(x, y), 1e-7)
    close(ball.expmap(x, ball.logmap(x, y)), y)
    close(ball.logmap0(ball.expmap0(v * 0.3)), v * 0.3)
    gyr = -ball.mobius_add(x, y)
    close(ball.gyration(x, y, z), ball.mobius_add(gyr, ball.mobius_add(x, ball.mobius_add(y, z))), 1e-7)
    close(ball.gyration(x, y, v).norm(dim=-1), v.norm(dim=-1))
    close(ball.midpoint(torch.stack([x, y], -2)), ball.geodesic(torch.tensor(0.5), x, y))
    close(ball.midpoint(torch.stack([x, -x, y, -y], -2)), torch.zeros_like(x))
    close(ball.dist(x, x), torch.zeros(5, dtype=torch.float64), 1e-6)


def test_equals_geoopt():
    geoopt = pytest.importorskip("geoopt")
    for c in (0.5, 1.0, 2.0):
        ours, theirs = PoincareBall(c), geoopt.PoincareBallExact(c).double()
        x, y, v = points(ours, 9, 4), points(ours, 9, 4, seed=1), torch.randn(9, 4, dtype=torch.float64) * 0.3
        for name in ("mobius_add", "logmap", "dist"):
            close(getattr(ours, name)(x, y), getattr(theirs, name)(x, y), 1e-6)
        close(ours.expmap(x, v), theirs.expmap(x, v), 1e-6)
        close(ours.transp(x, y, v), theirs.transp(x, y, v), 1e-6)
        close(ours.gyration(x, y, v), theirs.gyration(x, y, v), 1e-6)
        close(ours.geodesic(torch.tensor(0.3), x, y), theirs.geodesic(torch.tensor(0.3).double(), x, y), 1e-6)


@pytest.mark.parametrize("name, spread", [("project", 1), ("expmap0", 3), ("logmap0", 1), ("mobius_add", 1), ("midpoint", 1)])
def test_ball_gradients(name, spread):
    x, y = 0.35 * torch.randn(3, 3), 0.35 * torch.randn(3, 3)
    x = x * spread
    x[0] = 0  # the origin
    if name == "project":
        x[1] *= 1.5 / x[1].norm()  # beyond the border
    args = (x, y) if name == "mobius_add" else (x,)
    fns = [bent(lambda ball, *a: getattr(ball, name)(*a), exact) for exact in (True, False)]
    assert_gradients(fns[0], *args, torch.tensor(0.7), reference=fns[1])


@pytest.mark.parametrize("into, out", [("ball", "ball"), ("tangent", "tangent"), ("tangent", "ball"), ("ball", "scores")])
def test_gyroplane_gradients(into, out):
    for scale in (1.0, 20.0):  # inside, and at the border
        square = torch.tensor([[1e-3], [0.3], [0.9]]) * (1 if into == "ball" else scale)
        p = scale * torch.randn(3, 2) * square.sqrt() / square.max().sqrt() * 0.3
        args = (p, square, torch.tensor([0.2, 0.9]), torch.tensor([-0.3, 0.2]), torch.tensor(0.7))
        ours, plain = (lambda *a, e=e: gyroplane(*a, into=into, out=out, exact=e) for e in (True, False))
        assert_gradients(ours, *args, reference=plain)


def test_gradients_under_vmap_and_at_zero():
    ball = PoincareBall(0.7)
    x, y = 0.3 * torch.randn(4, 3), 0.3 * torch.randn(4, 3)
    assert_gradients(ball.mobius_add, x, y, vmap=True)
    layer = PLinear(3, 5, ball)
    rows = torch.func.vmap(torch.func.grad(lambda t: layer(t).square().sum()))(x)
    each = torch.stack([torch.func.grad(lambda t: layer(t).square().sum())(row) for row in x])
    torch.testing.assert_close(rows, each)
    for space in ("ball", "tangent"):
        zero = torch.zeros(2, 3, requires_grad=True)
        PLinear(3, 4, ball, space=space)(zero).sum().backward()
        assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
def test_linear_identity_limits_and_forms(c):
    ball = PoincareBall(c)
    x = points(ball, 20, 6)
    close(PLinear(6, 6, ball, dtype=torch.float64)(x), x, 1e-12)  # exactly the identity
    layer = PLinear(6, 4, ball, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    flat = PLinear(6, 4, ball, dtype=torch.float64, space="tangent")
    flat.load_state_dict(layer.state_dict())
    u = torch.randn(20, 6, dtype=torch.float64) * 0.2
    close(flat(u), ball.logmap0(layer(ball.expmap0(u))), 1e-9)
    assert (layer(x * 50).norm(dim=-1) * math.sqrt(c) < 1).all()
    nearly = PLinear(6, 4, PoincareBall(1e-10), dtype=torch.float64)
    nearly.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "ball._c"} | {"ball._c": nearly.ball._c})
    want = 2 * u @ layer.weight.T - 2 * layer.weight.norm(dim=1) * layer.bias
    close(nearly(u), want, 1e-7)


def test_linear_equals_hypll():
    hn = pytest.importorskip("hypll.nn")
    from hypll.manifolds.poincare_ball import Curvature
    from hypll.manifolds.poincare_ball import PoincareBall as Theirs
    from hypll.tensors import ManifoldTensor

    ball, theirs = PoincareBall(0.7), Theirs(Curvature(0.7, constraining_strategy=lambda t: t))
    ours, other = PLinear(6, 4, ball), hn.HLinear(6, 4, theirs)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    other.z.tensor.data = ours.weight.data.T.clone()
    other.bias.data = ours.bias.data.clone()
    x = points(ball, 8, 6, spread=0.3, dtype=torch.float32)
    torch.testing.assert_close(ours(x), other(ManifoldTensor(x, manifold=theirs)).tensor, rtol=1e-4, atol=1e-5)


def test_convolution_is_the_linear_layer_on_concatenated_patches():
    ball = PoincareBall(0.8)
    conv = PConv2d(2, 3, (3, 2), ball, stride=2, padding=(1, 0), dilation=(1, 2), dtype=torch.float64)
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    x = points(ball, 2, 7, 6, 2, spread=0.3).movedim(-1, 1)
    gain = math.gamma(6) / math.gamma(6.5) / (math.gamma(1) / math.gamma(1.5))  # B(6, 1/2)/B(1, 1/2)
    patches = functional.unfold(ball.logmap0(x.movedim(1, -1)).movedim(-1, 1), (3, 2), (1, 2), (1, 0), 2).mT * gain
    linear = PLinear(12, 3, ball, dtype=torch.float64)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data
    want = linear(ball.expmap0(patches)).mT.reshape(2, 3, 4, 2)
    close(conv(x), want)
    centre = PConv2d(4, 4, 3, ball, padding=1, init="centre", dtype=torch.float64)
    inside = points(ball, 2, 5, 5, 4, spread=0.3).movedim(-1, 1)
    kept = centre(inside).norm(dim=1) / inside.norm(dim=1)
    assert (kept > 0.85).all() and (kept < 1.3).all()
    assert torch.allclose(PConv2d(8, 8, 3, ball)._patch_gain() * torch.ones(1), torch.tensor([0.324]), atol=1e-3)


def test_frechet_mean():
    ball = PoincareBall(0.6)
    x, w = points(ball, 9, 3), torch.rand(9, dtype=torch.float64) + 0.1
    mean = frechet_mean(x, ball, weights=w, tol=1e-12)
    close((w[:, None] * ball.logmap(mean.expand_as(x), x)).sum(0), torch.zeros(3, dtype=torch.float64))
    close(frechet_mean(x[:2], ball, tol=1e-13), ball.midpoint(x[:2]))
    assert torch.autograd.gradcheck(lambda t, s: frechet_mean(t, ball, weights=s, tol=1e-14), (x.requires_grad_(), w.requires_grad_()))
    tight = points(ball, 50, 3, spread=1e-3)
    close(frechet_mean(tight, ball), ball.midpoint(tight), 1e-6)
    with pytest.raises(BadInput, match="n >= 1"):
        frechet_mean(x[:0], ball)


@pytest.mark.parametrize("center", ["midpoint", "frechet"])
def test_batch_norm(center):
    ball = PoincareBall(0.5)
    norm = PBatchNorm(3, ball, center=center, dtype=torch.float64, momentum=1.0)
    nn.init.normal_(norm.bias, std=0.3)
    norm.weight.data.fill_(0.4)
    x = points(ball, 200, 3, spread=0.4)
    y = norm(x)
    target = ball.expmap0(norm.bias)
    mean = ball.midpoint(y) if center == "midpoint" else frechet_mean(y, ball)
    close(ball.dist(target, mean), torch.zeros((), dtype=torch.float64), 5e-2)
    close(ball.dist_squared(target, y).mean(), norm.weight.data.clone(), 1e-5)
    old = ball.midpoint(x) if center == "midpoint" else frechet_mean(x, ball, tol=1e-12)
    close(norm.running_mean, old, 1e-6)
    # the same by the definition: logarithm at the old mean, transport, scaling, exponential
    move = ball.transp(old, target, ball.logmap(old, x)) * (0.4 / (ball.dist_squared(old, x).mean() + 1e-6)).sqrt()
    close(y, ball.expmap(target.expand_as(x), move), 1e-6)
    close(norm.eval()(x), y, 1e-5)  # momentum 1: the running statistics are this batch's
    image = x.reshape(2, 10, 10, 3).movedim(-1, 1)
    close(norm(image).movedim(1, -1).reshape(-1, 3), norm(x))
    with pytest.raises(BadInput, match="two points"):
        norm.train()(x[:1])


def test_residual_and_classifier():
    ball = PoincareBall(0.5)
    x = points(ball, 4, 3)
    residual = PResidual(PLinear(3, 3, ball, dtype=torch.float64), ball)
    close(residual(x), ball.mobius_add(x, x))
    head = PMLR(3, 2, ball, dtype=torch.float64)
    head.bias.data = torch.tensor([0.3, -0.2], dtype=torch.float64)
    # a logit is 2|z| times the signed distance to the hyperplane through exp0(r z/|z|), orthogonal to z
    for k in range(2):
        z = head.weight[k].detach()
        foot = ball.expmap0(head.bias[k].detach() * z / z.norm())
        side = ball.mobius_add(-foot.expand_as(x), x)
        sine = 2 * ball.c.sqrt() * (side @ z) / z.norm() / (1 - ball.c * side.square().sum(-1))
        close(head(x)[:, k].detach(), 2 * z.norm() / ball.c.sqrt() * torch.asinh(sine))
    with pytest.raises(BadInput, match="equal"):
        PResidual(PLinear(3, 2, ball, dtype=torch.float64), ball)(x)


def test_depth_keeps_norms_and_gain():
    ball = PoincareBall(1.0)
    x = points(ball, 64, 16, spread=0.2, dtype=torch.float32)
    ratio = {}
    for init in ("identity", "normal"):
        y = x
        for _ in range(40):
            y = PLinear(16, 16, ball, init=init)(y)
        ratio[init] = (y.norm(dim=1) / x.norm(dim=1)).log10().mean().abs().item()
    assert ratio["identity"] < 1e-4 and ratio["normal"] > 10
    small = PoincareBall(0.1)
    stack = nn.Sequential(*[m for _ in range(10) for m in (PLinear(64, 64, small, space="tangent"), nn.ReLU())])
    assert 0.3 <= signal_report(stack, torch.randn(256, 64)).gain <= 3
    convs = [m for _ in range(10) for m in (PConv2d(8, 8, 3, PoincareBall(0.01), padding=1, init="centre", space="tangent"), nn.ReLU())]
    assert 0.3 <= signal_report(nn.Sequential(*convs), torch.randn(16, 8, 8, 8)).gain <= 3


def test_replacing_layers():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 4, 3, padding_mode="reflect", padding=1),
        nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3, bias=False),
    ).eval()  # fmt: skip
    x = torch.randn(3, 2, 6, 6)
    ball = PoincareBall(1e-5)
    fitted = replace_layers(model, hyperbolic(ball, init="fit"), example=x)
    torch.testing.assert_close(fitted(x), model(x), rtol=1e-3, atol=1e-3)
    kept = {s.name: s.why for s in fitted.replace_report.skipped}
    assert "groups" in kept["2"] and "padding mode" in kept["3"] and len(kept) == 2
    curved = replace_layers(model, hyperbolic(PoincareBall(0.5, learnable=True)), example=x)
    curved(x).sum().backward()
    assert curved[0].ball is curved[5].ball and curved[0].ball.log_c.grad is not None
    conv1d = replace_layers(nn.Sequential(nn.Conv1d(2, 2, 1)), hyperbolic(ball))
    assert "Conv1d" in conv1d.replace_report.skipped[0].why
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False).eval()
    tokens = torch.randn(2, 5, 8)
    near = replace_layers(encoder, hyperbolic(PoincareBall(1e-5), init="fit"), example=tokens)
    torch.testing.assert_close(near(tokens), encoder(tokens), rtol=1e-3, atol=1e-3)


def test_network_exports():
    net = PoincareResNet((2, 3, 4), 8, 3, in_channels=1).eval()
    x = torch.rand(2, 1, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.slow
def test_network_exports_to_onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    x = torch.rand(2, 1, 6, 6)
    with torch.no_grad():
        layer = nn.Sequential(PConv2d(1, 2, 3, PoincareBall(0.3), space="tangent"), nn.Flatten(), PLinear(32, 3, PoincareBall(0.3))).eval()
        program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
        torch.testing.assert_close(program(x)[0], layer(x), rtol=1e-4, atol=1e-5)


def test_saved_bytes_of_a_block_and_refusals():
    from neurarium.nn.hyperbolic import PoincareBlock

    x = torch.rand(2, 4, 6, 6, requires_grad=True)
    kept = [meter.saved_bytes(PoincareBlock(4, 4, PoincareBall(0.1, exact=e)), x) for e in (True, False)]
    assert kept[0] <= 0.6 * kept[1]
    ball = PoincareBall()
    for build, word in (
        (lambda: PoincareBall(0), "c > 0"), (lambda: PLinear(2, 0, ball), "at least one"), (lambda: PLinear(2, 2, ball, init="x"), "init"),
        (lambda: PLinear(2, 2, ball, space="flat"), "space"), (lambda: PoincareResNet(depth=9), "depth"),
        (lambda: PLinear(3, 2, ball)(torch.zeros(4, 5)), "3 features"), (lambda: PBatchNorm(2, ball)(torch.zeros(4, 5)), "takes"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            build()
