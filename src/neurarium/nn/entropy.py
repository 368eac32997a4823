"""Range-partition entropy as a loss: how many simple pieces does it take to describe a point set, or an attention map?

Algorithms that adapt to their input cost O(n (1 + H)), where H is the smallest entropy of a partition of the points into pieces that one
simple range covers each: few large clusters are easy, points spread over many ranges are hard. With a soft assignment of points to k
ranges, the entropy of the mean assignment is a smooth stand-in:

    p_ij = softmax_j(-alpha |x_i - c_j|^2),   p_j = mean_i p_ij,   H = -sum_j p_j log p_j                              (balls)
    p_ij = product of sigmoid(+-(w.x_i - b)/tau) from the root of a binary tree of halfspaces to the leaf j              (halfspaces)

:class:`EntropyNet` moves points a little so that H falls while the set stays what it is (Chamfer distance). The same penalty on the mass
that attention puts on ranges of keys, ``P_qj = sum_t A_qt s_tj``, asks every query for few ranges, not for few keys: within a range
attention may stay as broad as it likes, and what lies outside can be cut away. :func:`range_entropy_attention` puts it into your own
transformer.

*Source*: "Differentiable Entropy Regularization for Geometry and Neural Networks" (2025).

*Departures*: the cells of the halfspace family are the leaves of a soft tree, so that the assignments of a point sum to one by
construction. H comes from log-sum-exp, without a small constant inside the logarithm. Anchors that run away lower H without moving a
point: :meth:`RangeEntropy.refit` places them by k-means for values that are reported.

*Cost*: n k distances an evaluation; for attention one product of the map with the memberships.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput
from neurarium.nn.replace import Rule

__all__ = [
    "AttentionCall",
    "EntropyAttention",
    "EntropyNet",
    "RangeEntropy",
    "attention_calls",
    "attention_range_entropy",
    "chamfer",
    "cover",
    "halfspace_entropy",
    "range_entropy_attention",
    "segments",
    "soft_entropy",
]


def soft_entropy(x: Tensor, anchors: Tensor, alpha: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Entropy (...) of the mean soft assignment of points x (..., n, d) to the nearest of anchors (..., k, d), in nats.

    Between 0 (all at one anchor) and log k; as alpha grows, the entropy of the Voronoi cells' counts. ``weights`` (..., n): masses of
    the points. Scaling the space by s changes nothing if alpha is divided by s^2.
    """
    return _entropy_of_mean(_ball_memberships(x, anchors, alpha), weights)


