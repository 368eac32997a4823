"""Does a low range entropy of its features tell that a network can be pruned, and does a penalty on it help?

One residual backbone, its 3x3 convolutions dense, hypercomplex (n = 4), depthwise with 1x1 kernel layers, wave blocks or hyperbolic. Each
is trained without (``dense``) and with (``dense_low``) a penalty on the range entropy of the pooled features behind every block. Its 16
ranges lie around random points of the unit sphere that are never moved, so that ranges cannot run away; features are centred and scaled
to mean square norm 1, so that shrinking them does not help either. Then the smallest weights of every tensor inside the blocks are set to
zero, without retraining (algebras of hypercomplex layers and fixed projections stay), and the test accuracy is taken again.

``entropy``: of the features of some test images, in nats, over balls of one radius that cover them, as few as a greedy search finds; it
knows nothing of the penalty's ranges, the entropy over which is ``penalised``. ``retained``: mean over the sparsities of the
accuracy that is left, as a share of the unpruned network's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.experiments.nn.recipes import Backbone, rule
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.entropy import cover, soft_entropy
from neurarium.nn.hyperbolic import PoincareBall, hyperbolic
from neurarium.nn.replace import replace_layers

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

CHANNELS, RANGES, ALPHA, STRENGTH, RATE = 16, 16, 10.0, 0.3, 3e-2
RADIUS = 0.5
SPARSITIES = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
#: recipe -> its name in figures and its colour
NETS = {
    "dense": ("dense", "#000000"),
    "ph4": ("hypercomplex, n = 4", "#0072B2"),
    "kernel": ("kernel", "#CC79A7"),
    "wave": ("wave", "#009E73"),
    "poincare": ("Poincaré", "#E69F00"),
}


def run(trial: Trial) -> None:
    for arm in trial.arms(*[name for net in NETS for name in (net, f"{net}_low")]):
        task = trial.shared("images", lambda: images(trial, train=(128, 3000), test=(150, 1500)))
        net, _, low = arm.name.partition("_")
        model = network(net).to(trial.device, memory_format=torch.channels_last)
        directions = torch.randn(RANGES, CHANNELS, generator=trial.generator(), device=trial.device)
        anchors = functional.normalize(directions, dim=1)
        fit(model, task, trial, anchors, STRENGTH if low else 0.0)
        test = task.test.to(trial.device).batches(500, shuffle=False)
        whole = evaluate(model, test)["accuracy"]
        entropy, penalised = measured(model, task.test.x.to(trial.device), anchors, points=trial.scale(smoke=40, laptop=200))
        arm.log(accuracy=whole, entropy=entropy, penalised=penalised, params=meter.parameters(model))
        trained = {p: p.detach().clone() for p in prunable(model)}
        left = []
        for sparsity in SPARSITIES:
            prune(trained, sparsity)
            left.append(evaluate(model, test)["accuracy"])
        arm.log(accuracy_at=left, retained=float(np.mean(left)) / max(whole, 1e-9))


def network(net: str) -> nn.Module:
    change = hyperbolic(PoincareBall(0.01)) if net == "poincare" else rule(net)
    model = Backbone(CHANNELS)
    return model if change is None else replace_layers(model, change, keep=["stem", "head"])


@contextmanager
def features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the pooled output of every block, centred, of mean square norm 1."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        z = output.mean((2, 3))
        z = z - z.mean(0)
        seen.append(z / z.square().sum(1).mean().clamp_min(1e-12).sqrt())

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def fit(model: nn.Module, task: data.ImageTask, trial: Trial, anchors: Tensor, strength: float) -> None:
    epochs = trial.scale(smoke=1, laptop=2)
    batches = task.train.to(trial.device).batches(64, seed=trial.seed, drop_last=True)

    with features(model) as seen:

        def loss(output: Tensor, y: Tensor) -> Tensor:
            penalty = sum(soft_entropy(z, anchors, ALPHA) for z in seen) / max(len(seen), 1)
            seen.clear()
            return functional.cross_entropy(output, y) + strength * penalty

        Backprop(
            loss=loss,
            optimizer=lambda params: AdamW(params, lr=RATE, weight_decay=0.01),
            schedule=lambda optimizer: OneCycleLR(optimizer, max_lr=RATE, total_steps=epochs * len(batches)),
        ).fit(model, batches, epochs=epochs, seed=trial.seed)


@torch.no_grad()
def measured(model: nn.Module, x: Tensor, anchors: Tensor, points: int) -> tuple[float, float]:
    """Means over the blocks: the entropy of the features over covering balls, and over the penalty's ranges."""
    model.eval()
    with features(model) as seen:
        model(x)
    free = [soft_entropy(z[:points], cover(z[:points], RADIUS), 100.0).item() for z in seen]
    return float(np.mean(free)), float(np.mean([soft_entropy(z, anchors, ALPHA).item() for z in seen]))


