"""Which optimizer with which schedule is fastest on a small character transformer? Sixteen pairs, equally many steps, one way to a rate.

Each optimizer's peak comes from a range test of its own; each pair then trains at that rate and at a quarter of it, and is judged by test
loss at the one of lower validation loss, because a constant rate cannot bear what a cycle's short peak can. Momentum is constant, so that
a schedule is a schedule of the rate alone. For the record, the Hessian-free estimate of plain SGD is logged with each pair of ``sgd``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from neurarium import data
from neurarium.experiments.learn.root import CONTEXT, WIDTH, Characters, Windows
from neurarium.learn.fit import Backprop, Diverged, evaluate
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups
from neurarium.learn.schedule import HessianFreeLR, OneCycle, lr_range_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TARGET = 2.6  # nats
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, momentum=0.9), "adamw": partial(AdamW, betas=(0.9, 0.95), weight_decay=0.1), "muon": Muon, "root": ROOT,
}  # fmt: skip
SCHEDULES = ("constant", "step", "cosine", "onecycle")
LABELS = {
    "sgd": "SGD, momentum 0.9", "adamw": "AdamW", "muon": "Muon", "root": "ROOT", "constant": "constant", "step": "steps",
    "cosine": "cosine", "onecycle": "one cycle",
}  # fmt: skip


def scheduler(name: str, optimizer: Optimizer, steps: int) -> Any:
    """Rates as shares of the optimizer's own; ``step``: x0.1 after 60 and 85 %."""
    shares: dict[str, Callable[[int], float]] = {
        "constant": lambda i: 1.0, "step": lambda i: 0.1 ** ((i >= 0.6 * steps) + (i >= 0.85 * steps)),
        "cosine": lambda i: (1 + math.cos(math.pi * min(i / steps, 1))) / 2,
    }  # fmt: skip
    return OneCycle(optimizer, None, steps, momentum=None) if name == "onecycle" else LambdaLR(optimizer, shares[name])


def run(trial: Trial) -> None:
    text = data.text("tiny-shakespeare")
    steps, sweep = trial.scale(smoke=(4, 4), laptop=(110, 60))
    corpus = [Windows(text.encode(part.text).to(trial.device), seed=trial.seed) for part in (text.train, text.valid, text.test)]
    train, valid, test = (replace(c, count=n) for c, n in zip(corpus, trial.scale(smoke=(4, 1, 1), laptop=(steps, 10, 20))))

    def fresh() -> Characters:
        torch.manual_seed(trial.seed)
        return Characters(len(text.characters), WIDTH, CONTEXT).to(trial.device)

    def peak(name: str) -> float:
        test = lr_range_test(
            fresh(), "cross_entropy", train, partial(OPTIMIZERS[name], lr=1.0), lo=1e-4, hi=10.0, steps=sweep, groups=matrix_groups
        )
        return test.suggestion

    def estimate() -> float:
        model = fresh()
        optimizer = SGD(model.parameters(), lr=0.05)
        found = HessianFreeLR(optimizer, every=2)
        for x, y in replace(train, count=sweep):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            found.observe()
        return found.estimate

    for arm in trial.arms(*(f"{o}_{s}" for o in OPTIMIZERS for s in SCHEDULES)):
        name, schedule = arm.name.split("_")
        highest = trial.shared(f"peak_{name}", partial(peak, name))
        best: tuple[float, float, Any, list[float]] = (math.inf, math.nan, None, [])
        with arm.timed("train_seconds"):
            for lr in (highest, highest / 4):
                model = fresh()
                learner = Backprop(
                    optimizer=partial(OPTIMIZERS[name], lr=lr), groups=matrix_groups, schedule=partial(_schedule, schedule, steps)
                )
                try:
                    history = learner.fit(model, train, epochs=1, seed=trial.seed)
                except Diverged:
                    continue
                loss = evaluate(model, valid)["loss"]
                if loss < best[0]:
                    best = (loss, lr, model, list(history.extra["loss"]))
        _, lr, model, losses = best
        if model is None:
            arm.log(loss=float("nan"), reached_at=steps, lr=float("nan"))
            continue
        smooth = np.convolve(losses, np.ones(10) / 10, "valid") if len(losses) > 10 else np.asarray(losses)
        below = np.flatnonzero(smooth <= TARGET)
        # Never reached counts as the length of the run.
        arm.log(loss=evaluate(model, test)["loss"], reached_at=int(below[0]) + 10 if len(below) else steps, reached=bool(len(below)), lr=lr)
        arm.log(suggestion=highest)
        if name == "sgd":
            arm.log(estimate=trial.shared("estimate", estimate))
        arm.curve("loss", y=smooth)


def _schedule(name: str, steps: int, optimizer: Optimizer) -> Any:
    return scheduler(name, optimizer, steps)


def figure(record: RecordView, fig: Figure) -> None:
    """Loss curves by optimizer, and the final loss of all pairs as a table in colours."""
    fig.set_size_inches(12, 6.5)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(2, 3)
    colours = dict(zip(SCHEDULES, ("#999999", "#E69F00", "#0072B2", "#D55E00")))
    lowest = TARGET
    table, when = np.full((4, 4), np.nan), np.full((4, 4), np.nan)
    for i, (optimizer, ax) in enumerate(zip(OPTIMIZERS, (axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]))):
        for j, schedule in enumerate(SCHEDULES):
            arm = f"{optimizer}_{schedule}"
            if arm not in record.arms:
                continue
            table[i, j], when[i, j] = record.mean(arm, "loss"), record.mean(arm, "reached_at")
            curves = [np.asarray(y) for _, y in record.curves(arm, "loss")] if record.has(arm, "suggestion") else []
            if curves:
                mean = np.mean(curves, 0)
                lowest = min(lowest, float(mean.min()))
                ax.plot(10 + np.arange(len(mean)), mean, color=colours[schedule], label=LABELS[schedule])
        ax.axhline(TARGET, color="k", lw=0.7, ls=":")
        ax.set(title=LABELS[optimizer], xlabel="step", ylabel="training loss (nats)")
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]):
        ax.set_ylim(lowest - 0.05, lowest + 1.2)
    axes[0, 0].legend(fontsize=8)
    pictures = (axes[0, 2], table, "test loss (nats)", "{:.3f}"), (axes[1, 2], when, f"steps to a loss of {TARGET}", "{:.0f}")
    for ax, values, title, form in pictures:
        ax.imshow(values, cmap="viridis_r", aspect="auto")
        middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
        for i, j in np.ndindex(4, 4):
            colour = "w" if values[i, j] > middle else "k"
            ax.text(j, i, form.format(values[i, j]), ha="center", va="center", color=colour, fontsize=9)
        ax.set_xticks(range(4), [LABELS[s] for s in SCHEDULES], fontsize=8)
        ax.set_yticks(range(4), [LABELS[o].split(",")[0] for o in OPTIMIZERS], fontsize=8)
        ax.set_title(title)
