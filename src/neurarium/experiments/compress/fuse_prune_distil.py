"""Fuse, prune or distil: a small network from a deep trained one, at one size and one number of epochs.

The teacher is a residual network of 14 layers. Every student has at most the parameters of the one of 8 layers, sees the same 3,000 images
for four epochs in all, and ends with one cycle of the learning rate. ``fused`` spends half of its epochs on a student from scratch, which
it fuses with the teacher by CLAFusion (layers merged away), and the rest on tuning; ``dropped`` keeps the teacher's matched blocks alone;
``pruned`` keeps the channels that HAP's curvature picks; ``distilled`` starts from scratch with the teacher's soft targets.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress import SoftTargets, cla_fuse, hap
from neurarium.data import ImageTask
from neurarium.experiments.compress.zoo import Augmented, accuracy, cifar, finetune, resnet
from neurarium.learn.fit import Backprop, Learner
from neurarium.meter import parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

LABELS = {
    "scratch": "from scratch", "distilled": "distilled", "dropped": "blocks dropped", "pruned": "channels pruned", "fused": "fused",
    "fused_distilled": "fused, then distilled",
}  # fmt: skip
FRESH, TUNE = 0.15, 0.05  # learning rates of a network from scratch, of one that knows something


def run(trial: Trial) -> None:
    task = trial.shared("cifar", lambda: cifar(trial))
    few = replace(task, train=task.train.take(torch.arange(trial.scale(smoke=200, laptop=3000))))
    epochs = trial.scale(smoke=2, laptop=4)
    calibration = [(few.train.x[:200], few.train.y[:200])]

    def beginner() -> nn.Module:
        """An untrained network of 8 layers."""
        model = copy.deepcopy(trial.shared("teacher", lambda: resnet(trial, task, depth=14)))
        children = list(model)
        model = nn.Sequential(*children[:4], children[5], children[7], *children[9:])
        for m in model.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        return model

    def half() -> nn.Module:
        torch.manual_seed(trial.seed)
        return finetune(beginner(), few, epochs=epochs // 2, lr=FRESH, seed=trial.seed)

    for arm in trial.arms("teacher", *LABELS):
        large = trial.shared("teacher", lambda: resnet(trial, task, depth=14))
        if arm.name == "teacher":
            arm.log(params=parameters(large), before=accuracy(large, task), accuracy=accuracy(large, task))
            continue
        small = beginner()
        rest, lr, learner = epochs, TUNE, None
        if arm.name in ("scratch", "distilled"):
            lr = FRESH
        elif arm.name == "pruned":
            small = prune(large, calibration, parameters(small), trial.seed)
        elif arm.name == "dropped":
            small = cla_fuse(large, small.eval(), calibration, balance="merge", weight=0.0)
        else:
            small = cla_fuse(large, trial.shared("half", half), calibration, balance="merge")
            rest = epochs - epochs // 2
        if "distilled" in arm.name:
            learner = partial(SoftTargets, large)
        arm.log(params=parameters(small), before=accuracy(small, task))
        train(small, few, rest, lr, trial.seed, learner or Backprop)
        arm.log(accuracy=accuracy(small, task))


def train(model: nn.Module, task: ImageTask, epochs: int, lr: float, seed: int, learner: type[Learner] | partial) -> None:
    """One cycle of SGD on augmented batches, as the teacher was trained."""
    batches = Augmented(task.train, seed=seed)
    optimizer = partial(SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(batches))
    learner(optimizer=optimizer, schedule=schedule).fit(model.train(), batches, epochs=epochs, seed=seed)
    model.eval()


def prune(model: nn.Module, loader: list, most: int, seed: int) -> nn.Module:
    """HAP without implants, in residual streams too, to at most `most` parameters."""
    ratio = 1 - most / parameters(model)
    return hap(model, loader, ratio=ratio, of="params", implant=0.0, coupled="sum", probes=8, samples=128, seed=seed)


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(8.5, 4.2)
    ax = fig.subplots()
    colours = ("#999999", "#56B4E9", "#E69F00", "#CC79A7", "#0072B2", "#D55E00")
    for i, (arm, colour) in enumerate(zip(LABELS, colours, strict=True)):
        before, after = (100 * record.values(arm, metric) for metric in ("before", "accuracy"))
        ax.plot([before.mean(), after.mean()], [-i, -i], color=colour, linewidth=3, alpha=0.35)
        ax.plot(before, [-i] * len(before), "o", color=colour, markerfacecolor="white", label="before" if not i else None)
        ax.plot(after, [-i] * len(after), "o", color=colour, label="after" if not i else None)
        ax.text(after.max() + 0.8, -i, f"{after.mean():.1f} % with {record.mean(arm, 'params') / 1000:.0f}k", va="center", fontsize=8)
    teacher = 100 * record.mean("teacher", "accuracy")
    ax.axvline(teacher, color="black", linestyle=":", linewidth=0.8)
    ax.text(teacher, 0.6, f"teacher, {record.mean('teacher', 'params') / 1000:.0f}k", fontsize=8, ha="center")
    ax.set_yticks([-i for i in range(len(LABELS))], LABELS.values())
    ax.set(xlabel="test accuracy (%), before and after the epochs that are left", xlim=(5, teacher + 8), ylim=(-len(LABELS) + 0.4, 1))
    ax.legend(fontsize=8, loc="lower left")
