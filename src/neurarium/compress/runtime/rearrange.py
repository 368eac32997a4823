"""SparseByteNN: groups of filters share their inputs, and the whole network is rearranged so that like filters meet in a group.

A vector register holds G filters at one input. If G consecutive filters keep and drop the same inputs, the product skips whole vectors
(:class:`~neurarium.compress.prune.block.Tiles`): finer than removing channels, coarser than removing weights. Which filters are consecutive
is free: the channels of a layer can be permuted if everything that carries them is permuted alike - its normalisation, depthwise filters,
the other branches of a residual sum, the inputs of every layer that reads them. :class:`~neurarium.compress.graph.ChannelGraph` knows who
these are, so the rearranged network computes the same function and nothing is shuffled when it runs.

The search. S[r, c] is what filter r holds at input c (squares over its taps, each layer's total set to one; the columns of all layers that
make the channels side by side). A partition into groups of G is worth the sum of the largest group sums, as many in each layer as the
sparsity leaves. From a greedy start (the loudest filter, then G - 1 times the one that adds most at the group's best inputs) and from the
present order, two steps are repeated, neither of which can lower the worth: the best inputs for given groups (a sort), and the best groups
for given inputs (an assignment problem, solved exactly). Then pairs of filters are exchanged as long as that helps.

Gradual pruning: at step t of the first T the sparsity is ``s (1 - (1 - t/T)^3)``, and the masks are drawn anew each `every` steps.

*Source*: arXiv 2310.19509.
*Departures*: the paper publishes neither the search nor the schedule; both are reconstructed, the search with
exact assignments. A group of filters is 16 wide (a vector of AVX512; 4 or 8 elsewhere) at one input, with all taps of a kernel. Layers
narrower than a group, the first convolution and grouped ones stay dense.

*Cost*: the search takes seconds for 1,000 filters at 1,000 inputs (an assignment costs the cube of the filters); a forward pass proves it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neurarium.compress.graph import ChannelGraph, Group
from neurarium.compress.plan import MaskPlan, apply, finalise, prunable
from neurarium.compress.prune.block import Tiles
from neurarium.compress.prune.layerwise import leave_alone
from neurarium.compress.runtime.formats import HEIGHTS
from neurarium.compress.runtime.sparse import RuntimePlan, to_sparse_runtime
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, Learner

__all__ = ["SparseBytePlan", "best_order", "group_mask", "plan_groups", "rearrange_channels", "sparsebyte"]


@dataclass(frozen=True)
class SparseBytePlan:
    """What was done.

    Attributes:
        order: channel group -> its channels' old places, in their new order; only groups that gained.
        sparsity: layer -> share of its weights that were removed.
        runtime: which layers run from a compact form.
        skipped: what was left alone, and why.
    """

    order: Mapping[str, tuple[int, ...]]
    sparsity: Mapping[str, float]
    runtime: RuntimePlan
    skipped: Mapping[str, str] = field(default_factory=dict)


def sparsebyte(
    model: nn.Module,
    loader: Iterable | None = None,
    *,
    sparsity: float = 0.3,
    group: tuple[int, int] = (16, 1),
    rearrange: bool = True,
    epochs: int = 0,
    schedule: str = "cubic",
    every: int = 100,
    learner: Learner | None = None,
    planner: object = "measure",
    example: object = None,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A copy whose layers are rearranged, pruned in groups of filters, trained on and run sparse; ``result.plan`` says how.

    Args:
        loader: batches (x, y): the first x is the example, and `epochs` of training run over all.
        sparsity: share of the groups to remove in each layer.
        group: (filters, 1). Use 16 on AVX512, 8 or 4 elsewhere.
        schedule: "cubic", more and more during the first two thirds of the training; or "at once", before it.
        every: steps between two drawings of the masks.
        learner: trains the masked network; Adam with its defaults if not given.
        planner: as in :func:`~neurarium.compress.runtime.sparse.to_sparse_runtime`; layers that run faster dense stay dense, with zeros.
        example: an input to trace the network with, instead of the loader's first.
        skip: names of layers to leave dense.
    """
    if schedule not in ("cubic", "at once"):
        raise BadInput(f"schedule must be 'cubic' or 'at once', got {schedule!r}")
    if epochs < 0 or every < 1:
        raise BadInput(f"epochs must be >= 0 and every >= 1, got {epochs} and {every}")
    if epochs and loader is None:
        raise BadInput("training needs a loader")
    if example is None and loader is not None:
        example = _first(loader)
    masks = plan_groups(model, sparsity=sparsity, group=group, skip=skip)  # refuses before anything is done
    order, skipped, work = {}, dict(masks.skipped), finalise(model)
    if rearrange:
        try:
            work = rearrange_channels(model, group=group, sparsity=sparsity, example=example, skip=skip)
            order = work.order
            del work.order
        except UnsupportedModel as error:
            skipped["(rearrangement)"] = str(error)
    dense = plan_groups(work, sparsity=0.0, group=group, skip=skip)
    masks = plan_groups(work, sparsity=sparsity, group=group, skip=skip)
    work = apply(work, dense if epochs and schedule == "cubic" else masks)
    if epochs:
        steps = epochs * _length(loader)
        batches = _Gradual(loader, work, sparsity, group, skip, steps, every) if schedule == "cubic" else loader
        (Backprop() if learner is None else learner).fit(work, batches, epochs=epochs, seed=seed)
        if schedule == "cubic":
            batches.draw(sparsity)
    removed = {n: 1 - work.get_submodule(n).mask.float().mean().item() for n in masks.masks}
    height = max(h for h in HEIGHTS if group[0] % h == 0)
    result = to_sparse_runtime(
        work.train(model.training), block=(height, 1), min_sparsity=min(0.9 * sparsity, 1.0), example=example, planner=planner
    )
    skipped = {n: why for n, why in result.plan.skipped.items() if n in masks.masks} | skipped
    result.plan = SparseBytePlan({n: tuple(o.tolist()) for n, o in order.items()}, removed, result.plan, skipped)
    return result


