"""One noise, four meanings: it disturbs exact feedback, comes free with an optical one, buys privacy for labels, and is what DP-SGD adds.

All rules train one network on one set of images with the same number of steps; each has two learning rates and the one that is better on
the validation part counts. ``sigma``: noise on each number that is fed back. DP-SGD gets the noise that gives a label the same epsilon.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.optim import SGD

from neurarium import data
from neurarium.experiments.images import images
from neurarium.experiments.learn.photonic_dp import BATCH, DELTA, mlp
from neurarium.learn.feedback import DFA
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.photonic import OPU
from neurarium.learn.private_feedback import DPSGD, PrivateDFA, epsilon

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SIGMAS = {"s003": 0.03, "s01": 0.1, "s03": 0.3, "s1": 1.0, "s3": 3.0}
LABELS = {
    "dfa": "feedback alignment, noisy projection", "optical": "ternary optical feedback", "private": "private feedback", "dpsgd": "DP-SGD",
}  # fmt: skip
# The larger the noise, the smaller the steps that survive it.
RATES = {
    "bp": (0.03, 0.1), "dfa": (0.03, 0.1), "optical": (0.01, 0.03), "private": (0.1, 0.3), "dpsgd": (0.1, 0.3),
    "dfa_s1": (0.01, 0.03), "dfa_s3": (0.003, 0.01), "optical_s3": (0.003, 0.01), "private_s1": (0.003, 0.01), "private_s3": (0.001, 0.003),
    "dpsgd_s1": (0.03, 0.1), "dpsgd_s3": (0.01, 0.03),
}  # fmt: skip


def rule_of(kind: str, sigma: float):
    if kind == "bp":
        return Backprop()
    if kind == "dfa":  # a projector that is analog in and exact but for its noise
        return DFA(projector=partial(OPU, ternary=False, levels=None, noise=sigma))
    if kind == "optical":  # the two exposures of a ternary error each bring noise
        return DFA(ternary=0.15, projector=partial(OPU, noise=sigma / 2**0.5))
    return PrivateDFA(sigma=sigma) if kind == "private" else DPSGD(sigma=sigma / 2**0.5)


def run(trial: Trial) -> None:
    task = images(trial, train=(256, 4000), test=(200, None))
    test = task.test.to(trial.device).batches(1000, shuffle=False)
    val, train = task.train.to(trial.device).split(len(task.train) // 5, seed=trial.seed)
    train = data.TensorData(*train[:2000])
    epochs, width = trial.scale(smoke=(1, 16), laptop=(7, 128))

    for arm in trial.arms("bp", *(f"{kind}_{s}" for kind in LABELS for s in SIGMAS)):
        kind, _, level = arm.name.partition("_")
        sigma, rates, runs = SIGMAS.get(level, 0.0), RATES.get(arm.name, RATES[kind]), []
        for rate in trial.scale(smoke=rates[:1], laptop=rates):
            rule = replace(rule_of(kind, sigma), optimizer=partial(SGD, lr=rate, momentum=0.9))
            torch.manual_seed(trial.seed)
            model = mlp(width, train)
            history = rule.fit(model, train.batches(BATCH, seed=trial.seed), epochs=epochs, seed=trial.seed)
            runs.append((evaluate(model, val.batches(1000, shuffle=False))["accuracy"], rate, rule, model, history))
        _, rate, rule, model, history = max(runs, key=lambda r: r[0])
        arm.log(sigma=sigma, accuracy=evaluate(model, test)["accuracy"], rate=rate, images=len(train))
        if isinstance(rule, (PrivateDFA, DPSGD)):
            arm.log(epsilon=epsilon(rule, n=len(train), batch=BATCH, steps=history.steps, delta=DELTA).epsilon)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against noise, and against the privacy that the noise buys."""
    from matplotlib.ticker import NullFormatter

    fig.set_size_inches(11, 4.4)
    fig.set_layout_engine("constrained")
    noise, privacy = fig.subplots(1, 2, sharey=True)
    colours = dict(zip(LABELS, ("#0072B2", "#D55E00", "#CC79A7", "#009E73")))
    for kind, label in LABELS.items():
        arms = [f"{kind}_{s}" for s in SIGMAS if f"{kind}_{s}" in record.arms]
        y = [100 * record.values(a, "accuracy") for a in arms]
        for ax, metric in ((noise, "sigma"), (privacy, "epsilon")):
            if metric == "sigma" or kind in ("private", "dpsgd"):
                x = [record.mean(a, metric) for a in arms]
                ax.errorbar(x, [v.mean() for v in y], yerr=[v.std() for v in y], fmt="o-", capsize=3, color=colours[kind], label=label)
    for ax in (noise, privacy):
        if "bp" in record.arms:
            ax.axhline(100 * record.mean("bp", "accuracy"), color="k", ls=":", lw=1, label="backpropagation, no noise")
        ax.axhline(10, color="#999999", lw=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    noise.set(xlabel="noise on each number that is fed back (DP-SGD: of equal epsilon)", ylabel="test accuracy (%)")
    noise.set_title("a cost that feedback alignment hardly feels", fontsize=10)
    privacy.set(xlabel="epsilon of a label (delta = 1e-5)")
    privacy.set_title("an asset where it is calibrated, at a price", fontsize=10)
    noise.legend(fontsize=8, loc="lower left")
    count = int(max(record.mean(a, "images") for a in record.arms))
    fig.suptitle(f"Is noise a cost or an asset? MNIST 14x14, {count} images, two hidden layers of 128")
