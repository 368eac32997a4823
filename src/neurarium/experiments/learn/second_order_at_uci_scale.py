"""Second order at UCI scale: what does a small regression net's training error cost, in multiplications and in seconds?

Every arm starts from the same network with solved output weights and works on all data at once until the multiplications of ten
Levenberg-Marquardt iterations are spent. First-order methods get the best of three learning rates by the training error itself; the trials
are not charged to them.
"""

from __future__ import annotations

import time
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, Adam

from neurarium.experiments.learn.optimal_input_gain import HIDDEN, forward_work, mse_of, network, split
from neurarium.learn.fit import Backprop
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups
from neurarium.learn.two_stage import OIGBP, OIGHWO, OWOHWO, TwoLayerMLP, levenberg_marquardt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TWO_STAGE = {"hwo": OWOHWO, "oig_bp": OIGBP, "oig_hwo": OIGHWO}
FIRST_ORDER = {"root": ROOT, "muon": Muon, "adam": Adam}
RATES = {"root": (3e-3, 1e-2, 3e-2), "muon": (3e-3, 1e-2, 3e-2), "adam": (3e-3, 1e-2, 3e-2)}
SETS = ("concrete", "energy", "wine-quality-red", "friedman-mixed")
LABELS = {
    "oig_bp": "OIG-BP", "oig_hwo": "OIG-HWO", "hwo": "OWO-HWO", "lm": "Levenberg-Marquardt", "lbfgs": "L-BFGS", "adam": "Adam",
    "muon": "Muon", "root": "ROOT",
}  # fmt: skip

Curve = tuple[list[float], list[float], list[float]]  # multiplications, seconds, training error


def run(trial: Trial) -> None:
    hidden, of_lm, rates = trial.scale(smoke=(6, 2, 1), laptop=(HIDDEN, 10, 3))
    names = trial.scale(smoke=SETS[-1:], laptop=SETS)
    tasks = trial.shared("tasks", lambda: {name: split(trial, name) for name in names})
    for arm in trial.arms("lm", *TWO_STAGE, *FIRST_ORDER, "lbfgs"):
        found: dict[str, list[float]] = {"train_mses": [], "val_mses": [], "seconds_each": [], "multiplies": []}
        for i, (name, (x, t, x_val, t_val)) in enumerate(tasks.items()):
            start = network(x, t, hidden, seed=trial.seed)
            budget = None if arm.name == "lm" else trial.metric("lm", "multiplies")[i]
            if arm.name == "lm":
                model, curve = marquardt(start, x, t, of_lm)
            elif arm.name in TWO_STAGE:
                model, curve = two_stage(arm.name, start, x, t, budget)
            elif arm.name == "lbfgs":
                model, curve = quasi_newton(start, x, t, budget)
            else:
                runs = [first_order(arm.name, lr, start, x, t, budget) for lr in RATES[arm.name][:rates]]
                model, curve = min(runs, key=lambda r: r[1][2][-1])
            work, seconds, losses = curve
            found["train_mses"].append(losses[-1])
            found["val_mses"].append(mse_of(model, x_val, t_val))
            found["seconds_each"].append(seconds[-1])
            found["multiplies"].append(work[-1])
            key = name.replace("-", "_")
            arm.curve(f"by_work_{key}", x=work, y=losses)
            arm.curve(f"by_seconds_{key}", x=seconds, y=losses, timed=True)
        seconds = found.pop("seconds_each")
        arm.log(**found, train_mse=geometric(found["train_mses"]), val_mse=geometric(found["val_mses"]))
        arm.log_timed(fit_seconds=sum(seconds), seconds_each=seconds)


def geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def marquardt(start: TwoLayerMLP, x: Tensor, t: Tensor, iterations: int) -> tuple[nn.Module, Curve]:
    levenberg_marquardt(deepcopy(start), x, t, iters=1)  # warms up
    model = deepcopy(start)
    history = levenberg_marquardt(model, x, t, iters=iterations)
    return model, (list(history.extra["multiplies"]), clock(history), [e["loss"] for e in history.train])


