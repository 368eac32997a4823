"""Self-expanding networks on CIFAR-10 pooled to 12x12: one run that grows, against networks of fixed size and growth at random.

``expanding`` scores by per-sample gradients (the paper's text; tau 1.05), ``batch`` by gradients of batches (the public code; tau 2).
``small`` never grows. ``final`` has the architecture that ``expanding`` ended with, from scratch, for as many FLOPs as the growing took,
decisions included. ``plain`` ranks candidates by the squared length of the gradient per parameter instead of the natural score.
``random`` grows in the same epochs, at a random place. Learning rate: 2e-3 as in the paper, halved half-way, for all.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR

from neurarium import meter
from neurarium.experiments.images import images
from neurarium.learn.fit import evaluate
from neurarium.learn.grow import Candidate, ExpandableCNN, SelfExpanding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH = 128
COLOURS = {"expanding": "#D55E00", "batch": "#E69F00", "plain": "#009E73", "random": "#56B4E9", "small": "#999999", "final": "#000000"}
LABELS = {
    "expanding": "self-expanding", "batch": "self-expanding, score of batches",
    "plain": "grown by plain gradient norm", "random": "grown at random places",
    "small": "fixed, initial size", "final": "fixed, final size, same FLOPs",
}  # fmt: skip


@dataclass(frozen=True)
class Random(SelfExpanding):
    """Grows in given epochs, anywhere."""

    at: tuple[int, ...] = ()

    def choose(self, model, batches, candidates, epoch):
        place = int(torch.randint(len(candidates), ()))
        return (candidates[place], 0.0) if epoch in self.at else (None, 0.0)


@dataclass(frozen=True)
class Plain(SelfExpanding):
    """Grows in given epochs, where the gradient is longest for its number of entries."""

    at: tuple[int, ...] = ()

    def choose(self, model, batches, candidates, epoch):
        def length(candidate: Candidate) -> float:
            grown = deepcopy(model).eval()
            candidate.apply(grown, batches[0][0], self.noise)
            parameters = list(grown.parameters())
            grads = torch.autograd.grad(F.cross_entropy(grown(batches[0][0]), batches[0][1]), parameters)
            return float(sum(g.square().sum() for g in grads)) / sum(p.numel() for p in parameters)

        return (max(candidates, key=length), 0.0) if epoch in self.at else (None, 0.0)


def run(trial: Trial) -> None:
    task = images(trial, "cifar10", train=(256, 4000), test=(128, 2000), size=12, standardise=True)
    train, test = task.train.to(trial.device), task.test.to(trial.device)
    epochs, cooldown = trial.scale(smoke=(2, 1), laptop=(20, 2))
    batches, held = train.batches(BATCH, seed=trial.seed), test.batches(1000, shuffle=False)
    per_epoch = len(batches)

    def make() -> nn.Module:
        torch.manual_seed(trial.seed)
        return ExpandableCNN((8, 8, 8), in_channels=train.x.shape[1]).to(trial.device)

    def learner(kind: type[SelfExpanding] = SelfExpanding, length: int = epochs, **settings: Any) -> SelfExpanding:
        halve = partial(MultiStepLR, milestones=[max(length * per_epoch // 2, 1)], gamma=0.5)
        settings = {"cooldown": cooldown, "samples": trial.scale(smoke=64, laptop=256)} | settings
        return kind(optimizer=partial(Adam, lr=2e-3), schedule=halve, **settings)

    def work(model: nn.Module) -> int:
        """FLOPs of forward and backward of one image."""
        x, y = train.x[:8], train.y[:8]
        return meter.flops(lambda: F.cross_entropy(model(x), y).backward()) // 8

    def grown() -> dict[str, Any]:
        """The growing run, for the arms that are compared with it."""
        return measured(learner(), make(), batches, held, epochs, work, len(train), trial)

    for arm in trial.arms("expanding", "small", "final", "batch", "random", "plain"):
        if arm.name == "expanding":
            found = trial.shared("grown", grown)
            arm.log(jump=jump(found["model"], held, train.x[:2]), separate_flops=found["separate_flops"])
        elif arm.name == "batch":
            found = measured(learner(fisher="batch", damping=1e-5), make(), batches, held, epochs, work, len(train), trial)
        elif arm.name in ("random", "plain"):
            at = tuple(trial.shared("grown", grown)["epochs"])
            kind = {"random": Random, "plain": Plain}[arm.name]
            found = measured(learner(kind, at=at), make(), batches, held, epochs, work, len(train), trial)
        else:
            model, length = make(), epochs
            if arm.name == "final":
                whole = trial.shared("grown", grown)
                for kind, places, amount in whole["events"]:
                    Candidate(kind, tuple(places), amount, 0).apply(model, train.x[:2], 0.0)
                torch.manual_seed(trial.seed)
                for module in model.modules():
                    if isinstance(module, (nn.Conv2d, nn.Linear)):
                        module.reset_parameters()
                    elif isinstance(module, nn.PReLU):
                        nn.init.constant_(module.weight, 0.25)
                length = max(round(whole["flops"] / (work(model) * len(train))), 1)
            found = measured(learner(length=length, cooldown=10**6), model, batches, held, length, work, len(train), trial)
        arm.log(**{k: found[k] for k in ("accuracy", "best", "parameters", "flops", "growths")})
        arm.curve("accuracy", y=found["path"])
        arm.curve("parameters", y=found["sizes"])


def measured(learner, model, batches, held, epochs, work, images, trial) -> dict[str, Any]:
    """Train, and count the FLOPs of training and of decisions."""
    blocks, per_image = 3, {}
    small = work(model)

    def note(progress) -> None:
        per_image[progress.epoch] = work(progress.model)
        progress.model.zero_grad()

    model.zero_grad()
    history = learner.fit(model, batches, epochs=epochs, val=held, seed=trial.seed, callbacks=[note])
    path = [e["accuracy"] for e in history.val]
    scored = 0 if isinstance(learner, (Random, Plain)) else len(history.extra["ratio"]) * (1 + 2 * blocks) * learner.samples
    sizes = list(dict.fromkeys(per_image.values()))
    flops = images * sum(per_image.values()) + scored * float(np.mean([small, *per_image.values()]))
    return {
        "accuracy": path[-1], "best": max(path), "path": path, "sizes": list(history.extra["parameters"]), "flops": flops,
        "parameters": history.extra["parameters"][-1], "growths": len(history.extra["expansions"]), "epochs": history.extra["expansions"],
        "events": history.state["parts"]["growth"]["events"], "separate_flops": float(images * epochs * sum(sizes)), "model": model,
    }  # fmt: skip


def jump(model: nn.Module, held: Any, example: torch.Tensor) -> float:
    """The largest change of accuracy when the trained model grows, over all ways to grow."""
    before, largest = evaluate(model, held)["accuracy"], 0.0
    for candidate in SelfExpanding().candidates(model, example):
        grown = deepcopy(model)
        candidate.apply(grown, example, 1e-3)
        largest = max(largest, abs(evaluate(grown, held)["accuracy"] - before))
    return largest


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy and size over the epochs; accuracy against FLOPs."""
    fig.set_size_inches(11, 4.2)
    fig.set_layout_engine("constrained")
    course, size, cost = fig.subplots(1, 3)
    for a in [a for a in LABELS if a in record.arms]:
        curves = [100 * np.asarray(y) for _, y in record.curves(a, "accuracy")]
        shortest = min(map(len, curves))  # the length of ``final`` depends on what was grown
        mean = np.mean([c[:shortest] for c in curves], 0)
        course.plot(range(1, shortest + 1), mean, color=COLOURS[a], label=LABELS[a])
        for i, (_, y) in enumerate(record.curves(a, "parameters")):
            size.step(range(1, len(y) + 1), y, where="post", color=COLOURS[a], alpha=0.7, label=LABELS[a] if not i else None)
        x, y = record.values(a, "flops") / 1e9, 100 * record.values(a, "accuracy")
        cost.errorbar(x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), fmt="o", ms=8, capsize=3, mec="k", color=COLOURS[a])
        note = f"{record.mean(a, 'parameters'):,.0f}"
        cost.annotate(note, (x.mean(), y.mean()), textcoords="offset points", xytext=(7, 5), fontsize=8)
    course.set(xlabel="epoch", ylabel="test accuracy (%)", title="growing does not interrupt learning")
    size.set(xlabel="epoch", ylabel="parameters", title="size, one line a seed")
    cost.set(xlabel="GFLOP of training, decisions included", ylabel="test accuracy (%)", title="cost (labels: parameters)")
    fig.legend(*course.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
