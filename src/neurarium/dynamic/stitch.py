"""SN-Net: trained networks of several sizes, stitched together into dozens of networks between them.

The first blocks of a small network and the last blocks of a larger one make a network of a size between the two, if something translates
the features of the one into those of the other. A linear map does, and least squares on a few images finds it. After a short training of
everything together one set of weights holds all anchors and all stitched networks, and changing between them is picking another index.

*Anchors* A_1, A_2, ... in order of cost, each a stem, blocks 0..L-1 and a tail (norm and classifier). The stitch (a, b) from A_i to A_j
runs the stem and the blocks 0..a of A_i, a map T, the blocks b..L-1 of A_j and its tail.

- *where*: a window of ``kernel`` positions slides over the blocks with ``stride``; all pairs (a, b) in it are stitches. A pair belongs to
  the first window that contains it, and all pairs of a window share one T. With windows of 2 and equal depth L these are 3L - 2 stitches
  for two anchors. Networks of unequal depth meet at equal shares of their depths.
- *which*: neighbours in size only (``nearest``), from the small to the large one (``fast_to_slow``).
- *T*: linear with bias, a 1x1 convolution for feature maps. It starts as the mean over the window's pairs of the least-squares solution of
  X_a T = X_b, where the rows of X_a are the tokens (or pixels) that leave block a of A_i, and those of X_b what block b of A_j is given.
- *training*: each step draws one configuration uniformly, anchors included, and trains all of it; with a ``teacher`` half of the loss is
  the cross-entropy to the teacher's answer.

*Source.* Pan, Cai and Zhuang, "Stitchable Neural Networks", arXiv 2302.06586, sections 3.2 to 3.4; pairs in a window as in their code.

*Departures.* One stitch a network; paths over three anchors are left out, as in the paper's default. What block 0 is given is the stem's
output. Batch normalisation keeps one set of running statistics for all configurations that share it.

*Cost.* The weights of the anchors and the T's. A configuration costs its blocks and its T; nothing is copied to change it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.exits import ExitChain, check_labels
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.tree import has_nan, parameter_shapes, rows, shapes
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import as_chain
from neurarium.learn.fit import device_of

__all__ = ["Anchor", "SNNet", "Stitch", "Stitched", "anchor", "least_squares", "stitch"]


class Anchor(nn.Module):
    """A network as stem, blocks and tail. Cuts are between blocks; each part takes and gives one tensor."""

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], tail: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(blocks), tail
        if not len(self.blocks):
            raise BadInput("an anchor needs at least one block between its stem and its tail")

    def features(self, x: Tensor) -> list[Tensor]:
        """What block 0 is given, and what each block puts out."""
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x)[-1])


def anchor(model: nn.Module, example: Tensor) -> Anchor:
    """A trainable copy of ``model`` as an anchor.

    A model with ``blocks`` is cut there, and what its other children do before and after them is stem and tail; of any other chain of
    modules the first is the stem and the last the tail. The cut is proven on ``example``.

    Raises:
        UnsupportedModel: the model is not such a chain.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    if isinstance(model, Anchor):
        return model
    if isinstance(model, ExitChain):  # its early heads have no part in the plain model
        parts = [*model.segments, model.heads[-1]]
        return Anchor(parts[0], parts[1:-1], parts[-1])
    inner = getattr(model, "blocks", None)
    names = [name for name, _ in model.named_children()]
    if isinstance(inner, (nn.Sequential, nn.ModuleList)) and {names[0], names[-1]}.isdisjoint({"blocks"}):
        where = names.index("blocks")
        groups = [names[:where], *(f"blocks.{i}" for i in range(len(inner))), names[where + 1 :]]
        parts = [*as_chain(model, example, groups).blocks]
    else:
        parts = [*as_chain(model, example).blocks]
    if len(parts) < 3:
        raise UnsupportedModel(f"is a chain of {len(parts)} parts; an anchor needs a stem, blocks and a tail", module=type(model).__name__)
    return Anchor(parts[0], parts[1:-1], parts[-1])


