"""Patterns of zeros: what each costs in loss and what it buys in time, beside dense products of three precisions.

Loss: the character model, all its Linear layers pruned in one shot by magnitude, trained on for a few steps. Time: a feed-forward block of
BERT-base's size with random weights of the same pattern. ``rearranged`` is 16 x 1 after the channels have been rearranged by
:func:`~neurarium.compress.rearrange_channels`: the same kernel, hence the same time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress import BlockSparse, block_prune, rearrange_channels, to_sparse_runtime
from neurarium.experiments.compress.sparse_cpu import one_thread, random_mask, train_on
from neurarium.experiments.compress.zoo import gpt
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

PATTERNS = {
    "csr": (1, 1), "single": (1, 1), "block4": (4, 1), "block16": (16, 1), "block16x4": (16, 4), "block16x16": (16, 16),
    "rearranged": (16, 1),
}  # fmt: skip
SPARSITIES = (50, 70, 90)
DENSE = ("float32", "bfloat16", "int8")


def run(trial: Trial) -> None:
    steps, rows = trial.scale(smoke=2, laptop=20), trial.scale(smoke=4, laptop=100)
    for arm in trial.arms(*(f"dense_{kind}" for kind in DENSE)):
        language = trial.shared("gpt", partial(gpt, trial))
        model = language.model
        if arm.name == "dense_bfloat16":
            model = _Wide(model.bfloat16())
        elif arm.name == "dense_int8":  # the same rounding as the sparse int8 layers
            model = to_sparse_runtime(model, dtype="int8", min_sparsity=0.0, planner="always")
        arm.log(loss=language.loss(model, rows), sparsity=0)
        arm.log_timed(milliseconds=1e3 * trial.shared("times", partial(times, trial))[arm.name])
    for arm in trial.arms(*(f"{name}_{s}" for name in PATTERNS for s in SPARSITIES)):
        name, _, percent = arm.name.rpartition("_")
        seconds = trial.shared("times", partial(times, trial))
        arm.log(sparsity=int(percent))
        arm.log_timed(milliseconds=1e3 * seconds[arm.name], gain=seconds["dense_float32"] / seconds[arm.name])
        if name == "single":  # the same network as csr, another kernel
            arm.log(loss=trial.metric(f"csr_{percent}", "loss"))
            continue
        language = trial.shared("gpt", partial(gpt, trial))
        model = language.model
        if name == "rearranged":
            model = rearrange_channels(model, example=language.loader(2)[0][0], sparsity=int(percent) / 100)
            del model.order
        masked = block_prune(model, block=PATTERNS[name], sparsity=int(percent) / 100)
        train_on(masked, language, steps, trial.seed)
        arm.log(loss=language.loss(masked, rows))


class _Wide(nn.Module):
    """A model of low precision with float32 outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).float()


def times(trial: Trial) -> dict[str, float]:
    """Seconds of a feed-forward block, by arm."""
    tokens, width, hidden = trial.scale(smoke=(8, 64, 128), laptop=(128, 768, 3072))
    draw = torch.Generator().manual_seed(trial.seed)
    x, up, down = (torch.randn(shape, generator=draw) for shape in ((tokens, width), (hidden, width), (width, hidden)))

    def through(first: Callable, second: Callable) -> Tensor:
        return second(torch.relu(first(x)))

    half = [t.bfloat16() for t in (x, up, down)]
    eight = [torch.randint(-127, 128, t.shape, generator=draw, dtype=torch.int8) for t in (x, torch.empty(tokens, hidden))]
    codes = [torch.randint(-127, 128, t.shape, generator=draw, dtype=torch.int8).T for t in (up, down)]
    runs: dict[str, Callable] = {
        "dense_float32": lambda: F.linear(torch.relu(F.linear(x, up)), down),
        "dense_bfloat16": lambda: F.linear(torch.relu(F.linear(half[0], half[1])), half[2]),
        "dense_int8": lambda: (torch._int_mm(eight[0], codes[0]), torch._int_mm(eight[1], codes[1])),  # products alone
    }
    for name, block in PATTERNS.items():
        for percent in SPARSITIES:
            pair = []
            for weight in (up, down):
                mask = random_mask(weight.shape, block, percent / 100, draw)
                pair.append(_csr(weight * mask) if name == "csr" else BlockSparse.from_dense(weight, block, mask=mask))
            if name == "csr":
                runs[f"{name}_{percent}"] = lambda pair=pair: pair[1] @ torch.relu(pair[0] @ x.T)
            elif name != "rearranged":
                runs[f"{name}_{percent}"] = lambda pair=pair: pair[1].matmul(pair[0].matmul(x, act="relu"))
    with one_thread(), torch.no_grad():
        found = {k: t.median for k, t in latency(runs, repeats=trial.scale(smoke=2, laptop=20)).items()}
    return {**found, **{f"rearranged_{s}": found[f"block16_{s}"] for s in SPARSITIES}}


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR tensors are in beta
        return weight.to_sparse_csr()


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(8.5, 5)
    axes = fig.subplots()
    styles = {
        "csr": ("single weights, CSR", "#999999", "^"), "single": ("single weights, our kernel", "#E69F00", "^"),
        "block4": ("4 × 1", "#009E73", "D"), "block16": ("16 × 1", "#56B4E9", "s"), "rearranged": ("16 × 1, rearranged", "#0072B2", "s"),
        "block16x4": ("16 × 4", "#CC79A7", "v"), "block16x16": ("16 × 16", "#D55E00", "v"),
    }  # fmt: skip
    for name, (label, colour, marker) in styles.items():
        arms = [f"{name}_{s}" for s in SPARSITIES]
        x, y = ([record.mean(arm, metric) for arm in arms] for metric in ("milliseconds", "loss"))
        spread = [np.std(record.values(arm, "loss"), ddof=1) if len(record.seeds) > 1 else 0 for arm in arms]
        axes.errorbar(x, y, spread, label=label, color=colour, marker=marker, capsize=2)
        for s, a, b in zip(SPARSITIES, x, y, strict=True):
            axes.annotate(f"{s}", (a, b), fontsize=7, xytext=(4, 3), textcoords="offset points", color=colour)
    for kind, style in zip(DENSE, ("-", "--", ":"), strict=True):
        x = record.mean(f"dense_{kind}", "milliseconds")
        axes.axvline(x, color="black", linewidth=0.9, linestyle=style, label=f"dense {kind}: break-even")
        axes.plot(x, record.mean(f"dense_{kind}", "loss"), "ko", markersize=5)
    axes.set_xscale("log")
    axes.set(xlabel="feed-forward block 768-3072-768, 128 tokens, one thread (ms)", ylabel="held-out loss of the character model (nats)")
    axes.set_title("Numbers at the points: weights removed (%). Left of a line a pattern is faster than that dense product", fontsize=9)
    axes.legend(fontsize=7.5, loc="upper right")
