"""One cycle against a step schedule: a small ResNet with batch normalisation on CIFAR-10 pooled to 12x12, in equally many steps.

The rates were chosen on other seeds, each schedule's among four (see RATE). ``onecycle_small`` has the shape at the step schedule's rate,
``constant_large`` the large rate without the shape. ``reached``: the length of a cycle that would have ended within half a point of the
step schedule of full length, interpolated between cycles of several lengths; NaN if none is long enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from neurarium import data
from neurarium.experiments.images import images
from neurarium.learn.balance import First
from neurarium.learn.fit import Backprop, Diverged, evaluate
from neurarium.learn.schedule import HessianFreeLR, OneCycle, lr_range_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

#: kind -> peak or initial rate: best mean accuracy of .1, .2, .4, .8 (cycle) and .05, .1, .2, .4 (steps) on seeds 100 and 101
RATE = {"onecycle": 0.2, "multistep": 0.1, "onecycle_small": 0.1, "constant_large": 0.2}
LONG_RATE = 0.1  # of the step schedule at three times the steps; .2 was the other one tried
DECAYS = (1e-5, 1e-4, 1e-3, 5e-3)
BATCH, CURVATURE = 96, 2.5
LABELS = {
    "onecycle": "one cycle", "multistep": "steps", "multistep_long": "steps, thrice as long", "onecycle_small": "one cycle, small rate",
    "constant_large": "large rate, constant",
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    trial: Trial
    train: data.TensorData
    test: data.TensorData

    def fit(self, kind: str, lr: float, steps: int, decay: float = 1e-4, labels: int | None = None) -> tuple[float, list[float]]:
        """Test accuracy at the end and the training losses; 0 where training diverged."""
        torch.manual_seed(self.trial.seed)
        train = self.train if labels is None else self.train.take(data.stratified(self.train.y, labels, self.trial.seed))
        schedules = {
            "onecycle": lambda o: OneCycle(o, lr, steps), "multistep": lambda o: MultiStepLR(o, [int(0.625 * steps), int(0.875 * steps)]),
            "constant": None,
        }  # fmt: skip
        learner = Backprop(optimizer=partial(SGD, lr=lr, momentum=0.9, weight_decay=decay), schedule=schedules[kind])
        model = resnet(train.x.shape[1]).to(self.trial.device)
        try:
            history = learner.fit(model, First(train.batches(BATCH, seed=self.trial.seed), steps), epochs=1, seed=self.trial.seed)
        except Diverged:
            return 0.0, [float("nan")]
        return evaluate(model, self.test.batches(500, shuffle=False))["accuracy"], list(history.extra["loss"])


def run(trial: Trial) -> None:
    task = images(trial, "cifar10", train=(200, 12_000), test=(100, 4000), size=12, standardise=True)
    setup = Setup(trial, task.train.to(trial.device), task.test.to(trial.device))
    steps, few = trial.scale(smoke=(2, 60), laptop=(200, 2000))

    for arm in trial.arms("multistep", "multistep_long", "onecycle", "onecycle_small", "constant_large", "estimate"):
        if arm.name in ("onecycle", "multistep"):
            fit = partial(setup.fit, arm.name, RATE[arm.name])
            accuracy, losses = fit(steps)
            arm.log(accuracy=accuracy, few_accuracy=fit(steps, labels=few)[0])
            arm.curve("loss", y=smooth(losses))
            halves = [fit(steps // 2, decay=decay)[0] for decay in DECAYS]
            arm.log(decay_accuracy=halves, best_decay=DECAYS[int(np.argmax(halves))])
            if arm.name == "onecycle":
                lengths = [steps // 2, steps, 2 * steps, 3 * steps]
                found = [halves[DECAYS.index(1e-4)], accuracy, *(fit(length)[0] for length in lengths[2:])]
                target = trial.metric("multistep_long", "accuracy") - 0.005
                arm.log(length_accuracy=found, reached=crossing(lengths, found, target), steps=lengths)
        elif arm.name == "multistep_long":
            accuracy, losses = setup.fit("multistep", LONG_RATE, 3 * steps)
            arm.log(accuracy=accuracy, steps=3 * steps)
            arm.curve("loss", y=smooth(losses))
        elif arm.name != "estimate":
            accuracy, losses = setup.fit("onecycle" if arm.name == "onecycle_small" else "constant", RATE[arm.name], steps)
            arm.log(accuracy=accuracy)
            arm.curve("loss", y=smooth(losses))
        else:
            arm.log(quadratic=CURVATURE * on_a_quadratic())
            estimate, path = in_training(setup, trial.scale(smoke=31, laptop=100))
            arm.log(in_training=estimate)
            arm.curve("estimate", y=path)
            torch.manual_seed(trial.seed)
            test = lr_range_test(
                resnet(setup.train.x.shape[1]).to(trial.device), "cross_entropy", setup.train.batches(BATCH, seed=trial.seed),
                partial(SGD, lr=1.0, momentum=0.9), lo=1e-3, hi=10.0, steps=trial.scale(smoke=5, laptop=80),
            )  # fmt: skip
            arm.log(suggestion=test.suggestion, lowest=test.lowest)
            arm.curve("range", x=np.log10(test.lrs), y=np.minimum(test.smoothed, 3))


class Block(nn.Module):
    """Two convolutions and a shortcut that strides and pads with zeros."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.stride, self.more = stride, b - a

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


