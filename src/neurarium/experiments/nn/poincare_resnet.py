"""Poincaré ResNet: do norms survive depth, what do the closed-form mean and the exact gradients save, and does the network train?

``deep_*``: 40 stacked hyperbolic layers of width 16 on points between 0.1 and 0.9 of the radius; ``conv_*`` the same with 3x3 convolutions
on 8 channels. ``bn_*``: batch normalisation of 4,096 points of dimension 16, forward and backward, in seconds of CPU time, measured in
turns. ``exact`` and ``plain``: one residual block under hand-written and under plain backward passes. The nets are residual networks of
depth 8 on MNIST at 14x14, all trained alike for one epoch; ``euclidean`` is the same net in flat space. Outliers for the detection score
(the largest logit) are Baybayin characters, inverted to light ink on dark ground, and uniform noise.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.errors import MissingData
from neurarium.experiments.images import images
from neurarium.nn.hyperbolic import PBatchNorm, PConv2d, PLinear, PoincareBall, PoincareBlock, PoincareResNet, frechet_mean

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

DEPTH, WIDTH = 40, 16
CHANNELS, BATCH, RATE = (8, 16, 32), 32, 1e-2
NETS = {
    "identity": {"init": "identity"},
    "normal": {"init": "normal"},
    "frechet": {"init": "identity", "center": "frechet"},
    "euclidean": None,
}


def run(trial: Trial) -> None:
    for arm in trial.arms("deep_identity", "deep_normal", "conv_identity", "conv_centre", "conv_normal"):
        kind, _, init = arm.name.partition("_")
        heights = norms_by_depth(init, kind == "conv", trial)
        arm.log(log_norm_ratio=abs(heights[-1]))
        arm.curve("log_norm_ratio", x=list(range(len(heights))), y=heights)

    batch_norms(trial)

    for arm in trial.arms("exact", "plain"):
        ball = PoincareBall(0.1, exact=arm.name == "exact").to(trial.device)
        block, x = PoincareBlock(8, 8, ball).to(trial.device), torch.rand(16, 8, 14, 14, device=trial.device, requires_grad=True)
        arm.log(saved_bytes=meter.saved_bytes(block, x), nodes=graph_nodes(block(x)))
        layers = {"ours": PLinear(512, 512, ball).to(trial.device), "flat": nn.Linear(512, 512).to(trial.device)}
        point = ball.expmap0(0.5 * torch.randn(256, 512, device=trial.device))
        times = cpu_seconds({name: training_step(layer, point) for name, layer in layers.items()}, trial.scale(smoke=2, laptop=15))
        arm.log_timed(linear_seconds_ratio=times["ours"] / times["flat"])

    for arm in trial.arms(*NETS):
        task = trial.shared("images", lambda: images(trial, train=(64, 2048), test=(100, 1000)))
        options = NETS[arm.name]
        model = euclidean_twin() if options is None else PoincareResNet(CHANNELS, 8, 10, 0.1, in_channels=1, **options)
        model = model.to(trial.device)
        with arm.timed("fit_seconds"):
            losses = train(model, task, trial)
        arm.curve("loss", y=losses)
        model.eval()
        with torch.no_grad():
            inside = model(task.test.x.to(trial.device))
            arm.log(accuracy=(inside.argmax(1).cpu() == task.test.y).float().mean().item(), params=meter.parameters(model))
            for name, x in trial.shared("outliers", lambda: outliers(trial)).items():
                arm.log(**{f"auroc_{name}": auroc(inside.amax(1), model(x.to(trial.device)).amax(1))})


def norms_by_depth(init: str, conv: bool, trial: Trial) -> list[float]:
    """Mean log10 of the norms' ratio to the input's, after every layer."""
    ball = PoincareBall(1.0).to(trial.device)
    draw = trial.generator()
    with torch.no_grad():
        if conv:
            direction = torch.randn(16, 8, 10, 10, generator=draw, device=trial.device)
            x = functional.normalize(direction, dim=1) * (0.1 + 0.8 * torch.rand(16, 1, 10, 10, generator=draw, device=trial.device))
            layers = [PConv2d(8, 8, 3, ball, padding=1, init=init).to(trial.device) for _ in range(DEPTH)]
        else:
            direction = torch.randn(256, WIDTH, generator=draw, device=trial.device)
            x = functional.normalize(direction, dim=1) * (0.1 + 0.8 * torch.rand(256, 1, generator=draw, device=trial.device))
            layers = [PLinear(WIDTH, WIDTH, ball, init=init).to(trial.device) for _ in range(DEPTH)]
        start, heights = x.norm(dim=1), [0.0]
        for layer in layers:
            x = layer(x)
            heights.append((x.norm(dim=1).clamp_min(1e-38) / start).log10().mean().item())
    return heights


def batch_norms(trial: Trial) -> None:
    """Both centres on the same points, measured in turns so that the machine's load falls on both alike."""

    def measure() -> dict[str, float]:
        ball = PoincareBall(0.1)
        x = ball.expmap0(0.7 * torch.randn(trial.scale(smoke=256, laptop=4096), 16) + 0.3).to(trial.device)
        norms = {center: PBatchNorm(16, ball, center=center).to(trial.device) for center in ("midpoint", "frechet")}
        return cpu_seconds({name: training_step(norm, x) for name, norm in norms.items()}, trial.scale(smoke=2, laptop=15))

    for arm in trial.arms("bn_midpoint", "bn_frechet"):
        center = arm.name[3:]
        arm.log_timed(bn_seconds=trial.shared("batch_norms", measure)[center])
        if center == "midpoint":
            spreads, gaps = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6], []
            ball = PoincareBall(1.0).to(trial.device)
            for spread in spreads:
                x = ball.expmap0(spread * torch.randn(1024, 16, device=trial.device) / 4 + spread / 8)
                mean = frechet_mean(x, ball)
                gaps.append((ball.dist(ball.midpoint(x), mean) / ball.dist(x, mean).mean()).item())
            arm.log(mean_gap=gaps)
            arm.curve("mean_gap", x=spreads, y=gaps)


