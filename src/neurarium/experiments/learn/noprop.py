"""NoProp against the same blocks trained end to end, its own first block, and Forward-Forward; MNIST at 14x14, blocks with MLP encoders.

Arms with several blocks make as many updates of each block, those with one block as many updates in all. Every arm has AdamW at 1e-3, the
paper's; Forward-Forward its own default and the seconds that NoProp took.
"""

from __future__ import annotations

import time
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.noprop import ADAMW, NoProp, NoPropCTNet, NoPropFMNet, NoPropNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH, STEPS = 64, 5
ARMS = ("noprop_dt", "first_block", "bp_twin", "one_block", "noise_only", "flat_weights", "fm", "ct", "ff")
LABELS = {
    "noprop_dt": "NoProp, discrete time", "bp_twin": "the same blocks, end to end", "first_block": "NoProp's first block alone",
    "one_block": "one block, all updates", "noise_only": "blocks see noise only", "flat_weights": "weights 1 for SNR",
    "fm": "flow matching", "ct": "continuous time", "ff": "Forward-Forward, same seconds",
}  # fmt: skip


class NoiseOnly(NoPropNet):
    """Every block is given noise in place of the noised label: T classifiers that do not hear of each other."""

    def noised(self, y, t):
        return super().noised(y, t) if t == len(self.blocks) else torch.randn_like(self.embedding[y])

    def rollout(self, x, *, steps=None, generator=None):
        draw = self.noise(x, generator)
        logits = [block(draw(), x) for block in self.blocks]
        return [logits[-1].softmax(1) @ self.embedding], logits


class FlatWeights(NoPropNet):
    def weight(self, t):
        return torch.ones_like(self.abar[t])


