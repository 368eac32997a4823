"""Two-stage training with and without optimal input gains, beside Levenberg-Marquardt and Adam, on nine regression sets.

Every arm starts from the same network with solved output weights. What is compared is the training error against the multiplications that
it cost; the error on the held-out 30 % is recorded beside it.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from neurarium import data
from neurarium.errors import MissingData
from neurarium.learn.fit import Backprop
from neurarium.learn.two_stage import (
    OIGBP,
    OIGHWO,
    OWOBP,
    OWOHWO,
    TwoLayerMLP,
    direction,
    levenberg_marquardt,
    net_control_,
    output_weights,
    solve_gram,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

RULES = {"bp": OWOBP, "oig_bp": OIGBP, "hwo": OWOHWO, "oig_hwo": OIGHWO}
UCI = ("concrete", "energy", "yacht", "kin8nm", "wine-quality-red")
SETS = (*UCI, "diabetes", "friedman", "friedman-mixed", "friedman-scaled")
LABELS = {
    "bp": "OWO-BP", "oig_bp": "OIG-BP", "hwo": "OWO-HWO", "oig_hwo": "OIG-HWO", "lm": "Levenberg-Marquardt",
    "adam": "Adam (best of 3 rates)",
}  # fmt: skip
HIDDEN, RATES = 20, (3e-3, 1e-2, 3e-2)


def run(trial: Trial) -> None:
    iterations, of_lm, hidden = trial.scale(smoke=(4, 2, 6), laptop=(100, 10, HIDDEN))
    early = min(30, iterations)
    tasks = trial.shared("tasks", lambda: {name: split(trial, name) for name in trial.scale(smoke=SETS[-4:], laptop=SETS)})

    for arm in trial.arms("lm", "bp", "oig_bp", "hwo", "oig_hwo", "adam"):
        found: dict[str, list[float]] = {}
        for i, (name, (x, t, x_val, t_val)) in enumerate(tasks.items()):
            start = network(x, t, hidden, seed=trial.seed)
            model, val = deepcopy(start), [(x_val, t_val)]
            if arm.name == "lm":
                with arm.timed("fit_seconds"):
                    history = levenberg_marquardt(model, x, t, iters=of_lm)
                work = list(history.extra["multiplies"])
                logged = {"budget": work[-1], "val_mse": mse_of(model, x_val, t_val)}
            elif arm.name == "adam":
                each = 3 * forward_work(x, t, hidden)
                steps = max(1, int(trial.metric("oig_hwo", "work")[i] / each))
                with arm.timed("fit_seconds"):
                    model, history = best_adam(start, x, t, steps)
                work = [each * (k + 1) for k in range(steps)]
                logged = {"val_mse": mse_of(model, x_val, t_val)}
            else:
                rule, budget = RULES[arm.name](), trial.metric("lm", "budget")[i]
                with arm.timed("fit_seconds"):
                    history = rule.fit(model, [(x, t)], epochs=iterations, val=val)
                done = history.extra["multiplies"]
                more = max(0, int((budget - done[-1]) / (done[-1] - done[-2]))) if arm.name in ("hwo", "oig_hwo") else 0
                if more:  # goes on until the multiplications of Levenberg-Marquardt are spent
                    history = rule.fit(model, [(x, t)], epochs=iterations + more, val=val, resume=history.state)
                work = list(history.extra["multiplies"])
                at_budget = np.searchsorted(work, budget, side="right") - 1
                logged = {
                    "early_mse": history.train[early - 1]["loss"], "at_budget_mse": history.train[max(at_budget, 0)]["loss"],
                    "val_mse": history.val[iterations - 1]["loss"], "best_val_mse": min(e["loss"] for e in history.val[:iterations]),
                    "work": work[iterations - 1], "halvings": sum(history.extra["halvings"]),
                }  # fmt: skip
            losses = [e["loss"] for e in history.train]
            logged["train_mse"] = losses[min(iterations, len(losses)) - 1]
            for key, value in logged.items():
                found.setdefault(key, []).append(value)
            shown = np.unique(np.geomspace(1, len(losses), 30).astype(int)) - 1
            arm.curve(f"mse_{name.replace('-', '_')}", x=np.asarray(work)[shown], y=np.asarray(losses)[shown])
        arm.log(**found)
        if arm.name == "bp":
            arm.log(equivalence_gap=equivalence(trial))
        if arm.name == "hwo":
            arm.log(whitening_gap=whitening(trial))


def split(trial: Trial, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets in float64, 70 % to train on. Friedman's first problem plain, mixed by a random matrix, or badly scaled."""
    g = torch.Generator().manual_seed(1000 + trial.seed)
    if name.startswith("friedman"):
        x, t = friedman(trial.scale(smoke=120, laptop=1000), g)
        if name == "friedman-mixed":
            x = x @ (torch.eye(10, dtype=x.dtype) + 0.5 * torch.randn(10, 10, generator=g, dtype=x.dtype))
        if name == "friedman-scaled":
            x = x * 10 ** (3 * torch.rand(10, generator=g, dtype=x.dtype) - 1.5)
        cut = int(0.7 * len(x))
        return x[:cut], t[:cut], x[cut:], t[cut:]
    try:
        task = data.tabular(name, seed=trial.seed, test=0.3)
    except MissingData:
        trial.stand_in("scikit-learn's diabetes data in the place of UCI sets that are not here")
        task = data.tabular("diabetes", seed=trial.seed + 1 + SETS.index(name), test=0.3)
    x, t, x_val, t_val = (v.double() for v in (task.train.x, task.train.y, task.test.x, task.test.y))
    most = trial.scale(smoke=120, laptop=1400)
    return x[:most], t[:most], x_val, t_val


