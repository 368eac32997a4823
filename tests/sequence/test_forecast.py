"""AR-Net and the classical estimators against least squares, statsmodels, closed-form forecasts and hand-computed penalties."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from neurarium import data
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Diverged
from neurarium.sequence.forecast import ARNet, ClassicAR, Windows, stpe

SPARSE = [0.2, 0, 0.3, 0, 0, 0, 0, 0, 0, -0.5]
AR3 = [0.2, 0.3, -0.5]


def lstsq(series, p):
    """numpy's least squares with an intercept: (intercept, coefficients lag 1 first)."""
    y = series.numpy()
    columns = [np.ones(len(y) - p)] + [y[p - i : len(y) - i] for i in range(1, p + 1)]
    solution = np.linalg.lstsq(np.stack(columns, 1), y[p:], rcond=None)[0]
    return solution[0], solution[1:]


def companion(w):
    top = torch.as_tensor(w, dtype=torch.float64)
    return torch.cat([top[None], torch.eye(len(top), dtype=torch.float64)[:-1]])


def test_full_batch_lbfgs_is_least_squares():
    series = data.arma(AR3, [], 500, seed=1) * 4 + 10
    torch.manual_seed(0)
    net, windows = ARNet(5).double(), Windows(series, 5)
    net.mean.fill_(series.mean())
    net.scale.fill_(series.std())
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = ((net(windows.x) - windows.y) / net.scale).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    intercept, coefficients = lstsq(series, 5)
    np.testing.assert_allclose(net.coefficients[0], coefficients, atol=1e-6)
    assert net.intercept.item() == pytest.approx(intercept, abs=1e-5)


def test_stochastic_training_finds_the_least_squares_coefficients():
    series = data.arma(AR3, [], 8000, seed=2) * 3 - 7
    torch.manual_seed(0)
    net = ARNet(6)
    history = net.fit(series, epochs=8)
    classic = ClassicAR(6).fit(series)
    assert stpe(net.coefficients, classic.coefficients) < 2
    assert net.intercept.item() == pytest.approx(classic.intercept, abs=0.2)
    assert len(history.train) == 8
    assert history.last["loss"] * series.var().item() == pytest.approx(9 * 1.0, rel=0.05)  # the innovations' variance, in the series' units


def test_lag_one_is_the_last_input():
    net = ARNet(4)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[0.0, 0, 0, 1]]))
        net.layers[0].bias.zero_()
    assert net.coefficients.tolist() == [[1, 0, 0, 0]]
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(net(x), x[:, -1:])  # w = e_1 repeats the most recent value
    shift = data.arma([0.9], [], 4000, seed=0)
    net.fit(shift, epochs=2)
    assert net.coefficients[0].argmax() == 0
    assert ClassicAR(4).fit(shift).coefficients.argmax() == 0


def test_penalty_is_the_papers():
    net = ARNet(3, sparsity=0.25, reg_c=(3.0, 3.0), reg_strength=0.02)
    w = torch.tensor([[0.5, -1.5, 1e-3]])
    expected = sum(2 / (1 + math.exp(-3 * (abs(v) + 1e-6) ** (1 / 3) + 3 * 1e-2)) - 1 for v in w[0].tolist()) / 3
    assert net.penalty(w).item() == pytest.approx(expected, rel=1e-5)
    assert net.penalty(w).item() == pytest.approx(sum(2 / (1 + math.exp(-3 * abs(v) ** (1 / 3))) - 1 for v in w[0].tolist()) / 3, rel=0.05)
    assert net.penalty(torch.zeros(1, 3)) == 0
    assert net.penalty(-w) == net.penalty(w)
    with torch.no_grad():
        net.layers[0].weight.copy_(w)
    assert net.regulariser(0.25).item() == pytest.approx(0.02 * 3 * 0.5 * expected, rel=1e-5)
    assert net.regulariser(0.5) == net.regulariser(1.0)
    assert net.regulariser(0.0) == 0
    for share in (None, 1.0):
        assert ARNet(3, sparsity=share).regulariser(1.0) == 0


