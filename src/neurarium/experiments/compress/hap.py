"""HAP against magnitude, Taylor and random: a ResNet-8 on CIFAR-10 at equal parameters, its channels against their true ablation loss,
and the heads and feed-forward neurons of a small character model.

All methods share the planner (global ranking of the channels inside the blocks until the parameters fit) and the same epoch of
fine-tuning on half of the images; only the scores differ, and the implants of the arm ``hap``. The true loss increase of each channel
comes from silencing it alone on the images that the scores were taken from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from neurarium import meter
from neurarium.compress import (
    ChannelGraph,
    ChannelPlan,
    ablation,
    apply_channels,
    apply_hap,
    choose_groups,
    hap_scores,
    norm_product,
    plan_hap,
    plan_units,
    unit_norm,
    unit_taylor,
)
from neurarium.compress.graph import Group
from neurarium.data import ImageTask
from neurarium.experiments.compress.zoo import accuracy, cifar, finetune, gpt, next_token_loss, reestimate_bn, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

LEVELS = (0.5, 0.7)


@dataclass
class Vision:
    """The network, the images that scores come from, every method's scores and the true loss increases."""

    task: ImageTask
    short: ImageTask  # the half that fine-tuning sees
    model: nn.Module
    data: list[tuple[Tensor, Tensor]]
    graph: ChannelGraph
    groups: list[Group]
    scores: dict[str, Mapping[str, Tensor]]
    truth: Mapping[str, Tensor]


def vision(trial: Trial) -> Vision:
    task = cifar(trial)
    model = resnet(trial, task)
    rows = trial.scale(smoke=16, laptop=192)
    data = [(task.train.x[:rows], task.train.y[:rows])]
    graph = ChannelGraph.trace(model, data[0][0][:2])
    groups = choose_groups(graph, model)
    draw = torch.Generator().manual_seed(trial.seed)
    probes = trial.scale(smoke=2, laptop=64)
    scores: dict[str, Mapping[str, Tensor]] = {
        "hap": hap_scores(model, groups, data, probes=probes, samples=rows, seed=trial.seed).scores,
        "magnitude": unit_norm(model, groups, p=2),
        "taylor": unit_taylor(model, groups, data, samples=rows),
        "random": {g.id: torch.rand(g.size, generator=draw, dtype=torch.float64) for g in groups},
        "product": norm_product(model, groups),
    }
    scores["hap_noimplant"] = scores["hap"]
    short = replace(task, train=task.train.split(0.5, trial.seed)[0])
    return Vision(task, short, model, data, graph, groups, scores, ablation(model, groups, data, samples=rows))


def run(trial: Trial) -> None:
    for arm in trial.arms("dense", "hap", "hap_noimplant", "magnitude", "taylor", "random", "product"):
        case = trial.shared("vision", partial(vision, trial))
        task, model = case.task, case.model
        if arm.name == "dense":
            arm.log(accuracy=accuracy(model, task), params=meter.parameters(model))
            continue
        mine = case.scores[arm.name]
        a, b = (torch.cat([s[g.id] for g in case.groups]).tolist() for s in (case.truth, mine))
        arm.curve("score", x=a, y=b)
        arm.log(spearman=float(spearmanr(a, b).statistic))
        if arm.name == "product":  # a yardstick for the ranking only
            continue
        before, after, params, macs = [], [], [], []
        for level in LEVELS:
            if arm.name == "hap":
                plan = plan_hap(model, case.data, ratio=level, of="params", implant=0.1, scores=mine)
            else:
                plan = plan_units(case.graph, mine, ratio=level, of="params")
            small = apply_hap(model, plan)
            before.append(accuracy(small, task))
            finetune(small, case.short, epochs=1, seed=trial.seed)
            reestimate_bn(small, task.train.x[:1024])
            after.append(accuracy(small, task))
            params.append(plan.cost_after.params / plan.cost_before.params)
            macs.append(plan.cost_after.macs / plan.cost_before.macs)
            if arm.name == "hap" and level == LEVELS[0]:
                arm.curve("classes", x=a, y=_classes(plan, case.groups))
        arm.log(acc_before=before, acc_after=after, params=params, macs=macs)

    for arm in trial.arms("heads_hap", "heads_gradient", "heads_magnitude"):
        trained = trial.shared("gpt", partial(gpt, trial))
        model, windows = trained.model, trial.scale(smoke=4, laptop=32)
        data = trained.loader(windows, seed=trial.seed)
        graph = ChannelGraph.trace(model, data[0][0][:2])
        groups = choose_groups(graph, model, ("heads", "neurons"))
        score: Mapping[str, Tensor]
        if arm.name == "heads_hap":
            probes = trial.scale(smoke=2, laptop=32)
            score = hap_scores(model, groups, data, probes=probes, samples=windows, loss_fn=next_token_loss, seed=trial.seed).scores
        elif arm.name == "heads_gradient":
            score = unit_taylor(model, groups, data, weights="in", reduce="sample", samples=windows, loss_fn=next_token_loss)
        else:
            score = unit_norm(model, groups, p=2, weights="both")
        losses = []
        for kind in ("heads", "neurons"):
            part = {g.id: score[g.id] for g in choose_groups(graph, model, kind)}
            losses.append(trained.loss(apply_channels(model, plan_units(graph, part, ratio=0.5, of="units"))))
        arm.log(loss=losses[0], ffn_loss=losses[1], dense=trained.loss())


