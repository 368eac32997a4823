"""OTFusion: average two trained networks after their neurons have been matched by optimal transport.

Neurons of a layer have no order, so the average of two networks' weights mixes strangers. Layer by layer from the input, OTFusion solves
for the transport plan T between the neurons of A and B that moves the least,

    min sum_ij T_ij |f_i - g_j|,   T 1 = 1/n_A,   T^t 1 = 1/n_B,

with f_i what neuron i is known by: its responses to some samples before the activation function, or its incoming weights (those of A
already in the order of B's inputs). Rows of A's weight go along T, columns of the next layer along the same T, and then weights are
averaged: (1 - w) A' + w B. With equal widths T is a permutation and A' computes exactly what A does. With other widths a row of A' is the
mean of the rows that meet in it, a column the sum of the columns, so that neurons that were split in two come together again.

Neurons here are the *groups* of :class:`~neurarium.compress.graph.ChannelGraph`: residual streams, concatenations, flattened maps and whole
attention heads are matched once and consistently wherever they occur. So any traced architecture can be fused.

*Source*: Singh and Jaggi, Model Fusion via Optimal Transport (NeurIPS 2020), which Nguyen et al. (CLAFusion) build on.
*Departures*: biases go with their row; batch normalisation is folded before and written back after with statistics of the samples (the
authors do without both). Columns are summed, not averaged, where widths differ: averaging them halves every signal that a doubled width
carries. Channels that cannot be permuted keep their place and are named in ``plan.skipped``.
*Cost*: one forward pass of each network on the samples, then one assignment problem a group: O(n^3), 0.1 s for 1,000 neurons.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array
from torch import Tensor, nn

from neurarium.compress.calibrate import is_conv1d
from neurarium.compress.fuse.folding import fold_norms, outputs, write_back
from neurarium.compress.graph import ChannelGraph, Group
from neurarium.compress.sensitivity import collect
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["FusionPlan", "optimal_transport", "ot_fuse"]

_REPLICAS = 2048  # assignments up to this size; beyond, a linear program
_POSITIONS = 64  # of a map or sequence, a sample


@dataclass(frozen=True)
class FusionPlan:
    """How two networks were matched.

    Attributes:
        maps: chain of layers -> for each layer of the small network the layer of the large one; empty if the depths are equal.
        costs: chain -> the matrix of costs, a row a large layer.
        moved: group of neurons -> what the transport cost, per neuron.
        skipped: module -> why its channels kept their place.
    """

    maps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    costs: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The maps, then the cost of each transport."""
        rows = [f"{name or '(model)'}: small layer k takes large layer {list(m)}" for name, m in self.maps.items()]
        rows += [f"{name:40} {value:>10.4g}" for name, value in self.moved.items()]
        return "\n".join([*rows, *(f"{name or '(model)'}: left in place, {why}" for name, why in self.skipped.items())])


