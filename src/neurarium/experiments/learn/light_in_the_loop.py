"""Direct feedback alignment with exact, ternary and optical projections against backpropagation on MNIST at 14x14.

Each rule, the shallow one included, has its learning rate tuned on the validation part. The noise sweep and the ablation take the rates
of the rules that they vary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

from neurarium import data
from neurarium.experiments.images import images
from neurarium.learn.feedback import DFA, RandomFeedback, ternarise
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.local import gradient_alignment
from neurarium.learn.photonic import OPU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH, RATES, THRESHOLD = 64, (3e-4, 1e-3, 3e-3, 1e-2), 0.15


class Redrawn(RandomFeedback):
    """The ablation: another matrix in every step."""

    def project(self, e):
        self.matrix.normal_(std=e.shape[1] ** -0.5)
        return super().project(e)


def optical(noise: float) -> DFA:
    return DFA(ternary=THRESHOLD, projector=partial(OPU, noise=noise))


TUNED = {"bp": Backprop(), "dfa": DFA(), "dfa_ternary": DFA(ternary=THRESHOLD), "dfa_optical": optical(0.1), "shallow": Backprop()}
VARIANTS = {  # arm: the rule, and whose learning rate it takes
    "dfa_optical_s0": (optical(0.0), "dfa_optical"), "dfa_optical_s03": (optical(0.3), "dfa_optical"),
    "dfa_optical_s1": (optical(1.0), "dfa_optical"), "dfa_redrawn": (DFA(projector=Redrawn), "dfa"),
}  # fmt: skip


def run(trial: Trial) -> None:
    task = images(trial, train=(256, 5000), test=(200, None))
    test = task.test.to(trial.device).batches(1000, shuffle=False)
    val, train = task.train.to(trial.device).split(len(task.train) // 5, seed=trial.seed)
    batches, watched = train.batches(BATCH, seed=trial.seed), train[:256]
    epochs, short, width, draws = trial.scale(smoke=(1, 1, 32, 2), laptop=(8, 2, 256, 100))

    for arm in trial.arms(*TUNED, *VARIANTS):
        rule, like = VARIANTS.get(arm.name, (TUNED.get(arm.name), arm.name))
        make = partial(mlp, width, train, frozen=arm.name == "shallow")
        rate = trial.shared(f"rate_{like}", lambda: tuned(TUNED[like], make, train, val, short, trial.seed))  # noqa: B023
        rule = replace(rule, optimizer=partial(Adam, lr=rate))
        model = make()
        series: list[list[float]] = []
        redrawn = arm.name == "dfa_redrawn"

        def watch(progress) -> None:
            if isinstance(rule, DFA):  # noqa: B023
                series.append(hidden_alignment(rule, progress.model, watched, trial.seed, 8 if redrawn else 1))  # noqa: B023

        history = rule.fit(model, batches, epochs=epochs, seed=trial.seed, callbacks=[watch])
        arm.log(accuracy=evaluate(model, test)["accuracy"], rate=rate, images=len(train), width=width)
        if isinstance(rule, DFA):
            arm.log(alignment=hidden_alignment(rule, model, watched, trial.seed, draws if redrawn else 1))
            arm.curve("alignment", x=list(range(1, epochs + 1)), y=[float(np.mean(s)) for s in series])
        if arm.name.startswith("dfa_optical"):
            frames = float(history.state["parts"]["feedback"]["frames"])
            noise = rule.projector.keywords["noise"]
            arm.log(frames=frames, optical_seconds=frames / 1500, noise=noise, snr=signal_to_noise(rule, width, watched))


def mlp(width: int, train: data.TensorData, frozen: bool = False) -> nn.Sequential:
    sizes = (196, width, width, width)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    hidden = nn.Sequential(nn.Flatten(), *layers).requires_grad_(not frozen)
    return nn.Sequential(*hidden, nn.Linear(width, 10)).to(train.x.device)


def tuned(rule, make, train, val, epochs: int, seed: int) -> float:
    """The rate that is most accurate on the validation part after a short run."""
    found = {}
    for rate in RATES:
        torch.manual_seed(seed)
        model = make()
        replace(rule, optimizer=partial(Adam, lr=rate)).fit(model, train.batches(BATCH, seed=seed), epochs=epochs, seed=seed)
        found[rate] = evaluate(model, val.batches(1000, shuffle=False))["accuracy"]
    return max(found, key=found.__getitem__)


def hidden_alignment(rule: DFA, model: nn.Module, batch, seed: int, draws: int) -> list[float]:
    """Cosine between update and gradient for the weights of each hidden layer above the first, a mean over draws of the feedback.

    One draw from ``seed`` is the very feedback that the model was trained with.
    """
    found = [gradient_alignment(rule, model, batch, seed=seed + i) for i in range(draws)]
    return np.mean([[v for n, v in f.items() if n.endswith("weight")][1:-1] for f in found], 0).tolist()


def signal_to_noise(rule: DFA, width: int, batch) -> float:
    """Power of what the camera should read over the power of what is wrong about it, for the errors of an untrained model."""
    opu = rule.projector(10, 3 * width, seed=0).to(batch[0].device)
    e = ternarise(torch.full((len(batch[1]), 10), 0.1, device=batch[0].device) - F.one_hot(batch[1], 10), THRESHOLD)
    clean = e @ opu.real.T
    return float(clean.square().mean() / (opu.project(e) - clean).square().mean())


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against the noise of the camera; alignment over time."""
    colours = {
        "bp": "#000000", "dfa": "#0072B2", "dfa_ternary": "#56B4E9", "dfa_optical": "#D55E00", "dfa_redrawn": "#CC79A7",
        "shallow": "#999999",
    }  # fmt: skip
    names = {"bp": "backpropagation", "dfa": "exact feedback", "dfa_ternary": "ternary feedback", "shallow": "random hidden layers"}
    fig.set_size_inches(11, 4.4)
    fig.set_layout_engine("constrained")
    noise, time = fig.subplots(1, 2)
    sweep = [a for a in ("dfa_optical_s0", "dfa_optical", "dfa_optical_s03", "dfa_optical_s1") if a in record.arms]
    sigmas = [record.mean(a, "noise") for a in sweep]
    accuracy = [100 * record.values(a, "accuracy") for a in sweep]
    noise.errorbar(
        range(len(sweep)), [v.mean() for v in accuracy], yerr=[v.std() for v in accuracy], fmt="o-", capsize=3,
        color=colours["dfa_optical"], label="optical feedback (ternary, 8 bits)",
    )  # fmt: skip
    for a, label in names.items():
        if a in record.arms:
            noise.axhline(100 * record.mean(a, "accuracy"), color=colours[a], ls="--", lw=1.2, label=label)
    snr = [record.mean(a, "snr") for a in sweep]
    noise.set_xticks(range(len(sweep)), [f"{s:g}\n{10 * np.log10(r):.0f} dB" for s, r in zip(sigmas, snr)])
    noise.set(xlabel="noise of one reading, and signal to noise of the feedback", ylabel="test accuracy (%)")
    noise.set_title("light carries the error well enough", fontsize=10)
    noise.legend(fontsize=8)
    for a in ("dfa", "dfa_ternary", "dfa_optical", "dfa_redrawn"):
        if a in record.arms:
            curves = record.curves(a, "alignment")
            y = np.array([c[1] for c in curves])
            label = {**names, "dfa_optical": "optical feedback", "dfa_redrawn": "drawn anew in every step"}[a]
            time.plot(curves[0][0], y.mean(0), "o-", ms=3, color=colours[a], label=label)
            time.fill_between(curves[0][0], y.min(0), y.max(0), color=colours[a], alpha=0.15)
    time.axhline(0, color="k", lw=0.8)
    time.set(xlabel="epoch", ylabel="cosine of update and gradient (layers 2, 3)")
    time.set_title("the weights turn towards a feedback that stays", fontsize=10)
    time.legend(fontsize=8)
    images, width = (int(max(record.mean(a, name) for a in record.arms)) for name in ("images", "width"))
    fig.suptitle(f"Training with the error scattered by light: MNIST 14x14, {images} images, hidden layers of {width}")
