"""ProARD: twelve robust students out of one training.

An elastic network (three widths, two depths, two expansions) is trained on small grey images against an attack of ``EPS`` in the
sup-norm. Its largest network is trained first, once for all arms. From there ``proard`` opens width, depth and expansion one after another;
``random`` has the same teacher, losses, number of updates and FLOPs, but draws from all twelve students at once; ``no_kd`` is ``proard``
with labels instead of the teacher (TRADES for each student); ``separate`` trains two of the students alone under the same teacher, each for
as many updates as the whole of ``proard`` with its teacher takes; ``clean`` is ``proard`` without any attack, its teacher included.

``robust``: accuracy of each student, cheapest first, under ten steps on the cross-entropy from a random start; training has three steps.
``transfer``: accuracy on images attacked through the networks of ``separate``: were white-box attacks blinded, it would be the lower one.
``train_flops``: counted, the teacher's included (not for ``separate``: one student, the mean of the two).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from neurarium.data import TensorData
from neurarium.dynamic.attacks import pgd
from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.elastic import Config, ElasticFamily, slots
from neurarium.dynamic.robust_family import ProARD, dimensions
from neurarium.experiments.dynamic.zoo import mnist
from neurarium.roles import History

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

ARMS = ("separate", "proard", "random", "no_kd", "clean")
EPS = 0.1
STEPS = 3
RATE = 5e-3
WIDE, DEEP, EXPANDED = (0.5, 0.75, 1.0), (0, 1), (0.5, 1.0)
ALONE = (3, 8)  # which students, by price, are trained alone
UNIT = 10  # updates in what the learner calls an epoch

LABELS = {
    "proard": "progressive, with teacher",
    "random": "any student from the start",
    "no_kd": "progressive, from labels",
    "separate": "trained alone",
    "clean": "progressive, no attack",
}
COLOURS = dict(zip(LABELS, ("#d55e00", "#0072b2", "#009e73", "#555555", "#cc79a7")))


@dataclass(frozen=True)
class Draws:
    """Random batches: epoch e has the batches e * unit, e * unit + 1, ... of one long seeded sequence."""

    data: TensorData
    seed: int
    unit: int
    rows: int = 64

    def set_epoch(self, epoch: int) -> None:
        object.__setattr__(self, "epoch", epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + getattr(self, "epoch", 0))
        for _ in range(self.unit):
            chosen = torch.randint(len(self.data), (self.rows,), generator=draw)
            yield self.data.x[chosen], self.data.y[chosen]


def run(trial: Trial) -> None:
    teaching, each, unit = trial.scale(smoke=(1, 1, 1), laptop=(18, 5, UNIT))  # epochs of the teacher and of a stage
    task = mnist(trial, train=3000, test=250, size=14, standardise=False)
    train = Draws(task.train, trial.seed, unit)
    later = Draws(task.train, trial.seed + 500_000, unit)
    shown, steps = trial.scale(smoke=(30, 1), laptop=(250, 10))
    x, y = task.test.x[:shown], task.test.y[:shown]
    common: dict[str, Any] = {
        "eps": EPS, "step": EPS / 2, "attack_steps": STEPS, "warmup": 1, "teacher_epochs": 0, "stage_epochs": each,
        "optimizer": partial(AdamW, lr=RATE),
    }  # fmt: skip
    progressive = ProARD(**common)

    def teach(**options: Any) -> tuple[ElasticFamily, int]:
        learner = ProARD(stages=(), accumulate=(), **(common | {"teacher_epochs": teaching} | options))
        family = students(task.train.x[:2], task.classes)
        return family, fit(learner, family, train, teaching, trial)

    def teacher() -> tuple[ElasticFamily, int]:
        family, flops = trial.shared("teacher", teach)
        return deepcopy(family), flops

    def alone() -> list[tuple[Config, ElasticFamily, int]]:
        """Each is a family of two: the teacher's architecture, and one student with weights of its own."""
        result = []
        for i in ALONE:
            family, _ = teacher()
            student = family.configs[i]
            family.configs = (student, family.configs[-1])
            differ = tuple(d for d, where in dimensions(family).items() if any(student.key[j] != family.configs[-1].key[j] for j in where))
            learner = _Alone(stages=(differ,), accumulate=(1,), **(common | {"stage_epochs": teaching + 3 * each}))
            result.append((student, family, fit(learner, family, later, teaching + 3 * each, trial)))
        return result

    for arm in trial.arms(*ARMS):
        if arm.name == "separate":
            solo = trial.shared("alone", alone)
            judged = [judge(family, [config], x, y, steps) for config, family, _ in solo]
            arm.log(clean=[c[0] for c, _ in judged], robust=[r[0] for _, r in judged])
            arm.log(robust_mean=sum(r[0] for _, r in judged) / len(judged), train_flops=sum(f for *_, f in solo) / len(solo))
            continue
        family, spent = teacher() if arm.name != "clean" else teach(eps=0.0)
        learner, epochs = progressive, 3 * each
        price = trial.shared("prices", lambda family=family: prices(family, x))
        if arm.name == "random":
            one = expected(everything(common, 2, 3 * each), family, price)
            epochs = round(3 * each * expected(progressive, family, price) / one)
            learner = everything(common, 2, epochs)
        elif arm.name == "no_kd":
            learner = ProARD(kd=None, **common)
        elif arm.name == "clean":
            learner = ProARD(**(common | {"eps": 0.0}))
        spent += fit(learner, family, later, epochs, trial)
        clean, robust = judge(family, family.configs, x, y, steps)
        arm.log(clean=clean, robust=robust, clean_mean=mean(clean), robust_mean=mean(robust), robust_min=min(robust), train_flops=spent)
        arm.log(updates=(epochs + teaching) * unit, flops=price)
        arm.log(transfer_mean=mean(transferred(family, trial.shared("alone", alone), x, y, steps)))


