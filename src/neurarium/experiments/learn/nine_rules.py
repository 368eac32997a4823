"""One MLP, nine rules, equal passes over the data: MNIST at 14x14, three hidden layers of 256, batches of 64.

Every rule sees the same batches and takes one step on each; Cascaded Forward solves in closed form and sees each image once. A budget of
passes gives the same numbers on every machine, one of seconds does not; the seconds of the rule's own steps are logged beside them
(evaluations are not charged), and ``accuracy_by_then`` is what a rule had reached when backpropagation was done. Learning rates (the
ridge of Cascaded Forward, the threshold of ternary feedback) were chosen from at least two values after three passes, on a seed that is
not used here. Two rules cannot train the MLP itself: the physical rule has it without a head and with slots for the label, NoProp has its
three hidden layers as the encoders of three blocks, which have more weights of their own.
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

BATCH = 64
RULES = {
    "bp": Backprop(optimizer=partial(Adam, lr=2e-3)),
    "ff": ForwardForward(optimizer=partial(Adam, lr=3e-3)),
    "cafo": CascadedForward(ridge=0.1),
    "mf": MonoForward(order="parallel", input_readout=False, optimizer=partial(Adam, lr=2e-3)),
    "ccl": CounterCurrent(optimizer=partial(SGD, lr=3.0)),
    "dfa": DFA(optimizer=partial(Adam, lr=3e-3)),
    "ternary_dfa": DFA(ternary=0.2, optimizer=partial(Adam, lr=1e-3)),
    "phyff": PhysicalForwardForward(order="parallel", optimizer=partial(Adam, lr=1e-3)),
    "noprop": NoProp(optimizer=partial(AdamW, lr=1e-3, weight_decay=1e-3, fused=True)),
}
LABELS = {
    "bp": "backpropagation", "ff": "Forward-Forward", "cafo": "Cascaded Forward", "mf": "Mono-Forward", "ccl": "counter-current",
    "dfa": "direct feedback", "ternary_dfa": "ternary feedback", "phyff": "physical rule", "noprop": "NoProp",
}  # fmt: skip


def run(trial: Trial) -> None:
    task = images(trial, train=(512, 10_000), test=(300, 5000), standardise=True)
    train, test = task.train.to(trial.device), task.test.to(trial.device)
    passes, width = trial.scale(smoke=(1, 16), laptop=(6, 256))
    shown, watched = test.batches(1000, shuffle=False), data.TensorData(*test[:1000]).batches(1000, shuffle=False)
    batches = train.batches(BATCH, seed=trial.seed)
    warm_up(train, width)

    for arm in trial.arms(*RULES):
        rule, start = RULES[arm.name], net(arm.name, width, train).to(trial.device)
        model, moments, found = deepcopy(start), [0.0], [0.1]  # a guess, before the first step

        def watch(progress, rule=rule, moments=moments, found=found) -> None:
            moments.append(sum(e["seconds"] for e in progress.train))
            found.append(evaluate(rule.predictor(progress.model), watched)["accuracy"])

        closed = arm.name == "cafo"
        began = time.perf_counter()
        rule.fit(model, batches, epochs=1 if closed else passes, seed=trial.seed, callbacks=[] if closed else [watch])
        if closed:
            moments.append(time.perf_counter() - began)
            found.append(evaluate(rule.predictor(model), watched)["accuracy"])
        arm.log(accuracy=evaluate(rule.predictor(model), shown)["accuracy"])
        arm.log_timed(fit_seconds=moments[-1])
        limit = moments[-1] if arm.name == "bp" else trial.metric("bp", "fit_seconds")
        if closed and moments[-1] > limit:  # a closed form has nothing to show before it is done
            arm.log_timed(accuracy_by_then=0.1)
        else:
            arm.log_timed(accuracy_by_then=float(np.interp(limit, moments, found)))
        arm.curve("by_pass", x=np.arange(len(found)), y=found)
        arm.curve("by_seconds", x=moments, y=found, timed=True)
        arm.log(flops=closed_form(start, train) if closed else passes * len(batches) * flops_of_a_batch(rule, start, train))
        arm.log(saved_bytes=saved_bytes(rule, start, train), parameters=meter.parameters(start))
        if not closed:  # the random blocks of Cascaded Forward do not move
            asked = replace(rule, feedback=rule.trained(model).feedback) if arm.name == "ccl" else rule
            arm.log(alignment=hidden_alignment(asked, model, train[:256], trial.seed))


def warm_up(train: data.TensorData, width: int) -> None:
    """What the first steps in a process cost besides should not be charged to the first rule."""
    RULES["bp"].fit(net("bp", width, train).to(train.x.device), [train[:BATCH]] * 3, epochs=1)


def net(name: str, width: int, train: data.TensorData) -> nn.Module:
    if name == "noprop":
        return NoPropNet(lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, width), nn.ReLU()), 10, train.x[:2], steps=3, hidden=width)
    if name == "phyff":
        return PhysicalChain([nn.Sequential(nn.Linear(n, width), nn.ReLU()) for n in (206, width, width)], 196, 10)
    hidden = [m for n in (196, width, width) for m in (nn.Linear(n, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def hidden_alignment(rule, model: nn.Module, batch, seed: int) -> float:
    """Mean cosine over the weight matrices below the output with the gradient of the cross-entropy that the network itself puts out."""
    cosines = gradient_alignment(rule, model, batch, seed=seed)
    shapes = {n: p for n, p in model.named_parameters() if p.ndim == 2 and p.shape[0] != 10}
    known = [v for n, v in cosines.items() if n in shapes and isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def flops_of_a_batch(rule, start: nn.Module, train: data.TensorData) -> float:
    """Two batches less one, so that what a fit does before its first step does not count; all blocks of NoProp see each."""
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
    """Accuracy against seconds and against FLOPs; memory and alignment."""
    from matplotlib.ticker import FixedLocator, NullLocator

    colours = dict(zip(LABELS, ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#8C564B")))
    arms = [a for a in LABELS if a in record.arms]
    fig.set_size_inches(13, 8.5)
    fig.set_layout_engine("constrained")
    (time_, work), (memory, turn) = fig.subplots(2, 2)
    for arm in arms:
        curves = [np.asarray(c) for c in record.curves(arm, "by_seconds")]
        x, y = np.mean([c[0] for c in curves], 0), 100 * np.array([c[1] for c in curves])
        if len(x) > 2:
            time_.plot(x[1:], y.mean(0)[1:], "o-", ms=3, lw=1.8, color=colours[arm], label=LABELS[arm])
            time_.fill_between(x[1:], y.min(0)[1:], y.max(0)[1:], color=colours[arm], alpha=0.15, lw=0)
        else:
            time_.plot(x[-1], y.mean(0)[-1], "*", ms=13, color=colours[arm], label=LABELS[arm])
        x, y = record.values(arm, "flops") / 1e9, 100 * record.values(arm, "accuracy")
        work.errorbar(x.mean(), y.mean(), yerr=y.std(), fmt="o", ms=7, capsize=2, color=colours[arm], mec="k")
        work.annotate(LABELS[arm], (x.mean(), y.mean()), xytext=(7, -3), textcoords="offset points", fontsize=8)
    if "bp" in arms:
        time_.axvline(record.mean("bp", "fit_seconds"), color="k", lw=0.8, ls=":")
    time_.set(xscale="log", xlabel="seconds of training", ylabel="accuracy on 1000 test images (%)", ylim=(60, 98))
    time_.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    time_.xaxis.set_major_formatter("{x:g}")
    time_.xaxis.set_minor_locator(NullLocator())
    time_.set(title="accuracy after each pass (dotted: backpropagation is done)")
    time_.legend(fontsize=8, loc="lower right", ncols=2)
    work.set(xscale="log", xlabel="GFLOPs of training", ylabel="test accuracy (%)", title="what the accuracy costs")
    work.margins(x=0.25)
    names = [LABELS[a] for a in arms]
    for i, arm in enumerate(arms):
        kept = record.mean(arm, "saved_bytes") / 1024
        memory.barh(i, kept, color=colours[arm])
        memory.text(kept, i, f" {kept:.0f}", va="center", fontsize=8)
        values = record.values(arm, "alignment") if record.has(arm, "alignment") else []
        if len(values):
            turn.barh(i, np.mean(values), color=colours[arm])
            turn.plot(values, np.full(len(values), i), "k|", ms=9)
        else:
            turn.text(0.01, i, "moves no hidden weight", va="center", fontsize=8, color="#555555")
    memory.margins(x=0.08)
    memory.set(xlabel="KiB kept for the backward pass of one batch", title="memory")
    turn.axvline(0, color="k", lw=0.8)
    turn.set(xlabel="cosine of the update with the gradient, hidden weights", title="alignment after training")
    for ax in (memory, turn):
        ax.set_yticks(range(len(arms)), names)
        ax.invert_yaxis()
        ax.grid(alpha=0.3, axis="x")
    for ax in (time_, work):
        ax.grid(alpha=0.3)
