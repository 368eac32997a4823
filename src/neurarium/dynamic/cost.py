"""What a path costs, measured and exact.

A segment is run once with one row and once with three under torch's FLOP counter (2 FLOPs a multiply-add). Three rows must cost exactly
three times one row, else rows share work and no row has a price of its own. So the cost of any batch is a sum of integers from this table,
and a counter wrapped around the real run must show that sum to the last digit.

The counter knows matrix products, convolutions and attention. What it does not see (activations, norms, softmax of a gate) is listed in
``uncounted`` as elements written, never added: only a clock can judge it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from neurarium.dynamic.tree import repeat
from neurarium.errors import BadInput

__all__ = ["CostTable", "evaluating"]


@dataclass(frozen=True)
class CostTable:
    """FLOPs for one row.

    Attributes:
        steps: what each segment adds, its heads and gates included.
        uncounted: for each segment, elements that operations outside the FLOP count write, by operation.
    """

    steps: tuple[int, ...]
    uncounted: tuple[Mapping[str, int], ...] = ()

    @property
    def total(self) -> tuple[int, ...]:
        """What a row has cost that stops after segment k."""
        return tuple(accumulate(self.steps))

    @property
    def full(self) -> int:
        """A row that never stops early."""
        return sum(self.steps)

    def tensor(self, device: torch.device | None = None) -> Tensor:
        """``total`` as int64."""
        return torch.tensor(self.total, dtype=torch.int64, device=device)

    @classmethod
    def measure(cls, segments: Sequence[Callable[[Any], Any]], example: Any) -> CostTable:
        """Price a chain of segments on the first row of ``example``.

        Raises:
            BadInput: a segment's cost does not grow with the rows.
        """
        with torch.inference_mode():  # under no_grad the counter trips over expanded parameters
            (single, seen), (triple, _) = _count(segments, repeat(example, 1)), _count(segments, repeat(example, 3))
        for k, (a, b) in enumerate(zip(single, triple)):
            if b != 3 * a:
                raise BadInput(
                    f"segment {k} costs {a} FLOPs for one row and {b} for three, so no row has a cost of its own: it mixes rows, or it "
                    "makes its weights anew at each call (fold those first; hypercomplex layers by replace_layers(model, dense()))"
                )
        return cls(tuple(single), tuple(seen))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _count(segments: Sequence[Callable[[Any], Any]], state: Any) -> tuple[list[int], list[Mapping[str, int]]]:
    flops, others = [], []
    for segment in segments:
        with _Uncounted() as other, FlopCounterMode(display=False) as counter:
            state = segment(state)
        flops.append(counter.get_total_flops())
        others.append(dict(other.elements))
    return flops, others


class _Uncounted(TorchDispatchMode):
    """Elements written by operations that have no FLOP formula; views and copies of shape cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func._overloadpacket not in flop_registry and not aliases:
            written = sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            if written:
                self.elements[str(func._overloadpacket)] += written
        return out
