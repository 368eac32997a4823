"""Smooth Grad-CAM++ against the methods that it refines, where the right answer is known.

Scattered digits: a canvas of 64 x 64 holds one to three MNIST digits of the class to explain, two digits of two other classes and
fragments of digits as clutter. A net of four convolutions learns which classes are present; every method explains the class for the same
300 test canvases. The boxes of the digits say where the evidence is, which photographs with one label do not.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import data
from neurarium.learn.fit import Backprop
from neurarium.trust.explain import class_activation, faithfulness, localise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

EDGE, TILE, MOST = 64, 16, 3
LAYER = "maps"  # the last convolution's output, 16 x 16
METHODS = {"gradcam": "gradcam", "gradcampp": "gradcam++", "averaged": "averaged_gradcam", "smooth": "smooth_gradcam++"}
ARMS = (*METHODS, "gradient", "centre", "random_model")
SHOWN = 3  # canvases whose maps are kept for the figure


class Canvases(NamedTuple):
    x: Tensor  # (n, 1, EDGE, EDGE) in [0, 1]
    labels: Tensor  # (n, 10) 1 where a class is present
    target: Tensor  # (n,) the class to explain
    objects: Tensor  # (n, MOST, EDGE, EDGE) boxes of its digits
    corners: np.ndarray  # (n, MOST, 2) top left of the boxes, -1 where there is none


def run(trial: Trial) -> None:
    scene = trial.shared("scene", lambda: prepare(trial))
    net, tests = scene["net"], scene["tests"]
    few = trial.scale(smoke=4, laptop=60)  # images of the deletion and insertion curves
    for arm in trial.arms(*ARMS):
        model = cnn() if arm.name == "random_model" else net
        with arm.timed("explain_seconds"):
            maps = explain(arm.name, model, tests, trial)
        where = localise(maps, tests.objects, radius=12)  # a digit's extent; the centres of two are at least 16 apart
        arm.log(
            instances_hit=where.hit.mean().item(), energy_in_box=where.energy.mean().item(), pointing=where.pointing.mean().item(),
            iou=where.iou.mean().item(), entropy=where.entropy.mean().item(),
        )  # fmt: skip
        faith = faithfulness(net, tests.x[:few], maps[:few], tests.target[:few], score="sigmoid", steps=trial.scale(smoke=4, laptop=12))
        arm.log(
            deletion=faith.deletion.mean().item(), insertion=faith.insertion.mean().item(), average_drop=faith.drop.mean().item(),
            increase=faith.increase.mean().item(),
        )  # fmt: skip
        arm.log(net_auroc=scene["auroc"])
        shown = np.flatnonzero(tests.corners[:, MOST - 1, 0] >= 0)[:SHOWN]
        for i, row in enumerate(shown):
            arm.grid(f"map{i}", maps[row])
            if arm.name == "gradcam":  # once is enough for the figure
                arm.grid(f"canvas{i}", tests.x[row, 0])
                arm.log(**{f"corners{i}": tests.corners[row].ravel().tolist()})


def prepare(trial: Trial) -> dict[str, Any]:
    """The trained net, the canvases to explain, and how well the net tells which classes are present (mean AUROC on them)."""
    digits = data.images(trial.scale(smoke="digits", laptop="mnist"), size=TILE, seed=trial.seed)
    count = trial.scale(smoke=256, laptop=20_000)
    single = data.TensorData(digits.train.x[:count], digits.train.y[:count])
    train = scatter(digits.train, trial.scale(smoke=64, laptop=4000), [trial.seed, 0])
    tests = scatter(digits.test, trial.scale(smoke=6, laptop=300), [trial.seed, 1])
    net, epochs, size = cnn(), trial.scale(smoke=1, laptop=6), 32
    first = Backprop(optimizer=partial(torch.optim.AdamW, lr=2e-3))  # single digits, as photographs' nets begin with ImageNet
    first.fit(net, single.batches(64, seed=trial.seed), epochs=trial.scale(smoke=1, laptop=2), seed=trial.seed)
    batches = data.TensorData(train.x, train.labels).batches(size, seed=trial.seed)
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=4e-3, total_steps=epochs * len(batches))
    second = Backprop(loss=F.binary_cross_entropy_with_logits, optimizer=torch.optim.AdamW, schedule=cycle)
    second.fit(net, batches, epochs=epochs, seed=trial.seed)
    with torch.no_grad():
        logits = net.eval()(tests.x)
    return {"net": net, "tests": tests, "auroc": auroc(logits, tests.labels)}


def explain(name: str, model: nn.Module, tests: Canvases, trial: Trial) -> Tensor:
    """(n, EDGE, EDGE) maps in [0, 1]."""
    if name == "centre":
        line = torch.arange(EDGE) - (EDGE - 1) / 2
        bump = torch.exp(-(line[:, None].square() + line.square()) / (2 * (EDGE / 4) ** 2))
        return bump.expand(len(tests.x), -1, -1)
    if name == "gradient":
        x = tests.x.clone().requires_grad_()
        score = model.eval()(x).gather(1, tests.target[:, None]).sum()
        size = torch.autograd.grad(score, x)[0].abs().amax(1)
        return size / size.amax((1, 2), keepdim=True).clamp_min(1e-12)
    method = METHODS.get(name, METHODS["smooth"])
    samples = trial.scale(smoke=3, laptop=25)
    return class_activation(model, tests.x, tests.target, layer=LAYER, method=method, samples=samples, seed=trial.seed).map


def cnn() -> nn.Sequential:
    """Four convolutions, the largest value of each map over the canvas, two fully connected layers."""
    layers = [
        ("conv1", nn.Conv2d(1, 16, 3, padding=1)), ("relu1", nn.ReLU()), ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(16, 32, 3, padding=1)), ("relu2", nn.ReLU()), ("pool2", nn.MaxPool2d(2)),
        ("conv3", nn.Conv2d(32, 48, 3, padding=1)), ("relu3", nn.ReLU()),
        ("conv4", nn.Conv2d(48, 64, 3, padding=1)), (LAYER, nn.ReLU()),
        ("pool", nn.AdaptiveMaxPool2d(1)), ("flat", nn.Flatten()),
        ("fc1", nn.Linear(64, 128)), ("relu5", nn.ReLU()), ("fc2", nn.Linear(128, 10)),
    ]  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def scatter(digits: data.TensorData, n: int, seed: list[int]) -> Canvases:
    """``n`` canvases of ``digits`` (TILE x TILE). Digits do not overlap; clutter lies anywhere."""
    rng = np.random.default_rng(seed)
    tiles, y = digits.x[:, 0].numpy(), digits.y.numpy()
    rows = [np.flatnonzero(y == c) for c in range(10)]
    x, labels = np.zeros((n, EDGE, EDGE), np.float32), np.zeros((n, 10), np.float32)
    target, corners = np.zeros(n, np.int64), np.full((n, MOST, 2), -1)
    for i in range(n):
        own, *others = rng.choice(10, 3, replace=False)
        count = rng.integers(1, MOST + 1)
        classes = [own] * count + others
        places = _places(rng, len(classes))
        target[i], labels[i, classes], corners[i, :count] = own, 1.0, places[:count]
        for _ in range(8):  # clutter: 6 x 6 cut from the middle of any digit
            a, b, u, v = rng.integers(0, EDGE - 6, 2).tolist() + rng.integers(3, TILE - 9, 2).tolist()
            piece = tiles[rng.integers(len(tiles)), u : u + 6, v : v + 6]
            np.maximum(x[i, a : a + 6, b : b + 6], piece, out=x[i, a : a + 6, b : b + 6])
        for c, (a, b) in zip(classes, places):
            tile = tiles[rng.choice(rows[c])]
            np.maximum(x[i, a : a + TILE, b : b + TILE], tile, out=x[i, a : a + TILE, b : b + TILE])
    inside = np.zeros((n, MOST, EDGE, EDGE), bool)
    for i, j in zip(*np.nonzero(corners[..., 0] >= 0)):
        a, b = corners[i, j]
        inside[i, j, a : a + TILE, b : b + TILE] = True
    return Canvases(torch.from_numpy(x)[:, None], torch.from_numpy(labels), torch.from_numpy(target), torch.from_numpy(inside), corners)


def _places(rng: np.random.Generator, count: int) -> np.ndarray:
    """Corners (count, 2) of tiles that do not overlap; begun anew where one finds no place."""
    while True:
        found = np.empty((0, 2), np.int64)
        for place in rng.integers(0, EDGE - TILE + 1, (40, 2)):
            if (np.abs(found - place).max(1, initial=0) >= TILE).all() if len(found) else True:
                found = np.vstack([found, place])
                if len(found) == count:
                    return found


def auroc(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the chance that a canvas with the class scores higher than one without."""
    better = logits[:, None] > logits[None]
    pairs = (labels[:, None] > labels[None]).float()
    return ((better * pairs).sum((0, 1)) / pairs.sum((0, 1)).clamp_min(1.0)).mean().item()