def friedman(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 10, generator=g, dtype=torch.float64)
    t = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    t = t + torch.randn(n, generator=g, dtype=torch.float64)
    return (x - 0.5) * 12**0.5, ((t - t.mean()) / t.std())[:, None]


@torch.no_grad()
def network(x: Tensor, t: Tensor, hidden: int, *, seed: int) -> TwoLayerMLP:
    """Gaussian hidden weights under net control, output weights solved."""
    g = torch.Generator().manual_seed(seed)
    model = TwoLayerMLP(x.shape[1], hidden, t.shape[1], dtype=x.dtype)
    model.hidden.weight.copy_(torch.randn(model.hidden.weight.shape, generator=g, dtype=x.dtype))
    model.hidden.bias.copy_(torch.randn(hidden, generator=g, dtype=x.dtype))
    net_control_(model, x)
    basis = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    weights = output_weights(basis, model.activation(model.hidden(x)), t)
    model.bypass.weight.copy_(weights[:, : x.shape[1]])
    model.output.bias.copy_(weights[:, x.shape[1]])
    model.output.weight.copy_(weights[:, x.shape[1] + 1 :])
    return model


@torch.no_grad()
def mse_of(model: nn.Module, x: Tensor, t: Tensor) -> float:
    return float((model(x) - t).square().mean())


def forward_work(x: Tensor, t: Tensor, hidden: int) -> int:
    """Multiplications of one forward pass; a gradient costs twice as much again."""
    inputs = x.shape[1] + 1
    return len(x) * (inputs * hidden + (inputs + hidden) * t.shape[1])


def best_adam(start: nn.Module, x: Tensor, t: Tensor, steps: int):
    """Adam on all data at once, at the best of three rates by the training error itself."""
    runs = []
    for lr in RATES:
        model = deepcopy(start)
        history = Backprop(loss="mse", optimizer=partial(Adam, lr=lr)).fit(model, [(x, t)], epochs=steps)
        runs.append((history.last["loss"], model, history))
    return min(runs, key=lambda r: r[0])[1:]


def _step(trial: Trial):
    x, t, _, _ = split(trial, "friedman-mixed")
    model = network(x, t, 8, seed=trial.seed)
    a = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    o = model.activation(model.hidden(x)).detach()
    return a, o * (1 - o), (t - model(x)).detach(), model.output.weight.detach()


def whitening(trial: Trial) -> float:
    """Largest difference between the HWO direction and the gradient on whitened inputs, mapped back; relative to the largest entry."""
    a, slope, residual, w_oh = _step(trial)
    whitener = torch.linalg.inv(torch.linalg.cholesky(a.T @ a / len(a)))
    want = direction(a @ whitener.T, slope, residual, w_oh) @ whitener
    got = solve_gram(a, direction(a, slope, residual, w_oh).T * len(a), 0).T
    return float((got - want).abs().max() / want.abs().max())


def equivalence(trial: Trial) -> float:
    """Largest difference between the gradient on inputs A x, mapped back, and the gradient times A'A; relative likewise."""
    a, slope, residual, w_oh = _step(trial)
    g = torch.Generator().manual_seed(trial.seed)
    transform = torch.randn(a.shape[1], a.shape[1], generator=g, dtype=a.dtype)
    mapped = direction(a @ transform.T, slope, residual, w_oh) @ transform
    want = direction(a, slope, residual, w_oh) @ transform.T @ transform
    return float((mapped - want).abs().max() / want.abs().max())


def figure(record: RecordView, fig: Figure) -> None:
    """Training error against multiplications, one panel a set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    arms = [a for a in LABELS if a in record.arms]
    colours = dict(zip(LABELS, ("#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#000000", "#009E73")))
    names = [n for n in SETS if record.curves(arms[0], f"mse_{n.replace('-', '_')}")]
    rows = -(-len(names) // 3)
    fig.set_size_inches(10.5, 2.6 * rows + 0.8)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(rows, 3, squeeze=False).flatten()
    for ax, name in zip(axes, names):
        for arm in arms:
            runs = [(np.asarray(x) / 1e6, np.log(y)) for x, y in record.curves(arm, f"mse_{name.replace('-', '_')}")]
            x = runs[0][0]
            seeds = np.stack([np.interp(x, *run) for run in runs])
            mean, spread = seeds.mean(0), seeds.std(0)
            ax.plot(x, np.exp(mean), color=colours[arm], ls="--" if arm in ("lm", "adam") else "-", lw=1.6, label=LABELS[arm])
            ax.fill_between(x, np.exp(mean - spread), np.exp(mean + spread), color=colours[arm], alpha=0.1, lw=0)
        ax.set(xscale="log", yscale="log", title=name)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.title.set_fontsize(9)
        ax.tick_params(labelsize=7, which="both")
        ax.grid(alpha=0.25)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    for ax in axes[len(names) - 3 : len(names)]:
        ax.set_xlabel("multiplications (millions)", fontsize=8)
    fig.supylabel("training MSE (target variance = 1)", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=6, fontsize=8, loc="outside lower center")
    fig.suptitle("A gain for every input, solved at each iteration; one hidden layer (mean and deviation over seeds)", fontsize=11)
