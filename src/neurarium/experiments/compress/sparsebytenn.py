"""Groups of filters that share their inputs: milliseconds of MobileNet's pointwise layers, and accuracy beside other ways to prune.

Time: the thirteen pointwise convolutions of MobileNet-v1 at full width on one image of 224 x 224, one thread, random weights, the sum over
all of them; dense is the faster of torch's convolution (channels last) and a linear layer over the pixels. Accuracy: a small MobileNet on
CIFAR-10; its pointwise layers are pruned in one shot, and every arm, the dense one too, is trained on for the same number of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from neurarium.compress import BlockSparse, ChannelGraph, MaskPlan, Unstructured, apply, plan_groups, rearrange_channels
from neurarium.compress.runtime.conv import SparseConv2d
from neurarium.experiments.compress.sparse_cpu import one_thread, random_mask
from neurarium.experiments.compress.zoo import accuracy, cifar, finetune, mobilenet
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

POINTWISE = (  # side of the map, inputs, outputs, how many such layers
    (112, 32, 64, 1), (56, 64, 128, 1), (56, 128, 128, 1), (28, 128, 256, 1), (28, 256, 256, 1), (14, 256, 512, 1), (14, 512, 512, 5),
    (7, 512, 1024, 1), (7, 1024, 1024, 1),
)  # fmt: skip
#: arm -> (height of the groups, sparsity, rearranged)
GROUPS = {
    "sparse30": (16, 0.3, True), "group16": (16, 0.5, False), "group16_rearranged": (16, 0.5, True), "group4": (4, 0.5, False),
    "sparse70": (16, 0.7, True),
}  # fmt: skip


def run(trial: Trial) -> None:
    task = cifar(trial)
    few = replace(task, train=task.train.split(trial.scale(smoke=100, laptop=3000), trial.seed)[0])
    example = task.train.x[:2]

    def trained(model: nn.Module) -> float:
        return accuracy(finetune(model, few, epochs=1, lr=0.02, seed=trial.seed), task)

    for arm in trial.arms("dense", *GROUPS, "unstructured", "channel_pruned"):
        seconds = trial.shared("pointwise", partial(pointwise, trial))[arm.name]
        arm.log_timed(pointwise_seconds=seconds)
        model = trial.shared("mobilenet", lambda: mobilenet(trial, task))
        if arm.name in GROUPS:
            height, sparsity, rearranged = GROUPS[arm.name]
            if rearranged:
                model = rearrange_channels(model, group=(height, 1), sparsity=sparsity, example=example)
                del model.order
            plan = plan_groups(model, sparsity=sparsity, group=(height, 1))
            arm.log(kept_norm=kept_norm(model, plan.masks))
            model = apply(model, plan)
        elif arm.name == "unstructured":
            plan = single_weights(model)
            arm.log(kept_norm=kept_norm(model, plan.masks))
            model = apply(model, plan)
        elif arm.name == "channel_pruned":
            model, share = channels(model, example)
            arm.log(macs=share)
        arm.log(before=accuracy(model, task))
        arm.log(accuracy=trained(model))


def kept_norm(model: nn.Module, masks: dict) -> float:
    """Mean over the layers of what is left of a weight's norm."""
    parts = [(model.get_submodule(n).weight.detach().double(), m) for n, m in masks.items()]
    return sum(float((w * m).norm() / w.norm()) for w, m in parts) / len(parts)


def single_weights(model: nn.Module) -> MaskPlan:
    """Half of each layer's weights, by magnitude, in the layers that are pruned in groups."""
    names = plan_groups(model, sparsity=0.5).masks
    return MaskPlan({n: Unstructured().mask(model.get_submodule(n).weight.detach().abs(), 0.5) for n in names})


def channels(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, float]:
    """The filters of largest norm, the same share of each group, with at least the multiply-adds that groups at 50 % leave."""
    graph = ChannelGraph.trace(model, example)
    pruned = plan_groups(model, sparsity=0.5).masks
    whole = graph.cost().macs
    target = whole - 0.5 * sum(macs_of(model, name, example) for name in pruned)

    def kept(share: float) -> dict[str, torch.Tensor]:
        found = {}
        for group in graph.groups:
            score = torch.zeros(group.size, dtype=torch.float64)
            for member in group.members:
                weight = getattr(model.get_submodule(member.module), "weight", None)
                if member.side == "out" and ("weight", 0) in member.tensors and weight.ndim == 4 and weight.shape[1] > 1:
                    score += weight.detach().double().square().flatten(1).sum(1)[member.index].sum(1)
            found[group.id] = score.topk(max(1, round(share * group.size))).indices.sort().values
        return found

    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        low, high = (share, high) if graph.cost(kept(share)).macs <= target else (low, share)
    return graph.remove(model, kept(high)), graph.cost(kept(high)).macs / target


