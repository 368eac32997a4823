"""ALDS against simpler ways to share a low-rank budget: accuracy right after decomposition, at three sizes, and after one epoch.

The arms differ in one thing at a time: ``svd_uniform`` gives every layer the same share and one slice, ``svd_best`` the same share and
the best number of slices, ``svd_energy`` one slice and the same kept energy, ``k1`` one slice and the same error, ``alds`` chooses both,
``alds_bound`` does so by the sound bound, ``alds_plus`` among all four foldings. ``l1`` removes channels instead, until the model has no
more parameters than that of ``alds``. All start from the same trained networks, a ResNet-8 and a VGG; only the budget's part is decided
without any data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from neurarium.compress import ChannelGraph, RankPlan, apply_ranks, fold, plan_alds, plan_svd
from neurarium.experiments.compress.zoo import accuracy, cifar, finetune, resnet, vgg
from neurarium.meter import parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

KEEP = (0.6, 0.4, 0.3)
PLANS: dict[str, Callable[[nn.Module, float], RankPlan]] = {
    "alds": lambda model, keep: plan_alds(model, keep=keep),
    "k1": lambda model, keep: plan_alds(model, keep=keep, max_splits=1),
    "svd_energy": lambda model, keep: plan_svd(model, keep=keep, allocation="energy"),
    "svd_best": lambda model, keep: plan_svd(model, keep=keep, splits="best"),
    "svd_uniform": lambda model, keep: plan_svd(model, keep=keep),
    "alds_bound": lambda model, keep: plan_alds(model, keep=keep, bound="theorem"),
    "alds_plus": lambda model, keep: plan_alds(model, keep=keep, schemes=(0, 1, 2, 3)),
}
RETRAINED = ("alds", "k1", "svd_energy")
ON_VGG = ("alds", "k1", "svd_energy", "svd_uniform")


def run(trial: Trial) -> None:
    task = cifar(trial)
    for arm in trial.arms("dense", *PLANS, "l1"):
        net = trial.shared("resnet", lambda: resnet(trial, task))
        other = trial.shared("vgg", lambda: vgg(trial, task))
        if arm.name == "dense":
            arm.log(acc=accuracy(net, task), vgg=accuracy(other, task), parameters=parameters(net))
            continue
        if arm.name == "l1":
            sizes = trial.metric("alds", "parameters")
            results = [l1_channels(net, task.train.x[:2], size) for size in sizes]
            acc = [accuracy(m, task) for m in results]
            arm.log(acc=acc, parameters=[parameters(m) for m in results])
            arm.curve("acc", x=KEEP, y=acc)
            continue
        plans = [PLANS[arm.name](net, keep) for keep in KEEP]
        results = [apply_ranks(net, plan) for plan in plans]
        acc = [accuracy(m, task) for m in results]
        for keep, plan in zip(KEEP, plans, strict=True):
            arm.curve(f"splits_{100 * keep:.0f}", y=[plan.ranks.get(name, (0, 0, 0))[0] for name in _weights(net)])
            arm.curve(f"share_{100 * keep:.0f}", y=list(shares(net, plan).values()))
        arm.curve("acc", x=KEEP, y=acc)
        arm.log(
            acc=acc,
            parameters=[parameters(m) for m in results],
            max_rel_error=[max(plan.errors.values()) for plan in plans],
            true_error=[max(true_errors(net, m, plan)) for m, plan in zip(results, plans, strict=True)],
            off_budget=[abs(size(net, plan) / keep - 1) for keep, plan in zip(KEEP, plans, strict=True)],
        )
        if arm.name in ON_VGG:
            arm.log(vgg=[accuracy(apply_ranks(other, PLANS[arm.name](other, keep)), task) for keep in KEEP])
        if arm.name in RETRAINED:
            trained = finetune(copy.deepcopy(results[-1]), task, epochs=1, lr=0.03, seed=trial.seed)
            arm.log(acc_after=accuracy(trained, task))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def shares(model: nn.Module, plan: RankPlan) -> dict[str, float]:
    """Kept share of each layer's weights."""
    kept = {n: RankPlan({n: plan.ranks[n]}).weights(model) if n in plan.ranks else w.numel() for n, w in _weights(model).items()}
    return {n: kept[n] / w.numel() for n, w in _weights(model).items()}


