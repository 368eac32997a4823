"""Latency: the median of repeated, warmed-up, interleaved runs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from neurarium.errors import BadInput

__all__ = ["Timing", "latency"]


@dataclass(frozen=True)
class Timing:
    """Seconds a run: the median, and the 10 and 90 % quantiles."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        unit, name = next(((u, n) for u, n in ((1.0, "s"), (1e-3, "ms")) if self.median >= u), (1e-6, "us"))
        return f"{self.median / unit:.3g} {name} ({self.low / unit:.3g} to {self.high / unit:.3g})"


@overload
def latency(fns: Callable[..., Any], *inputs: Any, repeats: int = 20, warmup: int = 3) -> Timing: ...
@overload
def latency(fns: Mapping[str, Callable[..., Any]], *inputs: Any, repeats: int = 20, warmup: int = 3) -> dict[str, Timing]: ...
def latency(
    fns: Callable[..., Any] | Mapping[str, Callable[..., Any]], *inputs: Any, repeats: int = 20, warmup: int = 3
) -> Timing | dict[str, Timing]:
    """Wall time of ``fn(*inputs)``, for one function or for several that are compared.

    Several are run in turn, and each round starts with another one, so that a slow phase of the machine, a warm cache or the heat
    of the round before meets all alike. Each is warmed up first; garbage is collected between rounds, not within; a GPU is waited
    for. Gradients are as the caller has set them (``torch.no_grad()`` for inference).
    """
    table: Mapping[str, Callable[..., Any]] = fns if isinstance(fns, Mapping) else {"": fns}
    if repeats < 1 or warmup < 0 or not table:
        raise BadInput(f"latency needs a function, repeats >= 1 and warmup >= 0; got {len(table)}, {repeats} and {warmup}")
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing  # type: ignore[no-untyped-call]
    names = list(table)
    for _ in range(warmup):
        for name in names:
            table[name](*inputs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    try:
        for i in range(repeats):
            gc.collect(0)
            gc.disable()
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                wait()
                start = time.perf_counter()
                table[name](*inputs)
                wait()
                samples[name].append(time.perf_counter() - start)
            if collecting:
                gc.enable()
    finally:
        if collecting:
            gc.enable()
    result = {name: _timing(values) for name, values in samples.items()}
    return result if isinstance(fns, Mapping) else result[""]


def _nothing() -> None: ...


def _timing(seconds: list[float]) -> Timing:
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
    return Timing(median, low, high, len(seconds))
