"""Checks of the role `dataset`: a seeded torch Dataset."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from neurarium.testing.example import Example
from neurarium.testing.state import assert_same, seeded, unchanged_rng

__all__ = ["CHECKS"]


def _make(example: Example, seed: int = 0, noise: int = 0) -> Any:
    with seeded(noise):
        return example.make(seed)  # type: ignore[misc]


def seeded_items(example: Example) -> None:
    """The same seed gives the same items under any global random state and in any order of access; another seed gives others."""
    first, second, other = _make(example, 0, 1), _make(example, 0, 2), _make(example, 1)
    n = min(len(first), 6)
    assert n > 0, "the data set is empty"
    forward = [first[i] for i in range(n)]
    backward = [second[i] for i in reversed(range(n))][::-1]
    assert_same(forward, backward, "items depend on the order of access or on the global random state")
    different = any(not _same(a, other[i]) for i, a in enumerate(forward) if i < len(other))
    assert different or len(other) != len(first), "another seed gives the same items: the seed is ignored"


def _same(a: Any, b: Any) -> bool:
    try:
        assert_same(a, b, "")
    except AssertionError:
        return False
    return True


def shapes(example: Example) -> None:
    """Items have one structure and finite values; an index past the end raises IndexError."""
    data = _make(example)
    spec = torch.utils._pytree.tree_structure(data[0])
    for i in range(min(len(data), 6)):
        assert torch.utils._pytree.tree_structure(data[i]) == spec, f"item {i} has another structure than item 0"
        for t in torch.utils._pytree.tree_leaves(data[i]):
            assert not isinstance(t, Tensor) or not t.is_floating_point() or torch.isfinite(t).all(), f"item {i} is not finite"
    try:
        data[len(data)]
    except IndexError:
        return
    raise AssertionError("an index past the end does not raise IndexError")


def keeps_the_global_state(example: Example) -> None:
    """Reading items leaves the global random state as it was."""
    data = _make(example)
    with unchanged_rng("reading an item"):
        data[0]


def pickles(example: Example) -> None:
    """A pickled data set (as worker processes get it) gives the same items."""
    data = _make(example)
    assert_same(pickle.loads(pickle.dumps(data))[0], data[0], "a pickled data set gives other items")


CHECKS = {"seeded_items": seeded_items, "shapes": shapes, "keeps_the_global_state": keeps_the_global_state, "pickles": pickles}
