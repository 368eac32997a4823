"""HoT: one cut in a video pose transformer, with frames chosen by clusters and recovered by attention.

Skeletons move in bursts, so frames are unequally redundant. A full transformer is trained first; every arm starts from it and is trained
for the same number of steps more, the full one included. ``small`` is the exception: it has fewer blocks, no cut, and as many FLOPs as
``hot``, and is trained from scratch for as many steps as the two trainings have together.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from neurarium.data import PoseTask
from neurarium.dynamic.pose import VideoPoseTransformer
from neurarium.dynamic.tokens import hourglass, kept_frames
from neurarium.experiments.dynamic.pose_zoo import (
    FINETUNING,
    PRETRAINING,
    finetune,
    finetuned,
    host,
    judge,
    poses,
    same_cost,
    share_of_fast,
    untrained,
)  # fmt: skip
from neurarium.meter import flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

THIN: dict[str, dict[str, Any]] = {
    "hot": {"prune": "cluster", "recover": "attention"},
    "uniform": {"prune": "uniform", "recover": "attention"},
    "random": {"prune": "random", "recover": "attention"},
    "no_recover": {"prune": "cluster", "recover": "nearest"},
}
LABELS = {
    "full": "all frames", "hot": "HoT: clusters, attention", "uniform": "equally spaced, attention", "random": "random, attention",
    "no_recover": "clusters, nearest frame copied", "small": "all frames, fewer blocks",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#555555", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#009e73")))


def run(trial: Trial) -> None:
    task = trial.shared("task", lambda: poses(trial))
    start = trial.shared("host", lambda: host(trial, task))
    keep, seen = task.frames // 3, task.test.x[:8].to(trial.device)
    for arm in trial.arms("full", *THIN, "small"):
        if arm.name == "full":
            model = finetuned(trial, task)
        elif arm.name == "small":
            model = finetune(trial, task, small(trial, task, flops(hourglass(start, keep=keep, at=1), seen[:1])), PRETRAINING + FINETUNING)
        else:
            model = finetune(trial, task, hourglass(start, keep=keep, at=1, **THIN[arm.name]))
            arm.log(fast_share=share_of_fast(model, task))
            arm.curve("kept", x=(kept := kept_frames(model, seen)[0].tolist()), y=task.test_speed[0, kept].tolist())
        if arm.name == "full":
            arm.curve("speed", x=list(range(task.frames)), y=task.test_speed[0].tolist())
            motion = torch.linalg.vector_norm(task.test.y[0].diff(dim=0), dim=-1).mean(-1)
            arm.curve("motion", x=list(range(1, task.frames)), y=motion.tolist())
        arm.log(**judge(model, task))


def small(trial: Trial, task: PoseTask, target: float) -> VideoPoseTransformer:
    """All frames, three blocks (two at the scale smoke) with the widest layers that ``target`` FLOPs a sequence allow; untrained."""
    depth = trial.scale(smoke=2, laptop=3)
    make = partial(untrained, trial, task, depth=depth)
    width = make().dim
    return make(mlp=same_cost(lambda h: make(mlp=h / width), target, task.test.x, range(4, 4 * width, 2)) / width)


def figure(record: RecordView, fig: Figure) -> None:
    """Error against FLOPs, error on slow and fast frames, and which frames are kept."""
    fig.set_size_inches(11, 7)
    grid = fig.add_gridspec(2, 2, height_ratios=(1.3, 1), hspace=0.05, wspace=0.04)
    cost, bars, time = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, :])
    arms = [a for a in LABELS if a in record.arms]
    full = record.values("full", "flops").mean() if "full" in record.arms else 1.0
    for arm in arms:
        error = record.values(arm, "mpjpe")
        x = record.values(arm, "flops").mean() / full
        cost.errorbar(x, error.mean(), yerr=error.std(), fmt="o", color=COLOURS[arm], capsize=3, ms=8, label=LABELS[arm])
    cost.set(xlabel="FLOPs a sequence / those of all frames", ylabel="mean joint error (half body heights)", title="Error against cost")
    cost.set_ylim(bottom=0)
    cost.grid(alpha=0.25)
    cost.legend(fontsize=8, loc="lower left")
    for i, arm in enumerate(arms):
        for j, metric in enumerate(("mpjpe_slow", "mpjpe_fast")):
            values = record.values(arm, metric)
            bars.bar(i + 0.38 * (j - 0.5), values.mean(), 0.36, yerr=values.std(), color=COLOURS[arm], alpha=1 if j else 0.45, capsize=2)
    bars.set_xticks(range(len(arms)), [a.replace("_", "\n") for a in arms])
    bars.set(ylabel="mean joint error", title="On slow frames (pale) and fast ones (full colour)")
    if "full" in record.arms:
        x, y = record.curves("full", "motion")[0]
        time.fill_between(x, y, color="#dddddd", step="pre")
        time.set_ylim(0, 1.05 * max(y))
        top = max(y)
        for level, arm in enumerate(a for a in THIN if a in record.arms and a != "no_recover"):
            kept = np.asarray(record.curves(arm, "kept")[0][0])
            time.plot(kept, np.full(len(kept), top * (0.9 - 0.16 * level)), "|", ms=14, mew=2.5, color=COLOURS[arm], label=LABELS[arm])
        time.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    time.set(xlabel="frame", ylabel="motion of a joint a frame", title="Which frames are kept, over how much the skeleton moves")
