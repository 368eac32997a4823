"""JEI-DNN against thresholded exits on one frozen backbone.

Images carry noise of a strength that differs from image to image (and that no network is told), so that easy and hard rows exist and one
can measure whether hard ones go further. The backbone is trained first; every arm then trains the same exits on the same cached features of
the same images for the same number of steps.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from neurarium import data
from neurarium.data import TensorData
from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.exits import EarlyExit, ExitChain
from neurarium.dynamic.jei import JEIDNN
from neurarium.dynamic.staged import dense, pick
from neurarium.dynamic.train import CachedStages, cached, fit_policy
from neurarium.learn.fit import Backprop
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TRADEOFFS = (0.2, 0.5, 1.0, 2.0)  # lambda
WIDTHS = (16, 32, 48, 64)
BATCH, RATE = 128, 0.01

LABELS = {
    "threshold": "one max-probability threshold",
    "jei": "JEI-DNN, one policy a λ",
    "threshold_gate_learned": "gates learned after the exits",
    "random_exit": "same shares, random rows",
    "oracle": "oracle: best exit, knowing the label",
}
COLOURS = dict(zip(LABELS, ("#555555", "#d55e00", "#0072b2", "#cc79a7", "#009e73")))
MARKERS = {"jei": "o", "threshold_gate_learned": "s", "random_exit": "x", "oracle": "^"}


@dataclass(frozen=True)
class Bench:
    """A trained backbone, the features of every split, and a few test images."""

    backbone: BackboneS
    train: TensorData
    val: TensorData
    calibration: TensorData
    test: TensorData
    noise: Tensor  # (test rows,) standard deviation of the noise on each image
    images: Tensor  # (rows, 1, height, width), for timing


@dataclass(frozen=True)
class Trained:
    """A policy and everything that it could say about the calibration and the test rows."""

    policy: EarlyExit
    readouts: tuple[Tensor, Tensor]  # (n, exits, classes)
    scores: tuple[Tensor, Tensor]  # (n, exits - 1)

    def choices(self, threshold: float | None = None) -> tuple[Tensor, Tensor]:
        """Exits of the calibration and of the test rows."""
        tau = self.policy.setting(None, threshold=threshold)
        calibration, test = (pick(y, s, tau)[1] for y, s in zip(self.readouts, self.scores))
        return calibration, test


def run(trial: Trial) -> None:
    epochs = trial.scale(smoke=5, laptop=30)
    alternate = trial.scale(smoke=2, laptop=25)  # the paper's 200 batches, for runs of an eighth of their steps or less

    def bench() -> Bench:
        return trial.shared("bench", lambda: prepare(trial))

    def plain() -> Trained:
        b = bench()
        return train(EarlyExit(fresh(b), frozen=True), b, epochs, trial.seed)

    def jointly() -> list[Trained]:
        b = bench()
        return [
            train(JEIDNN(fresh(b), tradeoff=t, alternate=alternate, warmup_epochs=epochs // 5), b, epochs, trial.seed) for t in TRADEOFFS
        ]

    def gates_after() -> list[Trained]:
        b, exits = bench(), trial.shared("plain", plain).policy.staged
        gates_only = {"alternate": 10**9, "warmup_epochs": 0}  # as many gate steps as the joint training has
        return [train(JEIDNN(deepcopy(exits), tradeoff=t, **gates_only), b, 2 * epochs // 5, trial.seed) for t in TRADEOFFS]

    for arm in trial.arms("threshold", "jei", "threshold_gate_learned", "random_exit", "oracle"):
        b = bench()
        points = []
        if arm.name == "threshold":
            exits = trial.shared("plain", plain)
            # The grid comes from the calibration rows alone.
            quantiles = exits.scores[0].flatten().double().quantile(torch.linspace(0, 1, 39, dtype=torch.float64))
            points = [judge(exits, exits.choices(t), b) for t in (-1.0, *quantiles.tolist(), 2.0)]
        elif arm.name == "threshold_gate_learned":
            points = [judge(t, t.choices(), b) for t in gates_after()]
        else:
            for tradeoff, joint in zip(TRADEOFFS, trial.shared("jointly", jointly)):
                choices = joint.choices()
                if arm.name == "random_exit":  # the same shares of exits, on other rows
                    choices = tuple(c[torch.randperm(len(c))] for c in choices)
                elif arm.name == "oracle":  # the exit of smallest cost, knowing the label
                    choices = best_exits(joint, b, tradeoff)
                points.append(judge(joint, choices, b))
                if arm.name == "jei":
                    points[-1]["time_ratio"] = time_ratio(joint.policy, b.images)
        arm.grid("exits", np.array([p.pop("share") for p in points]))
        arm.log(**{name: [p[name] for p in points] for name in points[0]})


def prepare(trial: Trial) -> Bench:
    """Data, backbone, features."""
    if trial.name == "smoke":
        task, (own, val), passes = data.images("digits", seed=trial.seed), (600, 200), 2
    else:
        task, (own, val), passes = data.images("mnist", train=10_000, seed=trial.seed), (6_000, 2_000), 4
    generator = torch.Generator().manual_seed(trial.seed)
    train, rest = task.train.split(own, seed=trial.seed)
    draws = [noisy(train, generator)[0] for _ in range(passes)]  # new noise in each pass
    (rest, _), (test, noise) = noisy(rest, generator), noisy(task.test, generator)
    watched, calibration = rest.split(val, seed=trial.seed)
    backbone = BackboneS(classes=task.classes)
    batches = TensorData(torch.cat([d.x for d in draws]), torch.cat([d.y for d in draws])).batches(64, seed=trial.seed)
    schedule = partial(OneCycleLR, max_lr=5e-3, total_steps=len(batches))
    Backprop(optimizer=AdamW, schedule=schedule).fit(backbone, batches, epochs=1, seed=trial.seed)
    backbone.eval()
    cache = CachedStages(backbone, EarlyExit(backbone).costs(test.x), test.x)
    features = [cache.collect(d.batches(500, shuffle=False)) for d in (draws[0], watched, calibration, test)]
    return Bench(backbone, *features, noise, test.x[:128])


def noisy(clean: TensorData, generator: torch.Generator) -> tuple[TensorData, Tensor]:
    """Gaussian noise of standard deviation 0.9 u^2 on each image, u uniform; and that deviation."""
    strength = 0.9 * torch.rand(len(clean), generator=generator).square()
    x = clean.x + strength.view(-1, 1, 1, 1) * torch.randn(clean.x.shape, generator=generator)
    return TensorData(x, clean.y), strength


def fresh(bench: Bench) -> ExitChain:
    """The trained backbone with new early heads, the same in every arm.

    They standardise their features, which at inference is part of the linear map: without it they are far from converged after 30 epochs,
    thresholded exits are then badly calibrated, and any comparison with them flatters the other side.
    """
    last = bench.backbone.heads[-1]

    def head(inputs: int) -> nn.Sequential:
        standard = nn.BatchNorm1d(inputs, affine=False)
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), standard, nn.Linear(inputs, last[-1].out_features))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = [head(4 * width) for width in WIDTHS[:-1]]
    return deepcopy(ExitChain(list(bench.backbone.segments), [*heads, last]).eval())


def train(policy: EarlyExit, bench: Bench, epochs: int, seed: int) -> Trained:
    """AdamW at the rate that gave the thresholded exits the smallest validation loss, cosine to zero; the same for all arms."""
    batches = bench.train.batches(BATCH, seed=seed)
    schedule = partial(CosineAnnealingLR, T_max=epochs * len(batches))
    optimizer = partial(AdamW, lr=RATE)
    with cached(policy, bench.images) as cache:
        fit_policy(policy, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, val=bench.val.batches(500), seed=seed)
        policy.eval()
        with torch.no_grad():
            readouts, scores = zip(*(dense(cache, policy.gate, d.x) for d in (bench.calibration, bench.test)))
    return Trained(policy, readouts, scores)


def best_exits(joint: Trained, bench: Bench, tradeoff: float) -> tuple[Tensor, ...]:
    """argmin_l CE_l + lambda ic_l."""
    price = tradeoff * joint.policy.relative_cost(bench.images)
    sets = zip(joint.readouts, (bench.calibration.y, bench.test.y))
    return tuple((joint.policy.badness(readouts, y) + price).argmin(1) for readouts, y in sets)


def judge(trained: Trained, choices: tuple[Tensor, ...], bench: Bench) -> dict[str, Any]:
    """What comes out on the test rows if rows leave at these exits; the calibration rows set the size of the prediction sets."""
    held, tested = (y.softmax(-1)[torch.arange(len(y)), c] for y, c in zip(trained.readouts, choices))
    choice, table = choices[1], trained.policy.costs(bench.images)
    cost = float(table.tensor()[choice].double().mean() / table.full)
    return {
        "accuracy": float((tested.argmax(1) == bench.test.y).double().mean()),
        "cost": cost,  # of the full cost
        "ece": calibration_error(tested, bench.test.y),
        "set_size": set_size(held, bench.calibration.y, tested),
        "corr": correlation(choice, bench.noise),
        "share": torch.bincount(choice, minlength=len(table.steps)).double().div(len(choice)).tolist(),
    }


def calibration_error(p: Tensor, y: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their rows."""
    confidence, answer = p.max(1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gap = (confidence - (answer == y).to(p)).double()
    return float(torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, gap).abs().sum() / len(y))