class Twin(NoPropNet):
    """The blocks as a residual network, ``z <- (1 - tanh w) z + tanh(w) u(z, x)``, for backpropagation."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.gates = nn.Parameter(torch.full((len(self.blocks),), 0.5))

    def noise(self, x, generator):
        return (lambda: torch.randn(len(x), self.embedding.shape[1]).to(x)) if self.training else super().noise(x, generator)

    def rollout(self, x, *, steps=None, generator=None):
        states, logits = [self.noise(x, generator)()], []
        for block, gate in zip(self.blocks, self.gates.tanh()):
            logits.append(block(states[-1], x))
            states.append((1 - gate) * states[-1] + gate * (logits[-1].softmax(1) @ self.embedding))
        return states, logits


def run(trial: Trial) -> None:
    task = images(trial, train=(512, 4000), test=(300, 3000))
    train, test = task.train.to(trial.device), task.test.to(trial.device)
    batches, shown = train.batches(BATCH, seed=trial.seed), test.batches(1000, shuffle=False)
    epochs, hidden = trial.scale(smoke=(1, 16), laptop=(4, 128))
    kinds = {"noprop_dt": NoPropNet, "noise_only": NoiseOnly, "flat_weights": FlatWeights, "bp_twin": Twin, "one_block": NoPropNet}

    def encoder() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(196, hidden), nn.ReLU())

    def net(kind, **options) -> nn.Module:
        return kind(encoder, task.classes, train.x[:2], hidden=hidden, **options).to(trial.device)

    def trained() -> tuple[nn.Module, float]:
        model = net(NoPropNet, steps=STEPS)
        began = time.perf_counter()
        NoProp().fit(model, batches, epochs=epochs, seed=trial.seed)
        return model, time.perf_counter() - began

    for arm in trial.arms(*ARMS):
        if arm.name in ("noprop_dt", "first_block"):
            model, seconds = trial.shared("noprop", trained)
            by_step = along(model, test)
            if arm.name == "noprop_dt":
                arm.log(accuracy=evaluate(model, shown)["accuracy"], fit_seconds=seconds, accuracy_by_step=by_step)
                draws = [drawn(model, test, s) for s in range(15)]
                arm.log(accuracy_of_draws=[accuracy(d, test) for d in draws[:5]], accuracy_of_votes=accuracy(sum(draws), test))
                arm.log(saved_bytes=saved_bytes(NoProp(order="sampled"), model, train))
            else:
                arm.log(accuracy=by_step[0])
        elif arm.name == "ff":
            model = nn.Sequential(nn.Flatten(), *[m for n in (196, hidden, hidden) for m in (nn.Linear(n, hidden), nn.ReLU())])
            model.append(nn.Linear(hidden, task.classes)).to(trial.device)
            budget = trial.metric("noprop_dt", "fit_seconds")
            history = ForwardForward().fit(
                model, batches, epochs=500, seed=trial.seed, callbacks=[lambda p, most=budget: sum(e["seconds"] for e in p.train) >= most]
            )
            arm.log(accuracy=evaluate(ForwardForward().predictor(model), shown)["accuracy"], epochs=len(history.train))
        else:
            rule, passes = (Backprop(optimizer=ADAMW), epochs) if arm.name == "bp_twin" else (NoProp(), epochs)
            if arm.name in kinds:
                model = net(kinds[arm.name], steps=1 if arm.name == "one_block" else STEPS)
            else:
                model = net(NoPropFMNet if arm.name == "fm" else NoPropCTNet, steps=50)
            passes = passes * STEPS if len(model.blocks) == 1 else passes
            with arm.timed("fit_seconds"):
                rule.fit(model, batches, epochs=passes, seed=trial.seed)
            by_step = along(model, test)
            arm.log(accuracy=by_step[-1] if arm.name == "noise_only" else evaluate(model, shown)["accuracy"])
            if arm.name == "bp_twin":
                arm.log(saved_bytes=saved_bytes(rule, model, train))
            if arm.name != "one_block":
                arm.log(accuracy_by_step=by_step[:: max(1, len(by_step) // 20)])


@torch.no_grad()
def along(model, test: data.TensorData) -> list[float]:
    """Accuracy of what each step believes on the way from noise to the label."""
    model.eval()
    return [accuracy(scores, test) for scores in model.rollout(test.x)[1]]


@torch.no_grad()
def drawn(model, test: data.TensorData, seed: int) -> torch.Tensor:
    """The class that one roll-out ends in, as one-hot."""
    model.eval()
    scores = model(test.x, generator=torch.Generator(test.x.device).manual_seed(seed))
    return F.one_hot(scores.argmax(1), scores.shape[1])


def accuracy(scores: torch.Tensor, test: data.TensorData) -> float:
    return float((scores.argmax(1) == test.y).float().mean())


def saved_bytes(rule, model, train: data.TensorData) -> int:
    """Peak bytes that one step keeps for the backward pass."""
    with meter.SavedBytes() as kept:
        rule.fit(deepcopy(model), [train[:BATCH]], epochs=1)
    return kept.peak


def figure(record: RecordView, fig: Figure) -> None:
    """Belief along the roll-out, accuracy of every arm, and what a step keeps."""
    colours = dict(zip(LABELS, ("#D55E00", "#000000", "#E69F00", "#F0E442", "#999999", "#CC79A7", "#009E73", "#56B4E9", "#0072B2")))
    fig.set_size_inches(13, 4.4)
    fig.set_layout_engine("constrained")
    way, ends, memory = fig.subplots(1, 3, width_ratios=(1.2, 1.2, 0.7))
    for arm in ("noprop_dt", "noise_only", "flat_weights", "bp_twin", "fm", "ct"):
        if arm in record.arms:
            y = 100 * record.values(arm, "accuracy_by_step")
            x = np.linspace(0, 1, y.shape[1] + 1)[:-1]
            way.errorbar(x, y.mean(0), y.std(0), fmt="o-", ms=3, capsize=2, color=colours[arm], label=LABELS[arm])
    way.set(xlabel="time of the belief (0: from pure noise)", ylabel="accuracy of the belief (%)", title="does the roll-out help?")
    if "noprop_dt" in record.arms:
        votes = 100 * record.values("noprop_dt", "accuracy_of_votes")
        way.errorbar(
            [1.0], votes.mean(), votes.std(), fmt="*", ms=11, color=colours["noprop_dt"], mec="k", label="NoProp, 15 roll-outs vote"
        )
    way.set_ylim(bottom=max(0, way.get_ylim()[0]))
    way.legend(fontsize=8, loc="lower right")
    way.grid(alpha=0.3)
    arms = [a for a in LABELS if a in record.arms]
    for i, arm in enumerate(arms):
        values = 100 * record.values(arm, "accuracy")
        ends.errorbar(values.mean(), i, xerr=values.std(), fmt="o", ms=6, capsize=3, color=colours[arm], mec="k")
        ends.plot(values, np.full(len(values), i), "k|", ms=9, alpha=0.6)
    ends.set_yticks(range(len(arms)), [LABELS[a] for a in arms], fontsize=8)
    ends.invert_yaxis()
    ends.set(xlabel="test accuracy (%)", title="predictions")
    ends.grid(alpha=0.3, axis="x")
    kept = [a for a in ("noprop_dt", "bp_twin") if a in record.arms]
    memory.bar(["one block\n(NoProp)", "all blocks\n(end to end)"][: len(kept)], [record.mean(a, "saved_bytes") / 1024 for a in kept],
               color=[colours[a] for a in kept])  # fmt: skip
    memory.set(ylabel="kept for the backward pass (KiB)", title="memory of a step")
