"""The algorithmic families of a survey on fast transformer inference, on one transformer, one task and one set of meters.

A survey can only tabulate what papers report on different models. Here every technique starts from the same trained vision transformer,
gets the same number of further training steps (the untouched model, too; a smaller network that starts anew is trained as long as the
large one was), and is measured by the same accuracy, counted FLOPs, stored
bytes and seconds. Techniques come from two rooms: :func:`apply` is the whole glue.

``flops``, ``bytes``, ``time`` and ``time1`` (a batch of 64 and one row) are relative to the untouched model, whose runs are interleaved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import meter
from neurarium.compress.blocks import Layout, TransformerBlocks
from neurarium.compress.distil import SoftTargets
from neurarium.compress.factor.alds import plan_svd
from neurarium.compress.factor.lowrank import apply_ranks
from neurarium.compress.plan import finalise
from neurarium.compress.prune.magnitude import magnitude
from neurarium.compress.quant.range import requant
from neurarium.compress.taylor import taylor
from neurarium.data import ImageTask, TensorData
from neurarium.dynamic.backbones import VisionTransformerS
from neurarium.dynamic.decoder import Decoder, DecoderLayer
from neurarium.dynamic.exits import EarlyExit, with_exits
from neurarium.dynamic.tokens import prune_tokens
from neurarium.dynamic.train import fit_policy, measure
from neurarium.errors import BadInput
from neurarium.experiments.dynamic import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

#: where a block of the vision transformer keeps its parts, for the tools that take blocks apart
LAYOUT = Layout(
    DecoderLayer, ("attention.q", "attention.k", "attention.v"), "attention.o", ("up",), "down", "attention.head_dim",
    {"attention.heads": "heads"},
)  # fmt: skip

#: arm -> (technique, level): the share of what is kept; bits for quantisation
VARIANTS: dict[str, tuple[str, float]] = {
    "base": ("none", 1.0),
    "unstructured": ("unstructured", 0.2),
    "heads": ("heads", 0.7),
    "ffn": ("ffn", 0.5),
    "layers": ("layers", 0.5),
    "lowrank": ("lowrank", 0.5),
    "tokens": ("tokens", 0.5),
    "int8": ("bits", 8),
    "int4": ("bits", 4),
}

LABELS = {
    "base": "untouched, trained on", "unstructured": "80 % of weights zero", "heads": "30 % of heads removed",
    "ffn": "half of the FFN units removed", "layers": "every other layer removed", "lowrank": "factorised layers, half the size",
    "tokens": "half of the tokens from block 2 on", "int8": "8 bits, weights and inputs", "int4": "4 bits, weights (inputs 8)",
    "scratch": "3 layers from scratch", "distilled": "3 layers, distilled", "exits": "early exits, half of the cost",
    "stack": "distilled + half FFN + 8 bits",
}  # fmt: skip


EPOCHS = {"smoke": 1, "laptop": 6}


@dataclass(frozen=True)
class Bench:
    """The trained transformer, and what to tune and judge with."""

    model: VisionTransformerS
    task: ImageTask
    tuning: TensorData  # half of the training images
    held_out: TensorData  # training images that nothing is tuned on, for thresholds and scores
    seed: int
    repeats: int = 15  # of a timing

    def tune(self, model: nn.Module, *, epochs: int = 1, lr: float = 1e-3) -> nn.Module:
        """The further training that every technique gets."""
        return zoo.train(model, self.tuning.batches(64, seed=self.seed), epochs=epochs, lr=lr, seed=self.seed)


def prepare(trial: Trial) -> Bench:
    """Data, and the transformer trained on it."""
    epochs, (train, test) = EPOCHS[trial.name], trial.scale(smoke=(120, 100), laptop=(6000, 4000))
    task = zoo.mnist(trial, train=train, test=test, size=20)

    def fit(model: nn.Module) -> None:
        zoo.train(model, task.train.batches(64, seed=trial.seed), epochs=epochs, lr=2e-3, seed=trial.seed)

    def make() -> nn.Module:
        return VisionTransformerS(1, 20, 4, width=64, depth=trial.scale(smoke=3, laptop=6), heads=4, mlp=2, classes=task.classes)

    model = zoo.trained("vit", trial, make, fit, sum=float(task.train.x.double().sum()), epochs=epochs)
    half, last = train // 2, train - train // 6
    return Bench(
        model, task, *(TensorData(task.train.x[i], task.train.y[i]) for i in (slice(0, half), slice(last, None))), trial.seed,
        trial.scale(smoke=2, laptop=15),
    )  # fmt: skip


def apply(technique: str, model: nn.Module, level: float, loader: Any = ()) -> nn.Module:
    """A copy of ``model``, cut by one technique; at level 1 (32 for bits) its outputs are those of the model.

    Args:
        technique: "unstructured", "heads", "ffn", "layers", "lowrank", "tokens", "bits", "none".
        model: a :class:`~neurarium.dynamic.backbones.VisionTransformerS`.
        level: the share that is kept: of weights, heads, feed-forward units, layers, stored numbers, tokens; or bits a weight.
        loader: batches for scores and ranges.
    """
    if technique == "bits":
        if level == 32:
            return copy.deepcopy(model)
        return requant(model, bits=int(level), activations=loader, act_bits=8)
    if not 0 < level <= 1:
        raise BadInput(f"level must be in (0, 1], not {level}")
    if technique not in ("none", "unstructured", "heads", "ffn", "layers", "lowrank", "tokens"):
        raise BadInput(f"unknown technique {technique!r}")
    if technique == "none" or level == 1:
        return copy.deepcopy(model)
    if technique == "unstructured":
        return magnitude(model, sparsity=1 - level)
    if technique in ("heads", "ffn"):
        return remove_units(model, [rank_units(model, technique, loader)], level)
    if technique == "layers":
        result, n = copy.deepcopy(model), len(model.blocks)
        kept = torch.linspace(0, n - 1, max(1, round(level * n))).round().int().tolist()
        result.blocks = nn.Sequential(*(result.blocks[i] for i in kept))
        return result
    if technique == "lowrank":
        return apply_ranks(model, plan_svd(model, keep=level, modules=(nn.Linear,)))
    return prune_tokens(model, keep=max(1, round(level * len(model.embed.position))), at=1)


Ranking = list[tuple[float, str, int]]  # harm, group of units, unit: least harm first


def rank_units(model: nn.Module, kind: str, loader: Any) -> Ranking:
    """Heads ("heads") or feed-forward units ("ffn") by how much single rows would miss them: the mean of |dL/d(gate)| over samples."""
    maps = {f"{b.name}.{'attention.o' if kind == 'heads' else 'down'}.weight": b for b in TransformerBlocks.of(model, [LAYOUT])}

    def by_unit(name: str, weight: Tensor) -> Tensor:
        columns = weight.sum(0)
        return columns.unflatten(0, (maps[name].n_heads, -1)).sum(1) if kind == "heads" else columns

    scores = taylor(model, loader, names=list(maps), per=by_unit, reduce="sample", samples=256)
    return sorted((float(s), f"{maps[n].name}.{kind}", i) for n, values in scores.items() for i, s in enumerate(values / values.norm()))


def remove_units(model: nn.Module, rankings: list[Ranking], level: float) -> nn.Module:
    """A copy without the least useful 1 - ``level`` of each ranking; no block loses all heads or units."""
    kept: dict[str, list[int]] = {}
    for ranking in rankings:
        for _, group, unit in ranking:
            kept.setdefault(group, []).append(unit)
        gone = round((1 - level) * len(ranking))
        for _, group, unit in ranking:
            if gone and len(kept[group]) > 1:
                kept[group].remove(unit)
                gone -= 1
    return TransformerBlocks.of(model, [LAYOUT]).remove({group: sorted(units) for group, units in kept.items()})


def run(trial: Trial) -> None:
    epochs = EPOCHS[trial.name]

    def bench() -> Bench:
        return trial.shared("bench", lambda: prepare(trial))

    def student(b: Bench) -> VisionTransformerS:
        return VisionTransformerS(1, 20, 4, width=64, depth=len(b.model.blocks) // 2, heads=4, mlp=2, classes=b.task.classes)

    def distil(b: Bench) -> nn.Module:
        """The student sees the training set as often as its teacher did; so does the one that has no teacher."""
        batches = b.task.train.batches(64, seed=trial.seed)
        schedule = partial(OneCycleLR, max_lr=2e-3, total_steps=epochs * len(batches))
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = student(b)
        taught = SoftTargets(b.model, temperature=2.0, weight=0.5, optimizer=partial(AdamW, lr=2e-3), schedule=schedule)
        taught.fit(model, batches, epochs=epochs, seed=trial.seed)
        return model.eval()

    for arm in trial.arms(*VARIANTS, "scratch", "distilled", "stack", "exits", "cache"):
        if arm.name == "cache":
            arm.log_timed(speedup=cache_speedup(trial), fused=fused_speedup(trial))
            continue
        b = bench()
        loader = list(b.tuning.batches(64, seed=trial.seed))[:8]
        if arm.name == "exits":
            judge_exits(arm, b)
            continue
        if arm.name == "scratch":
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                model = student(b)
            zoo.train(model, b.task.train.batches(64, seed=trial.seed), epochs=epochs, lr=2e-3, seed=trial.seed)
        elif arm.name == "distilled":
            model = trial.shared("distilled", lambda b=b: distil(b))
        elif arm.name == "stack":
            model = apply("ffn", trial.shared("distilled", lambda b=b: distil(b)), 0.5, loader)
            model = apply("bits", b.tune(model), 8, loader)
        else:
            technique, level = VARIANTS[arm.name]
            if technique == "bits":  # after training, nothing is tuned: the reference is the model trained on
                model = apply(technique, trial.shared("tuned", lambda b=b: b.tune(copy.deepcopy(b.model))), level, loader)
            elif arm.name == "base":
                model = trial.shared("tuned", lambda b=b: b.tune(copy.deepcopy(b.model)))
            else:
                model = b.tune(apply(technique, b.model, level, loader))
        if arm.name == "unstructured":
            arm.log(zeros=1 - meter.nonzero_parameters(finalise(model)) / meter.parameters(b.model))
            model = finalise(model)
        judge(arm, model, b)


def judge(arm: Any, model: nn.Module, b: Bench) -> None:
    """Accuracy, and what the model costs relative to the untouched one."""
    x = b.task.test.x[:64]
    arm.log(accuracy=right(model, b.task.test), flops=meter.flops(model, x[:1]) / meter.flops(b.model, x[:1]))
    arm.log(bytes=meter.stored_bytes(model) / meter.stored_bytes(b.model))
    arm.log_timed(time=relative_time(model, b, x), time1=relative_time(model, b, x[:1]))


def judge_exits(arm: Any, b: Bench) -> None:
    """Two exits, trained by the sum of their losses for as many steps as any technique; half of the cost on calibration rows."""
    x = b.task.test.x[:64]
    policy = EarlyExit(with_exits(b.model, x[:2], cuts=2))
    batches = b.tuning.batches(64, seed=b.seed)
    schedule = partial(OneCycleLR, max_lr=1e-3, total_steps=len(batches))
    fit_policy(policy, batches, epochs=1, optimizer=partial(AdamW, lr=1e-3), schedule=schedule, seed=b.seed)
    policy.eval().calibrate(b.held_out.batches(500, shuffle=False))
    policy.use(x, budget=0.5 * policy.costs(x).full)
    found = measure(policy, b.task.test.batches(500, shuffle=False))
    arm.log(accuracy=found["accuracy"], flops=found["cost"] / meter.flops(b.model, x[:1]))
    arm.log(bytes=meter.stored_bytes(policy) / meter.stored_bytes(b.model))
    arm.log_timed(time=relative_time(policy, b, b.task.test.x[:256]), time1=relative_time(policy, b, x[:1]))


@torch.no_grad()
def right(model: nn.Module, test: TensorData) -> float:
    """Share of right answers."""
    return sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in test.batches(500, shuffle=False)) / len(test)


@torch.no_grad()
def relative_time(model: nn.Module, b: Bench, x: Tensor) -> float:
    """Median seconds over those of the untouched model, run in turn."""
    runs: dict[str, Callable[[], Any]] = {"model": lambda: model(x), "base": lambda: b.model(x)}
    timings = meter.latency(runs, repeats=b.repeats, warmup=min(3, b.repeats))
    return timings["model"].median / timings["base"].median


@torch.no_grad()
def cache_speedup(trial: Trial) -> float:
    """Seconds of writing text by running the whole prefix at each token over those with keys and values kept."""
    context = trial.scale(smoke=24, laptop=96)
    model = Decoder(96, width=64, heads=4, layers=4, context=context).eval()
    prompt = torch.randint(96, (4, 8), generator=trial.generator())

    def recompute() -> Tensor:
        ids = prompt
        while ids.shape[1] < context:
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        return ids

    def cached() -> Tensor:
        ids, past, new = prompt, [None] * len(model.layers), prompt
        while True:
            h = model.embed(new, start=ids.shape[1] - new.shape[1])
            for i, layer in enumerate(model.layers):
                h, past[i] = layer.step(h, past[i])
            new = model.head(model.norm(h[:, -1])).argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], 1)
            if ids.shape[1] == context:
                return ids

    timings = meter.latency({"recompute": recompute, "cached": cached}, repeats=trial.scale(smoke=1, laptop=5), warmup=1)
    return timings["recompute"].median / timings["cached"].median


@torch.no_grad()
def fused_speedup(trial: Trial) -> float:
    """Seconds of attention written out (two products and a softmax) over those of torch's fused kernel, 256 tokens."""
    q, k, v = torch.randn(3, 8, 4, trial.scale(smoke=64, laptop=256), 16, generator=trial.generator())

    def written_out() -> Tensor:
        return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v

    timings = meter.latency({"out": written_out, "fused": lambda: F.scaled_dot_product_attention(q, k, v)}, repeats=11, warmup=2)
    return timings["out"].median / timings["fused"].median


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against seconds, accuracy against bytes, and what the FLOPs saved are worth in seconds."""
    fig.set_size_inches(13, 5.8)
    axes = fig.subplots(1, 3)
    names = [n for n in LABELS if n in record.arms]
    colours = dict(zip(names, [f"C{i % 10}" for i in range(len(names))]))
    markers = dict(zip(names, "osD^v<>PX*hdp"))
    for ax, metric, text in ((axes[0], "time", "seconds at batch 64 / untouched"), (axes[1], "bytes", "stored bytes / untouched")):
        for n in names:
            x, y = record.values(n, metric), record.values(n, "accuracy")
            ax.errorbar(
                x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), marker=markers[n], color=colours[n], ms=7, capsize=2, ls="",
                label=LABELS[n] if metric == "time" else None,
            )  # fmt: skip
        ax.set(xlabel=text, ylabel="test accuracy", title=f"Accuracy against {metric}")
        ax.grid(alpha=0.25)
    axes[1].set_xscale("log")
    axes[1].set_xticks([0.15, 0.25, 0.5, 1], ["0.15", "0.25", "0.5", "1"])
    axes[1].minorticks_off()
    for n in names:
        axes[2].plot(1 - record.mean(n, "flops"), 1 - record.mean(n, "time"), markers[n], color=colours[n], ms=7)
    low = min(0.0, *(1 - record.mean(n, "time") for n in names))
    axes[2].plot([0, 0.8], [0, 0.8], color="#999999", lw=1, ls="--")
    rank = spearmanr([record.mean(n, "flops") for n in names], [record.mean(n, "time") for n in names]).statistic if len(names) > 2 else 1.0
    title = f"What a saved FLOP is worth (rank {rank:.2f})"
    axes[2].set(xlabel="counted FLOPs saved", ylabel="seconds saved", title=title, ylim=(low - 0.1, 0.8))
    axes[2].grid(alpha=0.25)
    fig.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