NAMES = {
    "gradcam": "Grad-CAM", "gradcampp": "Grad-CAM++", "averaged": "averaged Grad-CAM", "smooth": "Smooth Grad-CAM++",
    "gradient": "gradient", "centre": "centre prior", "random_model": "Smooth Grad-CAM++,\nrandom weights",
}  # fmt: skip
COLOURS = dict(zip(ARMS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#999999", "#E69F00")))


def figure(record: RecordView, fig: Figure) -> None:
    from matplotlib.patches import Rectangle
    from scipy import stats

    fig.set_size_inches(13, 9)
    upper, lower = fig.subfigures(2, 1, height_ratios=(1.5, 1))
    upper.suptitle("One class, three digits of it (boxes), two others and clutter: where does each method look?", fontsize=12)
    axes = upper.subplots(SHOWN, len(ARMS) + 1)
    for i, row in enumerate(axes):
        canvas = record.grids("gradcam", f"canvas{i}")[0] if record.has("gradcam", f"corners{i}") else None
        for ax, name in zip(row, ("", *ARMS)):
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(NAMES.get(name, "canvas"), fontsize=9, va="bottom")
            if canvas is None or (name and not record.has(name, "entropy")):
                continue
            ax.imshow(canvas, cmap="gray_r", extent=(0, EDGE, EDGE, 0))
            if name:
                ax.imshow(record.grids(name, f"map{i}")[0], cmap="inferno", alpha=0.72, extent=(0, EDGE, EDGE, 0), vmin=0, vmax=1)
            for top, left in record.values("gradcam", f"corners{i}")[0].reshape(-1, 2):
                ax.add_patch(Rectangle((left, top), TILE, TILE, fill=False, edgecolor="#00FFCC" if name else "#0072B2", linewidth=1.2))
    bars = (
        ("instances_hit", "digits hit", "share, larger is better"),
        ("energy_in_box", "map inside the boxes", "share, larger is better"),
        ("entropy", "entropy of the map", "of the largest, smaller is sharper"),
        ("insertion", "insertion", "area, larger is better"),
        ("deletion", "deletion", "area, smaller is better"),
    )
    panels = lower.subplots(1, len(bars), sharey=True)
    for ax, (metric, title, unit) in zip(panels, bars):
        for place, name in enumerate(reversed(ARMS)):
            if not record.has(name, metric):
                continue
            values = record.values(name, metric)
            values = values[np.isfinite(values)]
            error = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else 0.0
            ax.barh(place, values.mean(), xerr=error, color=COLOURS[name], height=0.72, error_kw={"capsize": 3, "lw": 1})
            ax.plot(values, np.full(len(values), place), "k.", markersize=3)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(unit, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(ARMS)), [NAMES[n].replace("\n", " ") for n in reversed(ARMS)], fontsize=9)
