"""Physical networks: no gradient enters the physics, each layer's contrast is its own, and the simulators have the statistics of waves."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.local import gradient_alignment
from neurarium.learn.physical import PhysicalChain, PhysicalForwardForward, PhysicalLayer, PhysicsAware, fit_twin
from neurarium.learn.scattering import Metasurface, RandomScattering
from neurarium.testing.locality import assert_feedback_local

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
TRAIN, VAL = TensorData(X.float() / 16, Y).split(600, seed=0)
VALID = TensorData(VAL.x[:400], VAL.y[:400]).batches(400, shuffle=False)
BATCH = TRAIN[:32]
FAST = partial(Adam, lr=2e-3)


class BlackBox:
    """Says no to gradients, and is no module."""

    in_dim, out_dim = 74, 20

    def __init__(self, seed=0):
        self.inner = RandomScattering(74, 20, seed=seed)
        self.calls = 0

    def __call__(self, s):
        assert not s.requires_grad and not torch.is_grad_enabled()
        self.calls += 1
        return self.inner(s)


def chain(systems, width=74, seed=0):
    torch.manual_seed(seed)
    return PhysicalChain([PhysicalLayer(s, 74, width) for s in systems], 64, 10)


def test_no_gradient_enters_the_physics_and_each_batch_is_measured_once():
    boxes = BlackBox(1), BlackBox(2)
    model = chain(boxes)
    made = [box.calls for box in boxes]
    PhysicalForwardForward(optimizer=FAST).fit(model, TRAIN.batches(200), epochs=2)
    assert [box.calls - m for box, m in zip(boxes, made)] == [6, 6]  # 3 batches an epoch; 10 inner steps need no new measurement


def test_a_layers_step_follows_the_analytic_gradient_of_the_cosine():
    model = chain([None]).double()
    x, y = BATCH[0].double(), BATCH[1]
    trained = deepcopy(model)
    rule = PhysicalForwardForward(optimizer=partial(SGD, lr=1.0), inner_steps=1)
    rule.fit(trained, [(x, y)], epochs=1, seed=3)
    torch.manual_seed(3)  # negatives are the first thing that fit draws
    wrong = (y + torch.randint_like(y, 1, 10)) % 10
    assert not (wrong == y).any()
    w, b, p = model.layers[0].linear.weight.detach(), model.layers[0].linear.bias.detach(), model.probe0
    high = float(x.max())

    def parts(label):
        t = torch.cat([F.one_hot(label, 10) * high, x], 1)
        h = t @ w.T + b
        a, length = h.abs(), h.norm(dim=1, keepdim=True)
        g = (a @ p)[:, None] / length
        return t, g, h.sign() * (p / length - g * a / length**2)  # d cos(|h|, p) / dh

    (t1, g1, d1), (t0, g0, d0) = parts(y), parts(wrong)
    weight = -4 * torch.sigmoid(-4 * (g1 - g0)) / len(x)
    step = (weight * d1).T @ t1 - (weight * d0).T @ t0
    torch.testing.assert_close(trained.layers[0].linear.weight, w - step, rtol=0, atol=1e-8)  # p is kept in single precision
    assert torch.equal(trained.probe0, model.probe0)
    assert float(p.norm()) == pytest.approx(1)
    assert "probe0" in model.state_dict()


def test_layers_are_local_whatever_they_are_made_of():
    model = chain([RandomScattering(74, 30, seed=1), None, RandomScattering(74, 30, seed=2, nonlinearity="intensity")])
    names = [[f"layers.{i}.linear.weight", f"layers.{i}.linear.bias"] for i in range(3)]
    assert_feedback_local(PhysicalForwardForward(inner_steps=3), model, BATCH, blocks=names)
    torch.manual_seed(0)
    digital = PhysicalChain([nn.Sequential(nn.Linear(74, 40), nn.GELU()), nn.Sequential(nn.Linear(40, 40), nn.GELU())], 64, 10)
    assert_feedback_local(PhysicalForwardForward(), digital, BATCH, blocks=[[f"layers.{i}.0.weight"] for i in range(2)])
    PhysicalForwardForward(optimizer=FAST).fit(digital, TRAIN.batches(200), epochs=8)
    assert evaluate(digital, VALID)["accuracy"] > 0.7


def test_it_learns_with_physics_that_it_does_not_know():
    model = chain([RandomScattering(74, 74, seed=i) for i in (1, 2)])
    rule = PhysicalForwardForward(optimizer=FAST)
    assert rule.predictor(model) is model
    found = gradient_alignment(rule, model, TRAIN[:200])
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert all(v > 0.5 for v in found.values())  # at the start, the contrasts and the loss of the scores want much the same
    rule.fit(model, TRAIN.batches(600), epochs=12)
    assert evaluate(model, VALID)["accuracy"] > 0.88


def test_scores_sweep_the_labels():
    model = chain([None, None])
    x = BATCH[0][:5]
    scores = model(x)
    for c in range(10):
        h = torch.cat([F.one_hot(torch.full((5,), c), 10).float(), x], 1)
        total = 0
        for k, layer in enumerate(model.layers):
            h = layer(h)
            total = total + model.goodness(k, h)
        torch.testing.assert_close(scores[:, c], total)


class Twin(nn.Module):
    """A differentiable system that is its own perfect twin."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        self.register_buffer("matrix", torch.randn(out_dim, in_dim, generator=torch.Generator().manual_seed(0)))

    def forward(self, s):
        return torch.tanh(s @ self.matrix.T)