def prunable(model: nn.Module) -> list[nn.Parameter]:
    """Weights inside the blocks: no biases, no norms, no algebras."""
    return [p for name, p in model.blocks.named_parameters() if p.dim() > 1 and name.rsplit(".", 1)[-1] != "A"]


@torch.no_grad()
def prune(trained: dict[nn.Parameter, Tensor], sparsity: float) -> None:
    """Sets the share ``sparsity`` of every tensor's entries, those of smallest magnitude, to zero."""
    for p, value in trained.items():
        count = round(sparsity * value.numel())
        mask = torch.ones(value.numel(), dtype=value.dtype, device=value.device)
        mask[value.abs().flatten().argsort()[:count]] = 0
        p.copy_(value * mask.view(value.shape))


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Accuracy by sparsity with and without the penalty, and what is retained against entropy, over all nets and seeds."""
    fig.set_size_inches(13, 5)
    left, middle, right = fig.subplots(1, 3, width_ratios=(5, 5, 4))
    points: dict[str, list[tuple[float, float]]] = {}
    for net, (label, colour) in NETS.items():
        for arm, style in ((net, "-"), (f"{net}_low", "--")):
            at = 100 * np.column_stack([record.values(arm, "accuracy"), record.values(arm, "accuracy_at")])
            left.plot([0, *SPARSITIES], at.mean(0), style, color=colour, label=label if style == "-" else None)
        plain, low = (
            np.column_stack([record.values(arm, "entropy"), record.values(arm, "retained")]) for arm in (net, f"{net}_low")
        )  # fmt: skip
        for a, b in zip(plain, low, strict=True):
            middle.annotate("", b, a, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
        middle.plot(*plain.T, "o", color=colour, label=label)
        middle.plot(*low.T, "o", color=colour, markerfacecolor="white")
        points[net] = [tuple(p) for p in np.concatenate([plain, low])]
    left.plot([], [], "--", color="#777777", label="with penalty")
    left.set(xlabel="share of the blocks' weights set to zero", ylabel="test accuracy (%)", title="Pruned by magnitude, not retrained")
    left.legend(fontsize=8)
    middle.set(xlabel="range entropy of features (nats)", ylabel="accuracy retained (mean over sparsities)")
    middle.set_title("Hollow: with penalty; one arrow a seed")
    middle.grid(alpha=0.25)

    everything = np.concatenate([np.array(p) for p in points.values()])
    inside = np.concatenate([np.array(p) - np.mean(p, 0) for p in points.values()])
    bars = {"all nets": (spearman(everything), "#444444"), "recipe's mean\nsubtracted": (spearman(inside), "#444444")}
    bars |= {NETS[net][0].replace(", ", ",\n"): (spearman(np.array(p)), NETS[net][1]) for net, p in points.items()}
    right.barh(range(len(bars)), [value for value, _ in bars.values()], color=[colour for _, colour in bars.values()])
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(bars)), list(bars), fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(-1, 1), xlabel="rank correlation", title="Entropy and accuracy retained")
    for i, (value, _) in enumerate(bars.values()):
        right.annotate(f"{value:+.2f}", (0, i), xytext=(-4 if value > 0 else 4, 0), textcoords="offset points", va="center",
                       ha="right" if value > 0 else "left", fontsize=8)  # fmt: skip
    fig.tight_layout()


def spearman(points: np.ndarray) -> float:
    """Rank correlation of the two columns."""
    ranks = points.argsort(0).argsort(0)
    return float(np.corrcoef(ranks.T)[0, 1])
