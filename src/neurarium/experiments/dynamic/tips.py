"""TIPS: does training concentrate well on paths that a Markov chain calls important?

Digits with noise of graded strength at 14x14; an elastic backbone whose four stages have four widths each and whose last two stages may
skip a residual block: 1,024 sub-networks. Every arm spends the same counted FLOPs (three forward passes a row and step), offers 22 networks
(four in each of five bins of cost, the largest and the smallest; ``manual`` has four in all) and picks for each of five budgets the one
that is best on validation images. The peak rate of each arm is the best of 0.005, 0.012, 0.03 and 0.06 by the mean ``front`` over two or
three other draws of the data. In sandwiches (of which TIPS is one) the largest network's answers and the labels count alike: with answers
alone all of them learn more slowly in so short a training.

- ``uniform``: four sub-networks a step, any of all; ``sandwich``: the largest, the smallest and two of any, taught by the largest;
- ``manual``: sandwiches of the four networks whose stages all have the same share of their width;
- ``inverse``: TIPS with the least important paths instead of the most important ones.

``front``: mean accuracy over the five budgets, after each fifth of the training. ``gradient``: norm of all gradients of an operation's own
units under uniform training, beside the chain's ``mass``, per operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from neurarium.data import TensorData
from neurarium.dynamic.elastic import Config, ElasticConv2d, ElasticFamily, at, slots
from neurarium.dynamic.samplers import Uniform
from neurarium.dynamic.slimmable import Slimmable
from neurarium.dynamic.sorted import ElasticPolicy
from neurarium.dynamic.tips import TIPS, Importance, fill, operations, path_importance
from neurarium.experiments.dynamic.anytime import BACKWARD, accuracies, network, prices, spend, task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.experiments.dynamic.zoo import Graded
    from neurarium.lab import RecordView, Trial

RATES = {"tips": 1.2e-2, "inverse": 3e-2, "uniform": 3e-2, "sandwich": 3e-2, "manual": 6e-2}
QUARTERS = (0.25, 0.5, 0.75, 1.0)
LEVELS, PER_LEVEL, WATCHES = 5, 4, 5
DISTIL = 0.5

LABELS = {
    "tips": "TIPS", "uniform": "uniform", "sandwich": "sandwich (largest, smallest, two)", "manual": "four widths by hand",
    "inverse": "TIPS, least important paths",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#d55e00", "#0072b2", "#009e73", "#555555", "#cc79a7")))


def run(trial: Trial) -> None:
    def data() -> Graded:
        return trial.shared(
            "task", lambda: task(trial, train=trial.scale(smoke=220, laptop=4400), test=trial.scale(smoke=100, laptop=1000))
        )

    for arm in trial.arms("uniform", "sandwich", "manual", "tips", "inverse"):
        arm.log(**compare(arm.name, data(), trial.scale(smoke=4, laptop=200), RATES[arm.name], trial.seed))


def compare(name: str, g: Graded, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """One arm."""
    train, val = g.task.train.split(len(g.task.train) * 10 // 11, seed=seed)
    family = supernet(g)
    cost = prices(family, train.x[:1])
    total = BACKWARD * 50 * 4 * float(np.mean(list(cost.values()))) * steps
    importance = chain(family)
    policy, offered = arm(name, family, cost, train, seed)
    low, high = math.log(min(cost.values())), math.log(max(cost.values()))
    budgets = [math.exp(low + (high - low) * (i + 1) / LEVELS) * (1 + 1e-9) for i in range(LEVELS)]
    gradients = dict.fromkeys(importance.nodes, 0.0)

    def step(x: Any, y: Any, k: int) -> Any:
        return policy.loss(x, y, k), policy.draw(k)

    def watch() -> list[float]:
        """Accuracy at each budget; networks are chosen on validation images."""
        known = dict(zip(offered, accuracies(family, val, offered)))
        best = [max((c for c in offered if cost[c] <= b), key=lambda c: known[c]) for b in budgets]
        tested = dict(zip(set(best), accuracies(family, g.task.test, set(best))))
        return [tested[c] for c in best]

    def collect() -> None:
        add_gradients(family, importance, gradients)

    result = spend(
        family, step, train, total, lr=rate, seed=seed, watch=watch, watches=WATCHES, after=collect if name == "uniform" else None
    )
    fronts = [float(np.mean(seen)) for seen in result.seen]
    logged: dict[str, Any] = {
        "front": fronts, "front_accuracy": fronts[-1], "by_budget": result.seen[-1], "budgets": budgets,
        "best_so_far": [float(v) for v in np.maximum.accumulate(fronts)], "area": float(np.mean(fronts)), "steps": float(result.steps),
        "share": [(i + 1) / WATCHES for i in range(len(fronts))], "training_flops": result.flops,
    }  # fmt: skip
    if name == "uniform":
        logged["mass"] = [importance.mass[n] for n in importance.nodes]
        logged["visits"] = [importance.visits[n] for n in importance.nodes]
        logged["gradient"] = [gradients[n] ** 0.5 for n in importance.nodes]
    return logged


def supernet(g: Graded) -> ElasticFamily:
    """Four widths of each stage (inner widths of blocks as those of their stage), blocks skipped or not: 1,024 sub-networks."""
    model = network(g)
    names = [w.name for w in slots(model)[0]]
    configs = []
    for wide in product(QUARTERS, repeat=4):
        shares = [wide[int(name.split()[1].split(".")[0])] for name in names]
        configs += [at(model, shares, deep) for deep in product((0.0, 1.0), repeat=2)]
    return ElasticFamily(model, configs, g.task.train.x[:1])


def chain(family: ElasticFamily) -> Importance:
    path = operations(family.model)
    return path_importance([path(c) for c in family.configs], sizes=[w.size for w in slots(family.model)[0]])


def arm(name: str, family: ElasticFamily, cost: dict[Config, int], train: TensorData, seed: int) -> tuple[ElasticPolicy, Sequence[Config]]:
    """How an arm trains, and the networks that it offers afterwards."""
    x = train.x[:1]
    if name == "tips":
        policy: ElasticPolicy = TIPS(family, x, levels=LEVELS, per_level=PER_LEVEL, distil=DISTIL, seed=seed)
        return policy, policy.configs
    if name == "inverse":
        path, found = operations(family.model), chain(family)
        policy = TIPS(family, x, levels=LEVELS, per_level=PER_LEVEL, distil=DISTIL, score=lambda c: -found.score(path(c)), seed=seed)
        return policy, policy.configs
    if name == "manual":
        family = ElasticFamily(family.model, [at(family.model, q) for q in QUARTERS], x)
        return Slimmable(family, distil=DISTIL, seed=seed), family.configs
    draw = torch.rand(len(cost), generator=torch.Generator().manual_seed(seed)).tolist()
    some = fill(family.configs, list(cost.values()), dict(zip(family.configs, draw)).__getitem__, LEVELS, PER_LEVEL)
    offered = [*(c for b in some for c in b), family.configs[0], family.configs[-1]]
    if name == "sandwich":
        return Slimmable(family, distil=DISTIL, seed=seed), offered
    return ElasticPolicy(family, Uniform(family.configs, 4), seed=seed), offered


def add_gradients(family: ElasticFamily, importance: Importance, total: dict[tuple[int, int], float]) -> None:
    """Add the squared gradient of the units that each option adds to the next smaller one, in the convolutions that make them."""
    options: dict[int, list[int]] = {}
    for layer, option in importance.nodes:
        options.setdefault(layer, []).append(option)
    for layer, width in enumerate(slots(family.model)[0]):
        for module in family.model.modules():
            if isinstance(module, ElasticConv2d) and module.outputs is width and module.weight.grad is not None:
                square, before = module.weight.grad.square().flatten(1).sum(1), 0
                for option in options[layer]:
                    total[layer, option] += float(square[before:option].sum())
                    before = option


def figure(record: RecordView, fig: Figure) -> None:
    """Learning curves, and what the chain foretells beside what training does."""
    fig.set_size_inches(11, 4.6)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.25, 1.1, 1))
    for arm, label in LABELS.items():
        if arm not in record.arms:
            continue
        share, front = record.values(arm, "share").mean(0), record.values(arm, "front")
        left.errorbar(share, front.mean(0), yerr=front.std(0), color=COLOURS[arm], marker="o", ms=4, capsize=2, label=label)
        budgets, accuracy = record.values(arm, "budgets").mean(0) / 1e6, record.values(arm, "by_budget")
        middle.errorbar(budgets, accuracy.mean(0), yerr=accuracy.std(0), color=COLOURS[arm], marker="o", ms=4, capsize=2)
    left.set(xlabel="share of the training FLOPs", ylabel="test accuracy, mean of 5 budgets", title="Learning")
    left.legend(fontsize=8, loc="lower right")
    middle.set(xscale="log", xlabel="budget (MFLOPs a row)", ylabel="test accuracy", title="At the end")
    middle.set_xticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    middle.minorticks_off()
    if "uniform" in record.arms:
        mass, gradient = record.values("uniform", "mass").mean(0), record.values("uniform", "gradient").mean(0)
        right.scatter(mass, gradient, color=COLOURS["uniform"], s=22)
        rank = float(np.corrcoef(mass.argsort().argsort(), gradient.argsort().argsort())[0, 1])
        right.set(
            xlabel="mass in the chain", ylabel="gradient norm in uniform training", yscale="log",
            title=f"Operations: rank corr. {rank:.2f}",
        )  # fmt: skip
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
    fig.tight_layout()