def training_step(module: nn.Module, x: Tensor):
    x = x.detach().clone().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)

    def step() -> None:
        module.zero_grad()
        (module(x) * weights).sum().backward()

    return step


def cpu_seconds(steps: dict, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each step, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if i:  # the first round warms up
                spent[name].append(time.process_time() - start)
    return {name: float(np.median(times)) for name, times in spent.items()}


def graph_nodes(out: Tensor) -> int:
    """How many backward functions the graph of ``out`` has."""
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return len(seen)


def outliers(trial: Trial) -> dict[str, Tensor]:
    n = trial.scale(smoke=100, laptop=500)
    found = {"noise": torch.rand(n, 1, 14, 14, generator=trial.generator(), device=trial.device)}
    try:
        found["baybayin"] = 1 - data.baybayin(test=n, size=14, seed=trial.seed).test.x
    except MissingData:
        trial.stand_in("mirrored digits instead of Baybayin characters, which are not here")
        found["baybayin"] = images(trial, train=(64, 2048), test=(100, 1000)).test.x.flip(3)[:n]
    return found


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The chance that an inlier scores above an outlier."""
    gap = inside[:, None] - outside[None]
    return ((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean()).item()


def train(model: nn.Module, task: data.ImageTask, trial: Trial) -> list[float]:
    batches = task.train.to(trial.device).batches(BATCH, seed=trial.seed, drop_last=True)
    optimizer = Adam(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, max_lr=RATE, total_steps=len(batches))
    losses = []
    for x, y in batches:
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def euclidean_twin() -> nn.Module:
    """The same stem, blocks, pooling and classifier in flat space."""
    first, inner, blocks = CHANNELS[0], CHANNELS[0], []
    for stage, width in enumerate(CHANNELS):
        blocks.append(FlatBlock(inner, width, 2 if stage else 1))
        inner = width
    stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


class FlatBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        )
        self.shortcut = nn.Identity() if inner == out and stride == 1 else nn.Conv2d(inner, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Norm by depth, the two means, what a block keeps, and the nets."""
    fig.set_size_inches(11, 7.5)
    fig.set_layout_engine("constrained")
    (depth, means), (cost, nets) = fig.subplots(2, 2)
    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#777777"
    lines = {
        "deep_identity": ("linear, identity", blue, "-"), "deep_normal": ("linear, normal", orange, "-"),
        "conv_centre": ("3x3, centre tap", blue, "--"), "conv_identity": ("3x3, identity as published", green, "--"),
        "conv_normal": ("3x3, normal", orange, "--"),
    }  # fmt: skip
    for arm, (label, colour, style) in lines.items():
        x, y = record.curves(arm, "log_norm_ratio")[0]
        depth.plot(x, y, style, color=colour, label=label)
    depth.set(xlabel="layers", ylabel="log10 of output norm / input norm", title="Only the identity keeps points where they are")
    depth.set_ylim(-30, 2)
    depth.legend(fontsize=8)

    for x, y in record.curves("bn_midpoint", "mean_gap"):
        means.loglog(x, np.maximum(y, 1e-9), "o-", color=blue, alpha=0.6)
    fast, slow = record.mean("bn_midpoint", "bn_seconds"), record.mean("bn_frechet", "bn_seconds")
    means.set(xlabel="spread of the points", ylabel="distance of the means / spread",
              title=f"Midpoint against Fréchet mean: {1e3 * fast:.0f}, {1e3 * slow:.0f} ms")  # fmt: skip

    measures = {"saved_bytes": "kept for backward", "nodes": "graph nodes"}
    for i, metric in enumerate(measures):
        base = record.mean("plain", metric)
        cost.bar(i - 0.2, 1, 0.4, color=grey, label="plain autograd" if i == 0 else None)
        cost.bar(i + 0.2, record.mean("exact", metric) / base, 0.4, color=blue, label="hand-written" if i == 0 else None)
        unit = f"{base / 2**20:.1f} MiB" if metric == "saved_bytes" else f"{base:.0f}"
        cost.annotate(unit, (i - 0.2, 1.01), ha="center", fontsize=8)
    cost.set_xticks([0, 1], list(measures.values()))
    cost.set(ylabel="share of plain autograd", title="One residual block, 16 images", ylim=(0, 1.12))
    cost.legend(fontsize=8)

    metrics = {"accuracy": "test accuracy", "auroc_baybayin": "AUROC Baybayin", "auroc_noise": "AUROC noise"}
    arms = {"identity": blue, "frechet": green, "normal": orange, "euclidean": grey}
    for j, (arm, colour) in enumerate(arms.items()):
        for i, metric in enumerate(metrics):
            values = 100 * record.values(arm, metric)
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            nets.bar(i + 0.2 * (j - 1.5), values.mean(), 0.2, yerr=spread, color=colour, capsize=2, label=arm if i == 0 else None)
    nets.set_xticks(range(3), list(metrics.values()))
    nets.set(ylabel="%", ylim=(0, 104), title="MNIST 14x14, one epoch, depth 8")
    nets.legend(fontsize=8, ncols=2, loc="lower left")