@pytest.mark.parametrize("c", [(2.0, 2.0), (3.0, 3.0)])
def test_gradient_of_the_penalty(c):
    net, w = ARNet(4, reg_c=c), torch.tensor([[0.5, -1.5, 1e-3, 0.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net.penalty(w), w)
    a = w.detach().abs() + 1e-6
    z = c[0] * (a ** (1 / c[1]) - 1e-6 ** (1 / c[1]))
    formula = w.detach().sign() * 2 * z.exp() / (1 + z.exp()) ** 2 * c[0] / c[1] * a ** (1 / c[1] - 1) / 4
    torch.testing.assert_close(grad, formula)
    assert grad[0, 3] == 0  # finite at zero, where the root's slope is not


def test_sparse_training_selects_the_true_lags():
    series = data.arma(SPARSE, [], 8000, seed=0)
    torch.manual_seed(0)
    sparse, dense = ARNet(40, sparsity=3 / 40), ARNet(40)
    for net in (sparse, dense):
        net.fit(series, epochs=12)
    truth = torch.tensor(SPARSE)
    assert set(sparse.coefficients[0].abs().topk(3).indices.tolist()) == {0, 2, 9}
    assert stpe(sparse.coefficients, truth) < 0.4 * stpe(dense.coefficients, truth)
    assert stpe(sparse.coefficients, truth) < 0.4 * stpe(ClassicAR(40).fit(series).coefficients, truth)


def test_horizon_coefficients_are_companion_powers():
    series = data.arma(AR3, [], 20_000, seed=3)
    torch.manual_seed(0)
    net = ARNet(3, horizon=4)
    net.fit(series, epochs=5)
    power = torch.eye(3, dtype=torch.float64)
    for k in range(4):
        power = power @ companion(AR3)
        torch.testing.assert_close(net.coefficients[k].double(), power[0], atol=0.03, rtol=0)


def test_forecasts():
    net = ARNet(1)
    with torch.no_grad():
        net.layers[0].weight.fill_(0.8)
        net.layers[0].bias.zero_()
    powers = 0.8 ** torch.arange(1.0, 6)
    torch.testing.assert_close(net.forecast(torch.tensor([1.0, 2.0]), 5), 2 * powers)
    torch.testing.assert_close(net.forecast(torch.tensor([[1.0], [3.0]]), 5), torch.stack([powers, 3 * powers]))
    series = data.arma(AR3, [], 2000, seed=0) + 5
    classic = ClassicAR(3).fit(series)
    state, c = series[-3:].flip(0), companion(classic.coefficients)
    expected = []
    for _ in range(6):
        state = c @ state + torch.tensor([classic.intercept, 0, 0], dtype=torch.float64)
        expected.append(state[0])
    torch.testing.assert_close(classic.forecast(series, 6), torch.stack(expected))
    wide = ARNet(3, horizon=4)
    wide.fit(series, epochs=1)
    assert wide.forecast(series, 6).shape == (6,)
    torch.testing.assert_close(wide.forecast(series.float(), 6)[:4], wide(series[None, -3:].float())[0])
    assert wide.forecast(series, 0).shape == (0,)


def test_deterministic_by_seed_and_state_dict():
    series = data.arma(AR3, [], 600, seed=0)

    def train(seed):
        torch.manual_seed(1)
        net = ARNet(4, hidden=(8,), loss="huber")
        return net, net.fit(series[:500], epochs=2, seed=seed, val=series[500:])

    (one, first), (two, second), (other, _) = train(0), train(0), train(5)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)
    assert len(first.val) == 2
    fresh = ARNet(4, hidden=(8,))
    fresh.load_state_dict(one.state_dict())  # the scale travels along
    assert torch.equal(fresh(series[None, :4].float()), one(series[None, :4].float()))
    with pytest.raises(UnsupportedModel, match="hidden"):
        one.coefficients  # noqa: B018


@pytest.mark.parametrize("method", ["ols", "normal"])
@pytest.mark.parametrize("p", [1, 3, 24])
def test_least_squares_is_numpys_and_statsmodels(method, p):
    series = data.arma(SPARSE, [0.4], 700, seed=4) + 3
    ours = ClassicAR(p, method).fit(series)
    intercept, coefficients = lstsq(series, p)
    np.testing.assert_allclose(ours.coefficients, coefficients, atol=1e-9)
    assert ours.intercept == pytest.approx(intercept, abs=1e-8)
    ar_model = pytest.importorskip("statsmodels.tsa.ar_model")
    fitted = ar_model.AutoReg(series.numpy(), p, trend="c").fit()
    np.testing.assert_allclose([ours.intercept, *ours.coefficients], fitted.params, atol=1e-6)
    assert ours.noise_variance == pytest.approx(fitted.sigma2, rel=1e-9)
    np.testing.assert_allclose(ours.forecast(series, 5), fitted.forecast(5), atol=1e-8)


@pytest.mark.filterwarnings("ignore:yule_walker currently returns")
def test_yule_walker_and_burg_are_statsmodels():
    regression = pytest.importorskip("statsmodels.regression.linear_model")
    series = data.arma(AR3, [], 400, seed=5)
    for method, theirs in (("yule-walker", partial(regression.yule_walker, method="mle")), ("burg", regression.burg)):
        ours = ClassicAR(6, method).fit(series)
        rho, sigma = theirs(series.numpy(), 6)[:2]
        np.testing.assert_allclose(ours.coefficients, rho, atol=1e-9)
        if method == "yule-walker":  # Burg's noise variance has several definitions
            assert ours.noise_variance == pytest.approx(sigma**2, rel=1e-9)


def test_yule_walker_on_exact_autocovariances():
    from neurarium.sequence import forecast

    w, p = torch.tensor(AR3, dtype=torch.float64), 3
    gamma = torch.linalg.solve(
        torch.eye(9, dtype=torch.float64) - torch.kron(companion(w), companion(w)), torch.eye(9, dtype=torch.float64)[0]
    )
    gamma = gamma.view(3, 3)[0]  # autocovariances of lags 0..2 of the stationary law, unit noise
    gamma = torch.cat([gamma, (w @ gamma.flip(0))[None]])
    paths = forecast._levinson(gamma, p)
    torch.testing.assert_close(paths[0][-1], w)
    assert paths[1][-1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["ols", "normal", "yule-walker", "burg"])
def test_order_selection_and_noise_variance(method):
    series = data.arma(AR3, [], 4000, noise=2.0, seed=6)
    chosen = ClassicAR(12, method, criterion="bic").fit(series)
    assert chosen.order == 3
    assert len(chosen.coefficients) == 3
    assert chosen.noise_variance == pytest.approx(4, rel=0.06)
    assert ClassicAR(12, method, criterion="aic").fit(series).order >= 3
    if method == "ols":  # the nested fits of one decomposition are the fits on the same rows
        y, p = series - series.mean(), 12
        columns = torch.stack([y[p - i : len(y) - i] for i in range(1, 4)], 1)
        direct = torch.linalg.lstsq(columns - columns.mean(0), y[p:] - y[p:].mean()).solution
        torch.testing.assert_close(chosen.coefficients, direct)


def test_stpe():
    assert stpe(torch.tensor([1.0, 2]), torch.tensor([1.0, 2])) == 0
    assert stpe(torch.tensor([1.0]), torch.tensor([0.5, 0.5])) == pytest.approx(100 * 1 / 2)
    assert stpe(torch.tensor([1.0]), torch.tensor([-1.0])) == 100


def test_refusals():
    nan = torch.ones(50)
    nan[7] = math.nan
    for model in (ARNet(3), ClassicAR(3), ClassicAR(3, "normal")):
        with pytest.raises(BadInput, match="step 7"):
            model.fit(nan)
        with pytest.raises(BadInput, match="constant"):
            model.fit(torch.full((50,), 3.3))
        with pytest.raises(BadInput, match="of order 3"):
            model.fit(torch.randn(3))
        with pytest.raises(BadInput, match="one series"):
            model.fit(torch.randn(30, 2))
    line = torch.arange(60.0)
    for method in ("ols", "normal"):
        with pytest.raises(BadInput, match="linearly dependent"):
            ClassicAR(4, method).fit(line)
    with pytest.raises(BadInput, match="as many values of history"):
        ARNet(3).forecast(torch.ones(2), 1)
    with pytest.raises(BadInput, match="batch, 3"):
        ARNet(3)(torch.ones(2, 4))
    for bad in ({"order": 0}, {"order": 2, "sparsity": 0.0}, {"order": 2, "loss": "l1"}, {"order": 2, "hidden": (0,)}):
        with pytest.raises(BadInput):
            ARNet(**bad)
    with pytest.raises(BadInput):
        ClassicAR(3, "mle")
    net = ARNet(3)
    nn.init.constant_(net.layers[0].bias, math.nan)
    with pytest.raises(Diverged, match="epoch 0"):
        net.fit(torch.randn(50), epochs=2)


def test_refusals_speak_of_the_order_and_of_fit():
    with pytest.raises(BadInput, match=r"order 3 .*at least 8 values, got 7"):
        ClassicAR(3).fit(torch.randn(7))
    for call in (lambda m: m.predict(torch.ones(3)), lambda m: m.forecast(torch.ones(3), 2)):
        with pytest.raises(BadInput, match="call fit first"):
            call(ClassicAR(3))
    history = torch.ones(9)
    history[-2] = math.nan
    for model in (ARNet(3), ClassicAR(3).fit(data.arma(AR3, [], 200, seed=0))):
        with pytest.raises(BadInput, match="NaN"):
            model.forecast(history, 2)
