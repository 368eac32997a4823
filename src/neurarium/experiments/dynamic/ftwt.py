"""Predicted channel masks on a small VGG, against fixed masks, random ones, gates learned by a sparsity loss, and the targets themselves.

The images carry noise whose strength differs from image to image. The dense network is trained first; every arm's network goes on from it
for the same number of epochs with the same optimizer and schedule, FTWT's after a few epochs in which its predictors alone learn from the
dense network. ``static`` and ``random_mask`` keep as many filters in each layer as ``ftwt_090`` does on average; the penalty of ``l1_gate``
pulls its gates there, and what passes 1/2 is kept. ``oracle`` uses the target masks themselves. ``reduction`` is measured on
the test images, by what each row was charged; ``counted`` by the FLOP counter.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.flop_counter import FlopCounterMode

from neurarium.data import ImageTask
from neurarium.dynamic.channel import FTWT
from neurarium.dynamic.channel_conv import ChannelConv
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.train import fit_policy
from neurarium.experiments.dynamic import zoo
from neurarium.experiments.dynamic.judging import correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

WIDTHS: tuple[int | str, ...] = (32, 32, "M", 64, 64, "M", 96, 96)
SMALL: tuple[int | str, ...] = (8, 8, "M", 16)
MASSES = {"ftwt_080": 0.8, "ftwt_090": 0.9, "ftwt_100": 1.0}
OTHERS = ("static", "random_mask", "l1_gate", "oracle")
LABELS = {
    "dense": "dense",
    "ftwt_080": "FTWT",
    "static": "fixed filters",
    "random_mask": "random filters",
    "l1_gate": "gates, sparsity loss",
    "oracle": "target masks (oracle)",
}
COLOURS = dict(zip(LABELS, ("#222222", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#009e73")))


class Gated(FTWT):
    """Continuous gates by the same predictors, learned from the task and a penalty on the mean gate: what the paper replaces."""

    share = 1.0

    def gate(self, layer: ChannelConv, logits: Tensor, out: Tensor | None) -> Tensor:
        gate = logits.sigmoid()
        return gate if self.training else gate * (gate > 0.5)

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        logits, plan = self._pass(x, "masked", counts=None)
        mean = torch.stack([plan.kept[name].mean() for name in self.dynamic]).mean()
        return F.cross_entropy(logits, y) + 10 * (mean - self.share).square()


def run(trial: Trial) -> None:
    first, alone, together = trial.scale(smoke=(1, 1, 2), laptop=(4, 4, 3))  # epochs: dense network, predictors alone, every arm

    def graded() -> zoo.Graded:
        return trial.shared("graded", lambda: zoo.graded(trial, train=2400, test=1500, size=14))

    def pretrained() -> nn.Module:
        task = graded().task
        torch.manual_seed(trial.seed)
        model = _vgg(task.train.x.shape[1], trial.scale(smoke=SMALL, laptop=WIDTHS), task.classes).to(trial.device)
        return zoo.train(model, task.train.to(trial.device).batches(64, seed=trial.seed), epochs=first, seed=trial.seed)

    for arm in trial.arms("dense", *MASSES, *OTHERS):
        task, noise = graded().task, graded().noise
        model = deepcopy(trial.shared("dense", pretrained))
        test = task.test.to(trial.device)
        full = CostTable.measure([model.eval()], test.x[:1]).full
        kind = Gated if arm.name == "l1_gate" else FTWT
        mass = MASSES.get(arm.name, 2.0 if arm.name == "dense" else 0.9)
        policy = kind(model, mass=mass, granularity=1, whole_below=1, embedding=128, warmup_epochs=alone, freeze_after=2)
        predicted = policy.predicted_flops(task.train.to(trial.device).batches(500, shuffle=False)) if arm.name in MASSES else full
        counts = [float(c) for c in trial.metric("ftwt_090", "counts")] if arm.name in OTHERS else list(policy.filters)
        if arm.name not in MASSES:
            policy.warmup_epochs, policy.freeze_after = 0, 0  # predictors have no part in it
            policy.plan.chosen = _masks(arm.name, policy, counts, task, trial)
        if isinstance(policy, Gated):
            policy.freeze_after = None
            policy.share = float(np.mean(np.array(counts) / np.array(policy.filters)))
        if arm.name in MASSES:
            _tune(policy, task, alone, trial)
            policy.warmup_epochs = 0
        _tune(policy, task, together, trial)
        policy.eval()
        if arm.name in MASSES:
            arm.log(**_judge(policy, test.x, test.y, noise, full), predicted_reduction=1 - predicted / full)
            arm.log(counted=1 - _counted(policy, test.x[:200]) / 200 / full)
            arm.log_timed(time_ratio=zoo.time_ratio(policy, test.x[:128], repeats=3))
        else:
            measured = _forced(policy, test.x, test.y, full, predictors=arm.name == "l1_gate")
            arm.log(**measured, predicted_reduction=measured["reduction"])
            if arm.name == "static":  # what no input changes cannot beat the best constant mask
                arm.log(f1=trial.metric("ftwt_090", "f1_constant"), f1_constant=trial.metric("ftwt_090", "f1_constant"))


def _vgg(channels: int, widths: tuple[int | str, ...], classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


def _tune(policy: FTWT, task: ImageTask, epochs: int, trial: Trial) -> None:
    batches = task.train.to(trial.device).batches(64, seed=trial.seed)

    def optimizer(parameters: Any) -> SGD:
        return SGD(policy.groups(lr=0.01, predictor_lr=0.5), momentum=0.9)

    schedule = partial(CosineAnnealingLR, T_max=epochs * len(batches))
    fit_policy(policy, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, seed=trial.seed)


def _masks(name: str, policy: FTWT, counts: list[float], task: ImageTask, trial: Trial) -> Any:
    """Masks that do not come from the predictors."""
    size = [max(1, min(f, round(c))) for c, f in zip(counts, policy.filters)]
    if name == "oracle":
        return lambda layer, logits, out: policy.goal(out)
    if isinstance(policy, Gated):
        return policy.gate
    if name == "random_mask":
        draw = torch.Generator().manual_seed(trial.seed)

        def random(layer: ChannelConv, logits: Tensor, out: Tensor) -> Tensor:
            rank = torch.rand(logits.shape, generator=draw).argsort(1).argsort(1)
            return (rank < size[layer.index]).to(logits.device)

        return random
    heat = _heat(policy, task.train.x[:1000].to(trial.device))
    fixed = [torch.zeros(len(h), dtype=torch.bool, device=h.device).index_fill(0, h.topk(k).indices, True) for h, k in zip(heat, size)]
    return lambda layer, logits, out: fixed[layer.index].expand(len(logits), -1)


@torch.no_grad()
def _heat(policy: FTWT, x: Tensor) -> list[Tensor]:
    """Mean over rows of the normalised heat of each filter, by layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    policy.eval()
    policy._pass(x, "dense", seen=seen)
    heat = [seen[name][1].amax((2, 3)) for name in policy.dynamic]
    return [(h / h.sum(1, keepdim=True).clamp(min=1e-9)).mean(0) for h in heat]


