"""Two-stage training: the equivalence that the method stands on, exact linear algebra, and what it does to the user's model."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import DataLoader

from neurarium import data
from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn import Diverged, EarlyStopping, evaluate
from neurarium.learn.two_stage import (
    OIGBP,
    OIGHWO,
    OWOBP,
    OWOHWO,
    TwoLayerMLP,
    TwoStage,
    direction,
    input_gains,
    levenberg_marquardt,
    net_control_,
    output_weights,
    solve_gram,
    step_factor,
    symmetric_solve,
    unit_factors,
)  # fmt: skip

DOUBLE = torch.float64


def problem(n=60, inputs=4, hidden=5, outputs=3, seed=0):
    """Inputs with a one appended, and tensors of every other size."""
    torch.manual_seed(seed)
    a = torch.cat([torch.randn(n, inputs, dtype=DOUBLE), torch.ones(n, 1, dtype=DOUBLE)], 1)
    w, w_oh, t = (torch.randn(shape, dtype=DOUBLE) for shape in ((hidden, inputs + 1), (outputs, hidden), (n, outputs)))
    return a, w, w_oh, t


def curve(n=200, inputs=3, outputs=1, seed=0, dtype=DOUBLE):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g, dtype=DOUBLE)
    t = torch.stack([torch.sin(2 * x[:, i % inputs]) + x[:, 0] * x[:, -1] for i in range(outputs)], 1)
    return x.to(dtype), t.to(dtype)


def mlp(inputs=3, hidden=8, outputs=1, seed=0, dtype=DOUBLE, **options):
    torch.manual_seed(seed)
    return TwoLayerMLP(inputs, hidden, outputs, dtype=dtype, **options)


def error(a, w, w_oh, t):
    return (t - torch.tanh(a @ w.T) @ w_oh.T).square().sum() / len(a)


def parts(a, w, w_oh, t):
    n = a @ w.T
    return 1 - torch.tanh(n) ** 2, t - torch.tanh(n) @ w_oh.T


def test_direction_is_the_negative_gradient():
    a, w, w_oh, t = problem()
    slope, residual = parts(a, w, w_oh, t)
    torch.testing.assert_close(direction(a, slope, residual, w_oh), -jacrev(lambda w: error(a, w, w_oh, t))(w))


@pytest.mark.parametrize("what", ["gains", "units", "step"])
def test_factors_are_newton_on_the_linearised_network(what):
    a, w, w_oh, t = problem()
    slope, residual = parts(a, w, w_oh, t)
    g = direction(a, slope, residual, w_oh)
    moved = {
        "gains": lambda r: w + g * r,
        "units": lambda r: w + r[:, None] * g,
        "step": lambda r: w + r * g,
    }[what]
    size = {"gains": g.shape[1], "units": g.shape[0], "step": 1}[what]
    start = torch.zeros(size, dtype=DOUBLE)
    outputs = torch.tanh(a @ w.T) @ w_oh.T
    jacobian = jacrev(lambda r: torch.tanh(a @ moved(r).T) @ w_oh.T)(start)

    def linearised(r):
        return (t - outputs - jacobian @ r).square().sum() / len(a)

    gradient, curvature = -jacrev(linearised)(start), hessian(linearised)(start)
    if what == "step":
        torch.testing.assert_close(step_factor(a, slope, residual, w_oh, g), (gradient / curvature[0])[0])
        ours = input_gains(a, slope, residual, w_oh, g)  # one factor is the gains with all of them equal
        torch.testing.assert_close(ours[0].sum() / ours[1].sum(), step_factor(a, slope, residual, w_oh, g))
        return
    ours = (input_gains if what == "gains" else unit_factors)(a, slope, residual, w_oh, g)
    torch.testing.assert_close(ours[0], gradient)
    torch.testing.assert_close(ours[1], curvature)
    torch.testing.assert_close(symmetric_solve(ours[1], ours[0]), torch.linalg.solve(curvature, gradient))


def test_training_on_transformed_inputs_is_multiplying_the_step_by_the_transformations_square():
    """One step on x' = A x, mapped back, is W + z G A'A."""
    x, t = curve()
    torch.manual_seed(1)
    transform = torch.eye(3, dtype=DOUBLE) + 0.4 * torch.randn(3, 3, dtype=DOUBLE)
    plain = mlp()
    OWOBP(ridge=0).fit(plain, [(x, t)], epochs=0)
    twin = deepcopy(plain)
    with torch.no_grad():
        twin.hidden.weight.copy_(plain.hidden.weight @ torch.linalg.inv(transform))
    OWOBP(ridge=0, net_control=False).fit(twin, [(x @ transform.T, t)], epochs=1)

    a = torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)
    w = torch.cat([plain.hidden.weight, plain.hidden.bias[:, None]], 1).detach()
    o = torch.sigmoid(a @ w.T)
    solved = output_weights(a, o, t, 0)
    slope, residual, w_oh = o * (1 - o), t - torch.cat([a, o], 1) @ solved.T, solved[:, 4:]
    square = torch.block_diag(transform.T @ transform, torch.ones(1, 1, dtype=DOUBLE))
    g = direction(a, slope, residual, w_oh) @ square
    want = w + step_factor(a, slope, residual, w_oh, g) * g
    torch.testing.assert_close(twin.hidden.weight @ transform, want[:, :3], rtol=0, atol=1e-10)
    torch.testing.assert_close(twin.hidden.bias, want[:, 3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [OWOHWO, OIGHWO])
def test_hwo_is_blind_to_linear_maps_of_the_inputs_and_gains_are_not(rule):
    x, t = curve()
    torch.manual_seed(1)
    transform = torch.eye(3, dtype=DOUBLE) + 0.4 * torch.randn(3, 3, dtype=DOUBLE)
    plain, twin = mlp(), mlp()
    with torch.no_grad():
        twin.hidden.weight.copy_(plain.hidden.weight @ torch.linalg.inv(transform))
    rule(ridge=0).fit(plain, [(x, t)], epochs=5)
    rule(ridge=0).fit(twin, [(x @ transform.T, t)], epochs=5)
    gap = (plain(x) - twin(x @ transform.T)).abs().max()
    assert gap < 1e-8 if rule is OWOHWO else gap > 1e-3


def test_hwo_is_the_gradient_step_on_whitened_inputs():
    a, w, w_oh, t = problem(n=200)
    slope, residual = parts(a, w, w_oh, t)
    whitener = torch.linalg.inv(torch.linalg.cholesky(a.T @ a / len(a)))
    on_white = direction(a @ whitener.T, slope, residual, w_oh) @ whitener
    ours = solve_gram(a, direction(a, slope, residual, w_oh).T * len(a), 0).T
    torch.testing.assert_close(ours, on_white, rtol=0, atol=1e-8)
    torch.testing.assert_close(solve_gram(a, direction(a, slope, residual, w_oh).T * len(a), 1e-12).T, on_white, rtol=0, atol=1e-8)


def test_one_input_has_gains_in_closed_form():
    a, w, w_oh, t = problem(inputs=1, hidden=3, outputs=1)
    slope, residual = parts(a, w, w_oh, t)
    g = direction(a, slope, residual, w_oh)
    u, v = (a[:, m] * (slope * w_oh[0] * g[:, m]).sum(1) for m in range(2))
    uu, uv, vv, ue, ve = u @ u, u @ v, v @ v, u @ residual[:, 0], v @ residual[:, 0]
    determinant = uu * vv - uv * uv
    want = torch.stack([(vv * ue - uv * ve) / determinant, (uu * ve - uv * ue) / determinant])
    gradient, curvature = input_gains(a, slope, residual, w_oh, g)
    torch.testing.assert_close(symmetric_solve(curvature, gradient), want)


@pytest.mark.parametrize("ridge", [0, 1e-14])
def test_output_weights_are_least_squares(ridge):
    a, w, _, t = problem()
    o = torch.tanh(a @ w.T)
    want = np.linalg.lstsq(torch.cat([a, o], 1).numpy(), t.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(output_weights(a, o, t, ridge).numpy(), want, atol=1e-10)


def test_after_each_iteration_the_output_weights_are_optimal_and_the_error_never_rises():
    x, t = curve(outputs=2)
    for rule in (OWOBP(), OIGBP(), OWOHWO(), OIGHWO(), TwoStage("bp", gains=False, molf=True), TwoStage("hwo", gains=False, molf=True)):
        model = mlp(outputs=2)
        history = rule.fit(model, [(x, t)], epochs=12, val=[(x, t)])
        losses = [e["loss"] for e in history.train]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.97 * losses[0]
        assert losses[-1] == pytest.approx(history.val[-1]["loss"], rel=1e-9)
        basis = torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE), model.activation(model.hidden(x))], 1)
        assert (basis.T @ (t - model(x))).abs().max() < 1e-3  # the residual is orthogonal to the basis
        assert len(history.extra["multiplies"]) == len(history.extra["halvings"]) == 12


def test_gains_help_where_inputs_are_mixed():
    x, t = curve(n=400, inputs=5)
    x[:, 3:] *= 4  # inputs that say nothing, loudly
    end = {}
    for rule in (OWOBP, OIGBP):
        model = mlp(inputs=5)
        end[rule] = rule().fit(model, [(x, t)], epochs=30).last["loss"]
    assert end[OIGBP] < 0.8 * end[OWOBP]


class Overshoot(TwoStage):
    def update(self, p, w, n, outputs):
        step, work = super().update(p, w, n, outputs)
        return 4096 * step, work


def test_a_step_that_raises_the_error_is_halved_until_it_does_not_or_taken_back():
    x, t = curve(n=100)
    history = Overshoot().fit(mlp(), [(x, t)], epochs=3)
    assert history.extra["halvings"][0] > 5
    assert history.last["loss"] < history.train[0]["loss"]
    model = mlp()
    start = Overshoot().fit(model, [(x, t)], epochs=0)
    short = Overshoot(max_halvings=0).fit(model, [(x, t)], epochs=2)
    assert start.train == ()
    assert short.train[0]["loss"] == short.train[1]["loss"] == pytest.approx(evaluate(model, [(x, t)], loss="mse")["loss"])


def test_net_control_gives_each_unit_the_same_net_function():
    x, _ = curve()
    model = mlp()
    net_control_(model, x)
    n = model.hidden(x)
    torch.testing.assert_close(n.mean(0), torch.full((8,), 0.5, dtype=DOUBLE))
    torch.testing.assert_close(n.std(0, correction=0), torch.ones(8, dtype=DOUBLE))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Softplus(), nn.Tanh()], ids=str)
def test_an_ordinary_sequential_of_float32_is_trained(activation):
    x, t = curve(outputs=2, dtype=torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 20), activation, nn.Linear(20, 2, bias=False))
    history = OIGHWO().fit(model, [(x.view(-1, 3, 1)[:150], t[:150]), (x.view(-1, 3, 1)[150:], t[150:])], epochs=10)
    assert history.last["loss"] < 0.5 * float(t.var())
    assert history.last["loss"] == pytest.approx(evaluate(model, [(x, t)], loss="mse")["loss"], rel=1e-4)


def test_integer_classes_are_one_hot_targets():
    task = data.images("digits", train=600)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30, bias=False), nn.Sigmoid(), nn.Linear(30, 10))
    history = OIGHWO().fit(model, task.train.batches(100), epochs=8, val=task.test.batches(500, shuffle=False))
    assert history.last["accuracy"] > 0.95
    assert history.val[-1]["accuracy"] == evaluate(model, task.test.batches(500, shuffle=False))["accuracy"] > 0.88


def test_dependent_and_constant_inputs_are_fine():
    x, t = curve()
    x = torch.cat([x, x[:, :1] + x[:, 1:2], torch.ones(len(x), 1, dtype=DOUBLE), torch.zeros(len(x), 1, dtype=DOUBLE)], 1)
    for ridge in (1e-8, 0):
        history = OIGHWO(ridge=ridge).fit(mlp(inputs=6), [(x, t)], epochs=10)
        assert np.isfinite(history.last["loss"])
        assert history.last["loss"] < history.train[0]["loss"]


def test_levenberg_marquardt_ends_where_scipy_does():
    model = mlp(inputs=2, hidden=2, activation="tanh", bypass=False)  # the true network, slightly off, with noise on the targets
    torch.manual_seed(3)
    x = 2 * torch.randn(60, 2, dtype=DOUBLE)
    t = model(x).detach() + 0.02 * torch.randn(60, 1, dtype=DOUBLE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def residuals(v):
        split = torch.from_numpy(v).split([s.numel() for s in shapes])
        return (functional_call(model, {n: p.view(s) for n, p, s in zip(names, split, shapes)}, (x,)) - t).flatten().detach().numpy()

    start = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    found = least_squares(residuals, start, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    want = found.cost * 2 / len(x)
    history = levenberg_marquardt(model, x, t, iters=60)
    assert history.last["loss"] == pytest.approx(want, rel=1e-6)
    assert history.last["loss"] == pytest.approx(evaluate(model, [(x, t)], loss="mse")["loss"])
    with pytest.raises(BadInput, match="finite"):
        levenberg_marquardt(model, x * torch.nan, t, iters=1)


def test_a_run_on_a_shuffled_loader_resumes_bit_for_bit():
    x, t = curve(dtype=torch.float32)

    def loader():
        return DataLoader(TensorData(x, t), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(4))

    whole, half, fresh = (mlp(dtype=torch.float32, seed=s) for s in (0, 0, 7))
    want = OIGHWO().fit(whole, loader(), epochs=6)
    state = OIGHWO().fit(half, loader(), epochs=2).state
    got = OIGHWO().fit(fresh, loader(), epochs=6, resume=state)
    assert got.extra == want.extra
    for a, b in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_can_stop_it_early_with_the_best_weights():
    x, t = curve(n=80, inputs=6)
    t = t + torch.randn(80, 1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    val = [(x[40:], t[40:])]
    model = mlp(inputs=6, hidden=12)
    history = OIGHWO().fit(model, [(x[:40], t[:40])], epochs=50, val=val, callbacks=[EarlyStopping(3)])
    assert len(history.train) < 50
    assert evaluate(model, val, loss="mse")["loss"] == pytest.approx(min(e["loss"] for e in history.val))
    assert len(history.extra["multiplies"]) == len(history.train)


def test_what_cannot_be_trained_is_refused_by_name():
    x, t = curve()
    for model, name, why in (
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), "3", "too many"),
        (nn.Sequential(nn.Linear(3, 1)), "0", "here is less"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "1", "here is less"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1)), "2", "must be a Linear"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)), "1", "draws at random"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 1)), "1", "each element alone"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)), "1", "each element alone"),
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 1)), "1", "parameters of its own"),
        (nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 1)), "0", "frozen"),
    ):
        with pytest.raises(UnsupportedModel, match=why) as refused:
            OIGHWO().fit(model.double(), [(x, t)], epochs=1)
        assert refused.value.module == name


def test_bad_input_is_refused():
    x, t = curve()
    for loader, why in (
        ([], "no samples"),
        ([(x * torch.nan, t)], "not finite"),
        ([(x, t[:, 0])], "need"),
        ([(x, t / 0)], "not finite"),
        ([(x, torch.full((200,), 3))], "classes 3 to 3"),
    ):
        with pytest.raises(BadInput, match=why):
            OIGHWO().fit(mlp(), loader, epochs=1)
    for settings, why in (({"direction": "up"}, "direction"), ({"molf": True}, "gains=False"), ({"ridge": -1}, "negative")):
        with pytest.raises(BadInput, match=why):
            TwoStage(**settings)
    with pytest.raises(BadInput, match="activation"):
        TwoLayerMLP(1, 1, 1, activation="sigmoidal")
    broken = mlp()
    with torch.no_grad():
        broken.hidden.weight[0, 0] = torch.inf
    with pytest.raises(Diverged, match=r"step 0.*'hidden'") as raised:
        OIGHWO().fit(broken, [(x, t)], epochs=1)
    assert raised.value.module == "hidden"
