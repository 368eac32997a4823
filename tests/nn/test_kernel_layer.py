"""Kernel layers: bundling keeps the function, the closed form is the optimum, the rule starts from trained weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.nn.features import URF, ArcCos
from neurarium.nn.kernel_layer import KernelConv2d, KernelLinear, SNNKAdapter, bundle, fully_bundle, kernelise
from neurarium.nn.replace import replace_layers
from neurarium.nn.signal import gain_, signal_report


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    assert count(KernelLinear(100, 30, num_features=16)) == 30 * 16
    assert count(KernelLinear(100, 30, num_features=16, parametrisation="weights")) == 30 * 101
    assert count(SNNKAdapter(64, 16)) == 64 * 16
    assert count(KernelConv2d(8, 12, 3, num_features=10)) == 120
    chain = nn.Sequential(KernelLinear(784, 256), KernelLinear(256, 256), nn.Linear(256, 10))
    assert count(bundle(chain)) == 64 * 64 + 64 * 10 + 10


def test_weights_parametrisation_estimates_the_layer():
    x, dense = 0.3 * torch.randn(6, 10), nn.Linear(10, 5)
    layer = KernelLinear(10, 5, URF(10, 20_000, "cos"), parametrisation="weights")
    layer.fit_(dense, x)
    torch.testing.assert_close(layer(x), dense(x).cos(), atol=0.06, rtol=0)
    relu = KernelLinear(10, 5, ArcCos(10, 20_000), parametrisation="weights")
    relu.fit_(dense, x)
    torch.testing.assert_close(relu(x), relu.features.kernel(x[:, None], dense.weight, dense.bias), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("features", "how"), [("relu", "psi"), ("step", "psi"), ("cos", "psi"), ("exp", "psi"), ("urf", "psi"), ("relu", "weights")]
)
@pytest.mark.parametrize("m", [64, 256])
def test_ten_layers_keep_the_signal(features, how, m):
    for seed in range(2):
        torch.manual_seed(seed)
        layers = [KernelLinear(128, 128, features, m, parametrisation=how, seed=100 * seed + i) for i in range(10)]
        report = signal_report(nn.Sequential(*[z for layer in layers for z in (layer, nn.ReLU())]), torch.randn(256, 128))
        assert 0.3 < report.gain < 3
    torch.manual_seed(0)
    layers = [KernelConv2d(12, 12, 3, features, 64, padding=1, seed=i) for i in range(10)]
    assert 0.3 < signal_report(nn.Sequential(*[z for layer in layers for z in (layer, nn.ReLU())]), torch.randn(8, 12, 8, 8)).gain < 3


def test_gain_rescales_a_kernel_layer():
    layer, x = KernelLinear(32, 16), torch.randn(200, 32)
    x0 = x[:1] * 0
    gain_(layer, 1.5, x)
    assert ((layer(x) - layer(x0)).square().mean() / x.square().mean()).sqrt().item() == pytest.approx(1.5, rel=1e-4)
    with pytest.raises(UnsupportedModel):
        KernelLinear(32, 16, "cos", parametrisation="weights").rescale_(2.0)


def test_convolution_is_the_linear_layer_on_patches():
    conv, x = KernelConv2d(3, 5, (3, 2), "cos", 7, stride=2, padding=1), torch.randn(2, 3, 8, 9)
    out = conv(x)
    assert out.shape == nn.Conv2d(3, 5, (3, 2), stride=2, padding=1)(x).shape
    padded = functional.pad(x, (1, 1, 1, 1))
    torch.testing.assert_close(out[1, :, 2, 3], conv.linear(padded[1, :, 4:7, 6:8].reshape(-1)))
    point = KernelConv2d(3, 5, 1, "relu", 7, stride=2)
    torch.testing.assert_close(point(x)[0, :, 1, 2], point.linear(x[0, :, 2, 4]))


@pytest.mark.parametrize("features", ["relu", "step", "cos"])
def test_bundling_keeps_the_function(features):
    chain = nn.Sequential(
        nn.Flatten(), KernelLinear(20, 200, features, 16), nn.Identity(), KernelLinear(200, 100, features, 24, seed=1),
        KernelLinear(100, 50, "relu", 8, parametrisation="weights", seed=2), nn.Linear(50, 3),
    )  # fmt: skip
    x = torch.randn(9, 4, 5)
    small = bundle(chain)
    torch.testing.assert_close(small(x), chain(x), atol=1e-5, rtol=1e-4)
    assert count(small) == 16 * 24 + 24 * 8 + 8 * 3 + 3 < count(chain)
    small(x).sum().backward()
    assert features == "step" or all(p.grad is not None for p in small.parameters())  # a step passes no gradient on
    assert torch.equal(chain[1].features.G, ArcCos(20, 16).G) or features == "cos"  # the original is untouched


def test_bundling_inside_a_users_model_and_from_dense_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))

        def forward(self, x):
            return x + self.body(x)

    net, x = Net(), torch.randn(4, 12)
    small = bundle(net, features="relu", num_features=16)
    first, second = KernelLinear(12, 64, "relu", 16, parametrisation="weights"), KernelLinear(64, 64, "relu", 16, seed=1)
    with torch.no_grad():
        first.weight.copy_(net.body[0].weight)
        first.bias.copy_(net.body[0].bias)
        second.weight.copy_(second.features.psi(net.body[2].weight, net.body[2].bias))
    torch.testing.assert_close(small(x), x + net.body[4](second(first(x))), atol=1e-5, rtol=1e-4)
    assert count(small) == 16 * 16 + 16 * 12 + 12


def test_what_cannot_be_bundled_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="two layers in a row"):
        bundle(nn.Sequential(KernelLinear(4, 4), nn.Tanh(), KernelLinear(4, 4)))
    with pytest.raises(UnsupportedModel, match="PositiveExp") as caught:
        bundle(nn.Sequential(KernelLinear(4, 4), KernelLinear(4, 4, "exp")))
    assert "1" in str(caught.value)


def test_the_closed_form_is_scikit_learns_ridge_and_has_no_gradient():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 2, dtype=torch.float64)
    features = ArcCos(5, 30).double()
    net = fully_bundle(features, x, y, ridge=0.3)
    ridge = linear_model.Ridge(alpha=0.3, fit_intercept=False).fit(features.phi(x).numpy(), y.numpy())
    torch.testing.assert_close(net[-1].weight, torch.tensor(ridge.coef_), atol=1e-6, rtol=1e-6)
    weight = net[-1].weight.clone().requires_grad_()
    loss = (functional.linear(features.phi(x), weight) - y).square().sum() + 0.3 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-9


def test_newtons_optimum_has_no_gradient_and_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = torch.randn(90, 5, dtype=torch.float64), torch.randint(3, (90,))
    features = ArcCos(5, 20).double()
    net = fully_bundle(features, x, y, loss="cross_entropy", ridge=0.5)
    weight = net[-1].weight.clone().requires_grad_()
    loss = functional.cross_entropy(functional.linear(features.phi(x), weight), y, reduction="sum") + 0.25 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-4
    theirs = linear_model.LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(features.phi(x).numpy(), y.numpy())
    torch.testing.assert_close(net(x).log_softmax(1), torch.tensor(theirs.predict_log_proba(features.phi(x).numpy())), atol=1e-4, rtol=1e-3)


def test_fully_bundled_chain_reads_all_but_its_last_matrix():
    chain = nn.Sequential(KernelLinear(6, 40, num_features=30), KernelLinear(40, 40, num_features=50, seed=1), nn.Linear(40, 3))
    x, y = torch.randn(200, 6), torch.randint(3, (200,))
    small = bundle(chain)
    net = fully_bundle(small, x, y, ridge=0.1)
    phi = small[0].phi(x)
    torch.testing.assert_close(net[0](x), phi)
    assert net[-1].weight.shape == (3, 50)
    assert small[0].head.out_features == 3  # untouched
    for bad in ({"ridge": -1.0}, {"loss": "hinge"}):
        with pytest.raises(BadInput):
            fully_bundle(small, x, y, **bad)
    with pytest.raises(BadInput, match="not finite"):
        fully_bundle(small, x * math.nan, y)
    with pytest.raises(BadInput):
        fully_bundle(small, x[:0], y[:0])


def test_the_rule_reports_what_it_keeps_and_fit_is_the_least_squares_optimum():
    model = nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x = torch.randn(30, 4, 6, 6)
    new = replace_layers(model, kernelise("relu", 24, init="fit"), example=x)
    report = new.replace_report
    assert {r.name: (r.before, r.after) for r in report.replaced} == {"0": (2368, 1536), "2": (2080, 768), "7": (330, 240)}
    assert [s.name for s in report.skipped] == ["4"]
    old, fitted, inputs = model[7], new[7], model[:7](x).detach()
    residual = fitted(inputs) - old(inputs)  # orthogonal to the features at the optimum
    phi = fitted.features.phi(inputs)
    assert (phi.T @ residual).abs().max() < 1e-3 * (phi.T @ old(inputs)).abs().max()
    share = replace_layers(model, kernelise("relu", 0.25))
    assert share[2].linear.features.num_features == 16
    kept = replace_layers(model, kernelise("relu", 500)).replace_report
    assert not kept.replaced and "no more than the 500 features" in kept.skipped[0].why
    without = replace_layers(model, kernelise("relu", 24, init="fit")).replace_report
    assert not without.replaced and "example" in without.skipped[0].why


def test_enough_features_fit_the_old_layer():
    old, x = nn.Linear(6, 4), torch.randn(500, 6)
    errors = [KernelLinear(6, 4, num_features=m).fit_(old, x).item() for m in (4, 400)]
    assert errors[1] < 1e-2 < 0.2 < errors[0]


def test_the_adapter_starts_as_the_identity():
    x = torch.randn(2, 5, 16)
    adapter = SNNKAdapter(16, 4)
    assert torch.equal(adapter(x), x)
    adapter(x).sum().backward()
    assert adapter.update.weight.grad.any()
    assert not torch.equal(SNNKAdapter(16, 4, zero_init=False)(x), x)


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    net = bundle(nn.Sequential(nn.Flatten(), KernelLinear(12, 9, "cos", 8), KernelLinear(9, 9, "relu", 8), nn.Linear(9, 3))).eval()
    net = nn.Sequential(KernelConv2d(3, 3, 1, "exp", 5), net).eval()
    x = torch.randn(2, 3, 2, 2)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(out), net(x).detach(), atol=1e-5, rtol=1e-5)
