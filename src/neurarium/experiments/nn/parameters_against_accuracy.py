"""Which recipe spends a parameter best? One backbone, nine ways to make its convolutions, three budgets, everything else the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neurarium import meter
from neurarium.experiments.images import images
from neurarium.experiments.nn.recipes import COLOURS, IMAGES, RECIPES, fitted, width

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

BUDGETS = {"small": 4_000, "medium": 16_000, "large": 64_000}


def run(trial: Trial) -> None:
    budgets = trial.scale(smoke=["small"], laptop=list(BUDGETS))
    for arm in trial.arms(*[f"{recipe}_{budget}" for budget in budgets for recipe in RECIPES]):
        recipe, budget = arm.name.rsplit("_", 1)
        task = trial.shared("images", lambda: images(trial, **IMAGES))
        channels = width(recipe, BUDGETS[budget])
        model, accuracy = fitted(recipe, channels, task, trial, epochs=trial.scale(smoke=1, laptop=2))
        arm.log(accuracy=accuracy, params=meter.parameters(model), channels=channels, bytes=meter.stored_bytes(model))
        arm.log(flops=meter.flops(model.eval(), task.test.x[:1].to(trial.device)))


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Error against parameters and against stored bytes, one line a recipe."""
    from matplotlib.ticker import FixedLocator, NullLocator

    fig.set_size_inches(11, 4.5)
    axes = fig.subplots(1, 2, sharey=True)
    panels = (("params", 1, "trained parameters"), ("bytes", 1024, "KiB stored, fixed projections included"))
    for axis, (metric, unit, label) in zip(axes, panels):
        for recipe, (_, _, name) in RECIPES.items():
            arms = [arm for arm in (f"{recipe}_{budget}" for budget in BUDGETS) if arm in record.arms]
            errors = [100 - 100 * record.values(arm, "accuracy") for arm in arms]
            x = [record.mean(arm, metric) / unit for arm in arms]
            spread = [float(np.std(e, ddof=1)) if len(e) > 1 else 0.0 for e in errors]
            style = "-" if recipe in ("dense", "low_rank", "grouped") else "-o"
            axis.errorbar(x, [e.mean() for e in errors], yerr=spread, fmt=style, color=COLOURS[recipe], capsize=2, label=name, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel=label)
        for ticks, places in ((axis.xaxis, (1, 3, 10, 30, 100, 300)), (axis.yaxis, (5, 7, 10, 15, 20, 30))):
            ticks.set_major_locator(FixedLocator([p * 1000 if unit == 1 and ticks is axis.xaxis else p for p in places]))
            ticks.set_major_formatter("{x:,.0f}")
            ticks.set_minor_locator(NullLocator())
    axes[0].set(ylabel="test error (%)", title="What a parameter buys")
    axes[1].set_title("What a stored byte buys")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
