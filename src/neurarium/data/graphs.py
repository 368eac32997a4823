"""Graphs: the Planetoid citation networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurarium.data.files import read_pickle, read_text
from neurarium.data.registry import fetch, find
from neurarium.errors import BadInput

__all__ = ["GraphTask", "graph"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class GraphTask:
    """x float32 (nodes, features); edge_index int64 (2, edges), each undirected edge in both directions, sorted, no loops, no repeats;
    y int64 (nodes,); boolean masks (nodes,)."""

    name: str
    x: Tensor
    edge_index: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor
    classes: int
    note: str = ""


def graph(name: str) -> GraphTask:
    """``cora``, ``citeseer`` or ``pubmed`` with the standard Planetoid split: 20 training nodes a class, 500 to validate, 1,000 to test.

    Features are the raw bags of words. CiteSeer's files lack 15 of its test nodes (papers without citations): they get zero features
    and class 0, as is usual, and are in no mask.
    """
    source = find(name, "graph")
    paths = fetch(source)
    x, tx, allx, y, ty, ally, links = (read_pickle(p.read_bytes(), p.name) for p in paths[:7])
    for part, path in zip((x, tx, allx, y, ty, ally), paths):
        if not isinstance(part, np.ndarray) or part.ndim != 2 or not np.isfinite(part).all():
            raise BadInput(f"{path.name}: not a finite matrix")
    if not isinstance(links, dict):
        raise BadInput(f"{paths[6].name}: not a dictionary of neighbours")
    features, onehot, test = _assemble(allx, ally, tx, ty, paths[7])
    nodes = len(features)
    train_mask, val_mask, test_mask = (torch.zeros(nodes, dtype=torch.bool) for _ in range(3))
    train_mask[: len(y)] = True
    val_mask[len(y) : len(y) + 500] = True
    test_mask[torch.from_numpy(test)] = True
    return GraphTask(
        name, torch.from_numpy(features), _edges(links, nodes, paths[6].name), torch.from_numpy(onehot.argmax(1)),
        train_mask, val_mask, test_mask, onehot.shape[1], source.note,
    )  # fmt: skip


def _assemble(allx: Array, ally: Array, tx: Array, ty: Array, index: Path) -> tuple[Array, Array, Array]:
    """All nodes in order: first those of ``allx``, then the test nodes, whose files are in the order of the index file."""
    try:
        test = np.array([int(line) for line in read_text(index).split()])
    except ValueError as error:
        raise BadInput(f"{index.name}: {error}") from error
    first = len(allx)
    fits = len(test) == len(tx) == len(ty) and len(ally) == first and allx.shape[1] == tx.shape[1] and ally.shape[1] == ty.shape[1]
    if not fits or len(np.unique(test)) != len(test) or test.min() != first or test.max() > 2 * first + 10 * len(test):
        raise BadInput(f"{index.name}: its node numbers do not fit the other files")
    nodes = int(test.max()) + 1
    features, onehot = np.zeros((nodes, allx.shape[1]), np.float32), np.zeros((nodes, ally.shape[1]), np.float32)
    features[:first], onehot[:first] = allx, ally
    features[test], onehot[test] = tx, ty
    return features, onehot, test


def _edges(links: dict[Any, Any], nodes: int, file: str) -> Tensor:
    try:
        pairs = np.array([(int(i), int(j)) for i, near in links.items() for j in near]).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{file}: not a dictionary of neighbours ({error})") from error
    if len(pairs) and not (pairs.min() >= 0 and pairs.max() < nodes):
        raise BadInput(f"{file}: names node {pairs.max()} of {nodes}")
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    return torch.from_numpy(np.ascontiguousarray(both.T))
