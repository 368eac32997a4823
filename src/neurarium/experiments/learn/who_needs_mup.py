"""Who needs muP? Drift of the best learning rate over width and depth, for three parametrisations under four optimizers.

MNIST at 14x14 and residual networks with one linear layer a block and mean subtraction. At the base size (32 wide, 4 blocks) the arms of
one optimizer are the same network with the same rates; they differ in what they do when it becomes 4 times wider, or 8 times deeper.
Adam, SGD with momentum, Muon and ROOT see the same batches; matrices of hidden and input layers are orthogonalised by the last two, the
others get Adam. All rates of one network are trained in one vectorised loop; losses are of training, mean of the last 10 steps.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from neurarium import data
from neurarium.experiments.images import first_batches, images
from neurarium.experiments.learn.depth_mup import BATCH, Residual, flat
from neurarium.learn.depth import with_depth
from neurarium.learn.parametrize import mup_, mup_groups
from neurarium.learn.sweep import best_rate, sweep
from neurarium.learn.widths import infer_shapes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

WIDTH, DEPTH, LAST = 32, 4, 10
SIZES = {"base": (WIDTH, DEPTH), "wide": (4 * WIDTH, DEPTH), "deep": (WIDTH, 8 * DEPTH)}
RULES = {"sp": "standard", "mup": "muP", "depth": "depth-muP"}
FAMILY = {"sgd": "sgd", "adam": "adam", "muon": "muon", "root": "muon"}
RATES = {
    "sgd": tuple(2.0**k for k in range(-10, 1)), "adam": tuple(2.0**k for k in range(-12, -3)),
    "muon": tuple(2.0**k for k in range(-11, -2)), "root": tuple(2.0**k for k in range(-11, -2)),
}  # fmt: skip
NAMES = {"sgd": "SGD with momentum", "adam": "Adam", "muon": "Muon", "root": "ROOT"}


def run(trial: Trial) -> None:
    train = flat(images(trial, train=(600, 4000)), trial)
    steps = trial.scale(smoke=3, laptop=50)
    for arm in trial.arms(*(f"{rule}_{optimizer}" for optimizer in RATES for rule in RULES)):
        rule, optimizer = arm.name.split("_")
        rates = RATES[optimizer] if trial.name == "laptop" else RATES[optimizer][::3]
        curves = {}
        for size in SIZES:  # a network that two rules treat alike is trained once
            wide, deep = rule != "sp" and size == "wide", rule == "depth" and size == "deep"
            name = f"{optimizer}_{size}" + "_mup" * wide + "_depth" * deep
            build = partial(losses, trial, train, size, optimizer, rates, steps, wide=wide, deep=deep)
            curves[size] = np.asarray(trial.shared(name, build))
            arm.curve(size, x=np.log2(rates), y=np.minimum(curves[size], 4.0))
        copied = int(curves["base"].argmin())
        for size, what in (("wide", "width"), ("deep", "depth")):
            arm.log(**{
                f"drift_{what}": drift(rates, curves["base"], curves[size]), f"loss_{size}": min(curves[size].min(), 4.0),
                f"regret_{what}": min(curves[size][copied], 4.0) / min(curves[size].min(), 4.0),
            })  # fmt: skip
        arm.log(base_rate=rates[copied], loss_base=curves["base"].min())


def losses(
    trial: Trial, train: data.TensorData, size: str, optimizer: str, rates: tuple[float, ...], steps: int, *, wide: bool, deep: bool
) -> np.ndarray:
    """Final loss at each rate, of the network of this size, parametrised for its width, its depth, or neither."""
    width, depth = SIZES[size]
    torch.manual_seed(trial.seed)
    model = Residual(width, depth, "relu").to(trial.device)
    exponent = 0.5 if deep else 0.0  # at the base depth a branch has the factor 1/2 in all arms
    shapes = with_depth(
        model, infer_shapes(model, width / WIDTH if wide else 1), [f"blocks.{i}.branch" for i in range(depth)], base_depth=DEPTH,
        block_exponent=exponent, lr_exponent=exponent, multiplier=DEPTH**-0.5,
    )  # fmt: skip
    mup_(model, shapes)
    groups = partial(mup_groups, shapes=shapes, lr=1.0, family=FAMILY[optimizer])
    found, _ = sweep([model], groups, rates, first_batches(train, BATCH, steps, trial.seed), optimizer=optimizer, momentum=0.9)
    last = found[0, :, -LAST:].double().mean(-1).cpu().numpy()
    return np.where(last < 4, last, np.inf)


def drift(rates: tuple[float, ...], base: np.ndarray, grown: np.ndarray) -> float:
    """Octaves between the best rates, at least so many where one is at the grid's edge; the grid's width where all diverge."""
    if not np.isfinite(grown).any():
        return float(np.log2(rates[-1] / rates[0]))
    best = [best_rate(rates, losses) for losses in (base, grown)]
    best = [rates[int(losses.argmin())] if np.isnan(b) else b for b, losses in zip(best, (base, grown))]
    return abs(float(np.log2(best[1] / best[0])))


def figure(record: RecordView, fig: Figure) -> None:
    """Loss against learning rate at three sizes: a row for each parametrisation, a column for each optimizer."""
    fig.set_size_inches(12, 8)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(len(RULES), len(RATES), sharex="col", sharey=True, squeeze=False)
    styles = {"base": ("#000000", "32 wide, 4 blocks"), "wide": ("#0072B2", "128 wide"), "deep": ("#D55E00", "32 blocks")}
    for i, rule in enumerate(RULES):
        for j, optimizer in enumerate(RATES):
            ax, arm = axes[i, j], f"{rule}_{optimizer}"
            if arm not in record.arms:
                continue
            for size, (colour, label) in styles.items():
                curves = record.curves(arm, size)
                x, y = curves[0][0], np.array([c[1] for c in curves])
                mean = y.mean(0)
                ax.plot(x, mean, "o-", ms=3, color=colour, label=label)
                ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
                ax.plot(x[mean.argmin()], mean.min(), "*", ms=11, color=colour, mec="black", mew=0.5)
            wide, deep = record.mean(arm, "drift_width"), record.mean(arm, "drift_depth")
            ax.set_title(f"{NAMES[optimizer]}\n" * (i == 0) + f"drift: width {wide:.1f}, depth {deep:.1f} octaves", fontsize=9)
            ax.set(yscale="log", ylim=(0.2, 4.2))
            ax.set_yticks([0.2, 0.5, 1, 2, 4], ["0.2", "0.5", "1", "2", "4"])
            ax.minorticks_off()
            if i == len(RULES) - 1:
                ax.set_xlabel("log2 learning rate")
        axes[i, 0].set_ylabel(f"{RULES[rule]}\ntraining loss")
    axes[0, 0].legend(fontsize=7)
