"""BiPer against other ways to train binary weights, on one small residual network for MNIST; and its quantisation error in closed form.

All networks have the same shape, start from the same random weights up to their scale and see the same batches for nine epochs; BiPer
spends six of them in stage 1. Weights are stepped by Adam with a rate relative to their spread at the start, so that latent weights of
different scale move alike. ``biper_a32`` has binary weights only; ``biper5`` and ``biper50`` have the
frequencies 5 and 50 on the weights with which 20 starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress.binary import (
    BiPerConv2d,
    SignConv2d,
    biper_error,
    biper_penalty,
    laplace_error,
    pack_binary,
    set_sharpness,
    set_stage,
)  # fmt: skip
from neurarium.compress.quant.packing import PackedConv2d
from neurarium.experiments.compress.zoo import accuracy
from neurarium.experiments.images import images
from neurarium.learn.fit import Backprop, Progress
from neurarium.meter import stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

#: relative to the spread; for BiPer and the straight-through sign 0.1 did better than 0.03, the other kinds take the same
RATES = {"biper": 0.1, "ste": 0.1, "bireal": 0.1, "tanh": 0.1, "real": 0.1}
TAU = (0.037, 0.0468)  # of the two stages, the paper's for CIFAR-10
Conv = Callable[..., nn.Conv2d]


class Block(nn.Module):
    """convolution - batch norm - (+ shortcut) - hardtanh; down-sampling averages and adds channels of zeros to the shortcut."""

    def __init__(self, conv: Conv, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm, self.stride, self.more = conv(into, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        beside = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return F.hardtanh(self.norm(self.conv(x)) + F.pad(beside, (0, 0, 0, 0, 0, self.more)))


def network(conv: Conv, width: int, classes: int) -> nn.Module:
    blocks = [Block(conv, into * width, out * width, stride) for into, out, stride in ((1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2))]
    stem = nn.Conv2d(1, width, 5, stride=2, padding=2, bias=False)
    return nn.Sequential(
        stem, nn.BatchNorm2d(width), nn.Hardtanh(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)
    )


def run(trial: Trial, rates: dict[str, float] = RATES) -> None:
    task = images(trial, "mnist", train=(200, 3000), test=(200, 10_000), size=14, standardise=True)
    batches = task.train.batches(64, seed=trial.seed)
    epochs = trial.scale(smoke=(1, 1), laptop=(6, 3))
    biper = {f"biper{int(w)}": partial(BiPerConv2d, frequency=w, bias=False) for w in (5.0, 50.0)}
    kinds: dict[str, Conv] = {
        "biper": partial(BiPerConv2d, bias=False), **biper, "biper_a32": partial(BiPerConv2d, bias=False, activations=None),
        "ste": partial(SignConv2d, bias=False), "bireal": partial(SignConv2d, bias=False, surrogate="polynomial"),
        "tanh": partial(SignConv2d, bias=False, surrogate="tanh"), "real": partial(nn.Conv2d, bias=False),
    }  # fmt: skip
    for arm in trial.arms(*kinds):
        model = network(kinds[arm.name], trial.scale(smoke=4, laptop=16), task.classes)
        with torch.no_grad():  # a layer starts with spread 1 / frequency; here all start with 1 / 20
            for m in model.modules():
                if isinstance(m, BiPerConv2d):
                    m.weight.mul_(m.frequency / 20)
        kind = "biper" if arm.name.startswith("biper") else arm.name
        watch = Signs(model, anneal=sum(epochs) if kind == "tanh" else None)
        for stage, part in enumerate(epochs if kind == "biper" else (sum(epochs),), start=1):
            if kind == "biper":
                set_stage(model, stage)
            train(model, batches, epochs=part, rate=rates[kind], tau=TAU[stage - 1], seed=trial.seed + 1000 * stage, watch=watch)
        arm.log(acc=accuracy(model, task))
        if kind == "real":
            arm.log(packed_acc=accuracy(model, task), packed_share=1.0)
            continue
        layers = [m for m in model.modules() if isinstance(m, (BiPerConv2d, SignConv2d))]
        packed = pack_binary(model)
        arm.log(
            packed_acc=accuracy(packed, task),
            flips=watch.flips,
            packed_share=sum(stored_bytes(m) for m in packed.modules() if isinstance(m, PackedConv2d))
            / sum(4 * m.weight.numel() for m in layers),
        )
        if kind == "biper":
            arm.log(errors=[biper_error(m.weight, m.frequency) for m in layers])

    for arm in trial.arms("error"):
        n = trial.scale(smoke=50_000, laptop=2_000_000)
        half = torch.rand(2, n, generator=trial.generator(), dtype=torch.float64)
        w = 0.05 * (half[0].log() - half[1].log())  # Laplace, scale 0.05
        x = torch.logspace(0, 3, 25).tolist()
        measured, closed = [biper_error(w, f) for f in x], [laplace_error(f, 0.05) for f in x]
        arm.log(apart=max(abs(m - c) / c for m, c in zip(measured, closed, strict=True)), peak=max(measured), last=measured[-1])
        arm.curve("measured", x=[0.05 * f for f in x], y=measured)
        arm.curve("closed", x=[0.05 * f for f in x], y=closed)


def train(model: nn.Module, batches: object, *, epochs: int, rate: float, tau: float, seed: int, watch: Signs) -> None:
    """Adam with one cycle: binary (or real 3 x 3) weights at `rate` times their spread, everything else at 5e-3."""
    convs = [m.conv for m in model.modules() if isinstance(m, Block)]
    fast = {id(c.weight): rate * watch.spread[id(c)] for c in convs}
    groups = [{"params": [c.weight], "lr": fast[id(c.weight)]} for c in convs]
    groups.append({"params": [p for p in model.parameters() if id(p) not in fast], "lr": 5e-3})
    periodic = any(isinstance(c, BiPerConv2d) for c in convs)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(output, y)
        return value + biper_penalty(model, tau) if periodic else value

    learner = Backprop(
        loss=loss, optimizer=Adam, groups=lambda _: groups,
        schedule=lambda o: OneCycleLR(o, [g["lr"] for g in groups], total_steps=epochs * len(batches)),  # type: ignore[arg-type]
    )  # fmt: skip
    learner.fit(model, batches, epochs=epochs, seed=seed, callbacks=[watch])  # type: ignore[arg-type]


class Signs:
    """Callback: the share of the binary weights that change their sign in an epoch; raises the sharpness of tanh from 0.1 to 10."""

    def __init__(self, model: nn.Module, anneal: int | None) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, (BiPerConv2d, SignConv2d))]
        self.spread = {id(m.conv): float(m.conv.weight.detach().std()) for m in model.modules() if isinstance(m, Block)}
        self.before, self.flips, self.anneal = self._signs(), list[float](), anneal
        if anneal:
            set_sharpness(model, 0.1)

    def _signs(self) -> Tensor:
        return torch.cat([m.bits().flatten() for m in self.layers]) if self.layers else torch.zeros(1)

    def __call__(self, progress: Progress) -> None:
        signs = self._signs()
        self.flips.append(float((signs != self.before).float().mean()))
        self.before = signs
        if self.anneal:
            set_sharpness(progress.model, 10 ** (2 * (progress.epoch + 1) / max(self.anneal - 1, 1) - 1))


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(11, 3.7)
    error, flips, acc = fig.subplots(1, 3)
    error.semilogx(*record.curves("error", "closed")[0], color="black", linewidth=1, label="closed form, Laplace weights")
    error.semilogx(*record.curves("error", "measured")[0], "o", color="#0072B2", markersize=4, label="measured")
    error.axhline(0.5 - 4 / torch.pi**2, color="#999999", linestyle=":", linewidth=0.8)
    error.set(xlabel="frequency x scale of the weights", ylabel="quantisation error of sign(sin)", title="The frequency sets the error")
    error.legend(fontsize=8)
    styles = {
        "biper": ("BiPer", "#0072B2"), "ste": ("sign, STE", "#999999"), "bireal": ("sign, Bi-Real", "#E69F00"),
        "tanh": ("sign, tanh", "#009E73"),
    }  # fmt: skip
    for arm, (label, colour) in styles.items():
        v = 100 * record.values(arm, "flips").mean(0)
        flips.plot(range(1, len(v) + 1), v, marker="o", markersize=3, color=colour, label=label)
    flips.axvline(6.5, color="#0072B2", linestyle=":", linewidth=0.8)
    flips.set(xlabel="epoch (BiPer: stage 2 from the dotted line)", ylabel="weights that change sign (%)", title="How signs settle")
    flips.legend(fontsize=8)
    names = {
        "real": "real", "biper_a32": "BiPer, real activations", "biper": "BiPer, 20", "biper5": "BiPer, 5", "biper50": "BiPer, 50",
        "ste": "sign, STE", "bireal": "sign, Bi-Real", "tanh": "sign, tanh",
    }  # fmt: skip
    for i, arm in enumerate(names):
        v = 100 * (1 - record.values(arm, "acc"))
        colour = "#0072B2" if arm.startswith("biper") else "#000000" if arm == "real" else "#999999"
        acc.barh(i, v.mean(), xerr=v.std(ddof=1) if len(v) > 1 else 0, color=colour, capsize=3)
    acc.set_yticks(range(len(names)), list(names.values()), fontsize=8)
    acc.invert_yaxis()
    acc.set(xlabel="test error (%)", title="MNIST, 3,000 images")
