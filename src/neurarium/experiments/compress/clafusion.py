"""CLAFusion: one network of two of different depth, by aligning layers and then neurons.

Two perceptrons without biases, 400-200-100-50-25 and 400-200-100 (the authors' ablation), are fused right away and after fine-tuning: with
the aligned map, with every other monotone map, with neurons left unmatched, by merging layers instead of adding them. Two more pairs: one
knows a digit that the other never saw (skill transfer), and two residual networks of 14 and 8 layers.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from neurarium.compress import FusionPlan, apply_fusion, cla_fuse, plan_fusion
from neurarium.data import ImageTask, TensorData
from neurarium.experiments.compress.zoo import accuracy, cifar, finetune, mnist, resnet
from neurarium.learn.fit import Backprop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

WEIGHTS = tuple(i / 10 for i in range(11))
SPECIAL = 4
STAGE = "/0"


def run(trial: Trial) -> None:
    task = trial.shared("mnist", lambda: mnist(trial))
    widths = trial.scale(smoke=((24, 16, 12, 10, 8), (24, 16, 12)), laptop=((400, 200, 100, 50, 25), (400, 200, 100)))
    epochs, more = trial.scale(smoke=(2, 1), laptop=(5, 2))
    samples = [(task.train.x[:200], task.train.y[:200])]

    def perceptrons() -> list[nn.Module]:
        return [taught(task, w, task.train, epochs, trial.seed + i) for i, w in enumerate(widths)]

    def tuned(model: nn.Module) -> float:
        model = copy.deepcopy(model)
        teach(model, task.train, more, 3e-4, trial.seed)
        return accuracy(model, task)

    for arm in trial.arms("parents", "cla", "naive", "by_weights", "merged", "maps", "ensemble"):
        large, small = trial.shared("perceptrons", perceptrons)
        if arm.name == "parents":
            arm.log(accuracy=[accuracy(m, task) for m in (large, small)], finetuned=[tuned(m) for m in (large, small)])
            continue
        if arm.name == "ensemble":
            arm.log(accuracy=accuracy(Ensemble(large, small), task))
            continue
        plan = plan_fusion(large, small, samples)
        if arm.name == "maps":
            depth, chosen = len(widths[0]), len(widths[1])
            others = [m for m in ((0, *c) for c in combinations(range(1, depth), chosen - 1)) if m != plan.maps[STAGE]]
            others = others[: trial.scale(smoke=1, laptop=None)]
            found = [accuracy(apply_fusion(large, small, FusionPlan({STAGE: m}), samples), task) for m in others]
            arm.log(accuracy=found, mean=sum(found) / len(found))
            continue
        options = {"naive": {"align": "index"}, "by_weights": {"align": "weights"}, "merged": {"balance": "merge"}}.get(arm.name, {})
        fused = apply_fusion(large, small, plan, samples, **options)
        arm.log(accuracy=accuracy(fused, task), finetuned=tuned(fused))
        if arm.name == "cla":
            arm.grid("similarity", 1 - torch.tensor(plan.costs[STAGE]))
            arm.curve("map", x=list(range(len(widths[1]))), y=list(plan.maps[STAGE]))

    def specialists() -> list[nn.Module]:
        expert, rest = halves(task, trial.seed)  # the first is a fifth of the data, so it takes more epochs
        return [taught(task, widths[0], expert, 3 * epochs, trial.seed), taught(task, widths[1], rest, epochs, trial.seed + 1)]

    for arm in trial.arms("skill", "skill_naive"):
        large, small = trial.shared("specialists", specialists)
        options = {"align": "index"} if arm.name == "skill_naive" else {}
        ends = [cla_fuse(large, small, samples, weight=w, **options) for w in (0.0, 1.0)]
        values = [accuracy(between(*ends, w), task) for w in WEIGHTS]
        arm.log(accuracy=values, parents=[accuracy(m, task) for m in (large, small)])
        arm.curve("accuracy", x=list(WEIGHTS), y=values)

    images = trial.shared("cifar", lambda: cifar(trial))
    calibration = [(images.train.x[:200], images.train.y[:200])]
    few = replace(images, train=images.train.take(torch.arange(trial.scale(smoke=200, laptop=5000))))
    for arm in trial.arms("resnet_parents", "resnet_cla", "resnet_naive"):
        large, small = (trial.shared(f"resnet{d}", lambda d=d: resnet(trial, images, depth=d)) for d in (14, 8))
        if arm.name == "resnet_parents":
            both = [copy.deepcopy(m) for m in (large, small)]
            before = [accuracy(m, images) for m in both]
            arm.log(accuracy=before, finetuned=[accuracy(finetune(m, few, epochs=1, seed=trial.seed), images) for m in both])
            continue
        fused = cla_fuse(large, small, calibration, align="index" if arm.name == "resnet_naive" else "activations")
        arm.log(accuracy=accuracy(fused, images))
        if arm.name == "resnet_cla":
            arm.log(finetuned=accuracy(finetune(fused, few, epochs=1, seed=trial.seed), images))


def taught(task: ImageTask, widths: tuple[int, ...], train: TensorData, epochs: int, seed: int) -> nn.Module:
    """A perceptron without biases, trained."""
    sizes = (task.train.x[0].numel(), *widths)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o, bias=False), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], task.classes, bias=False)).to(task.train.x.device)
    teach(model, train, epochs, 1e-3, seed)
    return model.eval()


def teach(model: nn.Module, train: TensorData, epochs: int, lr: float, seed: int) -> None:
    Backprop(optimizer=partial(AdamW, lr=lr, weight_decay=0.01)).fit(model, train.batches(128, seed=seed), epochs=epochs, seed=seed)


def halves(task: ImageTask, seed: int) -> tuple[TensorData, TensorData]:
    """All of the special digit with a tenth of the others, and nine tenths of the others."""
    y = task.train.y
    special = y == SPECIAL
    tenth = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device) < 0.1
    return tuple(task.train.take(rows.nonzero().flatten()) for rows in (special | tenth, ~special & ~tenth))  # type: ignore[return-value]


def between(a: nn.Module, b: nn.Module, weight: float) -> nn.Module:
    """The fused network of any weight: a straight line once the neurons are in order (there are no normalisations here)."""
    model = copy.deepcopy(b)
    with torch.no_grad():
        for p, q in zip(model.parameters(), a.parameters(), strict=True):
            p.lerp_(q, 1 - weight)
    return model


class Ensemble(nn.Module):
    """The mean of the members' probabilities."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([m(x).softmax(1) for m in self.members]).mean(0)


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(12, 3.9)
    left, middle, right = fig.subplots(1, 3, width_ratios=(0.7, 1.3, 1))
    cka = record.grids("cla", "similarity")[0]
    image = left.imshow(cka, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    columns, rows = record.curves("cla", "map")[0]
    left.plot(columns, rows, color="#D55E00", marker="o", linewidth=2)
    for (i, j), value in np.ndenumerate(cka):
        left.text(j, i, f"{value:.2f}", ha="center", va="bottom", fontsize=8, color="black" if value > 0.6 else "white")
    left.set(xlabel="layer of the small network", ylabel="layer of the large network", title="CKA and the map (first seed)")
    left.set_xticks(range(cka.shape[1]), range(1, cka.shape[1] + 1)), left.set_yticks(range(cka.shape[0]), range(1, cka.shape[0] + 1))
    fig.colorbar(image, ax=left, fraction=0.08)

    arms = {
        "parents": "parents", "ensemble": "ensemble", "cla": "CLAFusion", "maps": "other maps", "by_weights": "by weights",
        "merged": "merged", "naive": "neurons\nunmatched",
    }  # fmt: skip
    for i, arm in enumerate(a for a in arms if a in record.arms):
        values = 100 * record.values(arm, "accuracy")
        middle.plot([i - 0.12] * values.size, values.ravel(), "o", color="#0072B2", alpha=0.6, label="right away" if not i else None)
        if arm not in ("ensemble", "maps"):
            values = 100 * record.values(arm, "finetuned")
            label = "after 2 more epochs" if not i else None
            middle.plot([i + 0.12] * values.size, values.ravel(), "^", color="#E69F00", alpha=0.7, label=label)
    middle.set_xticks(range(len(arms)), arms.values(), fontsize=7)
    middle.set(ylabel="test accuracy (%)", title="Perceptrons of 5 and 3 hidden layers")
    middle.legend(fontsize=8, loc="lower left")

    for arm, label, colour in (("skill", "CLAFusion", "#0072B2"), ("skill_naive", "neurons unmatched", "#999999")):
        values = 100 * record.values(arm, "accuracy")
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
        right.errorbar(WEIGHTS, values.mean(0), spread, color=colour, marker="o", markersize=4, capsize=2, label=label)
    best = 100 * record.values("skill", "parents").max(1).mean()
    right.axhline(best, color="black", linestyle=":", linewidth=0.8)
    right.text(0.02, best + 0.5, "better parent", fontsize=8)
    right.set(xlabel="weight of the network without the digit", ylabel="test accuracy (%)", title="Skill transfer")
    right.legend(fontsize=8, loc="lower center")
