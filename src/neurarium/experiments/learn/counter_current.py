"""Counter-current learning against backpropagation and direct feedback alignment, MNIST at 14x14, an MLP without biases.

Learning rates were chosen from four each on seeds that are not used here: SGD for counter-current learning (the paper's 1.0 among them)
and for backpropagation with the same clip, Adam for direct feedback alignment. The ablations keep counter-current learning's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.learn.counter_current import CounterCurrent
from neurarium.learn.feedback import DFA
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.local import gradient_alignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Shuffled(CounterCurrent):
    """The feedback network is given the classes in another order at each step."""

    def objective(self, chain, facts):
        made = super().objective(chain, facts)
        made.prototypes = lambda: torch.eye(made.classes)[torch.randperm(made.classes)].to(facts.example)
        return made


STILL = partial(SGD, lr=0.0)
RULES = {
    "ccl": CounterCurrent(),
    "bp": Backprop(optimizer=partial(SGD, lr=1.0), clip=1.0),
    "dfa": DFA(optimizer=partial(Adam, lr=1e-3)),
    "frozen_feedback": CounterCurrent(feedback_optimizer=STILL),  # random targets at each level
    "shuffled_feedback": Shuffled(),
    "top_only": CounterCurrent(scale=0.0),  # softmax regression on random features
    "ccl_deep": CounterCurrent(),
    "frozen_deep": CounterCurrent(feedback_optimizer=STILL),
    "ccl_cnn": CounterCurrent(optimizer=partial(SGD, lr=0.1, momentum=0.8)),
    "top_cnn": CounterCurrent(optimizer=partial(SGD, lr=0.1, momentum=0.8), scale=0.0),
}
LABELS = {
    "ccl": "counter-current", "bp": "backpropagation", "dfa": "direct feedback", "frozen_feedback": "frozen feedback",
    "shuffled_feedback": "shuffled feedback", "top_only": "top layer only",
}  # fmt: skip


def run(trial: Trial) -> None:
    task = images(trial, train=(512, 5000), standardise=True)
    train, test = task.train.to(trial.device), task.test.to(trial.device).batches(1000, shuffle=False)
    epochs, width = trial.scale(smoke=(1, 32), laptop=(8, 256))
    probe, watched = train[:256], data.TensorData(*task.test[:1000]).to(trial.device).batches(1000, shuffle=False)

    for arm in trial.arms(*RULES):
        rule = RULES[arm.name]
        model = (cnn() if arm.name.endswith("cnn") else mlp(width, 5 if arm.name.endswith("deep") else 4)).to(trial.device)
        curve, levels = [], []

        def watch(progress, rule=rule, curve=curve, levels=levels) -> None:
            curve.append(evaluate(progress.model, watched)["accuracy"])
            if isinstance(rule, CounterCurrent):
                levels.append(level_accuracies(rule, progress.model, *probe))

        watch_it = [watch] if arm.name in LABELS else []
        if arm.name in ("ccl", "dfa"):
            arm.log(alignment_at_start=list(gradient_alignment(rule, model, probe, seed=trial.seed).values()))
        passes = min(epochs, 4) if arm.name.endswith("cnn") else epochs
        rule.fit(model, train.batches(BATCH, seed=trial.seed), epochs=passes, seed=trial.seed, callbacks=watch_it)
        arm.log(accuracy=evaluate(model, test)["accuracy"])
        if arm.name in ("ccl", "bp", "dfa"):
            arm.log(saved_bytes=saved_bytes(rule, width, train))
        if arm.name in ("ccl", "dfa"):
            taught = replace(rule, feedback=rule.trained(model).feedback) if arm.name == "ccl" else rule
            arm.log(alignment=list(gradient_alignment(taught, model, probe, seed=trial.seed).values()))
        if watch_it:
            arm.curve("accuracy", x=list(range(1, epochs + 1)), y=curve)
        if levels:
            arm.log(level_accuracy=levels[-1])
            arm.grid("levels", np.array(levels).T[::-1])  # the output's level on top


def mlp(width: int, hidden: int) -> nn.Sequential:
    sizes = [196, *[width] * hidden]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b, bias=False), nn.ELU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10, bias=False))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ELU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ELU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


def level_accuracies(rule: CounterCurrent, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """How often the most similar signal at each level is that of the sample's class."""
    objective, found = rule.trained(model), []
    with torch.no_grad():
        h = objective.enter(x, y)
        for i, block in enumerate(objective.blocks):
            h = block(h)
            found.append(float((objective.loss(i, h, h, y)[1].argmax(1) == y).float().mean()))
    return found


