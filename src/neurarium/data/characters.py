"""Handwritten Baybayin, the pre-colonial script of the Philippines: characters that no digit classifier has seen."""

from __future__ import annotations

import numpy as np
import torch

from neurarium.data.files import read_idx
from neurarium.data.registry import fetch
from neurarium.data.store import Source
from neurarium.data.tensors import generator
from neurarium.data.vision import ImageTask, _prepare
from neurarium.errors import BadInput

__all__ = ["baybayin"]

_BAYBAYIN = Source(
    "baybayin", "baybayin", "https://www.kaggle.com/jamesnogra/baybayn-baybayin-handwritten-images", "unstated",
    "handwritten Baybayin characters, 9,703 of 62 classes, 28x28",
    mirrored=("baybayin/test-images-idx3-ubyte.gz",),
)  # fmt: skip
_SHARE = 0.2  # of the test part


def baybayin(*, train: int | None = None, test: int | None = None, size: int | None = None, seed: int = 0) -> ImageTask:
    """Baybayin characters as an image task, 62 classes, 28x28, read from a mirror folder (``baybayin/*-idx*-ubyte.gz``).

    The published training file is part of the published test file and holds half of the classes, so this is a split of our own: of the
    test file, a fifth of every class by ``seed`` is the test part. ``train``, ``test`` and ``size`` as in :func:`neurarium.data.images`.
    """
    (path,) = fetch(_BAYBAYIN)
    x, y = read_idx(path), read_idx(path.with_name("test-labels-idx1-ubyte.gz"))
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or x.dtype != np.uint8 or len(x) == 0:
        raise BadInput(f"{path.name}: images {x.shape} {x.dtype} and labels {y.shape} do not belong together")
    names, y = np.unique(y, return_inverse=True)
    rows = [torch.from_numpy(np.flatnonzero(y == k)) for k in range(len(names))]
    rows = [r[torch.randperm(len(r), generator=generator(seed, k))] for k, r in enumerate(rows)]
    cuts = [max(1, round(_SHARE * len(r))) for r in rows]
    parts = [torch.cat([r[n:] for r, n in zip(rows, cuts)]), torch.cat([r[:n] for r, n in zip(rows, cuts)])]
    order = [p[torch.randperm(len(p), generator=generator(seed))].numpy() for p in parts]
    note = "a seeded split of the published test file, which contains the training file"
    images = x[:, None]
    first, second = (_prepare(images[p], y[p], n, size, seed) for p, n in zip(order, (train, test)))
    return ImageTask("baybayin", first, second, len(names), note)