class _Alone(ProARD):
    """Draws the student alone, never the teacher that is kept with it."""

    def phases(self, family: ElasticFamily) -> list[Any]:
        first, second = super().phases(family)
        return [first, type(second)(second.epochs, (family.configs[0],))]


def everything(common: dict[str, Any], draws: int, epochs: int) -> ProARD:
    """All dimensions at once."""
    return ProARD(stages=(("width", "depth", "expand"),), accumulate=(draws,), **(common | {"stage_epochs": epochs}))


def students(example: Tensor, classes: int) -> ElasticFamily:
    """Twelve configurations; all widths have the same share, and so have all expansions. The block of the second stage may be skipped."""
    model = ElasticBackbone(example.shape[1], classes, widths=(8, 16, 32), strides=(2, 1, 2), blocks=(0, 1, 1), step=4)
    widths, _ = slots(model)
    inner = [i for i, w in enumerate(widths) if w.name.startswith("expand")]

    def config(wide: float, expanded: float, deep: int) -> Config:
        return Config(tuple(w.at(expanded if i in inner else wide) for i, w in enumerate(widths)), (deep, 1))

    return ElasticFamily(model, [config(*c) for c in product(WIDE, EXPANDED, DEEP)], example)


def fit(learner: ProARD, family: ElasticFamily, draws: Draws, epochs: int, trial: Trial) -> int:
    """Train, and what that cost in FLOPs."""
    family.to(trial.device)
    history: History = learner.fit(family, draws, epochs=epochs, seed=trial.seed)
    family.eval()
    return int(history.extra["flops"][-1])


def prices(family: ElasticFamily, x: Tensor) -> list[int]:
    """FLOPs a row of each student."""
    return [CostTable.measure([partial(family.run, config=c)], x[:1]).full for c in family.configs]


