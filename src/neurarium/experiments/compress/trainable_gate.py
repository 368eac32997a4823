"""Trainable gates on a ResNet-8 against channels chosen beforehand, at equal multiply-adds and equal epochs in all.

The gated network is trained for two epochs with its gates and for two without the channels that closed. The others (L1 norms, the scales
of the batch normalisation as in network slimming, random) lose their channels first and are trained for four. ``ste_30`` has gates with a
constant derivative. At the end the feed-forward neurons of a character model, by gates and by norms, 60 steps each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress import ChannelGraph, apply_channels, choose_groups, plan_units, trainable_gate, unit_norm
from neurarium.compress.graph import Group
from neurarium.compress.prune.gate import Gated, GateLoss
from neurarium.data import ImageTask
from neurarium.experiments.compress.zoo import Augmented, accuracy, cifar, finetune, gpt, next_token_loss, resnet
from neurarium.learn.fit import Backprop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

EPOCHS = 4


@dataclass
class Vision:
    task: ImageTask
    short: ImageTask  # what pruned networks are trained on
    model: nn.Module
    graph: ChannelGraph
    groups: list[Group]


def vision(trial: Trial) -> Vision:
    task = cifar(trial)
    model = resnet(trial, task)
    graph = ChannelGraph.trace(model, task.train.x[:2])
    return Vision(task, replace(task, train=task.train.split(0.4, trial.seed)[0]), model, graph, choose_groups(graph, model))


def run(trial: Trial) -> None:
    for arm in trial.arms("dense", "gate_50", "l1_50", "gate_30", "ste_30", "l1_30", "slimming_30", "random_30"):
        case = trial.shared("vision", partial(vision, trial))
        if arm.name == "dense":
            arm.log(acc=accuracy(case.model, case.task), mac_ratio=1.0, flipped_again=0.0)
            continue
        method, _, percent = arm.name.partition("_")
        target = int(percent) / 100
        if method in ("gate", "ste"):
            seen: list[tuple[Gated, GateLoss]] = []
            small = trainable_gate(
                case.model, Augmented(case.short.train, seed=trial.seed), target=target, epochs=EPOCHS // 2, finetune=EPOCHS // 2,
                shape="sigmoid" if method == "gate" else "constant", lr=0.02, seed=trial.seed,
                watch=lambda *pair, seen=seen: seen.append(pair),
            )  # fmt: skip
            plan, objective = small.plan, seen[0][1]
            assert objective.flips is not None
            arm.log(flipped_again=float((objective.flips > 1).float().mean()), before_settling=objective.ratios[-1])
            steps = list(range(len(objective.opened)))
            for name, opened in zip(seen[0][0].names, zip(*objective.opened, strict=True), strict=True):
                arm.curve("open_" + name.replace(".", "_"), x=steps, y=[n / case.graph[name].size for n in opened])
            arm.curve("ratio", x=steps, y=objective.ratios)
        else:
            plan = plan_units(case.graph, _scores(method, case, trial.seed), ratio=1 - target, of="macs")
            small = finetune(apply_channels(case.model, plan), case.short, epochs=EPOCHS, seed=trial.seed)
        arm.log(acc=accuracy(small, case.task), mac_ratio=plan.cost_after.macs / plan.cost_before.macs)

    for arm in trial.arms("gpt_gate", "gpt_l2"):
        trained = trial.shared("gpt", partial(gpt, trial))
        steps = trial.scale(smoke=4, laptop=30)
        loader = trained.loader(16 * steps, seed=trial.seed)
        example = loader[0][0][:2]
        learner = Backprop(
            loss=next_token_loss, optimizer=partial(AdamW, lr=1e-3), schedule=partial(OneCycleLR, max_lr=1e-3, total_steps=steps)
        )
        if arm.name == "gpt_gate":
            small = trainable_gate(
                trained.model, loader, target=0.7, epochs=1, finetune=1, units="neurons", lr=1e-3,
                loss_fn=next_token_loss, learner=learner, example=example, seed=trial.seed, optimizer=partial(SGD, momentum=0.9),
            )  # fmt: skip
            plan = small.plan
        else:
            graph = ChannelGraph.trace(trained.model, example)
            scores = unit_norm(trained.model, choose_groups(graph, trained.model, "neurons"), p=2, weights="both")
            plan = plan_units(graph, scores, ratio=0.3, of="macs")
            small = apply_channels(trained.model, plan)
            learner = replace(learner, schedule=partial(OneCycleLR, max_lr=1e-3, total_steps=2 * steps))
            learner.fit(small, loader, epochs=2, seed=trial.seed)
        arm.log(loss=trained.loss(small), mac_ratio=plan.cost_after.macs / plan.cost_before.macs, dense=trained.loss())


def _scores(method: str, case: Vision, seed: int) -> Mapping[str, Tensor]:
    if method == "l1":
        return unit_norm(case.model, case.groups)
    if method == "slimming":
        scales = {}
        for group in case.groups:
            norm = next(m for m in group.members if m.side == "norm")
            scales[group.id] = case.model.get_submodule(norm.module).weight.detach().abs().double()[norm.index[:, 0]]
        return scales
    draw = torch.Generator().manual_seed(seed)
    return {g.id: torch.rand(g.size, generator=draw, dtype=torch.float64) for g in case.groups}


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(11, 3.8)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.5, 1.5, 0.7))
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
    ratio = record.curves("gate_30", "ratio")[0]
    left.plot(ratio[0], ratio[1], color="black", linewidth=2, label="multiply-adds")
    left.axhline(0.3, color="black", linewidth=0.8, linestyle=":")
    for place, colour in zip((3, 4, 5), colours, strict=False):
        try:
            x, y = record.curves("gate_30", f"open_{place}_body_0")[0]
        except (KeyError, IndexError):
            continue
        left.plot(x, y, color=colour, linewidth=1.2, label=f"open, block {place - 2}")
    left.set(xlabel="training step", ylabel="share", title="Gates opening and closing (target 30 %)", ylim=(0, 1.05))
    left.legend(fontsize=8)
    names = {
        "gate_30": "gates", "ste_30": "gates,\nstraight\nthrough", "l1_30": "L1 norm", "slimming_30": "BN scale", "random_30": "random",
    }  # fmt: skip
    for i, (arm, colour) in enumerate(zip(names, colours, strict=False)):
        values = 100 * record.values(arm, "acc")
        spread = values.std(ddof=1) if len(values) > 1 else 0
        middle.bar(i, values.mean(), 0.7, yerr=spread, color=colour, capsize=3)
    for i, arm in enumerate(("gate_50", "l1_50")):
        values = 100 * record.values(arm, "acc")
        spread = values.std(ddof=1) if len(values) > 1 else 0
        middle.bar(5.6 + i, values.mean(), 0.7, yerr=spread, color=colours[2 * i], capsize=3, hatch="//")
    middle.axhline(100 * record.mean("dense", "acc"), color="black", linewidth=0.8, linestyle=":")
    middle.set_xticks((0, 1, 2, 3, 4, 5.6, 6.6), [*names.values(), "gates\n50 %", "L1\n50 %"], fontsize=7)
    low = min(100 * record.values(arm, "acc").min() for arm in (*names, "gate_50", "l1_50"))
    middle.set(ylim=(max(0, low - 5), None), ylabel="test accuracy (%)", title="At 30 % of the multiply-adds, four epochs in all")
    for i, (arm, colour) in enumerate((("gpt_gate", colours[0]), ("gpt_l2", colours[2]))):
        values = record.values(arm, "loss")
        right.bar(i, values.mean(), 0.7, yerr=values.std(ddof=1) if len(values) > 1 else 0, color=colour, capsize=3)
    right.axhline(record.mean("gpt_gate", "dense"), color="black", linewidth=0.8, linestyle=":")
    losses = [record.values(arm, "loss") for arm in ("gpt_gate", "gpt_l2")]
    right.set_ylim(record.mean("gpt_gate", "dense") - 0.05, max(v.max() for v in losses) + 0.05)
    right.set_xticks((0, 1), ("gates", "norms"))
    right.set(ylabel="held-out loss (nats)", title="Character model,\n70 % left")
