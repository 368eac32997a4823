"""Drawn faces with landmarks: a stand-in for photographs of people, whose true points are known exactly.

A face is 32 points: 9 along the jaw, 3 a brow, 4 an eye, 4 of the nose, 5 of the mouth. Eight numbers say who it is (width, length, jaw,
distance and size of the eyes, brows, nose, mouth), four what it does (mouth, smile, lids, brows). It is turned in depth (features that
stand out move further), rotated, scaled, lit from one side, drawn with soft edges, on a quarter of the images partly covered, blurred, and
made noisy. Everything is seeded, and image i of a part does not depend on how many there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.data.tensors import TensorData, generator
from neurarium.errors import BadInput

__all__ = ["FaceTask", "synthetic_faces"]

POINTS = 32
_JAW, _BROWS, _EYES, _NOSE, _MOUTH = 0, 9, 15, 23, 27  # where each part begins
_CHUNK = 50  # images drawn at a time, each with a generator of its own


@dataclass(frozen=True, eq=False)
class FaceTask:
    """Images (n, 1, size, size) in [0, 1] with points (n, 64): x and y of each point in turn, in [-0.5, 0.5] across the image.

    The training points carry the noise of an annotator, the test points are exact.
    """

    train: TensorData
    test: TensorData
    name: str = "synthetic-faces"
    note: str = "drawn faces, 32 points"

    @staticmethod
    def nme(points: Tensor, truth: Tensor) -> Tensor:
        """(n,) mean distance to the true points, as a share of the distance between the outer corners of the eyes."""
        p, t = (x.reshape(-1, POINTS, 2) for x in (points, truth))
        return (p - t).norm(dim=2).mean(1) / (t[:, _EYES] - t[:, _EYES + 6]).norm(dim=1)


def synthetic_faces(train: int = 6000, test: int = 1000, *, size: int = 48, noise: float = 1.0, seed: int = 0) -> FaceTask:
    """Drawn faces and their 32 points.

    Args:
        train, test: numbers of images.
        size: of an image in pixels.
        noise: standard deviation of the training points' error, in 48ths of the image.
        seed: of everything.
    """
    if train < 1 or test < 1 or size < 8 or not noise >= 0:
        raise BadInput(f"train and test need an image, size 8 pixels, noise at least 0; got {train}, {test}, {size}, {noise}")
    parts = []
    for part, (n, error) in enumerate(((train, noise / 48), (test, 0.0))):
        drawn = [_draw(generator(seed, part, i), size) for i in range(-(-n // _CHUNK))]
        x, y = (torch.cat(t)[:n] for t in zip(*drawn, strict=True))
        if error:
            y = y + error * torch.cat([torch.randn(_CHUNK, 2 * POINTS, generator=generator(seed, 2, i)) for i in range(len(drawn))])[:n]
        parts.append(TensorData(x, y))
    return FaceTask(parts[0], parts[1])


def _draw(g: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    n = _CHUNK
    normal = lambda *shape: torch.randn(n, *shape, generator=g)  # noqa: E731
    uniform = lambda low, high: low + (high - low) * torch.rand(n, generator=g)  # noqa: E731
    who = normal(8).clamp(-2, 2)
    width, length = 0.78 * (1 + 0.06 * who[:, 0]), 1.0 * (1 + 0.06 * who[:, 1])
    jaw = 2.2 + 0.25 * who[:, 2]
    apart, large = 0.36 * (1 + 0.08 * who[:, 3]), 0.15 * (1 + 0.1 * who[:, 4])
    brow, nose, lips = -0.38 - 0.03 * who[:, 5], 0.42 * (1 + 0.1 * who[:, 6]), 0.27 * (1 + 0.12 * who[:, 7])
    opened, smile, lids, raised = uniform(0, 0.22), uniform(-0.08, 0.12), uniform(0.25, 0.6), uniform(-0.04, 0.07)

    points = torch.zeros(n, POINTS, 3)  # x to the right, y down, z towards the viewer; half a face is about 1

    def put(i: int, x: Tensor | float, y: Tensor | float, z: float) -> None:
        points[:, i, 0], points[:, i, 1], points[:, i, 2] = (torch.as_tensor(v, dtype=torch.float32) for v in (x, y, z))

    for i, angle in enumerate(torch.linspace(0, math.pi, 9).tolist()):  # the curve |x / width|^jaw + |y / length|^jaw = 1, below the ears
        c, s = math.cos(angle), math.sin(angle)
        put(_JAW + i, -width * math.copysign(1, c) * abs(c) ** (2 / jaw), length * abs(s) ** (2 / jaw), 0.0)
    for side, sign in enumerate((-1, 1)):
        for i, along in enumerate((1.5, 0.0, -1.3)):
            height = brow - raised - (0.06 if i == 1 else 0.0)
            put(_BROWS + (i if side == 0 else 5 - i), sign * (apart + along * large), height, 0.25 if i else 0.1)
        outer, inner = sign * (apart + large), sign * (apart - large)
        put(_EYES + (0 if side == 0 else 6), outer, -0.17, 0.1)
        put(_EYES + (2 if side == 0 else 4), inner, -0.17, 0.2)
        put(_EYES + (1 if side == 0 else 5), sign * apart, -0.17 - large * lids, 0.2)
        put(_EYES + (3 if side == 0 else 7), sign * apart, -0.17 + large * lids, 0.2)
    tip = -0.12 + nose
    put(_NOSE, 0.0, -0.12, 0.3)
    put(_NOSE + 1, 0.0, tip, 0.6)
    put(_NOSE + 2, -0.11, tip + 0.04, 0.35)
    put(_NOSE + 3, 0.11, tip + 0.04, 0.35)
    mouth = 0.56 * length
    put(_MOUTH, -lips - smile, mouth - smile, 0.2)
    put(_MOUTH + 2, lips + smile, mouth - smile, 0.2)
    put(_MOUTH + 1, 0.0, mouth - 0.05 - opened / 3, 0.35)
    put(_MOUTH + 3, 0.0, mouth + 0.06 + opened, 0.35)
    put(_MOUTH + 4, 0.0, mouth + opened / 3, 0.3)

    turn, angle, scale = uniform(-0.4, 0.4), uniform(-math.pi / 6, math.pi / 6), 0.34 * uniform(0.8, 1.1)
    thin = (1 - turn.square()).sqrt() * (1 - 0.4 * turn.abs())  # how much narrower a turned face is
    x = points[:, :, 0] * thin[:, None] + points[:, :, 2] * turn[:, None]
    centre = torch.stack([uniform(-0.05, 0.05), uniform(-0.05, 0.05) - 0.03], 1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    turned = torch.stack([cos[:, None] * x - sin[:, None] * points[:, :, 1], sin[:, None] * x + cos[:, None] * points[:, :, 1]], 2)
    p = turned + centre[:, None]

    grid = (torch.arange(size) + 0.5) / size - 0.5
    at = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), 2).view(1, -1, 2)  # (1, pixels, 2)
    soft = 0.4 / size  # half the width of an edge
    cover = lambda distance: torch.sigmoid(-distance / soft)  # noqa: E731
    local = at - centre[:, None]
    u = (cos[:, None] * local[..., 0] + sin[:, None] * local[..., 1]) / scale[:, None].square() / (thin * width)[:, None]
    v = (cos[:, None] * local[..., 1] - sin[:, None] * local[..., 0]) / scale[:, None].square() / length[:, None]
    power = torch.where(v > 0, jaw[:, None], 2.0)
    rim = (u.abs().clamp_min(1e-4) ** power + v.abs().clamp_min(1e-4) ** power) ** (1 / power) - 1
    skin, ground = uniform(0.55, 0.85), uniform(0.1, 0.4)
    image = ground[:, None] + (skin - ground)[:, None] * cover(rim * (scale * width)[:, None])

    def paint(amount: Tensor, value: Tensor | float) -> None:
        nonlocal image
        image = image + amount * (torch.as_tensor(value).view(-1, 1) - image)

    def stroke(indices: list[int], thick: float) -> Tensor:
        nearest = torch.full_like(image, 9.0)
        for a, b in pairwise(indices):
            start, way = p[:, a, None], (p[:, b] - p[:, a])[:, None]
            t = (((at - start) * way).sum(2) / way.square().sum(2).clamp_min(1e-8)).clamp(0, 1)
            nearest = torch.minimum(nearest, (at - start - t[..., None] * way).norm(dim=2))
        return cover(nearest - thick * scale[:, None])

    hair = uniform(0.05, 0.35)
    for first in (_BROWS, _BROWS + 3):
        paint(stroke([first, first + 1, first + 2], 0.03), hair)
    for left, top, right, bottom in ((0, 1, 2, 3), (6, 5, 4, 7)):
        corners = p[:, [_EYES + left, _EYES + right]]
        middle, half = corners.mean(1)[:, None], (corners[:, 1] - corners[:, 0])[:, None] / 2
        tall = (p[:, _EYES + bottom] - p[:, _EYES + top])[:, None] / 2
        a = ((at - middle) * half).sum(2) / half.square().sum(2)
        b = ((at - middle) * tall).sum(2) / tall.square().sum(2)
        ellipse = ((a.square() + b.square()).clamp_min(1e-8).sqrt() - 1) * tall.norm(dim=2)
        paint(cover(ellipse), 0.95)
        paint(cover(ellipse) * cover((at - middle).norm(dim=2) - 0.07 * scale[:, None]), 0.1)
    paint(0.5 * stroke([_NOSE, _NOSE + 1], 0.015), 0.3)
    paint(0.8 * stroke([_NOSE + 2, _NOSE + 1, _NOSE + 3], 0.02), 0.25)
    outline = [_MOUTH, _MOUTH + 1, _MOUTH + 2, _MOUTH + 3, _MOUTH]
    paint(stroke([_MOUTH, _MOUTH + 4, _MOUTH + 2], 0.04), 0.1)
    paint(0.8 * stroke(outline, 0.025), 0.35)

    image = image * (1 + uniform(-0.35, 0.35)[:, None] * at[..., 0] * 2 + uniform(-0.2, 0.2)[:, None] * at[..., 1] * 2)
    image = image.view(n, 1, size, size)
    hidden = (torch.rand(n, generator=g) < 0.25).view(-1, 1, 1, 1)
    corner, extent = (torch.rand(n, 2, generator=g) - 0.5)[:, None] * 0.7, 0.06 + 0.1 * torch.rand(n, 2, generator=g)[:, None]
    box = ((at - corner).abs() < extent).all(2).view_as(image)
    image = torch.where(hidden & box, torch.rand(n, generator=g).view(-1, 1, 1, 1), image)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, blurred, torch.rand(n, generator=g).view(-1, 1, 1, 1))
    image = image + 0.04 * torch.randn(image.shape, generator=g)
    return image.clamp(0, 1), p.flatten(1).contiguous()
