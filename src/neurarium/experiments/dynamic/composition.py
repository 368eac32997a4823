"""Four papers on one network: exits, on a network cut out of a sorted family, in tiles, with 8 bits.

A network of inverted residuals is trained on CIFAR-10 as a family of four nested widths. Each arm adds one method to the one before it:

- ``whole``: the widest network of the family, layer by layer, float32;
- ``sorted``: SortedNet's choice for a budget of 60 % of its FLOPs;
- ``exits``: that network with two exits, whose heads and gates JEI-DNN trains on it as it is, calibrated for 75 % of its FLOPs;
- ``tiles``: the same policy, its first segment run in tiles;
- ``bits``: the same policy with 8 bits for weights and maps, also between the segments.

Measured in every arm: accuracy on test images, FLOPs by a counter around ``decide`` and the cost that the policy charges (their difference
must be nothing), the peak of all allocations of one image that runs to the end, bits of a stored value.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.exits import EarlyExit, ExitChain, with_exits
from neurarium.dynamic.jei import JEIDNN
from neurarium.dynamic.live import trace_memory
from neurarium.dynamic.mobile import Block, MobileConfig, mobile_net
from neurarium.dynamic.patch import patch_inference
from neurarium.dynamic.quantised import CodedChain, quantise
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.train import fit_policy
from neurarium.experiments.dynamic import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

NET = MobileConfig(24, (Block(1, 24), Block(3, 32, 2), Block(3, 32), Block(3, 64, 2), Block(3, 64)), 0, 10)
WIDTHS = (0.25, 0.5, 0.75, 1.0)
BUDGET, EXIT_BUDGET = 0.6, 0.75
STACK = {"whole": "whole network", "sorted": "+ sorted family", "exits": "+ exits", "tiles": "+ tiles", "bits": "+ 8 bits"}


def run(trial: Trial) -> None:
    def task() -> Any:
        return zoo.cifar(trial, train=3_500, test=1_500)

    def parts() -> tuple[Any, Any]:
        return trial.shared("task", task).train.split(trial.scale(smoke=300, laptop=3_000), seed=trial.seed)

    def family() -> SortedNet:
        train = parts()[0]
        policy = SortedNet(mobile_net(NET), train.x[:2], widths=WIDTHS, accumulate=2, seed=trial.seed)
        _fit(policy, train, trial.scale(smoke=1, laptop=4), trial)
        return policy

    def exits() -> EarlyExit:
        policy, (train, held) = trial.shared("family", family), parts()
        prices = policy.prices(train.x[:1])
        chosen = policy.configs[policy.pick(train.x[:1], budget=BUDGET * int(prices.max()))]
        staged = with_exits(policy.family.extract(chosen).eval(), train.x[:2], cuts=["2", "4"])
        early = JEIDNN(staged, tradeoff=0.5, alternate=max(1, len(train) // 400), warmup_epochs=1)
        _fit(early, train, trial.scale(smoke=2, laptop=4), trial)
        early.calibrate(held.batches(500, shuffle=False))
        return early.use(held.x[:1], budget=EXIT_BUDGET * early.costs(held.x[:1]).full)

    for arm in trial.arms(*STACK):
        test, (train, _) = trial.shared("task", task).test, parts()
        if arm.name in ("whole", "sorted"):
            policy: Any = trial.shared("family", family)
            prices = policy.prices(test.x[:1])
            policy.use(test.x[:1], budget=float(prices.max()) * (1 if arm.name == "whole" else BUDGET))
            alone = patch_inference(policy.family.extract(policy.configs[policy.setting]).eval(), test.x[:1], split=0)
            with torch.no_grad():
                memory = trace_memory(alone, test.x[:1])
        else:
            policy = _composed(trial.shared("exits", exits), arm.name, train.x[:128])
            policy.costs(test.x[:1])  # prices are measured once, before anything is traced
            with torch.no_grad():
                memory = trace_memory(partial(policy.decide, threshold=2.0), test.x[:1])
        arm.log(**_measured(policy, test), peak_bytes=memory.peak, bits=8 if arm.name == "bits" else 32)


def _fit(policy: Any, train: Any, epochs: int, trial: Trial) -> None:
    batches = train.batches(100, seed=trial.seed)
    schedule = partial(OneCycleLR, max_lr=1e-2, total_steps=epochs * len(batches))
    fit_policy(policy, batches, epochs=epochs, optimizer=partial(AdamW, lr=1e-2), schedule=schedule, seed=trial.seed)
    policy.eval()


def _composed(policy: EarlyExit, stack: str, images: Tensor) -> EarlyExit:
    """The same exits and thresholds; segments layer by layer, the first in tiles, or all of them in codes of 8 bits."""
    segments, heads, x = [], policy.staged.heads, images  # type: ignore[attr-defined]
    with torch.no_grad():
        for k, segment in enumerate(policy.staged.segments):  # type: ignore[attr-defined]
            patched = patch_inference(segment, x, patches=(2, 2), split="auto" if stack != "exits" and k == 0 else 0)
            if stack == "bits":
                if not patched.split:  # one tile: the codes of the whole maps
                    local = patched.graph.local()
                    patched = patch_inference(segment, x, patches=(1, 1), split=sum(end < local for _, end in patched.graph.blocks))
                segments.append(quantise(patched, x, 8))
            else:
                segments.append(patched)
            x = segment(x)
    staged: nn.Module = CodedChain(segments, list(heads)) if stack == "bits" else ExitChain(segments, copy.deepcopy(list(heads)))
    composed = EarlyExit(staged, copy.deepcopy(policy.gate)).eval()
    composed.tau.copy_(policy.tau)
    return composed


@torch.no_grad()
def _measured(policy: Any, test: Any) -> dict[str, float]:
    """On the test images, at the policy's own setting."""
    policy.costs(test.x[:1])
    right, counted, charged, left = 0, 0, 0, 0.0
    for x, y in test.batches(500, shuffle=False):
        with FlopCounterMode(display=False) as counter:
            outcome = policy.decide(x)
        counted += counter.get_total_flops()
        charged += int(outcome.cost.sum())
        right += int((outcome.output.argmax(1) == y).sum())
        left += float(outcome.choice.double().sum())
    n = len(test)
    return {
        "accuracy": right / n,
        "mflops": counted / n / 1e6,
        "charged": charged / n / 1e6,
        "unexplained": counted - charged,
        "choice": left / n,
    }


