"""Conditional channel pruning of a ResNet-8 at three rates: one agent for all against one agent a rate (AMC) with as many episodes in all
and with as many each, against the same share of channels everywhere, a global threshold on L1 norms and random plans.

The reward comes from a fifth of the held-out images, the accuracies from the others. Nothing is fine-tuned but the plans for the rate
0.5, one epoch; every pruned network gets the batch statistics of 200 training images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from neurarium.compress import ChannelPlan, ConditionalPruner, apply_channels
from neurarium.compress.prune.units import budget, keep_top, refresh_norms, unit_norms
from neurarium.experiments.compress.zoo import cifar, finetune, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

RATES = (0.3, 0.5, 0.7)
GROUPS = ("stage 1", "block 1, inside", "block 2, inside", "stage 2", "block 3, inside", "stage 3")
GRID = tuple(np.linspace(0.3, 0.7, 9).round(3).tolist())


def run(trial: Trial) -> None:
    task, episodes = cifar(trial), trial.scale(smoke=3, laptop=120)
    held = len(task.test) // 5
    judge = [(task.test.x[:held], task.test.y[:held])]
    calibration = task.train.x[:200]
    x, y = task.test.x[held:], task.test.y[held:]

    def model() -> nn.Module:
        return trial.shared("model", lambda: resnet(trial, task))

    def search(rates: tuple[float, ...], count: int, *, fit: bool = True) -> ConditionalPruner:
        pruner = ConditionalPruner(model(), example=x[:1], rates=rates, episodes=count, samples=held, updates=1, seed=trial.seed)
        return pruner.fit(judge) if fit else pruner

    def plans(name: str) -> tuple[dict[float, ChannelPlan], int, ConditionalPruner | None]:
        if name == "cacp":
            pruner = search(RATES, episodes)
            return {rate: pruner.plan(rate) for rate in RATES}, len(pruner.history), pruner
        if name.startswith("amc"):
            agents = {rate: search((rate,), episodes if name == "amc_full" else episodes // 3) for rate in RATES}
            return {rate: a.plan(rate) for rate, a in agents.items()}, sum(len(a.history) for a in agents.values()), None
        pruner = search(RATES, 1, fit=False)
        if name == "random_search":
            return {rate: _drawn(pruner, rate, episodes // 3, judge[0], calibration, trial.seed) for rate in RATES}, episodes, None
        find = _uniform if name == "uniform" else _threshold
        return {rate: find(pruner, rate) for rate in RATES}, 0, None

    for arm in trial.arms("cacp", "amc_equal", "amc_full", "uniform", "global_l1", "random_search"):
        with arm.timed("search_seconds"):
            found, evaluations, pruner = plans(arm.name)
        accuracies, tuned = [], []
        for rate, plan in found.items():
            small = refresh_norms(apply_channels(model(), plan), calibration)
            accuracies.append(_accuracy(small, x, y))
            if rate == 0.5 and arm.name in ("cacp", "amc_equal", "uniform"):
                tuned.append(_accuracy(finetune(small, task, epochs=1, seed=trial.seed), x, y))
        ratios = [plan.cost_after.macs / plan.cost_before.macs for plan in found.values()]
        arm.log(
            accuracy=accuracies, mean_accuracy=float(np.mean(accuracies)), macs=ratios, evaluations=evaluations,
            worst=max(abs(ratio - 1 + rate) for rate, ratio in zip(found, ratios, strict=True)),
        )  # fmt: skip
        if tuned:
            arm.log(tuned=tuned[0])
        if pruner is not None:
            arm.log(dense=_accuracy(model(), x, y))
            kept = [pruner.plan(rate, best=False).kept for rate in GRID]
            for i, group in enumerate(pruner.graph.groups):
                arm.curve(f"kept{i}", x=list(GRID), y=[len(k[group.id]) / group.size for k in kept])


@torch.no_grad()
def _accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model.eval()(x).argmax(1) == y).double().mean())


def _uniform(pruner: ConditionalPruner, rate: float) -> ChannelPlan:
    """The same share of every group, the largest that meets the target."""

    def counts(share: float) -> np.ndarray:
        return np.maximum(1, np.floor(share * pruner.sizes)).astype(int)

    shares = np.unique([k / n for n in pruner.sizes.tolist() for k in range(1, n + 1)])
    fits = [s for s in shares if float(pruner.graph.macs(counts(s))) <= (1 - rate) * pruner.full]
    return _plan(pruner, counts(max(fits, default=shares[0])))


def _threshold(pruner: ConditionalPruner, rate: float) -> ChannelPlan:
    """One threshold for all groups on L1 norms divided by the mean of the group."""
    scores = {k: s / s.mean() for k, s in unit_norms(pruner.model, pruner.graph, p=1).items()}
    return pruner.graph.plan(budget(pruner.graph, scores, 1 - rate))


def _drawn(
    pruner: ConditionalPruner, rate: float, count: int, judge: tuple[torch.Tensor, torch.Tensor], calibration: torch.Tensor, seed: int
) -> ChannelPlan:
    """The best of plans with random actions that meet the target."""
    draw = np.random.default_rng(seed)
    best: Callable[[tuple[float, ChannelPlan]], float] = lambda pair: pair[0]  # noqa: E731
    found = []
    for _ in range(count):
        plan = _plan(pruner, pruner.walk(rate, lambda state, low, high: draw.uniform(low, high))[0])
        found.append((_accuracy(refresh_norms(apply_channels(pruner.model, plan), calibration), *judge), plan))
    return max(found, key=best)[1]


def _plan(pruner: ConditionalPruner, counts: np.ndarray) -> ChannelPlan:
    sizes = {g.id: int(k) for g, k in zip(pruner.graph.groups, counts, strict=True)}
    return pruner.graph.plan(keep_top(unit_norms(pruner.model, pruner.graph, p=1), sizes))


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "cacp": "CACP, one search", "amc_equal": "AMC, as many episodes in all", "amc_full": "AMC, as many for each rate",
        "random_search": "random plans", "uniform": "same share everywhere", "global_l1": "L1 threshold",
    }  # fmt: skip
    colours = ("#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#999999", "#009E73")
    fig.set_size_inches(9.5, 4.2)
    left, right = fig.subplots(1, 2)
    for i, (arm, label) in enumerate(names.items()):
        values = 100 * record.values(arm, "accuracy")
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
        left.errorbar(100 * np.array(RATES) + 0.6 * (i - 2.5), values.mean(0), spread, label=label, color=colours[i], marker="o", capsize=2)
    left.axhline(100 * record.mean("cacp", "dense"), color="black", linestyle=":", linewidth=0.8)
    left.set(xlabel="multiply-adds removed (%)", ylabel="test accuracy, no fine-tuning (%)", title="ResNet-8, three rates")
    left.legend(fontsize=7, loc="lower left")
    for i, label in enumerate(GROUPS):
        curves = record.curves("cacp", f"kept{i}")
        mean = np.mean([y for _, y in curves], 0)
        right.plot(100 * np.array(curves[0][0]), 100 * mean, color=colours[i], marker=".", label=label)
    right.set(xlabel="target of the agent (%)", ylabel="channels that stay (%)", title="What one agent does for every target")
    right.legend(fontsize=7, ncols=2)

