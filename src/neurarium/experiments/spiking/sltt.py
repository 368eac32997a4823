"""SLTT against backpropagation through time: saved memory, time, accuracy, and how far apart the gradients are.

One network (16-32-32 convolutions, batch normalisation, LIF, average pooling) on MNIST at 14x14 with direct coding and T = 6; the paper's
neuron (leak 0.09, soft reset, triangle), optimizer (SGD, momentum 0.9, cosine) and batch size; the same for every arm. BPTT runs in both
orders of execution: ``bptt`` step by step, as SLTT does (batch statistics per step), ``bptt_layer`` all steps at once, the faster one.
``random`` has BPTT's temporal paths and drops others instead: per layer, errors enter through the spikes of one random step alone.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from neurarium import data
from neurarium.learn.fit import evaluate
from neurarium.meter import SavedBytes
from neurarium.spiking import nn as snn
from neurarium.spiking.net import OverTime
from neurarium.spiking.neuron import LIF
from neurarium.spiking.train import BPTT, SLTT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

STEPS = 6
MEMORY_STEPS = (2, 6, 12, 24)
LEAKS = {"009": 1 - 1 / 1.1, "05": 0.5, "09": 0.9}
LABELS = {
    "bptt": "BPTT", "bptt_layer": "BPTT, layer order", "bptt_checkpoint": "BPTT, checkpointed", "sltt": "SLTT", "sltt2": "SLTT-2",
    "random": "random paths",
}  # fmt: skip


class RandomPaths(BPTT):
    """BPTT in which each neuron layer takes the error from above at one random step (times T) and hands it on through time alone."""

    def gradients(self, model: OverTime, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        neurons = [m for m in model.modules() if isinstance(m, LIF)]
        handles = [m.register_forward_hook(_OneStep(model.steps, int(torch.randint(model.steps, ())))) for m in neurons]
        try:
            return super().gradients(model, x, y)
        finally:
            for handle in handles:
                handle.remove()


class _OneStep:
    def __init__(self, steps: int, chosen: int) -> None:
        self.steps, self.chosen, self.now = steps, chosen, 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
        factor = float(self.steps) if self.now == self.chosen else 0.0
        self.now += 1
        spikes.register_hook(lambda g: g * factor)


def run(trial: Trial) -> None:
    images = trial.scale(smoke={"train": 128, "test": 200}, laptop={"train": 8000, "test": 5000})
    task = data.images("mnist", **images, size=14, seed=trial.seed)
    batch = 64
    epochs, widths = trial.scale(smoke=1, laptop=2), trial.scale(smoke=(4, 8, 8), laptop=(16, 32, 32))
    loader = task.train.batches(batch, seed=trial.seed, drop_last=True)
    test = task.test.batches(500, shuffle=False)
    settings = {
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        "schedule": partial(CosineAnnealingLR, T_max=epochs * len(loader)),
    }
    rules = {
        "bptt": BPTT(order="step", **settings),
        "bptt_layer": BPTT(order="layer", **settings),
        "bptt_checkpoint": BPTT(order="step", checkpoint=True, **settings),
        "sltt": SLTT(**settings),
        "sltt2": SLTT(k=2, **settings),
        "random": RandomPaths(order="step", **settings),
    }

    def model(steps: int = STEPS, leak: float = LEAKS["009"]) -> OverTime:
        torch.manual_seed(trial.seed)
        return snn.vgg_small(1, task.classes, widths, neuron=partial(LIF, leak), steps=steps).to(trial.device)

    def trained(leak: float) -> OverTime:
        net = model(leak=leak)
        some = [pair for i, pair in enumerate(loader) if i < trial.scale(smoke=1, laptop=30)]
        rules["bptt"].fit(net, some, epochs=1, seed=trial.seed)
        return net

    for arm in trial.arms(*rules):
        rule = rules[arm.name]
        x, y = task.train.x[:batch].to(trial.device), task.train.y[:batch].to(trial.device)
        arm.log(peak_saved=[_peak(rule, model(steps), x, y) for steps in trial.scale(smoke=(2, 6), laptop=MEMORY_STEPS)])
        rule.fit(model(), [(x, y)], epochs=1)  # what happens once a process is in no arm's time
        net = model()
        with arm.timed("fit_seconds"):
            history = rule.fit(net, loader, epochs=epochs, seed=trial.seed)
        arm.log(**evaluate(net, test), steps=history.steps)
        arm.curve("loss", y=history.extra["loss"])
        if arm.name in ("sltt", "random"):
            x, y = task.train.x[: 2 * batch].to(trial.device), task.train.y[: 2 * batch].to(trial.device)
            for key, leak in LEAKS.items():
                after = net if key == "009" else trial.shared(f"trained_{key}", partial(trained, leak))
                for when, net_ in {"init": model(leak=leak), "trained": after}.items():
                    cosines, ratio = _compare(rules["bptt"], rule, net_, x, y)
                    arm.log(**{f"cosine_{when}_{key}": cosines, f"norm_ratio_{when}_{key}": ratio})


def _peak(rule: BPTT | SLTT, net: OverTime, x: Tensor, y: Tensor) -> int:
    """Most bytes that autograd holds at once during one batch."""
    with SavedBytes() as meter:
        rule.gradients(net, x, y)
    return meter.peak


def _compare(exact: BPTT, rule: BPTT | SLTT, net: OverTime, x: Tensor, y: Tensor) -> tuple[list[float], float]:
    """Cosine between the two gradients of each layer's weights that gets any, and the ratio of the two whole gradients' lengths."""
    found = []
    for learner in (exact, rule):
        twin = copy.deepcopy(net).train()
        learner.gradients(twin, x, y)
        found.append([m.weight.grad.flatten() for m in twin.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(*found) if a.any()]
    return cosines, float(torch.cat(found[1]).norm() / torch.cat(found[0]).norm())


def figure(record: RecordView, fig: Figure) -> None:
    """Bytes against steps; gradient cosines by layer and leak; time and accuracy of every rule."""
    fig.set_size_inches(13, 4.2)
    memory, angle, cost = fig.subplots(1, 3)
    colors = dict(zip(LABELS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#999999")))

    for name in ("bptt", "bptt_checkpoint", "sltt"):
        peaks = record.values(name, "peak_saved") / 2**20
        memory.plot(MEMORY_STEPS[: peaks.shape[1]], peaks.mean(0), "o-", color=colors[name], label=LABELS[name])
    memory.set(xscale="log", yscale="log", xlabel="steps T", ylabel="peak saved for backward (MiB)", title="Memory of one batch of 64")
    memory.set_xticks(MEMORY_STEPS, [str(t) for t in MEMORY_STEPS])
    memory.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    memory.minorticks_off()
    memory.grid(alpha=0.3)
    memory.legend()

    for (key, leak), style in zip(LEAKS.items(), ("-", "--", ":")):
        for when, color in {"init": "#999999", "trained": colors["sltt"]}.items():
            angles = _degrees(record.values("sltt", f"cosine_{when}_{key}"))
            layers = np.arange(1, angles.shape[1] + 1)
            label = f"SLTT, leak {leak:.2g}, {'before training' if when == 'init' else 'trained'}"
            angle.errorbar(layers, angles.mean(0), angles.std(0), fmt="o" + style, color=color, capsize=3, label=label)
    wrong = _degrees(record.values("random", "cosine_trained_009"))
    angle.errorbar(layers, wrong.mean(0), wrong.std(0), fmt="kx-", capsize=3, alpha=0.5, label="random paths, leak 0.09, trained")
    angle.set(xlabel="layer, from the input", ylabel="angle to BPTT's gradient (degrees)", title="Direction of the gradient", ylim=(0, 95))
    angle.set_xticks(layers)
    angle.grid(alpha=0.3)
    angle.legend(fontsize=7)

    for name in LABELS:
        seconds, accuracy = 1e3 * record.values(name, "fit_seconds") / record.values(name, "steps"), 100 * record.values(name, "accuracy")
        cost.errorbar(
            seconds.mean(), accuracy.mean(), accuracy.std(), seconds.std(), fmt="o", color=colors[name], capsize=3, label=LABELS[name]
        )  # fmt: skip
    cost.set(xlabel="ms a training step", ylabel="test accuracy (%)", title=f"Cost and result, T = {STEPS}", xlim=(0, None))
    cost.grid(alpha=0.3)
    cost.legend(fontsize=7, loc="center right")


def _degrees(cosines: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))
