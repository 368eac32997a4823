"""Where to cut a transformer: layers, tokens, units, widths, inputs that leave early, or adapters with experts, at the same counted FLOPs.

One trained vision transformer, two targets (shares of its FLOPs). Every way of cutting takes the largest network that stays within the
target and trains it on. Those that make one network a target get one pass over the tuning images for each; those that train all targets at
once (sorted depths, a sorted family, exits) get as many passes in sum. ``accuracy``, ``flops`` and ``time`` are at the smaller target,
``accuracies`` and ``costs`` at both; ``flops`` and ``time`` are relative to the network that is not cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import meter
from neurarium.dynamic.coupling import make_elastic
from neurarium.dynamic.elastic import reorder
from neurarium.dynamic.exits import EarlyExit, with_exits
from neurarium.dynamic.lora_experts import DynMoLE, auxiliary_loss, mole_transform
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.sorted_llm import SortedFineTuning
from neurarium.dynamic.tokens import prune_tokens
from neurarium.dynamic.train import fit_policy, measure
from neurarium.errors import BadInput
from neurarium.experiments.dynamic.transformer_inference_survey import (
    Bench,
    Ranking,
    apply,
    prepare,
    rank_units,
    relative_time,
    remove_units,
    right,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TARGETS = (0.68, 0.51)  # four and three of six layers
WIDTHS = (0.25, 0.35, 0.45, 0.5, 0.55, 0.65, 0.75, 0.85, 1.0)

LABELS = {
    "depth": "sorted depths", "tokens": "fewer tokens, one cut", "pyramid": "fewer tokens, a pyramid",
    "units": "heads and FFN units removed", "width": "sorted widths", "exits": "early exits, row by row",
    "experts": "units removed, frozen, expert adapters", "bits": "4 bits (all FLOPs stay)",
}  # fmt: skip


def run(trial: Trial) -> None:
    def bench() -> Bench:
        return trial.shared("bench", lambda: prepare(trial))

    for arm in trial.arms(*LABELS):
        b = bench()
        x = b.task.test.x[:64]
        full = meter.flops(b.model, x[:1])
        cut = WAYS[arm.name](b, full, trial.scale(smoke=3, laptop=9))
        accuracies, costs, models = zip(*cut)
        arm.log(accuracies=list(accuracies), costs=list(costs), accuracy=accuracies[-1], flops=costs[-1])
        arm.log_timed(time=relative_time(models[-1], b, b.task.test.x[:256] if arm.name == "exits" else x))


Cut = tuple[float, float, nn.Module]  # accuracy, share of the FLOPs, what was measured


def within(make: Callable[[float], nn.Module], flops: float, x: Any, tries: int = 9) -> nn.Module:
    """The network of the largest level in (0, 1] that costs at most ``flops`` a row, found by bisection, to 1 / 2^tries."""
    low, high, best = 0.0, 1.0, make(0.02)
    if meter.flops(best, x[:1]) > flops:
        raise BadInput(f"not even the smallest network stays within {flops:.0f} FLOPs")
    for _ in range(tries):
        middle = (low + high) / 2
        model = make(middle)
        if meter.flops(model, x[:1]) <= flops:
            low, best = middle, model
        else:
            high = middle
    return best


def tuned(make: Callable[[float], nn.Module], b: Bench, full: int, tries: int) -> list[Cut]:
    """For each target the largest network within it, trained on for one pass."""
    x = b.task.test.x
    models = [b.tune(within(make, share * full, x, tries)) for share in TARGETS]
    return [(right(model, b.task.test), meter.flops(model, x[:1]) / full, model) for model in models]


def tokens(b: Bench, full: int, tries: int) -> list[Cut]:
    n = len(b.model.embed.position)
    return tuned(lambda level: prune_tokens(b.model, keep=max(1, round(level * n)), at=1), b, full, tries)


def pyramid(b: Bench, full: int, tries: int) -> list[Cut]:
    """Cuts after the first, second and fourth block, each to the same share of what came before; equally spaced tokens."""
    n = len(b.model.embed.position)
    places = [1, 2, min(4, len(b.model.blocks) - 1)] if len(b.model.blocks) > 3 else [1]

    def make(level: float) -> nn.Module:
        keep = [max(len(places) - i, min(n - 1 - i, round(n * level ** (i + 1)))) for i in range(len(places))]
        return prune_tokens(b.model, keep=keep, at=places, prune="uniform")

    return tuned(make, b, full, tries)


def ranked(b: Bench) -> list[Ranking]:
    loader = list(b.tuning.batches(64, seed=b.seed))[:4]
    return [rank_units(b.model, kind, loader) for kind in ("heads", "ffn")]


def units(b: Bench, full: int, tries: int) -> list[Cut]:
    rankings = ranked(b)
    return tuned(lambda level: remove_units(b.model, rankings, level), b, full, tries)


def experts(b: Bench, full: int, tries: int) -> list[Cut]:
    """The cut network is frozen; four experts of rank 4 beside its feed-forward maps learn. All of them at once stay within the target."""
    rankings = ranked(b)

    def make(level: float) -> nn.Module:
        small = remove_units(b.model, rankings, level)
        return mole_transform(small, targets=("up", "down"), experts=4, rank=4, top_k=1, entropy_threshold=-math.inf, dispatch="sparse")

    return [taught(within(make, share * full, b.task.test.x, tries), b, full) for share in TARGETS]


def taught(model: nn.Module, b: Bench, full: int) -> Cut:
    """The adapters trained for one pass; after it a row takes as many experts as its router needs to be sure."""
    for module in model.modules():
        if isinstance(module, DynMoLE):
            module.entropy_threshold = 0.9
    batches = b.tuning.batches(64, seed=b.seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trainable, lr=3e-3)
    schedule = OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(batches))
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + auxiliary_loss(model)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    x = b.task.test.x[:256]
    return right(model, b.task.test), meter.flops(model, x) / len(x) / full, model


def depth(b: Bench, full: int, tries: int) -> list[Cut]:
    del tries
    n, x = len(b.model.blocks), b.task.test.x[:1]
    policy = SortedFineTuning(copy.deepcopy(b.model), sorted({max(1, n // 2), max(1, 2 * n // 3), n}))
    fit(policy, b)
    cuts = [(meter.flops(model, x) / full, model) for model in map(policy.extract, policy.depths)]
    best = [max((c for c in cuts if c[0] <= share), key=lambda c: c[0]) for share in TARGETS]
    return [(right(model, b.task.test), cost, model) for cost, model in best]


def width(b: Bench, full: int, tries: int) -> list[Cut]:
    x = b.task.test.x[:4]
    model = make_elastic(b.model, x)
    reorder(model)
    policy = SortedNet(model, x, widths=WIDTHS[:: (len(WIDTHS) - 1) // (tries - 1)])
    fit(policy, b)
    return [budgeted(policy, b, share, full) for share in TARGETS]


def exits(b: Bench, full: int, tries: int) -> list[Cut]:
    del tries
    policy = EarlyExit(with_exits(b.model, b.task.test.x[:2], cuts=min(3, len(b.model.blocks))))
    fit(policy, b)
    policy.calibrate(b.held_out.batches(500, shuffle=False))
    return [budgeted(policy, b, share, full) for share in TARGETS]


def bits(b: Bench, full: int, tries: int) -> list[Cut]:
    """All FLOPs stay; two passes, as it is one network for both targets."""
    del full, tries
    loader = list(b.tuning.batches(64, seed=b.seed))[:8]
    model = apply("bits", b.tune(copy.deepcopy(b.model), epochs=2), 4, loader)
    return [(right(model, b.task.test), 1.0, model)] * len(TARGETS)


def fit(policy: Any, b: Bench) -> None:
    batches = b.tuning.batches(64, seed=b.seed)
    schedule = partial(OneCycleLR, max_lr=1e-3, total_steps=2 * len(batches))
    fit_policy(policy, batches, epochs=2, optimizer=partial(AdamW, lr=1e-3), schedule=schedule, seed=b.seed)
    policy.eval()


def budgeted(policy: Any, b: Bench, share: float, full: int) -> Cut:
    policy.use(b.task.test.x[:2], budget=share * full)
    found = measure(policy, b.task.test.batches(500, shuffle=False))
    return found["accuracy"], found["cost"] / full, copy.deepcopy(policy)


WAYS: dict[str, Callable[[Bench, int, int], list[Cut]]] = {
    "depth": depth, "tokens": tokens, "pyramid": pyramid, "units": units, "width": width, "exits": exits, "experts": experts, "bits": bits,
}  # fmt: skip


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy at both targets, and what the FLOPs saved at the smaller one are worth in seconds."""
    fig.set_size_inches(11, 4.8)
    left, right_ = fig.subplots(1, 2, gridspec_kw={"width_ratios": (1.4, 1)})
    names = [n for n in LABELS if n in record.arms]
    for i, n in enumerate(names):
        x, y = record.values(n, "costs"), record.values(n, "accuracies")
        style = {"color": f"C{i}", "marker": "osD^v<>P"[i % 8], "ms": 7, "label": LABELS[n]}
        left.errorbar(x.mean(0), y.mean(0), yerr=y.std(0), capsize=3, lw=1, **style)
        right_.plot(record.mean(n, "flops"), record.mean(n, "time"), ls="", **style)
    for target in TARGETS:
        left.axvline(target, color="#bbbbbb", lw=1, ls=":")
    right_.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
    left.set(xlabel="counted FLOPs / whole network", ylabel="test accuracy", title="The same FLOPs, cut in different places")
    right_.set(xlabel="counted FLOPs / whole network", ylabel="seconds / whole network", title="What they take, batches of 64")
    top = 1.08 * max(1.1, *(record.mean(n, "time") for n in names))
    right_.set(xlim=(0.3, 1.05), ylim=(0, top))
    left.grid(alpha=0.25)
    right_.grid(alpha=0.25)
    left.legend(fontsize=8)
