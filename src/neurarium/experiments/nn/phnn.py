"""Hypercomplex residual networks on CIFAR-10, at equal width and at equal parameters; and can the layer find Hamilton's product?

Every classifier is one small ResNet (stem of stride 2, three basic blocks, global pooling, real classifier), trained by the same
one-cycle SGD on the same flipped images. Arms of the same width (12, 24, 48) as ``real``: ``ph2``, ``ph3``, ``ph4``, ``quaternion``,
``frozen_random_a`` (a random rule that is not learned: does learning it matter?). Arms of ph4's parameters: ``real_narrow`` and
``grouped`` (grouped convolutions behind a real stem). ``ph4_wide`` has the parameters of ``real``. Wherever parameters are called equal,
the hypercomplex arm has no more of them than its real rival. n = 2 and 4 get zero channels in front of RGB.

The ``recover_*`` arms fit the input-output pairs of one random quaternion convolution, without noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.errors import BadInput
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.hypercomplex import PHConv2d, QuaternionConv2d, algebra, decay_groups, hypercomplex
from neurarium.nn.replace import Rule, replace_layers

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

BATCH = 64
WIDTHS = (12, 24, 48)
CLASSIFIERS = ("real", "ph2", "ph3", "ph4", "quaternion", "frozen_random_a", "real_narrow", "grouped", "ph4_wide")
RECOVERIES = ("recover_real", "recover_ph2", "recover_ph4", "recover_grouped")


def run(trial: Trial) -> None:
    size = trial.scale(smoke=(128, 128), laptop=(5000, 4000))
    epochs = trial.scale(smoke=1, laptop=5)
    for arm in trial.arms(*CLASSIFIERS):
        task = trial.shared("images", lambda: data.images("cifar10", train=size[0], test=size[1], seed=trial.seed))
        model = classifier(arm.name).to(trial.device, memory_format=torch.channels_last)
        batches = Flipped(task.train, seed=trial.seed)
        learner = Backprop(
            optimizer=partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
            schedule=partial(OneCycleLR, max_lr=0.1, total_steps=epochs * len(batches)),
            groups=partial(decay_groups, weight_decay=5e-4),
        )
        with arm.timed("fit_seconds"):
            history = learner.fit(model, batches, epochs=epochs, seed=trial.seed)
        result = evaluate(model, task.test.to(trial.device).batches(250, shuffle=False))
        arm.log(
            accuracy=result["accuracy"],
            loss=result["loss"],
            params=meter.parameters(model),
            conv_params=sum(meter.parameters(m) for m in model.modules() if isinstance(m, (nn.Conv2d, PHConv2d))),
            bytes=meter.stored_bytes(model),
            flops=meter.flops(model.eval(), task.test.x[:1].to(trial.device)),
        )
        arm.curve("train_loss", y=[epoch["loss"] for epoch in history.train])
        if arm.name in ("ph3", "ph4"):
            arm.grid("algebra", torch.cat(list(model.blocks[2].second.A.detach().cpu()), 1))

    for arm in trial.arms(*RECOVERIES):
        student, curve = recover(arm.name, trial, steps=trial.scale(smoke=30, laptop=1500))
        arm.log(relative_mse=curve[-1], params=meter.parameters(student))
        arm.curve("relative_mse", y=curve)
        if arm.name == "recover_ph4":
            arm.log(algebra_distance=subspace_distance(student.A.detach().cpu(), algebra("quaternion")))


class ResNet(nn.Sequential):
    """Stem, three basic blocks, pooling, classifier."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.norm = Normalise()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.Sequential(*[Block(i, o, s) for i, o, s in zip((widths[0], *widths), widths, (1, 2, 2))])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[2], 10)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight)  # the scale of the hypercomplex layers


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, out, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = stride == 1 and inner == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.first(x)))
        return functional.relu(self.norm2(self.second(y)) + self.shortcut(x))


class Normalise(nn.Module):
    """Pixels in [0, 1] to about zero mean and unit deviation, laid out channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return ((x - 0.47) / 0.25).contiguous(memory_format=torch.channels_last)


class Flipped:
    """Shuffled training batches, each image mirrored with probability one half; pass i depends on the seed and i alone."""

    def __init__(self, train: data.TensorData, seed: int) -> None:
        self.batches, self.seed, self.epoch = train.batches(BATCH, seed=seed, drop_last=True), seed, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        coin = torch.Generator().manual_seed(10_007 * self.seed + self.epoch)
        self.epoch += 1
        for x, y in self.batches:
            flip = torch.rand(len(x), 1, 1, 1, generator=coin) < 0.5
            yield torch.where(flip.to(x.device), x.flip(3), x), y


def classifier(arm: str) -> nn.Module:
    """The network of one arm: a real ResNet, its convolutions replaced by the arm's rule."""
    widths = {"real_narrow": (6, 13, 25), "ph4_wide": (24, 48, 92)}.get(arm, WIDTHS)
    rules = {
        "ph2": lambda: hypercomplex(2),
        "ph3": lambda: hypercomplex(3),
        "ph4": lambda: hypercomplex(4),
        "ph4_wide": lambda: hypercomplex(4),
        "quaternion": lambda: hypercomplex(4, algebra="quaternion"),
        "frozen_random_a": lambda: hypercomplex(4, algebra=torch.randn(4, 4, 4) / 2),
        "grouped": lambda: Rule(nn.Conv2d, grouped, build_first=stays_real),
    }
    net = ResNet(widths)
    return replace_layers(net, rules[arm](), keep=["head"]) if arm in rules else net


