"""JEI-DNN against thresholded exits on one frozen backbone.

Images carry noise of a strength that differs from image to image (and that no network is told), so that easy and hard rows exist and one
can measure whether hard ones go further. The backbone is trained first; every arm then trains exits on the same cached features of the same
images. Thresholded exits take as many steps as JEI-DNN's classifiers take (its gate steps come on top), and each method has its own
learning rate, chosen from the same three by what both are for: on validation data, the smallest cross-entropy of the answers + lambda times
their cost (thresholded exits with the threshold that is best for that).

``gain``: accuracy minus that of one threshold at the same cost, at the lambdas of :data:`CLAIMED`. ``ece_of_threshold``: the calibration
error of one threshold at the same cost.
"""

from __future__ import annotations

from collections.abc import Callable
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
from neurarium.experiments.dynamic.judging import at_cost, best_exits, calibration_error, correlation, set_size
from neurarium.learn.fit import Backprop
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TRADEOFFS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # lambda
CLAIMED = slice(3, None)  # the claim on accuracy is about 0.2, 0.5, 1 and 2; smaller ones complete the curve
TUNED = 0.5  # the lambda at which rates are compared
RATES = (0.001, 0.003, 0.01)
WIDTHS = (16, 32, 48, 64)
BATCH = 125

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
    images: Tensor  # (rows, channels, height, width), for timing

    @property
    def judged(self) -> tuple[TensorData, TensorData, TensorData]:
        return self.val, self.calibration, self.test


@dataclass(frozen=True)
class Trained:
    """A policy and everything that it could say about the validation, the calibration and the test rows."""

    policy: EarlyExit
    rate: float
    readouts: tuple[Tensor, ...]  # three times (n, exits, classes)
    scores: tuple[Tensor, ...]  # (n, exits - 1)
    relative_cost: Tensor  # (exits,)

    def choices(self, threshold: float | None = None) -> tuple[Tensor, ...]:
        """Exits of the validation, the calibration and the test rows."""
        tau = self.policy.setting(None, threshold=threshold).cpu()
        return tuple(pick(y, s, tau)[1] for y, s in zip(self.readouts, self.scores))

    def sweep(self, split: int) -> list[float]:
        """Thresholds between "all leave at once" and "nobody leaves early", from the scores of one split."""
        quantiles = self.scores[split].flatten().double().quantile(torch.linspace(0, 1, 39, dtype=torch.float64))
        return [-1.0, *quantiles.tolist(), 2.0]


def run(trial: Trial) -> None:
    warmup, epochs = trial.scale(smoke=(1, 2), laptop=(2, 10))  # of classifier steps

    def bench() -> Bench:
        return trial.shared("bench", lambda: prepare(trial))

    def plain() -> Trained:
        b = bench()
        runs = [train(EarlyExit(fresh(b, trial), frozen=True), b, epochs, rate, trial) for rate in RATES]
        return min(runs, key=lambda t: min(objective(t, b, t.choices(s)) for s in t.sweep(0)))

    def each(policy: Callable[[float], JEIDNN], epochs: int) -> list[Trained]:
        """A policy for each lambda, at the rate that is best at one."""
        b = bench()
        best = min((train(policy(TUNED), b, epochs, rate, trial) for rate in RATES), key=lambda t: objective(t, b, t.choices()))
        return [best if t == TUNED else train(policy(t), b, epochs, best.rate, trial) for t in TRADEOFFS]

    def jointly() -> list[Trained]:
        b = bench()
        alternate = len(b.train) // BATCH // 4  # a quarter of an epoch, as the paper's 200 batches
        make = partial(JEIDNN, alternate=alternate, warmup_epochs=warmup)
        return each(lambda t: make(fresh(b, trial), tradeoff=t), warmup + 2 * (epochs - warmup))

    def gates_after() -> list[Trained]:
        exits = trial.shared("plain", plain).policy.staged
        make = partial(JEIDNN, alternate=10**9, warmup_epochs=0)  # gate steps only, as many as the joint training has
        return each(lambda t: make(deepcopy(exits), tradeoff=t), epochs - warmup)

    for arm in trial.arms("threshold", "jei", "threshold_gate_learned", "random_exit", "oracle"):
        b, exits = bench(), trial.shared("plain", plain)
        curve = [judge(exits, exits.choices(s), b) for s in exits.sweep(1)]  # the grid comes from the calibration rows alone
        if arm.name == "threshold":
            trained, points = [exits], curve
        else:
            trained = gates_after() if arm.name == "threshold_gate_learned" else trial.shared("jointly", jointly)
            points = []
            for tradeoff, one in zip(TRADEOFFS, trained):
                choices = one.choices()
                if arm.name == "random_exit":  # the same shares of exits, on other rows
                    choices = tuple(c[torch.randperm(len(c))] for c in choices)
                elif arm.name == "oracle":  # the exit of smallest cost, knowing the label
                    choices = tuple(best_exits(losses(y, d.y), one.relative_cost, tradeoff) for y, d in zip(one.readouts, b.judged))
                points.append(judge(one, choices, b))
        arm.grid("exits", np.array([p.pop("share") for p in points]))
        logged = {name: [p[name] for p in points] for name in points[0]}
        known = {name: [p[name] for p in curve] for name in ("cost", "accuracy", "ece")}
        gain = [a - t for a, t in zip(logged["accuracy"], at_cost(logged["cost"], known["cost"], known["accuracy"]))]
        arm.log(**logged, gain=gain if arm.name == "threshold" else gain[CLAIMED])
        arm.log(ece_of_threshold=at_cost(logged["cost"], known["cost"], known["ece"]))
        arm.log(rate=trained[0].rate)
        if arm.name == "jei":
            arm.log_timed(time_ratio=[time_ratio(t.policy, b.images) for t in trained])


