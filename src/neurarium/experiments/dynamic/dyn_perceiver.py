"""Exits on a latent branch against linear exits on the feature maps of the same convolutional network.

Images carry noise of a strength that differs from image to image, so that easy and hard rows exist. All arms share the convolutional
stages (their first weights too), the data, the steps, the learning rate, and, where there are exits, the loss: weighted cross-entropies and
distillation from the last readout. Linear exits read the map after stages 2, 3 and 4, which is where the latent branch has its exits.

``harm``: accuracy of the network trained for its last readout alone, minus that of the last readout here. ``auc``: mean test accuracy over
budgets from the cheapest path of Dyn-Perceiver to its dearest, in counted FLOPs; thresholds come from held-out training images, and a
policy whose dearest path is within the budget answers with that. ``gradient_cosine``: between the gradients of the first and of the last
readout's cross-entropy in the weights of stage 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.data import TensorData
from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.exits import EarlyExit, ExitChain
from neurarium.dynamic.perceiver import DistilledExit, DynPerceiver
from neurarium.dynamic.staged import dense, pick
from neurarium.dynamic.train import fit_policy
from neurarium.experiments.dynamic.zoo import graded, time_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

WIDTHS = (32, 64, 96, 128)
STRIDES = (1, 1, 2, 1)
BATCH = 128
RATE = 1e-2
BUDGETS = 25

LABELS = {
    "static": "the network alone, one readout",
    "linear_exits": "linear exits on its maps",
    "dynp": "Dyn-Perceiver",
    "no_z2x": "without hints to the map",
    "no_reuse": "without reuse of answers",
}
COLOURS = dict(zip(LABELS, ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")))


@dataclass(frozen=True)
class Bench:
    train: TensorData
    val: TensorData
    test: TensorData


def run(trial: Trial) -> None:
    epochs = trial.scale(smoke=1, laptop=3)
    for arm in trial.arms(*LABELS):
        bench = trial.shared("bench", lambda: prepare(trial))
        policy = make(arm.name, trial).to(trial.device, memory_format=torch.channels_last)  # 7x7 depthwise gradients are 3 times faster
        batches = bench.train.batches(BATCH, seed=trial.seed, drop_last=True)
        schedule = partial(OneCycleLR, max_lr=RATE, total_steps=epochs * len(batches))
        fit_policy(policy, batches, epochs=epochs, optimizer=partial(AdamW, fused=True), schedule=schedule, seed=trial.seed)
        policy.eval()
        example = bench.test.x[:2]
        readouts = answers(policy, bench.test)
        right = [float((y.argmax(1) == bench.test.y).double().mean()) for y in readouts.unbind(1)]
        arm.log(exit_accuracy=right, accuracy=right[-1], flops=list(policy.costs(example).total))
        if arm.name == "static":
            continue
        arm.log(harm=trial.metric("static", "accuracy") - right[-1], gradient_cosine=cosine(policy, bench.val))
        policy.calibrate(bench.val.batches(500, shuffle=False))
        table = make("dynp", trial).costs(example)
        arm.log(**sweep(policy, bench.test, table.total[0], table.full))
        if arm.name in ("linear_exits", "dynp"):
            seconds, spent = clock(policy, bench.test.x[:512], trial.scale(smoke=1, laptop=9))
            arm.log(flop_ratio=spent)
            arm.log_timed(time_ratio=seconds)


def prepare(trial: Trial) -> Bench:
    task = graded(trial, train=6000, test=4000, size=14).task
    train, val = task.train.split(trial.scale(smoke=300, laptop=5000), seed=trial.seed)
    return Bench(*(d.to(trial.device) for d in (train, val, task.test)))


def stages() -> list[nn.Sequential]:
    """A stem and four stages: those of BackboneS, twice as wide."""
    widths, strides = (1, WIDTHS[0], *WIDTHS), (2, *STRIDES)
    return [
        nn.Sequential(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, s in zip(widths, (WIDTHS[0], *WIDTHS), strides)
    ]


def make(name: str, trial: Trial) -> EarlyExit:
    """The untrained policy of an arm; the convolutional weights are the same in all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        stem, *rest = stages()
        if name in ("static", "linear_exits"):
            cut = [nn.Sequential(stem, rest[0], rest[1]), rest[2], rest[3]]
            chain = ExitChain(cut, [BackboneS.head(width, 10) for width in WIDTHS[1:]])
            if name == "static":
                return EarlyExit(ExitChain([nn.Sequential(*cut)], [chain.heads[-1]]))
            return DistilledExit(chain, weights=(0.5, 0.5, 1.0))
        off = {"no_z2x": {"z2x": False}, "no_reuse": {"reuse": False}}.get(name, {})
        network = DynPerceiver(rest, (WIDTHS[0], *WIDTHS), num_classes=10, stem=stem, latents=16, latent_dim=16, pool=4, out_pool=2, **off)
        return DistilledExit(network)


@torch.no_grad()
def answers(policy: EarlyExit, part: TensorData) -> Tensor:
    """All readouts, ``(n, readouts, classes)``."""
    return torch.cat([torch.stack(policy.outputs(x), 1) for x in part.x.split(500)])