@dataclass(frozen=True)
class Stitch:
    """Blocks 0..``last`` of anchor ``front``, then the map ``layer``, then the blocks from ``first`` on of anchor ``back``.

    An anchor by itself has ``back = None``.
    """

    front: int
    last: int
    back: int | None = None
    first: int = 0
    layer: str = ""


class Stitched(nn.Module):
    """The family: anchors, the maps between them, and ``configs`` sorted by measured cost. :func:`stitch` makes one."""

    configs: tuple[Stitch, ...]

    def __init__(self, anchors: Sequence[Anchor], example: Tensor, stitches: Iterable[Stitch]) -> None:
        super().__init__()
        self.anchors, self.maps = nn.ModuleList(anchors), nn.ModuleDict()
        with evaluating(self), torch.no_grad():
            features = [a.features(example) for a in anchors]
        configs = [Stitch(i, len(a.blocks) - 1) for i, a in enumerate(anchors)]
        for s in stitches:
            given, wanted = features[s.front][s.last + 1], features[s.back][s.first]  # type: ignore[index]
            if _places(given) != _places(wanted):
                continue  # a linear map changes channels, not the number of tokens or pixels
            if s.layer not in self.maps:
                self.maps[s.layer] = _translator(given, wanted)
            fits = self.maps[s.layer]
            if (_channels(given), _channels(wanted)) != (fits.weight.shape[1], fits.weight.shape[0]):
                alone = f"{s.layer}_{s.last}_{s.first}"  # other widths than the rest of its window
                self.maps[alone] = _translator(given, wanted)
                s = replace(s, layer=alone)
            configs.append(s)
        prices = self.prices(example, configs)
        self.configs = tuple(configs[i] for i in sorted(range(len(configs)), key=lambda i: prices[i]))

    def prices(self, example: Any, configs: Sequence[Stitch]) -> list[int]:
        """FLOPs a row of each configuration: the sum over its blocks and its map, each measured once."""
        with evaluating(self), torch.no_grad():
            parts = [CostTable.measure([a.stem, *a.blocks, a.tail], example) for a in self.anchors]
            features = [a.features(example[:1]) for a in self.anchors]
            maps = {(c.layer, c.last): c for c in configs if c.back is not None}
            between = {key: CostTable.measure([self.maps[c.layer]], features[c.front][c.last + 1]).full for key, c in maps.items()}
        result = []
        for c in configs:
            if c.back is None:
                result.append(parts[c.front].full)
            else:
                result.append(parts[c.front].total[c.last + 1] + between[c.layer, c.last] + sum(parts[c.back].steps[c.first + 1 :]))
        return result

    def run(self, x: Tensor, config: Stitch) -> Tensor:
        front = self.anchors[config.front]
        h = front.stem(x)
        for block in front.blocks[: config.last + 1]:
            h = block(h)
        return self.finish(h, config)

    def finish(self, h: Tensor, config: Stitch) -> Tensor:
        """The output, from what the front's last block put out."""
        if config.back is None:
            return self.anchors[config.front].tail(h)
        back, h = self.anchors[config.back], self.maps[config.layer](h)
        for block in back.blocks[config.first :]:
            h = block(h)
        return back.tail(h)

    def extract(self, config: Stitch) -> nn.Module:
        front = self.anchors[config.front]
        parts = [front.stem, *front.blocks[: config.last + 1]]
        if config.back is None:
            return copy.deepcopy(nn.Sequential(*parts, front.tail))
        back = self.anchors[config.back]
        return copy.deepcopy(nn.Sequential(*parts, self.maps[config.layer], *back.blocks[config.first :], back.tail))


