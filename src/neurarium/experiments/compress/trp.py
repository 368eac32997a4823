"""TRP against decomposition after the fact: one network, one number of epochs, accuracy before and after thin layers replace dense ones.

All arms train the same ResNet-8 from the same initial weights on the same batches. ``plain`` is then decomposed (the same energy in each
layer) to three speed-ups in multiply-adds; so are ``nuclear`` (only the pull), ``trp`` (only the truncation) and ``trp_nu`` (both), without
any training after it. ``posthoc_tuned`` trains the decomposed plain network for two epochs more, which the others do not get.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress import decompose, fold, trp
from neurarium.compress.factor.fold import singular_values
from neurarium.experiments.compress.zoo import Augmented, Residual, accuracy, finetune
from neurarium.experiments.images import images
from neurarium.meter import macs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.data import ImageTask
    from neurarium.lab import RecordView, Trial

SPEEDUPS = (1.5, 2.2, 3.0)
ARMS = {
    "plain": {"energy": 1.0, "nuclear": 0.0},
    "nuclear": {"energy": 1.0, "nuclear": 3e-2},
    "trp": {"energy": 0.95, "nuclear": 0.0},
    "trp_nu": {"energy": 0.95, "nuclear": 3e-2},
}


def network(task: ImageTask, widths: tuple[int, int, int], seed: int) -> nn.Module:
    """A ResNet-8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(task.train.x.shape[1], widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for into, out, stride in zip((widths[0], *widths), widths, (2, 2, 2), strict=False):
            layers.append(Residual(into, out, stride))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], task.classes))


def run(trial: Trial) -> None:
    task = images(trial, "cifar10", train=(300, 5000), test=(200, 2000), size=16, standardise=True)
    widths, epochs = trial.scale(smoke=(6, 8, 12), laptop=(16, 32, 64)), trial.scale(smoke=2, laptop=10)
    loader, example = Augmented(task.train, seed=trial.seed), task.train.x[:1]
    steps = epochs * len(loader)

    def train(name: str) -> nn.Module:
        return trp(
            network(task, widths, trial.seed).to(trial.device, memory_format=torch.channels_last), loader, epochs=epochs, period=10,
            optimizer=partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4), decompose=False, seed=trial.seed,
            schedule=partial(OneCycleLR, max_lr=0.1, total_steps=steps), **ARMS[name],
        )  # fmt: skip

    for arm in trial.arms(*ARMS, "posthoc_tuned"):
        if arm.name == "posthoc_tuned":
            thin = decompose(trial.shared("plain", partial(train, "plain")), speedup=SPEEDUPS[1], example=example)
            tuned = finetune(thin, task, epochs=trial.scale(smoke=1, laptop=2), lr=0.02, seed=trial.seed)
            arm.log(acc=accuracy(tuned, task))
            continue
        model = trial.shared("plain", partial(train, "plain")) if arm.name == "plain" else train(arm.name)
        thin = [decompose(model, speedup=s, example=example) for s in SPEEDUPS]
        acc, dense = [accuracy(m, task) for m in thin], accuracy(model, task)
        arm.log(
            acc_before=dense, acc=acc, acc_after=acc[1], effective_rank=effective_rank(model),
            speedup=[macs(model, example) / macs(m, example) for m in thin],
        )  # fmt: skip
        arm.curve("acc", x=[1.0, *SPEEDUPS], y=[dense, *acc])
        layer = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][-1]
        spectrum = singular_values(layer.weight)[0]
        arm.curve("spectrum", y=(spectrum / spectrum[0]).tolist())


def effective_rank(model: nn.Module) -> float:
    """Mean over the 3 x 3 convolutions of the exponential of the entropy of their normalised singular values."""
    ranks = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
            p = torch.linalg.svdvals(fold(m.weight.detach().double()))
            p = p / p.sum()
            ranks.append(float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum())))
    return sum(ranks) / len(ranks)


def figure(record: RecordView, fig: Figure) -> None:
    labels = {"plain": "plain training", "nuclear": "nuclear norm only", "trp": "TRP", "trp_nu": "TRP + nuclear norm"}
    colours = ("#999999", "#E69F00", "#56B4E9", "#0072B2")
    fig.set_size_inches(9.5, 4.0)
    left, right = fig.subplots(1, 2)
    for (arm, label), colour in zip(labels.items(), colours, strict=True):
        if arm not in record.arms:
            continue
        x = record.curves(arm, "acc")[0][0]
        values = torch.tensor([list(y) for _, y in record.curves(arm, "acc")]).double().numpy() * 100
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
        left.errorbar(x, values.mean(0), spread, label=label, color=colour, marker="o", markersize=4, capsize=2)
        for i, (_, y) in enumerate(record.curves(arm, "spectrum")):
            right.plot(range(1, len(y) + 1), y, color=colour, linewidth=1, alpha=0.9, label=label if i == 0 else None)
    if "posthoc_tuned" in record.arms:
        left.plot([SPEEDUPS[1]], [100 * record.mean("posthoc_tuned", "acc")], "D", color="#D55E00", markersize=6,
                  label="plain, decomposed,\ntwo epochs more")  # fmt: skip
    left.set(xlabel="speed-up in multiply-adds", ylabel="test accuracy (%)", title="Decomposed, not trained on")
    left.legend(fontsize=8)
    right.set(xlabel="singular value", ylabel="relative to the largest", title="Spectrum of the last 3 x 3 convolution", yscale="log",
              ylim=(1e-3, 1.3))  # fmt: skip
    right.legend(fontsize=8)
