"""Tables of numbers: one row an item, features standardised on the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurarium.data.files import read_text
from neurarium.data.registry import fetch, find
from neurarium.data.tensors import TensorData, generator, stratified
from neurarium.errors import BadInput

__all__ = ["TabularTask", "tabular"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class TabularTask:
    """x float32 (n, features), mean 0 and deviation 1 on the training rows.

    Classification: y int64 (n,). Regression (``classes`` is None): y float32 (n, 1), standardised likewise; a prediction in the
    data's own unit is ``y * target_std + target_mean``.
    """

    name: str
    train: TensorData
    test: TensorData
    classes: int | None
    columns: tuple[str, ...]
    target_mean: float = 0.0
    target_std: float = 1.0
    note: str = ""


def tabular(name: str, *, seed: int = 0, test: float = 0.2) -> TabularTask:
    """``iris``, ``wine``, ``breast_cancer``, ``diabetes``, or one of the eight UCI regression sets (``concrete``, ``energy``, ...).

    The split is drawn by ``seed`` (with equal class shares for classification); ``test`` is the share of test rows. A feature that
    does not vary on the training rows becomes 0.
    """
    if not 0.0 < test < 1.0:
        raise BadInput(f"test must be a share in (0, 1), got {test}")
    source = find(name, "tabular")
    if source.embedded:
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{name}")()
        x, y, columns = bunch.data, bunch.target, tuple(str(c) for c in bunch.feature_names)
        classes = None if name == "diabetes" else len(bunch.target_names)
    else:
        x, y, columns = _uci(fetch(source))
        classes = None
    bad = np.flatnonzero(~(np.isfinite(x).all(1) & np.isfinite(y)))
    if len(bad):
        raise BadInput(f"{name}: row {bad[0]} holds a NaN or an infinity ({len(bad)} such rows)")
    n, count = len(y), max(1, round(test * len(y)))
    held = stratified(torch.from_numpy(y), count, seed).numpy() if classes else torch.randperm(n, generator=generator(seed))[:count].numpy()
    rest = np.setdiff1d(np.arange(n), held)
    mean, std = _scale(x[rest])
    x = (x - mean) / std
    target_mean, target_std = 0.0, 1.0
    if classes is None:
        target_mean, target_std = float(y[rest].mean()), float(y[rest].std())
        if target_std == 0.0:
            raise BadInput(f"{name}: the target does not vary")
        y = ((y - target_mean) / target_std)[:, None]
    features = torch.from_numpy(x).float()
    target = torch.from_numpy(y.astype(np.float32 if classes is None else np.int64))
    train, test_rows = (TensorData(features[i], target[i]) for i in (rest, held))
    return TabularTask(name, train, test_rows, classes, columns, target_mean, target_std, source.note)


def _scale(x: Array) -> tuple[Array, Array]:
    mean, std = x.mean(0), x.std(0)
    return mean, np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)


def _uci(paths: tuple[Path, ...]) -> tuple[Array, Array, tuple[str, ...]]:
    data, features, target = paths
    try:
        rows = [[float(v) for v in line.split()] for line in read_text(data).splitlines() if line.strip()]
        inputs = [int(float(v)) for v in read_text(features).split()]
        (output,) = (int(float(v)) for v in read_text(target).split())
    except ValueError as error:
        raise BadInput(f"{data.parent.name}: {data.name} and its index files must hold numbers ({error})") from error
    widths = {len(r) for r in rows}
    if len(widths) != 1:
        raise BadInput(f"{data.parent.name}: {data.name} has rows of {sorted(widths)} columns")
    table = np.array(rows)
    if not inputs or min(*inputs, output) < 0 or max(*inputs, output) >= table.shape[1]:
        raise BadInput(f"{data.parent.name}: an index file names a column that does not exist (there are {table.shape[1]})")
    return table[:, inputs], table[:, output], tuple(f"x{i}" for i in inputs)
