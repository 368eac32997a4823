"""DynST: which half of the sensors a forecaster of an advected field can do without.

A field lives in plumes behind hidden sources and is carried by a wind that no model is told. All arms train one small convolutional
forecaster for the same number of steps and are judged on all cells. ``dynst30``, ``dynst`` and ``dynst70`` end without 30, 50 and 70 % of
the sensors; ``random`` (the mean of three draws), ``uniform_grid`` (a chessboard) and ``variance`` (the cells that vary most) have 50 %
from the start; ``one_shot`` drops them in one round when DynST makes its last; ``no_regrow`` is ``dynst70`` without sensors that come
back.

``auroc``: the probability that a sensor kept is truly more informative (:attr:`neurarium.data.FieldTask.influence`) than one dropped, 1/2
where all are kept. ``tiles``: the share of 4 x 4 tiles of the input that still hold a sensor.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.data import FieldTask, advected_field
from neurarium.dynamic.sensors import DynST, SensorMask, apply_mask
from neurarium.learn.fit import Backprop, evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

RATE, BATCH, ROUNDS = 5e-3, 32, 5
DRAWS = 3  # random layouts, which differ a lot
LEARNED: dict[str, dict[str, Any]] = {
    "dynst30": {"sparsity": 0.3},
    "dynst": {"sparsity": 0.5},
    "dynst70": {"sparsity": 0.7},
    "one_shot": {"sparsity": 0.5, "rounds": 1, "prune_every": ROUNDS, "regrow": 0.0},
    "no_regrow": {"sparsity": 0.7, "regrow": 0.0},
}
FIXED = ("full", "random", "uniform_grid", "variance")
LABELS = {
    "full": "all sensors", "dynst": "DynST", "no_regrow": "none come back", "one_shot": "one round", "random": "random",
    "uniform_grid": "chessboard", "variance": "largest variance",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#555555", "#d55e00", "#e69f00", "#f0e442", "#cc79a7", "#0072b2", "#009e73")))


def run(trial: Trial) -> None:
    sizes, width, epochs = trial.scale(smoke=((40, 20, 12), 8, 6), laptop=((400, 100, 24), 24, 8))
    task = trial.shared("task", lambda: advected_field(*sizes[:2], size=sizes[2], seed=trial.seed))
    train = task.train.to(trial.device)
    test = task.test.to(trial.device).batches(100, shuffle=False)
    for arm in trial.arms(*FIXED, *LEARNED):
        errors, overlap = [], []
        for draw in range(DRAWS if arm.name == "random" else 1):
            model = forecaster(task, width).to(trial.device)
            batches = train.batches(BATCH, seed=trial.seed)
            optimizer = partial(AdamW, lr=RATE)
            schedule = partial(OneCycleLR, max_lr=RATE, total_steps=epochs * len(batches))
            if arm.name in LEARNED:
                settings: dict[str, Any] = {"rounds": ROUNDS, **LEARNED[arm.name]}
                history = DynST(optimizer=optimizer, schedule=schedule, **settings).fit(model, batches, epochs=epochs, seed=trial.seed)
                mask = history.mask
                assert mask is not None
            else:
                mask = layout(arm.name, task, 1000 * draw + trial.seed).to(trial.device)
                learner = Backprop("mse", optimizer, schedule)
                learner.fit(nn.Sequential(SensorMask(mask), model), batches, epochs=epochs, seed=trial.seed)
            errors.append(evaluate(apply_mask(model, mask), test, loss="mse")["loss"])
            mask = mask.cpu()
            overlap.append(auroc(mask, task.influence))
        tiles = F.max_pool2d(mask[None].float(), 4).mean()
        arm.log(mse=float(np.mean(errors)), kept=float(mask.float().mean()), auroc=float(np.mean(overlap)), tiles=float(tiles))
        arm.grid("mask", mask.float())
        if arm.name == "full":
            arm.grid("influence", task.influence)
            arm.grid("down", task.wind[0])
            arm.grid("right", task.wind[1])


def forecaster(task: FieldTask, width: int) -> nn.Sequential:
    """Three convolutions on the torus; times are channels."""
    before, after = task.train.x.shape[1], task.train.y.shape[1]
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="circular")
    return nn.Sequential(conv(before, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, after))


def layout(name: str, task: FieldTask, seed: int) -> Tensor:
    """A layout that no training decides: all sensors, or half of them."""
    size = task.train.x.shape[-1]
    score = {
        "full": lambda: torch.arange(2 * size * size) - size * size,
        "random": lambda: torch.rand(size * size, generator=torch.Generator().manual_seed(seed)),
        "uniform_grid": lambda: (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).flatten(),
        "variance": lambda: task.train.x.var((0, 1)).flatten(),
    }[name]()
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.topk(len(score) // 2).indices] = True
    return chosen[-size * size :].view(size, size)


def auroc(mask: Tensor, influence: Tensor) -> float:
    """P(influence of a kept cell > that of a dropped one); 1/2 where nothing is dropped."""
    kept, dropped = influence[mask], influence[~mask]
    return float((kept[:, None] > dropped).double().mean()) if len(kept) and len(dropped) else 0.5


def figure(record: RecordView, fig: Figure) -> None:
    """Error against sparsity, and the layouts over how informative a cell is and how the wind blows."""
    fig.set_size_inches(11, 7)
    grid = fig.add_gridspec(2, 3, width_ratios=(1.3, 1, 1), hspace=0.05, wspace=0.03)
    curve = fig.add_subplot(grid[:, 0])
    full = record.values("full", "mse")
    for name, colour in COLOURS.items():
        arms = [a for a in (("full", "dynst30", "dynst", "dynst70") if name == "dynst" else (name,)) if a in record.arms]
        if not arms:
            continue
        ratio = np.array([record.values(a, "mse") / full for a in arms])
        off = [100 * (1 - record.mean(a, "kept")) for a in arms]
        style = "o-" if name == "dynst" else "o"
        curve.errorbar(off, ratio.mean(1), yerr=ratio.std(1), fmt=style, color=colour, capsize=3, label=LABELS[name])
    curve.set(xlabel="sensors switched off (%)", ylabel="test error / that with all sensors", title="What missing sensors cost")
    curve.grid(alpha=0.25)
    curve.legend(fontsize=8)
    if not record.grids("full", "influence"):
        return
    influence, wind = record.grids("full", "influence")[0], [record.grids("full", n)[0] for n in ("down", "right")]
    shown = [("dynst", "DynST keeps half"), ("dynst70", "DynST keeps 30 %"), ("random", "random half"), ("variance", "largest variance")]
    places = [grid[i, j] for i in range(2) for j in (1, 2)]
    for (arm, title), place in zip(shown, places, strict=True):
        axis = fig.add_subplot(place)
        axis.imshow(np.log10(influence + 1e-3), cmap="Greys")
        every = slice(1, None, 3)
        rows, columns = np.mgrid[: influence.shape[0], : influence.shape[1]]
        down, right = (w[every, every] for w in wind)
        axis.quiver(columns[every, every], rows[every, every], right, down, angles="xy", color="#0072b2", width=0.006)
        y, x = np.nonzero(record.grids(arm, "mask")[0] > 0.5)
        axis.plot(x, y, "s", ms=2.2, color="#d55e00")
        axis.set(xticks=[], yticks=[], title=title)
    fig.text(0.68, 0.02, "dark: informative cells; orange: sensors kept; arrows: wind (first seed)", ha="center", fontsize=8)
