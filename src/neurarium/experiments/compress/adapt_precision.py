"""AdaPT against float and fixed formats: a small convolution network for MNIST, trained from scratch with gradients of norm 1 in all arms.

``plain`` is ordinary SGD on the gradients as they are. ``no_up`` and ``no_down`` leave out one of the two pushes. The sizes are measured,
the speed-ups are the paper's cost model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress.quant.adapt import AdaPT, init_weights, size_ratio, speedups
from neurarium.experiments.compress.zoo import accuracy
from neurarium.experiments.images import images
from neurarium.learn.fit import Backprop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

#: the best of 0.01, 0.03 and 0.1 for float and for AdaPT (gradients of norm 1), the better of 0.03 and 0.3 for plain SGD
RATE, PLAIN = 0.1, 0.03


def network(classes: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(18 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes),
    )  # fmt: skip


def run(trial: Trial, rate: float = RATE, plain: float = PLAIN) -> None:
    task = images(trial, "mnist", train=(200, 3000), test=(200, 10_000), size=14, standardise=True)
    batches = task.train.batches(64, seed=trial.seed)
    epochs = trial.scale(smoke=2, laptop=5)
    steps = epochs * len(batches)
    lookback = trial.scale(smoke=(2, 4), laptop=(10, 50))
    adapt = AdaPT(
        optimizer=partial(SGD, lr=rate, momentum=0.9), schedule=partial(OneCycleLR, max_lr=rate, total_steps=steps), lookback=lookback
    )
    learners = {
        "float32": replace(adapt, quantise=False), "adapt": adapt, "fixed8": replace(adapt, down=False, up=False),
        "fixed16": replace(adapt, init=(16, 8), down=False, up=False), "no_up": replace(adapt, up=False),
        "no_down": replace(adapt, down=False),
        "plain": Backprop(optimizer=partial(SGD, lr=plain, momentum=0.9), schedule=partial(OneCycleLR, max_lr=plain, total_steps=steps)),
    }  # fmt: skip
    for arm in trial.arms(*learners):
        model = init_weights(network(task.classes, trial.scale(smoke=4, laptop=16)), scale=2.0, seed=trial.seed)
        history = learners[arm.name].fit(model, batches, epochs=epochs, seed=trial.seed)
        arm.log(acc=accuracy(model, task))
        arm.curve("loss", x=list(range(epochs)), y=[e["loss"] for e in history.train])
        if arm.name == "plain":
            continue
        names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        speed = speedups(
            history, macs(model, task.train.x[:1], names), weights={n: model.get_submodule(n).weight.numel() for n in names}, batch=64,
            lookback=sum(lookback) / 2,
        )  # fmt: skip
        words = [history.extra[f"word/{n}"] for n in names]
        last = torch.tensor([w[-1] for w in words])
        arm.log(
            size_ratio=size_ratio(model, history), inference_speedup=speed["inference"], training_speedup=speed["training"],
            word_std=float(last.std(correction=0)), word_mean=float(last.mean()),
        )  # fmt: skip
        for i, word in enumerate(words):
            arm.curve(f"word{i}", x=list(range(0, len(word), 3)), y=word[::3])


def macs(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, float]:
    """Multiply-adds of each layer for one image."""
    found: dict[str, float] = {}

    def count(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        found[name] = float(output.numel() // len(output) * module.weight[0].numel())  # type: ignore[index, union-attr]

    handles = [model.get_submodule(n).register_forward_hook(partial(count, n)) for n in names]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(11, 3.7)
    words, loss, acc = fig.subplots(1, 3)
    layers = ("first convolution", "second convolution", "first linear", "last linear")
    for i, (label, colour) in enumerate(zip(layers, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), strict=True)):
        words.step(*record.curves("adapt", f"word{i}")[0], where="post", color=colour, label=label)
        words.step(*record.curves("no_up", f"word{i}")[0], where="post", color=colour, linestyle=":", linewidth=0.8)
    words.set(xlabel="step", ylabel="word length (bits)", title="AdaPT (dotted: without push-up)", ylim=(0, 33))
    words.legend(fontsize=7)
    styles = {
        "float32": ("float", "#000000"), "adapt": ("AdaPT", "#0072B2"), "no_up": ("AdaPT, no push-up", "#56B4E9"),
        "no_down": ("AdaPT, no push-down", "#009E73"), "fixed16": ("<16, 8>", "#E69F00"), "fixed8": ("<8, 4>", "#D55E00"),
    }  # fmt: skip
    for arm, (label, colour) in styles.items():
        x, y = record.curves(arm, "loss")[0]
        loss.semilogy([e + 1 for e in x], y, marker="o", markersize=3, color=colour, label=label)
        a, s = 100 * record.values(arm, "acc"), record.values(arm, "size_ratio")
        spread = a.std(ddof=1) if len(a) > 1 else 0
        acc.errorbar(s.mean(), a.mean(), spread, marker="o", capsize=3, color=colour, label=label)
    loss.set(xlabel="epoch", ylabel="training loss", title="MNIST, 3,000 images")
    loss.legend(fontsize=7)
    acc.set(xlabel="size of the weights / float", ylabel="test accuracy (%)", title="Size and accuracy", xlim=(0, 1.05))
