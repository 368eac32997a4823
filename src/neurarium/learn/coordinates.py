"""The coordinate check: does every layer learn at the same speed at every width?

A few steps of training at several widths, and the root mean square by which each layer's outputs have changed. In a correct
parametrisation this does not depend on the width; a layer whose change grows will diverge when the network is wide enough, one whose change
falls will stop learning. The check takes seconds and finds most mistakes of a parametrisation.

*Source.* arXiv 2203.03466, its appendix on coordinate checking.

*Departures.* Changes since the start instead of sizes: a size that initialisation dominates hides a layer that does not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from neurarium.errors import BadInput
from neurarium.learn.fit import call, find_loss
from neurarium.roles import Loader, Report

__all__ = ["CoordinateCheck", "coordinate_check"]


@dataclass(frozen=True)
class CoordinateCheck(Report):
    """RMS change of each layer's output since the start, ``change[layer, step, width]``, and its slope over width after the last step."""

    widths: tuple[int, ...]
    layers: tuple[str, ...]
    change: Tensor
    slope: dict[str, float]  # d log(change) / d log(width): 0 where the layer learns alike at all widths


def coordinate_check(
    make: Callable[[int], tuple[nn.Module, Optimizer]],
    widths: Sequence[int],
    loader: Loader,
    *,
    steps: int = 4,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    seeds: int = 1,
) -> CoordinateCheck:
    """Train ``make(width) -> (model, optimizer)`` for a few steps at each width and watch every linear, convolution and embedding layer.

    In muP every slope is near 0. A positive slope is a layer that blows up with width, a negative one a layer that stops learning.
    """
    if len(set(widths)) < 2 or steps < 1:
        raise BadInput("a coordinate check needs two widths and one step at least")
    batches = [batch for _, batch in zip(range(steps), _again(loader), strict=False)]
    found: list[dict[str, Tensor]] = []
    for width in widths:
        total: dict[str, Tensor] = {}
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model, optimizer = make(width)
                before = _outputs(model, batches[0][0])
                for step, (x, y) in enumerate(batches):
                    optimizer.zero_grad()
                    find_loss(loss)(call(model, x), y).backward()
                    optimizer.step()
                    for name, out in _outputs(model, batches[0][0]).items():
                        change = (out - before[name]).double().square().mean().sqrt()
                        total.setdefault(name, torch.zeros(steps, dtype=torch.float64))[step] += change / seeds
        found.append(total)
    layers = tuple(found[0])
    change = torch.stack([torch.stack([f[name] for f in found], -1) for name in layers])
    x = torch.tensor(widths, dtype=torch.float64).log()
    y = change[:, -1].clamp(min=1e-300).log()
    slopes = (y * (x - x.mean())).sum(-1) / (x - x.mean()).square().sum()
    return CoordinateCheck(tuple(widths), layers, change, dict(zip(layers, slopes.tolist(), strict=True)))


def _again(loader: Loader) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise BadInput("the loader yielded no batch")


def _outputs(model: nn.Module, x: Any) -> dict[str, Tensor]:
    """What every layer with weights puts out for ``x``."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[name] = (out[0] if isinstance(out, tuple) else out).detach()

        return hook

    layers = (nn.Linear, _ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if isinstance(m, layers)]
    try:
        with torch.no_grad():
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return found
