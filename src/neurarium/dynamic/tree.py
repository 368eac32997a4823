"""Nests of batch-first tensors: all that the engine needs to know about inputs and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from neurarium.errors import BadInput

__all__ = ["repeat", "rows", "shapes", "take"]


def rows(tree: Any) -> int:
    """The batch size."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise BadInput(f"expected a tensor, or a nest of tensors, with a batch dimension; got {type(tree).__name__}")


def take(tree: Any, index: Tensor) -> Any:
    """The same nest with the rows that ``index`` names."""
    return tree_map(lambda t: t.index_select(0, index.to(t.device)) if isinstance(t, Tensor) else t, tree)


def repeat(tree: Any, n: int) -> Any:
    """The first row n times."""
    return take(tree, torch.zeros(n, dtype=torch.int64))


def shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of one row."""
    return tuple(tuple(t.shape[1:]) for t in tree_leaves(tree) if isinstance(t, Tensor))
