"""One MLP, one budget of seconds, nine rules: MNIST at 14x14, three hidden layers of 256, batches of 64.

Every rule trains until the seconds of its own steps are spent (evaluations are not charged); Cascaded Forward solves in closed form and
needs less. Learning rates were chosen from three for each rule, by the same budget on seeds that are not used here. Two rules
cannot train the MLP itself: the physical rule has it without a head and with slots for the label, NoProp has its three hidden layers as the
encoders of three blocks.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.counter_current import CounterCurrent
from neurarium.learn.feedback import DFA
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.local import gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.noprop import NoProp, NoPropNet
from neurarium.learn.physical import PhysicalChain, PhysicalForwardForward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH, PARTS = 64, 5  # an epoch of a rule is a fifth of the data, so that it can stop close to its budget
RULES = {
    "bp": Backprop(optimizer=partial(Adam, lr=1e-3)),
    "ff": ForwardForward(optimizer=partial(Adam, lr=3e-3)),
    "cafo": CascadedForward(ridge=10.0),
    "mf": MonoForward(order="parallel", input_readout=False, optimizer=partial(Adam, lr=1e-3)),
    "ccl": CounterCurrent(optimizer=partial(SGD, lr=1.0)),
    "dfa": DFA(optimizer=partial(Adam, lr=1e-3)),
    "ternary_dfa": DFA(ternary=0.1, optimizer=partial(Adam, lr=1e-3)),
    "phyff": PhysicalForwardForward(optimizer=partial(Adam, lr=1e-3)),
    "noprop": NoProp(optimizer=partial(AdamW, lr=1e-3, weight_decay=1e-3, fused=True)),
}
LABELS = {
    "bp": "backpropagation", "ff": "Forward-Forward", "cafo": "Cascaded Forward", "mf": "Mono-Forward", "ccl": "counter-current",
    "dfa": "direct feedback", "ternary_dfa": "ternary feedback", "phyff": "physical rule", "noprop": "NoProp",
}  # fmt: skip


class Parts:
    """Epoch e is part e % PARTS of pass e // PARTS of the batches."""

    def __init__(self, batches) -> None:
        self.batches, self.epoch = batches, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.batches.set_epoch(self.epoch // PARTS)
        here = self.epoch % PARTS
        yield from (batch for i, batch in enumerate(self.batches) if i % PARTS == here)


def run(trial: Trial) -> None:
    task = images(trial, train=(512, 10_000), test=(300, 5000), standardise=True)
    train, test = task.train.to(trial.device), task.test.to(trial.device)
    budget, width = trial.scale(smoke=(0.02, 16), laptop=(2.5, 256))
    shown, watched = test.batches(1000, shuffle=False), data.TensorData(*test[:1000]).batches(1000, shuffle=False)
    batches = train.batches(BATCH, seed=trial.seed)

    for arm in trial.arms(*RULES):
        rule, start = RULES[arm.name], net(arm.name, width, train).to(trial.device)
        model, moments, found, due = deepcopy(start), [], [], [budget * k / 8 for k in range(1, 8)]

        def watch(progress, rule=rule, moments=moments, found=found, due=due) -> bool:
            spent = sum(e["seconds"] for e in progress.train)
            if due and spent >= due[0]:
                while due and spent >= due[0]:
                    due.pop(0)
                moments.append(spent)
                found.append(evaluate(rule.predictor(progress.model), watched)["accuracy"])
            return spent >= budget

        if arm.name == "cafo":
            began = time.perf_counter()
            rule.fit(model, batches, epochs=1, seed=trial.seed)
            spent, steps = time.perf_counter() - began, 1
        else:
            history = rule.fit(model, Parts(batches), epochs=100_000, seed=trial.seed, callbacks=[watch])
            spent, steps = sum(e["seconds"] for e in history.train), history.steps
        accuracy = evaluate(rule.predictor(model), shown)["accuracy"]
        arm.log(accuracy=accuracy, fit_seconds=spent, steps=steps)
        arm.curve("accuracy", x=[*moments, spent], y=[*found, accuracy])
        arm.log(flops=closed_form(start, train) if arm.name == "cafo" else steps * flops_of_a_step(rule, start, train))
        arm.log(saved_bytes=saved_bytes(rule, start, train))
        asked = replace(rule, feedback=rule.trained(model).feedback) if arm.name == "ccl" else rule
        alignment = hidden_alignment(asked, model, train[:256], trial.seed)
        if isfinite(alignment):
            arm.log(alignment=alignment)


def net(name: str, width: int, train: data.TensorData) -> nn.Module:
    if name == "noprop":
        return NoPropNet(lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, width), nn.ReLU()), 10, train.x[:2], steps=3, hidden=width)
    if name == "phyff":
        return PhysicalChain([nn.Sequential(nn.Linear(n, width), nn.ReLU()) for n in (206, width, width)], 196, 10)
    hidden = [m for n in (196, width, width) for m in (nn.Linear(n, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def hidden_alignment(rule, model: nn.Module, batch, seed: int) -> float:
    """Mean cosine with the gradient over the weight matrices below the output; NaN where the rule moves none of them."""
    cosines = gradient_alignment(rule, model, batch, seed=seed)
    shapes = {n: p for n, p in model.named_parameters() if p.ndim == 2 and p.shape[0] != 10}
    known = [v for n, v in cosines.items() if n in shapes and isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def flops_of_a_step(rule, start: nn.Module, train: data.TensorData) -> float:
    """Two steps less one, so that what a fit does before its first step does not count."""
    batch = train[:BATCH]

    def count(n: int) -> int:
        def fit() -> None:
            with torch.enable_grad():
                rule.fit(deepcopy(start), [batch] * n, epochs=1)

        return meter.flops(fit)

    return count(2) - count(1)


def closed_form(start: nn.Module, train: data.TensorData) -> float:
    """One pass of features, and for each block the products and the solve of the smaller side."""
    total, n = meter.flops(start, train.x), len(train)
    for layer in start:
        f = layer.out_features if isinstance(layer, nn.Linear) else 0
        total += 2 * n * f * min(n, f) + min(n, f) ** 3 / 3
    return float(total)


def saved_bytes(rule, start: nn.Module, train: data.TensorData) -> int:
    """Peak bytes that one batch keeps for the backward pass."""
    model, batch = deepcopy(start), train[:BATCH]
    with meter.SavedBytes() as kept:
        rule.fit(model, [batch], epochs=1)
    return kept.peak


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against seconds; accuracy against FLOPs; memory and alignment."""
    colours = dict(zip(LABELS, ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#8C564B")))
    arms = [a for a in LABELS if a in record.arms]
    fig.set_size_inches(13, 8)
    fig.set_layout_engine("constrained")
    (time_, work), (memory, turn) = fig.subplots(2, 2)
    for arm in arms:
        curves = record.curves(arm, "accuracy")
        grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 30)
        y = 100 * np.array([np.interp(grid, *c) for c in curves])
        time_.plot(grid, y.mean(0), color=colours[arm], lw=2, label=LABELS[arm])
        time_.fill_between(grid, y.min(0), y.max(0), color=colours[arm], alpha=0.15, lw=0)
        x, y = record.values(arm, "flops") / 1e9, 100 * record.values(arm, "accuracy")
        time_.plot(record.mean(arm, "fit_seconds"), y.mean(), "o", color=colours[arm], mec="k")
        work.errorbar(x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), fmt="o", ms=7, capsize=2, color=colours[arm], mec="k")
        work.annotate(LABELS[arm], (x.mean(), y.mean()), xytext=(6, -3), textcoords="offset points", fontsize=8)
    time_.set(xlabel="seconds of training", ylabel="test accuracy (%)", title="one budget of seconds")
    time_.legend(fontsize=8, loc="lower right", ncols=2)
    work.set(xscale="log", xlabel="GFLOPs of training", ylabel="test accuracy (%)", title="what the seconds were spent on")
    work.margins(x=0.25)
    names = [LABELS[a] for a in arms]
    memory.barh(names, [record.mean(a, "saved_bytes") / 1024 for a in arms], color=[colours[a] for a in arms])
    memory.set(xlabel="KiB kept for the backward pass of one batch", title="memory")
    for i, arm in enumerate(arms):
        values = record.values(arm, "alignment") if "alignment" in record.metrics(arm) else []
        if len(values):
            turn.barh(i, np.mean(values), color=colours[arm])
            turn.plot(values, np.full(len(values), i), "k|", ms=9)
        else:
            turn.text(0.01, i, "moves no hidden weight", va="center", fontsize=8, color="#555555")
    turn.set_yticks(range(len(arms)), names)
    turn.axvline(0, color="k", lw=0.8)
    turn.set(xlabel="cosine of the update with the gradient, hidden weights", title="alignment after training")
    for ax in (memory, turn):
        ax.invert_yaxis()
        ax.grid(alpha=0.3, axis="x")
    for ax in (time_, work):
        ax.grid(alpha=0.3)