@torch.no_grad()
def _judge(policy: FTWT, x: Tensor, y: Tensor, noise: Tensor, full: int) -> dict[str, Any]:
    """What the policy does in compact mode, and how well its predictors know their targets."""
    outcomes = [policy.decide(part) for part in x.split(250)]
    choice, cost = torch.cat([o.choice for o in outcomes]).double(), torch.cat([o.cost for o in outcomes]).double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    policy._pass(x[:1000], "masked", seen=seen)
    scores, constant, always, never = [], [], [], []
    for name in policy.dynamic:
        said, goal = seen[name][0] > 0, policy.goal(seen[name][1])
        scores.append(_f1(said, goal))
        rank = goal.double().mean(0).argsort(descending=True).argsort()
        constant.append(max(_f1((rank < k).expand_as(goal), goal) for k in range(1, goal.shape[1] + 1)))
        share = said.double().mean(0)
        always.append(float((share > 0.99).double().mean()))
        never.append(float((share < 0.01).double().mean()))
    return {
        "accuracy": float((torch.cat([o.output for o in outcomes]).argmax(1) == y).double().mean()),
        "reduction": float(1 - cost.mean() / full), "counts": choice.mean(0).tolist(), "f1": float(np.mean(scores)),
        "f1_constant": float(np.mean(constant)), "f1_layers": scores, "f1_constant_layers": constant,
        "always": float(np.mean(always)), "never": float(np.mean(never)), "corr_noise": correlation(cost.cpu(), noise),
    }  # fmt: skip


