"""CLAFusion: fuse networks of different depth by matching their layers first, then their neurons.

A chain of n layers of the small network is matched with n of the m >= n layers of the large one, in order, so that the summed cost
C[l, k] (1 - CKA of what the two layers answer to the same samples) is least. Dynamic programming finds that map in O(mn):

    F(k, l) = min( F(k, l-1),  F(k-1, l-1) + C[l, k] ).

Then the depths are made equal. ``balance="add"`` gives the small network a layer for each large layer without a partner: an identity
matrix (for a convolution a Dirac kernel) changes nothing behind a ReLU, since ReLU(ReLU(x)) = ReLU(x); a residual block whose last layer is
zero changes nothing anywhere. ``balance="merge"`` takes layers out of the large network instead: between two linear layers stands
D = the share of samples on which each neuron is active, and W_2 D W_1 is one layer; a residual block without a partner is left out.
What comes then is OTFusion (:mod:`neurarium.compress.fuse.transport`) between networks of one depth.

A chain is an ``nn.Sequential`` or ``nn.ModuleList``. Its layers (or its blocks) are matched stage by stage: a stage ends where the size of
the feature map changes, i.e. at a pooling layer or a stride. First layers of a stage are matched with each other, and so are output layers.

*Source*: Nguyen, Nguyen, Huynh, Le, Ho and Phung, On Cross-Layer Alignment for Model Fusion of Heterogeneous Neural Networks (ICASSP
2023), with the authors' published code for facts.
*Departures*: chains are found in any model, not in three families; leaving residual blocks out in "merge" is ours (the authors merge
multilayer perceptrons only); an activation function counts as idempotent if it is so numerically (ReLU, ReLU6, Hardtanh, ...).
*Cost*: one forward pass of each network for CKA, then that of OTFusion.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.compress.calibrate import is_conv1d
from neurarium.compress.fuse.folding import fold_norms, output, outputs, replace
from neurarium.compress.fuse.similarity import layer_costs
from neurarium.compress.fuse.transport import FusionPlan, check_options, finish, inputs, trace
from neurarium.compress.graph import ChannelGraph
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["align_layers", "apply_fusion", "cla_fuse", "plan_fusion"]
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


def align_layers(cost: Tensor, *, first: int = 1, last_free: int = 0) -> list[int]:
    """The increasing map of columns to rows of least summed cost: entry k is the large layer for the small layer k. Ties go to early rows.

    Args:
        cost: (m, n), m >= n: large layers by small layers.
        first: this many first layers are matched with each other.
        last_free: this many last large layers get no partner.
    """
    m, n = cost.shape if cost.ndim == 2 else (0, 0)
    m -= last_free
    if not 0 < n <= m or not 0 <= first <= n or last_free < 0:
        raise BadInput(f"{n} layers cannot be matched with {m} (cost {tuple(cost.shape)}, first={first}, last_free={last_free})")
    if not bool(torch.isfinite(cost).all()):
        raise BadInput("cost has values that are not finite")
    c = cost.tolist()
    never = float("inf")
    best = [[0.0] * (m + 1)] + [[never] * (m + 1) for _ in range(n)]  # best[k][l]: the first k small layers among the first l large ones
    for k in range(1, n + 1):
        for l in range(k, m + 1):
            here = best[k - 1][l - 1] + c[l - 1][k - 1] if k > first or l == k else never
            best[k][l] = min(best[k][l - 1], here)
    result, l = [], m
    for k in range(n, 0, -1):
        while l > k and best[k][l - 1] <= best[k][l]:
            l -= 1
        result.append(l - 1)
        l -= 1
    return result[::-1]


def cla_fuse(
    large: nn.Module, small: nn.Module, loader: Iterable, *, balance: str = "add", layer_cost: str = "cka", weight: float = 0.5,
    align: str = "activations", samples: int = 200,
) -> nn.Module:  # fmt: skip
    """One network of two: that of the small one, with what the large one knows. Fine-tune it afterwards.

    Args:
        large, small: trained networks; the large one is as deep or deeper, stage by stage. Both stay as they are.
        loader: ``(x, y)`` batches; ``y`` is not used.
        balance: "add" gives a network of the large one's depth and the small one's widths, "merge" one of the small one's shape.
        layer_cost: cka, cca, wasserstein, index or width, see :func:`~neurarium.compress.fuse.similarity.layer_costs`.
        weight: of the small network; 1 gives its function.
        align: what neurons are matched by: "activations", "weights", or "index" (not at all).
        samples: rows of the loader to use.

    The result's ``plan`` is a :class:`~neurarium.compress.fuse.transport.FusionPlan`.
    """
    plan = plan_fusion(large, small, loader, layer_cost=layer_cost, samples=samples)
    return apply_fusion(large, small, plan, loader, balance=balance, weight=weight, align=align, samples=samples)


def plan_fusion(large: nn.Module, small: nn.Module, loader: Iterable, *, layer_cost: str = "cka", samples: int = 200) -> FusionPlan:
    """Which layers belong together."""
    x = inputs(small, loader, samples)
    a, b = fold_norms(large, x), fold_norms(small, x)
    maps, costs = {}, {}
    stages = [s for chain in _chains(a, b, x) for s in chain.stages if len(s.large) > len(s.small)]
    seen = [outputs(m, x, [u.name for s in stages for u in getattr(s, side)]) for m, side in ((a, "large"), (b, "small"))]
    for stage in stages:
        cost = layer_costs([seen[0][u.name] for u in stage.large], [seen[1][u.name] for u in stage.small], layer_cost)
        maps[stage.name] = tuple(align_layers(cost))
        costs[stage.name] = tuple(tuple(row) for row in cost.tolist())
    return FusionPlan(maps, costs)


def apply_fusion(
    large: nn.Module, small: nn.Module, plan: FusionPlan, loader: Iterable, *, balance: str = "add", weight: float = 0.5,
    align: str = "activations", samples: int = 200,
) -> nn.Module:  # fmt: skip
    """Fuses by a plan, of :func:`plan_fusion` or with maps of your own."""
    check_options(weight, align)
    if balance not in ("add", "merge"):
        raise BadInput(f"balance must be 'add' or 'merge', got {balance!r}")
    x = inputs(small, loader, samples)
    a, b = fold_norms(large, x), fold_norms(small, x)
    before = output(b, x)
    chains = _chains(a, b, x)
    known = {stage.name for chain in chains for stage in chain.stages}
    if unknown := set(plan.maps) - known:
        stages = ", ".join(sorted(known)) or "none of unequal depth"
        raise BadInput(f"the plan names the stage {min(unknown)!r}; these networks have {stages}")
    for chain in chains:
        _Equaliser(a, b, chain, x).run(plan.maps, balance)
    if chains and not torch.allclose(output(b, x), before, rtol=1e-3, atol=1e-4 * max(1.0, float(before.abs().max()))):
        name = next(stage.large[-1].name for chain in chains for stage in chain.stages if len(stage.large) > len(stage.small))
        raise UnsupportedModel("a layer of the small network's that copies its input would not, behind this activation", module=name)
    return finish(a, b, x, weight, align, plan).train(small.training)


@dataclass(frozen=True)
class _Unit:
    """Children `start` to `stop` of a chain: a layer with its normalisation and activation, or one block. `name` answers for it."""

    start: int
    stop: int
    name: str
    block: bool
    width: int


@dataclass(frozen=True)
class _Stage:
    name: str
    large: tuple[_Unit, ...]
    small: tuple[_Unit, ...]


@dataclass(frozen=True)
class _Chain:
    path: str
    stages: tuple[_Stage, ...]


def _chains(a: nn.Module, b: nn.Module, x: Tensor) -> list[_Chain]:
    """The containers that differ in their layers, cut into stages."""
    return [_cut(path, a, b, x) for path in _differing(a, b, "")]


def _differing(a: nn.Module, b: nn.Module, path: str) -> list[str]:
    if isinstance(a, (nn.Sequential, nn.ModuleList)) and type(a) is type(b) and [*map(type, a)] != [*map(type, b)]:
        return [path]
    theirs = dict(b.named_children())
    return [p for n, m in a.named_children() if n in theirs for p in _differing(m, theirs[n], f"{path}.{n}".lstrip("."))]


def _cut(path: str, a: nn.Module, b: nn.Module, x: Tensor) -> _Chain:
    where = path or type(b).__name__
    sides = [_stages(path, m, x) for m in (a, b)]
    kinds = [[kind for kind, _ in side] for side in sides]
    if kinds[0] != kinds[1]:
        raise UnsupportedModel(f"the large network's stages are {', '.join(kinds[0])}, the small one's {', '.join(kinds[1])}", module=where)
    stages = []
    for i, ((_, mine), (_, theirs)) in enumerate(zip(*sides, strict=True)):
        if len(mine) < len(theirs):
            raise UnsupportedModel(f"stage {i} has {len(theirs)} layers, only {len(mine)} in the large network", module=theirs[0].name)
        stages.append(_Stage(f"{path}/{i}", tuple(mine), tuple(theirs)))
    return _Chain(path, tuple(stages))


def _stages(path: str, model: nn.Module, x: Tensor) -> list[tuple[str, list[_Unit]]]:
    """(kind, units) of each stage. A new one starts with another kind of unit or size of map, and at a layer without activation."""
    found: list[list[Any]] = []  # start, stop, name, block, bare
    growing = False
    for i, child in enumerate(model.get_submodule(path)):
        layers = [n for n, m in child.named_modules() if _is_layer(m)]
        if not layers:
            growing = growing and (_elementwise(child) or _own_tensors(child))
            if growing:
                found[-1][1] = i + 1
                found[-1][4] &= not _acts(child)
            continue
        plain = len(layers) == 1 and _is_plain(child)
        name = ".".join(filter(None, (path, str(i), layers[0] if plain else "")))
        found.append([i, i + 1, name, not plain, plain and not any(map(_acts, child.modules()))])
        growing = plain
    seen = outputs(model, x[:2], [f[2] for f in found])
    stages: list[tuple[str, list[_Unit]]] = []
    last: Any = None
    for start, stop, name, block, bare in found:
        out, layer = seen[name], model.get_submodule(name)
        channel = 1 if out.ndim > 3 or isinstance(layer, nn.modules.conv._ConvNd) else out.ndim - 1
        size = tuple(s for d, s in enumerate(out.shape) if d not in (0, channel))
        mark = (type(layer), size, start if bare else None)
        if mark != last:
            stages.append((type(layer).__name__ + " without activation" * bare, []))
        stages[-1][1].append(_Unit(start, stop, name, block, out.shape[channel]))
        last = mark
    return stages


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module)


def _is_plain(module: nn.Module) -> bool:
    """A leaf, or an nn.Sequential of such."""
    return next(module.children(), None) is None or (type(module) is nn.Sequential and all(map(_is_plain, module)))


def _acts(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation"


def _elementwise(module: nn.Module) -> bool:
    return _acts(module) or type(module).__module__ == "torch.nn.modules.dropout" or isinstance(module, nn.Identity)


def _own_tensors(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


class _Equaliser:
    """Rebuilds one chain of both networks, in place, in one layout: that of the small one with layers added, or just that."""

    def __init__(self, a: nn.Module, b: nn.Module, chain: _Chain, x: Tensor) -> None:
        self.a, self.b, self.chain, self.x = a, b, chain, x
        self.mine, self.theirs = list(a.get_submodule(chain.path)), list(b.get_submodule(chain.path))
        self.large: list[nn.Module] = []
        self.small: list[nn.Module] = []
        self.graph: ChannelGraph | None = None

    def run(self, maps: Mapping[str, Sequence[int]], balance: str) -> None:
        taken = {i for s in self.chain.stages for u in s.large for i in range(u.start, u.stop)}
        between = [m for i, m in enumerate(self.mine) if i not in taken and any(map(_own_tensors, m.modules()))]
        at, pending = 0, []
        for stage in self.chain.stages:
            chosen = _checked(maps.get(stage.name, range(len(stage.small))), stage)
            for k, unit in enumerate(stage.small):
                at = self._gap(at, unit.start, between, pending)
                partner = stage.large[chosen[k]]
                alone = stage.large[chosen[k] + 1 : chosen[k + 1] if k + 1 < len(chosen) else None]
                own = self.theirs[unit.start : unit.stop]
                self.small += own
                if balance == "merge":
                    merged = partner if unit.block else self._merged([*pending, partner])
                    pending = [] if unit.block else list(alone)
                    self.large += _dressed(self.mine[merged.start : merged.stop], own, merged)
                else:
                    self.large += _dressed(self.mine[partner.start : partner.stop], own, partner)
                    for extra in alone:
                        made = self.mine[extra.start : extra.stop]
                        self.small += self._silent(extra, unit.width) if unit.block else _identity(made, unit.width, extra)
                        self.large += made
                at = unit.stop
        self._gap(at, len(self.theirs), between, pending)
        if between:
            kind = type(between[0]).__name__
            raise UnsupportedModel(f"a {kind} of the large network has no place in the small one", module=self.chain.path or None)
        for net, children in ((self.a, self.large), (self.b, self.small)):
            _refill(net, self.chain.path, children)

    def _gap(self, start: int, stop: int, between: list[nn.Module], pending: Sequence[_Unit]) -> int:
        """What stands between two layers: pooling, flattening, a normalisation of its own."""
        for child in self.theirs[start:stop]:
            self.small.append(child)
            if not any(map(_own_tensors, child.modules())):
                self.large.append(copy.deepcopy(child))
            elif between and type(between[0]) is type(child):
                self.large.append(between.pop(0))
            else:
                raise UnsupportedModel(f"its {type(child).__name__} has no partner in the large network", module=self.chain.path)
        if pending and start < stop:
            raise UnsupportedModel("cannot be merged with a layer behind a change of shape; use balance='add'", module=pending[0].name)
        return stop

    def _merged(self, units: Sequence[_Unit]) -> _Unit:
        """Several linear layers as one, in the place of the last: W_2 D W_1 with D the mean slope of each activation on the samples."""
        *before, last = units
        if not before:
            return last
        layers = [self.a.get_submodule(u.name) for u in units]
        for unit, layer in zip(units, layers, strict=True):
            if not isinstance(layer, nn.Linear):
                kind = type(layer).__name__
                raise UnsupportedModel(f"a {kind} cannot be merged into one of its own shape; use balance='add'", module=unit.name)
        seen = outputs(self.a, self.x, [u.name for u in before])
        weight, bias = layers[0].weight.detach().double(), _bias(layers[0])
        for unit, layer in zip(before, layers[1:], strict=True):
            slope = self._slope(unit, seen[unit.name])
            w = layer.weight.detach().double() * slope
            weight, bias = w @ weight, w @ bias + _bias(layer)
        target = layers[-1]
        target.in_features = weight.shape[1]
        target.weight = nn.Parameter(weight.to(target.weight.dtype), target.weight.requires_grad)
        if target.bias is not None:
            target.bias = nn.Parameter(bias.to(target.weight.dtype), target.bias.requires_grad)
        return last

    def _slope(self, unit: _Unit, z: Tensor) -> Tensor:
        leaves = [m for child in self.mine[unit.start : unit.stop] for m in child.modules() if next(m.children(), None) is None]
        with torch.enable_grad():
            z = z.double().flatten(0, -2).requires_grad_()
            out = z
            for module in leaves[1:]:
                if _own_tensors(module):
                    raise UnsupportedModel(f"cannot be merged: a {type(module).__name__} stands behind it", module=unit.name)
                out = module(out.clone())
            return torch.autograd.grad(out.sum(), z)[0].mean(0)

    def _silent(self, unit: _Unit, width: int) -> list[nn.Module]:
        """A copy of the large network's residual block, as wide as the small one's stream, whose branches write zeros."""
        if self.graph is None:
            self.graph = trace(self.a, self.x)
        inside = f"{unit.name}."
        streams = []
        for group in self.graph.groups:
            makers = {m.module for m in group.members if m.side == "out"}
            if any(f"{m}.".startswith(inside) for m in makers) and not all(f"{m}.".startswith(inside) for m in makers):
                streams.append((group, {m for m in makers if f"{m}.".startswith(inside)}))
        if not streams:
            raise UnsupportedModel("has no partner in the small network, and none can be added: it is no residual block", module=unit.name)
        model = self.a
        cut = {g.id: range(width * g.size // unit.width) for g, _ in streams} if width != unit.width else {}
        if any(not 0 < len(kept) <= self.graph[g].size for g, kept in cut.items()):
            raise UnsupportedModel(f"is {unit.width} wide: a block of width {width} cannot be made of it", module=unit.name)
        model = self.graph.remove(model, cut) if cut else model
        block = copy.deepcopy(model.get_submodule(unit.name))
        for _, makers in streams:
            for name in makers:
                layer = block.get_submodule(name[len(inside) :])
                for t in layer.parameters():
                    nn.init.zeros_(t)
        return [block]


def _checked(chosen: Sequence[int], stage: _Stage) -> Sequence[int]:
    good = len(chosen) == len(stage.small) and all(p < q for p, q in pairwise(chosen)) and chosen[0] == 0 and chosen[-1] < len(stage.large)
    if not good:
        raise BadInput(
            f"the map of stage {stage.name!r} must name {len(stage.small)} of {len(stage.large)} layers, rising from 0; got {list(chosen)}"
        )
    return chosen


def _bias(layer: nn.Linear) -> Tensor:
    zeros = torch.zeros(layer.out_features, dtype=torch.float64, device=layer.weight.device)
    return zeros if layer.bias is None else layer.bias.detach().double()


def _dressed(source: list[nn.Module], layout: list[nn.Module], unit: _Unit) -> list[nn.Module]:
    """The layers of `source` in the places of those of `layout`."""
    alike = [*map(type, source)] == [*map(type, layout)] and all(next(m.children(), None) is None for m in source)
    if unit.block or alike:
        return source
    shell = nn.Sequential(*copy.deepcopy(layout))
    holes = [(n, type(m)) for n, m in shell.named_modules() if _own_tensors(m)]
    parts = [m for child in source for m in child.modules() if _own_tensors(m)]
    if [kind for _, kind in holes] != [*map(type, parts)]:
        kinds = ", ".join(type(p).__name__ for p in parts)
        raise UnsupportedModel(f"is made of {kinds}; its partner in the small network is not", module=unit.name)
    for (name, _), part in zip(holes, parts, strict=True):
        replace(shell, name, part)
    return list(shell)


@torch.no_grad()
def _identity(source: list[nn.Module], width: int, unit: _Unit) -> list[nn.Module]:
    """A copy of a layer with its activation that gives its input back, for `width` channels."""
    made = copy.deepcopy(source)
    with_tensors = [m for child in made for m in child.modules() if _own_tensors(m)]
    layer = with_tensors[0]
    depthwise = isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels
    if len(with_tensors) > 1 or (getattr(layer, "groups", 1) > 1 and not depthwise) or getattr(layer, "transposed", False):
        raise UnsupportedModel(f"a {type(with_tensors[-1]).__name__} that changes nothing cannot be added", module=unit.name)
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.out_features = width
        new = torch.eye(width)
    else:
        layer.in_channels = layer.out_channels = width
        layer.groups = width if depthwise else 1
        new = nn.init.dirac_(torch.empty(width, 1 if depthwise else width, *layer.kernel_size), layer.groups)
    layer.weight = nn.Parameter(new.to(layer.weight), layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(width).to(layer.weight), layer.bias.requires_grad)
    return made


def _refill(model: nn.Module, path: str, children: Sequence[nn.Module]) -> None:
    """Gives the container its new children, and tells Hugging Face's models how many they are."""
    container = model.get_submodule(path)
    before = len(container)
    container._modules.clear()
    for i, child in enumerate(children):
        container._modules[str(i)] = child
        for module in child.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    config = getattr(model, "config", None)
    for name in _DEPTHS:
        if getattr(config, name, None) == before:
            setattr(config, name, len(children))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == before:
        config.layer_types = (kinds + kinds[-1:] * len(children))[: len(children)]
