"""Three small vision transformers stitched into 35 networks.

The anchors are trained one by one. Every arm then stitches copies of the same anchors, sets the maps, and trains all configurations
together for a few epochs with the same images, the same steps and the same learning rate: the best of 0.0005, 0.001 and 0.002 for maps by
least squares, on another seed; random maps gain about 0.01 from the largest, a fraction of what they lack. ``gain`` of a stitched network
is its accuracy minus the straight line, in log FLOPs, between the anchors next to it as they were before the joint training.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from neurarium.data import ImageTask
from neurarium.dynamic.backbones import VisionTransformerS
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.stitch import SNNet, stitch
from neurarium.dynamic.train import fit_policy
from neurarium.experiments.dynamic import zoo
from neurarium.learn.fit import Backprop
from neurarium.meter import stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SIZES = ((24, 2), (48, 4), (72, 4))  # width and heads of each anchor
DEPTH = 6
TUNING = 1e-3
BATCH = 64

ARMS = {
    "snnet": {},
    "random_init": {},
    "no_shared": {"shared": False},
    "slow_to_fast": {"fast_to_slow": False},
}
LABELS = {
    "snnet": "stitched, least squares",
    "random_init": "stitched, random maps",
    "no_shared": "one map for each position",
    "slow_to_fast": "from the large to the small",
    "anchors": "anchors, each trained alone",
}
COLOURS = dict(zip(LABELS, ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#222222")))


def run(trial: Trial) -> None:
    epochs = trial.scale(smoke=(1, 1), laptop=(6, 6))  # of each anchor, of the joint training
    sizes = trial.scale(smoke=((4, 2), (8, 2), (12, 2)), laptop=SIZES)

    def task() -> ImageTask:
        return trial.shared("task", lambda: zoo.mnist(trial, train=3600, test=1000, size=12))

    def anchors() -> list[nn.Module]:
        return [_anchor(task(), width, heads, epochs[0], trial) for width, heads in sizes]

    for arm in trial.arms("anchors", *ARMS):
        images, models = task(), trial.shared("anchors", anchors)
        test = images.test.to(trial.device)
        prices = [CostTable.measure([model], test.x[:1]).full for model in models]
        with torch.no_grad():
            known = [_accuracy(model(test.x), test.y) for model in models]
        if arm.name == "anchors":
            arm.log(flops=prices, accuracy=known, bytes=sum(stored_bytes(model) for model in models))
            continue
        policy = stitch(models, test.x[:2], **ARMS[arm.name], seed=trial.seed).to(trial.device)
        if arm.name != "random_init":
            policy.init_stitches(images.train.x[:100].to(trial.device))
        before = _all(policy, test.x, test.y) if arm.name in ("snnet", "random_init") else None
        batches = images.train.to(trial.device).batches(BATCH, seed=trial.seed)
        schedule = partial(CosineAnnealingLR, T_max=epochs[1] * len(batches), eta_min=TUNING / 50)
        fit_policy(policy, batches, epochs=epochs[1], optimizer=partial(AdamW, lr=TUNING, fused=True), schedule=schedule, seed=trial.seed)
        after, flops = _all(policy, test.x, test.y), policy.prices(test.x).double()
        line = np.interp(flops.log().numpy(), np.log(prices), known)
        mixed = [i for i, c in enumerate(policy.configs) if c.back is not None]
        arm.log(flops=flops.tolist(), accuracy=after, gain=[after[i] - line[i] for i in mixed])
        arm.log(stitched=float(np.mean([after[i] for i in mixed])), anchors=[after[i] for i in policy.anchors], anchors_before=known)
        arm.log(bytes=stored_bytes(policy), bytes_apart=sum(stored_bytes(policy.extract(i)) for i in range(len(after))))
        if before is not None:
            arm.log(accuracy_before=before, stitched_before=float(np.mean([before[i] for i in mixed])))
        arm.log_timed(switch_microseconds=_switching(policy))


def _anchor(task: ImageTask, width: int, heads: int, epochs: int, trial: Trial) -> nn.Module:
    channels, side = task.train.x.shape[1:3]
    torch.manual_seed(trial.seed)
    patch = 4 if side % 4 == 0 and side > 8 else 2
    depth = trial.scale(smoke=2, laptop=DEPTH)
    model = VisionTransformerS(channels, side, patch, width=width, depth=depth, heads=heads, classes=task.classes).to(trial.device)
    batches = task.train.to(trial.device).batches(BATCH, seed=trial.seed)
    schedule = partial(OneCycleLR, max_lr=3e-3, total_steps=epochs * len(batches))
    Backprop(optimizer=partial(AdamW, lr=3e-3, fused=True), schedule=schedule).fit(model, batches, epochs=epochs, seed=trial.seed)
    return model.eval()


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


@torch.no_grad()
def _all(policy: SNNet, x: Tensor, y: Tensor) -> list[float]:
    """Test accuracy of every configuration."""
    policy.eval()
    right = torch.zeros(len(policy.configs), dtype=torch.float64)
    for part, labels in zip(x.split(500), y.split(500)):
        right += torch.stack([(out.argmax(1) == labels).sum() for out in policy.outputs(part)]).double().cpu()
    return (right / len(y)).tolist()


def _switching(policy: SNNet) -> float:
    """Microseconds to make another configuration the current one."""
    began = time.perf_counter()
    for _ in range(20):
        for i in range(len(policy.configs)):
            policy.use(config=i)
    return 1e6 * (time.perf_counter() - began) / 20 / len(policy.configs)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against FLOPs after the joint training, and before it."""
    fig.set_size_inches(11, 4.8)
    titles = {"accuracy": "After joint training", "accuracy_before": "Maps set, nothing trained"}
    for ax, (metric, title) in zip(fig.subplots(1, 2), titles.items()):
        for arm in [a for a in reversed(ARMS) if a in record.arms and (metric == "accuracy" or a in ("snnet", "random_init"))]:
            x, y = record.values(arm, "flops").mean(0) / 1e6, record.values(arm, metric)
            style = {"ms": 4, "lw": 1} if arm == "snnet" else {"ms": 3, "lw": 0, "alpha": 0.6}
            ax.errorbar(x, y.mean(0), yerr=y.std(0), color=COLOURS[arm], marker="o", elinewidth=0.7, label=LABELS[arm], **style)
        if "anchors" in record.arms:
            x, y = record.values("anchors", "flops").mean(0) / 1e6, record.values("anchors", "accuracy")
            style = {"marker": "*", "ms": 13, "lw": 1, "ls": "--", "capsize": 2, "zorder": 5}
            ax.errorbar(x, y.mean(0), yerr=y.std(0), color=COLOURS["anchors"], label=LABELS["anchors"], **style)
        ax.set(xscale="log", xlabel="MFLOPs a row", ylabel="test accuracy", title=title)
        ax.grid(alpha=0.25, which="both")
    fig.axes[0].legend(loc="lower right", fontsize=8)
    fig.tight_layout()
