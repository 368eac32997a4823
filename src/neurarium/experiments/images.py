"""Images that several experiments share: MNIST or CIFAR-10, small; scikit-learn's digits where no copy of them is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from neurarium import data
from neurarium.errors import MissingData

if TYPE_CHECKING:
    from neurarium.lab import Trial


def images(
    trial: Trial,
    name: str = "mnist",
    *,
    train: tuple[int, int | None],
    test: tuple[int, int | None] = (300, None),
    size: int = 14,
    standardise: bool = False,
) -> data.ImageTask:
    """Images of ``size`` pixels a side; ``train`` and ``test``: how many at the scales smoke and laptop (None: all).

    standardise: by the mean and the deviation of each channel over the training images.
    Offline and without a copy, the digits that scikit-learn embeds stand in, 8x8 in a frame, and the trial says so.
    """
    try:
        wanted = [trial.scale(smoke=n[0], laptop=n[1]) for n in (train, test)]
        task = data.images(name, train=wanted[0], test=wanted[1], size=size, seed=trial.seed)
    except MissingData:
        trial.stand_in(f"scikit-learn's digits (8x8 in a {size}x{size} frame) instead of {name}, which is not here")
        task = data.images("digits", train=trial.scale(smoke=min(train[0], 1200), laptop=None), seed=trial.seed)
        rim = [(size - 8) // 2, (size - 7) // 2] * 2
        task = replaced(task, [F.pad(part.x, rim) for part in (task.train, task.test)])
    if standardise:
        mean, std = (getattr(task.train.x, value)((0, 2, 3), keepdim=True) for value in ("mean", "std"))
        task = replaced(task, [(part.x - mean) / std for part in (task.train, task.test)])
    return task


def replaced(task: data.ImageTask, x: list[Tensor]) -> data.ImageTask:
    train, test = (data.TensorData(new, part.y) for new, part in zip(x, (task.train, task.test)))
    return replace(task, train=train, test=test)


def first_batches(train: data.TensorData, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches over as many epochs as that takes: the same ones for every model and arm."""
    epochs = train.batches(size, seed=seed, drop_last=True)
    return islice((batch for _ in count() for batch in epochs), steps)