def saved_bytes(rule, width: int, train: data.TensorData) -> int:
    """Peak bytes that one batch keeps for the backward pass."""
    model = mlp(width, 4).to(train.x.device)
    with meter.SavedBytes() as kept:
        rule.fit(model, [train[:BATCH]], epochs=1)
    return kept.peak


def figure(record: RecordView, fig: Figure) -> None:
    """Learning curves, accuracy of every arm at two depths, and how well each level knows the class."""
    colours = dict(zip(LABELS, ("#D55E00", "#000000", "#0072B2", "#E69F00", "#CC79A7", "#999999")))
    fig.set_size_inches(13, 4.4)
    fig.set_layout_engine("constrained")
    time, ends, right = fig.subfigures(1, 3)
    time, ends, levels = time.subplots(), ends.subplots(), right.subplots(2)
    for arm, label in LABELS.items():
        if arm not in record.arms:
            continue
        y = 100 * np.array([y for _, y in record.curves(arm, "accuracy")])
        x = record.curves(arm, "accuracy")[0][0]
        time.plot(x, y.mean(0), "o-", ms=3, color=colours[arm], label=label)
        time.fill_between(x, y.min(0), y.max(0), color=colours[arm], alpha=0.15, lw=0)
    time.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100), title="learning")
    time.legend(fontsize=8, loc="lower right")

    rows = [
        ("counter-current", "ccl", "#D55E00"), ("frozen feedback", "frozen_feedback", "#E69F00"),
        ("counter-current, 5 hidden", "ccl_deep", "#D55E00"), ("frozen feedback, 5 hidden", "frozen_deep", "#E69F00"),
        ("counter-current, CNN", "ccl_cnn", "#D55E00"), ("top layer only, CNN", "top_cnn", "#999999"),
    ]  # fmt: skip
    rows = [r for r in rows if r[1] in record.arms]
    for i, (_, arm, colour) in enumerate(rows):
        values = 100 * record.values(arm, "accuracy")
        ends.barh(i, values.mean(), color=colour, alpha=0.55)
        ends.plot(values, np.full(len(values), i), "k|", ms=10)
    ends.set_yticks(range(len(rows)), [r[0] for r in rows], fontsize=8)
    ends.invert_yaxis()
    ends.set(xlabel="test accuracy (%), a mark for each seed", xlim=(0, 100), title="must the feedback network learn?")

    for ax, arm in zip(levels, ("ccl", "frozen_feedback")):
        if arm not in record.arms:
            continue
        grid = 100 * np.mean(record.grids(arm, "levels"), 0)
        ax.imshow(grid, cmap="viridis", vmin=10, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if column in (0, grid.shape[1] - 1):
                ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="k" if value > 60 else "w")
        ax.set_yticks(range(len(grid)), ["output", *map(str, range(len(grid) - 2, 0, -1)), "input"], fontsize=7)
        ax.set_xticks(range(0, grid.shape[1], 2), range(1, grid.shape[1] + 1, 2), fontsize=7)
        ax.set_title(f"{LABELS[arm]}: % most like their class's signal", fontsize=9)
    levels[0].set_ylabel("level")
    levels[1].set(xlabel="epoch", ylabel="level")
    time.grid(alpha=0.3)
