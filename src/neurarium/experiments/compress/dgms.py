"""DGMS against other codebooks of 4, 3 and 2 bits on one ResNet-8, all trained on equally long with the same optimizer.

``kmeans`` is the codebook without training, ``centroids3`` trains the k-means centres under fixed codes (deep compression), ``lsq3`` an
even grid with a learned step a layer, ``tuned`` the float network itself: what more training alone is worth. The first and the last layer
stay in floating point everywhere; biases and batch normalisation are trained in all arms that train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neurarium.compress.quant.affine import UniformGrid
from neurarium.compress.quant.mixture import MixtureWeight, harden, plan_dgms, soften, tune
from neurarium.compress.quant.packing import PackedConv2d, PackedLinear
from neurarium.data import ImageTask
from neurarium.experiments.compress.zoo import Augmented, accuracy, cifar, resnet
from neurarium.meter import stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

#: the best of three rates for each kind of training (at 3 bits), on seeds that are not measured here
RATES = {"tuned": 1e-4, "dgms": 3e-4, "centroids": 1e-3, "lsq": 3e-4}
BITS = (4, 3, 2)


def run(trial: Trial, rates: dict[str, float] = RATES) -> None:
    task = cifar(trial)
    some, _ = task.train.split(trial.scale(smoke=128, laptop=2000), seed=trial.seed)
    short = replace(task, train=some)
    epochs = trial.scale(smoke=1, laptop=3)

    def train(model: nn.Module, kind: str) -> nn.Module:
        tune(model, Augmented(short.train, seed=trial.seed), epochs=epochs, lr=rates[kind], seed=trial.seed)
        return model.eval()

    names = [f"{kind}{b}" for kind in ("kmeans", "dgms") for b in BITS]
    for arm in trial.arms("fp32", "tuned", *names, "centroids3", "lsq3"):
        dense = trial.shared("resnet8", lambda: resnet(trial, task))
        if arm.name in ("fp32", "tuned"):
            model = dense if arm.name == "fp32" else train(dense, "tuned")
            arm.log(acc=accuracy(model, task), bytes=stored_bytes(model))
            continue
        kind, bits = arm.name[:-1], int(arm.name[-1])
        if kind == "lsq":
            arm.log(acc=accuracy(train(lsq(dense, bits), kind), task))
            continue
        soft = soften(dense, plan_dgms(dense, components=2**bits))
        if kind == "dgms":
            train(soft, kind)
        model = harden(soft)
        if kind == "centroids":
            model = train(free(model), kind)
        weights = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, (PackedConv2d, PackedLinear))}
        arm.log(
            acc=accuracy(model, task),
            soft=soft_accuracy(soft, task),
            values=max(len(w.unique()) for w in weights.values()),
            sparsity=sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values()),
            bytes=stored_bytes(model),
            divergence=sum(divergence(dense.get_submodule(n).weight, soft.get_submodule(n).weight) for n in weights) / len(weights),
        )
        if bits == 4 or kind == "dgms":
            picture(arm.curve, soft, list(weights)[-1])


def soft_accuracy(model: nn.Module, task: ImageTask) -> float:
    """Of the network with the softly assigned weights S(w), everything else in eval mode."""
    for m in model.eval().modules():
        if isinstance(m, MixtureWeight):
            m.train()
    right = 0
    with torch.no_grad():
        for x, y in task.test.batches(2000, shuffle=False):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(task.test)


def free(model: nn.Module) -> nn.Module:
    """Makes the tables of packed layers parameters, in place."""
    for m in model.modules():
        if isinstance(m, (PackedConv2d, PackedLinear)):
            m.table = nn.Parameter(m.table)
    return model


class LearnedStep(nn.Module):
    """An even grid of 2^bits levels whose step is learned (LSQ), with the published start and gradient scale."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.step = nn.Parameter(2 * weight.detach().abs().mean() / self.high**0.5)
        self.gain = (weight.numel() * self.high) ** -0.5

    def forward(self, weight: Tensor) -> Tensor:
        step = self.step * self.gain + (self.step * (1 - self.gain)).detach()
        return UniformGrid(step, torch.zeros_like(step, dtype=torch.int64), self.low, self.high)(weight)


