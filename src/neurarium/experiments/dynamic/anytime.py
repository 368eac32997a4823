"""Training of families at equal cost: every arm spends the same counted FLOPs, whatever its steps are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW

from neurarium.data import TensorData
from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.elastic import Config, ElasticFamily, Sliced, active, flops, slots
from neurarium.experiments.dynamic.zoo import Graded, graded

if TYPE_CHECKING:
    from neurarium.lab import Trial

__all__ = ["Anytime", "accuracies", "network", "spend", "task", "unsorted"]

BACKWARD = 3  # a training step costs about three forward passes


@dataclass
class Anytime:
    """What a training run has spent and what a watcher saw on the way."""

    steps: int = 0
    flops: float = 0.0
    seen: list[Any] = field(default_factory=list)
    seen_at: list[int] = field(default_factory=list)  # steps


def task(trial: Trial, *, train: int, test: int) -> Graded:
    """Digits with noise of graded strength at 14x14 (8x8 at the scale smoke)."""
    return graded(trial, train=train, test=test, size=14)


def network(g: Graded, *, blocks: Sequence[int] = (0, 0, 1, 1), expand: float = 0.5) -> ElasticBackbone:
    """BackboneS with group normalisation, elastic, and residual blocks in its last stages."""
    return ElasticBackbone(g.task.train.x.shape[1], g.task.classes, blocks=blocks, expand=expand)


def spend(
    family: ElasticFamily,
    step: Callable[[Tensor, Tensor, int], tuple[Tensor, Iterable[Config]]],
    data: TensorData,
    budget: float,
    *,
    lr: float = 4e-3,
    batch: int = 50,
    seed: int = 0,
    watch: Callable[[], Any] | None = None,
    watches: int = 0,
    after: Callable[[], Any] | None = None,
) -> Anytime:
    """AdamW until the counted FLOPs are spent; the rate rises and falls with the share that is.

    Args:
        step: the loss of ``(x, y, number of the step)`` and the configs that it ran, which are charged ``BACKWARD`` passes a row.
        after: called after each backward pass, while the gradients are there.
        watch: called ``watches`` times, at equal shares of the budget; what it returns is kept.
    """
    price = prices(family, data.x[:1])
    optimizer, run, batches = AdamW(family.parameters(), lr=lr), Anytime(), data.batches(batch, seed=seed, drop_last=True)
    family.train()
    while run.flops < budget:
        for x, y in batches:
            share = run.flops / budget
            for group in optimizer.param_groups:
                group["lr"] = lr * (share / 0.2 if share < 0.2 else 0.5 + 0.5 * math.cos(math.pi * (share - 0.2) / 0.8)) + 1e-6
            optimizer.zero_grad()
            loss, ran = step(x, y, run.steps)
            loss.backward()
            if after is not None:
                after()
            optimizer.step()
            run.steps += 1
            run.flops += BACKWARD * len(x) * sum(price[c] for c in ran)
            due = min(watches, int(run.flops / budget * watches + 1e-9)) - len(run.seen)
            if watch is not None and due > 0:
                family.eval()
                run.seen += [watch()] * due
                run.seen_at += [run.steps] * due
                family.train()
            if run.flops >= budget:
                break
    family.eval()
    return run


def prices(family: ElasticFamily, x: Tensor) -> dict[Config, int]:
    """FLOPs a row of each config."""
    return dict(zip(family.configs, flops(family.model, family.configs, x)))


@torch.no_grad()
def accuracies(family: ElasticFamily, data: TensorData, configs: Iterable[Config] | None = None) -> list[float]:
    """Accuracy of each config."""
    configs = family.configs if configs is None else tuple(configs)
    return [
        float(torch.cat([family.run(x, c).argmax(1) == y for x, y in zip(data.x.split(500), data.y.split(500))]).double().mean())
        for c in configs
    ]


def unsorted(family: ElasticFamily, x: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """The output of as many units as the config has, but drawn at random instead of the leading ones (whole groups of channels)."""
    model = family.model
    orders = {
        id(w): (torch.randperm(w.size // w.step, generator=generator)[:, None] * w.step + torch.arange(w.step)).flatten()
        for w in slots(model)[0]
    }
    moved: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for tensor, axes in module.axes().items() if isinstance(module, Sliced) else ():
            value = getattr(module, tensor, None)
            if isinstance(value, nn.Parameter):
                mixed: Tensor = value
                for dim, w in axes.items():
                    per = value.shape[dim] // w.size
                    mixed = mixed.index_select(dim, (orders[id(w)][:, None] * per + torch.arange(per)).flatten())
                moved[f"{name}.{tensor}"] = mixed
    with active(model, config):
        return functional_call(model, moved, (x,))