def cosine(policy: EarlyExit, part: TensorData, rows: int = 256) -> float:
    """Of the gradients of the first and the last readout's loss in the first stage."""
    network = policy.staged
    stage = network.stages[0] if isinstance(network, DynPerceiver) else network.segments[0][1]
    weights = list(stage.parameters())
    with evaluating(policy):
        readouts = policy.outputs(part.x[:rows])
        first, last = (
            torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(readouts[k], part.y[:rows]), weights, retain_graph=k == 0)])
            for k in (0, -1)
        )
    return float(F.cosine_similarity(first, last, dim=0))


@torch.no_grad()
def sweep(policy: EarlyExit, part: TensorData, low: float, high: float) -> dict[str, Any]:
    """Test accuracy at budgets between ``low`` and ``high`` FLOPs a row."""
    said = [dense(policy.staged, policy.gate, x) for x in part.x.split(500)]
    readouts, scores = (torch.cat(parts) for parts in zip(*said))
    totals = policy.costs(part.x[:1]).tensor()
    budgets = np.linspace(low, high, BUDGETS)
    accuracy, cost = [], []
    for budget in budgets:
        answer, choice, _ = pick(readouts, scores, policy.setting(part.x[:1], budget=float(budget)))
        accuracy.append(float((answer.argmax(1) == part.y).double().mean()))
        cost.append(float(totals[choice].double().mean()))
    return {"budget": budgets.tolist(), "curve_accuracy": accuracy, "curve_cost": cost, "auc": float(np.mean(accuracy))}


def clock(policy: EarlyExit, x: Tensor, repeats: int) -> tuple[float, float]:
    """Seconds and FLOPs of deciding, over those of running everything, at a budget halfway between the cheapest and the dearest path, in
    torch's default memory layout."""
    policy, table = copy.deepcopy(policy).to(memory_format=torch.contiguous_format), policy.costs(x)
    budget = (table.total[0] + table.full) / 2
    with torch.no_grad():
        spent = float(policy.decide(x, budget=budget).cost.double().mean()) / table.full
    return time_ratio(policy, x, repeats=repeats, budget=budget), spent


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy within a budget, what exits cost the last readout, and accuracy exit by exit."""
    fig.set_size_inches(11, 6)
    left, right = fig.add_gridspec(1, 2, width_ratios=(1.5, 1), wspace=0.25)
    ax, below = fig.add_subplot(left), right.subgridspec(2, 1, hspace=0.45)
    static = record.values("static", "accuracy") if "static" in record.arms else None
    if static is not None:
        flops = record.mean("static", "flops") / 1e6
        ax.errorbar(flops, [static.mean()], [static.std()], fmt="*", ms=13, color=COLOURS["static"], capsize=3, label=LABELS["static"])
    for arm in ("linear_exits", "dynp", "no_z2x", "no_reuse"):
        if arm not in record.arms:
            continue
        mean, spread = record.values(arm, "curve_accuracy").mean(0), record.values(arm, "curve_accuracy").std(0)
        budget, bold = record.values(arm, "budget").mean(0) / 1e6, arm in ("linear_exits", "dynp")
        ax.plot(budget, mean, color=COLOURS[arm], lw=2.2 if bold else 1.2, ls="-" if bold else "--", label=LABELS[arm])
        if bold:
            ax.fill_between(budget, mean - spread, mean + spread, color=COLOURS[arm], alpha=0.15, lw=0)
        points, accuracy = record.values(arm, "flops").mean(0) / 1e6, record.values(arm, "exit_accuracy").mean(0)
        ax.scatter(points, accuracy, color=COLOURS[arm], marker="o" if bold else "x", s=36, zorder=3)
    ax.set(xlabel="MFLOPs a row", ylabel="test accuracy", title="Accuracy within a budget (points: all rows leave at one exit)")
    ax.legend(loc="lower right", fontsize=9)
    ax.grid(alpha=0.25)
    for row, (metric, title) in enumerate(
        (
            ("harm", "What exits cost the last readout"),
            ("gradient_cosine", "Do first and last exit pull stage 1 one way?"),
        )
    ):
        bars = fig.add_subplot(below[row])
        arms = [a for a in ("linear_exits", "dynp", "no_z2x", "no_reuse") if a in record.arms]
        values = [100 * record.values(a, metric) if metric == "harm" else record.values(a, metric) for a in arms]
        bars.barh(range(len(arms)), [v.mean() for v in values], color=[COLOURS[a] for a in arms], alpha=0.8)
        for i, v in enumerate(values):
            bars.plot(v, [i] * len(v), "k.", ms=5)
        bars.set_yticks(range(len(arms)), [a.replace("_", " ") for a in arms])
        bars.invert_yaxis()
        bars.axvline(0, color="k", lw=0.8)
        bars.set_title(title, fontsize=10)
        bars.set_xlabel("percentage points" if metric == "harm" else "cosine of the gradients", fontsize=9)