def optimal_transport(cost: Tensor, row: Tensor | None = None, column: Tensor | None = None) -> Tensor:
    """The exact transport plan, float64, of least total ``(plan * cost).sum()``.

    Args:
        cost: (n, m), finite.
        row, column: the masses, each summing to 1; uniform if not given.

    Uniform masses are solved as an assignment of lcm(n, m) equal grains, everything else as a linear program (HiGHS).
    """
    if cost.ndim != 2 or 0 in cost.shape:
        raise BadInput(f"cost must be a matrix, got shape {tuple(cost.shape)}")
    if not bool(torch.isfinite(cost).all()):
        raise BadInput("cost has values that are not finite")
    n, m = cost.shape
    c = cost.detach().double().cpu().numpy()
    grains = math.lcm(n, m)
    if row is None and column is None and grains <= _REPLICAS:
        i, j = linear_sum_assignment(np.repeat(np.repeat(c, grains // n, 0), grains // m, 1))
        plan = np.zeros((n, m))
        np.add.at(plan, (i // (grains // n), j // (grains // m)), 1 / grains)
        return torch.from_numpy(plan)
    masses = []
    for name, given, size in (("row", row, n), ("column", column, m)):
        mass = np.full(size, 1 / size) if given is None else given.detach().double().cpu().numpy()
        if mass.shape != (size,) or (mass < 0).any() or not np.isclose(mass.sum(), 1):
            raise BadInput(f"{name} must be {size} masses >= 0 that sum to 1")
        masses.append(mass)
    where = np.arange(n * m)
    sums = coo_array((np.ones(2 * n * m), (np.concatenate([where // m, n + where % m]), np.concatenate([where, where]))))
    found = linprog(c.ravel(), A_eq=sums.tocsr(), b_eq=np.concatenate(masses), method="highs-ds")
    if found.x is None:
        raise BadInput(f"the transport problem could not be solved: {found.message}")
    return torch.from_numpy(found.x.reshape(n, m)).clamp_(min=0)


def ot_fuse(
    a: nn.Module, b: nn.Module, loader: Iterable, *, weight: float = 0.5, align: str = "activations", samples: int = 200
) -> nn.Module:
    """A network of B's shape that is the average of B and of A with its neurons in B's order.

    Args:
        a, b: two trained networks of the same layers; widths may differ. Both stay as they are.
        loader: ``(x, y)`` batches; ``x`` is run through both, ``y`` is not used.
        weight: of B; 1 gives B, 0 gives A in B's coordinates.
        align: know neurons by their "activations" or their incoming "weights", or by their "index" (the naive average).
        samples: rows of the loader to use.

    The result's ``plan`` is a :class:`FusionPlan`. To fuse several networks, fuse each into the result so far with weights k / (k + 1).
    """
    check_options(weight, align)
    x = inputs(b, loader, samples)
    return finish(fold_norms(a, x), fold_norms(b, x), x, weight, align, FusionPlan()).train(b.training)


def check_options(weight: float, align: str) -> None:
    if not 0.0 <= weight <= 1.0:
        raise BadInput(f"weight must be in [0, 1], got {weight}")
    if align not in ("activations", "weights", "index"):
        raise BadInput(f"align must be 'activations', 'weights' or 'index', got {align!r}")


def inputs(model: nn.Module, loader: Iterable, samples: int) -> Tensor:
    """The first rows x of the loader, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return collect(loader, samples)[0].to(device)


def finish(a: nn.Module, b: nn.Module, x: Tensor, weight: float, align: str, plan: FusionPlan) -> nn.Module:
    """Fuses two folded networks of one layout, writes the normalisations back and says in ``plan`` what was done."""
    fused, moved, skipped = _fuse(a, b, x, weight, align)
    write_back(fused, x).plan = FusionPlan(plan.maps, plan.costs, moved, {**plan.skipped, **skipped})
    return fused


@torch.no_grad()
def _fuse(a: nn.Module, b: nn.Module, x: Tensor, weight: float, align: str) -> tuple[nn.Module, dict[str, float], dict[str, str]]:
    tensors = [{n: t.detach() for n, t in (*m.named_parameters(), *m.named_buffers()) if t.is_floating_point()} for m in (a, b)]
    for name, t in tensors[1].items():
        if name not in tensors[0] or tensors[0][name].ndim != t.ndim:
            raise UnsupportedModel(f"{name}: the other network has no such tensor", module=name.rpartition(".")[0] or type(b).__name__)
    if extra := tensors[0].keys() - tensors[1].keys():
        where = min(extra).rpartition(".")[0] or type(a).__name__
        raise UnsupportedModel(f"{min(extra)}: the other network has no such tensor", module=where)
    graph = trace(b, x)
    groups = _paired(graph if _twins(a, b) else trace(a, x), graph)
    places = _places(groups)
    sought = list(dict.fromkeys(m.module for g, _ in groups for m in g.members if m.side == "out")) if align == "activations" else []
    seen = [responses(m, x, sought) for m in (a, b)]
    plans: dict[str, Tensor] = {}
    moved: dict[str, float] = {}
    for one, two in groups:
        if align == "index":
            plans[two.id] = _in_order(one.size, two.size)
            continue
        f, g = _features(one, two, tensors, seen, places, plans)
        cost = torch.cdist(f, g)
        plans[two.id] = optimal_transport(cost)
        moved[two.id] = float((plans[two.id] * cost).sum())
    fused = copy.deepcopy(b)
    for name, t in (*fused.named_parameters(), *fused.named_buffers()):
        if name in tensors[1]:
            aligned = _carry(tensors[0][name], t.shape, name, places, plans)
            if aligned is None:
                shapes = f"{tuple(tensors[0][name].shape)} and {tuple(t.shape)}"
                raise UnsupportedModel(f"{name}: {shapes} differ where no neurons can be matched", module=name.rpartition(".")[0])
            t.copy_((1 - weight) * aligned.to(t.device) + weight * t.double())
    return fused, moved, dict(graph.frozen)


def _in_order(n: int, m: int) -> Tensor:
    """The transport plan that keeps the order: the overlap of [i/n, (i+1)/n] and [j/m, (j+1)/m]."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
    return (torch.minimum((i + 1) / n, (j + 1) / m) - torch.maximum(i / n, j / m)).clamp_min(0)


def trace(model: nn.Module, x: Tensor) -> ChannelGraph:
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        if cache:  # a Hugging Face model gives its cache back, which no tracer knows
            config.use_cache = False
        return ChannelGraph.trace(model, x[:2])
    finally:
        if cache:
            config.use_cache = cache


def _twins(a: nn.Module, b: nn.Module) -> bool:
    """Whether the two are the same modules in the same sizes."""
    kinds = ([(n, type(m)) for n, m in net.named_modules()] for net in (a, b))
    sizes = ([(n, t.shape) for n, t in net.state_dict().items()] for net in (a, b))
    return next(kinds) == next(kinds) and next(sizes) == next(sizes)


def _paired(a: ChannelGraph, b: ChannelGraph) -> list[tuple[Group, Group]]:
    """Groups of one name and of the same members, in the order of B's forward pass. What is a group in one network alone stays in place."""
    found = {g.id: g for g in a.groups}
    pairs = []
    for group in b.groups:
        other = found.get(group.id)
        if other is None:
            continue
        mine, theirs = ([(m.module, m.side, m.index.shape[1], m.tensors) for m in g.members] for g in (other, group))
        if mine != theirs:
            where = next((q[0] for p, q in zip(mine, theirs, strict=False) if p != q), group.id)
            raise UnsupportedModel(f"its channels are wired otherwise in the other network (group {group.id})", module=where)
        pairs.append((other, group))
    return pairs


Places = dict[str, dict[int, list[tuple[str, bool, Tensor, Tensor]]]]


def _places(groups: list[tuple[Group, Group]]) -> Places:
    """tensor -> dimension -> (group, whether it is read there, indices in A, indices in B)."""
    found: Places = {}
    for one, two in groups:
        for m, n in zip(one.members, two.members, strict=True):
            for attribute, d in n.tensors:
                entry = (two.id, n.side == "in", m.index, n.index)
                found.setdefault(f"{n.module}.{attribute}".lstrip("."), {}).setdefault(d, []).append(entry)
    return found


def _carry(t: Tensor, shape: torch.Size, name: str, places: Places, plans: Mapping[str, Tensor], keep: int | None = None) -> Tensor | None:
    """A's tensor in B's coordinates, float64 on the CPU (dimension `keep` as it is); None if a size differs that no plan explains."""
    t = t.double().cpu()
    for d in range(t.ndim):
        if d == keep:
            continue
        known = [e for e in places.get(name, {}).get(d, []) if e[0] in plans]
        rows, columns = torch.ones(shape[d], dtype=torch.bool), torch.ones(t.shape[d], dtype=torch.bool)
        move = torch.zeros(shape[d], t.shape[d], dtype=torch.float64)
        for group, read, i, j in known:
            plan = plans[group]
            share = (plan * (len(plan) if read else plan.shape[1])).T  # sums to 1 over B's neurons if read, over A's otherwise
            for k in range(i.shape[1]):
                move[j[:, k, None], i[None, :, k]] = share
            rows[j.flatten()], columns[i.flatten()] = False, False
        if int(rows.sum()) != int(columns.sum()):
            return None
        move[rows.nonzero().flatten(), columns.nonzero().flatten()] = 1.0
        if known:
            t = torch.tensordot(move, t, ([1], [d])).movedim(0, d)
    return t


def _features(one: Group, two: Group, tensors: list, seen: list, places: Places, plans: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the neurons of a group are known by, a row each: responses where there are any, otherwise weights."""
    f, g = [], []
    makers = [(m, n) for m, n in zip(one.members, two.members, strict=True) if n.side == "out"]
    for m, n in makers:
        if n.module in seen[0] and n.module in seen[1]:
            for out, member, side in zip(seen, (m, n), (f, g), strict=True):
                side.append(out[n.module][:, member.index].movedim(1, 0).flatten(1))
    if not f:
        for m, n in makers:
            for attribute, d in n.tensors:
                name = f"{n.module}.{attribute}".lstrip(".")
                x, y = tensors[0][name], tensors[1][name].double().cpu()
                x = _carry(x, y.shape, name, places, plans, keep=d)
                if x is not None:
                    f.append(x.movedim(d, 0)[m.index].flatten(1))
                    g.append(y.movedim(d, 0)[n.index].flatten(1))
    if not f:
        raise UnsupportedModel("nothing tells its neurons apart: their inputs differ in number", module=two.id)
    return torch.cat(f, 1), torch.cat(g, 1)


def responses(model: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The outputs of linear layers, convolutions and embeddings, (rows, channels) in float64 on the CPU: a row a sample and position."""
    conv = nn.modules.conv._ConvNd
    layers = {name: model.get_submodule(name) for name in names}
    layers = {name: m for name, m in layers.items() if isinstance(m, (nn.Linear, nn.Embedding, conv)) or is_conv1d(m)}
    found = {}
    for name, out in outputs(model, x, layers).items():
        rows = out.movedim(1 if isinstance(layers[name], conv) else -1, -1)
        rows = rows.reshape(len(rows), -1, rows.shape[-1]) if rows.ndim > 2 else rows[:, None]
        at = torch.linspace(0, rows.shape[1] - 1, min(rows.shape[1], _POSITIONS)).round().long()
        found[name] = rows[:, at].reshape(-1, rows.shape[-1]).double().cpu()
    return found
