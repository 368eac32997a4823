"""What is left of a saving when the inputs are chosen by an adversary?

One task, five mechanisms that decide from the input, and as a control a family whose configuration is fixed by a budget. Those that take a
budget get half of their own full cost; channels by input and experts spend what their own rule says (the experts are a small part of their
network, so little is saved). Each is then attacked twice: inputs that make it compute more, and inputs on which everything cheap is wrong
while the dearest readout says what it said before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.dynamic.attacks import early_attack, hesitation, pgd
from neurarium.dynamic.backbones import BackboneS, VisionTransformerS
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.exits import EarlyExit, ExitChain
from neurarium.dynamic.lora_experts import DynMoLE, auxiliary_loss, mole_transform, tsallis_entropy
from neurarium.dynamic.train import cached, fit_policy
from neurarium.experiments.dynamic.zoo import mnist, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.data import ImageTask
    from neurarium.lab import RecordView, Trial

EPS, SHARE, LR = 0.1, 0.5, 5e-3
LABELS = {
    "exits": "exits, one threshold", "jei": "exits, learned gates", "channels": "channels by input",
    "channels_fixed": "channels, fixed counts", "experts": "experts by token", "family": "family by budget",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#555555")))


@dataclass(frozen=True)
class Target:
    """What the attacks need to know of a mechanism.

    Attributes:
        decide: inputs to the answers' logits and the FLOPs of every row.
        readouts: inputs to all readouts, the dearest last.
        effort: inputs to ``(n,)``, differentiable, large where much is computed.
        full: FLOPs of a row for which nothing is saved.
    """

    module: nn.Module
    decide: Callable[[Tensor], tuple[Tensor, Tensor]]
    readouts: Callable[[Tensor], list[Tensor]]
    effort: Callable[[Tensor], Tensor]
    full: int


def run(trial: Trial) -> None:
    task = mnist(trial, train=3000, test=1000, size=14, standardise=False)
    rows, early, steps = trial.scale(smoke=(20, 5, 2), laptop=(200, 48, 10))
    x, y = task.test.x[:rows].to(trial.device), task.test.y[:rows].to(trial.device)

    def plain() -> BackboneS:
        model = BackboneS(task.train.x.shape[1], task.classes).to(trial.device)
        return train(model, batches(task, trial), epochs=epochs(trial), lr=LR, seed=trial.seed)

    def with_channels() -> Any:
        return channels(task, trial, trial.shared("plain", plain))

    for arm in trial.arms(*LABELS):
        if arm.name == "exits":
            target = exits(task, trial)
        elif arm.name == "jei":
            target = learned_gates(task, trial, trial.shared("plain", plain))
        elif arm.name == "experts":
            target = experts(task, trial)
        elif arm.name == "family":
            target = family(task, trial)
        else:
            target = channel_target(trial.shared("channels", with_channels), x, fixed=arm.name == "channels_fixed")
        said, cost = answer(target, x)
        slow = pgd(
            target.effort, x, None, eps=EPS, step=EPS / 4, steps=steps, loss=lambda out, _: out, clip=(0.0, 1.0), module=target.module
        )
        noise = EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(trial.seed)).sign().to(x)
        (slowed, attacked), (blurred, noisy) = answer(target, slow), answer(target, (x + noise).clamp(0, 1))
        saved = target.full * len(x) - int(cost.sum())
        arm.log(
            cost=float(cost.double().mean()) / target.full,
            cost_attacked=float(attacked.double().mean()) / target.full,
            inflation=float(attacked.sum() / cost.sum()),
            inflation_noise=float(noisy.sum() / cost.sum()),
            saving_lost=int(attacked.sum() - cost.sum()) / saved if saved else 0.0,
            accuracy=accuracy(said, y),
            accuracy_loss=accuracy(said, y) - accuracy(slowed, y),
            accuracy_loss_noise=accuracy(said, y) - accuracy(blurred, y),
        )
        found = early_attack(target.readouts, x[:early], steps=trial.scale(smoke=5, laptop=200))
        with torch.no_grad():
            kept = target.readouts(found.x)[-1].argmax(1) == found.label
        wrong = answer(target, found.x)[0].argmax(1) != found.label
        arm.log(early_success=found.rate, early_seen=float((wrong & kept).double().mean()))


@torch.no_grad()
def answer(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    return target.decide(x)


def accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def epochs(trial: Trial) -> int:
    return trial.scale(smoke=1, laptop=3)


def batches(task: ImageTask, trial: Trial) -> Any:
    return task.train.to(trial.device).batches(64, seed=trial.seed)


def fit(policy: Any, task: ImageTask, trial: Trial, n: int, lr: float = LR, loader: Any = None) -> None:
    loader = batches(task, trial) if loader is None else loader
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=n * len(loader))
    fit_policy(policy, loader, epochs=n, optimizer=partial(AdamW, lr=lr), schedule=schedule, seed=trial.seed)
    policy.eval()


def held_out(task: ImageTask, trial: Trial) -> list[tuple[Tensor, Tensor]]:
    """Rows for calibration that are not attacked."""
    part = task.test.to(trial.device)
    return [(part.x[len(part) // 2 :], part.y[len(part) // 2 :])]


def decided(policy: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    outcome = policy.decide(x)
    return outcome.output, outcome.cost


def early_exits(policy: EarlyExit, x: Tensor) -> Target:
    full = policy.costs(x).full
    policy.use(x, budget=SHARE * full)

    return Target(policy, partial(decided, policy), policy.outputs, lambda z: hesitation(policy.outputs(z)), full)


def exits(task: ImageTask, trial: Trial) -> Target:
    policy = EarlyExit(BackboneS(task.train.x.shape[1], task.classes).to(trial.device))
    fit(policy, task, trial, epochs(trial))
    policy.calibrate(held_out(task, trial))
    return early_exits(policy, task.test.x[:2].to(trial.device))


def learned_gates(task: ImageTask, trial: Trial, plain: BackboneS) -> Target:
    from neurarium.dynamic.jei import JEIDNN

    last = plain.heads[-1]
    heads = [
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(4 * w, affine=False), nn.Linear(4 * w, task.classes))
        for w in (16, 32, 48)
    ]
    x = task.train.x[:2].to(trial.device)
    policy = JEIDNN(ExitChain(list(plain.segments), [*heads, last]).to(trial.device), tradeoff=0.5, alternate=16, warmup_epochs=1)
    policy.costs(x)
    with cached(policy, x) as features:
        fit(policy, task, trial, 2 * epochs(trial), loader=features.collect(batches(task, trial)).batches(64, seed=trial.seed))
    policy.calibrate(held_out(task, trial))
    return early_exits(policy, x)


def channels(task: ImageTask, trial: Trial, plain: BackboneS) -> Any:
    from neurarium.dynamic.channel import FTWT

    net = nn.Sequential(*[layer for segment in plain.segments for layer in segment], plain.heads[-1])
    policy = FTWT(net, mass=0.7, granularity=4, whole_below=1).to(trial.device)
    fit(policy, task, trial, epochs(trial), lr=2e-3)
    policy.calibrate(held_out(task, trial))
    return policy


def channel_target(policy: Any, x: Tensor, *, fixed: bool) -> Target:
    full = policy.full(x)
    if fixed:
        policy.use(x, budget=SHARE * full)

    def attached(z: Tensor, mode: str) -> tuple[Tensor, Any]:
        joint, policy.plan.joint = policy.plan.joint, True  # the attack sees through what training keeps apart
        try:
            return policy._pass(z, mode, seen={})
        finally:
            policy.plan.joint = joint

    def effort(z: Tensor) -> Tensor:
        seen = attached(z, "masked")[1].seen
        return torch.cat([(4 * seen[name][0]).sigmoid() for name in policy.dynamic], 1).mean(1)  # steep: what counts is who is on

    return Target(policy, partial(decided, policy), lambda z: [attached(z, mode)[0] for mode in ("masked", "dense")], effort, full)


def family(task: ImageTask, trial: Trial) -> Target:
    from neurarium.dynamic.sorted import SortedNet

    plain = BackboneS(task.train.x.shape[1], task.classes)
    net = nn.Sequential(*[layer for segment in plain.segments for layer in segment], plain.heads[-1])
    x = task.train.x[:4]
    policy = SortedNet(net, x, widths=(0.25, 0.5, 0.6875, 1.0), seed=trial.seed).to(trial.device)
    fit(policy, task, trial, epochs(trial))
    x, full = x.to(trial.device), int(policy.prices(x).max())
    policy.use(x, budget=SHARE * full)

    return Target(policy, partial(decided, policy), policy.outputs, lambda z: hesitation(policy.outputs(z)), full)


def experts(task: ImageTask, trial: Trial) -> Target:
    """A vision transformer, frozen after training, with routed experts: all of them where the router is unsure."""
    base = VisionTransformerS(1, 14, 7, width=32, depth=3, classes=task.classes).to(trial.device)
    train(base, batches(task, trial), epochs=epochs(trial), lr=3e-3, seed=trial.seed)
    model = mole_transform(base, ("q", "v", "up", "down"), experts=4, rank=4, alpha=8.0, dispatch="dense")
    model.head.requires_grad_(True)
    loader = batches(task, trial)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    schedule = OneCycleLR(optimizer, max_lr=LR, total_steps=len(loader))
    model.train()
    for a, b in loader:
        optimizer.zero_grad()
        (F.cross_entropy(model(a), b) + auxiliary_loss(model)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, DynMoLE)]

    def costs() -> Tensor:
        return torch.stack([m.last_cost.sum(1) for m in layers]).sum(0)

    x = task.train.x[:2].to(trial.device)
    full = CostTable.measure([model], x).full  # dense: all experts
    with torch.no_grad():
        model(x[:1])
    rest = full - int(costs())

    def decide(z: Tensor) -> tuple[Tensor, Tensor]:
        for m in layers:
            m.dispatch = "sparse"
        try:
            out = model(z)
            return out, rest + costs()
        finally:
            for m in layers:
                m.dispatch = "dense"

    def effort(z: Tensor) -> Tensor:
        model(z)
        return torch.stack([tsallis_entropy(m.last_probabilities, m.entropic_index).mean(1) for m in layers]).mean(0)

    everything = copy.deepcopy(model)
    for m in everything.modules():
        if isinstance(m, DynMoLE):
            m.entropy_threshold = -float("inf")
    return Target(model, decide, lambda z: [model(z), everything(z)], effort, full)


def figure(record: RecordView, fig: Figure) -> None:
    """Cost before and after, accuracy before and after, and the early attack."""
    fig.set_size_inches(11, 4.6)
    cost, right, early = fig.subplots(1, 3)
    arms = [a for a in LABELS if a in record.arms]
    for i, arm in enumerate(arms):
        for ax, clean, attacked in (
            (cost, record.values(arm, "cost"), record.values(arm, "cost_attacked")),
            (right, record.values(arm, "accuracy"), record.values(arm, "accuracy") - record.values(arm, "accuracy_loss")),
        ):
            ax.plot([clean.mean(), attacked.mean()], [i, i], color=COLOURS[arm], lw=2)
            ax.errorbar(clean.mean(), i, xerr=clean.std(), color=COLOURS[arm], marker="o", mfc="white", ms=8, capsize=2)
            ax.errorbar(attacked.mean(), i, xerr=attacked.std(), color=COLOURS[arm], marker="o", ms=8, capsize=2)
        for shift, metric, alpha in ((-0.18, "early_success", 1.0), (0.18, "early_seen", 0.45)):
            v = record.values(arm, metric)
            early.barh(i + shift, v.mean(), 0.34, xerr=v.std(), color=COLOURS[arm], alpha=alpha, capsize=2)
    for ax in (cost, right, early):
        ax.set_yticks(range(len(arms)), [LABELS[a] for a in arms] if ax is cost else [])
        ax.invert_yaxis()
        ax.grid(alpha=0.25, axis="x")
    cost.set(xlabel="FLOPs a row / full", title="Cost: clean ○, slowed down ●", xlim=(0, 1.02))
    right.set(xlabel="accuracy", title="Accuracy: clean ○, slowed down ●")
    early.set(xlabel="share of rows", title="Early attack: cheap readouts wrong,\nlight: the answer given as well", xlim=(0, 1))
    fig.tight_layout()