def plan_groups(model: nn.Module, *, sparsity: float, group: tuple[int, int] = (16, 1), skip: Sequence[str] = ()) -> MaskPlan:
    """The masks that remove in each layer the groups of least norm, as the channels lie."""
    filters = _checked(sparsity, group)
    layers, skipped = _layers(model, filters, sparsity, skip)
    masks = {}
    for name, layer in layers.items():
        masks[name] = group_mask(_weight(layer), group, sparsity)
    return MaskPlan(masks, {}, Tiles(filters), skipped)


def group_mask(weight: Tensor, group: tuple[int, int], sparsity: float, pattern: Tiles | None = None) -> Tensor:
    """True where a weight (filters, inputs, taps...) stays: the groups of least norm go, ``round(sparsity * groups)`` of them.

    Args:
        group: (filters, 1); a group holds all taps of its filters' kernels at one input. The last one may be smaller.
        pattern: an other division of ``weight.flatten(1)``.
    """
    filters = _checked(sparsity, group)
    pattern = Tiles(filters, weight[0, 0].numel()) if pattern is None else pattern
    return pattern.mask(weight.detach().double().square(), sparsity)


def rearrange_channels(
    model: nn.Module,
    *,
    example: object,
    group: tuple[int, int] = (16, 1),
    sparsity: float = 0.5,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy, the same function, whose channels lie so that like filters are neighbours. ``result.order`` says where they came from.

    Args:
        example: an input of the model.
        sparsity: the share of groups that will be removed; the order is the best for this one.

    Raises:
        UnsupportedModel: the network cannot be traced, or has no channels that can be permuted.
    """
    filters = _checked(sparsity, group)
    if example is None:
        raise BadInput("rearranging follows the channels through the network: give an example input (or a loader)")
    model = finalise(model)
    layers, _ = _layers(model, filters, sparsity, skip)
    result = copy.deepcopy(model)
    order: dict[str, Tensor] = {}
    for unit in ChannelGraph.trace(model, example).groups:
        scores = _scores(unit, layers, filters)
        if not scores or unit.size <= filters:
            continue
        found = best_order(scores, filters, sparsity)
        if not torch.equal(found, torch.arange(unit.size)):
            _permute(result, unit, found)
            order[unit.id] = found
    if order and not _same(model, result, example):  # the graph was wrong about one: take them one by one
        result, chosen = copy.deepcopy(model), {}
        for unit in ChannelGraph.trace(model, example).groups:
            if unit.id in order:
                trial = copy.deepcopy(result)
                _permute(trial, unit, order[unit.id])
                if _same(model, trial, example):
                    result, chosen[unit.id] = trial, order[unit.id]
        order = chosen
    result.order = order
    return result


def best_order(scores: Sequence[Tensor], size: int, sparsity: float) -> Tensor:
    """The order of rows in which groups of `size` consecutive ones keep most at this sparsity.

    Args:
        scores: one matrix a layer, (rows, its inputs), non-negative.

    Returns:
        the rows' old places in their new order: the present order if nothing better is found.
    """
    if not scores or any(s.ndim != 2 or len(s) != len(scores[0]) or bool((s < 0).any()) for s in scores):
        raise BadInput("scores must be non-negative matrices with equally many rows")
    layers = [s.double().numpy() / max(float(s.double().sum()), 1e-300) for s in scores]
    search = _Search(layers, size, sparsity)
    plain = np.arange(len(layers[0])) // size
    start = search.worth(search.sums(plain))
    found = max((search.improve(owner) for owner in (search.greedy(), plain)), key=lambda o: search.worth(search.sums(o)))
    if search.worth(search.sums(found)) <= start * (1 + 1e-9):
        found = plain
    return torch.from_numpy(np.argsort(found, kind="stable"))


class _Search:
    """Rows into groups; `owner[r]` is the group of row r."""

    def __init__(self, layers: list[np.ndarray], size: int, sparsity: float) -> None:
        self.score, self.size = np.concatenate(layers, 1), size
        self.rows = len(self.score)
        self.groups = -(-self.rows // size)
        cuts = np.cumsum([0, *(s.shape[1] for s in layers)])
        self.layers = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        self.keep = [(b - a) * self.groups - round(sparsity * (b - a) * self.groups) for a, b in itertools.pairwise(cuts)]
        self.room = np.full(self.groups, size)
        self.room[-1] = self.rows - size * (self.groups - 1)

    def sums(self, owner: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.groups, self.score.shape[1]))
        np.add.at(sums, owner, self.score)
        return sums

    def worth(self, sums: np.ndarray) -> float:
        return sum(float(np.partition(sums[:, c].ravel(), -k)[-k:].sum()) if k else 0.0 for c, k in zip(self.layers, self.keep))

    def kept(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which entries stay, and each column's threshold."""
        mask, level = np.zeros_like(sums, dtype=bool), np.zeros(sums.shape[1])
        for c, k in zip(self.layers, self.keep):
            flat = sums[:, c].ravel()
            chosen = np.argsort(-flat, kind="stable")[:k]
            part = np.zeros(flat.size, bool)
            part[chosen] = True
            mask[:, c] = part.reshape(sums[:, c].shape)
            level[c] = flat[chosen[-1]] if k else np.inf
        return mask, level

    def greedy(self) -> np.ndarray:
        """The loudest row that is left, then those that add most at the inputs where their group is loudest."""
        owner, free = np.full(self.rows, -1), np.ones(self.rows, bool)
        norms = self.score.sum(1)
        for g in range(self.groups):
            seed = int(np.argmax(np.where(free, norms, -1.0)))
            owner[seed], free[seed], total = g, False, self.score[seed].copy()
            for _ in range(self.room[g] - 1):
                best = np.zeros(len(total), bool)
                for c, k in zip(self.layers, self.keep):
                    top = max(1, round(k / self.groups))
                    best[c] = total[c] >= np.partition(total[c], -top)[-top]
                gain = np.where(free, self.score[:, best].sum(1), -1.0)
                row = int(np.argmax(gain))
                owner[row], free[row] = g, False
                total += self.score[row]
        return owner

    def improve(self, owner: np.ndarray) -> np.ndarray:
        owner = self._alternate(owner)
        budget = 2e8  # multiply-adds for exchanges
        sweep = self.groups * (self.groups - 1) / 2 * self.size**2 * self.score.shape[1]
        for _ in range(min(6, int(budget // max(sweep, 1)))):
            better = self._exchange(owner)
            if better is None:
                break
            owner = self._alternate(better)
        return owner

    def _alternate(self, owner: np.ndarray) -> np.ndarray:
        worth = self.worth(self.sums(owner))
        places = np.repeat(np.arange(self.groups), self.room)
        for _ in range(30):
            mask, _ = self.kept(self.sums(owner))
            benefit = self.score @ mask.T.astype(float)
            rows, columns = linear_sum_assignment(benefit[:, places], maximize=True)
            new = np.empty_like(owner)
            new[rows] = places[columns]
            value = self.worth(self.sums(new))
            if value <= worth * (1 + 1e-10):
                break
            owner, worth = new, value
        return owner

    def _exchange(self, owner: np.ndarray) -> np.ndarray | None:
        """One sweep over pairs of groups: the exchange of two rows with the largest bound is tried; None if none helped."""
        owner, helped = owner.copy(), False
        sums = self.sums(owner)
        worth, (_, level) = self.worth(sums), self.kept(sums)
        for a in range(self.groups):
            for b in range(a + 1, self.groups):
                left, right = np.flatnonzero(owner == a), np.flatnonzero(owner == b)
                moved = self.score[right][None] - self.score[left][:, None]  # (left, right, inputs)
                bound = np.maximum(sums[a] + moved - level, 0).sum(2) + np.maximum(sums[b] - moved - level, 0).sum(2)
                now = np.maximum(sums[a] - level, 0).sum() + np.maximum(sums[b] - level, 0).sum()
                i, j = np.unravel_index(int(np.argmax(bound)), bound.shape)
                if bound[i, j] <= now + 1e-12:
                    continue
                trial = sums.copy()
                trial[a] += moved[i, j]
                trial[b] -= moved[i, j]
                value = self.worth(trial)
                if value > worth * (1 + 1e-10):
                    owner[left[i]], owner[right[j]] = b, a
                    sums, worth, helped = trial, value, True
                    level = self.kept(sums)[1]
        return owner if helped else None


class _Gradual:
    """A loader beside which the masks of a model grow emptier."""

    def __init__(self, loader, model: nn.Module, sparsity: float, group, skip, steps: int, every: int) -> None:
        self.loader, self.model, self.sparsity, self.group, self.skip, self.every = loader, model, sparsity, group, skip, every
        self.until, self.step = max(1, 2 * steps // 3), 0

    def __len__(self) -> int:
        return _length(self.loader)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            self.step += 1
            if self.step <= self.until and (self.step % self.every == 0 or self.step == self.until):
                self.draw(self.sparsity * (1 - (1 - self.step / self.until) ** 3))
            yield batch

    @torch.no_grad()
    def draw(self, sparsity: float) -> None:
        for name, mask in plan_groups(self.model, sparsity=sparsity, group=self.group, skip=self.skip).masks.items():
            layer = self.model.get_submodule(name)
            if isinstance(getattr(layer, "mask", None), Tensor):
                layer.mask.copy_(mask & layer.mask)


def _checked(sparsity: float, group: tuple[int, int]) -> int:
    if len(group) != 2 or group[0] < 1 or group[1] != 1:
        raise BadInput(f"a group is (filters, 1) with at least 1 filter, got {group}")
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    return group[0]


def _layers(model: nn.Module, filters: int, sparsity: float, skip: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that are pruned in groups, and why the others are not."""
    layers, skipped = leave_alone(*prunable(model, (nn.Linear, nn.Conv2d)), skip)
    for name, layer in list(layers.items()):
        weight, why = layer.weight, ""
        units = -(-len(weight) // filters) * weight.shape[1]
        if not bool(torch.isfinite(weight).all()):
            raise BadInput(f"{name}: the weight has values that are not finite")
        if len(weight) < filters:
            why = f"has {len(weight)} outputs, fewer than a group of {filters}"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            why = f"has {layer.groups} groups of its own"
        elif isinstance(layer, nn.Conv2d) and layer.in_channels <= 4:
            why = f"reads an image of {layer.in_channels} channel(s)"
        elif round(sparsity * units) == units:
            why = f"{sparsity:.0%} of its {units} group(s) would be all"
        if why:
            skipped[name] = why
            del layers[name]
    if not layers:
        first = next(iter(skipped), "")
        raise UnsupportedModel(f"no layer can be pruned in groups of {filters}: {skipped.get(first)}", module=first)
    return layers, skipped


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach()
    return weight * layer.mask if isinstance(getattr(layer, "mask", None), Tensor) else weight


def _scores(unit: Group, layers: Mapping[str, nn.Module], filters: int) -> list[Tensor]:
    """(channels, inputs) for each pruned layer whose filters make these channels and lie in whole groups."""
    found = []
    for member in unit.members:
        if member.side != "out" or member.module not in layers or ("weight", 0) not in member.tensors:
            continue
        rows = member.index[:, 0]
        start = int(rows[0])
        if member.index.shape[1] != 1 or start % filters or not torch.equal(rows, torch.arange(start, start + unit.size)):
            continue
        weight = layers[member.module].weight.detach()[rows].double().square()
        found.append(weight.flatten(2).sum(2) if weight.ndim > 2 else weight)
    return found


@torch.no_grad()
def _permute(model: nn.Module, unit: Group, order: Tensor) -> None:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for member in unit.members:
        for attribute, dim in member.tensors:
            tensor = tensors[f"{member.module}.{attribute}".lstrip(".")]
            take = torch.arange(tensor.shape[dim])
            take[member.index.flatten()] = member.index[order].flatten()
            tensor.copy_(tensor.index_select(dim, take.to(tensor.device)))


@torch.no_grad()
def _same(model: nn.Module, other: nn.Module, example: object) -> bool:
    """Whether two models give one output on the example, in double precision."""
    outputs = []
    for network in (model, other):
        network = copy.deepcopy(network).eval().double()
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in _arguments(example)]
        given = network(**dict(zip(example, wide, strict=True))) if isinstance(example, Mapping) else network(*wide)
        outputs.append([t for t in tree_leaves(given) if isinstance(t, Tensor) and t.is_floating_point()])
    pairs = zip(*outputs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-7, atol=1e-7 * float(a.abs().max().clamp(min=1e-30)), equal_nan=True) for a, b in pairs)


def _arguments(example: object) -> list:
    if isinstance(example, Tensor):
        return [example]
    return list(example.values()) if isinstance(example, Mapping) else list(example)


def _first(loader: Iterable) -> Tensor:
    for batch in loader:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all()):
            raise BadInput("the loader's first batch has values that are not finite")
        return x
    raise BadInput("the loader is empty")


def _length(loader) -> int:
    return len(loader) if hasattr(loader, "__len__") else sum(1 for _ in loader)
