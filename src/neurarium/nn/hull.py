"""A convex hull whose cost adapts to its input, and which counts its work.

Marriage before conquest: to build the upper hull between two known vertices, find the hull's edge above the median abscissa first; then
only what lies above the lines to its two ends needs to be looked at again, on either side. Points below are dropped for good, wherever
they are, so that a set whose points mostly lie under few edges costs little more than one pass: O(n (1 + H)), with H the entropy of the
smallest partition into triangles under the hull. The edge is found by climbing: of the points above the present edge the farthest one
replaces the end on its side.

*Source*: Kirkpatrick and Seidel, "The ultimate planar convex hull algorithm" (1986), in the instance-optimal form of Afshani, Barbay
and Chan (2009).

*Departures*: the climbing in place of the linear-time prune-and-search (fewer tests in practice, no worst-case bound). With a
``partition``, a cell whose bounding box lies strictly inside the quadrilateral of the four extreme points is dropped as a whole after a
few tests: the result stays exact whatever the partition is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["Work", "instance_optimal_hull"]

Array = np.ndarray[Any, Any]


@dataclass
class Work:
    """What a hull cost: orientation tests (is a point above a line?), points dropped by certified cells, edges found."""

    orientation_tests: int = 0
    certified: int = 0
    edges: int = 0


def instance_optimal_hull(points: Tensor | Array, partition: Tensor | Array | None = None) -> tuple[Tensor, Work]:
    """Indices of the hull's vertices, counter-clockwise from the leftmost, and the work.

    ``points`` (n, 2). Points on an edge and duplicates are no vertices. ``partition`` (n,): labels of cells, to drop certified inner ones.
    Raises ``BadInput`` for another shape, an empty set, or coordinates that are not finite.
    """
    p = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != 2 or len(p) == 0:
        raise BadInput(f"points are (n, 2) with n >= 1, not {p.shape}")
    if not np.isfinite(p).all():
        raise BadInput("a point has a coordinate that is not finite")
    work = Work()
    inside = np.arange(len(p)) if partition is None else _uncertified(p, np.asarray(partition), work)
    # between the topmost of the leftmost and of the rightmost points above, between the lowest below
    upper = _chain(p, inside, work)
    lower = _chain(-p, inside, work)
    return torch.tensor(_ring(p, upper, lower), dtype=torch.long), work


def _ring(p: Array, upper: list[int], lower: list[int]) -> list[int]:
    """Both chains (the lower one runs right to left, since its plane is turned) as one cycle without repeated places."""
    ring: list[int] = []
    for i in [*lower[::-1], *upper[::-1]]:
        if not any(np.array_equal(p[i], p[j]) for j in (ring[-1:] + ring[:1])):
            ring.append(i)
    return ring


def _chain(p: Array, index: Array, work: Work) -> list[int]:
    """The upper hull from left to right."""
    x, y = p[index, 0], p[index, 1]
    left, right = _extreme(index, x, y, x.min()), _extreme(index, x, y, x.max())
    if left == right or np.array_equal(p[left], p[right]):
        return [int(left)]
    found: list[int] = []
    height = _height(p, index, left, right, work)
    _between(p, index[height > 0], height[height > 0], int(left), int(right), found, work)
    return [int(left), *found, int(right)]


def _extreme(index: Array, x: Array, y: Array, at: float) -> int:
    rows = np.flatnonzero(x == at)
    return int(index[rows[np.argmax(y[rows])]])


def _height(p: Array, index: Array, a: int, b: int, work: Work) -> Array:
    """Twice the area of (a, b, point): positive above the line from a to b, which runs to the right."""
    work.orientation_tests += len(index)
    (ax, ay), (bx, by) = p[a], p[b]
    return (bx - ax) * (p[index, 1] - ay) - (by - ay) * (p[index, 0] - ax)


def _between(p: Array, index: Array, height: Array, left: int, right: int, found: list[int], work: Work) -> None:
    """Append the hull's vertices strictly between left and right, given the points above that line with their heights."""
    if len(index) == 0:
        return
    x = p[index, 0]
    middle = np.partition(x, (len(x) - 1) // 2)[(len(x) - 1) // 2]
    a, b, above, over = left, right, index, height
    while len(above):
        top = above[over == over.max()]
        peak = int(top[np.argmax(p[top, 0])])  # of several on one line, an end
        if p[peak, 0] <= middle:
            a = peak
        else:
            peak = int(top[np.argmin(p[top, 0])]) if p[top, 0].min() > middle else peak
            b = peak
        above = above[above != peak]
        over = _height(p, above, a, b, work)
        above, over = above[over > 0], over[over > 0]
    work.edges += 1
    for start, end, side in ((left, a, x < p[a, 0]), (b, right, x > p[b, 0])):
        if start == b and b != right:
            found.append(b)
        if start != end and side.any():
            beside = index[side]
            high = _height(p, beside, start, end, work)
            _between(p, beside[high > 0], high[high > 0], start, end, found, work)
        if end == a and a != left:
            found.append(a)


def _uncertified(p: Array, labels: Array, work: Work) -> Array:
    """The points that are not in a cell whose bounding box lies inside the quadrilateral of the extreme points."""
    if labels.shape != (len(p),):
        raise BadInput(f"partition holds one label a point, ({len(p)},), not {labels.shape}")
    x, y = p[:, 0], p[:, 1]
    corners = [int(np.argmin(x)), int(np.argmin(y)), int(np.argmax(x)), int(np.argmax(y))]  # counter-clockwise
    _, cells = np.unique(labels, return_inverse=True)
    count = cells.max() + 1
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(low, cells, p)
    np.maximum.at(high, cells, p)
    box = np.stack([low, np.stack([high[:, 0], low[:, 1]], 1), high, np.stack([low[:, 0], high[:, 1]], 1)], 1)  # (cells, 4, 2)
    inner = np.ones(count, dtype=bool)
    for a, b in zip(corners, corners[1:] + corners[:1]):
        if a == b:  # one point is extreme in two directions
            continue
        (ax, ay), (bx, by) = p[a], p[b]
        work.orientation_tests += box.shape[0] * 4
        inner &= ((bx - ax) * (box[..., 1] - ay) - (by - ay) * (box[..., 0] - ax) > 0).all(1)
    keep = ~inner[cells]
    work.certified += int((~keep).sum())
    return np.flatnonzero(keep)
