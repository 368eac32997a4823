"""Bits by value in patch-based inference, beside uniform bits, random bits and bits by measured loss.

A network of inverted residuals is trained on CIFAR-10 once a seed and run in 3x3 tiles up to its first block of stride 4; what follows has
8 bits in every arm, and so have all weights. Nothing is trained after rounding. Calibration images are training images, accuracy is of
the test images. ``random_bits``: random bits in the tiles that QuantMCU quantises, with its BitOPs. ``loss_increase``: the reference that
measures: each map of each tile is rounded alone, the loss on labelled calibration images noted, and bits are lowered in the order of loss
per BitOP saved until the BitOPs are QuantMCU's.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.data import TensorData
from neurarium.dynamic.live import trace_memory
from neurarium.dynamic.mobile import Block, MobileConfig, mobile_net
from neurarium.dynamic.patch import PatchedModel, patch_inference
from neurarium.dynamic.patch_quant import QuantisedModel, Statistics, outlier_tiles, quantmcu
from neurarium.experiments.dynamic import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

NET = MobileConfig(16, (Block(1, 16), Block(3, 24, 2), Block(3, 24), Block(3, 48, 2), Block(3, 48)), 0, 10)
UNIFORM = {"uniform8": 8, "uniform4": 4, "uniform2": 2}
COLOURS = {
    "quantmcu": "#d55e00", "uniform8": "#333333", "uniform4": "#777777", "uniform2": "#bbbbbb", "no_vdpc": "#e69f00",
    "random_bits": "#cc79a7", "loss_increase": "#009e73",
}  # fmt: skip
LABELS = {
    "quantmcu": "QuantMCU", "uniform8": "8 bits", "uniform4": "4 bits", "uniform2": "2 bits", "no_vdpc": "all tiles searched",
    "random_bits": "random bits", "loss_increase": "bits by measured loss",
}  # fmt: skip


def run(trial: Trial) -> None:
    def task() -> Any:
        return zoo.cifar(trial, train=3_500, test=1_500)

    def network() -> tuple[PatchedModel, Tensor, Tensor]:
        """The patched network, calibration images and their labels."""
        data = trial.shared("task", task)
        model = mobile_net(NET)
        zoo.train(model, data.train.batches(100, seed=trial.seed), epochs=trial.scale(smoke=1, laptop=5), lr=1e-2, seed=trial.seed)
        images, labels = data.train.x[:128], data.train.y[:128]
        return patch_inference(model, images, patches=trial.scale(smoke=(1, 2), laptop=(3, 3)), split="2"), images, labels

    def values() -> QuantisedModel:
        patched, images, _ = trial.shared("network", network)
        return quantmcu(patched, images)

    for arm in trial.arms("quantmcu", *UNIFORM, "no_vdpc", "random_bits", "loss_increase"):
        patched, images, labels = trial.shared("network", network)
        found = trial.shared("values", values)
        start = time.perf_counter()
        if arm.name == "quantmcu":
            model = quantmcu(patched, images)
        elif arm.name in UNIFORM:
            statistics = Statistics.collect(patched, images)
            model = QuantisedModel(patched, statistics, torch.full(statistics.low.shape, UNIFORM[arm.name]))
        elif arm.name == "no_vdpc":
            model = quantmcu(patched, images, outlier_z=float("inf"))
        elif arm.name == "random_bits":
            model = _random(patched, images, found, trial.seed)
        else:
            model = _by_loss(patched, images[:32], labels[:32], found)
        arm.log_timed(search_seconds=time.perf_counter() - start)
        test = trial.shared("task", task).test
        with torch.no_grad():
            memory = trace_memory(model, test.x[:1])
        arm.log(
            accuracy=_accuracy(model, test),
            bitops=model.bitops / 1e6,
            stage_bitops=model.stage_bitops / 1e6,
            stage_bytes=model.plan().patch_peak,
            traced_bytes=memory.peak,
            planned_bytes=model.plan().peak,
            outlier_tiles=float(np.mean(outlier_tiles(patched, images, 3.0))),
            mean_bits=float(model.bits.double().mean()),
        )
        arm.grid("bits", model.bits.numpy())
        if arm.name == "uniform8":
            arm.log(plain_accuracy=_accuracy(patched, test))


def _accuracy(model: torch.nn.Module, data: TensorData) -> float:
    with torch.no_grad():
        return float(torch.cat([model(x).argmax(1) == y for x, y in data.batches(500, shuffle=False)]).double().mean())


def _searched(patched: PatchedModel, images: Tensor) -> list[int]:
    """The tiles without outliers."""
    return [t for t, loud in enumerate(outlier_tiles(patched, images, 3.0)) if not loud]


def _random(patched: PatchedModel, images: Tensor, found: QuantisedModel, seed: int) -> QuantisedModel:
    """Random bits, then random changes until the operations are within 1 % of ``found``'s."""
    r, statistics, table = random.Random(seed), Statistics.collect(patched, images), torch.full(found.bits.shape, 8)
    cells = [(t, i) for t in _searched(patched, images) for i in range(table.shape[1])]
    for t, i in cells:
        table[t, i] = r.choice((8, 4, 2))
    model = QuantisedModel(patched, statistics, table)
    for _ in range(10_000):
        ratio = model.stage_bitops / found.stage_bitops
        if not cells or 0.99 <= ratio <= 1.01:
            break
        t, i = r.choice(cells)
        table[t, i] = min(8, int(table[t, i]) * 2) if ratio < 1 else max(2, int(table[t, i]) // 2)
        model.table = table.tolist()
    return QuantisedModel(patched, statistics, table)


def _by_loss(patched: PatchedModel, images: Tensor, labels: Tensor, found: QuantisedModel) -> QuantisedModel:
    """Fewer bits where the loss rises least for the operations saved."""
    statistics, table = Statistics.collect(patched, images), torch.full(found.bits.shape, 8)

    def measured(trial: Tensor) -> tuple[float, int]:
        model = QuantisedModel(patched, statistics, trial)
        with torch.no_grad():
            return float(F.cross_entropy(model(images), labels)), model.stage_bitops

    base, full = measured(table)
    options = []
    for t in _searched(patched, images):
        for i in range(table.shape[1]):
            for b in (4, 2):
                one = table.clone()
                one[t, i] = b
                loss, operations = measured(one)
                options.append(((loss - base) / max(full - operations, 1), t, i, b))
    model = QuantisedModel(patched, statistics, table)
    for _, t, i, b in sorted(options):
        if model.stage_bitops <= found.stage_bitops:
            break
        table[t, i] = min(int(table[t, i]), b)
        model.table = table.tolist()
    return QuantisedModel(patched, statistics, table)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against operations, and the bits of every map and tile."""
    fig.set_size_inches(11.5, 4.6)
    axes, maps = fig.subplots(1, 2, gridspec_kw={"width_ratios": (1.3, 1)})
    for arm in record.arms:
        x, y = record.values(arm, "bitops"), record.values(arm, "accuracy")
        axes.errorbar(
            x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), color=COLOURS[arm], marker="*" if arm == "quantmcu" else "o",
            ms=13 if arm == "quantmcu" else 7, capsize=3, ls="", label=LABELS[arm],
        )  # fmt: skip
    axes.set(xlabel="BitOPs an image (millions, counted)", ylabel="test accuracy", title="CIFAR-10, 3x3 tiles, no training after rounding")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)
    if "quantmcu" in record.arms:
        bits = np.mean(record.grids("quantmcu", "bits"), 0)
        image = maps.imshow(bits, cmap="viridis", vmin=2, vmax=8, aspect="auto")
        for (t, i), b in np.ndenumerate(bits):
            maps.text(i, t, f"{b:.2g}", ha="center", va="center", color="white" if b < 6 else "black", fontsize=8)
        fig.colorbar(image, ax=maps, label="bits, mean of the seeds")
        maps.set(xlabel="map, from the image on", ylabel="tile", title="What QuantMCU chose")
    fig.tight_layout()