def stitch(
    anchors: Sequence[nn.Module],
    example: Tensor,
    *,
    kernel: int = 2,
    stride: int = 1,
    nearest: bool = True,
    fast_to_slow: bool = True,
    shared: bool = True,
    teacher: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> SNNet:
    """Stitch copies of trained networks; call :meth:`SNNet.init_stitches` next.

    Args:
        anchors: at least two networks from the cheapest to the dearest that answer the same question, see :func:`anchor`.
        example: a batch that all of them take.
        kernel, stride: of the window whose pairs of positions are stitched, in blocks.
        nearest: only between neighbours in size.
        fast_to_slow: from the smaller network to the larger one.
        shared: one map for a window; otherwise one for each pair of positions.

    Raises:
        UnsupportedModel: a model is not a chain, or two anchors have no place where they agree in the number of tokens (pixels).
    """
    if len(anchors) < 2:
        raise BadInput(f"stitching needs at least two anchors, not {len(anchors)}")
    if kernel < 1 or stride < 1:
        raise BadInput(f"kernel and stride must be at least 1, not {kernel} and {stride}")
    if has_nan(example):
        raise BadInput("the example has NaN")
    parts = [anchor(model, example) for model in anchors]
    prices, kinds = [], set()
    for part in parts:
        with evaluating(part), torch.no_grad():
            kinds.add(tuple(part(example).shape[1:]))
            prices.append(CostTable.measure([part], example).full)
    if len(kinds) > 1:
        raise BadInput(f"the anchors' outputs have different shapes: {sorted(kinds)}")
    if prices != sorted(prices):
        raise BadInput(f"anchors go from the cheapest to the dearest, these cost {prices} FLOPs a row")
    stitches = []
    for i in range(len(parts)):
        for j in [i + 1] if nearest else range(i + 1, len(parts)):
            if j < len(parts):
                front, back = (i, j) if fast_to_slow else (j, i)
                depths = len(parts[front].blocks), len(parts[back].blocks)
                for window, pairs in enumerate(windows(*depths, kernel, stride)):
                    for a, b in pairs:
                        layer = f"{front}_{back}_{window}" if shared else f"{front}_{back}_{a}_{b}"
                        stitches.append(Stitch(front, a, back, b, layer))
    family = Stitched(parts, example, stitches)
    for i in range(len(parts) - 1):
        if not any({c.front, c.back} == {i, i + 1} for c in family.configs):
            sizes = [sorted({_places(f) for f in p.features(example)}) for p in (parts[i], parts[i + 1])]
            raise UnsupportedModel(f"and anchor {i + 1} nowhere agree in the number of tokens or pixels: {sizes}", module=f"anchor {i}")
    return SNNet(family, teacher=teacher, seed=seed).train(anchors[0].training)


def windows(front: int, back: int, kernel: int = 2, stride: int = 1) -> list[list[tuple[int, int]]]:
    """The pairs (a, b) of each window that no window before it contains, for networks of these depths."""
    longest = max(front, back)
    seen: set[tuple[int, int]] = set()
    result = []
    for start in range(0, max(1, longest - kernel + 1), stride):
        inside = range(start, min(start + kernel, longest))
        pairs = dict.fromkeys((p * front // longest, q * back // longest) for p in inside for q in inside)
        result.append([pair for pair in pairs if pair not in seen])
        seen.update(pairs)
    return [pairs for pairs in result if pairs]


class SNNet(FamilyPolicy):
    """Anchors and stitched networks as one policy; ``configs`` are :class:`Stitch` in order of cost.

    Args:
        teacher: gives the logits to learn from; any callable, its weights are not part of the policy.
        seed: of the configurations that training draws.
    """

    def __init__(self, family: Stitched, *, teacher: Callable[[Tensor], Tensor] | None = None, seed: int = 0) -> None:
        super().__init__(family)
        self.teacher, self.seed = (teacher,), seed  # in a tuple: not a submodule

    @property
    def anchors(self) -> tuple[int, ...]:
        """The indices of the configurations that are anchors by themselves."""
        return tuple(i for i, c in enumerate(self.configs) if c.back is None)

    def prices(self, example: Any) -> Tensor:
        if rows(example) == 0:
            raise BadInput("an empty batch has no cost: pass at least one row")
        key = shapes(example), parameter_shapes(self)
        if key not in self._prices:
            self._prices[key] = tuple(self.family.prices(example, self.configs))
        return torch.tensor(self._prices[key], dtype=torch.int64)

    @torch.no_grad()
    def init_stitches(self, x: Tensor, ridge: float = 0.0) -> SNNet:
        """Set every map by least squares on the features of ``x`` (about 100 inputs). ``ridge`` shrinks the weights, not the bias."""
        if len(x) == 0 or has_nan(x):
            raise BadInput("least squares needs at least one input, and no NaN")
        with evaluating(self):
            features = [[_table(f) for f in a.features(x.to(device_of(self)))] for a in self.family.anchors]
        solved: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for c in self.configs:
            if c.back is not None:
                given, wanted = features[c.front][c.last + 1], features[c.back][c.first]
                solved.setdefault(c.layer, []).append(least_squares(given, wanted, ridge))
        for layer, solutions in solved.items():
            weight, bias = (torch.stack(parts).mean(0) for parts in zip(*solutions))
            self.family.maps[layer].weight.copy_(weight.view_as(self.family.maps[layer].weight))
            self.family.maps[layer].bias.copy_(bias)
        return self

    def drawn(self, step: int) -> int:
        """The configuration that step ``step`` trains."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        return int(torch.randint(len(self.configs), (), generator=generator))

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        logits = self.family.run(x, self.configs[self.drawn(step)])
        check_labels(y, logits)
        loss = F.cross_entropy(logits, y)
        if self.teacher[0] is None:
            return loss
        with torch.no_grad():
            answer = self.teacher[0](x).argmax(-1)
        return (loss + F.cross_entropy(logits, answer)) / 2

    def outputs(self, x: Any) -> list[Tensor]:
        """Of every configuration; those with the same front share its work."""
        features = [a.features(x) for a in self.family.anchors]
        return [self.family.finish(features[c.front][c.last + 1], c) for c in self.configs]


def least_squares(given: Tensor, wanted: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in)`` and bias ``(out,)`` of the linear map from rows ``given`` to rows ``wanted``, of least norm where many fit.

    ``ridge`` > 0 adds ridge * rows * |weight|^2 to the squared error. Solved in float64 by singular values, since features are often
    rank-deficient.
    """
    n, width = given.shape
    x = torch.cat([given.double().cpu(), torch.ones(n, 1, dtype=torch.float64)], 1)
    y = wanted.double().cpu()
    if ridge:
        penalty = (ridge * n) ** 0.5 * torch.eye(width, width + 1, dtype=torch.float64)
        x, y = torch.cat([x, penalty]), torch.cat([y, y.new_zeros(width, y.shape[1])])
    solution = torch.linalg.lstsq(x, y, driver="gelsd").solution
    return solution[:-1].T.to(given), solution[-1].to(given)


def _channels(feature: Tensor) -> int:
    return feature.shape[1] if feature.ndim == 4 else feature.shape[-1]


def _places(feature: Tensor) -> tuple[int, ...]:
    """The shape of one row without its channels."""
    (shape,) = shapes(feature)
    return shape[1:] if feature.ndim == 4 else shape[:-1]


def _table(feature: Tensor) -> Tensor:
    """One row for each token or pixel, ``(rows, channels)``."""
    return (feature.movedim(1, -1) if feature.ndim == 4 else feature).flatten(0, -2)


def _translator(given: Tensor, wanted: Tensor) -> nn.Module:
    if given.ndim != wanted.ndim or given.ndim not in (2, 3, 4):
        raise BadInput(f"no stitch between features of shapes {tuple(given.shape)} and {tuple(wanted.shape)}")
    kind = partial(nn.Conv2d, kernel_size=1) if given.ndim == 4 else nn.Linear
    return kind(_channels(given), _channels(wanted)).to(given)
