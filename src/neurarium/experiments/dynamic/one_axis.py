"""Seven ways to spend less, on one axis: exits, channels, slices and stitches of one backbone on the same images.

Images carry noise of a strength that differs from image to image, so that easy and hard rows exist. Every arm trains on about as many
counted FLOPs as ``static``, BackboneS alone (three forward passes a row and step; what was spent is logged); a method that starts from a
trained network pays for that out of the same purse. Each has its peak learning rate from the same four, by the same score (``RATES``).
Nets are BackboneS, or BackboneS with elastic layers, or with a latent branch; all normalise by batches. Calibration images are apart from
training and test images.

- *per input*: ``exits`` (one threshold on the largest probability), ``jei`` (exits and gates learned together, on the frozen backbone),
  ``dyn_perceiver`` (exits on a latent branch), ``ftwt`` (which channels, row by row);
- *per budget*: ``sorted`` (eight nested widths), ``tips`` (22 of 256 sub-networks), ``sn_net`` (three widths and the stitches between
  them), and ``exits_by_budget``: the networks of ``exits``, where all rows leave at the best exit that the budget affords.

``accuracy[i]`` is that at ``budgets[i]``, chance where the cheapest path is dearer; ``auc`` its mean over budgets from an eighth of the
FLOPs of ``static``, where its first exit is just affordable, to all of them (logarithmic). ``milliseconds`` are those of ``decide`` for 64
rows; ``auc_ms`` is the mean, over times from a quarter of those of ``static`` to all of them, of the best accuracy that takes no longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.data import TensorData
from neurarium.dynamic.backbones import BackboneS, ElasticBackbone
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.elastic import ElasticFamily, at, grid, recalibrate
from neurarium.dynamic.exits import EarlyExit, ExitChain
from neurarium.dynamic.sorted import EIGHTHS, SortedNet
from neurarium.dynamic.tips import TIPS
from neurarium.dynamic.train import cached, fit_policy
from neurarium.errors import BadInput
from neurarium.experiments.dynamic import zoo
from neurarium.experiments.dynamic.anytime import BACKWARD, spend
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.dynamic.outcome import Policy
    from neurarium.lab import RecordView, Trial

BATCH = 50
QUARTERS = (0.25, 0.5, 0.75, 1.0)
WIDTHS = (12, 12, 20, 28, 40)  # of Dyn-Perceiver's maps: with the latent branch it costs as much as wider exits alone
RATES = {  # peak learning rates, each the best of 2e-3, 5e-3, 1.2e-2 and 3e-2 by the mean area under the curve on two other seeds
    "backbone": 3e-2, "exits": 3e-2, "jei": 3e-2, "dyn_perceiver": 3e-2, "ftwt": 3e-2, "sorted": 3e-2, "tips": 3e-2, "sn_net": 2e-3,
}  # fmt: skip
TRUNK = {"jei": 0.9, "ftwt": 0.6}  # share of the purse that trains the network with which a method begins
FEATURES = 24  # passes of JEI-DNN's heads and gates over the features of its frozen trunk, which cost little

LABELS = {
    "static": "BackboneS alone",
    "exits": "thresholded exits",
    "jei": "JEI-DNN",
    "dyn_perceiver": "Dyn-Perceiver",
    "ftwt": "FTWT",
    "exits_by_budget": "the same exits, by budget",
    "sorted": "SortedNet",
    "tips": "TIPS",
    "sn_net": "SN-Net",
}
PER_INPUT = ("exits", "jei", "dyn_perceiver", "ftwt")
COLOURS = dict(zip(LABELS, ("#000000", "#d55e00", "#e69f00", "#cc79a7", "#8c510a", "#999999", "#0072b2", "#56b4e9", "#009e73")))


@dataclass(frozen=True)
class Bench:
    """The images, and what training may cost in all."""

    train: TensorData
    calibration: TensorData
    test: TensorData
    static: int  # FLOPs a row of BackboneS with its last head
    purse: float
    points: int  # budgets

    @property
    def budgets(self) -> list[float]:
        return [float(b) for b in np.geomspace(0.125 * self.static, 1.001 * self.static, self.points)]


class ByBudget(nn.Module):
    """All rows leave at the exit that is best, on calibration images, among those that the budget affords."""

    def __init__(self, policy: EarlyExit, right: list[float]) -> None:
        super().__init__()
        self.policy, self.right = policy, right

    def decide(self, x: Tensor, *, budget: float) -> Any:
        total = self.policy.costs(x).total
        fits = [k for k, price in enumerate(total) if price <= budget]
        if not fits:
            raise BadInput(f"the smallest feasible budget is {total[0]}")
        best = max(fits, key=lambda k: self.right[k])
        tau = [math.inf] * best + [-math.inf] * (len(total) - best)
        before = self.policy.tau.clone()
        self.policy.tau.copy_(torch.tensor(tau))
        try:
            return self.policy.decide(x)
        finally:
            self.policy.tau.copy_(before)


def run(trial: Trial) -> None:
    repeats = trial.scale(smoke=1, laptop=7)

    def bench() -> Bench:
        return trial.shared("bench", lambda: prepare(trial))

    def exits() -> EarlyExit:
        return trained_exits(bench(), trial)

    for arm in trial.arms(*LABELS):
        b = bench()
        torch.manual_seed(trial.seed)
        if arm.name == "static":
            model = trained_backbone(b, 1.0, trial)
            ms = milliseconds({"static": model}, b.test.x, repeats)["static"]
            right = float((answer(model, b.test.x) == b.test.y).double().mean())
            area = (0.1 * (b.points - 1) + right) / b.points  # it fits the last budget alone, and the last of the times
            arm.log(flops=float(b.static), top=right, auc=area, budgets=b.budgets, training_flops=b.purse)
            arm.log_timed(milliseconds=ms, auc_ms=area)
            continue
        if arm.name in ("exits", "exits_by_budget"):
            policy, spent = trial.shared("exits", exits), b.purse
            if arm.name == "exits_by_budget":
                policy = by_budget(policy, b)
        else:
            policy, spent = ARMS[arm.name](b, trial)
        reached = judge(policy.eval(), b, repeats)
        ms = reached.pop("milliseconds")
        arm.log(training_flops=spent, budgets=b.budgets, **reached)
        limits = np.linspace(0.25, 1.0, b.points) * np.mean(trial.metric("static", "milliseconds"))
        known = [(t, a) for t, a in zip(ms, reached["accuracy"]) if t == t]
        within = [max((a for t, a in known if t <= limit), default=0.1) for limit in limits]
        arm.log_timed(milliseconds=ms, auc_ms=float(np.mean(within)))


def prepare(trial: Trial) -> Bench:
    task = zoo.graded(trial, train=3500, test=1000, size=14).task
    train, calibration = task.train.split(trial.scale(smoke=300, laptop=3000), seed=trial.seed)
    static = CostTable.measure([BackboneS(task.train.x.shape[1])], train.x[:1]).full
    purse = BACKWARD * trial.scale(smoke=1, laptop=5) * len(train) * static
    return Bench(train, calibration, task.test, static, purse, trial.scale(smoke=3, laptop=8))


def fit(policy: Any, b: Bench, purse: float, price: float, trial: Trial, *, lr: float, groups: Any = None) -> float:
    """Train by the policy's own loss until the purse is spent; ``price``: forward FLOPs a row of its training. Returns what was spent."""
    steps = max(2, round(purse / (BACKWARD * BATCH * price)))
    batches = list(b.train.batches(BATCH, seed=trial.seed, drop_last=True)) if steps < len(b.train) // BATCH else None
    loader = batches[:steps] if batches else b.train.batches(BATCH, seed=trial.seed, drop_last=True)
    epochs = 1 if batches else max(1, round(steps / len(loader)))
    rates = lr if groups is None else [group["lr"] for group in groups]
    schedule = partial(OneCycleLR, max_lr=rates, total_steps=epochs * len(loader))
    optimizer = lambda found: AdamW(groups or found, lr=lr, fused=True)  # noqa: E731
    fit_policy(policy, loader, epochs=epochs, optimizer=optimizer, schedule=schedule, seed=trial.seed)
    return BACKWARD * BATCH * price * epochs * len(loader)


