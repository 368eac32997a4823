"""What does a network of given accuracy cost: in FLOPs as counted, in bytes kept for the backward pass, in seconds as they pass?

Every recipe's backbone grows, budget by budget, until it reaches the target accuracy. What is priced is one training step (64 images) of
that backbone: FLOPs forward and backward, saved bytes, wall time with one thread and with two. A recipe that never reaches the target
is priced at its largest budget, and ``reached`` is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from neurarium import meter
from neurarium.experiments.images import images
from neurarium.experiments.nn.recipes import COLOURS, IMAGES, RECIPES, fitted, width

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

TARGET = 0.93
BUDGETS = (4_000, 8_000, 16_000, 32_000)


def run(trial: Trial) -> None:
    for arm in trial.arms(*[recipe for recipe in RECIPES if recipe not in ("ph2", "ph3")]):
        task = trial.shared("images", lambda: images(trial, **IMAGES))
        for budget in trial.scale(smoke=BUDGETS[:1], laptop=BUDGETS):
            channels = width(arm.name, budget)
            model, accuracy = fitted(arm.name, channels, task, trial, epochs=trial.scale(smoke=1, laptop=2))
            if accuracy >= TARGET:
                break
        x, y = task.train.x[:64].to(trial.device), task.train.y[:64].to(trial.device)
        model.train()

        def step(model: torch.nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

        arm.log(accuracy=accuracy, reached=float(accuracy >= TARGET), params=meter.parameters(model), channels=channels)
        arm.log(flops=meter.flops(model, x, backward=True), saved_bytes=meter.saved_bytes(model, x))
        repeats, threads = trial.scale(smoke=2, laptop=30), torch.get_num_threads()
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                timing = meter.latency(step, repeats=repeats)
                arm.log_timed(**{f"seconds_{n}_thread" + "s" * (n > 1): timing.median})
        finally:
            torch.set_num_threads(threads)


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Three prices of one training step at equal accuracy, and seconds against FLOPs."""
    fig.set_size_inches(13, 5)
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    arms = list(record.arms)
    prices = (("flops", "FLOPs"), ("saved_bytes", "saved bytes"))
    prices += (("seconds_1_thread", "seconds, 1 thread"), ("seconds_2_threads", "seconds, 2 threads"))
    for i, arm in enumerate(arms):
        missed = record.mean(arm, "reached") < 1
        ratios = [record.values(arm, metric) / record.values("dense", metric) for metric, _ in prices]
        spread = [float(np.std(r, ddof=1)) if len(r) > 1 else 0.0 for r in ratios]
        place = np.arange(len(prices)) + (i - len(arms) / 2) * 0.11
        label = RECIPES[arm][2] + (" (missed the target)" if missed else "")
        left.bar(place, [r.mean() for r in ratios], 0.1, yerr=spread, color=COLOURS[arm], label=label, hatch="//" if missed else None)
        right.errorbar(record.mean(arm, "flops") / 1e6, 1e3 * record.mean(arm, "seconds_1_thread"), fmt="o", color=COLOURS[arm])
        point = (record.mean(arm, "flops") / 1e6, 1e3 * record.mean(arm, "seconds_1_thread"))
        right.annotate(RECIPES[arm][2], point, xytext=(5, 4), textcoords="offset points", fontsize=8, color=COLOURS[arm])
    left.axhline(1, color="black", linewidth=0.8)
    left.set(yscale="log", xticks=range(len(prices)), xticklabels=[n for _, n in prices], ylabel="price relative to dense convolutions")
    left.set_title(f"One training step of a network with {TARGET:.0%} on MNIST 14x14")
    left.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    right.set(xscale="log", yscale="log", xlabel="million FLOPs a step", ylabel="ms a step, 1 thread")
    right.set_title("Counted work and passing time")
    right.margins(0.25)
    fig.tight_layout()
