"""Dynamic Perceiver: exits hang on a small latent branch that reads the feature maps and writes hints back.

A classifier on an early feature map forces that map to be linearly separable, which is not what later stages want of it. Here a few learned
tokens keep the classification apart from the features: before each convolutional stage they read the map by cross-attention and think it
over by self-attention, and every pixel asks them for a hint. The early exits classify the tokens, so the map is left to the last exit.

*Equations.* Map x (n, C_i, h, w) before stage i = 1..K, tokens Z (n, N_i, D_i), LN layer norm, CA(q, kv) = softmax(q Wq (kv Wk + b)^T /
sqrt d) kv Wv Wo with one head and, for reading, a learned b for each position of kv.

- *read*: kv = pool(DW(x) + x), a depthwise 7x7 convolution and a pooled grid of positions; Z += CA(LN Z, LN kv); Z += MLP(LN Z).
- *think*: pre-norm self-attention blocks on Z. Then the stage runs on x.
- *between stages*: Z <- a linear map over the token axis (N -> N/2), then over channels (D_i -> D_{i+1}), each after LN.
- *hint*, before stages 2..K and after the last: x += CA(LN x, LN Z), every pixel a query, width C/8; x += MLP(LN x).
- *readouts*: y_1 = A mean Z after thinking at stage K - 1, before that stage runs; y_2 = A [mean Z, r(y_1)] after thinking at stage K;
  y_3 = A [pooled x]; y_4 = A BN [pooled x, mean Z, r(y_2)], with r(y) = ReLU(BN(A y)): later classifiers reuse earlier answers.
- *loss* (:class:`DistilledExit`): sum_k w_k CE(y_k) + a sum_{k<K} T^2 KL(softmax(y_K / T) || softmax(y_k / T)), the last readout a constant
  in the second term; w = (1/2, 1/2, 1, 1), a = 1/2, T = 1.

*Source.* Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song and Huang, "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248.

*Departures.* Any number of stages from two (four in the paper); the exits hang on the last two of them. Hints are never narrower than 8
channels, which only matters below 64. Thresholds for budgets come from the room's calibration (shares q^k, no extra factors per exit).

*Cost.* For a map of C channels and P pixels reading costs 98 C P FLOPs (the depthwise convolution) and a hint about 4 C^2 P; tokens are
nearly free. Next to wide stages that is little, next to narrow ones it is not: ``policy.costs(x)`` tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.exits import EarlyExit, check_labels
from neurarium.dynamic.gates import Gate
from neurarium.dynamic.outcome import Staged
from neurarium.errors import BadInput

__all__ = ["CrossAttentionLayer", "DistilledExit", "DynPerceiver", "distilled_loss"]


class DynPerceiver(nn.Module):
    """A staged network with four readouts, made of the stages of a convolutional network; use it as ``EarlyExit(DynPerceiver(...))``.

    Args:
        stages: two or more modules, map to map, that run one after another. They are not copied.
        channels: of the map that enters each stage, and of the one that leaves the last: one more number than stages.
        num_classes: number of classes.
        stem: what comes before the first stage.
        latents: N, tokens at the first stage; half as many at each further one.
        latent_dim: D_1, ``channels[0]`` by default; D grows as the channels do, rounded up to a multiple of the heads.
        blocks: self-attention blocks at each stage; ``heads``: attention heads there (the last number holds for all further stages).
        mlp_ratio: hidden width of the self-attention blocks over D.
        pool: the tokens read a grid of pool x pool positions.
        out_pool: ``pooled x`` is a grid of out_pool x out_pool.
        x2z, z2x, reuse: switch off reading, hints, reuse of earlier answers. With none of the first two, readout 3 is the plain network.
    """

    n_stages = 4  # readouts
    weights = (0.5, 0.5, 1.0, 1.0)

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        *,
        num_classes: int,
        stem: nn.Module | None = None,
        latents: int = 32,
        latent_dim: int | None = None,
        blocks: Sequence[int] = (1, 1, 2, 1),
        heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 4,
        pool: int = 7,
        out_pool: int = 1,
        x2z: bool = True,
        z2x: bool = True,
        reuse: bool = True,
    ) -> None:
        super().__init__()
        depth = len(stages)
        if depth < 2:
            raise BadInput(f"Dyn-Perceiver needs at least 2 stages, not {depth}")
        if len(channels) != depth + 1:
            raise BadInput(f"{depth} stages need {depth + 1} channel counts (before each stage and after the last), not {len(channels)}")
        if not blocks or not heads:
            raise BadInput("blocks and heads need at least one number each")
        if (
            min(latents, pool, out_pool, num_classes, *channels, *heads) < 1
            or min(blocks) < 0
            or (latent_dim is not None and latent_dim < 1)
        ):
            raise BadInput("latents, latent_dim, pool, out_pool, num_classes, channels and heads must be positive, blocks not negative")
        blocks, heads = ([s[min(i, len(s) - 1)] for i in range(depth)] for s in (blocks, heads))
        first = channels[0] if latent_dim is None else latent_dim
        dims = [-(-first * c // (channels[0] * h)) * h for c, h in zip(channels, heads)]
        tokens = [max(1, latents >> i) for i in range(depth)]
        self.stem = nn.Identity() if stem is None else stem
        self.stages = nn.ModuleList(stages)
        self.latent = nn.Parameter(0.02 * torch.randn(1, tokens[0], dims[0]))
        self.read = nn.ModuleList(_Read(c, d, pool) if x2z else nn.Identity() for c, d in zip(channels, dims))
        self.think = nn.ModuleList(
            nn.Sequential(*(_Block(d, h, mlp_ratio) for _ in range(b))) for d, h, b in zip(dims, heads, blocks)
        )  # fmt: skip
        self.between = nn.ModuleList(_Between(*n, *d) for n, d in zip(pairwise(tokens), pairwise(dims)))
        asked = [*dims[1:], dims[-1]]  # the width of the tokens that answer: those of the next stage, at the end those of the last
        self.hint = nn.ModuleList(_Hint(c, d) if z2x else nn.Identity() for c, d in zip(channels[1:], asked))
        self.x2z, self.z2x = x2z, z2x
        pooled = channels[-1] * out_pool**2
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(out_pool), nn.Flatten())
        self.again = nn.ModuleList(_Reuse(num_classes, d) for d in (dims[-1], pooled)) if reuse else None
        extra = (dims[-1], pooled) if reuse else (0, 0)
        merged = pooled + dims[-1] + extra[1]
        self.heads = nn.ModuleList(
            [
                nn.Linear(dims[-2], num_classes),
                nn.Linear(dims[-1] + extra[0], num_classes),
                nn.Linear(pooled, num_classes),
                nn.Sequential(nn.BatchNorm1d(merged), nn.Linear(merged, num_classes)),
            ]
        )

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def stage(self, k: int, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """State: (map, tokens, last answer of the tokens)."""
        x, last = state[0], len(self.stages) - 1
        if k == 0:
            x = _pixels(self.stem(x))
            # A clone: torch's FLOP counter trips over a view of a parameter that goes into a submodule.
            z = self._look(0, x, self.latent.expand(x.shape[0], -1, -1).clone())
            for i in range(last - 1):
                x, z = self._advance(i, x, z)
            y = self.heads[0](z.mean(1))
            return (x, z, y), y
        z, y = state[1:]
        if k == 1:
            x, z = self._advance(last - 1, x, z)
            y = self.heads[1](self._with(0, y, [z.mean(1)]))
            return (x, z, y), y
        if k == 2:
            x = self._ask(last, self.stages[last](_pixels(x)), z)
            pooled = self.pool(x)
            return (pooled, z.mean(1), y), self.heads[2](pooled)
        return state, self.heads[3](self._with(1, y, [x, z]))

    def forward(self, x: Tensor) -> Tensor:
        """The last readout."""
        state = self.start(x)
        for k in range(self.n_stages):
            state, y = self.stage(k, state)
        return y

    def _advance(self, i: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Stage i on the map, hints between, then reading and thinking at stage i + 1."""
        z = self.between[i](z)
        x = self._ask(i, self.stages[i](_pixels(x)), z)
        return x, self._look(i + 1, x, z)

    def _look(self, i: int, x: Tensor, z: Tensor) -> Tensor:
        return self.think[i](self.read[i](z, x) if self.x2z else z)

    def _ask(self, i: int, x: Tensor, z: Tensor) -> Tensor:
        return self.hint[i](x, z) if self.z2x else x

    def _with(self, i: int, answer: Tensor, parts: list[Tensor]) -> Tensor:
        if self.again is not None:
            parts = [*parts, self.again[i](answer)]
        return torch.cat(parts, 1)


