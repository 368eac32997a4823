"""Buying views one by one where an ensemble disagrees, against buying all of them.

Two tasks. *omics*: generated patients of two classes in three blocks of 200 features; for each patient and block the signal is missing with
probability 0.35, so that who needs more data is a property of the patient. *digits*: scikit-learn's digits seen as row and column
profiles, as pixels and as Fourier magnitudes, 400 to train on. Views are standardised on the training rows. One trained ensemble a task
serves all arms; the order of the views, the thresholds and the epochs owe nothing to the test rows.

``accuracy``, ``price`` (views bought a row), ``share`` (of rows that stop at each stage), and ``auroc``: how well the score of the first
question ranks rows that the first view gets wrong before the others. Lists have the values of *omics*, then of *digits*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neurarium import data
from neurarium.data import ViewData
from neurarium.dynamic.acquisition import SGUQ, search
from neurarium.dynamic.ensemble import Pooled, vote
from neurarium.dynamic.gates import Gate, MaxProb, Spread
from neurarium.dynamic.staged import dense, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TASKS = ("omics", "digits")
LABELS = {
    "all_views": "all views for everybody",
    "first_view": "the first view alone",
    "sguq": "SGUQ: spread of the ensemble",
    "max_prob": "largest probability instead",
    "random": "same shares, random rows",
}
COLOURS = dict(zip(LABELS, ("#000000", "#999999", "#d55e00", "#0072b2", "#cc79a7")))


@dataclass(frozen=True)
class Asked:
    """What an ensemble says about the validation and the test rows, and how sure a gate is of it."""

    readouts: tuple[Tensor, Tensor]  # (n, stages, members, classes)
    scores: tuple[Tensor, Tensor]  # (n, stages - 1)
    answers: tuple[Tensor, Tensor]  # (n, stages) class numbers
    y: tuple[Tensor, Tensor]

    @property
    def correct(self) -> tuple[Tensor, Tensor]:
        held, tested = ((a == y[:, None]).double() for a, y in zip(self.answers, self.y))
        return held, tested


def run(trial: Trial) -> None:
    for arm in trial.arms(*LABELS):
        logged: list[dict[str, Any]] = []
        for name in TASKS:
            policy, parts = trial.shared(name, lambda name=name: trained(name, trial))
            gate = Pooled(MaxProb()) if arm.name == "max_prob" else Spread()
            asked = ask(policy, gate, *parts)
            spent = policy.spent()
            tau = search(asked.scores[0].double(), asked.correct[0], spent)
            if arm.name == "all_views":
                tau = torch.full_like(tau, float("inf"))
            elif arm.name == "first_view":
                tau = torch.full_like(tau, float("-inf"))
            choice = pick(asked.readouts[1], asked.scores[1].double(), tau)[1]
            if arm.name == "random":
                choice = choice[torch.randperm(len(choice))]
            logged.append(judge(asked, choice, spent))
        arm.log(**{key: [value for one in logged for value in one[key]] for key in logged[0]})
        if arm.name == "sguq":
            for name in TASKS:
                policy, parts = trial.shared(name, lambda name=name: trained(name, trial))
                asked = ask(policy, Spread(), *parts)
                curve(arm, name, policy, asked)
                arm.log(**{f"order_{name}": list(policy.staged.order), f"stage_accuracy_{name}": asked.correct[1].mean(0).tolist()})


def trained(name: str, trial: Trial) -> tuple[SGUQ, tuple[ViewData, ViewData]]:
    """The ensemble of a task, with its validation and its test rows."""
    smoke = trial.name == "smoke"
    if name == "omics":
        rows = data.multi_omics(
            trial.scale(smoke=200, laptop=1351), trial.scale(smoke=(20, 20, 20), laptop=(200, 200, 200)), seed=trial.seed
        )
        sizes = (80, 40) if smoke else (245, 106)
    else:
        rows, sizes = data.digit_views(), (100, 60) if smoke else (400, 200)
    parts = rows.split(*sizes, seed=trial.seed)
    train, val, test = parts[0].standardise(*parts[1:])
    # 10 x 10 x 10 products: a hidden layer of that size would cost more than everything else together.
    options = {"members": 3, "hidden": (8, 8), "fusion_width": 4} if smoke else {"members": 5, "hidden": (64, 64, 32)}
    if name == "digits":
        options["fusion_width"] = trial.scale(smoke=4, laptop=32)
    policy = SGUQ(rows.dims, int(rows.y.max()) + 1, **options)  # type: ignore[arg-type]
    policy.to(trial.device)
    train, val, test = (ViewData(tuple(v.to(trial.device) for v in p.x), p.y.to(trial.device)) for p in (train, val, test))
    policy.fit(train.x, train.y, val=(val.x, val.y), epochs=trial.scale(smoke=(2, 3), laptop=EPOCHS[name]), seed=trial.seed)
    return policy.eval(), (val, test)


EPOCHS = {"omics": (150, 300), "digits": (100, 150)}


@torch.no_grad()
def ask(policy: SGUQ, gate: Gate, val: ViewData, test: ViewData) -> Asked:
    said = [dense(policy.staged, gate, part.x) for part in (val, test)]
    readouts, scores = ((a.cpu(), b.cpu()) for a, b in zip(*said))
    answers = tuple(torch.stack([vote(r).argmax(1) for r in out.unbind(1)], 1) for out in readouts)
    return Asked(readouts, scores, answers, (val.y.cpu(), test.y.cpu()))


def judge(asked: Asked, choice: Tensor, spent: Tensor) -> dict[str, list[float]]:
    correct = asked.correct[1]
    return {
        "accuracy": [float(correct.gather(1, choice[:, None]).mean())],
        "price": [float(spent[choice].mean())],
        "share": torch.bincount(choice, minlength=len(spent)).double().div(len(choice)).tolist(),
        "auroc": [auroc(1 - asked.scores[1][:, 0], 1 - correct[:, 0])],
    }


def auroc(score: Tensor, positive: Tensor) -> float:
    """The probability that a positive row has the larger score, ties counted half; 1/2 where all rows are of one kind."""
    yes, no = score[positive > 0.5], score[positive < 0.5]
    if not len(yes) or not len(no):
        return 0.5
    more, same = yes[:, None] > no, yes[:, None] == no
    return float((more.double() + 0.5 * same.double()).mean())


def curve(arm: Any, name: str, policy: SGUQ, asked: Asked) -> None:
    """Test accuracy against the mean price, along the thresholds of the calibrated curve."""
    assert policy.curve is not None
    spent, correct = policy.spent(), asked.correct[1]
    points = []
    for tau in policy.curve.tau.cpu():
        choice = pick(asked.readouts[1], asked.scores[1].double(), tau)[1]
        points.append((float(spent[choice].mean()), float(correct.gather(1, choice[:, None]).mean())))
    points = sorted(set(points))
    arm.curve(name, x=[p[0] for p in points], y=[p[1] for p in points])


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against views bought, with who stops where, for both tasks."""
    fig.set_size_inches(11, 6.5)
    axes = fig.subplots(2, 2, gridspec_kw={"height_ratios": (2.2, 1), "hspace": 0.32, "wspace": 0.2, "bottom": 0.15})
    for column, name in enumerate(TASKS):
        ax, bars = axes[0, column], axes[1, column]
        if "sguq" in record.arms:
            for x, y in record.curves("sguq", name):
                ax.plot(x, y, color=COLOURS["sguq"], lw=0.7, alpha=0.45)
        for arm in record.arms:
            price, accuracy = record.values(arm, "price")[:, column], record.values(arm, "accuracy")[:, column]
            ax.errorbar(
                price.mean(), accuracy.mean(), xerr=price.std(), yerr=accuracy.std(), fmt="o", ms=8, capsize=3, color=COLOURS[arm],
                label=LABELS[arm],
            )  # fmt: skip
        ax.set(xlabel="views bought a row", ylabel="test accuracy", title=f"{name}: what a view buys")
        ax.grid(alpha=0.25)
        if column == 0:
            ax.legend(fontsize=8, loc="lower right")
        shown = [a for a in ("sguq", "max_prob") if a in record.arms]
        for i, arm in enumerate(shown):
            left = 0.0
            share = record.values(arm, "share")[:, 3 * column : 3 * column + 3].mean(0)
            for k, colour in zip(range(3), ("#fde725", "#21918c", "#440154")):
                bars.barh(i, share[k], left=left, color=colour, edgecolor="white", label=f"{k + 1} view{'s' * (k > 0)}" if i == 0 else None)
                left += float(share[k])
        bars.set_yticks(range(len(shown)), [{"sguq": "spread", "max_prob": "max. prob."}[a] for a in shown])
        bars.set(xlim=(0, 1), xlabel="share of test rows")
        bars.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.32), frameon=False)
