"""Physical forward-forward against physics-aware training through digital twins, on MNIST at 8x8, with a medium that drifts half-way.

The systems are two cavities of saturable scatterers, 74 values in and out. Every arm tries two learning rates and is judged at the one that
is better on the validation part. Digital operations are counted from the shapes of the maps; the physics computes for nothing.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.optim import Adam

from neurarium.experiments.images import images
from neurarium.learn.fit import evaluate
from neurarium.learn.physical import PhysicalChain, PhysicalForwardForward, PhysicalLayer, PhysicsAware, fit_twin
from neurarium.learn.scattering import RandomScattering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SLOTS = 10 + 64  # label and pixels
RATES_FF, RATES_PAT, BATCH_PAT = (1e-3, 3e-3), (3e-3, 1e-2), 64
DRIFT, HIDDEN, EPOCHS_TWIN = 0.3, 128, 30
KINDS = {"phyff_optical": "intensity", "no_physics": None}
CONTRAST = ("phyff", "phyff_optical", "no_physics", "square")
TWINS = {"pat": "good", "pat_poor": "poor", "in_silico": "good"}
LABELS = {
    "phyff": "physical forward-forward", "phyff_optical": "the same, optical system", "no_physics": "the same, no physics",
    "square": "the same, goodness of squares", "pat": "physics-aware, good twin", "pat_poor": "physics-aware, poor twin",
    "in_silico": "trained on the good twin alone",
}  # fmt: skip


class SquareChain(PhysicalChain):
    """The ablation: goodness is the mean square, as in plain forward-forward, not a direction."""

    def goodness(self, k, h):
        return h.square().mean(1)


def run(trial: Trial) -> None:
    train, val, test = parts_of(trial)
    some = [(x[:500], y[:500]) for x, y in test][:1]  # enough for a curve
    epochs, after = trial.scale(smoke=(2, 1), laptop=(30, 20))
    pairs = trial.scale(smoke={"good": 200, "poor": 50}, laptop={"good": 10_000, "poor": 500})

    for arm in trial.arms(*LABELS):
        contrast, quality = arm.name in CONTRAST, TWINS.get(arm.name)
        kind = KINDS.get(arm.name, "saturable")
        rates = RATES_FF if contrast else RATES_PAT
        batches = train.batches(len(train) if contrast else BATCH_PAT, seed=trial.seed)
        shared = None
        if quality:
            shared = trial.shared(f"twins_{quality}", lambda: twins(kind, trial, pairs[quality]))  # noqa: B023
        runs = []
        for rate in trial.scale(smoke=rates[-1:], laptop=rates):
            torch.manual_seed(trial.seed)
            parts = media(kind, trial.seed)
            model = chain(SquareChain if arm.name == "square" else PhysicalChain, parts) if contrast else classifier(parts)
            model.to(trial.device)
            optimizer, curve = partial(Adam, lr=rate), []
            if contrast:
                rule = PhysicalForwardForward(optimizer=optimizer)
            else:
                known = dict(zip(map(id, parts), shared))
                rule = PhysicsAware(optimizer=optimizer, twin=partial(of, known), physical_forward=arm.name != "in_silico")
            watch = [partial(note, curve, some)] if arm.name in ("phyff", "pat") else []
            rule.fit(model, batches, epochs=epochs, seed=trial.seed, callbacks=watch)
            runs.append((evaluate(model, val)["accuracy"], rate, rule, model, parts, curve))
        _, rate, rule, model, parts, curve = max(runs, key=lambda r: r[0])

        arm.log(accuracy=evaluate(model, test)["accuracy"], rate=rate, images=len(train))
        twin_flops = 0 if not quality else len(parts) * 6 * pairs[quality] * EPOCHS_TWIN * twin_macs()
        arm.log(digital_flops=twin_flops + training_flops(model, len(train), epochs, contrast))
        if arm.name in ("phyff", "pat"):
            for part in parts:
                part.drift(DRIFT)
            arm.log(shocked=evaluate(model, test)["accuracy"])
            rule.fit(model, batches, epochs=after, seed=trial.seed + 1, callbacks=[partial(note, curve, some)])
            arm.log(recovered=evaluate(model, test)["accuracy"])
            arm.curve("accuracy", x=list(range(1, len(curve) + 1)), y=curve)


def parts_of(trial: Trial):
    """MNIST at 8x8 as vectors, to train, to choose and to test on."""
    task = images(trial, train=(160, 1500), test=(100, 2000), size=8)
    val, train = task.train.to(trial.device).split(len(task.train) // 3, seed=trial.seed)
    return train, val.batches(1000, shuffle=False), task.test.to(trial.device).batches(1000, shuffle=False)


def media(kind: str | None, seed: int) -> list:
    """Two media, and other ones for each seed."""
    return [kind and RandomScattering(SLOTS, SLOTS, nonlinearity=kind, seed=2 * seed + i) for i in range(2)]


def chain(form, parts) -> PhysicalChain:
    return form([PhysicalLayer(part, SLOTS, SLOTS) for part in parts], 64, 10)


def classifier(parts) -> nn.Sequential:
    """The same systems for backpropagation: label slots stay dark, the last map gives the classes."""
    return nn.Sequential(
        nn.Flatten(), nn.ConstantPad1d((10, 0), 0.0), PhysicalLayer(parts[0], SLOTS, SLOTS), PhysicalLayer(parts[1], SLOTS, 10)
    )


def twins(kind: str, trial: Trial, pairs: int) -> list[nn.Module]:
    """Fitted before training, and not again when the medium drifts."""
    parts = [part.to(trial.device) for part in media(kind, trial.seed)]
    return [fit_twin(part, pairs=pairs, hidden=HIDDEN, epochs=EPOCHS_TWIN, seed=trial.seed) for part in parts]


def of(known: dict, system) -> nn.Module:
    return deepcopy(known[id(system)])


def note(curve: list, batches, progress) -> None:
    curve.append(evaluate(progress.model, batches)["accuracy"])


def twin_macs() -> int:
    return 2 * SLOTS * HIDDEN + HIDDEN**2


def training_flops(model: nn.Module, n: int, epochs: int, contrast: bool) -> float:
    """Of the maps and the twins, 2 a multiply-add; elementwise work is left out."""
    maps = [m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    if contrast:  # for a true and a false label: forward and weight gradient of each inner step, and once forward to pass on
        a_sample = sum(2 * (10 * 4 + 2) * m for m in maps)
    else:  # the first map needs no input gradient, the first twin runs forward only
        a_sample = 6 * sum(maps) - 2 * maps[0] + (2 + 4) * twin_macs()
    return float(a_sample * n * epochs)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy through a drift of the medium; accuracy of all arms; digital work."""
    colours = dict(zip(LABELS, ("#D55E00", "#E69F00", "#999999", "#CCCCCC", "#0072B2", "#56B4E9", "#009E73")))
    arms = [a for a in LABELS if a in record.arms]
    fig.set_size_inches(12, 4.2)
    fig.set_layout_engine("constrained")
    time, scores, work = fig.subplots(1, 3)
    for a in ("phyff", "pat"):
        if a in arms:
            curves = record.curves(a, "accuracy")
            y = 100 * np.array([c[1] for c in curves])
            time.plot(curves[0][0], y.mean(0), color=colours[a], label=LABELS[a])
            time.fill_between(curves[0][0], y.min(0), y.max(0), color=colours[a], alpha=0.2)
            if record.scale == "laptop":
                time.axvline(30.5, color="k", lw=0.8, ls=":")
    if record.scale == "laptop":
        time.text(31.5, 70, f"{DRIFT:.0%} of the\nmedium is\nreplaced", fontsize=8)
    time.set(xlabel="epoch", ylabel="test accuracy (%)")
    time.legend(fontsize=8, loc="lower right")
    for ax, metric, label, scale in (
        (scores, "accuracy", "test accuracy (%)", 100),
        (work, "digital_flops", "digital work of training (GFLOP)", 1e-9),
    ):
        values = [scale * record.values(a, metric) for a in arms]
        means, errors = [v.mean() for v in values], [v.std() for v in values]
        ax.barh([LABELS[a] for a in arms], means, xerr=errors, color=[colours[a] for a in arms], capsize=2)
        ax.invert_yaxis()
        ax.set(xlabel=label)
        ax.tick_params(axis="y", labelsize=7)
    low = min(100 * record.mean(a, "accuracy") for a in arms)
    scores.set_xlim(max(0, low - 6), 100)
    work.set_yticklabels([])
    count = int(max(record.mean(a, "images") for a in arms))
    fig.suptitle(f"Training physics without a model of it: MNIST 8x8, {count} images, two cavities of saturable scatterers")