def _f1(said: Tensor, goal: Tensor) -> float:
    hits = float((said & goal).sum())
    return 2 * hits / max(1.0, float(said.sum() + goal.sum()))


@torch.no_grad()
def _counted(policy: FTWT, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        policy.decide(x)
    return counter.get_total_flops()


@torch.no_grad()
def _forced(policy: FTWT, x: Tensor, y: Tensor, full: int, *, predictors: bool) -> dict[str, Any]:
    """Accuracy and saved FLOPs under masks that are not the predictors'; those are paid where they are used."""
    right, cost = 0.0, 0.0
    spared = 0 if predictors else policy.full(x) - full
    for part, labels in zip(x.split(500), y.split(500)):
        out, plan = policy._pass(part, "masked")
        right += float((out.argmax(1) == labels).sum())
        price = policy.price(part, [(plan.kept[name] > 0).sum(1) for name in policy.dynamic])
        cost += float((price - spared).sum())
    return {"accuracy": right / len(y), "reduction": 1 - cost / len(y) / full}


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against saved FLOPs; predicted against counted saving; how well predictors know their targets."""
    fig.set_size_inches(13, 4.4)
    left, middle, right = fig.subplots(1, 3)
    for arm in record.arms:
        x, y = record.values(arm, "reduction"), record.values(arm, "accuracy")
        name = "ftwt_080" if arm in MASSES else arm
        left.errorbar(
            x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), marker="o" if arm in MASSES else "s", ms=6, capsize=2, ls="",
            color=COLOURS[name], label=LABELS.get(arm),
        )  # fmt: skip
        if arm in MASSES:
            left.annotate(f"  mass {MASSES[arm]:g}", (x.mean(), y.mean()), fontsize=8)
            middle.scatter(record.values(arm, "predicted_reduction"), x, label=f"mass {MASSES[arm]:g}", s=25)
    left.set(xlabel="FLOPs saved, of the dense network", ylabel="test accuracy", title="Accuracy against saving")
    left.legend(fontsize=8, loc="lower left")
    ends = middle.get_xlim()
    middle.plot(ends, ends, color="#999999", lw=1, zorder=0)
    middle.set(xlabel="predicted before training", ylabel="counted after training", title="FLOPs saved")
    middle.legend(fontsize=8)
    if "ftwt_090" in record.arms:
        scores = {m: record.values("ftwt_090", m) for m in ("f1_layers", "f1_constant_layers")}
        for i, (values, label) in enumerate(zip(scores.values(), ("predictors", "best constant mask"))):
            where = np.arange(values.shape[1]) + 0.38 * (i - 0.5)
            right.bar(where, values.mean(0), 0.36, yerr=values.std(0), color=("#d55e00", "#999999")[i], capsize=2, label=label)
        right.set(xlabel="layer", ylabel="F1 against the target masks", title="Mask prediction, mass 0.9", ylim=(0.5, 1))
        right.legend(fontsize=8, loc="lower right")
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
    fig.tight_layout()
