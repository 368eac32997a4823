"""CHITA against magnitude, diagonal Fisher and WoodFisher: accuracy right after pruning, at five sparsities, on the paper's MLPNet.

All methods prune the same trained network with gradients of the same 500 images and fine-tune nothing. CHITA++ takes their gradients anew
at each stage, as in the paper; ``bso_stages`` does so too, without the search for the support, and tells what the stages alone are worth.
``chita_exchange`` is our addition. A second network, a ResNet-8, is pruned block by block and then trained one epoch on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from neurarium import data
from neurarium.compress import chita, chita_pp, diagonal_fisher, magnitude, per_sample_grads, sparse_quadratic, woodfisher
from neurarium.experiments.compress.zoo import accuracy, convnet, mlpnet, tune
from neurarium.meter.allocated import AllocatedBytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
SOLVERS = {"solve_magnitude": "bso", "solve_chita": "active", "solve_exchange": "exchange"}


def run(trial: Trial) -> None:
    samples = trial.scale(smoke=64, laptop=500)
    name = trial.scale(smoke="digits", laptop="mnist")
    task = on(data.images(name, train=trial.scale(smoke=600, laptop=None), seed=trial.seed), trial)
    rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(trial.seed))[:samples].to(trial.device)
    calibration = [(task.train.x[rows], task.train.y[rows])]
    stages = trial.scale(smoke=3, laptop=15)
    sparsities = trial.scale(smoke=(0.5, 0.8), laptop=SPARSITIES)

    def dense() -> nn.Module:
        return mlpnet(task, epochs=trial.scale(smoke=2, laptop=5), seed=trial.seed)

    methods: dict[str, Callable[..., nn.Module]] = {
        "mp": lambda model, sparsity: magnitude(model, sparsity=sparsity),
        "mp_bso": partial(chita, loader=calibration, samples=samples, method="bso"),
        "diagonal": partial(diagonal_fisher, loader=calibration, samples=samples),
        "woodfisher": partial(woodfisher, loader=calibration, samples=samples),
        "chita": partial(chita, loader=calibration, samples=samples),
        "chita_exchange": partial(chita, loader=calibration, samples=samples, method="exchange"),
        "chita_pp": partial(chita_pp, loader=calibration, samples=samples, stages=stages),
        "bso_stages": partial(chita_pp, loader=calibration, samples=samples, stages=stages, method="bso"),
    }
    for arm in trial.arms("dense", *methods):
        model = trial.shared("mlpnet", dense)
        if arm.name == "dense":
            arm.log(accuracy=accuracy(model, task))
            continue
        levels = sparsities[-3:] if arm.name in ("chita_pp", "bso_stages") else sparsities  # where one stage begins to fail
        with arm.timed("prune_seconds"):
            pruned = {s: methods[arm.name](model, sparsity=s) for s in levels}
        values = [accuracy(m, task) for m in pruned.values()]
        arm.log(accuracy=values, at_95=values[-2], at_98=values[-1])
        arm.curve("accuracy", x=list(levels), y=values)

    for arm in trial.arms(*SOLVERS):  # the quadratic problem alone, at 95 %: objective and memory
        model = trial.shared("mlpnet", dense)
        weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        flat = torch.cat([w.detach().flatten() for w in weights.values()])
        with AllocatedBytes() as memory:
            gradients = per_sample_grads(model, *calibration[0], names=list(weights))
            solution = sparse_quadratic(gradients, flat, round(0.05 * len(flat)), 1e-4, method=SOLVERS[arm.name])
        arm.log(objective=solution.objective, peak_bytes=memory.peak, of_hessian=memory.peak / (4 * len(flat) ** 2))

    conv = on(data.images(name, train=trial.scale(smoke=300, laptop=12_000), seed=trial.seed), trial)
    for arm in trial.arms("conv_mp", "conv_chita"):
        model = trial.shared("convnet", lambda: convnet(conv, epochs=trial.scale(smoke=1, laptop=3), seed=trial.seed))
        if arm.name == "conv_mp":
            result = magnitude(model, sparsity=0.9)
        else:
            result = chita(model, calibration, samples=samples, sparsity=0.9, method="active", block=500)
        arm.log(before=accuracy(result, conv), dense=accuracy(model, conv))
        tune(result, conv.train.batches(128, seed=trial.seed), epochs=1, lr=0.03, seed=trial.seed)
        arm.log(after=accuracy(result, conv))


def on(task: data.ImageTask, trial: Trial) -> data.ImageTask:
    """The task on the trial's device."""
    return replace(task, train=task.train.to(trial.device), test=task.test.to(trial.device))


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "mp": "magnitude", "diagonal": "diagonal Fisher", "mp_bso": "magnitude + back-solve", "woodfisher": "WoodFisher",
        "chita": "CHITA", "chita_exchange": "CHITA + exchange (ours)", "chita_pp": "CHITA++", "bso_stages": "back-solve in stages",
    }  # fmt: skip
    colours = ("#999999", "#CC79A7", "#56B4E9", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#000000")
    fig.set_size_inches(9.5, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(2, 1))
    for (arm, label), colour in zip(names.items(), colours, strict=True):
        if arm not in record.arms:
            continue
        values = 100 * record.values(arm, "accuracy")  # (seeds, sparsities)
        x = 100 * torch.tensor(record.curves(arm, "accuracy")[0][0]).numpy()
        style = ":" if arm in ("chita_exchange", "bso_stages") else "-"
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
        left.errorbar(x, values.mean(0), spread, label=label, color=colour, marker="o", markersize=4, capsize=2, linestyle=style)
    left.axhline(100 * record.mean("dense", "accuracy"), color="black", linewidth=0.8, linestyle=":")
    left.text(50.5, 100 * record.mean("dense", "accuracy") - 4, "dense", fontsize=8)
    left.set(xlabel="weights removed (%)", ylabel="test accuracy, no fine-tuning (%)", title="One network, one shot of pruning")
    left.legend(fontsize=8, loc="lower left")
    for i, (arm, label, colour) in enumerate((("conv_mp", "magnitude", "#999999"), ("conv_chita", "CHITA, blocks", "#0072B2"))):
        for j, when in enumerate(("before", "after")):
            values = 100 * record.values(arm, when)
            error = values.std(ddof=1) if len(values) > 1 else 0
            right.bar(j + 0.4 * (i - 0.5), values.mean(), 0.36, yerr=error, color=colour, capsize=3, label=label if j == 0 else None)
    right.set_xticks((0, 1), ("right after\npruning", "after one\nepoch"))
    right.set(title="ResNet-8, 90 % removed", ylabel="test accuracy (%)")
    right.legend(fontsize=8, loc="lower right")
