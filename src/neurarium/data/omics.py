"""Several views of the same items: measured separately, each at a price.

:func:`multi_omics` draws patients whose class shows in three blocks of features, like gene expression, methylation and micro-RNA. For each
patient a random subset of the blocks says nothing, so who needs more data is a property of the patient. :func:`digit_views` looks at
scikit-learn's digits in three ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurarium.data.tensors import generator
from neurarium.data.vision import images
from neurarium.errors import BadInput

__all__ = ["ViewData", "digit_views", "multi_omics"]


@dataclass(frozen=True, eq=False)
class ViewData:
    """Views (n, d_v) and classes (n,), row by row.

    ``informative`` (n, views) says in which views a generated item shows its class; None for measured data.
    """

    x: tuple[Tensor, ...]
    y: Tensor
    informative: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.x or any(len(v) != len(self.y) for v in self.x):
            raise BadInput(f"views and y need one row an item, got {[tuple(v.shape) for v in self.x]} and {tuple(self.y.shape)}")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def dims(self) -> tuple[int, ...]:
        """Features of each view."""
        return tuple(v.shape[1] for v in self.x)

    def take(self, index: Tensor) -> ViewData:
        """The rows that ``index`` (int64) names, in its order."""
        known = None if self.informative is None else self.informative[index]
        return ViewData(tuple(v[index] for v in self.x), self.y[index], known)

    def split(self, *sizes: int, seed: int = 0) -> list[ViewData]:
        """Disjoint parts at random, of these sizes; the rest is the last one."""
        if min(sizes, default=0) < 1 or sum(sizes) >= len(self):
            raise BadInput(f"sizes must be positive and leave a row of {len(self)}, got {sizes}")
        order = torch.randperm(len(self), generator=generator(seed))
        return [self.take(rows) for rows in order.split([*sizes, len(self) - sum(sizes)])]

    def standardise(self, *others: ViewData) -> list[ViewData]:
        """This part and others, each feature at mean 0 and deviation 1 on the rows of this part alone."""
        scale = [(v.mean(0), v.std(0).clamp(min=1e-6)) for v in self.x]
        return [ViewData(tuple((v - m) / s for v, (m, s) in zip(p.x, scale)), p.y, p.informative) for p in (self, *others)]

    def batches(self, size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """``(views, y)`` in order, at most ``size`` rows at a time."""
        for rows in torch.arange(len(self)).split(size):
            part = self.take(rows)
            yield part.x, part.y


def multi_omics(
    n: int = 351,
    dims: Sequence[int] = (200, 200, 200),
    *,
    strengths: Sequence[float] = (1.0, 0.8, 0.6),
    silent: float = 0.35,
    separation: float = 1.65,
    noise: float = 1.0,
    seed: int = 0,
) -> ViewData:
    """Patients of two classes in several blocks of features.

    A patient's state z (4 numbers) is normal around +- ``separation`` along one direction. Block v shows it as s_v W_v z + noise; with
    probability ``silent``, for each patient and block, it shows noise alone. How the blocks look depends on ``seed``, not on ``n``.

    Args:
        strengths: s_v, one a block.
        noise: standard deviation in each feature; the entries of W_v have deviation 1/2.
    """
    if n < 2 or not dims or min(dims) < 1 or len(strengths) != len(dims):
        raise BadInput(f"multi_omics needs 2 rows, blocks with features and a strength for each, got n={n}, {dims}, {strengths}")
    if not 0 <= silent < 1 or not noise >= 0:
        raise BadInput(f"silent must be a probability below 1 and noise at least 0, got {silent} and {noise}")
    shape, draw = generator(seed, 0), generator(seed, 1)
    direction = torch.nn.functional.normalize(torch.randn(4, generator=shape), dim=0)
    maps = [0.5 * torch.randn(4, d, generator=shape) for d in dims]
    y = torch.randint(2, (n,), generator=draw)
    z = (2 * y[:, None] - 1) * separation * direction + torch.randn(n, 4, generator=draw)
    informative = torch.rand(n, len(dims), generator=draw) >= silent
    x = tuple(
        s * informative[:, v : v + 1] * (z @ w) + noise * torch.randn(n, w.shape[1], generator=draw)
        for v, (s, w) in enumerate(zip(strengths, maps))
    )
    return ViewData(x, y, informative)


def digit_views() -> ViewData:
    """scikit-learn's 1,797 digits three ways: row and column sums with their spread (32), pixels (64), 2-D Fourier magnitudes (40)."""
    task = images("digits")
    picture = torch.cat([task.train.x, task.test.x])[:, 0]
    y = torch.cat([task.train.y, task.test.y])
    profiles = torch.cat([picture.sum(1), picture.sum(2), picture.std(1), picture.std(2)], 1)
    waves = torch.fft.rfft2(picture).abs().flatten(1)
    return ViewData((profiles, picture.flatten(1), waves), y)