def _classes(plan: ChannelPlan, groups: list[Group]) -> list[int]:
    """0 removed, 1 implant, 2 kept: one number a channel."""
    cheap = {g.id: plan.implanted.get(g.id, torch.empty(0)).tolist() for g in groups}
    kept = {g.id: plan.kept[g.id].tolist() for g in groups}
    return [1 if u in cheap[g.id] else 2 * (u in kept[g.id]) for g in groups for u in range(g.size)]


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(11, 3.8)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.3, 1.5, 1))
    truth, score = (torch.tensor(v) for v in record.curves("hap", "score")[0])
    classes = torch.tensor(record.curves("hap", "classes")[0][1])
    for value, label, colour in ((0, "removed", "#D55E00"), (1, "implant", "#F0E442"), (2, "kept", "#0072B2")):
        here = classes == value
        left.scatter(score[here].clamp_min(1e-9), truth[here], s=18, color=colour, label=label, edgecolors="black", linewidths=0.3)
    left.set(xscale="log", xlabel="HAP's score S", ylabel="true increase of the loss (nats)")
    left.set_yscale("symlog", linthresh=1e-3)
    left.set_title(f"Channels of a ResNet-8, 50 % fewer parameters\nSpearman {record.mean('hap', 'spearman'):.2f} "
                   f"(magnitude {record.mean('magnitude', 'spearman'):.2f})", fontsize=9)  # fmt: skip
    left.legend(fontsize=8)
    names = {"hap": "HAP", "hap_noimplant": "HAP, no implant", "magnitude": "magnitude", "taylor": "Taylor", "random": "random"}
    colours = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#999999")
    for i, ((arm, label), colour) in enumerate(zip(names.items(), colours, strict=True)):
        values = 100 * record.values(arm, "acc_after")
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
        x = [j + 0.16 * (i - 2) for j in range(len(LEVELS))]
        middle.bar(x, values.mean(0), 0.15, yerr=spread, color=colour, capsize=2, label=label)
    middle.axhline(100 * record.mean("dense", "accuracy"), color="black", linewidth=0.8, linestyle=":", label="dense")
    middle.set_xticks(range(len(LEVELS)), [f"{100 * level:.0f} % fewer\nparameters" for level in LEVELS])
    low = min(100 * record.values(arm, "acc_after").min() for arm in names)
    middle.set(ylim=(max(0, low - 5), None), ylabel="test accuracy (%)", title="After one epoch on 5,000 images")
    middle.legend(fontsize=7, loc="lower left", ncols=2)
    arms = {"heads_hap": "HAP", "heads_gradient": "gradient", "heads_magnitude": "magnitude"}
    for i, (arm, colour) in enumerate(zip(arms, ("#0072B2", "#009E73", "#E69F00"), strict=True)):
        for j, metric in enumerate(("loss", "ffn_loss")):
            values = record.values(arm, metric)
            error = values.std(ddof=1) if len(values) > 1 else 0
            right.bar(j + 0.26 * (i - 1), values.mean(), 0.24, yerr=error, color=colour, capsize=3, label=arms[arm] if j == 0 else None)
    right.axhline(record.mean("heads_hap", "dense"), color="black", linewidth=0.8, linestyle=":")
    right.set_xticks((0, 1), ("half the\nheads", "half the\nneurons"))
    right.set(ylabel="held-out loss (nats)", title="Character model,\nno fine-tuning")
    right.legend(fontsize=8)
