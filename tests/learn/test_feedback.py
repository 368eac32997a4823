"""Feedback through random matrices: the closed form, backpropagation as a limit, and optics that are linear only with holography."""

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
from neurarium.learn.feedback import DFA, RandomFeedback, ternarise
from neurarium.learn.fit import Backprop, Diverged, evaluate
from neurarium.learn.local import gradient_alignment
from neurarium.learn.photonic import OPU
from neurarium.testing.locality import assert_feedback_local

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
TRAIN, VAL = TensorData(X.float() / 16, Y).split(1200, seed=0)
VALID = VAL.batches(300, shuffle=False)
BATCH = TRAIN[:64]
GD = partial(SGD, lr=1.0)


def mlp(*widths, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [m for a, b in zip((64, *widths), widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10)).to(dtype)


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x):
        return torch.tanh(x + self.norm(self.conv(x)))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), Residual(8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )


def transformer(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), Pool(), nn.Linear(16, 10)
    )


def test_updates_are_those_of_the_formula():
    model, trained = mlp(32, 24), mlp(32, 24)
    DFA(optimizer=GD).fit(trained, [BATCH], epochs=1, seed=5)
    x, y = BATCH
    with torch.no_grad():
        h1 = torch.tanh(model[0](x))
        h2 = torch.tanh(model[2](h1))
        e = model[4](h2).softmax(1) - F.one_hot(y, 10)
        both = RandomFeedback(10, 32 + 24, seed=5).matrix  # rows of one matrix are the layers' own matrices
        d1, d2 = e @ both[:32].T * (1 - h1**2), e @ both[32:].T * (1 - h2**2)
    for layer, delta, h in ((0, d1, x), (2, d2, h1), (4, e, h2)):
        torch.testing.assert_close(trained[layer].weight, model[layer].weight - delta.T @ h / 64, rtol=0, atol=1e-6)
        torch.testing.assert_close(trained[layer].bias, model[layer].bias - delta.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", [partial(Adam, lr=3e-3), partial(SGD, lr=0.1, momentum=0.9)])
def test_feedback_through_the_transposed_head_is_backpropagation(optimizer):
    ours, theirs = mlp(32, dtype=torch.float64), mlp(32, dtype=torch.float64)
    data = TensorData(TRAIN.x.double(), TRAIN.y).batches(64)

    class Transposed(nn.Module):
        def project(self, e):
            return e @ ours[2].weight.detach()  # as it is at this step

    DFA(optimizer=optimizer, projector=lambda *a, seed: Transposed()).fit(ours, data, epochs=2)
    Backprop(optimizer=optimizer).fit(theirs, data, epochs=2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_deep_linear_model_finds_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(200, 5, generator=generator), torch.randn(200, 3, generator=generator)
    y = x @ torch.randn(5, 3, generator=generator) + 0.3 * noise
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((5, 12), (12, 12), (12, 3))))
    DFA(loss="mse", optimizer=partial(Adam, lr=1e-2)).fit(model, [(x, y)], epochs=600)
    torch.testing.assert_close(model(x), x @ torch.linalg.lstsq(x, y).solution, rtol=0, atol=2e-2)


@pytest.mark.parametrize("make", [partial(mlp, 32, 24, 16), cnn, transformer])
def test_nothing_comes_through_the_forward_weights_above(make):
    assert_feedback_local(DFA(), make(), BATCH)
    assert_feedback_local(DFA(ternary=0.2, projector=partial(OPU, noise=0.1)), make(), BATCH)
    with pytest.raises(AssertionError, match="depends on the forward weights"):
        assert_feedback_local(Backprop(), make(), BATCH)


@pytest.mark.parametrize("make", [partial(mlp, 48, 48), transformer])
def test_hidden_blocks_learn_and_come_to_point_along_the_gradient(make):
    rule = DFA(optimizer=partial(Adam, lr=2e-3))
    taught, shallow = make(), make()
    for block in list(shallow)[:-1]:
        block.requires_grad_(False)
    rule.fit(taught, TRAIN.batches(32), epochs=6)
    rule.fit(shallow, TRAIN.batches(32), epochs=6)
    assert evaluate(taught, VALID)["accuracy"] > evaluate(shallow, VALID)["accuracy"] + 0.01
    first = {n: v for n, v in gradient_alignment(rule, make(), BATCH).items() if "weight" in n and v == v}
    last = {n: v for n, v in gradient_alignment(rule, taught, BATCH).items() if n in first}
    assert sum(last.values()) > sum(first.values())
    assert gradient_alignment(rule, taught, BATCH)[list(first)[-1]] == pytest.approx(1, abs=1e-5)


