"""Training of policies: one loop for all of them, and features cached once where the backbone is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from neurarium.data.tensors import TensorData
from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.outcome import Policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Progress, device_of, loop, to
from neurarium.roles import History, Loader

__all__ = ["CachedStages", "cached", "fit_policy", "measure"]

DEFAULT: Callable[..., Optimizer] = partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)


def fit_policy(
    policy: Policy,
    loader: Loader,
    *,
    epochs: int,
    optimizer: Callable[..., Optimizer] = DEFAULT,
    schedule: Callable[[Optimizer], Any] | None = None,
    val: Loader | None = None,
    seed: int = 0,
    callbacks: Sequence[Callable[[Progress], bool | None]] = (),
) -> History:
    """Train ``policy`` in place by its own ``loss``, changing at each step only what ``policy.trainable(step)`` names.

    Args:
        optimizer: makes one optimizer of all parameters that require a gradient; one that a step leaves out keeps its momentum untouched.
        schedule: makes a learning-rate scheduler, stepped after every batch.
        val: where the policy is measured after each epoch, and what :meth:`Policy.begin_epoch` may look at (``loader`` without it).
    """
    made = optimizer([p for p in policy.parameters() if p.requires_grad])
    scheduler = None if schedule is None else schedule(made)
    watch, count = loader if val is None else val, 0

    def step(x: Any, y: Tensor) -> tuple[Tensor, None]:
        nonlocal count
        made.zero_grad()
        loss = policy.loss(x, y, count)
        loss.backward()
        allowed = {id(p) for p in policy.trainable(count)}
        for p in policy.parameters():
            if id(p) not in allowed:
                p.grad = None
        if torch.isfinite(loss.detach()):
            made.step()
            if scheduler is not None:
                scheduler.step()
        count += 1
        return loss, None

    def next_epoch(progress: Progress) -> None:
        policy.begin_epoch(progress.epoch + 1, progress.steps, watch)

    policy.begin_epoch(0, 0, watch)
    return loop(
        policy, loader, epochs=epochs, step=step, parts={"optimizer": made, "schedule": scheduler}, val=val,
        evaluator=partial(measure, policy), seed=seed, callbacks=[*callbacks, next_epoch],
    )  # fmt: skip


@torch.no_grad()
def measure(policy: Policy, loader: Loader, *, budget: float | None = None, threshold: float | None = None) -> dict[str, float]:
    """Loss and accuracy of what the policy answers, and its mean cost in FLOPs a row."""
    device, n, total = device_of(policy), 0, {"loss": 0.0, "accuracy": 0.0, "cost": 0.0}
    with evaluating(policy):
        for x, y in loader:
            x, y = to(x, device), to(y, device)
            outcome = policy.decide(x, budget=budget, threshold=threshold)
            n += len(y)
            total["loss"] += float(F.cross_entropy(outcome.output, y, reduction="sum"))
            total["accuracy"] += float((outcome.output.argmax(1) == y).sum())
            total["cost"] += float(outcome.cost.sum())
    if n == 0:
        raise BadInput("the loader yielded no samples to measure on")
    return {name: value / n for name, value in total.items()}


class CachedStages(nn.Module):
    """A staged network whose input is what its heads' weights read, computed once: ``x`` is ``features(images)``, ``(n, d)``.

    The weights of the heads are shared with the network, the rest is not run. Costs are those of the network. Meant for training heads and
    gates on a frozen backbone, and for sweeps; deciding here saves no work.
    """

    def __init__(self, staged: Any, table: CostTable, example: Any) -> None:
        super().__init__()
        if not isinstance(getattr(staged, "heads", None), nn.ModuleList):
            raise UnsupportedModel("has no `heads` whose inputs could be cached", module=type(staged).__name__)
        self.network, self.table = (staged,), table  # in a tuple: not a submodule
        self.heads = nn.ModuleList(_weighted(h) for h in staged.heads)
        self.shapes = [f.shape[1:] for f in self._parts(example[:1])]

    @property
    def n_stages(self) -> int:
        return len(self.heads)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.unflatten(1, s) for p, s in zip(x.split([s.numel() for s in self.shapes], 1), self.shapes))

    def stage(self, k: int, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        return state, self.heads[k](state[k])

    def features(self, x: Any) -> Tensor:
        """``(n, d)``: the inputs of all heads, flattened and side by side."""
        return torch.cat([f.flatten(1) for f in self._parts(x)], 1)

    def collect(self, loader: Loader) -> TensorData:
        """The features of all batches, in the loader's order."""
        device = device_of(self)
        batches = [(self.features(to(x, device)), to(y, device)) for x, y in loader]
        if not batches:
            raise BadInput("the loader yielded no samples to cache")
        return TensorData(*(torch.cat(parts) for parts in zip(*batches)))

    @torch.no_grad()
    def _parts(self, x: Any) -> list[Tensor]:
        (staged,), seen = self.network, {}

        def note(k: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[k] = args[0]

        handles = [h[0].register_forward_pre_hook(partial(note, k)) for k, h in enumerate(self.heads)]
        try:
            with evaluating(staged):
                state = staged.start(x)
                for k in range(staged.n_stages):
                    state, _ = staged.stage(k, state)
        finally:
            for handle in handles:
                handle.remove()
        return [seen[k] for k in range(staged.n_stages)]


def _weighted(head: nn.Module) -> nn.Sequential:
    """The head without the leading modules that have nothing to learn: no parameters, no running statistics."""
    parts = list(head) if isinstance(head, nn.Sequential) else [head]
    first = next((i for i, part in enumerate(parts) if [*part.parameters(), *part.buffers()]), 0)
    return nn.Sequential(*parts[first:])


@contextmanager
def cached(policy: EarlyExit, example: Any) -> Iterator[CachedStages]:
    """Inside, ``policy`` reads features instead of inputs shaped like ``example``; afterwards it is on its network again, trained::

    with cached(policy, x) as cache:
        fit_policy(policy, cache.collect(loader).batches(64), epochs=10)
    """
    network = policy.staged
    cache = CachedStages(network, policy.costs(example), example).train(network.training)
    policy.staged = cache
    try:
        yield cache
    finally:
        policy.staged = network
