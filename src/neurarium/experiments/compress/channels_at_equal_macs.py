"""Which channels should go? Nine answers on one ResNet-8, at 70, 50 and 30 % of its multiply-adds, before and after one epoch.

Scores (L1, Taylor, HAP, FLAP's fluctuation, group norms, random) are ranked over all groups together and cut until the budget holds;
CACP searches the groups' sizes, the gates are trained with the weights for an epoch, and the metanetwork learns from two smaller networks
of the same form. All plans may take from the inside of the blocks and from the residual streams. After the cut the statistics of batch
normalisation are renewed on 200 images; then everybody gets the same epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from neurarium.compress import ChannelGraph, ChannelPlan, ConditionalPruner, PruningMetaNet, apply_channels, meta_train, plan_group_norm
from neurarium.compress.prune.gate import trainable_gate
from neurarium.compress.prune.hessian import hap_scores
from neurarium.compress.prune.units import refresh_norms
from neurarium.compress.unit_scores import plan_units, unit_fluctuation, unit_norm, unit_taylor
from neurarium.data import ImageTask, TensorData
from neurarium.experiments.compress.zoo import cifar, convnet, resnet, tune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

LEFT = (0.7, 0.5, 0.3)
ARMS = ("random", "l1", "taylor", "hap", "flap", "group_norm", "gate", "cacp", "metapruning")


def run(trial: Trial) -> None:
    task = cifar(trial)
    few = TensorData(task.train.x[: trial.scale(smoke=128, laptop=2560)], task.train.y[: trial.scale(smoke=128, laptop=2560)])
    samples, held = trial.scale(smoke=32, laptop=192), len(task.test) // 5
    calibration, batch = few.x[:200], [(few.x[:samples], few.y[:samples])]
    judge = (task.test.x[:held], task.test.y[:held])
    x, y = task.test.x[held:], task.test.y[held:]

    for arm in trial.arms("dense", *ARMS):
        model = trial.shared("model", lambda: resnet(trial, task))
        if arm.name == "dense":
            arm.log(before=_accuracy(model, x, y), after=_accuracy(model, x, y))
            continue
        graph = ChannelGraph.trace(model, x[:1])
        with arm.timed("choose_seconds"):
            results = _small(arm.name, model, graph, few, batch, judge, trial)
        before, after, macs = [], [], []
        for small, plan in results:
            refresh_norms(small, calibration)
            before.append(_accuracy(small, x, y))
            tune(small.train(), few.batches(128, seed=trial.seed), epochs=1, lr=0.02, seed=trial.seed)
            after.append(_accuracy(small, x, y))
            macs.append(plan.cost_after.macs / plan.cost_before.macs)
        arm.log(before_at=before, after_at=after, macs=macs, before=float(np.mean(before)), after=float(np.mean(after)))
        for left, a, b in zip(LEFT, before, after, strict=True):
            arm.log(**{f"before_{100 * left:.0f}": a, f"after_{100 * left:.0f}": b})


def _small(
    name: str, model: nn.Module, graph: ChannelGraph, few: TensorData, batch: list, judge: tuple, trial: Trial
) -> list[tuple[nn.Module, ChannelPlan]]:
    """The network at each size as the named method makes it, with its plan."""
    if name == "gate":
        made = [
            trainable_gate(model, few.batches(128, seed=trial.seed), target=left, epochs=1, finetune=0, coupled="sum", seed=trial.seed)
            for left in LEFT
        ]
        return [(m, m.plan) for m in made]
    if name == "cacp":
        rates = tuple(1 - left for left in LEFT)
        pruner = ConditionalPruner(
            model, example=few.x[:1], rates=rates, episodes=trial.scale(smoke=3, laptop=45), samples=len(judge[0]),
            updates=1, seed=trial.seed,
        ).fit([judge])  # fmt: skip
        plans = [pruner.plan(rate) for rate in rates]
    elif name == "metapruning":
        metanet = trial.shared("metanet", partial(_metanet, few, trial))
        model = metanet.transform(model, few.x[:1])
        plans = [plan_group_norm(model, graph, ratio=1 - left) for left in LEFT]
    elif name == "group_norm":
        plans = [plan_group_norm(model, graph, ratio=1 - left) for left in LEFT]
    else:
        scores = _scores(name, trial.seed)(model, graph, batch)
        plans = [plan_units(graph, scores, ratio=1 - left, of="macs", max_layer_ratio=0.9) for left in LEFT]
    return [(apply_channels(model, plan), plan) for plan in plans]


def _scores(name: str, seed: int) -> Callable[[nn.Module, ChannelGraph, list], dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "random": lambda model, graph, batch: {g.id: torch.rand(g.size, generator=draw).double() for g in graph.groups},
        "l1": lambda model, graph, batch: {k: s / s.mean() for k, s in unit_norm(model, graph.groups, p=1).items()},
        "taylor": lambda model, graph, batch: unit_taylor(model, graph.groups, batch, samples=len(batch[0][0])),
        "hap": lambda model, graph, batch: hap_scores(model, graph.groups, batch, probes=64, samples=len(batch[0][0]), seed=seed).scores,
        "flap": lambda model, graph, batch: {k: (s - s.mean()) / s.std() for k, s in unit_fluctuation(model, graph.groups, batch).items()},
    }[name]


def _metanet(few: TensorData, trial: Trial) -> PruningMetaNet:
    """Learns from two ResNet-8 half as wide."""
    part = TensorData(few.x[:2000], few.y[:2000])
    task = ImageTask("part", part, part, 10)
    widths = trial.scale(smoke=(4, 4, 6), laptop=(8, 16, 32))
    models = [convnet(task, widths=widths, epochs=trial.scale(smoke=1, laptop=4), seed=10 * trial.seed + i) for i in range(2)]
    torch.manual_seed(trial.seed)
    metanet = PruningMetaNet(hidden=16, layers=3)
    meta_train(metanet, models, list(part.batches(500, seed=trial.seed)), epochs=trial.scale(smoke=1, laptop=3), seed=trial.seed)
    return metanet


@torch.no_grad()
def _accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model.eval()(x).argmax(1) == y).double().mean())


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "random": "random", "l1": "L1", "group_norm": "group norms", "taylor": "Taylor", "flap": "FLAP's metric", "hap": "HAP",
        "metapruning": "metanetwork", "cacp": "CACP", "gate": "gates (one more epoch)",
    }  # fmt: skip
    colours = ("#999999", "#56B4E9", "#0072B2", "#E69F00", "#F0E442", "#009E73", "#CC79A7", "#D55E00", "#000000")
    fig.set_size_inches(9.5, 4.2)
    left, right = fig.subplots(1, 2, sharey=True)
    for axes, metric, title in ((left, "before_at", "right after the cut"), (right, "after_at", "after one epoch")):
        for i, (arm, label) in enumerate(names.items()):
            values, macs = 100 * record.values(arm, metric), 100 * record.values(arm, "macs")
            spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
            axes.errorbar(macs.mean(0), values.mean(0), spread, label=label, color=colours[i], marker="o", markersize=4, capsize=2)
        axes.axhline(100 * record.mean("dense", "before"), color="black", linestyle=":", linewidth=0.8)
        axes.set(xlabel="multiply-adds left (%)", title=title)
    left.set_ylabel("test accuracy (%)")
    right.legend(fontsize=7, loc="lower right")
