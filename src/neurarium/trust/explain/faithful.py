"""Is an explanation faithful? What the model's own output does when the pixels that a map calls important go or stay.

- **Deletion**: pixels are replaced by a baseline in order of falling relevance; the area under the class probability, as a function of the
  share that is gone, is small for a faithful map. **Insertion**: they are put into the baseline in that order; the area is large.
- **Average drop** and **increase**: the image is multiplied by the map (blended with the baseline). Drop is the share of the class
  probability that is lost, max(0, p - p') / p; increase is whether p' > p. A good map loses little.

*Source*: V. Petsiuk et al., "RISE", BMVC 2018 (deletion, insertion); A. Chattopadhay et al., "Grad-CAM++", WACV 2018, section 4.1
(drop, increase). *Departures*: pixels of equal relevance go in a seeded random order: in raster order a map with large flat parts would be
measured by the corner that it starts in.
*Cost*: 2 (steps + 1) + 2 forward passes an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import undisturbed
from neurarium.roles import Report
from neurarium.trust.explain.cam import chosen_classes

__all__ = ["Faithfulness", "faithfulness"]

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "logit": lambda z: z}


@dataclass(frozen=True)
class Faithfulness(Report):
    """One value an image, each (n,), and the curves (n, steps + 1) over the shares 0, 1/steps, ..., 1 of pixels."""

    deletion: Tensor
    insertion: Tensor
    drop: Tensor
    increase: Tensor
    deletion_curve: Tensor
    insertion_curve: Tensor


def faithfulness(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: int | Tensor,
    *,
    score: str = "softmax",
    baseline: float | Tensor = 0.0,
    steps: int = 16,
    seed: int = 0,
    batch_size: int = 256,
) -> Faithfulness:
    """Deletion, insertion, drop and increase of relevance ``maps`` (n, height, width) for images ``x`` (n, c, height, width).

    Args:
        model: maps x to logits (n, classes). Run in eval mode and left as it was.
        target: the explained class, one or (n,).
        score: ``softmax``, ``sigmoid`` (several labels an image) or ``logit`` (drop and increase then need positive logits).
        baseline: what a removed pixel becomes: a number, or a tensor that broadcasts to x (a blurred copy, say).
        steps: how many equal portions the pixels go in.
    """
    n = len(x)
    if x.ndim != 4 or maps.shape != (n, *x.shape[2:]) or not n:
        raise BadInput(f"x (n, c, h, w) and maps (n, h, w) needed, got {tuple(x.shape)} and {tuple(maps.shape)}")
    if not torch.isfinite(maps).all() or not torch.isfinite(x).all():
        raise BadInput("x and maps must be finite")
    if score not in _SCORES or steps < 1:
        raise BadInput(f"score must be one of {', '.join(_SCORES)} and steps at least 1, got {score!r} and {steps}")
    empty = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    order = _ranks(maps, seed)  # 0 is the most relevant
    pixels = order[0].numel()
    with undisturbed(model), torch.no_grad():
        model.eval()

        def measure(images: Tensor) -> Tensor:
            logits = torch.cat([model(part) for part in images.split(batch_size)])
            return _SCORES[score](logits).gather(1, classes[:, None])[:, 0]

        with torch.no_grad():
            logits = model(x[:1])
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(f"the output must be logits (n, classes), got {type(logits).__name__}")
        if torch.as_tensor(target).ndim > 1:
            raise BadInput(f"target must be a class or (n,) classes, got {torch.as_tensor(target).ndim} axes")
        classes = chosen_classes(target, logits, slice(0, n), n)[:, 0]
        deletion, insertion = [], []
        for step in range(steps + 1):
            gone = (order * steps < step * pixels)[:, None]
            deletion.append(measure(torch.where(gone, empty, x)))
            insertion.append(measure(torch.where(gone, x, empty)))
        whole = deletion[0]
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        weight = ((maps - low) / (high - low).clamp_min(1e-12))[:, None]
        kept = measure(empty + weight * (x - empty))
    out, back = torch.stack(deletion, 1), torch.stack(insertion, 1)
    drop = (whole - kept).clamp_min(0.0) / whole.clamp_min(1e-12)
    return Faithfulness(_area(out), _area(back), drop, (kept > whole).to(x.dtype), out, back)


def _ranks(maps: Tensor, seed: int) -> Tensor:
    """The place (n, h, w) of each pixel when they are sorted by falling value, ties at random."""
    flat = maps.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return ranks.view(maps.shape)


def _area(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, dx=1.0 / (curve.shape[1] - 1), dim=1)