def _pixels(x: Tensor) -> Tensor:
    """Each pixel's channels side by side in memory: then a map is a list of tokens without a copy, and pooling is faster, too."""
    return x.contiguous(memory_format=torch.channels_last)


class CrossAttentionLayer(nn.Module):
    """q += CA(LN q, LN kv), then q += MLP(LN q), on ``(n, tokens, channels)``.

    Args:
        dim: channels of the queries, and of the result.
        source: channels of what is read.
        width: of queries, keys and values, all heads together; ``dim`` by default.
        positions: number of tokens that are read, for a learned bias on their keys; ``None``: no bias.
        mlp_ratio: hidden width of the MLP over ``dim``.
    """

    def __init__(
        self, dim: int, source: int, *, width: int | None = None, heads: int = 1, positions: int | None = None, mlp_ratio: float = 1
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        if width % heads:
            raise BadInput(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.norm_q, self.norm_kv = nn.LayerNorm(dim), nn.LayerNorm(source)
        self.q, self.v = nn.Linear(dim, width), nn.Linear(source, width)
        self.k = nn.Linear(source, width, bias=False)  # the softmax does not see a bias that all keys share
        self.bias = None if positions is None else nn.Parameter(torch.zeros(positions, width))
        self.out = nn.Linear(width, dim)
        self.mlp = _mlp(dim, mlp_ratio)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        kv = self.norm_kv(kv)
        keys = self.k(kv) if self.bias is None else self.k(kv) + self.bias
        q = q + self.out(_attend(self.q(self.norm_q(q)), keys, self.v(kv), self.heads))
        return q + self.mlp(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    # Written out: there are few tokens on one side, where torch's fused kernel is slower on CPUs.
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    share = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return (share @ v).transpose(1, 2).flatten(2)


def _mlp(dim: int, ratio: float) -> nn.Sequential:
    hidden = max(1, round(ratio * dim))
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class _Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.q, self.v, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)
        self.mlp = _mlp(dim, ratio)

    def forward(self, z: Tensor) -> Tensor:
        y = self.norm(z)
        z = z + self.out(_attend(self.q(y), self.k(y), self.v(y), self.heads))
        return z + self.mlp(z)


class _Read(nn.Module):
    """x -> z."""

    def __init__(self, channels: int, dim: int, pool: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.attend = CrossAttentionLayer(dim, channels, positions=pool * pool)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.attend(z, self.pool(self.local(x) + x).flatten(2).transpose(1, 2))


class _Hint(nn.Module):
    """z -> x."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.attend = CrossAttentionLayer(channels, dim, width=max(8, channels // 8))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        pixels = self.attend(x.flatten(2).transpose(1, 2), z)
        return pixels.transpose(1, 2).unflatten(2, x.shape[2:])


class _Between(nn.Module):
    """Fewer, wider tokens."""

    def __init__(self, tokens: int, fewer: int, dim: int, wider: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(dim), nn.Linear(tokens, fewer)
        self.expand = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, wider))

    def forward(self, z: Tensor) -> Tensor:
        return self.expand(self.mix(self.norm(z).transpose(1, 2)).transpose(1, 2))


class _Reuse(nn.Sequential):
    """r(y)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(nn.Linear(classes, width), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, y: Tensor) -> Tensor:
        if self.training and len(y) < 2:
            raise BadInput("batch normalisation needs at least 2 rows to train on; call eval() before deciding")
        return super().forward(y)


class DistilledExit(EarlyExit):
    """Early exits that also learn from the last one: :class:`~neurarium.dynamic.exits.EarlyExit` with :func:`distilled_loss`.

    Args:
        staged, gate, threshold, frozen: as there.
        weights: w, one a readout; those that the network names (``staged.weights``) by default, else 1.
        distil: a. ``temperature``: T.
    """

    def __init__(
        self,
        staged: Staged,
        gate: Gate | None = None,
        *,
        weights: Sequence[float] | None = None,
        distil: float = 0.5,
        temperature: float = 1.0,
        threshold: float = 0.9,
        frozen: bool = False,
    ) -> None:
        n = getattr(staged, "n_stages", 1)
        named = getattr(staged, "weights", (1.0,) * n) if weights is None else weights
        if len(named) != n or min(named) < 0:
            raise BadInput(f"{n} readouts need as many weights of at least 0, not {tuple(named)}")
        if distil < 0 or temperature <= 0:
            raise BadInput(f"distil must be at least 0 and temperature positive, not {distil} and {temperature}")
        super().__init__(staged, gate, threshold=threshold, frozen=frozen)
        self.weights, self.distil, self.temperature = tuple(named), distil, temperature

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        del step
        readouts = self.outputs(x)
        check_labels(y, readouts[-1])
        return distilled_loss(readouts, y, self.weights, self.distil, self.temperature)


def distilled_loss(
    readouts: Sequence[Tensor], y: Tensor, weights: Sequence[float], distil: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """sum_k w_k CE(y_k) + a sum_{k<K} T^2 KL(p_K || p_k), p at temperature T and p_K a constant."""
    losses = [w * F.cross_entropy(out, y) for w, out in zip(weights, readouts)]
    if distil:
        teacher = (readouts[-1].detach() / temperature).softmax(1)
        for out in readouts[:-1]:
            student = (out / temperature).log_softmax(1)
            losses.append(distil * temperature**2 * F.kl_div(student, teacher, reduction="batchmean"))
    return torch.stack(losses).sum()
