"""Which form of a sparse layer is fastest here, dense included.

Sparse does not mean fast: a dense product runs near the processor's peak, with matrix units (AMX) far above what vectors reach, while a
sparse one pays for indices and packing. ``choose`` runs the candidates and the dense rivals on the layer's own weights and batch, in
turn, and answers "dense" unless a sparse form wins by a margin. With a ``Machine`` it computes instead of measuring: repeatable, and it
can plan for another machine than this.

The model: ``seconds = overhead + 2 tokens (stored weights) / rate``, one rate a format and precision. For dense products all weights are
stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.compress.runtime.formats import BlockSparse, GroupSparse, SparseMatrix
from neurarium.compress.runtime.int8 import BLOCKS, Int8Sparse
from neurarium.errors import BadInput
from neurarium.meter import latency

__all__ = ["Choice", "Machine", "candidates", "choose"]

SHAPES = ((16, 1), (8, 1), (4, 1), (1, 1))
GROUPS = ((1, 4), (2, 4), (1, 8), (2, 8), (4, 8))


@dataclass(frozen=True)
class Choice:
    """The winner and everybody's seconds.

    Attributes:
        name: "dense float32", "dense bfloat16", "dense int8", or a sparse format ("16x1", "2:4", "int8 16x4", ...).
        matrix: the winner's compact form; None for "stay dense".
        seconds: contender -> measured or modelled seconds for one product.
        tokens: rows of the input that it holds for.
        measured: False where a Machine was asked.
    """

    name: str
    matrix: SparseMatrix | Int8Sparse | None
    seconds: Mapping[str, float]
    tokens: int
    measured: bool

    @property
    def speedup(self) -> float:
        """The best dense rival's time over the winner's (1 where dense wins)."""
        return min(s for n, s in self.seconds.items() if n.startswith("dense")) / self.seconds[self.name]

    @property
    def reason(self) -> str:
        """One sentence."""
        how = "measured" if self.measured else "modelled"
        sparse = {n: s for n, s in self.seconds.items() if not n.startswith("dense")}
        if self.matrix is not None:
            return f"{self.name} is {self.speedup:.2f}x as fast as the best dense product ({how}, {self.tokens} tokens)"
        if not sparse:
            return "no sparse format fits"
        best = min(sparse, key=lambda n: sparse[n])
        return f"stay dense: {self.name} is {sparse[best] / self.seconds[self.name]:.2f}x as fast as {best} ({how}, {self.tokens} tokens)"


@dataclass(frozen=True)
class Machine:
    """Flop/s with the threads in use, by contender: "dense float32", "dense bfloat16", "dense int8", "16x1", "N:M", "int8 16x4", ..."""

    rates: Mapping[str, float]
    overhead: float = 5e-6
    name: str = field(default="", compare=False)

    def seconds(self, contender: str, tokens: int, stored: int) -> float:
        """Seconds of one product; infinite for a contender without a rate."""
        rate = self.rates.get("N:M" if ":" in contender else contender)
        return self.overhead + 2.0 * tokens * stored / rate if rate else float("inf")

    @classmethod
    def measured(cls, tokens: int = 128, size: int = 768, *, repeats: int = 7) -> Machine:
        """This machine's rates, from one square layer at 80 % sparsity (a second or two)."""
        g = torch.Generator().manual_seed(0)
        rates = {}
        for height in (16, 8, 4, 1):
            keep = torch.rand(-(-size // height), size, generator=g) > 0.8
            weight = torch.randn(size, size, generator=g) * keep.repeat_interleave(height, 0)[:size]
            found = {f"{height}x1": BlockSparse.from_dense(weight, (height, 1))}
            if (height, 1) in BLOCKS:
                found[f"int8 {height}x1"] = Int8Sparse.from_dense(weight, (height, 1))
            if height == 16:
                quads = keep[:, ::4].repeat_interleave(4, 1)[:, :size].repeat_interleave(16, 0)[:size]
                found["int8 16x4"] = Int8Sparse.from_dense(torch.randn(size, size, generator=g) * quads, (16, 4))
            if height == 1:
                found["N:M"] = GroupSparse.from_dense(torch.randn(size, size, generator=g) * (torch.arange(size) % 4 == 0), 1, 4)
            times = _measure(weight, tokens, found, ("float32", "bfloat16", "int8") if height == 16 else (), repeats)
            for name, seconds in times.items():
                stored = weight.numel() if name.startswith("dense") else found[name].values.numel()
                rates[name] = 2.0 * tokens * stored / seconds
        return cls(MappingProxyType(rates), name="this machine")


def candidates(
    weight: Tensor, *, mask: Tensor | None = None, dtype: str = "float32", block: tuple[int, int] | None = None
) -> dict[str, SparseMatrix | Int8Sparse]:
    """The compact forms that hold the matrix without keeping much more than its non-zeros, or just the one asked for by `block`."""
    if dtype not in ("float32", "int8"):
        raise BadInput(f"dtype must be 'float32' or 'int8', got {dtype!r}")
    if dtype == "int8":
        shapes = (block,) if block else BLOCKS
        return {f"int8 {a}x{b}": Int8Sparse.from_dense(weight, (a, b), mask=mask) for a, b in shapes}
    if block:
        return {f"{block[0]}x{block[1]}": BlockSparse.from_dense(weight, block, mask=mask)}
    exact = (weight != 0 if mask is None else mask).float().mean().item()
    found: dict[str, SparseMatrix | Int8Sparse] = {}
    for a, b in SHAPES:
        made = BlockSparse.from_dense(weight, (a, b), mask=mask)
        if a == 1 or made.density <= min(1.5 * exact, 0.9):  # tall blocks run faster, but not that much
            found[f"{a}x{b}"] = made
    for n, m in GROUPS:
        if weight.shape[1] % m == 0 and n / m <= 1.1 * exact:
            with contextlib.suppress(BadInput):
                found[f"{n}:{m}"] = GroupSparse.from_dense(weight, n, m, mask=mask)
                break
    return found


def choose(
    weight: Tensor,
    tokens: int,
    *,
    mask: Tensor | None = None,
    dtype: str = "float32",
    block: tuple[int, int] | None = None,
    rivals: Iterable[str] | None = None,
    machine: Machine | None = None,
    margin: float = 1.05,
    repeats: int = 9,
) -> Choice:
    """The fastest way to multiply `tokens` rows with a sparse matrix (outputs, inputs).

    Args:
        rivals: dense precisions that may win: "float32", "bfloat16", "int8". Default: float32 for a float32 matrix; all three for int8,
            since who accepts int8 weights and inputs accepts those too (they run on AMX where there is one).
        machine: None measures here and now (some milliseconds to a second), with the threads that torch has now.
        margin: a sparse form must be this much faster than the best dense one.
    """
    if tokens < 1 or margin < 1:
        raise BadInput(f"tokens must be >= 1 and margin >= 1, got {tokens} and {margin}")
    forms = candidates(weight, mask=mask, dtype=dtype, block=block)
    rivals = tuple(rivals) if rivals is not None else ("float32",) if dtype == "float32" else ("float32", "bfloat16", "int8")
    if not rivals or not set(rivals) <= {"float32", "bfloat16", "int8"}:
        raise BadInput(f"rivals are of float32, bfloat16, int8, got {rivals}")
    if machine is None:
        seconds = _measure(weight.detach().float() if mask is None else weight.detach().float() * mask, tokens, forms, rivals, repeats)
    else:
        seconds = {f"dense {r}": machine.seconds(f"dense {r}", tokens, weight.numel()) for r in rivals}
        seconds |= {n: machine.seconds(n, tokens, f.values.numel()) for n, f in forms.items()}
    dense = min((n for n in seconds if n.startswith("dense")), key=lambda n: seconds[n])
    best = min(forms, key=lambda n: seconds[n])
    winner = best if seconds[best] * margin < seconds[dense] else dense
    return Choice(winner, forms.get(winner), seconds, tokens, machine is None)


def _measure(weight: Tensor, tokens: int, forms: Mapping, rivals: Iterable[str], repeats: int) -> dict[str, float]:
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable] = {f"dense {r}": _dense(x, weight, r) for r in rivals}
    runs = {n: run for n, run in runs.items() if run is not None} or {"dense float32": _dense(x, weight, "float32")}
    for name, form in forms.items():
        runs[name] = lambda form=form: form.matmul(x)
    with torch.no_grad():
        return {n: t.low for n, t in latency(runs, repeats=repeats, warmup=2).items()}


def _dense(x: Tensor, weight: Tensor, dtype: str) -> Callable | None:
    """The dense product alone; conversions are not charged to it."""
    if dtype == "float32":
        return lambda: F.linear(x, weight)
    if dtype == "bfloat16":
        a, b = x.bfloat16(), weight.bfloat16()
        return lambda: F.linear(a, b)
    c, d = (x * 20).clamp(-127, 127).to(torch.int8), (weight / weight.abs().max().clamp(min=1e-30) * 127).to(torch.int8).T
    try:
        torch._int_mm(c, d)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return lambda: torch._int_mm(c, d)
