"""Three questions on one staged task where going on costs data: the spread of an ensemble, the largest probability, a learned gate.

One trained ensemble (:mod:`neurarium.experiments.dynamic.sguq`, generated patients) serves all arms, so that only the question differs.
``spread`` and ``max_prob`` are thresholds on one number; ``learned`` is JEI-DNN's gate on four numbers, trained on validation rows to
imitate the stage of smallest cross-entropy + lambda times the price of its views, with the lambda whose curve is best there. All three
are swept along the room's calibrated thresholds.
``compute`` spends the other
currency: it never buys a second view, and asks more members instead, one to all. ``random`` stops rows by chance, ``oracle`` at the
cheapest stage that is right.

Every arm gives points (price, accuracy) on test rows; thresholds, gates and lambda come from validation rows. ``auc``: mean accuracy over
prices from one view to all, the points joined by lines from "one view for all" to "all views for all". ``mflops`` is what the points cost
in computing: a row's stages, all members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam

from neurarium.dynamic.budget import calibrate
from neurarium.dynamic.ensemble import Pooled, pooled, vote
from neurarium.dynamic.gates import LearnedGate, MaxProb, Spread
from neurarium.dynamic.jei import gate_targets
from neurarium.dynamic.staged import pick
from neurarium.experiments.dynamic.sguq import Asked, ask, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TRADEOFFS = (0.05, 0.2, 0.5, 1.0)  # nats that all the data is worth
STEPS = 300

LABELS = {
    "spread": "spread of the ensemble (SGUQ)",
    "max_prob": "largest mean probability",
    "learned": "learned gate (JEI-DNN)",
    "compute": "more members, one view",
    "random": "chance",
    "oracle": "cheapest right stage, knowing the label",
}
COLOURS = dict(zip(LABELS, ("#d55e00", "#0072b2", "#009e73", "#999999", "#cc79a7", "#000000")))


def run(trial: Trial) -> None:
    for arm in trial.arms(*LABELS):
        policy, parts = trial.shared("ensemble", lambda: trained("omics", trial))
        spent, table = policy.spent(), policy.costs(parts[1].x)
        gate = Pooled(MaxProb()) if arm.name == "max_prob" else Spread()
        asked = ask(policy, gate, *parts)
        stages = len(spent)
        right = asked.correct[1]
        flops = table.tensor().double() / 1e6
        if arm.name == "compute":
            members = asked.readouts[1].shape[2]
            tries = [asked.readouts[1][:, 0, :m] for m in range(1, members + 1)]
            accuracy = [float((vote(t).argmax(1) == asked.y[1]).double().mean()) for t in tries]
            price = [float(spent[0])] * members
            cost = [float(flops[0]) * m / members for m in range(1, members + 1)]
            arm.log(auc=float(np.mean(accuracy)))
        else:
            choices = chosen(arm.name, asked, spent, trial)
            points = [torch.zeros(len(right), dtype=torch.int64), *choices, torch.full((len(right),), stages - 1)]
            rows = sorted((float(spent[c].mean()), float(right.gather(1, c[:, None]).mean()), float(flops[c].mean())) for c in points)
            price, accuracy, cost = (list(column) for column in zip(*rows))
            grid = np.linspace(float(spent[0]), float(spent[-1]), 101)
            arm.log(auc=float(np.interp(grid, *mean_by_price(price, accuracy)).mean()))
        arm.curve("points", x=price, y=accuracy)
        arm.curve("flops", x=cost, y=accuracy)
        best = int(np.argmax(accuracy))
        arm.log(best_accuracy=accuracy[best], best_price=price[best], best_mflops=cost[best])
        middle = float(spent[0] + spent[-1]) / 2
        at = accuracy[-1] if arm.name == "compute" else float(np.interp(middle, *mean_by_price(price, accuracy)))
        arm.log(accuracy_at_half=at, price=float(np.mean(price)), accuracy=float(np.mean(accuracy)))


def chosen(name: str, asked: Asked, spent: Tensor, trial: Trial) -> list[Tensor]:
    """Where the test rows stop, at each setting of an arm."""
    held, tested = asked.correct
    stages = len(spent)
    if name == "oracle":
        return [torch.where(tested.any(1), tested.argmax(1), 0)]
    if name == "random":  # each row goes on with the same probability
        draw = torch.rand(len(tested), stages - 1)
        return [(draw < p).long().cumprod(1).sum(1) for p in np.linspace(0.1, 0.9, 9).tolist()]
    scores = asked.scores
    if name == "learned":
        tried = [learned(asked, spent, tradeoff, trial) for tradeoff in TRADEOFFS]
        scores = max(tried, key=lambda s: float(calibrate(s[0], held).accuracy.mean()))
    curve = calibrate(scores[0], held)
    return [pick(asked.readouts[1], scores[1].double(), tau)[1] for tau in curve.tau[1:-1]]


def learned(asked: Asked, spent: Tensor, tradeoff: float, trial: Trial) -> tuple[Tensor, Tensor]:
    """Scores of the validation and the test rows by a gate that imitates the best stage of the validation rows."""
    held, tested = (torch.stack([pooled(stage) for stage in r.unbind(1)], 1) for r in asked.readouts)
    gate = LearnedGate(len(spent) - 1)
    badness = -held.gather(-1, asked.y[0].view(-1, 1, 1).expand(-1, held.shape[1], 1)).squeeze(-1)
    targets = gate_targets(badness, spent / spent[-1], tradeoff).to(held)
    ones = targets.sum(0)
    weight = (len(targets) - ones + 1) / (ones + 1)
    optimizer = Adam(gate.parameters(), lr=0.05, weight_decay=1e-3)
    for _ in range(trial.scale(smoke=5, laptop=STEPS)):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(gate.logits(held), targets, pos_weight=weight).backward()
        optimizer.step()
    with torch.no_grad():
        return gate_scores(gate, held), gate_scores(gate, tested)


def gate_scores(gate: LearnedGate, readouts: Tensor) -> Tensor:
    """``(n, stages, classes) -> (n, stages - 1)``."""
    scores, memory = [], None
    for k in range(readouts.shape[1] - 1):
        score, memory = gate(k, readouts[:, k], memory)
        scores.append(score)
    return torch.stack(scores, 1)


def mean_by_price(price: list[float], accuracy: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Points of one price as their mean, in order."""
    known, inverse = np.unique(np.round(price, 9), return_inverse=True)
    return known, np.bincount(inverse, accuracy) / np.bincount(inverse)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy for data, and for computing."""
    fig.set_size_inches(11, 5)
    left, right = fig.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    for ax, name, label in ((left, "points", "views bought a row"), (right, "flops", "MFLOPs a row")):
        for arm in record.arms:
            curves = record.curves(arm, name)
            for i, (x, y) in enumerate(curves):
                line = arm != "oracle" and (arm != "compute" or name == "flops")
                marker = {"oracle": "*", "compute": "s"}.get(arm)
                ax.plot(
                    x, y, color=COLOURS[arm], lw=1.1 if line else 0, alpha=0.75, marker=marker, ms=4, label=LABELS[arm] if i == 0 else None
                )
        ax.set_xlabel(label)
        ax.grid(alpha=0.25)
    left.set(ylabel="test accuracy", title="What data buys")
    right.set_title("What the same rows cost in computing")
    left.legend(fontsize=8, loc="lower right")