def grouped(old: nn.Module) -> nn.Module:
    new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, groups=4, bias=False)
    nn.init.kaiming_normal_(new.weight)
    return new


def stays_real(old: nn.Module) -> nn.Module:
    raise BadInput("the stem reads three channels, which four groups cannot share")


def recover(arm: str, trial: Trial, steps: int) -> tuple[nn.Module, list[float]]:
    """A student trained on a random quaternion convolution 8 -> 8, and its error on fresh inputs relative to the output's power."""
    teacher = trial.shared("teacher", lambda: QuaternionConv2d(8, 8, 3, bias=False)).to(trial.device)
    student = {
        "recover_real": lambda: nn.Conv2d(8, 8, 3, bias=False),
        "recover_ph2": lambda: PHConv2d(8, 8, 3, 2, bias=False),
        "recover_ph4": lambda: PHConv2d(8, 8, 3, 4, bias=False),
        "recover_grouped": lambda: nn.Conv2d(8, 8, 3, groups=4, bias=False),
    }[arm]().to(trial.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    draw = trial.generator()
    test = torch.randn(256, 8, 8, 8, generator=draw, device=trial.device)
    errors = []
    for step in range(steps):
        x = torch.randn(32, 8, 6, 6, generator=draw, device=trial.device)
        loss = functional.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                target = teacher(test)
                errors.append(((student(test) - target).square().mean() / target.square().mean()).item())
    return student, errors


def subspace_distance(a: Tensor, b: Tensor) -> float:
    """Sine of the largest angle between the spaces that the matrices A_1..A_n and B_1..B_n span: rules are equal up to that basis."""
    qa, qb = (torch.linalg.qr(m.flatten(1).double().T)[0] for m in (a, b))
    return torch.linalg.matrix_norm(qa @ qa.T - qb @ qb.T, 2).item()


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Accuracy against parameters, recovery of Hamilton's product, and what a learned algebra looks like."""
    fig.set_size_inches(11, 7)
    grid = fig.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(3, 2))
    axis = fig.add_subplot(grid[0, 0])
    names = {"real": "real", "real_narrow": "real, narrow", "ph2": "n = 2", "ph3": "n = 3", "ph4": "n = 4", "ph4_wide": "n = 4, wide",
             "quaternion": "quaternion", "frozen_random_a": "random rule", "grouped": "grouped"}  # fmt: skip
    real, ours, fixed = "#000000", "#0072B2", "#E69F00"
    centre = {}
    for arm in names:
        accuracy, params = 100 * record.values(arm, "accuracy"), record.mean(arm, "params")
        centre[arm] = params, float(np.nanmean(accuracy))
        colour, mark = (ours, "o") if arm.startswith("ph") else (real, "s") if arm.startswith("real") else (fixed, "^")
        spread = float(np.nanstd(accuracy, ddof=1)) if len(accuracy) > 1 else 0.0
        axis.errorbar(*centre[arm], yerr=spread, fmt=mark, color=colour, capsize=3, markersize=8)
        place = {"xytext": (-7, 3), "ha": "right"} if colour == fixed else {"xytext": (7, 5)}
        axis.annotate(names[arm], centre[arm], textcoords="offset points", fontsize=8, color=colour, **place)
    for a, b in (("real_narrow", "ph4"), ("real", "ph4_wide")):
        axis.annotate("", centre[b], centre[a], arrowprops={"arrowstyle": "->", "color": ours, "alpha": 0.6, "shrinkA": 6, "shrinkB": 6})
    axis.set(xscale="log", xlabel="parameters", ylabel="test accuracy (%)", title="What a parameter buys (arrows: equal parameters)")
    axis.set_xlim(7.5e3, 7.5e4)
    axis.margins(y=0.12)

    axis = fig.add_subplot(grid[0, 1])
    labels = {"recover_real": "real (576)", "recover_ph2": "n = 2 (296)", "recover_ph4": "n = 4 (208)", "recover_grouped": "grouped (144)"}
    for arm, colour, style in zip(labels, (real, "#56B4E9", ours, fixed), ("-", "--", "-", ":")):
        curves = record.curves(arm, "relative_mse")
        steps = 50 * np.asarray(curves[0][0], float)
        axis.semilogy(steps, np.exp(np.mean([np.log(np.maximum(y, 1e-16)) for _, y in curves], 0)), style, color=colour, label=labels[arm])
    axis.set(xlabel="Adam steps", ylabel="relative squared error", title="Learning a quaternion convolution (parameters)")
    axis.legend(fontsize=8)

    for column, arm in enumerate(("ph4", "ph3")):
        axis = fig.add_subplot(grid[1, column])
        picture = record.grids(arm, "algebra")[0]
        n, limit = len(picture), float(np.abs(picture).max())
        image = axis.imshow(picture, cmap="PuOr", vmin=-limit, vmax=limit)
        for i in range(1, n):
            axis.axvline(i * n - 0.5, color="black", linewidth=1)
        axis.set(xticks=[(i + 0.5) * n - 0.5 for i in range(n)], xticklabels=[f"$A_{i + 1}$" for i in range(n)], yticks=[])
        axis.set_title(f"Learned algebra of the last convolution, n = {n}", fontsize=9)
        fig.colorbar(image, ax=axis, fraction=0.025)
