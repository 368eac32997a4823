"""One small residual backbone whose 3x3 convolutions are made by one of several recipes, as wide as a budget of parameters allows."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.hypercomplex import hypercomplex
from neurarium.nn.kernel_layer import KernelConv2d
from neurarium.nn.replace import Rule, replace_layers
from neurarium.nn.wavemix import wave_mixing

if TYPE_CHECKING:
    from neurarium.lab import Trial

#: recipe -> the number that divides its widths, the peak learning rate (the best of 3e-3, 1e-2, 3e-2 on another seed), its name in figures
RECIPES = {
    "dense": (1, 3e-2, "dense"),
    "ph2": (2, 3e-2, "hypercomplex, n = 2"),
    "ph3": (3, 3e-2, "hypercomplex, n = 3"),
    "ph4": (4, 3e-2, "hypercomplex, n = 4"),
    "ph8": (8, 3e-2, "hypercomplex, n = 8"),
    "wave": (4, 3e-2, "wave blocks"),
    "low_rank": (1, 3e-2, "low rank"),
    "grouped": (4, 3e-2, "grouped"),
    "kernel": (1, 3e-2, "depthwise + kernel 1x1"),
}
#: how many images to train and to test on, at the scales smoke and laptop
IMAGES = {"train": (128, 3000), "test": (200, 3000)}
COLOURS = {
    "dense": "#000000", "ph2": "#9ecae1", "ph3": "#6baed6", "ph4": "#3182bd", "ph8": "#08519c",
    "wave": "#009E73", "low_rank": "#999999", "grouped": "#E69F00", "kernel": "#CC79A7",
}  # fmt: skip
BLOCKS = 3


class Backbone(nn.Module):
    """Stem of stride 2, residual blocks of two 3x3 convolutions, pooling, classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(BLOCKS)])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


def rule(recipe: str) -> Rule | None:
    """What takes the place of a 3x3 convolution. Low rank: a quarter of the channels; kernel: depthwise, then a 1x1 kernel layer, half."""
    if recipe == "dense":
        return None
    if recipe.startswith("ph"):
        return hypercomplex(int(recipe[2:]))
    if recipe == "wave":
        return wave_mixing(levels=1, upsample="bilinear")
    return Rule(nn.Conv2d, {"low_rank": low_rank, "grouped": grouped, "kernel": kernel}[recipe])


def low_rank(old: nn.Module) -> nn.Module:
    rank = max(1, old.out_channels // 4)
    return nn.Sequential(nn.Conv2d(old.in_channels, rank, 3, padding=1, bias=False), nn.Conv2d(rank, old.out_channels, 1, bias=False))


def grouped(old: nn.Module) -> nn.Module:
    return nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False, groups=4)


def kernel(old: nn.Module) -> nn.Module:
    channels, out = old.in_channels, old.out_channels
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=channels)
    return nn.Sequential(depthwise, KernelConv2d(channels, out, 1, "relu", max(1, channels // 2)))


def build(recipe: str, channels: int) -> nn.Module:
    model, change = Backbone(channels), rule(recipe)
    return model if change is None else replace_layers(model, change, keep=["stem", "head"])


@cache
def width(recipe: str, budget: int) -> int:
    """The widest backbone of the recipe with at most ``budget`` trainable parameters."""
    step = RECIPES[recipe][0]
    channels = step
    with torch.random.fork_rng(devices=[]):
        while meter.parameters(build(recipe, channels + step)) <= budget:
            channels += step
    return channels


def fitted(recipe: str, channels: int, task: data.ImageTask, trial: Trial, epochs: int, lr: float | None = None) -> tuple[nn.Module, float]:
    """A backbone, trained, and its test accuracy."""
    model = build(recipe, channels).to(trial.device, memory_format=torch.channels_last)
    batches = task.train.to(trial.device).batches(64, seed=trial.seed, drop_last=True)
    lr = RECIPES[recipe][1] if lr is None else lr
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(batches))
    Backprop(optimizer=partial(AdamW, lr=lr, weight_decay=0.01), schedule=schedule).fit(model, batches, epochs=epochs, seed=trial.seed)
    return model, evaluate(model, task.test.to(trial.device).batches(500, shuffle=False))["accuracy"]