def trained_backbone(b: Bench, share: float, trial: Trial, width: float = 1.0) -> Any:
    """BackboneS, or its stages at a share of their width, by its last head on a share of the purse."""
    channels = b.train.x.shape[1]
    model: Any = BackboneS(channels)
    if width < 1:
        model = ElasticBackbone(channels, widths=[round(width * w) for w in (16, 32, 48, 64)], blocks=(0, 0, 0, 0), norm="batch")
    price = CostTable.measure([lambda x: model(x)], b.train.x[:1]).full
    steps = max(2, round(share * b.purse / (BACKWARD * BATCH * price)))
    optimizer = AdamW(model.parameters(), lr=RATES["backbone"], fused=True)
    schedule, done = OneCycleLR(optimizer, max_lr=RATES["backbone"], total_steps=steps), 0
    model.train()
    while done < steps:
        for x, y in b.train.batches(BATCH, seed=trial.seed + done, drop_last=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return model.eval()


def trained_exits(b: Bench, trial: Trial) -> EarlyExit:
    torch.manual_seed(trial.seed)
    policy = EarlyExit(BackboneS(b.train.x.shape[1]))
    fit(policy, b, b.purse, policy.costs(b.train.x[:1]).full, trial, lr=RATES["exits"])
    return policy.eval()


def by_budget(policy: EarlyExit, b: Bench) -> Any:
    with torch.no_grad():
        right = [float((y.argmax(1) == b.calibration.y).double().mean()) for y in policy.outputs(b.calibration.x)]
    return ByBudget(policy, right)


def jei(b: Bench, trial: Trial) -> tuple[Policy, float]:
    from neurarium.dynamic.jei import JEIDNN

    trunk, epochs = trained_backbone(b, TRUNK["jei"], trial), trial.scale(smoke=2, laptop=FEATURES)
    with torch.random.fork_rng(devices=[]):
        chain = ExitChain(list(trunk.segments), [*(BackboneS.head(w, 10) for w in (16, 32, 48)), trunk.heads[-1]])
    policy = JEIDNN(chain, tradeoff=0.3, alternate=max(1, len(b.train) // BATCH // 4), warmup_epochs=epochs // 4)
    with cached(policy, b.train.x[:2]) as cache:
        features = cache.collect(b.train.batches(500, shuffle=False))
        optimizer = partial(AdamW, lr=RATES["jei"], fused=True)
        fit_policy(policy, features.batches(BATCH, seed=trial.seed), epochs=epochs, optimizer=optimizer, seed=trial.seed)
    on_features = BACKWARD * epochs * sum(2 * p.numel() for p in policy.parameters() if p.requires_grad and p.ndim > 1)
    return policy, TRUNK["jei"] * b.purse + len(b.train) * (b.static + on_features)


def dyn_perceiver(b: Bench, trial: Trial) -> tuple[Policy, float]:
    from neurarium.dynamic.perceiver import DistilledExit, DynPerceiver

    shapes = zip((b.train.x.shape[1], *WIDTHS), WIDTHS, (2, 1, 1, 2, 1))
    stem, *stages = [nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in shapes]
    network = DynPerceiver(stages, WIDTHS, num_classes=10, stem=stem, latents=4, latent_dim=8, pool=2, out_pool=2)
    policy = DistilledExit(network).to(memory_format=torch.channels_last)  # 7x7 depthwise gradients are faster
    spent = fit(policy, b, b.purse, policy.costs(b.train.x[:1]).full, trial, lr=RATES["dyn_perceiver"])
    return policy.to(memory_format=torch.contiguous_format), spent


def ftwt(b: Bench, trial: Trial) -> tuple[Policy, float]:
    from neurarium.dynamic.channel import FTWT

    trunk = trained_backbone(b, TRUNK["ftwt"], trial)
    chain = nn.Sequential(*trunk.segments, trunk.heads[-1])
    policy = FTWT(chain, mass=0.7, granularity=8, whole_below=1, warmup_epochs=1)
    groups = policy.groups(lr=(lr := RATES["ftwt"]), predictor_lr=10 * lr)  # predictors start from nothing
    rest = (1 - TRUNK["ftwt"]) * b.purse
    return policy, b.purse - rest + fit(policy, b, rest, b.static, trial, lr=lr, groups=groups)


def sorted_net(b: Bench, trial: Trial) -> tuple[Policy, float]:
    policy = SortedNet(elastic(b), b.train.x[:2], widths=EIGHTHS, seed=trial.seed)
    return policy, settle(policy, b, trial, RATES["sorted"])


def tips(b: Bench, trial: Trial) -> tuple[Policy, float]:
    model = elastic(b)
    supernet = ElasticFamily(model, grid(model, QUARTERS), b.train.x[:2])
    policy = TIPS(supernet, b.train.x[:2], per_level=4, distil=0.5, seed=trial.seed)
    return policy, settle(policy, b, trial, RATES["tips"])


def elastic(b: Bench) -> ElasticBackbone:
    return ElasticBackbone(b.train.x.shape[1], blocks=(0, 0, 0, 0), norm="batch", statistics="recalibrate")


def settle(policy: Any, b: Bench, trial: Trial, lr: float) -> float:
    """Train a family and measure the batch statistics of what it offers."""
    spent = spend(policy.family, lambda x, y, k: (policy.loss(x, y, k), policy.draw(k)), b.train, b.purse, lr=lr, seed=trial.seed).flops
    recalibrate(policy.family.model, b.train.batches(250, shuffle=False), policy.configs, batches=4)
    return spent


def sn_net(b: Bench, trial: Trial) -> tuple[Policy, float]:
    from neurarium.dynamic.stitch import stitch

    anchors = []
    for width, share in ((0.375, 0.1), (0.625, 0.2), (1.0, 0.35)):
        net = trained_backbone(b, share, trial, width)
        if width == 1.0:
            net = nn.Sequential(*net.segments, net.heads[-1])
        else:
            config = at(net)
            recalibrate(net, b.train.batches(250, shuffle=False), [config], batches=4)
            plain = ElasticFamily(net, [config], b.train.x[:2]).extract(config)
            net = nn.Sequential(*plain.stages, plain.head)
        anchors.append(net.eval())
    policy = stitch(anchors, b.train.x[:2], seed=trial.seed)
    policy.init_stitches(b.train.x[:100])
    price = float(policy.prices(b.train.x[:1]).double().mean())
    return policy, 0.65 * b.purse + fit(policy, b, 0.35 * b.purse, price, trial, lr=RATES["sn_net"])


ARMS: dict[str, Callable[..., tuple[Any, float]]] = {
    "jei": jei, "dyn_perceiver": dyn_perceiver, "ftwt": ftwt, "sorted": sorted_net, "tips": tips, "sn_net": sn_net,
}  # fmt: skip


@torch.no_grad()
def judge(policy: Any, b: Bench, repeats: int) -> dict[str, Any]:
    """Accuracy, mean cost and milliseconds at each budget."""
    if hasattr(policy, "calibrate"):
        policy.calibrate(b.calibration.batches(250, shuffle=False))
    accuracy, cost, feasible = [], [], {}
    for budget in b.budgets:
        try:
            outcomes = [policy.decide(x, budget=budget) for x in b.test.x.split(250)]
        except BadInput:
            accuracy.append(0.1)
            cost.append(math.nan)
            continue
        said = torch.cat([o.output.argmax(1) for o in outcomes])
        accuracy.append(float((said == b.test.y).double().mean()))
        cost.append(float(torch.cat([o.cost for o in outcomes]).double().mean()))
        feasible[budget] = partial(policy.decide, budget=budget)
    ms = milliseconds(feasible, b.test.x, repeats)
    return {
        "accuracy": accuracy, "cost": cost, "auc": float(np.mean(accuracy)), "top": accuracy[-1],
        "flops": float(np.nanmean(cost)), "milliseconds": [ms.get(budget, math.nan) for budget in b.budgets],
    }  # fmt: skip


@torch.no_grad()
def milliseconds(calls: dict[Any, Callable[[Tensor], Any]], x: Tensor, repeats: int) -> dict[Any, float]:
    """Median milliseconds of each call on 64 rows, taken in turn."""
    parts = x[:192].split(64)
    timings = latency(
        {str(k): partial(lambda call: [call(part) for part in parts], call) for k, call in calls.items()}, repeats=repeats, warmup=1
    )
    return {k: 1e3 * timings[str(k)].median / len(parts) for k in calls}


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(250)])


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against what was computed, against what it took, and the areas under the curves."""
    fig.set_size_inches(12, 4.8)
    axes = fig.subplots(1, 3, width_ratios=(1.3, 1.3, 1))
    for arm, label in LABELS.items():
        if arm not in record.arms:
            continue
        if arm == "static":
            y = record.values(arm, "top").mean()
            axes[0].plot(record.mean(arm, "flops") / 1e6, y, "*", color=COLOURS[arm], ms=14, label=label)
            axes[1].plot(record.mean(arm, "milliseconds"), y, "*", color=COLOURS[arm], ms=14)
            continue
        style = "o-" if arm in PER_INPUT else "s--"
        y = record.values(arm, "accuracy")
        for ax, metric, unit in ((axes[0], "cost", 1e6), (axes[1], "milliseconds", 1)):
            x = record.values(arm, metric) / unit
            seen = ~np.isnan(x).any(0)
            ax.plot(x.mean(0)[seen], y.mean(0)[seen], style, color=COLOURS[arm], ms=4, lw=1.4, label=label if metric == "cost" else None)
    for ax in axes[:2]:
        ax.set(xscale="log", ylabel="test accuracy")
        ax.grid(alpha=0.25, which="both")
    axes[0].set(xlabel="MFLOPs a row (counted)", title="What is computed")
    axes[0].set_xticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=7.5, loc="lower right")
    axes[1].set(xlabel="milliseconds for 64 rows", title="What it takes")
    arms = [a for a in LABELS if a in record.arms and a != "static"]
    for offset, metric, alpha in ((-0.2, "auc", 1.0), (0.2, "auc_ms", 0.45)):
        means = [float(np.mean(record.values(a, metric))) for a in arms]
        axes[2].barh([i + offset for i in range(len(arms))], means, 0.38, color=[COLOURS[a] for a in arms], alpha=alpha)
    axes[2].set_yticks(range(len(arms)), [LABELS[a] for a in arms], fontsize=8)
    axes[2].invert_yaxis()
    axes[2].set(xlabel="mean accuracy", title="Area: FLOPs, time (pale)")
    fig.tight_layout()