def expected(learner: ProARD, family: ElasticFamily, prices: list[int]) -> float:
    """FLOPs of a mean update, but for a constant: of 2 * STEPS + 6 passes of each student drawn and one of the teacher."""
    price = dict(zip(family.configs, prices))
    phases = learner.phases(family)[1:]
    total = sum((2 * STEPS + 6) * p.draws * mean([price[c] for c in p.configs]) + price[family.configs[-1]] for p in phases)
    return total / len(phases)


def judge(family: ElasticFamily, configs: Any, x: Tensor, y: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Accuracy of each student, and its accuracy under attack."""
    clean, robust = [], []
    for config in configs:
        f = partial(family.run, config=config)
        clean.append(accuracy(f, x, y))
        robust.append(accuracy(f, attacked(f, family, x, y, steps), y))
    return clean, robust


def attacked(f: Any, family: ElasticFamily, x: Tensor, y: Tensor, steps: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return pgd(f, x, y, eps=EPS, step=EPS / 4, steps=steps, start="uniform", generator=draw, clip=(0.0, 1.0), module=family)


def transferred(family: ElasticFamily, solo: list[tuple[Config, ElasticFamily, int]], x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Accuracy of each student on images attacked through other networks, the mean over those."""
    images = [attacked(partial(other.run, config=config), other, x, y, steps) for config, other, _ in solo]
    return [mean([accuracy(partial(family.run, config=c), z, y) for z in images]) for c in family.configs]


@torch.no_grad()
def accuracy(f: Any, x: Tensor, y: Tensor) -> float:
    return float((f(x).argmax(1) == y).double().mean())


def mean(values: Any) -> float:
    return sum(values) / len(values)


def figure(record: RecordView, fig: Figure) -> None:
    """Clean against robust accuracy, robust accuracy against FLOPs, and what a usable student cost."""
    fig.set_size_inches(12, 4)
    scatter, front, bars = fig.subplots(1, 3)
    for arm in ("clean", "no_kd", "random", "proard"):
        if arm not in record.arms:
            continue
        clean, robust = record.values(arm, "clean").mean(0), record.values(arm, "robust").mean(0)
        scatter.scatter(clean, robust, s=26, color=COLOURS[arm], label=LABELS[arm], alpha=0.85)
        if arm != "clean":
            cost, every = record.values(arm, "flops")[0] / 1e6, record.values(arm, "robust")
            front.errorbar(
                cost, robust, yerr=every.std(0), color=COLOURS[arm], marker="o", ms=4, capsize=2, ls="-", lw=1, label=LABELS[arm]
            )
    if "separate" in record.arms:
        clean, robust = record.values("separate", "clean").mean(0), record.values("separate", "robust").mean(0)
        scatter.scatter(clean, robust, s=60, marker="*", color=COLOURS["separate"], label=LABELS["separate"])
        if "proard" in record.arms:
            cost = record.values("proard", "flops")[0][list(ALONE)] / 1e6
            front.scatter(cost, robust, s=70, marker="*", color=COLOURS["separate"], label=LABELS["separate"], zorder=3)
    scatter.set(xlabel="accuracy", ylabel="accuracy under attack", title="Twelve students")
    scatter.legend(fontsize=8)
    front.set(xlabel="MFLOPs an image", ylabel="accuracy under attack", title="Robustness against cost")
    front.legend(fontsize=8)
    names = [arm for arm in ("proard", "random", "no_kd", "separate") if arm in record.arms]
    cost = [record.mean(arm, "train_flops") / 1e9 / (1 if arm == "separate" else 12) for arm in names]
    bars.bar(range(len(names)), cost, color=[COLOURS[a] for a in names])
    bars.set_xticks(range(len(names)), [LABELS[a].replace(" ", "\n") for a in names], fontsize=8)
    bars.set(ylabel="training GFLOPs a student", title="What a student cost")
    for ax in (scatter, front):
        ax.grid(alpha=0.25)
    fig.tight_layout()
