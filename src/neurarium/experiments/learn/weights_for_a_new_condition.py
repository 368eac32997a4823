"""Weights for a new condition: train from scratch, take the nearest network, ask a hypernetwork, or let IGPG write them.

The condition is the angle by which scikit-learn's digits are turned, from 0 to 180 degrees. Five angles are known, the four halfway
between them are new. All that know something learned from the same images at the known angles: a zoo of trained networks (four families
of initialisations), hypernetworks told the angle (plain, and magnitude-invariant), IGPG told by a few images a class. What each proposes
for a new angle is then fine-tuned on 200 images of it by Adam, each arm at the learning rate at which it needs the fewest steps on
validation images; the count of steps is interpolated between checks, and ``LIMIT`` where the target was not reached.
"""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from neurarium import data
from neurarium.experiments.learn.hypernetworks_review import turned
from neurarium.learn.generate import IGPG, TaskConditioner, WeightGPT
from neurarium.learn.hyper import HyperNetwork
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.learn.zoo import Instruction, ZooNet, accuracies, model_zoo, train_many

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

NAME, TARGET, COUNT = "mlp 64 16 10", 0.9, 4
CHECKS, LIMIT = (0, 2, 4, 8, 16, 32, 64, 128), 128
RATES, HYPER_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)
SETTINGS = {"hypernet": {}, "mip": {"encoding": "cos_sin", "residual": True, "delta_scale": 0.1}}
LABELS = {
    "scratch": "random start", "nearest": "net of the nearest angle", "mean": "mean of its family", "igpg": "IGPG",
    "hypernet": "hypernetwork", "mip": "hypernetwork, MIP",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#000000", "#999999", "#E69F00", "#D55E00", "#0072B2", "#009E73")))


def run(trial: Trial) -> None:
    known, new = trial.scale(smoke=(2, 1), laptop=(5, 4))
    angles = torch.linspace(0, pi, known)
    between = (angles[:-1] + angles[1:])[:new] / 2
    task = data.images("digits", seed=trial.seed)
    val, train = task.train.split(300, seed=trial.seed)

    def at(angle: Tensor, part: data.TensorData) -> data.TensorData:
        return data.TensorData(turned(part.x, angle[None])[0].contiguous(), part.y)

    tasks = {f"{a:.4f}": (at(a, train), at(a, val)) for a in angles}
    fresh = [tuple(at(a, p) for p in (train, val, task.test)) for a in between]  # training images, validation, test
    few = [data.TensorData(t.x[:200], t.y[:200]) for t, _, _ in fresh]
    settings = {"nets": trial.scale(smoke=1, laptop=4), "steps": trial.scale(smoke=10, laptop=250), "seed": trial.seed}
    zoo = trial.shared("zoo", lambda: model_zoo({NAME: mlp}, tasks, **settings))

    for arm in trial.arms(*LABELS):
        if arm.name in SETTINGS:
            hyper = hypernetwork(SETTINGS[arm.name], angles, tasks, trial)
            with torch.no_grad():
                starts = [[hyper.weights(a[None] / pi)] for a in between]
        elif arm.name == "igpg":
            images = {name: t for name, (t, _) in tasks.items()} | {f"new {i}": t for i, t in enumerate(few)}
            model = generator(zoo, images, trial)
            starts = [model.generate(Instruction(f"new {i}", NAME), n=COUNT, temperature=0.7) for i in range(new)]
        elif arm.name == "scratch":
            starts = [[mlp().state_dict() for _ in range(COUNT)] for _ in between]
        else:
            starts = [of_the_zoo(arm.name, zoo, float(a)) for a in between]
        steps, curve, reached = fine_tuned(starts, few, fresh, trial)
        arm.log(steps_to_target=steps, at_once=curve[0], after_all=curve[-1], reached=reached)
        arm.curve("accuracy", x=list(CHECKS[: len(curve)]), y=curve)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def of_the_zoo(name: str, zoo: list[ZooNet], angle: float) -> list[dict[str, Tensor]]:
    """One network of each family, of the nearest known angle; or the mean of each family over its two nearest angles."""
    distance = {z.instruction.dataset: abs(float(z.instruction.dataset) - angle) for z in zoo}
    near = sorted(distance, key=distance.get)[: 1 if name == "nearest" else 2]
    chosen = []
    for family in range(COUNT):
        nets = [z.state for z in zoo if z.family == family and z.instruction.dataset in near]
        chosen.append(nets[0] if name == "nearest" else {n: torch.stack([s[n] for s in nets]).mean(0) for n in nets[0]})
    return chosen


def hypernetwork(settings: dict, angles: Tensor, tasks: dict, trial: Trial) -> HyperNetwork:
    """Trained on all known angles at once; the rate and the step that are best on their validation images."""
    x, y = torch.stack([t.x for t, _ in tasks.values()]), next(iter(tasks.values()))[0].y
    val_x, val_y = torch.stack([v.x for _, v in tasks.values()]), next(iter(tasks.values()))[1].y
    c, best = angles[:, None] / pi, (-1.0, None)
    steps = trial.scale(smoke=5, laptop=500)
    for lr in trial.scale(smoke=HYPER_RATES[1:2], laptop=HYPER_RATES):
        torch.manual_seed(trial.seed)
        model, rows = HyperNetwork(mlp(), 1, hidden=(32, 32), **settings), torch.Generator().manual_seed(trial.seed)
        optimizer = Adam(model.parameters(), lr=lr)
        for step in range(1, steps + 1):
            i = torch.randint(len(y), (32,), generator=rows)
            optimizer.zero_grad()
            F.cross_entropy(model.groups(c, x[:, i]).flatten(0, 1), y[i].repeat(len(c))).backward()
            optimizer.step()
            if step % 100 == 0 or step == steps:
                with torch.no_grad():
                    found = float((model.groups(c, val_x).argmax(-1) == val_y).float().mean())
                best = (found, {k: v.clone() for k, v in model.state_dict().items()}) if found > best[0] else best
    model.load_state_dict(best[1])
    return model


def generator(zoo: list[ZooNet], images: dict[str, data.TensorData], trial: Trial) -> IGPG:
    reader = TaskConditioner(images, [NAME])
    prior = WeightGPT(768, condition_dim=reader.dim, layers=2, width=64, heads=4, context=64)
    vq = GumbelVQ(64, codes=768, code_dim=32, tokens_per_chunk=1, places=(1, 8, 64), temperature=(0.5, 0.05))
    model = IGPG(WeightTokenizer(64), vq, prior, reader)
    first, second = trial.scale(smoke=(2, 1), laptop=(150, 100))
    model.fit_zoo(zoo, epochs_vq=first, epochs_prior=second, lr_prior=3e-3, seed=trial.seed)
    return model


def fine_tuned(starts: list, few: list, fresh: list, trial: Trial) -> tuple[float, list[float], float]:
    """Steps to the target, the test accuracy after each of CHECKS, and the share of runs that reach the target; all angles in one call."""
    states, owner = [s for group in starts for s in group], [i for i, group in enumerate(starts) for _ in group]
    checks, best = trial.scale(smoke=CHECKS[:3], laptop=CHECKS), None
    for lr in trial.scale(smoke=RATES[:1], laptop=RATES):
        runs = [states if not s else train_many(mlp(), states, [few[i] for i in owner], steps=s, lr=lr, seed=trial.seed) for s in checks]
        found = []
        for part in (1, 2):  # validation, test: (checks, runs)
            found.append(np.array([[accuracies(mlp(), [s], fresh[i][part])[0].item() for s, i in zip(run, owner)] for run in runs]))
        best = (
            min(best, (count(found[0], checks).mean(), lr, found[1]), key=lambda b: b[0])
            if best
            else (count(found[0], checks).mean(), lr, found[1])
        )
    steps = count(best[2], checks)
    return float(steps.mean()), best[2].mean(1).tolist(), float((best[2] >= TARGET).any(0).mean())


def count(accuracy: np.ndarray, checks: tuple[int, ...]) -> np.ndarray:
    """Steps until each column of (checks, runs) first reaches the target."""
    found = []
    for column in accuracy.T:
        i = int(np.argmax(column >= TARGET))
        if column[i] < TARGET:
            found.append(LIMIT)
        elif i == 0:
            found.append(0.0)
        else:
            found.append(np.interp(TARGET, column[i - 1 : i + 1], checks[i - 1 : i + 1]))
    return np.array(found)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against steps of fine-tuning, and the steps to the target."""
    fig.set_size_inches(10.5, 4.2)
    fig.set_layout_engine("constrained")
    curves, bars = fig.subplots(1, 2, width_ratios=(1.4, 1))
    for a in LABELS:
        found = record.curves(a, "accuracy")
        y = 100 * np.array([c[1] for c in found])
        curves.errorbar(np.arange(y.shape[1]), y.mean(0), y.std(0), marker="o", capsize=3, color=COLOURS[a], label=LABELS[a])
    curves.set_xticks(range(y.shape[1]), [f"{x:.0f}" for x in found[0][0]])
    curves.axhline(100 * TARGET, color="k", lw=0.8, ls=":")
    curves.set(xlabel="steps of fine-tuning (32 of 200 images each)", ylabel="test accuracy at angles never seen (%)")
    curves.legend(fontsize=8)
    curves.grid(alpha=0.3)
    values = [record.values(a, "steps_to_target") for a in LABELS]
    bars.barh(list(LABELS.values()), [v.mean() for v in values], xerr=[v.std() for v in values], color=list(COLOURS.values()), capsize=3)
    for i, a in enumerate(LABELS):
        if (share := record.mean(a, "reached")) < 0.995:
            bars.text(2, i, f"{100 * share:.0f} % reach it", va="center", fontsize=7, color="w")
    bars.invert_yaxis()
    bars.set(xlabel=f"steps to {100 * TARGET:.0f} % ({LIMIT} where it is not reached)")
    fig.suptitle("Weights for a new condition: digits turned by an angle between those known")