def figure(record: RecordView, fig: Figure) -> None:
    """What each method adds to, or takes from, accuracy, work and memory."""
    fig.set_size_inches(11.5, 4.2)
    panels = fig.subplots(1, 3, sharey=True)
    shown = [arm for arm in STACK if arm in record.arms]
    colours = ("#555555", "#e69f00", "#0072b2", "#009e73", "#d55e00")
    what = (("accuracy", 1.0, "test accuracy", "%.3f"), ("mflops", 1.0, "MFLOPs an image, counted = charged", "%.3f"),
            ("peak_bytes", 1024.0, "peak kB of one image, traced", "%.1f"))  # fmt: skip
    for ax, (metric, unit, label, text) in zip(panels, what):
        values = [record.values(arm, metric) / unit for arm in shown]
        bars = ax.barh(
            range(len(shown)), [v.mean() for v in values], xerr=[v.std() for v in values], color=colours[: len(shown)], error_kw={"lw": 1}
        )
        ax.bar_label(bars, fmt=text, padding=4)
        ax.set_xlabel(label)
        ax.margins(x=0.22)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(shown)), [STACK[arm] for arm in shown])
    panels[0].invert_yaxis()
    exact = all(np.all(record.values(arm, "unexplained") == 0) for arm in shown)
    fig.suptitle("Four methods on one network" + ("; every FLOP is charged" if exact else "; some FLOPs are not charged"))
    fig.tight_layout()
