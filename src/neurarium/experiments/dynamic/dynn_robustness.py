"""Is a network that stops early easier to attack than its static twin?

Arms are networks of one architecture: ``static``; ``joint``, all exits trained together; ``ic_only``, exits trained on the frozen static
network; ``late``, joint training without the first exit. Each is attacked together with ``static``, on the rows that both get right.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.dynamic.attacks import slowdown
from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.exits import EarlyExit, ExitChain
from neurarium.dynamic.robustness import dynn_robustness, transfer
from neurarium.dynamic.train import cached, fit_policy
from neurarium.experiments.dynamic.zoo import mnist, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.data import ImageTask
    from neurarium.lab import RecordView, Trial

EPS = (0.05, 0.1, 0.2)  # pixels lie in [0, 1]
THRESHOLD = 0.9  # leave where the largest probability reaches it
SWEEP = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 2.0)
LR, EPOCHS = 5e-3, 4

LABELS = {"static": "static", "joint": "exits, trained jointly", "ic_only": "exits on the frozen network", "late": "joint, no first exit"}
COLOURS = {"static": "#555555", "joint": "#d55e00", "ic_only": "#0072b2", "late": "#009e73"}


def run(trial: Trial) -> None:
    task = mnist(trial, train=4000, test=500, size=14, standardise=False)
    test, steps = task.test.to(trial.device), trial.scale(smoke=2, laptop=10)
    rows, early = trial.scale(smoke=(30, 6), laptop=(250, 128))
    data = x, y = test.x[:rows], test.y[:rows]

    def plain() -> nn.Module:
        batches = task.train.to(trial.device).batches(64, seed=trial.seed)
        return train(network(task, trial), batches, epochs=EPOCHS, lr=LR, seed=trial.seed)

    for arm in trial.arms("static", "joint", "ic_only", "late"):
        static = trial.shared("static", plain)
        if arm.name == "static":
            own = [transfer(static, static, data, eps=e, steps=steps) for e in EPS]
            success, price = [r.success for r in own], [r.flops_per_success for r in own]
            arm.log(success_static=success, success_dynamic=success, static_to_dynamic=success, dynamic_to_static=success)
            arm.log(flops_static=price, flops_dynamic=price, inflation=[1.0] * len(EPS), slowed_accuracy=[1.0] * len(EPS))
            arm.log(early_success=0.0, early_kept=1.0, early_seen=0.0, noise_success=0.0, cost=1.0, gap=0.0)  # there are no early readouts
            arm.log(accuracy=accuracy(static, x, y))
            continue
        policy = fit(arm.name, static, task, trial)
        attack = {"steps": trial.scale(smoke=3, laptop=300)}
        report = dynn_robustness(policy, static, data, eps=EPS, steps=steps, early_rows=early, early=attack)
        full = policy.costs(x).full
        arm.log(
            accuracy=accuracy(policy, x, y), cost=report.cost / full, inflation=report.inflation, slowed_accuracy=report.accuracy_attacked
        )
        arm.log(**{
            name: getattr(report, name)
            for name in (
                "success_static", "success_dynamic", "static_to_dynamic", "dynamic_to_static", "flops_static", "flops_dynamic",
                "early_success", "early_kept", "early_seen", "early_norm", "noise_success",
            )
        })  # fmt: skip
        arm.log(gap=float(np.mean(report.dynamic_to_static) - np.mean(report.static_to_dynamic)))
        arm.grid("exits", torch.cat([report.exit_clean[None], report.exit_robust]).numpy())
        slowed = slowdown(policy, x, eps=EPS[1], steps=steps).x
        for name, images in (("clean", x), ("slowed", slowed)):
            arm.curve(name, *sweep(policy, images, y, full))


def network(task: ImageTask, trial: Trial) -> BackboneS:
    return BackboneS(task.train.x.shape[1], task.classes).to(trial.device)


def fit(name: str, static: nn.Module, task: ImageTask, trial: Trial) -> EarlyExit:
    """The policy of an arm, with as many steps on the same rows as the static network had."""
    batches = task.train.to(trial.device).batches(64, seed=trial.seed)
    schedule = partial(OneCycleLR, max_lr=LR, total_steps=EPOCHS * len(batches))
    learn = partial(fit_policy, epochs=EPOCHS, optimizer=partial(AdamW, lr=LR), schedule=schedule, seed=trial.seed)
    if name == "ic_only":
        policy = EarlyExit(copy.deepcopy(static), threshold=THRESHOLD, frozen=True)
        with cached(policy, task.train.x[:2].to(trial.device)) as features:
            learn(policy, features.collect(batches).batches(64, seed=trial.seed))
    else:
        chain: ExitChain = network(task, trial)
        if name == "late":
            first, second, *rest = chain.segments
            chain = ExitChain([nn.Sequential(first, second), *rest], list(chain.heads[1:]))
        policy = EarlyExit(chain, threshold=THRESHOLD)
        learn(policy, batches)
    return policy.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def sweep(policy: EarlyExit, x: Tensor, y: Tensor, full: int) -> tuple[list[float], list[float]]:
    """Cost (of the full one) and accuracy at rising thresholds."""
    found = [policy.decide(x, threshold=t) for t in SWEEP]
    return [float(o.cost.double().mean()) / full for o in found], [float((o.output.argmax(1) == y).double().mean()) for o in found]


def figure(record: RecordView, fig: Figure) -> None:
    """Transfer both ways, the early attack by design, and accuracy against cost with and without the slow-down."""
    fig.set_size_inches(11, 7.5)
    axes = fig.subplots(2, 2)
    dynamic = [a for a in ("joint", "ic_only", "late") if a in record.arms]
    ax = axes[0, 0]
    for arm in dynamic:
        for metric, style, text in (("static_to_dynamic", "-", "static → dynamic"), ("dynamic_to_static", "--", "dynamic → static")):
            v = record.values(arm, metric)
            ax.errorbar(EPS, v.mean(0), v.std(0), color=COLOURS[arm], ls=style, marker="o", ms=4, capsize=2, label=f"{LABELS[arm]}: {text}")
    ax.set(xlabel="eps (pixels in [0, 1])", ylabel="share of rows that fools both", title="Transfer of attacks")
    ax.legend(fontsize=7)
    ax = axes[0, 1]
    metrics = {"early_success": "early attack", "early_seen": "… and the answer given is wrong", "noise_success": "noise of the same norm"}
    for i, (metric, label) in enumerate(metrics.items()):
        v = [record.values(a, metric) for a in dynamic]
        ax.bar(
            np.arange(len(dynamic)) + 0.27 * (i - 1), [w.mean() for w in v], 0.25, yerr=[w.std() for w in v], capsize=2, label=label,
            color=("#d55e00", "#e69f00", "#999999")[i],
        )  # fmt: skip
    ax.set_xticks(range(len(dynamic)), [LABELS[a] for a in dynamic], fontsize=8)
    ax.set(ylabel="share of rows", ylim=(0, 1), title="All early readouts wrong, final label kept")
    ax.legend(fontsize=8)
    ax = axes[1, 0]
    for arm in dynamic:
        for name, style in (("clean", "-"), ("slowed", ":")):
            curves = record.curves(arm, name)
            x, y = (np.mean([np.asarray(c[i]) for c in curves], 0) for i in (0, 1))
            ax.plot(x, y, style, color=COLOURS[arm], marker=".", label=f"{LABELS[arm]}, {'clean' if name == 'clean' else 'slowed down'}")
    ax.set(
        xlabel="mean FLOPs a row / full network", ylabel="accuracy", title=f"Thresholds {SWEEP[0]:g} to never, slow-down at eps {EPS[1]:g}"
    )
    ax.legend(fontsize=7)
    ax = axes[1, 1]
    for arm in dynamic:
        ratio = record.values(arm, "flops_dynamic") / record.values(arm, "flops_static")
        ax.errorbar(EPS, ratio.mean(0), ratio.std(0), color=COLOURS[arm], marker="o", ms=4, capsize=2, label=LABELS[arm])
    ax.axhline(1, color=COLOURS["static"], lw=1)
    ax.set(xlabel="eps", ylabel="FLOPs per fooled row: dynamic / static", title="Price of an attack", ylim=(0, None))
    ax.legend(fontsize=8)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    fig.tight_layout()
