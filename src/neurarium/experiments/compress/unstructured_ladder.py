"""Four ways to choose single weights, with and without DSnoT's swaps, on a character GPT and on MLPNet: loss against seconds.

Nothing is trained after pruning. ``excess`` is the held-out loss above that of the dense network. Seconds are those of all three
sparsities together; the swaps' arms count the pruning that they start from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurarium.compress import chita, dsnot, magnitude, sparsegpt, wanda
from neurarium.data import ImageTask
from neurarium.experiments.compress import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SPARSITIES = (0.5, 0.7, 0.9)
STARTS = ("magnitude", "wanda", "sparsegpt", "chita")
NETS = ("gpt", "mlp")


def run(trial: Trial) -> None:
    plain = [f"{net}_{start}" for net in NETS for start in STARTS]
    for arm in trial.arms(*(f"{net}_dense" for net in NETS), *plain, *(f"{name}_dsnot" for name in plain)):
        net, _, rest = arm.name.partition("_")
        if net == "gpt":
            text = trial.shared("gpt", partial(zoo.gpt, trial))
            model: nn.Module = text.model
            loader = text.loader(trial.scale(smoke=16, laptop=128), seed=trial.seed)
            loss: Callable[[nn.Module], float] = partial(text.loss, rows=trial.scale(smoke=20, laptop=250))
        else:
            task = trial.shared("mnist", partial(zoo.mnist, trial))
            model = trial.shared("mlp", partial(zoo.mlpnet, task, epochs=trial.scale(smoke=2, laptop=5), seed=trial.seed))
            loader = [(task.train.x[:512], task.train.y[:512])]
            loss = partial(held_out, task=task)
        if rest == "dense":
            arm.log(loss=loss(model))
            continue
        start, _, swaps = rest.partition("_")
        samples = trial.scale(smoke=16, laptop=64 if net == "gpt" else 200)
        models, seconds = trial.shared(f"{net}_{start}", partial(pruned, model, loader, start, samples))
        if swaps:
            begun = time.perf_counter()
            options = {"modules": ["down"], "cycles": 0.05} if net == "gpt" else {"cycles": 0.05}
            models = [dsnot(m, model, loader, **options) for m in models]
            seconds += time.perf_counter() - begun
        losses = [loss(m) for m in models]
        dense = trial.metric(f"{net}_dense", "loss")
        arm.log(loss=losses, excess=[value - dense for value in losses], excess_loss_70=losses[1] - dense)
        arm.log_timed(prune_seconds=seconds)


def pruned(model: nn.Module, loader: list, start: str, samples: int) -> tuple[list[nn.Module], float]:
    """One model a sparsity, and the seconds that they took."""
    methods: dict[str, Callable[..., nn.Module]] = {
        "magnitude": lambda s: magnitude(model, sparsity=s),
        "wanda": lambda s: wanda(model, loader, sparsity=s),
        "sparsegpt": lambda s: sparsegpt(model, loader, sparsity=s, sequential=False),
        "chita": lambda s: chita(model, loader, sparsity=s, samples=samples, loss_fn=zoo.next_token_loss, chunk=16),
    }
    begun = time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no per-sample gradients
        models = [methods[start](s) for s in SPARSITIES]
    return models, time.perf_counter() - begun


@torch.no_grad()
def held_out(model: nn.Module, task: ImageTask) -> float:
    """Mean cross-entropy on the test images."""
    return float(F.cross_entropy(model.eval()(task.test.x), task.test.y))


def figure(record: RecordView, fig: Figure) -> None:
    names = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "chita": "CHITA"}
    colours = dict(zip(STARTS, ("#999999", "#0072B2", "#E69F00", "#009E73"), strict=True))
    fig.set_size_inches(11, 4.2)
    for axes, (net, title) in zip(fig.subplots(1, 2), (("gpt", "Character GPT"), ("mlp", "MLPNet, MNIST")), strict=True):
        for start in STARTS:
            points = []
            for arm, filled in ((f"{net}_{start}", True), (f"{net}_{start}_dsnot", False)):
                if arm not in record.arms:
                    continue
                x, y = record.mean(arm, "prune_seconds"), record.mean(arm, "excess").clip(1e-3)
                points.append((x, y))
                face = colours[start] if filled else "white"
                for size, value in zip((20, 45, 85), y, strict=True):
                    axes.scatter([x], [value], s=size, facecolor=face, edgecolor=colours[start], zorder=3)
                axes.plot([x] * len(y), y, color=colours[start], linewidth=0.8, label=names[start] if filled else None)
        axes.scatter([], [], facecolor="white", edgecolor="black", label="with DSnoT")
        axes.set(xscale="log", yscale="log", xlabel="seconds to prune at three sparsities", ylabel="held-out loss above dense (nats)")
        axes.set_title(f"{title}: 50, 70, 90 % removed (small to large)", fontsize=10)
        axes.legend(fontsize=8)
