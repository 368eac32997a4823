"""Smooth Grad-CAM++: class activation maps from derivatives that are averaged over noisy copies of the input.

A class activation map says where in an image a convolutional network sees the evidence for a class: a weighted sum of the feature maps
A^k of one layer, of which the positive part is kept. The methods differ in the weights w_k. With Y the class score (a logit), and g =
dY/dA^k_ij its gradient at position (i, j) of map k:

- **Grad-CAM**: w_k = mean_ij g.
- **Grad-CAM++**: w_k = sum_ij alpha_ij^k relu(g), where alpha makes sum_k w_k sum_ij A^k_ij reproduce the score. For the score exp(Y)
  of a piecewise linear network its derivatives are exp(Y) times g, g^2, g^3, and
  alpha_ij^k = g^2 / (2 g^2 + (sum_ab A^k_ab) g^3), which needs one backward pass only.
- **Smooth Grad-CAM++**: g, g^2, g^3 become D1, D2, D3, their means over ``samples`` copies x + N(0, s^2), s = noise * (max x - min x).
  One gradient is a ragged thing; its average over a neighbourhood of the image shows what the class needs there.

    L = relu(sum_k w_k A^k), scaled to [0, 1], enlarged bilinearly to the size of the image

``channels`` and ``neurons`` restrict the sum to chosen feature maps, or to chosen positions of them.

*Source*: D. Omeiza et al., "Smooth Grad-CAM++", arXiv 1908.01224, section 3; A. Chattopadhay et al., "Grad-CAM++", WACV 2018,
equations 10-19; R. Selvaraju et al., "Grad-CAM", ICCV 2017; D. Smilkov et al., "SmoothGrad", 2017 (the noise).
*Departures*: the numerator of alpha is D2, as the derivation of Grad-CAM++ gives it; the paper prints the first derivative there.
The factors exp(Y) are left out: for one image they cancel when the map is scaled, and with noisy copies they would let
the copy with the largest score decide alone (and overflow). A^k is that of the clean image; ``activation="mean"`` averages it over the
copies, the other reading of the paper. Where the terms of alpha's denominator cancel, alpha is 0. The noise is the same for every image of
a batch, so that an image's map does not depend on its neighbours.
*Cost*: a forward and a backward pass for each of the ``samples`` copies (one for the other methods), and one forward pass without
gradients for the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import undisturbed
from neurarium.roles import Report
from neurarium.trust.explain.capture import capture, last_map

__all__ = ["METHODS", "CamReport", "class_activation"]

#: ``averaged_gradcam`` averages the finished Grad-CAM maps over noisy copies: SmoothGrad's own recipe, and a different method.
METHODS = ("gradcam", "gradcam++", "smooth_gradcam++", "averaged_gradcam")


@dataclass(frozen=True)
class CamReport(Report):
    """``map`` (n, height, width) in [0, 1]; ``weights`` (n, channels), those of left-out channels 0; ``logits`` (n, classes) of the clean
    images; ``target`` (n,) the classes explained. With ``target`` (n, k), map and weights have k after n."""

    map: Tensor
    weights: Tensor
    logits: Tensor
    target: Tensor
    layer: str


def class_activation(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    *,
    layer: str | None = None,
    method: str = "smooth_gradcam++",
    samples: int = 25,
    noise: float = 0.15,
    activation: str = "clean",
    channels: int | Sequence[int] | None = None,
    neurons: Tensor | None = None,
    upsample: bool = True,
    seed: int = 0,
    batch_size: int = 128,
) -> CamReport:
    """Where ``model`` sees the evidence for a class, in images ``x`` (n, channels, height, width) as the model takes them.

    Args:
        model: maps x to logits (n, classes). It is run in eval mode and left as it was.
        target: the class, one for each image (n,), several for each image (n, k), or None for the class of the largest logit.
        layer: name of the submodule whose output is A; by default the last that returns feature maps.
        method: one of :data:`METHODS`. ``samples`` and ``noise`` (a share of each image's range) matter to the last two.
        channels: these feature maps only, or so many of the largest weight (``averaged_gradcam`` chooses for each copy).
        neurons: boolean (height, width) of the layer: only derivatives at these positions count.
        upsample: enlarge the map to the image; otherwise it has the layer's size.
        seed: of the noise.
        batch_size: images in one pass through the model, noisy copies included.

    Raises:
        BadInput: x not finite or not (n, c, h, w) with n >= 1; a class, channel or mask that does not exist; settings out of range.
        UnsupportedModel: no feature maps, or an output that is not (n, classes).
    """
    _check(x, method, samples, noise, activation, batch_size)
    x = x.detach()
    top = channels if method == "averaged_gradcam" and isinstance(channels, int) else None
    if method in ("smooth_gradcam++", "averaged_gradcam") and noise > 0.0:
        copies = noise * torch.randn((samples, *x.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(x)
    else:
        copies = x.new_zeros(1, 1, 1, 1)
    with undisturbed(model):
        model.eval()
        site = last_map(model, x[:1]) if layer is None else layer
        rows = max(1, batch_size // len(copies))
        chunks = []
        for i in range(0, len(x), rows):
            part = x[i : i + rows]
            with capture(model, [site], part, grad=False) as clean:
                logits, maps = clean.output, clean[site]
            classes = chosen_classes(target, logits, slice(i, i + rows), len(x))
            mean = _moments(model, site, part, classes, copies, _mask(neurons, channels, maps), batch_size, top)
            chunks.append((*_map(method, mean, maps[:, None] if activation == "clean" else mean.a, channels), logits, classes))
    cam, weights, logits, classes = (torch.cat(c) for c in zip(*chunks))
    if upsample:
        cam = F.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False)
    if not isinstance(target, Tensor) or target.ndim < 2:
        cam, weights, classes = cam[:, 0], weights[:, 0], classes[:, 0]
    return CamReport(cam, weights, logits, classes, site)


class _Moments(NamedTuple):
    """Means over the copies. n images, k classes each."""

    g: Tensor  # (n, k, channels, h, w), as the two powers
    g2: Tensor
    g3: Tensor
    a: Tensor  # (n, 1, channels, h, w)
    cam: Tensor  # (n, k, h, w), Grad-CAM's map of each copy
    weights: Tensor  # (n, k, channels), of these maps


def _moments(
    model: nn.Module, site: str, x: Tensor, classes: Tensor, copies: Tensor, keep: Tensor | None, batch_size: int, top: int | None
) -> _Moments:  # fmt: skip
    n, k = classes.shape
    spread = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).view(n, 1, 1, 1, 1)
    sums: list[Tensor] = []
    for noise in copies.split(max(1, batch_size // n)):
        m = len(noise)
        with capture(model, [site], (x[:, None] + spread * noise).flatten(0, 1)) as seen:
            score = [seen.output.gather(1, classes[:, [j]].repeat_interleave(m, 0)) for j in range(k)]
            found = [seen.gradient(s, keep=j < k - 1)[site] for j, s in enumerate(score)]
            a = seen[site].detach().unflatten(0, (n, m))[:, :, None]  # (n, m, 1, channels, h, w)
        g = torch.stack(found, 1).unflatten(0, (n, m))  # (n, m, k, channels, h, w)
        g, a = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (g, a))
        if keep is not None:
            g = g * keep
        weights = g.mean((-2, -1)) if top is None else _largest(g.mean((-2, -1)), top)
        cam = (weights[..., None, None] * a).sum(-3).relu()
        terms = [t.sum(1) for t in (g, g.square(), g.pow(3), a, cam, weights)]
        sums = [s + t for s, t in zip(sums, terms)] if sums else terms
    return _Moments(*(s / len(copies) for s in sums))


def _map(method: str, mean: _Moments, a: Tensor, channels: int | Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The scaled map (n, k, h, w) and the weights (n, k, channels)."""
    if method == "averaged_gradcam":
        weights = mean.weights
    elif method == "gradcam":
        weights = mean.g.mean((-2, -1))
    else:
        product = a.sum((-2, -1), keepdim=True) * mean.g3
        below = 2.0 * mean.g2 + product
        sure = below.abs() > 1e-6 * (2.0 * mean.g2 + product.abs())
        alpha = torch.where(sure, mean.g2 / torch.where(sure, below, 1.0), 0.0)
        weights = (alpha * mean.g.relu()).sum((-2, -1))
    if isinstance(channels, int) and method != "averaged_gradcam":
        weights = _largest(weights, channels)
    cam = mean.cam if method == "averaged_gradcam" else (weights[..., None, None] * a).sum(-3).relu()
    low, high = cam.amin((-2, -1), keepdim=True), cam.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (cam - low) / torch.where(high > low, high - low, 1.0), 0.0), weights


