"""What the review says of hypernetworks, each point as one small experiment on scikit-learn's digits (8x8).

* Information sharing, zero-shot: 20 tasks = digits rotated by 20 angles, 40 images each; the condition is (cos, sin) of the angle.
  Tested on those angles and on the 20 between them.
* Continual learning: five tasks of two digits, one after another, the task known at test, no replay.
* Compression: a network of one fixed condition, generated in chunks by fewer parameters than it has.
* Uncertainty: a network conditioned on noise; does its predictive entropy tell digits from digits turned by 90 degrees?

All arms of one point use the same batches, steps and learning rates, and take the rate and the step that are best on validation images.
"""

from __future__ import annotations

from copy import deepcopy
from math import pi
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.optim import Adam

from neurarium import data, meter
from neurarium.learn.conditions import NoiseCondition, OutputPenalty, TaskEmbedding
from neurarium.learn.hyper import HyperNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

TASKS, SHOTS, WIDTH = 20, 40, 64
RATES = (1e-3, 3e-3, 1e-2)
BETA = 0.1
HYPER = {
    "hypernet": {"hidden": (32,)},
    "components": {"hidden": (64,), "output": "components"},
    "chunks": {"hidden": (64,), "output": "chunks", "chunk_size": 64, "chunk_embedding": 16},
}
ROTATION = ("separate", "shared", "film", *HYPER)
CONTINUAL = ("finetune", "cl_hypernet", "cl_no_penalty")
LABELS = {
    "separate": "a net for each task", "shared": "one net for all", "film": "one net, scaled by the angle", "hypernet": "hypernetwork",
    "components": "hypernetwork, by rows", "chunks": "hypernetwork, in chunks",
}  # fmt: skip
COLOURS = dict(zip(ROTATION, ("#999999", "#000000", "#E69F00", "#0072B2", "#56B4E9", "#009E73")))


def run(trial: Trial) -> None:
    task = data.images("digits", seed=trial.seed)
    val, train = (part.to(trial.device) for part in task.train.split(300, seed=trial.seed))
    test = task.test.to(trial.device)
    rates = trial.scale(smoke=RATES[1:2], laptop=RATES)
    for arm in trial.arms(*ROTATION, *CONTINUAL, "target", "chunked", "noise"):
        if arm.name in ROTATION:
            counts = trial.scale(smoke=(TASKS,), laptop=(TASKS, 10, 5))
            unseen, lrs = [], rates
            for count in counts:  # the rate found for all tasks serves the smaller numbers of them
                angles = torch.arange(count, device=trial.device) * 2 * pi / count
                found, best = rotations(arm.name, train, val, test, angles, lrs, trial.scale(smoke=6, laptop=200), trial.seed)
                unseen.append(found["unseen_accuracy"])
                if count == TASKS:
                    arm.log(**found)
                    lrs = [best]
            arm.curve("unseen", x=list(counts), y=unseen)
        elif arm.name in CONTINUAL:
            matrix = continual(arm.name, train, val, test, rates, trial.scale(smoke=2, laptop=100), trial.seed)
            arm.log(accuracy=float(matrix[-1].mean()), learned=float(matrix.diagonal().mean()))
            arm.grid("matrix", matrix)
        else:
            model = {"target": lambda: Plain(mlp()), "chunked": chunked, "noise": Ensemble}[arm.name]().to(trial.device)
            fit(model, train, val, rates, trial.scale(smoke=8, laptop=400), trial.seed)
            inside, outside = probabilities(model, test.x), probabilities(model, turned(test.x, torch.tensor([pi / 2]))[0])
            arm.log(accuracy=float((inside.argmax(1) == test.y).float().mean()), parameters=meter.parameters(model))
            arm.log(auroc=auroc(entropy(inside), entropy(outside)))


class Pixels(nn.Flatten):
    """Standardised by the mean and deviation of all pixels of the set."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) - 0.305) / 0.376


def mlp(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(Pixels(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Every image at every angle: (angles, images, 1, 8, 8)."""
    cos, sin = torch.cos(angles), torch.sin(angles)
    zero = torch.zeros_like(cos)
    maps = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1).to(x)
    grids = F.affine_grid(maps, [len(angles), 1, *x.shape[2:]], align_corners=False)
    return F.grid_sample(x.transpose(0, 1).expand(len(angles), -1, -1, -1), grids, align_corners=False).unsqueeze(2)


# Rotations: outputs are (tasks, images, classes) for conditions (tasks, 2) and images (tasks, images, 1, 8, 8).


