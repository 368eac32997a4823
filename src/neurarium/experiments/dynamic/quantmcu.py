"""Bits by value in patch-based inference, beside uniform bits, random bits and bits by measured loss.

A network of inverted residuals is trained on CIFAR-10 once a seed and run in 3x3 tiles up to its first block of stride 4; what follows has
8 bits in every arm, and so have all weights. Nothing is trained after rounding. Calibration images are training images, accuracy is of
the test images. ``random_bits``: random bits with QuantMCU's BitOPs. ``loss_increase``: the reference that measures: each map of each tile
is rounded alone, the loss on labelled calibration images noted, and bits are lowered in the order of loss per BitOP saved until the BitOPs
are QuantMCU's.

No pixel of CIFAR-10 is three deviations from the mean, so that no tile has outliers. The arms ``glare...`` therefore have pictures as of
a sensor that does not saturate: in two opposite corners, each in half of the pictures, a spot of 3x3 pixels is eight deviations bright.
The network is trained on such pictures for two more epochs. ``glare``: tiles classified by place; ``glare_dynamic``: for every picture
while it runs; ``glare_no_vdpc``: not at all, bits are searched in all tiles; ``glare_mirrored``: as many tiles keep 8 bits, but those in
the corners without spots; ``glare_uniform8``: 8 bits.
"""

from __future__ import annotations

import copy
import itertools
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
from neurarium.dynamic.patch_quant import outlier_tiles, quantmcu, usual_values
from neurarium.dynamic.quantised import QuantisedModel, Statistics, has_outliers, quantise
from neurarium.experiments.dynamic import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

NET = MobileConfig(16, (Block(1, 16), Block(3, 24, 2), Block(3, 24), Block(3, 48, 2), Block(3, 48)), 0, 10)
UNIFORM = {"uniform8": 8, "uniform4": 4, "uniform2": 2}
PLAIN = ("quantmcu", *UNIFORM, "random_bits", "loss_increase")
GLARE = ("glare", "glare_dynamic", "glare_no_vdpc", "glare_mirrored", "glare_uniform8")
SPOT, BRIGHT = 3, 8.0  # pixels, standard deviations
COLOURS = {
    "quantmcu": "#d55e00", "uniform8": "#333333", "uniform4": "#777777", "uniform2": "#bbbbbb", "random_bits": "#cc79a7",
    "loss_increase": "#009e73", "glare": "#d55e00", "glare_dynamic": "#0072b2", "glare_no_vdpc": "#e69f00",
    "glare_mirrored": "#cc79a7", "glare_uniform8": "#333333",
}  # fmt: skip
LABELS = {
    "quantmcu": "QuantMCU", "uniform8": "8 bits", "uniform4": "4 bits", "uniform2": "2 bits", "random_bits": "random bits",
    "loss_increase": "bits by measured loss", "glare": "8 bits by place", "glare_dynamic": "8 bits by picture",
    "glare_no_vdpc": "all tiles searched", "glare_mirrored": "8 bits in other tiles", "glare_uniform8": "8 bits",
}  # fmt: skip


def run(trial: Trial) -> None:
    def task() -> Any:
        return zoo.cifar(trial, train=3_500, test=1_500)

    def trained() -> torch.nn.Module:
        model = mobile_net(NET)
        batches = trial.shared("task", task).train.batches(100, seed=trial.seed)
        return zoo.train(model, batches, epochs=trial.scale(smoke=1, laptop=5), lr=1e-2, seed=trial.seed)

    def bright() -> tuple[TensorData, TensorData]:
        data, draw = trial.shared("task", task), trial.generator()
        return spotted(data.train, draw), spotted(data.test, draw)

    def trained_bright() -> torch.nn.Module:
        batches = trial.shared("bright", bright)[0].batches(100, seed=trial.seed)
        model = copy.deepcopy(trial.shared("trained", trained))
        return zoo.train(model, batches, epochs=trial.scale(smoke=1, laptop=2), lr=3e-3, seed=trial.seed)

    def in_tiles(glare: bool) -> tuple[PatchedModel, TensorData, TensorData]:
        """The patched network, calibration images and test images."""
        train, test = trial.shared("bright", bright) if glare else (trial.shared("task", task).train, trial.shared("task", task).test)
        model, few = trial.shared("trained_bright", trained_bright) if glare else trial.shared("trained", trained), train.x[:128]
        patched = patch_inference(model, few, patches=trial.scale(smoke=(1, 2), laptop=(3, 3)), split="2")
        return patched, TensorData(few, train.y[:128]), test

    def values() -> QuantisedModel:
        patched, few, _ = in_tiles(False)
        return quantmcu(patched, few.x)

    for arm in trial.arms(*PLAIN, *GLARE):
        patched, few, test = in_tiles(arm.name in GLARE)
        found = trial.shared("values", values) if arm.name in ("random_bits", "loss_increase") else None
        start = time.perf_counter()
        if found is not None:
            model = _random(patched, few.x, found, trial.seed) if arm.name == "random_bits" else _by_loss(patched, few, found)
        elif arm.name.removeprefix("glare_") in UNIFORM:
            model = quantise(patched, few.x, UNIFORM[arm.name.removeprefix("glare_")])
        elif arm.name == "glare_mirrored":
            model = _mirrored(patched, few.x)
        else:
            z = float("inf") if arm.name == "glare_no_vdpc" else 3.0
            model = quantmcu(patched, few.x, outlier_z=z, dynamic=arm.name == "glare_dynamic")
        arm.log_timed(search_seconds=time.perf_counter() - start)
        with torch.no_grad():
            memory = trace_memory(model, test.x[:1])
        stage = float(model.counted(test.x).double().mean())
        arm.log(
            accuracy=_accuracy(model, test),
            bitops=(model.bitops - model.stage_bitops + stage) / 1e6,
            stage_bitops=stage / 1e6,
            stage_bytes=model.plan().patch_peak,
            traced_bytes=memory.peak,
            planned_bytes=model.plan().peak,
            outlier_tiles=float(np.mean(outlier_tiles(patched, few.x, 3.0))),
            outliers=float(has_outliers(patched, test.x, usual_values(few.x, 3.0)).double().mean()),
            mean_bits=float(model.bits.double().mean()),
        )
        arm.grid("bits", model.bits.numpy())
        if arm.name.endswith("uniform8"):
            arm.log(plain_accuracy=_accuracy(patched, test))