def _largest(weights: Tensor, count: int) -> Tensor:
    """The weights (..., channels) with all but the ``count`` largest set to zero."""
    best = weights.topk(count, -1).indices
    return torch.zeros_like(weights).scatter(-1, best, weights.gather(-1, best))


def chosen_classes(target: int | Tensor | None, logits: Tensor, rows: slice, n: int) -> Tensor:
    """(rows, k) int64."""
    if logits.ndim != 2:
        raise UnsupportedModel(f"the output must be logits (n, classes), got shape {tuple(logits.shape)}")
    if target is None:
        return logits.argmax(1, keepdim=True)
    wanted = torch.as_tensor(target, device=logits.device)
    if wanted.is_floating_point() or wanted.ndim > 2 or (wanted.ndim and len(wanted) != n) or wanted.numel() == 0:
        raise BadInput(f"target must be a class, (n,) or (n, k) integers for n={n} images, got {wanted.dtype} {tuple(wanted.shape)}")
    if wanted.min() < 0 or wanted.max() >= logits.shape[1]:
        raise BadInput(f"target must be in 0..{logits.shape[1] - 1}, got {int(wanted.min())}..{int(wanted.max())}")
    return wanted.expand(n).reshape(n, 1)[rows].long() if wanted.ndim < 2 else wanted[rows].long()


