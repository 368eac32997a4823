"""HoT and H2OT: a transformer over many frames whose deep blocks see a few of them, and whose output has all of them again.

Frames of a video resemble each other, yet a pose transformer carries a token for each through all of its blocks. Here blocks hand on only
the tokens of representative frames: once (HoT), or fewer and fewer (H2OT, a pyramid). At the end every frame gets its answer back.

*Choosing frames* (all keep the order of time), t_f the token of frame f, the mean over its joints where each has one:

- ``"cluster"`` (density peaks on nearest neighbours): d_ij = |t_i - t_j| / sqrt(C), density rho_i = exp(-mean of the k smallest d_ij^2),
  delta_i = the distance to the nearest frame that is denser (for the densest the greatest distance of all); the frames of largest
  rho_i delta_i stay, as they are: cluster centres, no averages.
- ``"uniform"``: equally spaced, first and last included. ``"motion"``: the first, and those with the largest |t_f - t_{f-1}|.
  ``"attention"``: those that receive most attention in the block before. ``"random"``: drawn anew at every call (a baseline).

A learned code for each place among those kept is added after each cut.

*Recovering frames*: ``"attention"``: y = Q + MHA(Q, kept, kept) with a learned query for each frame, then the head on y.
``"interpolate"``: the head on the kept tokens, its output linear in between at the frames' true times, constant beyond the outermost ones.
``"nearest"``: the output of the nearest kept frame. ``"none"``: the head reads what is kept (it pools, or only wants a frame that is
always kept).

*Source.* Li et al., "Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation", CVPR 2024, arXiv 2311.12028 (one cut,
cluster, attention); Li et al., "H2OT: Hierarchical Hourglass Tokenizer for Efficient Video Pose Transformers", arXiv 2509.06956 (several
cuts, uniform, interpolation).

*Departures.* Queries start as the host's code of time (zero where it shows none), and the recovering attention's matrices as the identity:
the head at first reads an average of kept tokens as they are, with a mark of its frame, and the attention has to learn which kept frames
are near. Queries of zero and random matrices erred about twice as much in a short training. The k smallest d_ij include the frame
itself, as in the first authors' code; two frames that are each other's nearest then have equal densities at k = 2, and such ties are
broken by a fixed sequence, so that results repeat. The scores of ``"attention"`` and ``"motion"`` and the codes of the places after the
first cut are reconstructed.

*Cost.* The blocks after a cut to m of F frames cost about m / F. Clustering takes 2 F^2 C FLOPs, recovering by attention 4 (F + m) C^2 +
4 F m C, interpolation a few operations an output; all but the last are in the count of a FLOP counter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Cut", "TokenRecoveringAttention", "dpc_knn", "hourglass", "interpolate", "kept_frames", "prune_tokens"]

Prune = Literal["cluster", "uniform", "motion", "attention", "random"]
Recover = Literal["attention", "interpolate", "nearest", "none"]


def hourglass(
    vpt: nn.Module,
    *,
    keep: int | Sequence[int],
    at: int | Sequence[int],
    prune: Prune = "cluster",
    recover: Recover = "attention",
    k: int = 2,
    heads: int | None = None,
    always: Sequence[int] = (),
    example: Any = None,
) -> nn.Module:
    """A copy of a video pose transformer that thins out its frames on the way and answers for all of them.

    The host, :class:`~neurarium.dynamic.pose.VideoPoseTransformer` or your own, has

    - ``blocks``: an ``nn.ModuleList`` (or Sequential) that it runs in order on tokens ``(n, frames, dim)`` or ``(n, frames, joints, dim)``;
    - ``head``: a module that takes the tokens last and treats frames alone, e.g. LayerNorm and Linear;
    - ``frames``: how many there are;
    - ``temporal_position`` (optional): the code of time, ``(..., frames, dim)``, for the queries of ``recover="attention"``;
    - for ``prune="attention"``, in each block, a module with Linear layers ``q`` and ``k`` and a number ``heads`` (of several, the last).

    Args:
        keep: frames kept; a list, strictly decreasing, is a pyramid.
        at: after how many blocks each cut is made, strictly increasing; 0 is before the first.
        prune, recover: see the module.
        k: neighbours that make a density.
        heads: of the recovering attention; 4 if that divides the width.
        always: frames that every cut keeps (in pipelines that want one frame: its number).
        example: an input to try the result on, so that a host of another kind is refused here and not at its first batch.

    Raises:
        BadInput: counts that do not decrease, places that do not increase, more frames than there are.
        UnsupportedModel: a host without one of the parts above; names it.
    """
    if recover not in get_args(Recover):
        raise BadInput(f"recover must be one of {', '.join(get_args(Recover))}, not {recover!r}")
    frames = getattr(vpt, "frames", None)
    if not isinstance(frames, int):
        raise UnsupportedModel("has no number `frames`, the frames of its input", module=type(vpt).__name__)
    if not isinstance(getattr(vpt, "head", None), nn.Module):
        raise UnsupportedModel("has no module `head` that makes the output of the tokens", module=type(vpt).__name__)
    dim = _width(vpt.head)
    host, route = _cut(vpt, keep, at, prune, k, always, frames, dim)
    if recover != "none":
        like = next(vpt.head.parameters())
        attention = None
        if recover == "attention":
            heads = math.gcd(dim, 4) if heads is None else heads
            if heads < 1 or dim % heads:
                raise BadInput(f"heads must divide the tokens' width {dim}, not be {heads}")
            with torch.random.fork_rng(devices=[]):  # layers draw weights, though none of them is kept
                attention = TokenRecoveringAttention(frames, dim, heads, _code(vpt, frames, dim)).to(like)
        host.head = _Recovered(host.head, route, frames, recover, attention)
    return _tried(vpt, host, example)


def prune_tokens(
    model: nn.Module, *, keep: int | Sequence[int], at: int | Sequence[int], prune: Prune = "cluster", k: int = 2,
    always: Sequence[int] = (), example: Any = None,
) -> nn.Module:  # fmt: skip
    """A copy of a transformer whose later ``blocks`` see ``keep`` of its tokens: for image classifiers, whose head pools over any number.

    :class:`~neurarium.dynamic.backbones.VisionTransformerS`, or your own with ``blocks`` on tokens ``(n, tokens, dim)``. A class token is
    kept by ``always=[0]``. Adds no parameter. Arguments as in :func:`hourglass`.
    """
    host, _ = _cut(model, keep, at, prune, k, always, None, None)
    return _tried(model, host, example)


@torch.no_grad()
def kept_frames(model: nn.Module, x: Any) -> Tensor:
    """The numbers of the frames that reach the head, ``(n, m)``, rising; of a result of :func:`hourglass` or :func:`prune_tokens`."""
    cuts = [m for m in model.modules() if isinstance(m, Cut)]
    if not cuts:
        raise BadInput("the model is no result of hourglass or prune_tokens: nothing in it makes a cut")
    seen: list[Tensor] = []
    hook = cuts[-1].register_forward_hook(lambda cut, _, __: seen.append(cut.route.index.clone()))
    try:
        model(x)
    finally:
        hook.remove()
        cuts[-1].route.index = None
    return seen[0]


def dpc_knn(x: Tensor, n: int, k: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """The n cluster centres of each row's tokens, ``(rows, tokens, C) -> (rows, n)``, rising.

    Args:
        k: neighbours that make a density, the token itself among them.
        generator: draws what breaks ties between densities; a fixed sequence without it.
    """
    if x.ndim != 3 or not 1 <= n <= x.shape[1] or k < 1:
        raise BadInput(f"expected tokens (rows, tokens, C), 1 <= n <= tokens and k >= 1; got {tuple(x.shape)}, n = {n}, k = {k}")
    if not torch.isfinite(x).all():
        raise BadInput("tokens that are not finite have no distances")
    tie = None if generator is None else torch.rand(x.shape[1], generator=generator).to(x)
    return _largest(_peaks(x, k, tie), n)


def interpolate(values: Tensor, index: Tensor, frames: int) -> Tensor:
    """Values at the frames ``index``, linearly in between and constant beyond: ``(n, m, ...), (n, m) rising -> (n, frames, ...)``."""
    right, weight = _neighbours(index, frames)
    low, high = _at(values, (right - 1).clamp(min=0)), _at(values, right)
    return torch.lerp(low, high, weight.view(*weight.shape, *[1] * (values.ndim - 2)).to(values))


class TokenRecoveringAttention(nn.Module):
    """``(n, m, [joints,] dim) -> (n, frames, [joints,] dim)``: a learned query for each frame asks the kept tokens, Q + MHA(Q, x, x)."""

    def __init__(self, frames: int, dim: int, heads: int = 4, queries: Tensor | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.zeros(frames, dim) if queries is None else queries.detach().clone())
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        with torch.no_grad():
            for layer in (self.q, self.k, self.v, self.out):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2).flatten(0, 1) if x.ndim == 4 else x  # each joint asks its own tokens
        queries = self.queries.expand(len(tokens), -1, -1)
        asked = F.linear(queries, self.q.weight, self.q.bias)  # for each row: what rows share has no price of its own
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (asked, self.k(tokens), self.v(tokens)))
        y = queries + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y.unflatten(0, (-1, x.shape[2])).transpose(1, 2) if x.ndim == 4 else y


class _Route:
    """Which frames are still on the way: written by the cuts of one forward pass, read by its head."""

    index: Tensor | None = None  # (n, m)
    frames: int = 0  # how many there were
    attended: tuple[Tensor, Tensor] | None = None  # the queries and keys of the block before a cut

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Cut(nn.Module):
    """A block, and the choice of ``keep`` tokens after it (or before it). Replaces the block in its host."""

    def __init__(
        self, block: nn.Module, route: _Route, keeps: tuple[int, ...], prune: Prune, k: int, always: tuple[int, ...], frames: int | None,
        name: str, *, before: bool = False, slots: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.block, self.route, self.keeps, self.prune, self.k, self.always = block, route, keeps, prune, k, always  # the last keep is mine
        self.frames, self.name, self.before = frames, name, before  # frames: that arrive here, if known
        self.slots = None if slots is None else nn.Parameter(slots)
        if prune == "attention":
            attention = _attention(block, name)
            self.attention_heads = attention.heads
            attention.q, attention.k = _Tap(attention.q, route, 0), _Tap(attention.k, route, 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(self.keeps) == 1:
            self.route.index, self.route.frames = None, x.shape[1]
        if self.before:
            return self.block(self._choose(x), *args, **kwargs)
        out = self.block(x, *args, **kwargs)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise UnsupportedModel("does not map tokens to tokens of the same shape", module=self.name)
        return self._choose(out)

    def _choose(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or self.frames not in (None, x.shape[1]):
            wanted = "tokens" if self.frames is None else str(self.frames)
            raise UnsupportedModel(f"works on {tuple(x.shape)}, not on (n, {wanted}, [joints,] dim)", module=self.name)
        if self.keeps[-1] > x.shape[1]:
            raise BadInput(f"{self.name}: {self.keeps[-1]} tokens cannot be kept of {x.shape[1]}")
        index = self._index(x)  # (n, keep)
        before = self.route.index
        self.route.index = index if before is None else before.gather(1, index)
        kept = _at(x, index)
        if self.slots is not None:
            kept = kept + (self.slots if x.ndim == 3 else self.slots[:, None])
        return kept

    @torch.no_grad()
    def _index(self, x: Tensor) -> Tensor:
        n, tokens = x.shape[:2]
        if self.prune == "uniform":
            return torch.tensor(_uniform(self.route.frames, self.keeps, self.always), device=x.device).expand(n, -1)
        pooled = x if x.ndim == 3 else x.mean(2)
        if self.prune == "cluster":
            score = _peaks(pooled, self.k)
        elif self.prune == "motion":
            score = F.pad(pooled.diff(dim=1).norm(dim=-1), (1, 0), value=torch.inf)
        elif self.prune == "attention":
            score = self._received(n)
        else:
            score = torch.rand(n, tokens, device=x.device)
        for frame in self.always:
            present = torch.arange(tokens, device=x.device) if self.route.index is None else self.route.index
            score = score.masked_fill(present == frame, torch.inf)
        return _largest(score, self.keeps[-1])

    def _received(self, n: int) -> Tensor:
        assert self.route.attended is not None
        q, k = (t.unflatten(-1, (self.attention_heads, -1)).transpose(-3, -2) for t in self.route.attended)
        self.route.attended = None
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return weights.sum(-2).view(n, -1, k.shape[-2]).mean(1)  # over queries; then over heads, and joints


class _Tap(nn.Module):
    """A layer whose output the route remembers until the cut after its block."""

    def __init__(self, layer: nn.Module, route: _Route, place: int) -> None:
        super().__init__()
        self.layer, self.route, self.place = layer, route, place

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        held = out.detach()
        self.route.attended = (held, held) if self.place == 0 or self.route.attended is None else (self.route.attended[0], held)
        return out


class _Recovered(nn.Module):
    """A head whose output has every frame again."""

    def __init__(self, head: nn.Module, route: _Route, frames: int, recover: Recover, attention: nn.Module | None) -> None:
        super().__init__()
        self.head, self.route, self.frames, self.recover, self.attention = head, route, frames, recover, attention

    def forward(self, x: Tensor) -> Tensor:
        index, self.route.index = self.route.index, None
        if index is None:
            raise UnsupportedModel("is run before the last cut", module="head")
        if self.attention is not None:
            return self.head(self.attention(x))
        out = self.head(x)
        if out.shape[:2] != index.shape:
            raise UnsupportedModel(f"makes {tuple(out.shape)} of {tuple(x.shape)}: it must treat frames alone", module="head")
        if self.recover == "interpolate":
            return interpolate(out, index, self.frames)
        right, weight = _neighbours(index, self.frames)
        nearest = torch.where(weight > 0.5, right, (right - 1).clamp(min=0))
        return _at(out, nearest)


def _cut(
    model: nn.Module, keep: int | Sequence[int], at: int | Sequence[int], prune: str, k: int, always: Sequence[int], frames: int | None,
    dim: int | None,
) -> tuple[nn.Module, _Route]:  # fmt: skip
    """A copy of ``model`` whose blocks are followed by cuts."""
    keeps, places = ([v] if isinstance(v, int) else list(v) for v in (keep, at))
    if prune not in get_args(Prune):
        raise BadInput(f"prune must be one of {', '.join(get_args(Prune))}, not {prune!r}")
    if not keeps or len(keeps) != len(places):
        raise BadInput(f"keep and at need one number a cut; got {keeps} and {places}")
    if any(a <= b for a, b in pairwise(keeps)) or any(a >= b for a, b in pairwise(places)):
        raise BadInput(f"keep must strictly decrease and at strictly increase; got {keeps} and {places}")
    kept = tuple(dict.fromkeys(always))
    if keeps[-1] < max(1, len(kept)) or k < 1 or (frames is not None and keeps[0] > frames):
        raise BadInput(f"keep goes from {max(1, len(kept))} to the number of frames, {frames or 'any'}, k from 1; got {keeps}, {k}")
    if any(not 0 <= f < (frames or f + 1) for f in kept):
        raise BadInput(f"always names frames from 0 on, got {kept}")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise UnsupportedModel("has no nn.ModuleList `blocks`", module=type(model).__name__)
    if places[0] < 0 or places[-1] > len(blocks):
        raise BadInput(f"at counts the {len(blocks)} blocks before a cut, 0 to {len(blocks)}; got {places}")
    if places[0] == 0 and (prune == "attention" or places[1:2] == [1]):
        raise BadInput("before the first block there is no attention to judge by, and only one cut beside it: pass other places in at")
    if any(isinstance(b, Cut) for b in blocks):
        raise UnsupportedModel("is cut already: give all cuts in one call", module="blocks")
    host, route = copy.deepcopy(model), _Route()
    like = next(model.parameters(), torch.empty(0))
    for i, (m, place) in enumerate(zip(keeps, places)):
        block = max(place - 1, 0)
        slots = None if dim is None else torch.zeros(m, dim, dtype=like.dtype, device=like.device)
        host.blocks[block] = Cut(
            host.blocks[block], route, tuple(keeps[: i + 1]), prune, k, kept,  # type: ignore[arg-type]
            frames if i == 0 else keeps[i - 1], f"blocks.{block}", before=place == 0, slots=slots,
        )  # fmt: skip
    return host, route


def _tried(model: nn.Module, result: nn.Module, example: Any) -> nn.Module:
    """The result, its new parts in the mode of the model; run once on ``example`` if there is one."""
    for part in result.modules():
        if isinstance(part, (Cut, _Tap, _Recovered, TokenRecoveringAttention)):
            part.training = model.training
    if example is not None:
        trial = copy.deepcopy(result).eval()
        with torch.no_grad():
            want = copy.deepcopy(model).eval()(example)
            try:
                got = trial(example)
            except RuntimeError as error:
                raise UnsupportedModel(f"does not run with fewer tokens: {error}", module=type(model).__name__) from error
        if got.shape != want.shape:
            raise UnsupportedModel(f"answers {tuple(got.shape)} instead of {tuple(want.shape)}", module=type(model).__name__)
    return result


def _width(head: nn.Module) -> int:
    for part in head.modules():
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[-1]
        if isinstance(part, nn.Linear):
            return part.in_features
    raise UnsupportedModel("has no LayerNorm or Linear layer that would tell the tokens' width", module="head")


def _code(model: nn.Module, frames: int, dim: int) -> Tensor | None:
    code = getattr(model, "temporal_position", None)
    return code.detach().view(frames, dim) if isinstance(code, Tensor) and code.numel() == frames * dim else None


def _attention(block: nn.Module, name: str) -> Any:
    found = [m for m in block.modules() if all(isinstance(getattr(m, p, None), nn.Linear) for p in "qk") and hasattr(m, "heads")]
    if not found:
        raise UnsupportedModel("has no attention with Linear layers `q` and `k` and a number `heads`: no weights to see", module=name)
    return found[-1]


def _peaks(x: Tensor, k: int, tie: Tensor | None = None) -> Tensor:
    """rho delta of each token, ``(rows, tokens, C) -> (rows, tokens)``."""
    x = (x if x.dtype == torch.float64 else x.float()) / x.shape[-1] ** 0.5
    x = x - x.mean(1, keepdim=True)  # distances stay, and cancel less
    square = x.square().sum(-1)
    d2 = (square[:, :, None] + square[:, None] - 2 * x @ x.transpose(1, 2)).clamp(min=0)
    d2 = d2.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0)
    if tie is None:
        tie = torch.arange(x.shape[1], device=x.device).to(x) * 0.6180339887 % 1
    density = (-d2.topk(min(k, x.shape[1]), largest=False).values.mean(-1)).exp() + 1e-6 * tie
    distance, denser = d2.sqrt(), density[:, None] > density[:, :, None]
    delta = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(2)
    return density * delta


def _at(values: Tensor, index: Tensor) -> Tensor:
    """The frames of each row that ``index`` names: ``(n, frames, ...), (n, m) -> (n, m, ...)``."""
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))


def _largest(score: Tensor, n: int) -> Tensor:
    """The places of the n largest of each row, rising."""
    return score.topk(n, dim=1).indices.sort(1).values


@lru_cache(maxsize=256)
def _uniform(frames: int, keeps: tuple[int, ...], always: tuple[int, ...]) -> list[int]:
    """Where, among what the cut before left, the frames are that the last of these cuts keeps."""
    present, chosen = list(range(frames)), list[int]()
    for m in keeps:
        forced = [i for i, f in enumerate(present) if f in always]
        free = [i for i, f in enumerate(present) if f not in always]
        rest = m - len(forced)
        spaced = [len(free) // 2] if rest == 1 else [(2 * i * (len(free) - 1) + rest - 1) // (2 * (rest - 1)) for i in range(rest)]
        chosen = sorted(forced + [free[i] for i in spaced])
        present = [present[i] for i in chosen]
    return chosen


def _neighbours(index: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """For each frame the place of the first kept one not before it (or of the last), and how far it is towards that, in [0, 1]."""
    frame = torch.arange(frames, device=index.device)
    right = (index[:, None] < frame[:, None]).sum(2).clamp(max=index.shape[1] - 1)  # (n, frames)
    low, high = index.gather(1, (right - 1).clamp(min=0)), index.gather(1, right)
    return right, ((frame - low) / (high - low).clamp(min=1)).clamp(0, 1)