def spotted(images: TensorData, draw: torch.Generator) -> TensorData:
    """With a bright spot in the first and in the last corner, each in half of the images, one or two pixels from the edges."""
    x = images.x.clone()
    for last in (False, True):
        shown, shift = torch.rand(len(x), generator=draw) < 0.5, torch.randint(1, 3, (len(x), 2), generator=draw)
        rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
        down, across = ((n >= a[:, None]) & (n < a[:, None] + SPOT) for n, a in zip((rows, columns), shift.T))
        spot = shown[:, None, None] & down[:, :, None] & across[:, None, :]
        x = torch.where((spot.flip(1, 2) if last else spot)[:, None], BRIGHT, x)
    return TensorData(x, images.y)


def _accuracy(model: torch.nn.Module, data: TensorData) -> float:
    with torch.no_grad():
        return float(torch.cat([model(x).argmax(1) == y for x, y in data.batches(500, shuffle=False)]).double().mean())


def _random(patched: PatchedModel, images: Tensor, found: QuantisedModel, seed: int) -> QuantisedModel:
    """Random bits, then random changes until the operations are within 1 % of ``found``'s."""
    r, statistics, table = random.Random(seed), Statistics.collect(patched, images), torch.full(found.bits.shape, 8)
    cells = list(itertools.product(*map(range, table.shape)))
    for cell in cells:
        table[cell] = r.choice((8, 4, 2))
    model = QuantisedModel(patched, statistics, table)
    for _ in range(10_000):
        ratio = model.stage_bitops / found.stage_bitops
        if 0.99 <= ratio <= 1.01:
            break
        cell = r.choice(cells)
        table[cell] = min(8, int(table[cell]) * 2) if ratio < 1 else max(2, int(table[cell]) // 2)
        model.table = table.tolist()
    return QuantisedModel(patched, statistics, table)


def _mirrored(patched: PatchedModel, images: Tensor) -> QuantisedModel:
    """8 bits in the tiles left for right of those with outliers, searched bits in all others."""
    loud = torch.tensor(outlier_tiles(patched, images, 3.0)).view(patched.patches).flip(1).flatten()
    table = quantmcu(patched, images, outlier_z=float("inf")).bits
    table[loud] = 8
    return quantise(patched, images, table)


def _by_loss(patched: PatchedModel, few: TensorData, found: QuantisedModel) -> QuantisedModel:
    """Fewer bits where the loss rises least for the operations saved; statistics of all calibration images, loss of 32."""
    statistics, table = Statistics.collect(patched, few.x), torch.full(found.bits.shape, 8)

    def measured(trial: Tensor) -> tuple[float, int]:
        model = QuantisedModel(patched, statistics, trial)
        with torch.no_grad():
            return float(F.cross_entropy(model(few.x[:32]), few.y[:32])), model.stage_bitops

    base, full = measured(table)
    options = []
    for t, i, b in itertools.product(*map(range, table.shape), (4, 2)):
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
    """Accuracy against operations, plain and with bright spots, and the bits of every map and tile."""
    fig.set_size_inches(15, 4.6)
    panels = fig.subplots(1, 3, gridspec_kw={"width_ratios": (1.2, 1.2, 1)})
    titles = "CIFAR-10, 3x3 tiles, no training after rounding", "with bright spots in two corners"
    for axes, arms, title in zip(panels, (PLAIN, GLARE), titles):
        for arm in (a for a in arms if a in record.arms):
            x, y, ours = record.values(arm, "stage_bitops"), record.values(arm, "accuracy"), arm in ("quantmcu", "glare", "glare_dynamic")
            axes.errorbar(
                x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), color=COLOURS[arm], marker="*" if ours else "o", ms=13 if ours else 7,
                capsize=3, ls="", label=LABELS[arm],
            )  # fmt: skip
        axes.set(xlabel="BitOPs of the tiles of an image (millions, counted)", ylabel="test accuracy", title=title)
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.25)
    if "quantmcu" in record.arms:
        maps, bits = panels[2], np.mean(record.grids("quantmcu", "bits"), 0)
        image = maps.imshow(bits, cmap="viridis", vmin=2, vmax=8, aspect="auto")
        for (t, i), b in np.ndenumerate(bits):
            maps.text(i, t, f"{b:.2g}", ha="center", va="center", color="white" if b < 6 else "black", fontsize=8)
        fig.colorbar(image, ax=maps, label="bits, mean of the seeds")
        maps.set(xlabel="map, from the image on", ylabel="tile", title="What QuantMCU chose")
    fig.tight_layout()
