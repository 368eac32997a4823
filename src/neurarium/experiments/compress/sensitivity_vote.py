"""Which channels matter? Seven scores against the truth: the loss when one channel alone is silenced.

All of them rank the inner channels of one trained ResNet-8 from the same images. ``spearman`` is over all channels together (what a
global ranking needs), ``within`` the mean over layers (what is left when a planner fixes the layers' shares), ``loss_30`` the loss right
after the 30 % lowest go together, where the true increases of single channels are only one more score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress import (
    ChannelGraph,
    ablation,
    apply_channels,
    choose_groups,
    hap_scores,
    norm_product,
    plan_units,
    unit_fluctuation,
    unit_norm,
    unit_sum,
    unit_taylor,
)
from neurarium.compress.graph import Group
from neurarium.compress.unit_scores import diagonal
from neurarium.experiments.compress.zoo import cifar, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

#: arm -> label
NAMES = {
    "truth": "true increase", "hap": "HAP trace", "fisher": "Fisher diagonal", "taylor": "Taylor", "taylor_sample": "Taylor, by sample",
    "fluctuation": "fluctuation", "l1": "L1 norm", "product": "norm in x out",
}  # fmt: skip


@dataclass
class Case:
    model: nn.Module
    graph: ChannelGraph
    groups: list[Group]
    images: list[tuple[Tensor, Tensor]]
    held: tuple[Tensor, Tensor]
    truth: Mapping[str, Tensor]


def case(trial: Trial) -> Case:
    task = cifar(trial)
    model = resnet(trial, task)
    rows, many = trial.scale(smoke=(16, 32), laptop=(192, 512))
    graph = ChannelGraph.trace(model, task.train.x[:2])
    groups = choose_groups(graph, model)
    truth = ablation(model, groups, [(task.train.x[:many], task.train.y[:many])], samples=many)
    return Case(model, graph, groups, [(task.train.x[:rows], task.train.y[:rows])], (task.test.x[:many], task.test.y[:many]), truth)


def _fisher(model: nn.Module, groups: list[Group], images: list) -> Mapping[str, Tensor]:
    """w^2 E[g^2] / 2 of every weight, summed."""
    known = dict(model.named_parameters())
    curvature = diagonal(model, groups, images, chunk=64)
    return unit_sum(model, groups, {name: f * known[name].detach().double().square() / 2 for name, f in curvature.items()})


def run(trial: Trial) -> None:
    probes = trial.scale(smoke=2, laptop=64)
    for arm in trial.arms(*NAMES):
        it = trial.shared("case", partial(case, trial))
        methods: dict[str, tuple[float, Callable[[], Mapping[str, Tensor]]]] = {
            "truth": (1 + sum(g.size for g in it.groups), partial(dict, it.truth)),
            "hap": (3 + 6 * probes, lambda it=it: hap_scores(it.model, it.groups, it.images, probes=probes, seed=trial.seed).scores),
            "fisher": (3, partial(_fisher, it.model, it.groups, it.images)),
            "taylor": (3, partial(unit_taylor, it.model, it.groups, it.images)),
            "taylor_sample": (3, partial(unit_taylor, it.model, it.groups, it.images, reduce="sample")),
            "fluctuation": (1, partial(unit_fluctuation, it.model, it.groups, it.images)),
            "l1": (0, partial(unit_norm, it.model, it.groups)),
            "product": (0, partial(norm_product, it.model, it.groups)),
        }
        passes, score = methods[arm.name]
        scores = score()
        flat, true = (torch.cat([s[g.id] for g in it.groups]).numpy() for s in (scores, it.truth))
        within = [spearmanr(scores[g.id].numpy(), it.truth[g.id].numpy()).statistic for g in it.groups]
        small = apply_channels(it.model, plan_units(it.graph, scores, ratio=0.3, of="units"))
        x, y = it.held
        with torch.no_grad():
            loss = float(F.cross_entropy(small(x), y))
        arm.log(spearman=float(spearmanr(flat, true).statistic), within=float(np.nanmean(within)), loss_30=loss, passes=passes)
        arm.curve("scores", x=list(range(len(flat))), y=flat.tolist())


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(10.5, 4.6)
    left, right = fig.subplots(1, 2, width_ratios=(1.25, 1))
    arms = [name for name in NAMES if name in record.arms]
    matrices = []
    for seed in range(len(record.seeds)):
        columns = np.stack([np.asarray(record.curves(arm, "scores")[seed][1]) for arm in arms])
        matrices.append(np.corrcoef([np.argsort(np.argsort(c)) for c in columns]))
    matrix = np.mean(matrices, 0)
    image = left.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr")
    for i in range(len(arms)):
        for j in range(len(arms)):
            left.text(
                j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(matrix[i, j]) > 0.6 else "black"
            )
    labels = [NAMES[arm] for arm in arms]
    left.set_xticks(range(len(arms)), labels, rotation=40, ha="right", fontsize=8)
    left.set_yticks(range(len(arms)), labels, fontsize=8)
    left.set_title("Spearman correlation of the rankings, all channels")
    fig.colorbar(image, ax=left, shrink=0.7)
    others = [arm for arm in arms if arm != "truth"]
    y = np.arange(len(others))
    for shift, metric, colour, label in ((-0.2, "spearman", "#0072B2", "all channels"), (0.2, "within", "#E69F00", "within a layer")):
        values = np.stack([record.values(arm, metric) for arm in others])
        spread = values.std(1, ddof=1) if values.shape[1] > 1 else 0
        right.barh(y + shift, values.mean(1), 0.38, xerr=spread, color=colour, capsize=2, label=label)
    right.set_yticks(y, [f"{NAMES[a]}\n({record.mean(a, 'passes'):.0f} passes)" for a in others], fontsize=8)
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="Spearman correlation with the true loss increase", title="What the ranking is worth, and what it costs")
    right.legend(fontsize=8)
