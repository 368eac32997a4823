"""What a block of zeros is worth in milliseconds: compiled sparse products against dense and CSR ones, and what the blocks cost in loss.

Kernels: five products with the sizes of BERT-base, one thread, all contenders in turn on the same random weights. Dense int8 runs twice:
as this machine does it (matrix units, where there are some), and in a process of its own that may use vector instructions only, which is
what the sparse int8 kernel uses. Both sides of an int8 comparison are bare products, integers in and integers out. Whole models: an
encoder of the size of BERT-mini, and two layers of that of BERT-base. Loss: the character model, pruned in one shot and trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress import BlockSparse, Int8Sparse, Tiles, block_prune, explicit, to_sparse_runtime
from neurarium.experiments.compress.zoo import TrainedGPT, gpt, next_token_loss
from neurarium.learn.fit import Backprop
from neurarium.meter import latency, stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SHAPES = ((32, 768, 768), (128, 768, 768), (128, 3072, 768), (128, 768, 3072), (384, 3072, 768))  # tokens, outputs, inputs
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
KERNELS = {"spmm_4x1": (4, 1), "spmm_16x1": (16, 1), "int8_4x1": (4, 1), "int8_16x4": (16, 4)}
ENCODERS = {"mini": (256, 4, 1024, 4), "base": (768, 12, 3072, 2)}  # width, heads, hidden, layers
PATTERNS = {"unstructured": (1, 1), "block_4x1": (4, 1), "block_16x1": (16, 1)}

CHILD = """
import json, statistics, sys, time
import torch
torch.set_num_threads(1)
shapes, repeats = json.loads(sys.argv[1]), int(sys.argv[2])
pairs = [(torch.randint(-127, 128, (t, i), dtype=torch.int8), torch.randint(-127, 128, (o, i), dtype=torch.int8).T) for t, o, i in shapes]
found = [[] for _ in pairs]
for repeat in range(repeats + 3):
    for pair, seconds in zip(pairs, found):
        start = time.perf_counter()
        torch._int_mm(*pair)
        seconds.append(time.perf_counter() - start)
print(json.dumps([statistics.median(s[3:]) for s in found]))
"""


def run(trial: Trial) -> None:
    shapes = trial.scale(smoke=((8, 64, 64), (16, 64, 128)), laptop=SHAPES)
    repeats = trial.scale(smoke=2, laptop=20)

    def measured() -> dict[str, np.ndarray]:
        with one_thread():
            return {"vnni_int8": np.tile(capped(shapes, repeats)[:, None], len(SPARSITIES)), **grid(shapes, repeats, trial.seed)}

    for arm in trial.arms("dense", "dense_bf16", "dense_int8", "vnni_int8", "csr", *KERNELS):
        seconds = trial.shared("grid", measured)[arm.name]  # (shapes, sparsities)
        mean = np.exp(np.log(seconds).mean(0))
        arm.log_timed(geo_80=mean[3], geo_90=mean[4])
        arm.curve("seconds", x=list(SPARSITIES), y=mean, timed=True)
        arm.log_timed(each_90=seconds[:, 4])

    names = trial.scale(smoke=("mini",), laptop=tuple(ENCODERS))
    for arm in trial.arms("whole_dense", "whole_4x1", "whole_16x1"):
        times, sizes = trial.shared("whole", partial(whole, trial, names, repeats))
        arm.log(**{f"{n}_bytes": sizes[n][arm.name] for n in names})
        arm.log_timed(**{f"{n}_seconds": times[n][arm.name] for n in names})

    for arm in trial.arms(*PATTERNS):
        language = trial.shared("gpt", partial(gpt, trial))
        masked = block_prune(language.model, block=PATTERNS[arm.name], sparsity=0.8)
        rows = trial.scale(smoke=8, laptop=150)
        arm.log(dense=language.loss(rows=rows), before=language.loss(masked, rows))
        train_on(masked, language, trial.scale(smoke=5, laptop=100), trial.seed)
        arm.log(loss=language.loss(masked, rows))


def grid(shapes: tuple, repeats: int, seed: int) -> dict[str, np.ndarray]:
    """arm -> seconds, (shapes, sparsities)."""
    found: dict[str, list[list[float]]] = {}
    draw = torch.Generator().manual_seed(seed)
    for tokens, outputs, inputs in shapes:
        x = torch.randn(tokens, inputs, generator=draw)
        weight = torch.randn(outputs, inputs, generator=draw)
        a, b = x.bfloat16(), weight.bfloat16()
        codes = torch.randint(0, 256, x.shape, generator=draw, dtype=torch.uint8)
        c, d = (codes.int() - 128).to(torch.int8), torch.randint(-127, 128, weight.shape, generator=draw, dtype=torch.int8).T
        runs: dict[tuple[str, float], Callable] = {
            ("dense", 0): partial(F.linear, x, weight), ("dense_bf16", 0): partial(F.linear, a, b),
            ("dense_int8", 0): partial(torch._int_mm, c, d),
        }  # fmt: skip
        for s in SPARSITIES:
            for name, block in KERNELS.items():
                mask = random_mask(weight.shape, block, s, draw)
                if name.startswith("int8"):
                    runs[(name, s)] = partial(Int8Sparse.from_dense(weight, block, mask=mask).sums, codes)
                else:
                    runs[(name, s)] = partial(BlockSparse.from_dense(weight, block, mask=mask).matmul, x)
            single = weight * random_mask(weight.shape, (1, 1), s, draw)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # CSR tensors are in beta
                runs[("csr", s)] = partial(torch.matmul, single.to_sparse_csr(), x.T)
        with torch.no_grad():
            timings = latency(runs, repeats=repeats)
        for name in dict.fromkeys(n for n, _ in runs):
            row = [timings[(name, s if (name, s) in runs else 0)].median for s in SPARSITIES]
            found.setdefault(name, []).append(row)
    return {name: np.array(rows) for name, rows in found.items()}


def random_mask(shape: tuple[int, ...], block: tuple[int, int], sparsity: float, draw: torch.Generator) -> torch.Tensor:
    """Blocks that stay with probability 1 - sparsity, each by itself."""
    units = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=draw) >= sparsity
    return Tiles(*block).spread(units, shape)


def capped(shapes: tuple, repeats: int) -> np.ndarray:
    """Seconds of dense int8 products in a process whose oneDNN may use vector instructions but no matrix units."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(shapes), str(repeats)]
    return np.array(json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout))


