"""SortedNet: sixteen nested networks from one training, beside slicing a trained one, sandwiches, and networks of their own.

Digits with noise of graded strength at 14x14; an elastic backbone at 8 widths, with and without the residual blocks of its last stages.
Every arm trains on as many counted FLOPs as ``sorted`` (three forward passes a row and step), with the same optimizer. Its peak rate is the
best of 0.002, 0.005, 0.012 and 0.03 by the mean accuracy over its networks on images of another draw (``alone``: of the largest one).
Where that is the largest of them, 0.06 is no better (``sorted``) or worse (``truncate``).

- ``truncate``: the whole network is trained, slices are cut afterwards;
- ``sandwich``: the largest, the smallest and two others a step, taught by the largest;
- ``unsorted``: as ``sorted``, but each draw runs a random choice of units instead of the leading ones;
- ``separate``: sixteen networks, each on a sixteenth of the FLOPs; ``alone``: three of them, each on all of the FLOPs;
- ``sorted40``: forty networks instead of sixteen (10 widths, each block of the last stages skipped or not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.dynamic.elastic import Config, ElasticFamily, at, grid
from neurarium.dynamic.slimmable import Slimmable
from neurarium.dynamic.sorted import EIGHTHS, ElasticPolicy, SortedNet
from neurarium.experiments.dynamic.anytime import BACKWARD, accuracies, network, prices, spend, task, unsorted
from neurarium.meter import stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.experiments.dynamic.zoo import Graded
    from neurarium.lab import RecordView, Trial

RATES = {"sorted": 3e-2, "sorted40": 3e-2, "truncate": 3e-2, "sandwich": 5e-3, "unsorted": 1.2e-2, "separate": 5e-3, "alone": 5e-3}
TENTHS = tuple(i / 10 for i in range(1, 11))

LABELS = {
    "sorted": "SortedNet, 16 networks",
    "sorted40": "SortedNet, 40 networks",
    "truncate": "trained whole, cut afterwards",
    "sandwich": "sandwiches with distillation",
    "unsorted": "random units, not nested",
    "separate": "16 networks, 1/16 of the FLOPs each",
    "alone": "3 networks, all of the FLOPs each",
}
COLOURS = ("#d55e00", "#e69f00", "#555555", "#0072b2", "#cc79a7", "#56b4e9", "#009e73")
STYLES = dict(zip(LABELS, zip(COLOURS, ("o-", ".:", "s-", "^-", "x--", "D:", "*"))))

Step = Callable[[Tensor, Tensor, int], tuple[Tensor, Iterable[Config]]]


def run(trial: Trial) -> None:
    def data() -> Graded:
        return trial.shared(
            "task", lambda: task(trial, train=trial.scale(smoke=300, laptop=4000), test=trial.scale(smoke=100, laptop=1000))
        )

    for arm in trial.arms("sorted", "truncate", "sandwich", "unsorted", "separate", "alone", "sorted40"):
        g, rate = data(), RATES[arm.name]
        family = sixteen(g)
        cost = prices(family, g.task.train.x[:1])
        # what two draws a step of the mean price need
        total = BACKWARD * 50 * 2 * float(np.mean(list(cost.values()))) * trial.scale(smoke=2, laptop=400)
        arm.log(**compare(arm.name, family, cost, g, total, rate, trial.seed))


def compare(name: str, family: ElasticFamily, cost: dict[Config, int], g: Graded, total: float, rate: float, seed: int) -> dict[str, Any]:
    """One arm: accuracies and FLOPs of its networks, what they take to store, what their training took."""
    train, test = g.task.train, g.task.test
    if name in ("separate", "alone"):
        configs = family.configs if name == "separate" else tuple(family.configs[i] for i in (7, 11, 15))
        each = total / len(configs) if name == "separate" else total
        scores, spent, sizes = [], 0.0, []
        for config in configs:
            one = ElasticFamily(network(g), [config], train.x[:1])
            spent += spend(one, plainly(one, config), train, each, lr=rate, seed=seed).flops
            scores += accuracies(one, test)
            sizes.append(float(stored_bytes(one.extract(config))))
        return {
            "accuracy": scores, "flops": [float(cost[c]) for c in configs], "bytes": sizes, "training_flops": spent,
            "mean_accuracy": float(np.mean(scores)),
        }  # fmt: skip
    if name == "sorted40":
        family = ElasticFamily(family.model, grid(family.model, TENTHS, together=True), train.x[:1])
        cost = prices(family, train.x[:1])
    step = {
        "truncate": lambda: plainly(family, family.configs[-1]), "sandwich": lambda: drawn(Slimmable(family, seed=seed)),
        "unsorted": lambda: randomly(family, seed),
    }.get(name, lambda: drawn(SortedNet(family, train.x[:1], seed=seed)))()  # fmt: skip
    result = spend(family, step, train, total, lr=rate, seed=seed)
    scores = accuracies(family, test)
    return {
        "accuracy": scores, "flops": [float(cost[c]) for c in family.configs], "bytes": float(stored_bytes(family.model)),
        "training_flops": result.flops, "mean_accuracy": float(np.mean(scores)),
    }  # fmt: skip


def sixteen(g: Graded) -> ElasticFamily:
    """Eight widths, with and without the residual blocks."""
    model = network(g)
    return ElasticFamily(model, [at(model, w, d) for w in EIGHTHS for d in (0.0, 1.0)], g.task.train.x[:1])


def drawn(policy: ElasticPolicy) -> Step:
    """The policy's own loss and draws."""
    return lambda x, y, step: (policy.loss(x, y, step), policy.draw(step))


def plainly(family: ElasticFamily, config: Config) -> Step:
    """One network alone."""
    return lambda x, y, step: (F.cross_entropy(family.run(x, config), y), [config])


def randomly(family: ElasticFamily, seed: int) -> Step:
    """SortedNet's draws, on units drawn at random."""
    policy, generator = SortedNet(family, None, seed=seed), torch.Generator().manual_seed(seed)

    def step(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, list[Config]]:
        configs = policy.draw(k)
        return torch.stack([F.cross_entropy(unsorted(family, x, c, generator), y) for c in configs]).mean(), configs

    return step


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy of every network against what it computes; and what many networks cost to store."""
    fig.set_size_inches(10.5, 5)
    left, right = fig.subplots(1, 2, width_ratios=(2.2, 1))
    for arm, label in LABELS.items():
        if arm not in record.arms:
            continue
        colour, style = STYLES[arm]
        x, y = record.values(arm, "flops").mean(0) / 1e6, record.values(arm, "accuracy")
        left.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.12, lw=0)
        left.plot(x, y.mean(0), style, color=colour, label=label, ms=8 if arm == "alone" else 4, lw=1.4)
    left.set(
        xscale="log", xlabel="MFLOPs a row (counted)", ylabel="test accuracy", title="Every network of every arm, equal training FLOPs"
    )
    left.legend(fontsize=8.5, loc="lower right")
    left.grid(alpha=0.25, which="both")
    shown = [arm for arm in LABELS if arm in record.arms]
    kilobytes = [float(np.sum(record.values(arm, "bytes")[0])) / 1e3 for arm in shown]
    bars = right.barh(range(len(shown)), kilobytes, color=[STYLES[arm][0] for arm in shown])
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.set_yticks(range(len(shown)), [LABELS[arm].split(",")[0] for arm in shown], fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="kB of weights stored", title="Storage of all its networks")
    fig.tight_layout()