def set_size(held: Tensor, y: Tensor, tested: Tensor, cover: float = 0.95) -> float:
    """Mean size of split-conformal sets {c : 1 - p(c) <= q} that hold the label with this probability."""
    misses = 1 - held.gather(1, y[:, None]).squeeze(1)
    rank = min(int(np.ceil((len(y) + 1) * cover)), len(y))
    return float((1 - tested <= misses.sort().values[rank - 1]).double().sum(1).mean())


def correlation(choice: Tensor, noise: Tensor) -> float:
    """Pearson correlation; 0 where every row takes the same exit."""
    return float(np.corrcoef(choice.double(), noise.double())[0, 1]) if choice.unique().numel() > 1 else 0.0


def time_ratio(policy: EarlyExit, images: Tensor) -> float:
    """Seconds of what is really skipped over seconds of running everything."""
    with torch.no_grad():
        timings = latency(
            {mode: partial(lambda m: [policy.decide(x, mode=m) for x in images.split(64)], mode) for mode in ("compact", "masked")},
            repeats=5,
            warmup=1,
        )
    return timings["compact"].median / timings["masked"].median


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against cost, calibration against cost, and who leaves where."""
    fig.set_size_inches(11, 7.5)
    left, right = fig.add_gridspec(1, 2, width_ratios=(1.25, 1), wspace=0.22)
    axes = {"accuracy": fig.add_subplot(left)}
    below = right.subgridspec(2, 1, hspace=0.3)
    axes["ece"], bars = fig.add_subplot(below[0]), fig.add_subplot(below[1])
    grid = np.linspace(0.15, 1, 60)
    for metric, ax in axes.items():
        if "threshold" in record.arms:
            costs, values = record.values("threshold", "cost"), record.values("threshold", metric)
            lines = np.array([np.interp(grid, c, v) for c, v in zip(costs, values)])
            mean, spread = lines.mean(0), lines.std(0)
            ax.fill_between(grid, mean - spread, mean + spread, color=COLOURS["threshold"], alpha=0.2, lw=0)
            ax.plot(grid, mean, color=COLOURS["threshold"], label=LABELS["threshold"])
        for arm, marker in MARKERS.items():
            if arm not in record.arms or (metric == "ece" and arm in ("random_exit", "oracle")):
                continue
            x, y = record.values(arm, "cost"), record.values(arm, metric)
            ax.errorbar(
                x.mean(0), y.mean(0), xerr=x.std(0), yerr=y.std(0), color=COLOURS[arm], marker=marker, ms=6, lw=1, capsize=2,
                ls="-" if arm in ("jei", "oracle") else ":", label=LABELS[arm],
            )  # fmt: skip
        ax.set_xlabel("mean FLOPs a row / full network")
        ax.grid(alpha=0.25)
    axes["accuracy"].set(ylabel="test accuracy", title="Accuracy against cost", xlim=(0.1, 1))
    axes["accuracy"].legend(loc="lower right", fontsize=9)
    axes["ece"].set(ylabel="expected calibration error", title="Calibration of the answer given", xlim=(0.1, 1))
    shares = {arm: np.mean(record.grids(arm, "exits"), 0) for arm in ("jei", "oracle") if arm in record.arms}
    for i, share in enumerate(shares.values()):
        bottom, where = np.zeros(len(share)), np.arange(len(share)) + 0.38 * (i - 0.5)
        for k, colour in zip(range(share.shape[1]), ("#fde725", "#5ec962", "#21918c", "#440154")):
            bars.bar(
                where, share[:, k], 0.34, bottom=bottom, color=colour, edgecolor="white", lw=0.5, label=f"exit {k + 1}" if i == 0 else None
            )
            bottom += share[:, k]
    bars.set_xticks(range(len(TRADEOFFS)), [f"λ = {t:g}" for t in TRADEOFFS])
    bars.set(ylabel="share of test rows", ylim=(0, 1), title="Who leaves where: JEI-DNN, oracle")
    bars.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
