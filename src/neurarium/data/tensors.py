"""Data in memory: tensors with labels, and a fast seeded iterator over their batches.

The sets of this project fit in memory, so a batch is one ``index_select``: no worker processes, no per-item Python. A
``torch.utils.data.DataLoader`` is one call away (:meth:`TensorData.loader`) for those who want one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neurarium.errors import BadInput

__all__ = ["Batches", "TensorData", "stratified"]


def generator(*seeds: int) -> torch.Generator:
    """A torch generator whose stream depends on all ``seeds`` (so that (0, 1) and (1, 0) differ)."""
    if any(s < 0 for s in seeds):
        raise BadInput(f"seeds must not be negative, got {seeds}")
    state = int(np.random.SeedSequence(list(seeds)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)


@dataclass(frozen=True, eq=False)
class TensorData(Dataset[tuple[Tensor, Tensor]]):
    """Inputs ``x`` (n, ...) and targets ``y`` (n, ...), row by row."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) != len(self.y):
            raise BadInput(f"x and y need one row an item, got shapes {tuple(self.x.shape)} and {tuple(self.y.shape)}")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def to(self, device: torch.device | str) -> TensorData:
        """The same data on ``device``."""
        return TensorData(self.x.to(device), self.y.to(device))

    def take(self, index: Tensor) -> TensorData:
        """The rows that ``index`` (int64) names, in its order."""
        return TensorData(self.x[index.to(self.x.device)], self.y[index.to(self.y.device)])

    def split(self, size: float | int, seed: int = 0) -> tuple[TensorData, TensorData]:
        """Two disjoint parts at random: the first of ``size`` rows (an int) or that fraction (a float in (0, 1)), then the rest."""
        n = len(self)
        count = round(size * n) if isinstance(size, float) else size
        if not 0 < count < n:
            raise BadInput(f"split needs 1 to {n - 1} rows or a fraction that gives them, got {size!r} of {n} rows")
        order = torch.randperm(n, generator=generator(seed))
        return self.take(order[:count]), self.take(order[count:])

    def batches(self, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> Batches:
        """A re-iterable of ``(x, y)`` batches, see :class:`Batches`."""
        return Batches(self, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)

    def loader(self, batch_size: int, *, shuffle: bool = True, seed: int = 0, **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
        """A DataLoader over the same rows; ``options`` go to it. Its order is seeded by ``seed``."""
        return DataLoader(self, batch_size, shuffle=shuffle, generator=generator(seed), **options)


class Batches:
    """Batches of a :class:`TensorData`, to be iterated as often as wanted.

    Pass number i is shuffled by ``(seed, i)``: two objects with one seed see the same batches in every pass, and a resumed run that
    calls ``set_epoch(i)`` sees what an undisturbed one would. After ``set_epoch(i)`` later passes count on from i.
    Batches are copies, so that an in-place layer cannot write into the data.
    """

    def __init__(self, data: TensorData, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, got {batch_size}")
        if len(data) == 0 or (drop_last and len(data) < batch_size):
            raise BadInput(f"{len(data)} rows give no batch of {batch_size}{' with drop_last' if drop_last else ''}")
        self.data, self.batch_size, self.shuffle, self.seed, self.drop_last = data, batch_size, shuffle, seed, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass the pass number ``epoch``."""
        if epoch < 0:
            raise BadInput(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch

    def __len__(self) -> int:
        n = len(self.data)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._pass(epoch)

    def _pass(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        data, size = self.data, self.batch_size
        order = torch.randperm(len(data), generator=generator(self.seed, epoch)) if self.shuffle else torch.arange(len(data))
        for i in range(len(self)):
            rows = order[i * size : (i + 1) * size]
            yield data.x.index_select(0, rows.to(data.x.device)), data.y.index_select(0, rows.to(data.y.device))


def stratified(y: Tensor, n: int, seed: int = 0) -> Tensor:
    """``n`` row numbers in random order whose classes have the same shares as in ``y`` (to within one row a class)."""
    if not 0 < n <= len(y):
        raise BadInput(f"a subset needs 1 to {len(y)} rows, got {n}")
    rng = np.random.default_rng([seed, n])
    labels = y.cpu().numpy()
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (n / len(labels))
    quota = np.floor(exact).astype(int)
    most = np.lexsort((rng.random(len(classes)), quota - exact))  # largest remainders first, ties at random
    quota[most[: n - quota.sum()]] += 1
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, quota)])
    return torch.from_numpy(rng.permutation(rows))
