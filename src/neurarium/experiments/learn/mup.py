"""Does the best learning rate stay where it is while a network grows sixteen times wider?

MNIST at 14x14, ReLU MLP with two hidden layers and without biases, Adam, all learning rates of one width trained in one vectorised loop.
Each arm tunes at the base width, copies the setting to the network sixteen times as wide, and
compares with a direct search there. Losses are training losses, mean of the last 15 steps: test accuracy is saturated.

``sp``: torch's initialisation, one learning rate. ``mup``: learning rate and readout multiplier tuned, as the paper does.
``mup_plain``: muP with multiplier 1. ``mup_init``: muP's initialisation and multiplier with one learning rate for all, the ablation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Adam

from neurarium import data, meter
from neurarium.experiments.images import first_batches, images
from neurarium.learn.coordinates import coordinate_check
from neurarium.learn.parametrize import infer_shapes, mup_, mup_groups
from neurarium.learn.sweep import best_rate, sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BASE, BATCH, LAST = 48, 128, 15
RATES = tuple(2.0**k for k in range(-12, -2))
WIDE_RATES = tuple(2.0**k for k in range(-10, -3))
ALPHAS = {"sp": (1.0,), "mup": (4.0, 16.0, 64.0, 256.0), "mup_plain": (1.0,), "mup_init": (4.0, 16.0, 64.0, 256.0)}
LABELS = {"sp": "standard", "mup": "muP", "mup_plain": "muP, multiplier 1", "mup_init": "muP's initialisation only"}


def run(trial: Trial) -> None:
    task = images(trial, train=(600, 4000), test=(300, 4000))
    x, test = normalised(task)
    train = data.TensorData(x.to(trial.device), task.train.y.to(trial.device))
    steps = trial.scale(smoke=4, laptop=60)
    widths = trial.scale(smoke=(8, 16), laptop=(BASE, 4 * BASE, 16 * BASE))

    for arm in trial.arms(*ALPHAS):
        curves: dict[int, np.ndarray] = {}
        tried = []
        for alpha in ALPHAS[arm.name]:
            model = made(arm.name, widths[0], 1, alpha, 1000 * trial.seed, trial.device)
            losses, _ = sweep([model], rates_of(arm.name, 1, alpha), RATES, first_batches(train, BATCH, steps, trial.seed))
            tried.append((final(losses)[0], alpha))
        curves[widths[0]], alpha = min(tried, key=lambda t: t[0].min())
        base_rate = RATES[int(curves[widths[0]].argmin())]
        for width in widths[1:]:
            m = width / widths[0]
            rates = RATES if width < widths[-1] else WIDE_RATES
            model = made(arm.name, width, m, alpha, 1000 * trial.seed, trial.device)
            losses, params = sweep([model], rates_of(arm.name, m, alpha), rates, first_batches(train, BATCH, steps, trial.seed))
            curves[width] = final(losses)[0]
        best = int(curves[widths[-1]].argmin())
        here = int(np.abs(np.log(np.divide(WIDE_RATES, base_rate))).argmin())  # the copied rate
        correct = accuracy(model, {n: p[0] for n, p in params.items()}, test, task.test.y, trial)
        arm.log(
            widths=list(curves), base_rate=base_rate, best_rate=WIDE_RATES[best], multiplier=alpha,
            drift=abs(np.log2(best_rate(WIDE_RATES, curves[widths[-1]]) / best_rate(RATES, curves[widths[0]]))),
            base_loss=curves[widths[0]].min(), best_loss=curves[widths[-1]][best], transferred_loss=curves[widths[-1]][here],
            direct_accuracy=correct[best], transferred_accuracy=correct[here],
        )  # fmt: skip
        for width, values in curves.items():
            arm.curve(f"width{width}", x=np.log2(RATES if width < widths[-1] else WIDE_RATES), y=values)
        if arm.name in ("sp", "mup"):
            found = coordinates(arm.name, alpha, trial, train)
            slopes = list(found.slope.values())
            arm.log(slopes=slopes, steepest=max(slopes, key=abs), hidden_growth=found.slope["2"])
            for i, layer in enumerate(("input", "hidden", "output")):
                arm.curve(f"change_{layer}", x=found.widths, y=found.change[i, -1])
        flops = [meter.flops(made("sp", w, 1, 1, 0, trial.device), x[:1]) for w in (widths[0], widths[-1])]
        arm.log(tuning_share=len(ALPHAS[arm.name]) * len(RATES) * flops[0] / (len(WIDE_RATES) * flops[1]))


def normalised(task: data.ImageTask) -> tuple[Tensor, Tensor]:
    """Flat images with mean 0 and deviation 1 over all training pixels."""
    mean, std = task.train.x.mean(), task.train.x.std()
    return ((task.train.x - mean) / std).flatten(1), ((task.test.x - mean) / std).flatten(1)


def mlp(width: int) -> nn.Sequential:
    layers = [nn.Linear(196, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10, bias=False))


def made(arm: str, width: int, m: float, alpha: float, seed: int, device: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp(width)
    return (model if arm == "sp" else mup_(model, infer_shapes(model, m, readout_multiplier=alpha))).to(device)


def rates_of(arm: str, m: float, alpha: float) -> Any:
    if arm.startswith("mup") and arm != "mup_init":
        return lambda model: mup_groups(model, infer_shapes(model, m, readout_multiplier=alpha), 1.0)
    return lambda model: [{"params": list(model.parameters()), "lr": 1.0}]


def final(losses: Tensor) -> np.ndarray:
    """Mean loss over the last steps, (models, rates); infinite where it diverged."""
    return losses[..., -LAST:].double().mean(-1).cpu().numpy()


def accuracy(model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, trial: Trial) -> list[float]:
    _, buffers = stack_module_state([model])
    buffers = {n: b[0] for n, b in buffers.items()}
    scores = vmap(lambda p: functional_call(model, (p, buffers), (x.to(trial.device),)))(params)
    return (scores.argmax(-1).cpu() == y).double().mean(-1).tolist()


def coordinates(arm: str, alpha: float, trial: Trial, train: data.TensorData) -> Any:
    widths = trial.scale(smoke=(16, 32), laptop=(64, 128, 256, 512))

    def make(width: int) -> tuple[nn.Module, Adam]:
        m = width / widths[0]
        model = made(arm, width, m, alpha, 1000 * trial.seed + width, trial.device)
        groups = rates_of(arm, m, alpha)(model)
        return model, Adam([{**g, "lr": g["lr"] * 2.0**-9} for g in groups])

    return coordinate_check(make, widths, list(first_batches(train, BATCH, 4, trial.seed)), steps=4)


def figure(record: RecordView, fig: Figure) -> None:
    """Loss against learning rate, one line a width, for each arm; the coordinate check below."""
    import matplotlib

    fig.set_size_inches(12, 7)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(2, 4)
    names = [a for a in ALPHAS if a in record.arms]
    widths = [int(w) for w in record.mean(names[0], "widths")]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(widths)))
    for ax, a in zip(axes[0], names):
        for width, colour in zip(widths, colours):
            curves = record.curves(a, f"width{width}")
            x, y = curves[0][0], np.array([c[1] for c in curves])
            y = np.where(np.isfinite(y), y, np.nan)
            mean = y.mean(0)
            ax.plot(x, mean, "o-", ms=3, color=colour, label=f"width {width}")
            ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
            if np.isfinite(mean).any():
                ax.plot(x[np.nanargmin(mean)], np.nanmin(mean), "*", ms=11, color=colour, mec="black", mew=0.5)
        ax.set(title=LABELS[a], xlabel="log2 learning rate", ylim=(0.1, 2.0), yscale="log")
        ax.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("training loss (stars: best)")
    axes[0, 0].legend(fontsize=7)
    for ax, a in zip(axes[1], [a for a in ("sp", "mup") if a in record.arms]):
        for i, (layer, colour) in enumerate(zip(("input", "hidden", "output"), ("#0072B2", "#D55E00", "#009E73"))):
            curves = record.curves(a, f"change_{layer}")
            x, y = curves[0][0], np.array([c[1] for c in curves])
            ax.plot(x, y.mean(0), "o-", color=colour, label=f"{layer}: slope {record.values(a, 'slopes')[:, i].mean():.2f}")
        ax.set(xscale="log", yscale="log", xlabel="width", ylim=(0.01, 10))
        ax.set_title(f"{LABELS[a]}: change of outputs, 4 steps", fontsize=10)
        ax.set_xticks(x, [str(int(v)) for v in x])
        ax.minorticks_off()
        ax.legend(fontsize=7)
    axes[1, 0].set_ylabel("root mean square")
    bars, labels = axes[1, 2], [LABELS[a] for a in names]
    at = np.arange(len(names))
    for shift, metric, label, colour in (
        (-0.2, "transferred_loss", "rate copied", "#56B4E9"),
        (0.2, "best_loss", "rate searched", "#E69F00"),
    ):
        values = np.array([record.values(a, metric) for a in names])
        bars.bar(at + shift, values.mean(1), 0.38, yerr=values.std(1), capsize=2, color=colour, label=label)
    bars.set_xticks(at, labels, rotation=20, ha="right", fontsize=7)
    bars.set(title=f"width {widths[-1]}", ylabel="training loss")
    bars.legend(fontsize=7)
    drift = axes[1, 3]
    for i, a in enumerate(names):
        values = np.log2(record.values(a, "best_rate") / record.values(a, "base_rate"))
        drift.plot(np.full(len(values), i) + np.linspace(-0.15, 0.15, len(values)), values, "o", color="#0072B2", alpha=0.7)
    drift.axhline(0, color="black", lw=0.8)
    drift.axhspan(-1, 1, color="#009E73", alpha=0.12)
    drift.set_xticks(range(len(names)), labels, rotation=20, ha="right", fontsize=7)
    drift.set(title="drift of the best rate", ylabel="octaves, 16 times wider; one dot a seed")
