"""Does a relevance map point at the object? Measures against known places of the objects.

Maps are (n, height, width), not negative; objects are masks (n, objects, height, width), an empty mask where an image has fewer. Every
measure is one number an image, larger is better but for the entropy. A map that is zero everywhere points nowhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.roles import Report

__all__ = ["Localisation", "localise", "peaks"]


@dataclass(frozen=True)
class Localisation(Report):
    """One value an image, each (n,)."""

    pointing: Tensor  # 1 where the largest value lies in an object
    energy: Tensor  # share of the map's sum inside the objects
    iou: Tensor  # of {map >= t} with the objects, at the best of 19 thresholds t between 0.05 and 0.95 of the maximum
    hit: Tensor  # share of the objects that hold one of the map's m highest peaks, m the number of objects
    entropy: Tensor  # of the map as a distribution over positions, as a share of the largest possible; small is sharp


def localise(maps: Tensor, objects: Tensor, *, radius: int) -> Localisation:
    """All measures. ``radius``: peaks lie more than so many pixels apart (in the larger coordinate), so that
    one object does not take two of them: the extent of an object, where objects lie further apart than that."""
    if maps.ndim != 3 or objects.ndim != 4 or objects.shape[0] != len(maps) or objects.shape[2:] != maps.shape[1:] or not len(maps):
        raise BadInput(f"maps (n, h, w) and objects (n, m, h, w) needed, got {tuple(maps.shape)} and {tuple(objects.shape)}")
    if not torch.isfinite(maps).all() or maps.min() < 0:
        raise BadInput("maps must be finite and not negative")
    objects = objects.bool()
    there = objects.flatten(2).any(2)  # (n, m)
    if not there.any(1).all():
        raise BadInput(f"image {int((~there.any(1)).nonzero()[0])} has no object")
    union, flat = objects.any(1).flatten(1), maps.flatten(1).double()
    total, top = flat.sum(1), flat.amax(1)
    seen = total > 0
    share = flat / total.clamp_min(1e-300)[:, None]
    pointing = union.gather(1, flat.argmax(1, keepdim=True))[:, 0] & seen
    energy = (share * union).sum(1)
    levels = torch.arange(1, 20, dtype=torch.float64, device=maps.device) / 20
    above = flat[:, None] >= levels[:, None] * top[:, None, None]  # (n, 19, positions)
    iou = (above & union[:, None]).sum(2) / (above | union[:, None]).sum(2)
    at = peaks(maps, objects.shape[1], radius)  # (n, m)
    wanted = torch.arange(objects.shape[1], device=maps.device) < there.sum(1, keepdim=True)
    held = objects.flatten(2).gather(2, at.clamp_min(0)[:, None].expand(-1, objects.shape[1], -1))  # (n, objects, peaks)
    found = (held & (wanted & (at >= 0))[:, None]).any(2)
    hit = (found & there).sum(1) / there.sum(1)
    entropy = -torch.special.xlogy(share, share).sum(1) / math.log(flat.shape[1])
    values = (pointing, energy, iou.amax(1) * seen, hit, torch.where(seen, entropy, 1.0))
    return Localisation(*(v.to(torch.float32) for v in values))


def peaks(maps: Tensor, count: int, radius: int) -> Tensor:
    """Positions (n, count) in the flattened map of the highest values that lie more than ``radius`` pixels apart; -1 after the last.

    Greedy: the maximum, then the maximum of what is further away, and so on while it is positive. Ties go to the first.
    """
    n, height, width = maps.shape
    left = maps.clone()
    found = []
    for _ in range(count):
        value, at = left.flatten(1).max(1)
        found.append(torch.where(value > 0, at, -1))
        spot = F.one_hot(at, height * width).view(n, 1, height, width).to(maps.dtype)
        near = F.max_pool2d(spot, 2 * radius + 1, 1, radius)[:, 0] > 0
        left = left.masked_fill(near, 0.0)
    return torch.stack(found, 1)