def resnet(channels: int, width: int = 8) -> nn.Sequential:
    stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def crossing(lengths: list[int], accuracies: list[float], target: float) -> float:
    """Where the line through the points first comes up to ``target``."""
    if accuracies[0] >= target:
        return float(lengths[0])
    for (a, p), (b, q) in zip(zip(lengths, accuracies), zip(lengths[1:], accuracies[1:])):
        if q >= target:
            return a + (b - a) * (target - p) / (q - p)
    return float("nan")


def smooth(losses: list[float], width: int = 10) -> Any:
    return np.convolve(losses, np.ones(width) / width, "valid") if len(losses) > width else losses


def observed(model: nn.Module, batches: Iterator[Any] | Any, lr: float, every: int) -> HessianFreeLR:
    """Plain gradient descent under observation."""
    optimizer = SGD(model.parameters(), lr=lr)
    estimate = HessianFreeLR(optimizer, every=every)
    for x, y in batches:
        optimizer.zero_grad()
        (model(x) if y is None else F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        estimate.observe()
    return estimate


class Bowl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: Any) -> Tensor:
        return CURVATURE / 2 * self.w.square().sum()


def on_a_quadratic() -> float:
    return observed(Bowl(), [(None, None)] * 80, 0.05, every=1).estimate


def in_training(setup: Setup, steps: int) -> tuple[float, list[float]]:
    torch.manual_seed(setup.trial.seed)
    model = resnet(setup.train.x.shape[1]).to(setup.trial.device)
    model.train()
    found = observed(model, First(setup.train.batches(BATCH, seed=setup.trial.seed), steps), 0.1, every=10)
    return found.estimate, found.readings


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy by length of training, benefit by labels, decay, and the range test."""
    fig.set_size_inches(11, 7.5)
    fig.set_layout_engine("constrained")
    (length, ablation), (decay, sweep) = fig.subplots(2, 2)
    colours = dict(zip(LABELS, ("#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#999999")))
    if "onecycle" in record.arms:
        x, y = record.mean("onecycle", "steps"), 100 * record.values("onecycle", "length_accuracy")
        length.errorbar(x, y.mean(0), y.std(0), fmt="o-", capsize=3, color=colours["onecycle"], label="one cycle of this length")
    if {"multistep", "multistep_long"} <= set(record.arms):
        ends = [100 * record.values(a, "accuracy") for a in ("multistep", "multistep_long")]
        most = record.mean("multistep_long", "steps")
        mean, spread = [e.mean() for e in ends], [e.std() for e in ends]
        length.errorbar([most / 3, most], mean, spread, fmt="s--", capsize=3, color=colours["multistep"], label="steps")
    length.set(xlabel="training steps", ylabel="test accuracy (%)", title="how much training a given accuracy takes")
    length.legend(fontsize=8)
    arms = [a for a in LABELS if a in record.arms and a != "multistep_long"]
    place = np.arange(len(arms))
    full = [100 * record.values(a, "accuracy") for a in arms]
    ablation.bar(place - 0.2, [v.mean() for v in full], 0.4, yerr=[v.std() for v in full], color=[colours[a] for a in arms], capsize=3)
    for i, a in enumerate(arms):
        if record.has(a, "few_accuracy"):
            few = 100 * record.values(a, "few_accuracy")
            ablation.bar(i + 0.2, few.mean(), 0.4, yerr=few.std(), color=colours[a], alpha=0.45, hatch="//", capsize=3)
    low = min([v.min() for v in full] + [100 * record.values(a, "few_accuracy").min() for a in arms if record.has(a, "few_accuracy")])
    ablation.set(ylim=(max(low - 6, 0), None), ylabel="test accuracy (%)", title="the same steps (hatched: few labels)")
    ablation.set_xticks(place, [LABELS[a].replace(", ", ",\n") for a in arms], fontsize=8)
    for a in [a for a in ("onecycle", "multistep") if a in record.arms]:
        values = 100 * record.values(a, "decay_accuracy")
        decay.errorbar(DECAYS, values.mean(0), values.std(0), fmt="o-", capsize=3, color=colours[a], label=LABELS[a])
    decay.set(xscale="log", xlabel="weight decay", ylabel="test accuracy (%)", title="half the steps: how much decay each asks for")
    decay.legend(fontsize=8)
    if "estimate" in record.arms:
        for x, y in record.curves("estimate", "range"):
            sweep.plot(10 ** np.asarray(x), y, color="#009E73")
        for a in ("onecycle", "multistep"):
            sweep.axvline(RATE[a], color=colours[a], ls=":", label=f"rate of {LABELS[a]}")
        estimate = record.mean("estimate", "in_training")
        sweep.axvline(estimate, color="k", ls="--", lw=1, label=f"curvature estimate {estimate:.2f}")
    sweep.set(xscale="log", xlabel="learning rate", ylabel="smoothed training loss", title="range test")
    sweep.legend(fontsize=8)