def macs_of(model: nn.Module, name: str, example: torch.Tensor) -> int:
    """Multiply-adds of one convolution on the example."""
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() * module.weight[0].numel()))
    with torch.no_grad():
        model.eval()(example)
    handle.remove()
    return seen[0]


def pointwise(trial: Trial) -> dict[str, float]:
    """arm -> seconds of all pointwise layers together."""
    layers = trial.scale(smoke=((4, 32, 64, 1),), laptop=POINTWISE)
    total: dict[str, float] = {}
    draw = torch.Generator().manual_seed(trial.seed)
    for side, inputs, outputs, count in layers:
        x = torch.randn(1, inputs, side, side, generator=draw).contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(inputs, outputs, 1, bias=False).to(memory_format=torch.channels_last)
        pixels, flat = x.permute(0, 2, 3, 1), conv.weight.detach().flatten(1).contiguous()
        runs: dict[str, Callable] = {"convolution": partial(conv, x), "linear": partial(F.linear, pixels, flat)}
        for name, (height, sparsity, _) in GROUPS.items():
            mask = random_mask(flat.shape, (height, 1), sparsity, draw)
            runs[name] = partial(SparseConv2d(BlockSparse.from_dense(flat, (height, 1), mask=mask), conv), x)
        narrow = nn.Conv2d(round(0.5**0.5 * inputs), round(0.5**0.5 * outputs), 1, bias=False).to(memory_format=torch.channels_last)
        y = x[:, : narrow.in_channels].contiguous(memory_format=torch.channels_last)
        thin = narrow.weight.detach().flatten(1).contiguous()
        runs["narrow convolution"] = partial(narrow, y)
        runs["narrow linear"] = partial(F.linear, y.permute(0, 2, 3, 1), thin)
        single = flat * random_mask(flat.shape, (1, 1), 0.5, draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR tensors are in beta
            runs["unstructured"] = partial(torch.matmul, single.to_sparse_csr(), pixels.reshape(-1, inputs).T)
        with one_thread(), torch.no_grad():
            found = {k: t.median for k, t in latency(runs, repeats=trial.scale(smoke=2, laptop=20)).items()}
        found["dense"] = min(found.pop("convolution"), found.pop("linear"))
        found["channel_pruned"] = min(found.pop("narrow convolution"), found.pop("narrow linear"))
        for name, seconds in found.items():
            total[name] = total.get(name, 0.0) + count * seconds
    return total


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "dense": ("dense", "black", "o"), "sparse30": ("groups of 16, rearranged, 30 %", "#56B4E9", "s"),
        "group16": ("groups of 16, 50 %", "#999999", "s"), "group16_rearranged": ("groups of 16, rearranged, 50 %", "#0072B2", "s"),
        "sparse70": ("groups of 16, rearranged, 70 %", "#003A5D", "s"), "group4": ("groups of 4, 50 %", "#009E73", "D"),
        "unstructured": ("single weights, 50 % (CSR)", "#E69F00", "^"), "channel_pruned": ("channels, equal multiply-adds", "#D55E00", "v"),
    }  # fmt: skip
    fig.set_size_inches(11, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(2, 1))
    for arm, (label, colour, marker) in names.items():
        if arm not in record.arms:
            continue
        x, y = 1e3 * record.values(arm, "pointwise_seconds"), 100 * record.values(arm, "accuracy")
        wide = len(x) > 1
        left.errorbar(
            x.mean(), y.mean(), y.std(ddof=1) if wide else 0, x.std(ddof=1) if wide else 0, label=label, color=colour, marker=marker,
            capsize=2, linestyle="none",
        )  # fmt: skip
    left.set(xlabel="13 pointwise layers of MobileNet-v1, one image (ms)", ylabel="small MobileNet, test accuracy (%)")
    left.set_title("Accuracy against measured time")
    left.legend(fontsize=7.5)
    bars = {"group16": "as trained", "group16_rearranged": "rearranged", "unstructured": "single\nweights"}
    for i, arm in enumerate(bars):
        values = record.values(arm, "kept_norm")
        right.bar(i, values.mean(), 0.6, yerr=values.std(ddof=1) if len(values) > 1 else 0, capsize=3, color=names[arm][1])
        right.text(i, values.mean() + 0.01, f"{values.mean():.3f}", ha="center", fontsize=8)
    right.set_xticks(range(len(bars)), list(bars.values()))
    right.set(title="Half the weights removed", ylabel="norm that is left", ylim=(0.5, 1.02))
