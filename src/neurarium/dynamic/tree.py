"""Nests of batch-first tensors: all that the engine needs to know about inputs and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from neurarium.errors import BadInput

__all__ = ["has_nan", "parameter_shapes", "repeat", "rows", "shapes", "take"]


def rows(tree: Any) -> int:
    """The batch size."""
    if isinstance(tree, Tensor) and tree.ndim:
        return len(tree)
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise BadInput(f"expected a tensor, or a nest of tensors, with a batch dimension; got {type(tree).__name__}")


def take(tree: Any, index: Tensor) -> Any:
    """The same nest with the rows that ``index`` names."""
    if isinstance(tree, Tensor):
        return tree.index_select(0, index if index.device == tree.device else index.to(tree.device))
    if type(tree) is tuple:  # what states mostly are; anything else goes the general and slower way
        return tuple(take(part, index) for part in tree)
    return tree_map(lambda t: take(t, index) if isinstance(t, Tensor) else t, tree)


def repeat(tree: Any, n: int) -> Any:
    """The first row n times."""
    return take(tree, torch.zeros(n, dtype=torch.int64))


def shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of one row."""
    if isinstance(tree, Tensor):
        return (tuple(tree.shape[1:]),)
    return tuple(tuple(t.shape[1:]) for t in tree_leaves(tree) if isinstance(t, Tensor))


def has_nan(tree: Any) -> bool:
    """Whether a tensor of the nest has NaN. One sum tells, unless it is NaN for another reason (inf - inf): then every element is asked."""
    parts = (tree,) if isinstance(tree, Tensor) else tree_leaves(tree)
    floats = (t.detach() for t in parts if isinstance(t, Tensor) and t.is_floating_point())
    return any(bool(t.sum().isnan()) and bool(t.isnan().any()) for t in floats)


def parameter_shapes(module: nn.Module) -> tuple[torch.Size, ...]:
    """The shapes of all parameters, shared ones as often as they occur. This is asked at each call, so it makes no names, which is what
    takes most of the time of ``module.parameters()``."""
    found: list[nn.Parameter | None] = []
    parts = [module]
    for part in parts:  # grows while it is read
        found += part._parameters.values()
        parts += [child for child in part._modules.values() if child is not None]
    return tuple([p.shape for p in found if p is not None])