def test_feedback_is_drawn_once_and_saved():
    rule, other = DFA(), DFA()
    model = mlp(16)
    state = rule.fit(model, TRAIN.batches(64), epochs=1, seed=3).state
    later = other.fit(model, TRAIN.batches(64), epochs=2, seed=4, resume=state).state  # the saved matrix counts, not the new seed
    assert torch.equal(state["parts"]["feedback"]["matrix"], RandomFeedback(10, 16, seed=3).matrix)
    assert torch.equal(state["parts"]["feedback"]["matrix"], later["parts"]["feedback"]["matrix"])


def test_a_linear_model_gets_its_gradient_and_frozen_blocks_none():
    linear = nn.Sequential(nn.Linear(64, 10))
    twin = deepcopy(linear)
    DFA().fit(linear, TRAIN.batches(64), epochs=1)
    Backprop(optimizer=partial(Adam, lr=1e-3)).fit(twin, TRAIN.batches(64), epochs=1)
    torch.testing.assert_close(linear[0].weight, twin[0].weight)
    model = mlp(16, 12)
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    state = DFA().fit(model, TRAIN.batches(64), epochs=1).state
    assert torch.equal(before, model[2].weight)
    assert state["parts"]["feedback"]["matrix"].shape == (16, 10)


def test_ternary_errors():
    e = torch.tensor([[0.3, -0.05, -0.9, 0.1]])
    assert ternarise(e, 0.1).tolist() == [[1.0, 0.0, -1.0, 0.0]]


def test_a_perfect_opu_is_a_product_and_frames_average_out():
    e = ternarise(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), 0.5)
    perfect = OPU(10, 300, noise=0, levels=None, seed=1)
    torch.testing.assert_close(perfect.project(e), e @ perfect.real.T)
    torch.testing.assert_close(perfect.project(e), RandomFeedback(10, 300, seed=1).project(e))
    assert perfect.counters() == {"frames": 80.0, "seconds": 80 / 1500, "joules": pytest.approx(80 / 1500 * 30)}
    noisy = OPU(10, 300, noise=0.5, levels=None, seed=1)
    torch.manual_seed(0)
    errors = [(torch.stack([noisy.project(e) for _ in range(n)]).mean(0) - e @ noisy.real.T).std().item() for n in (1, 100)]
    assert errors[0] == pytest.approx(0.5 * 2**0.5, rel=0.03)  # two exposures, each with its own noise
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.03)


def test_only_holography_is_linear():
    a, b = torch.eye(10)[:5], -torch.eye(10)[5:]
    c = torch.roll(torch.eye(10)[:5], 1, 1)
    for holography, linear in (("off-axis", True), ("intensity", False)):
        opu = OPU(10, 200, noise=0, levels=None, holography=holography)
        torch.testing.assert_close(opu.project(a) + opu.project(b), opu.project(a + b))  # the masks are shown apart, so signs always add
        gap = (opu.project(a) + opu.project(c) - opu.project(a + c)).abs().max()
        assert (gap < 1e-5) == linear
    speckle = OPU(4, 20_000, noise=0, levels=None, holography="intensity").project(torch.tensor([[1.0, 1, 0, 0]]))
    assert float(speckle.std() / speckle.mean()) == pytest.approx(1, abs=0.03)  # a fully developed speckle


def test_the_converter_rounds_and_clips():
    e = ternarise(torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), 0.5)
    exact = e @ OPU(10, 40).real.T
    for levels in (16, 256):
        opu = OPU(10, 40, noise=0, levels=levels, saturation=2.0)
        seen = opu.expose((e > 0).float())
        assert len(seen.unique()) <= levels
        assert float(seen.abs().max()) <= 2.0
    fine = OPU(10, 40, noise=0, levels=4096)
    assert float((fine.project(e) - exact).abs().max()) < 2 * 2 * 4 / 4095


def test_what_cannot_be_used_is_refused():
    with pytest.raises(BadInput, match="ternarise the error"):
        DFA(projector=OPU).fit(mlp(8), TRAIN.batches(64), epochs=1)
    for settings in ({"holography": "x"}, {"noise": -1.0}, {"levels": 1}):
        with pytest.raises(BadInput):
            OPU(3, 4, **settings)
    with pytest.raises(BadInput, match="distribution"):
        RandomFeedback(3, 4, distribution="x")
    with pytest.raises(BadInput, match="threshold"):
        DFA(ternary=-1.0).fit(mlp(8), TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="no samples"):
        DFA().fit(mlp(8), [], epochs=1)
    with pytest.raises(Diverged):
        DFA().fit(mlp(8), [(BATCH[0] * torch.nan, BATCH[1])], epochs=1)

    class Hard(nn.Linear):
        def forward(self, x):
            return (super().forward(x) > 0).float()

    with pytest.raises(UnsupportedModel, match=r"^2: its output carries no gradient"):
        DFA().fit(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), Hard(8, 8), nn.Linear(8, 10)), TRAIN.batches(64), epochs=1)
