"""AR-Net against classical auto-regression: same coefficients, sparse lags, time by order, and a measured series.

1. *Equality*: three random stationary AR(3) processes and a sparse AR(10), fitted at orders 3 and 20. The distance between the estimators
   is what is asked; their common distance to the truth would hide a network that has not converged.
2. *Sparsity*: the sparse AR(10) at orders 20 and 100, errors on a fresh series. ``lasso_cv`` is the classical rival; ``l1`` is AR-Net with
   the absolute value for its penalty, at the best of four strengths *by its distance to the truth*, an advantage that it would not have in
   practice. ``sparse`` has the library's default strength.
3. *Time*: one fit by order, AR-Net at a fixed number of epochs, one thread. Least squares three ways: QR, normal equations (that use the
   shifts of the lags), and Yule-Walker, which is nearly free.
4. *Measured*: ETTh1 oil temperature and one load, a day ahead from a week. Scaled by the training year, tested on the last four months.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from neurarium import data
from neurarium.sequence.forecast import ARNet, ClassicAR, Windows, diebold_mariano, mae, mase, seasonal_naive, stpe

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

SPARSE = (0.2, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.5)
LAGS = (0, 2, 9)
COUNTED = 0.05  # a coefficient above this counts as selected
STRENGTHS = (0.02, 0.05, 0.1, 0.2)  # of the l1 ablation
COLUMNS = ("OT", "HUFL")
WEEK, DAY = 168, 24


def run(trial: Trial) -> None:
    n = trial.scale(smoke=1500, laptop=20_000)
    epochs = trial.scale(smoke=2, laptop=20)
    orders = trial.scale(smoke=(8, 16, 32, 64), laptop=(25, 50, 100, 200, 400, 800, 1600))
    for arm in trial.arms("ols_lstsq", "ols_normal", "yule_walker", "arnet", "sparse", "l1", "lasso_cv", "seasonal_naive"):
        estimate = ESTIMATORS.get(arm.name)
        if arm.name in ("ols_lstsq", "ols_normal", "yule_walker", "arnet"):
            arm.log(**equality(estimate, n, epochs, trial.seed))
            seconds = time_by_order(estimate, n, orders, trial.seed)
            arm.log_timed(slope=np.polyfit(np.log(orders[-4:]), np.log(seconds[-4:]), 1)[0], fit_seconds=seconds)  # 200 to 1600
            arm.curve("seconds_by_order", orders, seconds, timed=True)
        if arm.name in ("ols_lstsq", "arnet", "sparse", "l1", "lasso_cv"):
            metrics, coefficients = selection(estimate, n, epochs, trial)
            arm.log(**metrics)
            arm.curve("coefficients", range(1, len(coefficients) + 1), coefficients)
        if arm.name in ("ols_lstsq", "yule_walker", "arnet", "sparse", "seasonal_naive"):
            arm.log(**measured(arm.name, trial))


# The estimators: (series, order, epochs, seed) -> coefficients (order,), lag 1 first.


def network(series: Tensor, order: int, epochs: int, seed: int, make: Callable[[int], ARNet] = ARNet) -> Tensor:
    torch.manual_seed(seed)
    net = make(order)
    net.fit(series, epochs=epochs, seed=seed)
    return net.coefficients[0].double()


class L1Net(ARNet):
    """The ablation: the plain absolute value, which shrinks large weights as hard as small ones."""

    def penalty(self, weight: Tensor) -> Tensor:
        return weight.abs().mean()


def l1(series: Tensor, order: int, epochs: int, seed: int) -> Tensor:
    fits = [
        network(series, order, epochs, seed, lambda p, s=s: L1Net(p, sparsity=len(LAGS) / p, reg_strength=s)) for s in STRENGTHS
    ]  # fmt: skip
    return min(fits, key=lambda w: stpe(w, torch.tensor(SPARSE)))


def lasso(series: Tensor, order: int, epochs: int, seed: int) -> Tensor:
    from sklearn.linear_model import LassoCV
    from sklearn.model_selection import TimeSeriesSplit

    windows = Windows(series, order)
    model = LassoCV(cv=TimeSeriesSplit(5)).fit(windows.x.numpy(), windows.y[:, 0].numpy())
    return torch.from_numpy(model.coef_[::-1].copy())


ESTIMATORS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "ols_lstsq": lambda series, order, epochs, seed: ClassicAR(order, "ols").fit(series).coefficients,
    "ols_normal": lambda series, order, epochs, seed: ClassicAR(order, "normal").fit(series).coefficients,
    "yule_walker": lambda series, order, epochs, seed: ClassicAR(order, "yule-walker").fit(series).coefficients,
    "arnet": network,
    "sparse": lambda series, order, epochs, seed: network(series, order, epochs, seed, lambda p: ARNet(p, sparsity=len(LAGS) / p)),
    "l1": l1,
    "lasso_cv": lasso,
}


def equality(estimate: Callable, n: int, epochs: int, seed: int) -> dict[str, float]:
    """Distances in percent, means over the four processes."""
    processes = [random_stationary(3, 1000 * seed + i) for i in range(3)] + [list(SPARSE)]
    out = {}
    for p in (3, 20):
        gaps, errors = [], []
        for i, truth in enumerate(processes):
            if len(truth) > p:
                continue
            series = data.arma(truth, [], n, seed=100 * seed + i)
            weights = estimate(series, p, epochs, seed)
            gaps.append(stpe(weights, ClassicAR(p).fit(series).coefficients))
            errors.append(stpe(weights, torch.tensor(truth)))
        out |= {f"stpe_to_ols_p{p}": float(np.mean(gaps)), f"stpe_to_truth_p{p}": float(np.mean(errors))}
    return out


def random_stationary(order: int, seed: int) -> list[float]:
    """Coefficients uniform in [-1, 1], scaled so that their absolute values add up to 0.95 at most, which makes the process stationary."""
    weights = np.random.default_rng(seed).uniform(-1, 1, order)
    return (weights * min(1.0, 0.95 / np.abs(weights).sum())).tolist()


def time_by_order(estimate: Callable, n: int, orders: tuple[int, ...], seed: int) -> list[float]:
    """Wall seconds of one fit (five epochs) by order: the median of three, of one for the high orders."""
    series, out = data.arma(SPARSE, [], n, seed=7 + seed), []
    estimate(series, orders[0], 1, seed)  # first use warms up
    for p in orders:
        spent = []
        for _ in range(3 if p <= 400 else 1):
            began = time.perf_counter()
            estimate(series, p, 5, seed)
            spent.append(time.perf_counter() - began)
        out.append(float(np.median(spent)))
    return out


def selection(estimate: Callable, n: int, epochs: int, trial: Trial) -> tuple[dict[str, float], Tensor]:
    """Distance to the truth, support found, and one-step error on a fresh series, for too high orders."""
    seed, out = trial.seed, {}
    series, fresh = data.arma(SPARSE, [], n, seed=500 + seed), data.arma(SPARSE, [], n, seed=900 + seed)
    for p in (20, 100):
        weights = estimate(series, p, epochs, seed)
        name = f"p{p}"
        windows = Windows(fresh, p)
        true = torch.zeros(p, dtype=torch.bool)
        true[list(LAGS)] = True
        size = weights.abs()
        scores = [f1(size >= threshold, true) for threshold in size.unique()]
        out |= {
            f"stpe_{name}": stpe(weights, torch.tensor(SPARSE)),
            f"support_f1_{name}": f1(size > COUNTED, true),
            f"best_f1_{name}": max(scores),
            f"largest_false_{name}": float(size[~true].max()),
            f"forecast_mse_{name}": (windows.x @ weights.flip(0) - windows.y[:, 0]).square().mean().item(),
        }
    return out, weights


def f1(found: Tensor, true: Tensor) -> float:
    return 2 * int((found & true).sum()) / max(int(found.sum()) + int(true.sum()), 1)


def measured(arm: str, trial: Trial) -> dict[str, float]:
    """Day-ahead forecasts of ETTh1: mean absolute scaled error (units: the error of "same hour yesterday" on the training year)."""
    task = data.series("etth1")
    end, begin = task.borders
    out = {}
    for column in COLUMNS:
        series = task.column(column)
        train = series[: trial.scale(smoke=1000, laptop=end)]
        test = Windows(series[begin - WEEK : trial.scale(smoke=begin + 200, laptop=14_400)], WEEK, DAY)
        predicted = day_ahead(arm, train, test.x, trial)
        out |= {f"mae_{column.lower()}": mae(test.y, predicted), f"mase_{column.lower()}": mase(test.y, predicted, train, DAY)}
        if arm == "arnet":
            rival = day_ahead("ols_lstsq", train, test.x, trial)
            test_of = diebold_mariano(test.y - predicted, test.y - rival, horizon=DAY, power=1)
            out[f"dm_p_{column.lower()}"] = test_of.p_value
    return out


def day_ahead(arm: str, train: Tensor, x: Tensor, trial: Trial) -> Tensor:
    """(n, week) -> (n, day)."""
    if arm == "seasonal_naive":
        return seasonal_naive(x, DAY, DAY)
    if arm in ("ols_lstsq", "yule_walker"):
        return ClassicAR(WEEK, {"ols_lstsq": "ols", "yule_walker": "yule-walker"}[arm]).fit(train).forecast(x, DAY)
    torch.manual_seed(trial.seed)
    net = ARNet(WEEK, DAY, sparsity=0.1 if arm == "sparse" else None)
    net.fit(train, epochs=trial.scale(smoke=1, laptop=20), seed=trial.seed)
    return net.forecast(x, DAY)


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Coefficients, time by order, distance to the truth, and the measured series."""
    fig.set_size_inches(12, 7.5)
    axes = fig.subplots(2, 2)
    names = {"ols_lstsq": "least squares (QR)", "ols_normal": "least squares (shifted Gram)", "yule_walker": "Yule-Walker",
             "arnet": "AR-Net", "sparse": "AR-Net, sparse", "l1": "AR-Net, L1 (oracle)", "lasso_cv": "Lasso (CV)",
             "seasonal_naive": "same hour yesterday"}  # fmt: skip
    colours = {"ols_lstsq": "#000000", "ols_normal": "#999999", "yule_walker": "#E69F00", "arnet": "#56B4E9", "sparse": "#0072B2",
               "l1": "#CC79A7", "lasso_cv": "#009E73", "seasonal_naive": "#D55E00"}  # fmt: skip

    axis, lags = axes[0, 0], np.arange(1, 21)
    axis.vlines([i + 1 for i in LAGS], 0, [SPARSE[i] for i in LAGS], color="0.8", linewidth=14, label="truth")
    for arm, shift in (("ols_lstsq", -0.25), ("arnet", 0.0), ("sparse", 0.25)):
        weights = np.stack([y for _, y in record.curves(arm, "coefficients")])[:, :20]
        axis.errorbar(lags + shift, weights.mean(0), _spread(weights), fmt="o", markersize=4, color=colours[arm], label=names[arm])
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set(xlabel="lag", ylabel="coefficient", title="Sparse AR(10) fitted at order 100 (first 20 lags)", xticks=lags[::3])
    axis.legend(fontsize=8)

    axis = axes[0, 1]
    for arm, mark in zip(("ols_lstsq", "ols_normal", "yule_walker", "arnet"), "so^D"):
        curves = record.curves(arm, "seconds_by_order")
        seconds = np.exp(np.mean([np.log(y) for _, y in curves], 0))
        axis.loglog(curves[0][0], seconds, f"{mark}-", color=colours[arm], label=f"{names[arm]}: p^{record.mean(arm, 'slope'):.2f}")
    axis.set(xlabel="order p", ylabel="seconds a fit, one thread", title="Time by order (AR-Net: 5 epochs; exponents from p = 200)")
    axis.legend(fontsize=8)

    axis = axes[1, 0]
    arms = ("ols_lstsq", "arnet", "lasso_cv", "l1", "sparse")
    for k, name in enumerate(("p20", "p100")):
        values = [record.values(arm, f"stpe_{name}") for arm in arms]
        places = np.arange(len(arms)) + 0.4 * k - 0.2
        axis.bar(places, [v.mean() for v in values], 0.38, yerr=[_spread(v) for v in values], capsize=3, alpha=1 - 0.45 * (1 - k),
                 color=[colours[a] for a in arms])  # fmt: skip
    axis.set_xticks(range(len(arms)), [_broken(names[a]) for a in arms], fontsize=8)
    axis.set(ylabel="distance to the true coefficients (sTPE, %)", title="Useless lags cost: order 20 (pale) and 100")

    axis = axes[1, 1]
    arms = ("seasonal_naive", "yule_walker", "ols_lstsq", "arnet", "sparse")
    for k, column in enumerate(COLUMNS):
        values = [record.values(arm, f"mase_{column.lower()}") for arm in arms]
        axis.bar(np.arange(len(arms)) + 0.4 * k - 0.2, [v.mean() for v in values], 0.38, yerr=[_spread(v) for v in values], capsize=3,
                 alpha=1 - 0.45 * (1 - k), color=[colours[a] for a in arms])  # fmt: skip
    axis.set_xticks(range(len(arms)), [_broken(names[a]) for a in arms], fontsize=8)
    axis.set(ylabel="mean absolute scaled error", title="ETTh1, a day ahead: oil temperature (pale) and load HUFL")


def _spread(values: np.ndarray) -> np.ndarray:
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _broken(name: str) -> str:
    return name.replace(", ", "\n").replace(" (", "\n(").replace(" hour", "\nhour")