def size(model: nn.Module, plan: RankPlan) -> float:
    """Kept share of all weights."""
    weights = _weights(model)
    return sum(s * weights[n].numel() for n, s in shares(model, plan).items()) / sum(w.numel() for w in weights.values())


def true_errors(model: nn.Module, result: nn.Module, plan: RankPlan) -> list[float]:
    """The relative error of each decomposed layer in the operator norm of its folded weight."""
    errors = []
    for name, (_, _, scheme) in plan.ranks.items():
        old = fold(model.get_submodule(name).weight.detach().double(), scheme)
        new = fold(result.get_submodule(name).weight.detach().double(), scheme)
        errors.append(float(torch.linalg.matrix_norm(old - new, 2) / torch.linalg.matrix_norm(old, 2)))
    return errors


def l1_channels(model: nn.Module, example: torch.Tensor, size: int) -> nn.Module:
    """Removes the same share of each group of channels, those of least L1 norm, until the model has at most `size` parameters."""
    graph = ChannelGraph.trace(model, example)
    tensors = dict(model.named_parameters())
    scores = {}
    for group in graph.groups:
        scores[group.id] = torch.zeros(group.size)
        for member in group.members:
            for name, dim in member.tensors:
                if member.side == "out" and name in tensors and tensors[name].ndim > 1:
                    flat = tensors[name].detach().abs().transpose(0, dim).flatten(1).sum(1)
                    scores[group.id] += flat[member.index].sum(1)
    for percent in range(100, 0, -1):
        kept = {g.id: scores[g.id].argsort(descending=True, stable=True)[: max(1, g.size * percent // 100)] for g in graph.groups}
        if graph.cost(kept).params <= size:
            break
    return graph.remove(model, {name: units.sort().values for name, units in kept.items()})


def figure(record: RecordView, fig: Figure) -> None:
    labels = {
        "alds": "ALDS", "k1": "error allocation, k = 1", "svd_best": "uniform share, best k", "svd_energy": "equal energy, k = 1",
        "svd_uniform": "uniform share, k = 1", "l1": "channels by L1 norm",
    }  # fmt: skip
    colours = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#999999", "#CC79A7")
    fig.set_size_inches(9.5, 4.0)
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.1))
    for (arm, label), colour in zip(labels.items(), colours, strict=True):
        if arm not in record.arms:
            continue
        values = 100 * record.values(arm, "acc")
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
        left.errorbar([100 * k for k in KEEP], values.mean(0), spread, label=label, color=colour, marker="o", markersize=4, capsize=2)
    left.axhline(100 * record.mean("dense", "acc"), color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="weights kept (%)", ylabel="test accuracy, no retraining (%)", title="One network, one budget", ylim=(0, 95))
    left.legend(fontsize=7, loc="upper left", ncols=2)
    keep = f"{100 * KEEP[1]:.0f}"
    splits, share = record.curves("alds", f"splits_{keep}")[0][1], record.curves("alds", f"share_{keep}")[0][1]
    one = record.curves("k1", f"share_{keep}")[0][1]
    where = list(range(len(share)))
    right.bar([i - 0.2 for i in where], [100 * v for v in share], 0.4, color="#0072B2", label="ALDS (number: slices k)")
    right.bar([i + 0.2 for i in where], [100 * v for v in one], 0.4, color="#56B4E9", label="error allocation, k = 1")
    for i, (k, v) in enumerate(zip(splits, share, strict=True)):
        right.annotate("dense" if k == 0 else f"{k:g}", (i - 0.2, 100 * v), ha="center", va="bottom", fontsize=7)
    right.axhline(100 * KEEP[1], color="black", linewidth=0.8, linestyle=":")
    right.set(xlabel="layer", ylabel="weights kept (%)", title=f"Who gets what at {100 * KEEP[1]:g} % (first seed)")
    right.set(xticks=where, ylim=(0, 122))
    right.legend(fontsize=8, loc="upper center", ncols=2)
