"""H2OT: frames thinned out step by step in a video pose transformer, chosen and recovered by almost free means.

The task and the trained transformer are those of HoT's experiment; every arm is then trained for the same number of steps. The pyramid
keeps 2/3, 4/9 and 2/9 of the frames after the first three blocks. The grid crosses four ways of choosing frames with two of recovering
them, all with that pyramid; ``h2ot`` is its corner "equally spaced, interpolated". Three arms make one cut and cost as many FLOPs as
``h2ot``, to the frame: ``hot`` (clusters and attention, after the first block), ``one_cut`` (``h2ot``'s means, after the first block) and
``flat`` (the same, before it).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from neurarium.dynamic.tokens import hourglass
from neurarium.experiments.dynamic.pose_zoo import finetune, finetuned, frames_per_second, host, judge, poses, same_cost
from neurarium.meter import flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

EPOCHS = 10  # of fine-tuning
CHOICES, RECOVERIES = ("cluster", "attention", "motion", "uniform"), ("attention", "interpolate")
GRID = {
    "h2ot" if (p, r) == ("uniform", "interpolate") else f"{p}_{r}": {"prune": p, "recover": r} for p in CHOICES for r in RECOVERIES
}
CHEAP = {"prune": "uniform", "recover": "interpolate"}
SINGLE: dict[str, dict[str, Any]] = {"hot": {"at": 1}, "one_cut": {"at": 1, **CHEAP}, "flat": {"at": 0, **CHEAP}}
LABELS = {
    "full": "all frames", "h2ot": "H2OT", "hot": "HoT, one cut", "one_cut": "one cut, same means", "flat": "cut before the first block",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#555555", "#d55e00", "#0072b2", "#e69f00", "#cc79a7")))


def run(trial: Trial) -> None:
    task = trial.shared("task", lambda: poses(trial))
    start = trial.shared("host", lambda: host(trial, task))
    one = task.test.x[:1].to(trial.device)

    def thin(name: str) -> nn.Module:
        if name in GRID:
            return hourglass(start, keep=[task.frames * k // 9 for k in (6, 4, 2)], at=[1, 2, 3], **GRID[name])
        target = flops(thin("h2ot"), one)
        keep = same_cost(lambda m: hourglass(start, keep=m, **SINGLE[name]), target, one, range(1, task.frames + 1))
        return hourglass(start, keep=keep, **SINGLE[name])

    def speeds() -> dict[str, float]:
        models = {"full": start} | {name: thin(name) for name in (*GRID, *SINGLE)}
        return frames_per_second(models, task, repeats=trial.scale(smoke=2, laptop=15))

    speed = trial.shared("speed", speeds)
    for arm in trial.arms("full", *GRID, *SINGLE):
        model = finetuned(trial, task, EPOCHS) if arm.name == "full" else finetune(trial, task, thin(arm.name), EPOCHS)
        arm.log(frames_per_s=speed[arm.name], **judge(model, task))


def figure(record: RecordView, fig: Figure) -> None:
    """Error against FLOPs, the grid of means, and frames a second."""
    fig.set_size_inches(11, 7)
    grid = fig.add_gridspec(2, 2, width_ratios=(1.35, 1), hspace=0.06, wspace=0.04)
    cost, table, speed = fig.add_subplot(grid[:, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, 1])
    full = record.values("full", "flops").mean() if "full" in record.arms else 1.0
    for arm in record.arms:
        error, x = record.values(arm, "mpjpe"), record.values(arm, "flops").mean() / full
        draw = partial(cost.errorbar, x, error.mean(), yerr=error.std(), capsize=3)
        if arm in LABELS:
            draw(fmt="o", ms=8, color=COLOURS[arm], label=LABELS[arm])
        else:
            draw(fmt="s" if arm.endswith("attention") else "^", ms=5, color="#999999")
    cost.plot([], [], "s", ms=5, color="#999999", label="pyramid, attention recovers")
    cost.plot([], [], "^", ms=5, color="#999999", label="pyramid, interpolated")
    cost.set(xlabel="FLOPs a sequence / those of all frames", ylabel="mean joint error (half body heights)", title="Error against cost")
    cost.set_ylim(bottom=0)
    cost.grid(alpha=0.25)
    cost.legend(fontsize=8, loc="best")
    names = {(c, r): n for n, o in GRID.items() for c, r in [(o["prune"], o["recover"])]}
    cells = np.array([[record.mean(names[c, r], "mpjpe") if names[c, r] in record.arms else np.nan for r in RECOVERIES] for c in CHOICES])
    table.imshow(cells, cmap="viridis_r", aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        table.text(j, i, f"{value:.3f}", ha="center", va="center", color="white" if value > np.nanmean(cells) else "black")
    table.set_xticks(range(2), ["recovered by\nattention", "interpolated"])
    table.set_yticks(range(4), [*CHOICES[:3], "equally spaced"])
    table.set_title("Error by the means of the pyramid")
    shown = [a for a in LABELS if a in record.arms]
    values = [record.values(a, "frames_per_s") / 1000 for a in shown]
    speed.barh(range(len(shown)), [v.mean() for v in values], xerr=[v.std() for v in values], color=[COLOURS[a] for a in shown], capsize=3)
    speed.set_yticks(range(len(shown)), [LABELS[a] for a in shown])
    speed.invert_yaxis()
    speed.set(xlabel="thousand frames a second, one thread", title="Speed")
