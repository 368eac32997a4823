"""WaveMix with 3,566 parameters on small MNIST, against convolutions and an MLP-mixer, and what the wavelets themselves are good for.

``wavemix`` is the published network of 8 channels and 10 blocks. At its parameters: ``cnn`` (residual depthwise-separable net at full
resolution) and ``mixer`` (patches of 2x2). At its FLOPs: ``cnn_flops``. What the transform does: ``no_dwt`` keeps the averages and drops
the details, ``random_orthonormal`` turns every 2x2 patch by one fixed random rotation instead of Haar's. ``wavemix3`` has three levels (16
channels, 2 blocks) and shows how far one block sees.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import meter
from neurarium.experiments.images import images
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.wavemix import WaveMix, WaveMixLite

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

#: the best peak learning rate of 1e-2, 2e-2, 4e-2 on another seed than those that are judged
ARMS = {"wavemix": 4e-2, "cnn": 4e-2, "cnn_flops": 4e-2, "mixer": 4e-2, "no_dwt": 4e-2, "random_orthonormal": 4e-2, "wavemix3": 4e-2}
BATCH, DEPTHS = 64, (1, 2, 4)


def run(trial: Trial) -> None:
    epochs = trial.scale(smoke=1, laptop=4)
    for arm in trial.arms(*ARMS):
        task = trial.shared("images", lambda: images(trial, train=(128, 5000), test=(300, 4000)))
        model = network(arm.name).to(trial.device, memory_format=torch.channels_last)
        batches = task.train.to(trial.device).batches(BATCH, seed=trial.seed, drop_last=True)
        schedule = partial(OneCycleLR, max_lr=ARMS[arm.name], total_steps=epochs * len(batches))
        learner = Backprop(optimizer=partial(AdamW, lr=ARMS[arm.name], weight_decay=0.01), schedule=schedule)
        with arm.timed("fit_seconds"):
            history = learner.fit(model, batches, epochs=epochs, seed=trial.seed)
        x = next(iter(batches))[0]
        found = evaluate(model, task.test.to(trial.device).batches(500, shuffle=False))
        arm.log(
            accuracy=found["accuracy"],
            loss=found["loss"],
            params=meter.parameters(model),
            flops=meter.flops(model.eval(), x[:1]),
            saved_bytes=meter.saved_bytes(model.train(), x),
        )
        arm.curve("train_loss", y=[epoch["loss"] for epoch in history.train])
        if arm.name != "mixer":
            outside, field = receptive_field(model.eval(), trial)
            arm.log(outside=outside)
            arm.grid("field", field)


def network(arm: str) -> nn.Module:
    if arm == "cnn":
        return Separable(16, 7)
    if arm == "cnn_flops":
        return Separable(18, 2)
    if arm == "mixer":
        return Mixer(14, 8, 2)
    if arm == "wavemix3":
        return WaveMix(1, 10, 2, 16, 3, 1, stem="plain", dropout=0.0, upsample="bilinear")
    net = WaveMixLite(1, 10, depth=10, channels=8, dropout=0.0, upsample="bilinear")
    if arm != "wavemix":
        for block in net.blocks:
            block.transform = Averages() if arm == "no_dwt" else Rotation()
    return net


class Averages(nn.Module):
    """Means of 2x2 patches four times over, in the place of four bands."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * F.avg_pool2d(x, 2)).repeat(1, 4, 1, 1)  # the scale of LL


class Rotation(nn.Module):
    """One fixed random orthogonal 4x4 matrix on every 2x2 patch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.linalg.qr(torch.randn(4, 4))[0])

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
        return torch.einsum("ab,bnchw->nachw", self.matrix, pixels).flatten(1, 2)


class Separable(nn.Module):
    """Stem, residual blocks of a depthwise 3x3 and a 1x1 convolution with batch norm and GELU, mean over the places, classifier."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[_SeparableBlock(channels) for _ in range(depth)])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _SeparableBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise, self.norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(self.pointwise(self.depthwise(x))))


