"""Which configs a model has, and how it is made to run one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

from torch import nn

from neurarium.dynamic.elastic.layers import Depth
from neurarium.dynamic.elastic.slices import Config, Sliced, Width
from neurarium.errors import BadInput

__all__ = ["active", "at", "check", "full", "grid", "slots"]


def slots(model: nn.Module) -> tuple[tuple[Width, ...], tuple[Depth, ...]]:
    """The widths and depths of a model, each in the order in which a module first uses it."""
    return _find(model)[:2]


def _find(model: nn.Module) -> tuple[tuple[Width, ...], tuple[Depth, ...], list[Sliced]]:
    """Widths, depths and the norms that keep batch statistics. Every run asks, so this walks by itself what ``modules()`` recurses into."""
    widths: dict[int, Width] = {}
    depths, norms = [], []
    ahead: list[nn.Module | None] = [model]
    seen: set[nn.Module | None] = {None}
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, Sliced):
            for width in module.follows:
                widths.setdefault(id(width), width)
            if module.batch:
                norms.append(module)
        elif isinstance(module, Depth):
            depths.append(module)
        ahead.extend(reversed(module._modules.values()))
    return tuple(widths.values()), tuple(depths), norms


def full(model: nn.Module) -> Config:
    """The config that runs everything."""
    widths, depths = slots(model)
    return Config(tuple(w.size for w in widths), tuple(len(d._modules) for d in depths))


def at(model: nn.Module, width: float | Sequence[float] = 1.0, depth: float | Sequence[float] = 1.0) -> Config:
    """The config of these shares of every width (or of each) and of the blocks that may be skipped (or of each depth)."""
    widths, depths = slots(model)
    return Config(
        tuple(w.at(r) for w, r in zip(widths, _each(width, len(widths), "widths"))),
        tuple(d.values[round(r * (len(d.values) - 1))] for d, r in zip(depths, _each(depth, len(depths), "depths"))),
    )


def grid(model: nn.Module, widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0), *, together: bool = False) -> list[Config]:
    """Every combination of these shares of the widths (``together``: all widths have the same share) with every combination of depths."""
    wide, deep = slots(model)
    per = [tuple(w.at(r) for r in widths) for w in wide]
    choices = list(zip(*per)) if together and per else list(product(*per))
    return list(dict.fromkeys(Config(tuple(w), d) for w in choices for d in product(*(d.values for d in deep))))


def _each(ratio: float | Sequence[float], n: int, what: str) -> Sequence[float]:
    ratios = [ratio] * n if isinstance(ratio, int | float) else list(ratio)
    if len(ratios) != n or not all(0 <= r <= 1 for r in ratios):
        raise BadInput(f"the model has {n} {what}, each needs a share between 0 and 1; got {ratios}")
    return ratios


@contextmanager
def active(model: nn.Module, config: Config) -> Iterator[nn.Module]:
    """Inside, ``model`` runs as ``config`` says; afterwards as before."""
    widths, depths, norms = _find(model)
    check(config, widths, depths)
    parts = (*widths, *depths)
    before, rows = [p.active for p in parts], [m.row for m in norms]
    for part, n in zip(parts, config.key):
        part.active = n
    for m in norms:
        m.select(config)
    try:
        yield model
    finally:
        for part, n in zip(parts, before):
            part.active = n
        for m, row in zip(norms, rows):
            m.row = row


def check(config: Config, widths: Sequence[Width], depths: Sequence[Depth]) -> None:
    """Raise :class:`BadInput` unless the model has such a config."""
    if len(config.widths) != len(widths) or len(config.depths) != len(depths):
        raise BadInput(
            f"the model has {len(widths)} widths and {len(depths)} depths; the config names {len(config.widths)} and {len(config.depths)}"
        )
    for slot, n in zip((*widths, *depths), config.key):
        if n not in slot.values:
            raise BadInput(f"{slot.name!r} cannot be {n}: it takes {_short(slot.values)}")


def _short(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) if len(values) <= 8 else f"{values[0]}, {values[1]}, ..., {values[-1]}"