def halfspace_entropy(x: Tensor, planes: Tensor, offsets: Tensor, tau: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """The same for the leaves of a soft binary tree: node t sends x to its second child with sigmoid((planes[t].x - offsets[t])/tau).

    ``planes`` (k - 1, d) in breadth-first order, scaled to unit length here; k is a power of two.
    """
    return _entropy_of_mean(_tree_memberships(x, planes, offsets, tau), weights)


def _check_points(x: Tensor, d: int) -> None:
    if x.dim() < 2 or x.shape[-1] != d or x.shape[-2] == 0:
        raise BadInput(f"points are (..., n, {d}) with n >= 1, not {tuple(x.shape)}")


def _ball_memberships(x: Tensor, anchors: Tensor, alpha: float | Tensor) -> Tensor:
    """log p_ij (..., n, k). The square of x_i is the same for all j, so the softmax needs only the inner products."""
    _check_points(x, anchors.shape[-1])
    return torch.log_softmax(alpha * (2 * x @ anchors.mT - anchors.square().sum(-1)[..., None, :]), -1)


def _tree_memberships(x: Tensor, planes: Tensor, offsets: Tensor, tau: float | Tensor) -> Tensor:
    _check_points(x, planes.shape[-1])
    leaves = len(planes) + 1
    if leaves & (leaves - 1) or offsets.shape != (len(planes),):
        raise BadInput(f"a tree of k leaves has k - 1 planes and offsets, k a power of two, not {len(planes)} and {tuple(offsets.shape)}")
    side = (x @ functional.normalize(planes, dim=-1).mT - offsets) / tau  # (..., n, k - 1)
    left, right = functional.logsigmoid(-side), functional.logsigmoid(side)
    paths = x.new_zeros(*x.shape[:-1], 1)
    first = 0
    while first < len(planes):
        nodes = slice(first, first + paths.shape[-1])
        paths = torch.stack([paths + left[..., nodes], paths + right[..., nodes]], -1).flatten(-2)
        first = nodes.stop
    return paths


def _entropy_of_mean(logs: Tensor, weights: Tensor | None) -> Tensor:
    """From log assignments (..., n, k)."""
    if weights is None:
        share = logs.logsumexp(-2) - math.log(logs.shape[-2])
    else:
        share = (logs + (weights / weights.sum(-1, keepdim=True)).log()[..., None]).logsumexp(-2)
    return -(share.exp() * share).sum(-1)


def cover(x: Tensor, radius: float) -> Tensor:
    """Anchors for points x (n, d): means of groups that each fit into a ball of ``radius``; greedily, the ball that holds most of the rest.

    Candidate balls are centred at the points, at the middles of pairs and, in the plane, pass through pairs: n^2 of them, for small sets.
    """
    _check_points(x, x.shape[-1])
    if not radius >= 0:
        raise BadInput(f"the radius must not be negative, got {radius}")
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    half = (x[j] - x[i]) / 2
    centres = [x, x[i] + half]
    if x.shape[1] == 2:
        square = half.square().sum(1, keepdim=True)
        across = torch.stack([-half[:, 1], half[:, 0]], 1) * ((radius**2 - square).clamp_min(0) / square.clamp_min(1e-30)).sqrt()
        centres += [x[i] + half + across, x[i] + half - across]
    near = torch.cdist(torch.cat(centres), x) <= radius * (1 + 1e-5)
    left, anchors = torch.ones(len(x), dtype=torch.bool, device=x.device), []
    while left.any():
        group = near[(near & left).sum(1).argmax()] & left
        anchors.append(x[group].mean(0))
        left &= ~group
    return torch.stack(anchors)


class RangeEntropy(nn.Module):
    """The entropy of points over ``ranges`` learned ranges, as a module: ``(..., n, dim) -> (...)``.

    ``family``: ``"ball"`` (anchors, sharpness ``alpha``) or ``"halfspace"`` (a tree of planes, softness ``1/alpha``).
    ``learn_ranges=False`` holds them fixed. They start from standard normal draws; :meth:`refit` places anchors on given points.
    """

    def __init__(
        self, dim: int, ranges: int = 16, family: Literal["ball", "halfspace"] = "ball", alpha: float = 10.0, learn_ranges: bool = True
    ) -> None:
        super().__init__()
        if family not in ("ball", "halfspace"):
            raise BadInput(f"family is 'ball' or 'halfspace', not {family!r}")
        if ranges < 2 or (family == "halfspace" and ranges & (ranges - 1)):
            raise BadInput(f"ranges is at least 2, and a power of two for halfspaces, not {ranges}")
        if not alpha > 0:
            raise BadInput(f"alpha must be positive, got {alpha}")
        self.dim, self.ranges, self.family, self.alpha = dim, ranges, family, alpha
        self.anchors = nn.Parameter(torch.randn(ranges if family == "ball" else ranges - 1, dim), requires_grad=learn_ranges)
        self.offsets = nn.Parameter(torch.zeros(ranges - 1), requires_grad=learn_ranges) if family == "halfspace" else None

    def log_memberships(self, x: Tensor) -> Tensor:
        """log p_ij, (..., n, dim) -> (..., n, ranges)."""
        if self.offsets is not None:
            return _tree_memberships(x, self.anchors, self.offsets, 1 / self.alpha)
        return _ball_memberships(x, self.anchors, self.alpha)

    def memberships(self, x: Tensor) -> Tensor:
        """p_ij."""
        return self.log_memberships(x).exp()

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return _entropy_of_mean(self.log_memberships(x), weights)

    @torch.no_grad()
    def refit(self, x: Tensor, steps: int = 20) -> RangeEntropy:
        """Place the anchors on points (n, dim): farthest-first, then k-means. For values that are reported, where anchors must not flee."""
        if self.family != "ball":
            raise BadInput("refit places the anchors of the ball family; planes are learned")
        _check_points(x, self.dim)
        centres = x[:1]
        while len(centres) < self.ranges:
            centres = torch.cat([centres, x[torch.cdist(x, centres).amin(1).argmax()][None]])
        for _ in range(steps):
            nearest = functional.one_hot(torch.cdist(x, centres).argmin(1), self.ranges).to(x.dtype)
            mass = nearest.sum(0)[:, None]
            centres = torch.where(mass > 0, nearest.T @ x / mass.clamp_min(1), centres)
        self.anchors.copy_(centres)
        return self

    def extra_repr(self) -> str:
        return f"{self.dim}, ranges={self.ranges}, family={self.family}, alpha={self.alpha}"


class EntropyNet(nn.Module):
    """Points in, points out (..., n, dim): every point moves by at most ``max_shift`` a coordinate, knowing itself and the whole set.

    A point network of ``layers`` hidden layers shared by all points, the maximum over points as context, and a head. It starts near the
    identity.
    """

    def __init__(self, dim: int = 2, hidden: int = 64, layers: int = 2, ranges: int = 16, max_shift: float = 0.02) -> None:
        super().__init__()
        if layers < 1 or not max_shift > 0:
            raise BadInput(f"an EntropyNet has layers >= 1 and max_shift > 0, not {layers} and {max_shift}")
        self.dim, self.max_shift = dim, max_shift
        self.points = nn.Sequential(*[m for i in range(layers) for m in (nn.Linear(hidden if i else dim, hidden), nn.ReLU())])
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        nn.init.normal_(self.head[-1].weight, std=1e-3)
        nn.init.zeros_(self.head[-1].bias)
        self.entropy = RangeEntropy(dim, ranges)

    def forward(self, x: Tensor) -> Tensor:
        _check_points(x, self.dim)
        own = self.points(x)
        context = own.amax(-2, keepdim=True).expand_as(own)
        return x + self.max_shift * torch.tanh(self.head(torch.cat([own, context], -1)))

    def loss(self, x: Tensor, strength: float) -> Tensor:
        """Chamfer distance in units of the squared largest shift, plus ``strength`` times the moved points' entropy; mean over sets."""
        moved = self(x)
        return (chamfer(x, moved) / self.max_shift**2 + strength * self.entropy(moved)).mean()


def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance to the nearest point of the other set, both ways; (..., n, d), (..., m, d) -> (...)."""
    square = (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT).clamp_min(0)
    return square.amin(-1).mean(-1) + square.amin(-2).mean(-1)


def segments(length: int, size: int) -> Tensor:
    """Memberships (length, ceil(length/size)) of positions in consecutive ranges of ``size``."""
    if length < 1 or size < 1:
        raise BadInput(f"segments of positive size over at least one position, not {size} over {length}")
    return functional.one_hot(torch.arange(length) // size).float()


def attention_range_entropy(attn: Tensor, keys: Tensor | None, entropy: RangeEntropy | Tensor) -> Tensor:
    """Mean over queries of the entropy of the mass that each row of ``attn`` (..., q, t) puts on ranges of keys.

    ``entropy``: a :class:`RangeEntropy` whose soft ranges are taken on the ``keys`` (..., t, d), or memberships (t, k), for which keys
    are not needed (positions, words, ...).
    """
    if isinstance(entropy, Tensor):
        member = entropy.to(attn)
    elif keys is None:
        raise BadInput("ranges on keys need the keys")
    else:
        member = entropy.memberships(keys)
    mass = attn @ member
    return -torch.xlogy(mass, mass.clamp_min(torch.finfo(mass.dtype).tiny)).sum(-1).mean()


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer did in one forward pass: heads' weights and scores (n, h, q, t), keys (n, h, t, d), and its layer."""

    layer: EntropyAttention
    weights: Tensor
    scores: Tensor
    keys: Tensor

    @property
    def penalty(self) -> Tensor:
        """The layer's range entropy of these weights."""
        return attention_range_entropy(self.weights, self.keys, self.layer.ranges_of(self.keys))


_CALLS: ContextVar[list[AttentionCall] | None] = ContextVar("attention calls", default=None)


@contextmanager
def attention_calls() -> Iterator[list[AttentionCall]]:
    """Collect an :class:`AttentionCall` of every :class:`EntropyAttention` that runs in the block::

        with attention_calls() as calls:
            loss = criterion(model(x), y)
        loss = loss + 0.1 * sum(call.penalty for call in calls)

    Nothing is kept in the model.
    """
    calls: list[AttentionCall] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


class EntropyAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the same weights and the same function, which shows what it does to :func:`attention_calls`.

    ``size``: ranges are consecutive positions of that many; ``ranges``: learned balls on the keys of each head instead. ``keep`` below 1
    cuts all but the largest share of every row's weights and rescales the rest: set it on a trained model.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, *, batch_first: bool = False,
        size: int = 8, ranges: int | None = None, alpha: float = 1.0, keep: float = 1.0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        self._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from computing the attention by itself in eval mode
        self.size, self.keep = size, keep
        self.entropy = None if ranges is None else RangeEntropy(embed_dim // num_heads, ranges, alpha=alpha).to(device=device, dtype=dtype)

    def ranges_of(self, keys: Tensor) -> RangeEntropy | Tensor:
        return self.entropy if self.entropy is not None else segments(keys.shape[-2], self.size)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not 0 < self.keep <= 1:
            raise BadInput(f"keep is a share in (0, 1], not {self.keep}")
        single = query.dim() == 2
        if single:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(t, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t, w, b in zip((query, key, value), self.in_proj_weight.chunk(3), bias)
        )  # (n, h, length, d)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        masked = scores
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None, :]):
            if mask is None:
                continue
            if mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.num_heads))
            masked = masked.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else masked + mask
        weights = masked.softmax(-1)
        if self.keep < 1:
            weights = _largest(weights, self.keep)
        calls = _CALLS.get()
        if calls is not None:
            calls.append(AttentionCall(self, weights, scores, k))
        used = functional.dropout(weights, self.dropout, self.training)
        out = self.out_proj((used @ v).transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if single:
            out, shown = out.squeeze(0 if self.batch_first else 1), None if shown is None else shown.squeeze(0)
        return out, shown

    @torch.no_grad()
    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        """The weights of an ``nn.MultiheadAttention``: the same function exactly."""
        del inputs
        for name, p in old.named_parameters():
            self.get_parameter(name).copy_(p)
        return self.in_proj_weight.new_zeros(())


def _largest(weights: Tensor, keep: float) -> Tensor:
    """Each row's largest weights, scaled to sum to one."""
    count = max(1, math.ceil(keep * weights.shape[-1] - 1e-9))
    values, where = weights.topk(count, -1)
    return torch.zeros_like(weights).scatter(-1, where, values / values.sum(-1, keepdim=True))


def range_entropy_attention(*, size: int = 8, ranges: int | None = None, alpha: float = 1.0, init: Literal["fit", "fresh"] = "fit") -> Rule:
    """The rule for :func:`neurarium.nn.replace.replace_layers` that makes every ``nn.MultiheadAttention`` an :class:`EntropyAttention`.

    ``init="fit"`` (default) copies the weights, so the model computes what it did before. Kept, with the reason in the report: layers
    with keys or values of another size, with extra bias keys or with an added zero key, and subclasses.
    """
    if init not in ("fit", "fresh"):
        raise BadInput(f"init is 'fit' or 'fresh', not {init!r}")

    def build(old: nn.Module) -> nn.Module:
        if not old._qkv_same_embed_dim:
            raise BadInput("its keys or values have another size than its queries")
        if old.bias_k is not None or old.add_zero_attn:
            raise BadInput("it adds keys of its own to the sequence, which belong to no range")
        return EntropyAttention(
            old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, batch_first=old.batch_first,
            size=size, ranges=ranges, alpha=alpha,
        )  # fmt: skip

    return Rule(nn.MultiheadAttention, build, init)