def prepare(trial: Trial) -> Bench:
    """Data, backbone, features."""
    if trial.name == "smoke":
        task, (own, val), passes = data.images("digits", seed=trial.seed), (500, 200), 2
    else:
        task, (own, val), passes = data.images("mnist", train=10_000, seed=trial.seed), (6_000, 2_000), 4
    generator = torch.Generator().manual_seed(trial.seed)
    train, rest = task.train.split(own, seed=trial.seed)
    draws = [noisy(train, generator)[0] for _ in range(passes)]  # new noise in each pass
    (rest, _), (test, noise) = noisy(rest, generator), noisy(task.test, generator)
    watched, calibration = rest.split(val, seed=trial.seed)
    backbone = BackboneS(channels=task.shape[0], classes=task.classes).to(trial.device)
    batches = TensorData(torch.cat([d.x for d in draws]), torch.cat([d.y for d in draws])).batches(64, seed=trial.seed)
    schedule = partial(OneCycleLR, max_lr=5e-3, total_steps=len(batches))
    Backprop(optimizer=AdamW, schedule=schedule).fit(backbone, batches, epochs=1, seed=trial.seed)
    backbone.eval()
    images = test.x[:128].to(trial.device)
    cache = CachedStages(backbone, EarlyExit(backbone).costs(images), images)
    features = [cache.collect(d.batches(500, shuffle=False)).to("cpu") for d in (draws[0], watched, calibration, test)]
    return Bench(backbone, *features, noise, images)


def noisy(clean: TensorData, generator: torch.Generator) -> tuple[TensorData, Tensor]:
    """Gaussian noise of standard deviation 0.9 u^2 on each image, u uniform; and that deviation."""
    strength = 0.9 * torch.rand(len(clean), generator=generator).square()
    x = clean.x + strength.view(-1, 1, 1, 1) * torch.randn(clean.x.shape, generator=generator)
    return TensorData(x, clean.y), strength


def fresh(bench: Bench, trial: Trial) -> ExitChain:
    """The trained backbone with new early heads, the same in every arm.

    They standardise their features, which at inference is part of the linear map: without it they are far from converged after the epochs
    that there are, thresholded exits are then badly calibrated, and any comparison with them flatters the other side.
    """
    last = bench.backbone.heads[-1]

    def head(inputs: int) -> nn.Sequential:
        standard = nn.BatchNorm1d(inputs, affine=False)
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), standard, nn.Linear(inputs, last[-1].out_features))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        heads = [head(4 * width) for width in WIDTHS[:-1]]
    return deepcopy(ExitChain(list(bench.backbone.segments), [*heads, last]).to(trial.device).eval())


def train(policy: EarlyExit, bench: Bench, epochs: int, rate: float, trial: Trial) -> Trained:
    """AdamW, cosine to zero over the method's own steps."""
    policy.to(trial.device)
    batches = bench.train.to(trial.device).batches(BATCH, seed=trial.seed, drop_last=True)
    val = bench.val.to(trial.device).batches(2_000, shuffle=False)
    schedule = partial(CosineAnnealingLR, T_max=epochs * len(batches))
    with cached(policy, bench.images) as cache:
        fit_policy(policy, batches, epochs=epochs, optimizer=partial(AdamW, lr=rate), schedule=schedule, val=val, seed=trial.seed)
        policy.eval()
        with torch.no_grad():
            said = [[part.cpu() for part in dense(cache, policy.gate, d.x.to(trial.device))] for d in bench.judged]
    table = policy.costs(bench.images)
    return Trained(policy, rate, *zip(*said), table.tensor().double() / table.full)


def losses(readouts: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each exit, ``(n, exits, classes) -> (n, exits)``."""
    return -readouts.log_softmax(-1).gather(-1, y.view(-1, 1, 1).expand(-1, readouts.shape[1], 1)).squeeze(-1)


def objective(trained: Trained, bench: Bench, choices: tuple[Tensor, ...]) -> float:
    """Mean over validation rows of the cross-entropy of the answer + lambda times its cost."""
    costs = losses(trained.readouts[0], bench.val.y) + TUNED * trained.relative_cost
    return float(costs.gather(1, choices[0][:, None]).mean())


def judge(trained: Trained, choices: tuple[Tensor, ...], bench: Bench) -> dict[str, Any]:
    """What comes out on the test rows if rows leave at these exits; the calibration rows set the size of the prediction sets."""
    held, tested = (y[torch.arange(len(y)), c].softmax(-1) for y, c in zip(trained.readouts[1:], choices[1:]))
    choice, exits = choices[2], len(trained.relative_cost)
    return {
        "accuracy": float((tested.argmax(1) == bench.test.y).double().mean()),
        "cost": float(trained.relative_cost[choice].mean()),  # of the full cost
        "ece": calibration_error(tested, bench.test.y),
        "set_size": set_size(held, bench.calibration.y, tested),
        "corr": correlation(choice, bench.noise),
        "share": torch.bincount(choice, minlength=exits).double().div(len(choice)).tolist(),
    }


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
    bars.set_xticks(range(len(TRADEOFFS)), [f"{t:g}" for t in TRADEOFFS])
    bars.set(xlabel="λ", ylabel="share of test rows", ylim=(0, 1), title="Who leaves where: JEI-DNN, oracle")
    bars.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