class Mixer(nn.Module):
    """MLP-mixer: 2x2 patches, MLPs over the 49 places and over the channels in turn."""

    def __init__(self, channels: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 2, stride=2)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2 * depth + 1)])
        self.places = nn.ModuleList([nn.Sequential(nn.Linear(49, hidden), nn.GELU(), nn.Linear(hidden, 49)) for _ in range(depth)])
        wide = 2 * channels
        self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels)) for _ in range(depth)])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for i, (places, mlp) in enumerate(zip(self.places, self.mlps)):
            x = x + places(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x).mean(1))


def receptive_field(model: nn.Module, trial: Trial) -> tuple[list[float], Tensor]:
    """Of the squared gradient of block k's central output by the pixels, the share outside of 11x11 (k = 1, 2, 4); the map of k = 1."""
    draw = torch.Generator().manual_seed(trial.seed)
    x = torch.rand(16, 1, 32, 32, generator=draw).to(trial.device).requires_grad_()
    shares, first = [], None
    for depth in DEPTHS:
        centre = model.blocks[:depth](model.stem(x))[:, :, 16, 16]
        weights = torch.randn(centre.shape, generator=draw).to(trial.device)
        energy = torch.autograd.grad((centre * weights).sum(), x)[0].square().mean((0, 1))
        first = energy if first is None else first
        outside = energy.clone()
        outside[11:22, 11:22] = 0
        shares.append((outside.sum() / energy.sum()).item())
    return shares, (first / first.max()).clamp(min=1e-6).log10().cpu()


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Accuracy against FLOPs and bytes, and how far one block sees."""
    from matplotlib.patches import Rectangle

    fig.set_size_inches(13, 4)
    names = {"wavemix": "WaveMix", "cnn": "CNN, equal parameters", "cnn_flops": "CNN, equal FLOPs", "mixer": "MLP-mixer",
             "no_dwt": "no details", "random_orthonormal": "random rotation", "wavemix3": "WaveMix, 3 levels"}  # fmt: skip
    ours, other, ablation = "#0072B2", "#000000", "#D55E00"
    colours = {a: ours if a.startswith("wavemix") else ablation if a in ("no_dwt", "random_orthonormal") else other for a in names}
    axes = fig.subplots(1, 4, width_ratios=(3, 3, 2, 2))
    panels = (("flops", 1e6, "million FLOPs an image"), ("saved_bytes", 2**20, "MiB saved for the backward pass, batch 64"))
    for axis, (metric, scale, label) in zip(axes, panels):
        for arm, name in names.items():
            accuracy, x = 100 * record.values(arm, "accuracy"), record.mean(arm, metric) / scale
            spread = float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else 0.0
            axis.errorbar(x, accuracy.mean(), yerr=spread, fmt="o", color=colours[arm], capsize=3)
            left = arm in ("wavemix3", "no_dwt", "cnn") if metric == "flops" else arm == "cnn"  # where a name has room
            axis.annotate(
                name, (x, accuracy.mean()), xytext=(-6 if left else 6, -9 if arm in ("cnn_flops", "wavemix3") else 4),
                textcoords="offset points", ha="right" if left else "left", fontsize=8, color=colours[arm],
            )  # fmt: skip
        axis.set(xlabel=label, ylabel="test accuracy (%)", title="Accuracy and work" if metric == "flops" else "Accuracy and memory")
        axis.margins(x=0.45, y=0.1)
        axis.set_xlim(left=0)
    for axis, arm in zip(axes[2:], ("wavemix3", "cnn")):
        image = axis.imshow(np.asarray(record.grids(arm, "field")[0]), cmap="viridis", vmin=-6, vmax=0)
        axis.add_patch(Rectangle((10.5, 10.5), 11, 11, fill=False, color="white"))
        axis.set(xticks=[], yticks=[], title=f"What one block sees:\n{names[arm]}")
    fig.colorbar(image, ax=list(axes[2:]), fraction=0.03, label="log10 gradient energy")