def two_stage(name: str, start: TwoLayerMLP, x: Tensor, t: Tensor, budget: float) -> tuple[nn.Module, Curve]:
    rule = TWO_STAGE[name]()
    few = rule.fit(deepcopy(start), [(x, t)], epochs=2)
    first, second = few.extra["multiplies"]
    model = deepcopy(start)
    history = rule.fit(model, [(x, t)], epochs=max(1, int((budget - first) / (second - first)) + 1))
    return model, (list(history.extra["multiplies"]), clock(history), [e["loss"] for e in history.train])


def first_order(name: str, lr: float, start: TwoLayerMLP, x: Tensor, t: Tensor, budget: float) -> tuple[nn.Module, Curve]:
    options = {} if name == "adam" else {"weight_decay": 0.0}
    each = 3 * forward_work(x, t, start.hidden.out_features) + (0 if name == "adam" else newton_schulz_work(start))
    model = deepcopy(start)
    rule = Backprop("mse", partial(FIRST_ORDER[name], lr=lr, **options), groups=None if name == "adam" else matrix_groups)
    history = rule.fit(model, [(x, t)], epochs=max(1, int(budget / each)))
    losses = [*(e["loss"] for e in history.train[1:]), mse_of(model, x, t)]  # the loop's loss is from before each step
    return model, ([each * (k + 1) for k in range(len(losses))], clock(history), losses)


def newton_schulz_work(model: TwoLayerMLP) -> int:
    """Five steps of two products with the Gram matrix, and the matrix product that makes it."""
    small, large = sorted(model.hidden.weight.shape)
    return 5 * (2 * small * small * large + small**3)


def quasi_newton(start: TwoLayerMLP, x: Tensor, t: Tensor, budget: float) -> tuple[nn.Module, Curve]:
    model = deepcopy(start)
    each = 3 * forward_work(x, t, start.hidden.out_features) + 4 * 20 * sum(p.numel() for p in model.parameters())
    optimizer = LBFGS(model.parameters(), history_size=20, max_iter=20, line_search_fn="strong_wolfe")
    losses: list[float] = []
    seconds: list[float] = []
    began = time.perf_counter()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), t)
        loss.backward()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
        return loss

    while (len(losses) + 26) * each <= budget or not losses:  # a step is at most 20 iterations and 25 evaluations
        before = len(losses)
        optimizer.step(closure)
        if len(losses) == before + 1:
            break  # at a minimum
    return model, ([each * (k + 1) for k in range(len(losses))], seconds, np.minimum.accumulate(losses).tolist())


def clock(history) -> list[float]:
    return np.cumsum([e["seconds"] for e in history.train]).tolist()


def figure(record: RecordView, fig: Figure) -> None:
    """Training error against multiplications (above) and against seconds (below), one column a set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    arms = [a for a in LABELS if a in record.arms]
    colours = dict(zip(LABELS, ("#0072B2", "#D55E00", "#E69F00", "#000000", "#999999", "#009E73", "#CC79A7", "#56B4E9")))
    names = [n for n in SETS if record.curves(arms[0], f"by_work_{n.replace('-', '_')}")]
    fig.set_size_inches(3.1 * len(names) + 1.4, 6.2)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for row, (kind, unit) in enumerate((("by_work", 1e6), ("by_seconds", 1e-3))):
            ax = axes[row, column]
            for arm in arms:
                runs = [(np.asarray(x) / unit, np.log(y)) for x, y in record.curves(arm, f"{kind}_{name.replace('-', '_')}")]
                low, high = max(r[0][0] for r in runs), min(r[0][-1] for r in runs)
                x = np.geomspace(low, max(high, 1.0001 * low), 200)
                mean = np.mean([np.interp(x, *r) for r in runs], 0)
                ls = "-" if arm in TWO_STAGE else "--"
                ax.plot(x, np.exp(mean), color=colours[arm], lw=1.5, ls=ls, label=LABELS[arm])
            ax.set(xscale="log", yscale="log", xlabel=("millions of multiplications", "milliseconds")[row])
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.25)
        axes[0, column].set_title(name, fontsize=10)
    fig.supylabel("training MSE (target variance = 1), geometric mean over seeds", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=8, fontsize=8, loc="outside lower center")
    fig.suptitle("One hidden layer of 20 units, all data at once, equal multiplications", fontsize=11)