def lsq(model: nn.Module, bits: int) -> nn.Module:
    """Puts the grid on the layers that DGMS would take, in place."""
    for name in plan_dgms(model).bits:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", LearnedStep(layer.weight, bits))
    return model


def divergence(before: Tensor, after: Tensor, bins: int = 64) -> float:
    """KL of the histograms of two weights (in nats; one count is added to every bin)."""
    before, after = before.detach().float(), after.detach().float()
    low, high = float(min(before.min(), after.min())), float(max(before.max(), after.max()))
    p, q = (torch.histc(w, bins, low, high) + 1 for w in (before, after))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def picture(curve: Callable[..., None], model: nn.Module, name: str) -> None:
    """Curves: a layer's histogram, its mixture's density, the values of its codebook with their shares."""
    layer = model.get_submodule(name)
    mix, w = layer.mixture, layer.weight.detach()
    edge = float(w.abs().max())
    x = torch.linspace(-edge, edge, 61)
    counts = torch.histc(w, 60, -edge, edge) / w.numel() / (2 * edge / 60)
    curve("histogram", x=((x[1:] + x[:-1]) / 2).tolist(), y=counts.tolist())
    share, fine = mix.log_share.detach().softmax(0), torch.linspace(-edge, edge, 200)
    z = (fine[:, None] - mix.codebook.detach()) / mix.log_sigma.detach().exp()
    density = (share * torch.exp(-0.5 * z**2 - mix.log_sigma.detach())).sum(1) / (2 * torch.pi) ** 0.5
    curve("density", x=fine.tolist(), y=density.tolist())
    sizes = torch.bincount(mix.codes(w).flatten(), minlength=len(share)) / w.numel()
    curve("codebook", x=mix.codebook.tolist(), y=sizes.tolist())


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(11, 3.8)
    axes = fig.subplots(1, 3, width_ratios=(1.15, 1, 1))
    colours = {"kmeans": "#999999", "dgms": "#0072B2", "centroids3": "#E69F00", "lsq3": "#009E73"}
    labels = {"kmeans": "k-means, no training", "dgms": "DGMS", "centroids3": "k-means, centres trained", "lsq3": "even grid, learned step"}
    acc = axes[0]
    for kind in ("kmeans", "dgms"):
        values = [100 * record.values(f"{kind}{b}", "acc") for b in BITS]
        spread = [v.std(ddof=1) if len(v) > 1 else 0 for v in values]
        acc.errorbar(BITS, [v.mean() for v in values], spread, marker="o", capsize=3, color=colours[kind], label=labels[kind])
    for i, arm in enumerate(("centroids3", "lsq3")):
        v = 100 * record.values(arm, "acc")
        spread = v.std(ddof=1) if len(v) > 1 else 0
        acc.errorbar([3.08 + 0.08 * i], [v.mean()], [spread], marker="s", capsize=3, color=colours[arm], linestyle="", label=labels[arm])
    for arm, style, text in (("fp32", ":", "float"), ("tuned", "--", "float, trained on")):
        acc.axhline(100 * record.mean(arm, "acc"), color="black", linewidth=0.8, linestyle=style, label=text)
    acc.set(xlabel="bits a weight", ylabel="test accuracy (%)", title="ResNet-8, CIFAR-10", xticks=sorted(BITS))
    acc.legend(fontsize=7, loc="lower right")
    for ax, arm, title in ((axes[1], "kmeans4", "16 values: the mixture at the start"), (axes[2], "dgms4", "16 values: after training")):
        x, y = record.curves(arm, "histogram")[0]
        ax.bar(x, y, x[1] - x[0], color="#CCCCCC", label="weights")
        ax.plot(*record.curves(arm, "density")[0], color="#D55E00", linewidth=1, label="mixture")
        x, y = record.curves(arm, "codebook")[0]
        ax.vlines(x, 0, [v * ax.get_ylim()[1] for v in y], color="#0072B2", linewidth=2, label="codebook (height: share)")
        ax.set(title=title, xlabel="weight, last convolution", ylabel="density")
        ax.legend(fontsize=7)