def whole(trial: Trial, names: tuple[str, ...], repeats: int) -> tuple[dict, dict]:
    """Seconds and bytes of whole encoders, 128 tokens, dense and with 80 % of the blocks gone."""
    times, sizes = {}, {}
    for name in names:
        width, heads, hidden, layers = ENCODERS[name]
        layer = nn.TransformerEncoderLayer(width, heads, hidden, activation="gelu", batch_first=True)
        model = nn.TransformerEncoder(layer, layers).eval()
        opened = explicit(model)
        x = torch.randn(1, trial.scale(smoke=8, laptop=128), width)
        forms = {"whole_dense": model, "opened": opened}
        for arm, block in (("whole_4x1", (4, 1)), ("whole_16x1", (16, 1))):
            forms[arm] = to_sparse_runtime(block_prune(opened, block=block, sparsity=0.8), block=block, planner="always")
        with one_thread(), torch.no_grad():
            timings = latency({k: partial(m, x) for k, m in forms.items()}, repeats=repeats)
        times[name] = {k: t.median for k, t in timings.items()}
        times[name]["whole_dense"] = min(times[name]["whole_dense"], times[name]["opened"])  # the faster of torch's two ways
        sizes[name] = {k: stored_bytes(m) for k, m in forms.items()}
    return times, sizes


def train_on(model: nn.Module, language: TrainedGPT, steps: int, seed: int) -> None:
    """AdamW in one cycle on windows of the training text, in place."""
    batches = language.loader(16 * steps, 16, seed=seed)
    learner = Backprop(
        loss=next_token_loss,
        optimizer=partial(AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        schedule=partial(OneCycleLR, max_lr=2e-3, total_steps=len(batches), pct_start=0.1),
        clip=1.0,
    )
    learner.fit(model, batches, epochs=1, seed=seed)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(12, 4)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    x = 100 * np.array(SPARSITIES)

    def seconds(arm: str) -> np.ndarray:
        return np.array([y for _, y in record.curves(arm, "seconds")])

    def lines(axes, base: str, arms: dict[str, tuple[str, str, str]]) -> None:
        for arm, (label, colour, style) in arms.items():
            ratios = seconds(base) / seconds(arm)
            spread = ratios.std(0, ddof=1) if len(ratios) > 1 else 0 * ratios[0]
            axes.errorbar(x, ratios.mean(0), spread, label=label, color=colour, linestyle=style, marker="o" if style == "-" else None,
                          markersize=4, capsize=2)  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_yticks((0.25, 0.5, 1, 2, 4, 8), ("¼", "½", "1", "2", "4", "8"))
        axes.minorticks_off()
        axes.set_xlabel("weights removed (%)")
        axes.legend(fontsize=8, loc="upper left")

    lines(left, "dense", {
        "spmm_4x1": ("sparse 4 × 1", "#0072B2", "-"), "spmm_16x1": ("sparse 16 × 1", "#009E73", "-"),
        "csr": ("torch CSR", "#999999", "-"), "dense_bf16": ("dense bfloat16", "#D55E00", "--"),
    })  # fmt: skip
    left.set(title="float32 product", ylabel="times as fast as dense float32")
    lines(middle, "vnni_int8", {
        "int8_4x1": ("sparse 4 × 1", "#0072B2", "-"), "int8_16x4": ("sparse 16 × 4", "#009E73", "-"),
        "dense_int8": ("dense, matrix units if any", "#D55E00", "--"),
    })  # fmt: skip
    middle.set(title="int8 product", ylabel="times as fast as dense int8 on vectors")
    for i, (arm, label) in enumerate((("unstructured", "1 × 1"), ("block_4x1", "4 × 1"), ("block_16x1", "16 × 1"))):
        values = record.values(arm, "loss")
        error = values.std(ddof=1) if len(values) > 1 else 0
        right.bar(i, values.mean(), 0.6, yerr=error, capsize=3, color=("#999999", "#0072B2", "#009E73")[i], label=label)
        right.text(i, values.mean() + 0.02, f"{values.mean():.3f}", ha="center", fontsize=8)
    dense = record.mean("unstructured", "dense")
    right.axhline(dense, color="black", linewidth=0.8, linestyle=":")
    right.text(-0.4, dense + 0.005, "dense", fontsize=8)
    right.set_xticks(range(3), ("1 × 1", "4 × 1", "16 × 1"))
    low = min(dense, *(record.mean(a, "loss") for a in PATTERNS))
    right.set_ylim(low - 0.3, None)
    right.set(title="character model, 80 % removed", ylabel="held-out loss after tuning (nats)")
    fig.suptitle("Geometric mean over five products of BERT-base's sizes, one thread", fontsize=10)
