"""Which sets of weights may be removed together: single weights, N of M, blocks, groups of rows.

A pattern turns scores (larger = keep) into a mask with an exact count. Ties go to the lower index, so that the mask does not depend on
device or BLAS build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["NM", "Block", "Group", "Pattern", "Unstructured", "keep_largest"]


@runtime_checkable
class Pattern(Protocol):
    """A sparsity pattern over a weight seen as a matrix ``(out, everything else)``."""

    def mask(self, score: Tensor, sparsity: float, *, scope: str = "layer") -> Tensor:
        """True where a weight stays; ``round(sparsity * units)`` units are removed in each scope ("layer" or "row")."""
        ...

    def holds(self, mask: Tensor) -> bool:
        """Whether a mask has this pattern."""
        ...


def keep_largest(score: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest entries of each row of a matrix ``(rows, n)``; ties go to the lower index."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :keep], True)


def _check(sparsity: float, scope: str) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    if scope not in ("row", "layer"):
        raise BadInput(f"scope must be 'row' or 'layer', got {scope!r}")


@dataclass(frozen=True)
class Unstructured:
    """Any single weight."""

    def mask(self, score: Tensor, sparsity: float, *, scope: str = "layer") -> Tensor:
        _check(sparsity, scope)
        rows = score.reshape(1, -1) if scope == "layer" else score.flatten(1)
        return keep_largest(rows, rows.shape[1] - round(sparsity * rows.shape[1])).view_as(score)

    def holds(self, mask: Tensor) -> bool:
        return mask.dtype == torch.bool


@dataclass(frozen=True)
class NM:
    """At most n of every m consecutive inputs of a row, e.g. 2:4. The sparsity is fixed: 1 - n/m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise BadInput(f"N:M needs 0 < n < m, got {self.n}:{self.m}")

    def mask(self, score: Tensor, sparsity: float | None = None, *, scope: str = "layer") -> Tensor:
        _check(0.0, scope)
        if sparsity is not None and abs(sparsity - (1 - self.n / self.m)) > 1e-9:
            raise BadInput(f"{self.n}:{self.m} has sparsity {1 - self.n / self.m:g}, not {sparsity}")
        return keep_largest(self._groups(score), self.n).view_as(score)

    def holds(self, mask: Tensor) -> bool:
        return bool((self._groups(mask).sum(-1) <= self.n).all())

    def _groups(self, x: Tensor) -> Tensor:
        if x[0].numel() % self.m:
            raise BadInput(f"{x[0].numel()} inputs a row cannot be split into groups of {self.m}")
        return x.reshape(-1, self.m)


@dataclass(frozen=True)
class Block:
    """Whole blocks of `out` x `into` weights; a block's score is the sum of its weights' scores."""

    out: int
    into: int

    def mask(self, score: Tensor, sparsity: float, *, scope: str = "layer") -> Tensor:
        _check(sparsity, scope)
        blocks = self._blocks(score).sum((1, 3))  # (out blocks, in blocks)
        kept = Unstructured().mask(blocks, sparsity, scope=scope)
        return kept.repeat_interleave(self.out, 0).repeat_interleave(self.into, 1).view_as(score)

    def holds(self, mask: Tensor) -> bool:
        counts = self._blocks(mask).sum((1, 3))
        return bool(((counts == 0) | (counts == self.out * self.into)).all())

    def _blocks(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[0], x[0].numel()
        if rows % self.out or columns % self.into:
            raise BadInput(f"a {rows} x {columns} weight cannot be cut into {self.out} x {self.into} blocks")
        return x.reshape(rows // self.out, self.out, columns // self.into, self.into)


def Group(out: int, into: int = 1) -> Block:
    """`out` consecutive output channels at one input: the pattern that a vectorised kernel skips (e.g. 16 x 1)."""
    return Block(out, into)
