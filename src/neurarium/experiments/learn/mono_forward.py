"""Mono-Forward against backpropagation, Forward-Forward and Cascaded Forward on MNIST at 14x14.

Every arm gets the same data, the same number of tuning trials (learning rate and weight decay, on the validation part), the same patience.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.fit import Backprop, EarlyStopping, evaluate
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.mono_forward import MonoForward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH, PATIENCE, TRIALS = 64, 3, 4
RULES = {
    "bp": Backprop(),
    "mf": MonoForward(early_stopping=PATIENCE),
    "mf_parallel": MonoForward(order="parallel", input_readout=False),
    "mf_frozen": MonoForward(early_stopping=PATIENCE),  # hidden weights stay random: what do the readouts do alone?
    "mf_attached": MonoForward(order="parallel", input_readout=False, detach=False),  # the same losses, end to end
    "ff": ForwardForward(),
    "cafo_mse": CascadedForward(),
    "cafo_ce": CascadedForward(loss="ce", early_stopping=PATIENCE),
}
LABELS = {
    "bp": "backpropagation", "mf": "Mono-Forward, greedy", "mf_parallel": "Mono-Forward, parallel", "mf_frozen": "MF, random features",
    "mf_attached": "MF, gradients attached", "ff": "Forward-Forward", "cafo_mse": "CaFo, closed form", "cafo_ce": "CaFo, cross-entropy",
}  # fmt: skip


def run(trial: Trial) -> None:
    task = images(trial, train=(600, 10_000))
    n = len(task.train) // 5
    val, train = task.train.to(trial.device).split(n, seed=trial.seed)
    test = task.test.to(trial.device).batches(1000, shuffle=False)
    val = val.batches(1000, shuffle=False)
    batches = train.batches(BATCH, seed=trial.seed)
    most, short, width = trial.scale(smoke=(1, 1, 32), laptop=(20, 2, 256))

    for arm in trial.arms(*RULES):
        rule, frozen, cascade = RULES[arm.name], arm.name == "mf_frozen", arm.name.startswith("cafo")
        start = (cnn() if cascade else mlp(width)).to(trial.device)
        if frozen:
            for layer in list(start)[:-1]:
                layer.requires_grad_(False)
        stop = [EarlyStopping(PATIENCE, "accuracy", -1)] if arm.name == "ff" else [EarlyStopping(PATIENCE)]
        stop = [] if getattr(rule, "order", "") == "greedy" else stop
        rule, lr = tuned(rule, start, batches, val, epochs=short, seed=trial.seed, trials=trial.scale(smoke=1, laptop=TRIALS))

        model = deepcopy(start)
        with arm.timed("seconds_to_stop"):
            history = rule.fit(model, batches, epochs=most, val=val, seed=trial.seed, callbacks=stop)
        found = evaluate(rule.predictor(model), test)
        flops, steps, cache, traffic = training_work(rule, model, train, history, closed_form=arm.name == "cafo_mse")
        saved = 0 if arm.name == "cafo_mse" else saved_bytes(rule, start, train)
        joules = meter.energy(macs=flops / 2, bytes=2 * saved * steps + traffic, memory="dram")
        arm.log(accuracy=found["accuracy"], flops=flops, saved_bytes=saved, joules=joules, tuned=lr, epochs=len(history.train))
        arm.log(cache_bytes=cache, images=len(train), width=0 if cascade else width)
        last = [e["loss"] for e in history.val if e.get("block") == history.val[-1].get("block")]
        arm.log(val_loss=min(last) if last else evaluate(rule.predictor(model), val)["loss"])
        if history.val:
            arm.curve("val_loss", y=[e["loss"] for e in history.val])


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def cnn() -> nn.Sequential:
    """The blocks of Cascaded Forward at an eighth of the published channels."""
    layers = [
        m for a, b in ((1, 8), (8, 16), (16, 32)) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(b))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))


def tuned(rule, start, batches, val, *, epochs, seed, trials):
    """A random search of equal size for every arm, judged by validation accuracy: learning rate and weight decay, or the ridge."""
    rng = np.random.default_rng(seed)
    best = (-1.0, rule, 0.0)
    for share in (rng.permutation(trials) + rng.random(trials)) / trials:  # stratified, so that four points cover the range
        if getattr(rule, "loss", "") == "mse":
            setting = exp(log(1e-2) + share * log(1e5))
            candidate = replace(rule, ridge=setting)
        else:
            setting = exp(log(3e-4) + share * log(1e-2 / 3e-4))
            candidate = replace(rule, optimizer=partial(AdamW, lr=setting, weight_decay=10 ** rng.uniform(-5, -2)))
        model = deepcopy(start)
        candidate.fit(model, batches, epochs=epochs, seed=seed)
        best = max(best, (evaluate(candidate.predictor(model), val)["accuracy"], candidate, setting), key=lambda b: b[0])
    return best[1], best[2]


def training_work(rule, model, train, history, *, closed_form: bool) -> tuple[float, float, float, float]:
    """FLOPs and number of the steps up to the best epoch of each block, by counting one step of each; bytes and traffic of the cache.

    The cache of greedy order holds the inputs of the block in training: written once, read once an epoch. Its first is the data itself.
    """
    x, y = train.x[:BATCH], train.y[:BATCH]
    passes = len(train) / BATCH

    def count(step) -> int:
        def graded() -> None:
            with torch.enable_grad():
                step()

        return meter.flops(graded)

    if isinstance(rule, Backprop):
        epochs = best_epoch(history.val)
        return passes * epochs * count(lambda: F.cross_entropy(model(x), y).backward()), passes * epochs, 0, 0
    objective, greedy, total = rule.trained(model), rule.order == "greedy", 0.0
    if not rule.detach:  # gradients cross the blocks: one step is one pass through all of them

        def attached() -> None:
            h, losses = objective.enter(x, y), []
            for i, block in enumerate(objective.blocks):
                h_in, h = h, block(h)
                if objective.learned(i):
                    losses.append(objective.loss(i, h_in, h, y)[0])
                h = objective.between(h)
            torch.stack(losses).sum().backward()

        epochs = best_epoch(history.val)
        return passes * epochs * count(attached), passes * epochs, 0, 0
    steps, cache, traffic, cached = 0.0, 0.0, 0.0, greedy and rule.cache and objective.repeatable
    h = objective.enter(x, y)
    for i, block in enumerate(objective.blocks):
        if objective.learned(i):
            epochs = best_epoch(
                [e for e in history.val if e["block"] == i] if greedy else history.val, -1 if isinstance(rule, ForwardForward) else 1
            )
            steps = steps + passes * epochs if greedy else passes * epochs
            if cached and i:
                held = h[0].numel() * h.element_size() * len(train)
                cache, traffic = max(cache, held), traffic + held * (1 + epochs)
            if closed_form:  # the products and the solve of the smaller side
                f, n = h.flatten(1).shape[1], len(train)
                total += 2 * n * f * min(n, f) + min(n, f) ** 3 / 3
            else:
                leaf, block_in = block, h.detach()
                total += passes * epochs * count(lambda: objective.loss(i, block_in, leaf(block_in), y)[0].backward())  # noqa: B023
        with torch.no_grad():
            if greedy:
                total += passes * meter.flops(block, h)
            h = objective.between(block(h))
    return total, steps, cache, traffic


def best_epoch(val, sign: int = 1) -> int:
    """How many epochs it took to the best validation."""
    metric = "loss" if sign > 0 or not val or "accuracy" not in val[0] else "accuracy"
    values = [sign * e[metric] for e in val] or [0]
    return values.index(min(values)) + 1


def saved_bytes(rule, start, train) -> int:
    """Peak bytes that one batch keeps for the backward pass."""
    model, batch = deepcopy(start), data.TensorData(train.x[:BATCH], train.y[:BATCH]).batches(BATCH)
    with meter.SavedBytes() as kept:
        rule.fit(model, batch, epochs=1)
    return kept.peak


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against energy and against time, and what a step keeps in memory."""
    from matplotlib.ticker import NullFormatter

    arms = [a for a in LABELS if a in record.arms]
    colours = dict(zip(LABELS, ("#000000", "#D55E00", "#E69F00", "#999999", "#F0E442", "#0072B2", "#009E73", "#56B4E9")))
    fig.set_size_inches(11, 4.6)
    fig.set_layout_engine("constrained")
    energy, time, memory = fig.subplots(1, 3)
    for ax, metric, unit in (
        (energy, "joules", "model energy of training (J)"),
        (time, "seconds_to_stop", "time until early stopping (s)"),
    ):
        for a in arms:
            x, y = record.values(a, metric), 100 * record.values(a, "accuracy")
            ax.errorbar(
                x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), fmt="o", ms=7, capsize=2, color=colours[a], mec="k", label=LABELS[a]
            )
        ax.set(xscale="log", xlabel=unit, ylabel="test accuracy (%)")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    shown = [a for a in arms if record.mean(a, "saved_bytes") > 0]
    memory.barh([LABELS[a] for a in shown], [record.mean(a, "saved_bytes") / 1024 for a in shown], color=[colours[a] for a in shown])
    memory.invert_yaxis()
    memory.set(xlabel="kept for the backward pass (KiB)")
    memory.tick_params(axis="y", labelsize=7)
    fig.legend(*energy.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    images, width = (int(max(record.mean(a, name) for a in arms)) for name in ("images", "width"))
    fig.suptitle(f"Learning without backpropagation: 14x14, {images} images, hidden layers of {width}, equal tuning")