class Separate(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        nets = [mlp() for _ in range(count)]
        parameters, _ = stack_module_state(nets)
        self.names, self.values = list(parameters), nn.ParameterList(p.detach() for p in parameters.values())
        self.skeleton = [deepcopy(nets[0]).to("meta")]

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        del c  # task i is row i
        return vmap(lambda w, x: functional_call(self.skeleton[0], w, (x,)))(dict(zip(self.names, self.values)), x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        del c
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FiLM(nn.Module):
    """The condition scales and shifts the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = Pixels(2)
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.film = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(), nn.Linear(64, 2 * WIDTH))

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        scale, shift = self.film(c)[:, None].chunk(2, -1)
        return self.last(torch.relu((1 + scale) * self.first(self.pixels(x)) + shift))


class Hyper(nn.Module):
    def __init__(self, settings: dict) -> None:
        super().__init__()
        self.net = HyperNetwork(mlp(), 2, **settings)

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        return self.net.groups(c, x)


def rotations(name, train, val, test, angles, rates, steps, seed) -> tuple[dict[str, float], float]:
    """Accuracy on the trained angles and halfway between them, the number of parameters; the learning rate that was best."""
    count = len(angles)
    c = torch.stack([angles.cos(), angles.sin()], 1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    picked = torch.cat([order, order])[: count * SHOTS].view(count, SHOTS).to(train.x.device)
    x = torch.stack([turned(train.x[p], a[None])[0] for p, a in zip(picked, angles)])
    y, val_x = train.y[picked], turned(val.x, angles)
    between = angles + pi / count
    best: tuple[float, nn.Module | None, float] = (-1.0, None, 0.0)
    for lr in rates:
        torch.manual_seed(seed)
        model = {"separate": lambda: Separate(count), "shared": Shared, "film": FiLM}.get(name, lambda: Hyper(HYPER[name]))()
        model.to(x.device)
        optimizer = Adam(model.parameters(), lr=lr)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(c, x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
            if step % 25 == 0 or step == steps:
                found = accuracy(model, c, val_x, val.y)
                best = (found, deepcopy(model), lr) if found > best[0] else best
    model = best[1]
    unseen = torch.stack([between.cos(), between.sin()], 1)
    return {
        "accuracy": accuracy(model, c, turned(test.x, angles), test.y),
        "unseen_accuracy": accuracy(model, unseen, turned(test.x, between), test.y),  # separate nets: of the nearest task
        "parameters": meter.parameters(model),
    }, best[2]


@torch.no_grad()
def accuracy(model: nn.Module, c: Tensor, x: Tensor, y: Tensor) -> float:
    return float((model(c, x).argmax(-1) == y).float().mean())


# Continual learning.


def continual(name, train, val, test, rates, steps, seed) -> np.ndarray:
    """Row i: test accuracy on each task after task i was learned.

    The rate is the one at which each task is learned best, on its own validation images: those of earlier tasks are gone.
    """
    parts = [[(p.x[p.y // 2 == t], p.y[p.y // 2 == t] % 2) for t in range(5)] for p in (train, val, test)]
    best: tuple[float, np.ndarray | None] = (-1.0, None)
    for lr in rates:
        torch.manual_seed(seed)
        model = (mlp(2) if name == "finetune" else HyperNetwork(mlp(2), 8, hidden=(32,))).to(train.x.device)
        tasks = TaskEmbedding(5, 8).to(train.x.device)
        generator, rows = torch.Generator().manual_seed(seed), []

        def call(t: int, x: Tensor, model=model, tasks=tasks) -> Tensor:
            return model(x) if name == "finetune" else model(tasks(t), x)

        for t in range(5):
            x, y = parts[0][t]
            held = OutputPenalty(model, tasks(list(range(t))), BETA) if name == "cl_hypernet" and t else None
            optimizer = Adam([*model.parameters(), tasks.vectors[t]], lr=lr)
            for _ in range(steps):
                i = torch.randint(len(x), (64,), generator=generator).to(x.device)
                loss = F.cross_entropy(call(t, x[i]), y[i]) + (held() if held else 0.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            tasks.freeze(t)
            with torch.no_grad():
                rows.append([[float((call(s, x).argmax(1) == y).float().mean()) for s, (x, y) in enumerate(p)] for p in parts[1:]])
        matrices = np.array(rows)  # (after task, validation or test, task)
        best = max(best, (matrices[:, 0].diagonal().mean(), matrices[:, 1]), key=lambda b: b[0])
    return best[1]


# One condition, or noise: models of (groups, images) -> (groups, images, classes).


class Plain(nn.Module):
    draws = 1

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def complexity(self) -> Tensor:
        """Minus the log prior of the matrices, N(0, 2 / fan-in)."""
        return sum(p.square().sum() * p.shape[1] / 4 for p in self.net.parameters() if p.ndim == 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[0])[None]


class Chunked(Plain):
    """One condition, always the same."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.new_ones(1), x[0])[None]

    def complexity(self) -> Tensor:
        return sum(w.square().sum() * w.shape[1] / 4 for w in self.net.weights(self.net.embedding.new_ones(1)).values() if w.ndim == 2)


def chunked() -> Chunked:
    return Chunked(HyperNetwork(mlp(), 1, hidden=(16,), output="chunks", chunk_size=64))


class Ensemble(nn.Module):
    """A draw of noise for each group: a step trains as many networks as there are groups."""

    draws = 6

    def __init__(self) -> None:
        super().__init__()
        self.net, self.noise = HyperNetwork(mlp(), 8, hidden=(32,)), NoiseCondition(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.groups(self.noise(len(x)), x)

    def complexity(self) -> Tensor:
        """Divergence from the same prior of the Gaussian with the mean and variance that the draws show."""
        total = 0.0
        for w in self.net.weights(self.noise(self.draws)).values():
            if w.ndim == 3:
                mean, variance, prior = w.mean(0), w.var(0).clamp_min(1e-8), 2 / w.shape[2]
                total = total + ((variance + mean**2) / prior - 1 - (variance / prior).log()).sum() / 2
        return total


def fit(model, train, val, rates, steps, seed) -> None:
    """The weights of the rate and the step at which validation images are most likely, left in ``model``."""
    best = (-float("inf"), model.state_dict())
    start = deepcopy(model.state_dict())
    for lr in rates:
        model.load_state_dict(start)
        optimizer, generator = Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(seed)
        for step in range(1, steps + 1):
            i = torch.randint(len(train), (model.draws, 64), generator=generator).to(train.x.device)
            optimizer.zero_grad()
            (F.cross_entropy(model(train.x[i]).flatten(0, 1), train.y[i].flatten()) + model.complexity() / len(train)).backward()
            optimizer.step()
            if step % 50 == 0 or step == steps:
                found = float(probabilities(model, val.x)[torch.arange(len(val)), val.y].clamp_min(1e-12).log().mean())
                best = (found, deepcopy(model.state_dict())) if found > best[0] else best
    model.load_state_dict(best[1])


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor, draws: int = 32) -> Tensor:
    return model(x.expand(draws if model.draws > 1 else 1, *x.shape)).softmax(-1).mean(0)


def entropy(p: Tensor) -> np.ndarray:
    return -(p * p.clamp_min(1e-12).log()).sum(1).cpu().numpy()


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often an outsider scores higher; ties count half."""
    return float((outside[:, None] > inside).mean() + 0.5 * (outside[:, None] == inside).mean())


def figure(record: RecordView, fig: Figure) -> None:
    """Unseen angles against the number of tasks, what is remembered of five tasks, size and accuracy, and uncertainty."""
    fig.set_size_inches(11.5, 6.2)
    fig.set_layout_engine("constrained")
    top, bottom = fig.subfigures(2, 1)
    unseen, seen = top.subplots(1, 2)
    for a in ROTATION:
        curves = record.curves(a, "unseen")
        y = 100 * np.array([c[1] for c in curves])
        unseen.errorbar(curves[0][0], y.mean(0), y.std(0), marker="o", capsize=3, color=COLOURS[a], label=LABELS[a])
    unseen.set(xlabel=f"training tasks ({SHOTS} images each)", ylabel="accuracy (%)", title="Angles never seen in training")
    unseen.legend(fontsize=7)
    unseen.grid(alpha=0.3)
    values = [100 * record.values(a, "accuracy") for a in ROTATION]
    seen.barh([LABELS[a] for a in ROTATION], [v.mean() for v in values], xerr=[v.std() for v in values], color=COLOURS.values(), capsize=3)
    seen.invert_yaxis()
    seen.set(xlabel="accuracy on the 20 training angles (%)", title="Sharing: few images a task")
    seen.set_xlim(min(v.min() for v in values) - 8, 100)
    axes = bottom.subplots(1, 5, width_ratios=(1, 1, 1, 1.1, 1.1))
    titles = ("fine-tuning", "hypernetwork\nwith penalty", "hypernetwork,\nno penalty")
    for ax, a, title in zip(axes, CONTINUAL, titles):
        shown = ax.imshow(100 * np.mean(record.grids(a, "matrix"), 0), vmin=40, vmax=100, cmap="viridis")
        ax.set(title=f"{title}: {100 * record.mean(a, 'accuracy'):.0f} %", xlabel="tested on task", xticks=range(5), yticks=range(5))
        ax.set(xticklabels=range(1, 6), yticklabels=range(1, 6))
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("after learning task")
    bottom.colorbar(shown, ax=axes[2], label="accuracy (%)", shrink=0.8)
    for ax, metric, title in ((axes[3], "accuracy", "one network"), (axes[4], "auroc", "turned digits told apart")):
        names = ("target", "chunked") if metric == "accuracy" else ("target", "noise")
        scale = 100 if metric == "accuracy" else 1
        v = [scale * record.values(a, metric) for a in names]
        ax.bar(range(2), [x.mean() for x in v], yerr=[x.std() for x in v], color=("#000000", "#0072B2"), capsize=4, width=0.6)
        size = {a: f"{record.mean(a, 'parameters'):.0f}" for a in names}
        names = [f"plain\n{size['target']}", f"chunked\n{size['chunked']}"] if metric == "accuracy" else ["one net", "noise to\nweights"]
        low = min(x.min() for x in v)
        ax.set(xticks=range(2), xticklabels=names, title=title, ylim=(low - 0.3 * (scale - low), scale))
        ax.set_ylabel("accuracy (%); parameters below" if metric == "accuracy" else "AUROC of predictive entropy", fontsize=8)
        ax.title.set_fontsize(9)
    fig.suptitle("Hypernetworks on digits: one network that writes others")
