"""Does the best learning rate stay where it is while residual blocks are added, and do the new blocks do something of their own?

MNIST at 14x14, 48 wide residual networks with one linear layer a block and mean subtraction, Adam, all learning rates of one depth
trained in one vectorised loop. Losses are training losses, mean of the last 15 steps; a loss that ends above 4 counts as infinite.

``depth_mup``: branches times 1/sqrt(L), learning rate of the blocks times 1/sqrt(L), ReLU. ``depth_mup_abs``: with the absolute value.
``ode``: branches times 1/L, rate unchanged. ``standard``: neither. ``unscaled``: branches times 1/sqrt(L), rate unchanged, the ablation.
``two_layers``: depth-muP with blocks of two layers, for which the theory says that it does not transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from neurarium import data
from neurarium.experiments.images import first_batches, images
from neurarium.learn.depth import MeanSubtraction, depth_mup_, feature_diversity
from neurarium.learn.parametrize import infer_shapes, mup_groups
from neurarium.learn.sweep import best_rate, sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

WIDTH, BATCH, LAST, DEPTHS, TWO = 48, 128, 15, (4, 8, 64), (8, 32)
RATES = tuple(2.0**k for k in range(-11, -3))
EXPONENTS = {  # of the branch and of the learning rate
    "depth_mup": (0.5, 0.5), "depth_mup_abs": (0.5, 0.5), "ode": (1.0, 0.0), "standard": (0.0, 0.0), "unscaled": (0.5, 0.0),
    "two_layers": (0.5, 0.5),
}  # fmt: skip
LABELS = {
    "depth_mup": "depth-muP, ReLU", "depth_mup_abs": "depth-muP, |x|", "ode": "ODE scaling", "standard": "standard",
    "unscaled": "rate not scaled", "two_layers": "two-layer blocks",
}  # fmt: skip


def run(trial: Trial) -> None:
    train = flat(images(trial, train=(600, 4000)), trial)
    steps = trial.scale(smoke=3, laptop=60)
    for arm in trial.arms(*EXPONENTS):
        depths = trial.scale(smoke=(4, 8), laptop=TWO if arm.name == "two_layers" else DEPTHS)
        curves: dict[int, np.ndarray] = {}
        for depth in depths:
            torch.manual_seed(trial.seed)
            model = Residual(WIDTH, depth, arm.name).to(trial.device)
            alpha, gamma = EXPONENTS[arm.name]
            branches = [f"blocks.{i}.branch" for i in range(depth)]
            shapes = depth_mup_(model, infer_shapes(model), branches, block_exponent=alpha, lr_exponent=gamma)
            batches = first_batches(train, BATCH, steps, trial.seed)
            losses, params = sweep([model], lambda m, s=shapes: mup_groups(m, s, 1.0), RATES, batches)
            last = losses[0, :, -LAST:].double().mean(-1).cpu().numpy()
            curves[depth] = np.where(last < 4, last, np.inf)
            arm.curve(f"depth{depth}", x=np.log2(RATES), y=np.minimum(curves[depth], 100.0))
        shallow, middle, deep = curves[depths[0]], curves[depths[-2]], curves[depths[-1]]
        best, copied = int(deep.argmin()), int(middle.argmin())
        arm.log(
            depths=list(curves), drift=drift(middle, deep), best_loss=deep[best], transferred_loss=deep[copied], best_rate=RATES[best],
            regret=deep[copied] / deep[best] if np.isfinite(deep[best]) else float("inf"),
        )  # fmt: skip
        low = max(1, min(int(shallow.argmin()), best))
        arm.log(collapse=float(np.abs(np.log(np.minimum(deep, 100.0) / np.minimum(shallow, 100.0)))[:low].mean()))
        if np.isfinite(deep[best]):
            model.load_state_dict({n: p[0, best] for n, p in params.items()}, strict=False)
            found = feature_diversity(model, train.x[:256], [f"blocks.{i}" for i in range(depths[-1])])
            arm.log(diversity=found.exponent, cosine=found.cosine)
            arm.curve("distance", x=found.lags, y=found.distance)


class Block(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Residual(nn.Module):
    """Linear stem, ``depth`` blocks whose nonlinearity comes last, linear readout; weights of the blocks have variance 2/width."""

    def __init__(self, width: int, depth: int, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(196, width, bias=False)
        self.blocks = nn.Sequential(*(Block(branch(width, kind)) for _ in range(depth)))
        self.head = nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def branch(width: int, kind: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2 if kind == "two_layers" else 1):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=(2 / width) ** 0.5)
        layers += [linear, Absolute() if kind == "depth_mup_abs" else nn.ReLU()]
    return nn.Sequential(*layers, MeanSubtraction())


def drift(narrow: np.ndarray, deep: np.ndarray) -> float:
    """Octaves between the best rates; the width of the grid where every rate of the deep network diverges."""
    if not np.isfinite(deep).any():
        return float(len(RATES) - 1)
    return abs(float(np.log2(best_rate(RATES, deep) / best_rate(RATES, narrow))))


def flat(task: data.ImageTask, trial: Trial) -> data.TensorData:
    """Flat images with mean 0 and deviation 1 over all pixels."""
    x = ((task.train.x - task.train.x.mean()) / task.train.x.std()).flatten(1)
    return data.TensorData(x.to(trial.device), task.train.y.to(trial.device))


def figure(record: RecordView, fig: Figure) -> None:
    """Loss against learning rate, one line a depth, for each scaling; how far features move along the depth."""
    import matplotlib

    fig.set_size_inches(12, 7)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(2, 4)
    names = [a for a in EXPONENTS if a in record.arms]
    own = {a: [int(d) for d in record.mean(a, "depths")] for a in names}
    depths = sorted({d for o in own.values() for d in o})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(depths)))
    for ax, a in zip(axes.flat, names):
        for depth, colour in zip(depths, colours):
            if depth not in own[a]:
                continue
            curves = record.curves(a, f"depth{depth}")
            x, y = curves[0][0], np.array([c[1] for c in curves])
            mean = np.exp(np.log(y).mean(0))
            ax.plot(x, mean, "o-", ms=3, color=colour, label=f"{depth} blocks")
            ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
            if mean.min() < 99:
                ax.plot(x[mean.argmin()], mean.min(), "*", ms=11, color=colour, mec="black", mew=0.5)
        ax.set(title=f"{LABELS[a]}: drift {record.mean(a, 'drift'):.1f} octaves", ylim=(0.1, 3), yscale="log")
        ax.title.set_fontsize(9)
        ax.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        ax.minorticks_off()
    for ax in axes.flat[: len(names)]:
        ax.set_xlabel("log2 learning rate")
    axes[0, 0].legend(fontsize=8)
    axes.flat[5].legend(fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("training loss (stars: best)")
    distance, loss = axes.flat[6], axes.flat[7]
    palette = dict(zip(EXPONENTS, ("#0072B2", "#56B4E9", "#D55E00", "#000000", "#E69F00", "#009E73")))
    for a in names:
        if record.has(a, "diversity"):
            curves = record.curves(a, "distance")
            x, y = curves[0][0], np.array([c[1] for c in curves])
            distance.plot(x, y.mean(0) / y.mean(0)[-1], "o-", color=palette[a], label=f"{LABELS[a]}: {record.mean(a, 'diversity'):.2f}")
    x = np.asarray(x)
    distance.plot(x, (x / x[-1]) ** 0.5, ":", color="grey", lw=1)
    distance.plot(x, x / x[-1], ":", color="grey", lw=1)
    distance.set(xscale="log", yscale="log", xlabel="lag, share of the depth", title="distance of features")
    distance.set_xticks(x, [f"1/{round(1 / v)}" for v in x])
    distance.set_yticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
    distance.minorticks_off()
    distance.legend(fontsize=6, title="diversity exponent (dots: 1/2 and 0)", title_fontsize=7)
    for a in names:
        y = [np.mean([c[1].min() for c in record.curves(a, f"depth{d}")]) for d in own[a]]
        loss.plot(own[a], np.minimum(y, 3), "o-", color=palette[a], label=LABELS[a])
    loss.set(xscale="log", yscale="log", xlabel="blocks", title="loss at the best rate")
    loss.set_xticks(depths, [str(d) for d in depths])
    loss.minorticks_off()
    loss.legend(fontsize=6)