def test_physics_aware_training_with_a_perfect_twin_is_backpropagation():
    def net():
        torch.manual_seed(0)
        physics = PhysicalLayer(Twin(30, 20), 30, 16), PhysicalLayer(Twin(16, 20), 16, 10)
        return nn.Sequential(nn.Linear(64, 30), nn.Tanh(), *physics).double()

    class Known(PhysicalLayer):
        def measure(self, h):
            return torch.cat([self.system(h.abs() / (h.norm(dim=1, keepdim=True) + 1e-6)), h], 1)

    data = TensorData(TRAIN.x.double(), TRAIN.y).batches(100)
    ours, silico, theirs = net(), net(), net()
    for i in (2, 3):
        theirs[i].__class__ = Known
    settings = {"optimizer": partial(SGD, lr=0.1, momentum=0.9)}
    PhysicsAware(twin=lambda s: s, **settings).fit(ours, data, epochs=1)
    PhysicsAware(twin=lambda s: s, physical_forward=False, **settings).fit(silico, data, epochs=1)
    Backprop(**settings).fit(theirs, data, epochs=1)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), silico.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        torch.testing.assert_close(c, b, rtol=0, atol=1e-9)
    blind = net()  # without twins nothing passes the physics, and only the digital path teaches the layers below
    Backprop(**settings).fit(blind, data, epochs=1)
    assert not torch.allclose(blind[0].weight, theirs[0].weight, atol=1e-6)
    assert all(not layer.twins and layer.physical for layer in (ours[2], silico[2]))


def test_a_twin_learns_a_smooth_system_from_measurements():
    system = Twin(6, 5)
    twin = fit_twin(system, pairs=2000, hidden=32, epochs=15)
    s = F.normalize(torch.rand(500, 6), dim=1)
    assert float((twin(s) - system(s)).var() / system(s).var()) < 0.05
    assert not any(p.requires_grad for p in twin.parameters())


def test_speckle_is_fully_developed():
    q = RandomScattering(40, 20_000, nonlinearity="intensity", noise=0)(torch.rand(1, 40, generator=torch.Generator().manual_seed(0)))
    assert float(q.std() / q.mean()) == pytest.approx(1, abs=0.05)  # an exponential distribution: contrast 1
    assert float((q > q.mean()).float().mean()) == pytest.approx(0.368, abs=0.02)
    assert float(q.mean()) == pytest.approx(1, abs=0.1)


def test_the_resolvent_is_the_sum_of_the_born_series():
    system = Metasurface(12, 7, coupling=0.5, noise=0).double()
    s = torch.rand(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.view_as_complex(system.between)
    k = k * (0.5 / torch.linalg.matrix_norm(k, 2))
    step = torch.exp(1j * torch.pi * s)[:, :, None] * k
    wave = torch.view_as_complex(system.source).expand(4, -1, -1)
    total = torch.zeros_like(wave)
    for _ in range(60):  # one more visit of each scatterer a term
        total, wave = total + wave, step @ wave
    torch.testing.assert_close(system(s), (total.squeeze(-1) @ torch.view_as_complex(system.out).T).abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [RandomScattering, partial(RandomScattering, nonlinearity="kerr"), Metasurface])
def test_systems_are_nonlinear_noisy_and_drift_by_a_known_amount(make):
    s = torch.rand(200, 10, generator=torch.Generator().manual_seed(0))
    still = make(10, 30, noise=0, seed=1)
    q = still(s)
    assert torch.equal(q, make(10, 30, noise=0, seed=1)(s))
    assert float((still(s / 2) - q / 2).abs().max()) > 1e-3
    noisy = make(10, 30, noise=0.2, seed=1)
    noisy.load_state_dict(still.state_dict())
    assert float((noisy(s) - q).std() / q.square().mean().sqrt()) == pytest.approx(0.2, rel=0.05)
    before = still.out.clone()
    still.drift(0.0)
    torch.testing.assert_close(still.out, before)
    still.drift(0.3)
    cosine = F.cosine_similarity(still.out.flatten(), before.flatten(), dim=0)
    assert float(cosine) == pytest.approx(0.91**0.5, abs=0.06)
    assert float(still.out.norm() / before.norm()) == pytest.approx(1, abs=0.15)


def test_what_cannot_be_used_is_refused():
    rule = PhysicalForwardForward()
    with pytest.raises(UnsupportedModel, match="PhysicalChain"):
        rule.fit(nn.Sequential(nn.Linear(64, 10)), TRAIN.batches(64), epochs=1)
    with pytest.raises(UnsupportedModel, match="no PhysicalLayer"):
        PhysicsAware().fit(nn.Sequential(nn.Linear(64, 10)), TRAIN.batches(64), epochs=1)
    with pytest.raises(UnsupportedModel, match="no layer has a parameter"):
        rule.fit(chain([None]).requires_grad_(False), TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="takes 64 values"):
        rule.fit(chain([None]), [(BATCH[0][:, :60], BATCH[1])], epochs=1)
    with pytest.raises(BadInput, match="10 classes"):
        rule.fit(chain([None]), [(BATCH[0], BATCH[1] + 5)], epochs=1)
    with pytest.raises(BadInput, match="order"):
        PhysicalForwardForward(order="x").fit(chain([None]), TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="system takes"):
        PhysicalLayer(RandomScattering(5, 5), 6, 4)
    with pytest.raises(BadInput, match="nonlinearity"):
        RandomScattering(5, 5, nonlinearity="x")
    with pytest.raises(BadInput, match="coupling"):
        Metasurface(5, 5, coupling=1.0)
    with pytest.raises(BadInput, match="inputs"):
        RandomScattering(5, 5)(torch.rand(2, 4))
    with pytest.raises(BadInput, match="fraction"):
        RandomScattering(5, 5).drift(2.0)