def _mask(neurons: Tensor | None, channels: int | Sequence[int] | None, maps: Tensor) -> Tensor | None:
    """What of the gradient counts: (channels, height, width) or what broadcasts to it."""
    if maps.ndim != 4:
        raise UnsupportedModel(f"the layer must return (n, channels, height, width), got shape {tuple(maps.shape)}")
    depth, *size = maps.shape[1:]
    keep = None
    if neurons is not None:
        if tuple(neurons.shape) != tuple(size):
            raise BadInput(f"neurons must be a mask of the layer's size {tuple(size)}, got {tuple(neurons.shape)}")
        keep = neurons.to(maps.device, torch.bool)[None]
    if isinstance(channels, int):
        if not 1 <= channels <= depth:
            raise BadInput(f"channels must be 1 to {depth}, got {channels}")
    elif channels is not None:
        chosen = torch.as_tensor(list(channels), dtype=torch.int64)
        if chosen.numel() == 0 or chosen.min() < 0 or chosen.max() >= depth:
            raise BadInput(f"channels must be in 0..{depth - 1}, got {list(channels)}")
        mask = torch.zeros(depth, 1, 1, dtype=torch.bool, device=maps.device).index_fill_(0, chosen.to(maps.device), True)
        keep = mask if keep is None else keep & mask
    return keep


def _check(x: Tensor, method: str, samples: int, noise: float, activation: str, batch_size: int) -> None:
    if method not in METHODS:
        raise BadInput(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if activation not in ("clean", "mean"):
        raise BadInput(f"activation must be 'clean' or 'mean', got {activation!r}")
    if samples < 1 or batch_size < 1 or not 0.0 <= noise < float("inf"):
        raise BadInput(f"samples and batch_size must be at least 1 and noise at least 0, got {samples}, {batch_size} and {noise}")
    if not x.is_floating_point() or x.ndim != 4 or x.numel() == 0:
        raise BadInput(f"x must be floating point (n, channels, height, width) with n >= 1, got {x.dtype} {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise BadInput("x holds a NaN or an infinity")
