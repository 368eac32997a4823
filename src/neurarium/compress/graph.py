"""Which channels of a model can be removed, and what goes with them.

``ChannelGraph.trace(model, example)`` labels every channel (:mod:`neurarium.compress.labels`) and collects the labels that belong together
into *units*: the channel that a convolution makes, its normalisation, the columns of every layer that reads it; for residual sums the
same channel of all summands; for attention a whole head of queries, keys, values and output. Units that run through the same tensors form
a :class:`Group`. ``remove`` gives an ordinary smaller model, ``cost`` what it would cost, without building it.

The model is traced symbolically with ``torch.fx``, and where that fails (control flow on shapes, keyword inputs) with ``torch.export``;
control flow that depends on data fails in both and is refused. What the rules do not understand is frozen, with a reason. At the end the
groups are put to the test: one unit of each is removed and the smaller model traced again; every tensor in it must have the size that
the labels foretell. Groups that fail (a forward that reshapes to numbers fixed in the code) are frozen too.

A removal is *exact* (``group.exact``) if it equals zeroing what others read of the unit. It is not where a LayerNorm, a GroupNorm or a
mean runs over the channels: there the statistics are those of the channels that stay.

Cost: one to three traces and as many forward passes on the example.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from neurarium.compress.channels import ChannelPlan, Cost, apply_channels
from neurarium.compress.labels import Labels
from neurarium.compress.leaves import LEAVES
from neurarium.compress.rules import rule_of
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["ChannelGraph", "Group", "Member"]

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Member:
    """One side of one module in a group.

    Attributes:
        module: its name ("" for the model itself).
        side: "out" (it makes the channels), "in" (it reads them), "norm" (it scales them) or "raw" (a tensor added or multiplied).
        index: (size, k): row u holds the indices that belong to unit u, e.g. the k = H*W columns of a linear layer behind a flatten.
        tensors: the module's tensors and dimensions that these indices address.
    """

    module: str
    side: str
    index: Tensor
    tensors: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that run through the same tensors. Any subset of its units may stay, but not none.

    Attributes:
        id: the name of the first module that makes them.
        size: number of units.
        unit: channels of that module a unit, e.g. the size of a head (three times it where queries, keys and values are one layer).
        exact: whether removing a unit equals zeroing what others read of it.
    """

    id: str
    members: tuple[Member, ...]
    size: int
    unit: int
    exact: bool = True
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, int), repr=False)

    def __repr__(self) -> str:
        members = ", ".join(f"{m.module}.{m.side}" for m in self.members)
        return f"Group({self.id!r}, size={self.size}, unit={self.unit}, exact={self.exact}: {members})"


class ChannelGraph:
    """Coupled channels of a model. Made by :meth:`trace`.

    Attributes:
        groups: what can be pruned, in the order of the forward pass.
        frozen: module -> why the channels that it makes cannot be removed.
    """

    groups: list[Group]
    frozen: dict[str, str]

    def __init__(self, model: nn.Module, books: Labels) -> None:
        self._books = books
        self._parent = _components(books)
        self._tensors = _inventory(model)
        self.groups, self.frozen = _collect(books, self._parent)

    @classmethod
    def trace(cls, model: nn.Module, example: Example) -> ChannelGraph:
        """Args:
            model: any module; it is not changed and its mode does not matter (it is traced in eval mode).
            example: an input, a tuple of positional inputs, or a mapping of keyword inputs.

        Raises:
            UnsupportedModel: it cannot be traced, or nothing in it can be pruned; the message says why.
        """
        graph = cls(model, _label(model, example))
        graph._prove(model, example)
        if not graph.groups:
            reasons = "; ".join(f"{name or '(model)'} {why}" for name, why in list(graph.frozen.items())[:5])
            raise UnsupportedModel(f"has no channels that can be removed: {reasons or 'no layer makes channels that another reads'}",
                                   module=type(model).__name__)  # fmt: skip
        return graph

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.id == name:
                return group
        raise BadInput(f"no group {name!r}; there are {', '.join(g.id for g in self.groups)}")

    def remove(self, model: nn.Module, kept: Mapping[str, Tensor | Sequence[int]]) -> nn.Module:
        """The model with only the kept units (group id -> indices; groups not named stay whole). The input is untouched."""
        return apply_channels(model, self.plan(kept))

    def cost(self, kept: Mapping[str, Tensor | Sequence[int]] | None = None) -> Cost:
        """What :meth:`remove` would give, without building it: parameters, multiply-adds for the example, bytes of the state dict."""
        alive = self._alive(self._kept(kept or {}))
        count = {name: [int(alive[ids].sum()) for ids in dims] for name, dims in self._books.dims.items()}
        params = size = 0
        for name, (shape, width, is_parameter, stored) in self._tensors.items():
            numel = math.prod(count.get(name, shape))
            params += numel * is_parameter
            size += numel * width * stored
        macs = sum(factor * math.prod(int(alive[ids].sum()) for ids in arrays) for factor, arrays in self._books.macs)
        return Cost(params, macs, size)

    def counts(self, of: str = "macs") -> list[tuple[int, list[tuple[int, np.ndarray]]]]:
        """The parameters or multiply-adds as a sum of products, for costs that are differentiated.

        One entry a product: (factor, sizes); a size is (indices that always stay, how many belong to each unit), with the units of all
        groups one after the other. ``cost`` is the sum of factor * prod(stay + belongs @ alive).
        """
        number = np.full(int(self._parent.max(initial=0)) + 1, -1)
        total = 0
        for group in self.groups:
            number[group.labels] = np.arange(total, total + group.size)
            total += group.size

        def size(ids: np.ndarray) -> tuple[int, np.ndarray]:
            units = number[self._parent[ids[ids >= 0]]]
            return int((ids < 0).sum() + (units < 0).sum()), np.bincount(units[units >= 0], minlength=total)

        if of == "macs":
            return [(factor, [size(ids) for ids in arrays]) for factor, arrays in self._books.macs]
        if of != "params":
            raise BadInput(f"of must be 'macs' or 'params', got {of!r}")
        return [
            (1, [size(ids) for ids in self._books.dims[name]]) if name in self._books.dims else (math.prod(shape), [])
            for name, (shape, _, is_parameter, _) in self._tensors.items()
            if is_parameter
        ]

    def macs(self, counts: np.ndarray) -> np.ndarray:
        """Multiply-adds for the example when group g keeps counts[..., g] units, for many candidates at once: (..., groups) -> (...)."""
        factors, fixed, slopes, terms = self._polynomial
        return np.prod((fixed + np.asarray(counts, np.float64) @ slopes)[..., terms], -1) @ factors

    def components(self, name: str) -> tuple[np.ndarray, ...] | None:
        """For each dimension of the named tensor the number of the channel behind every index; None if the trace does not meet it.

        Equal numbers, here or in another tensor, are one channel: what a residual sum ties has one number.
        """
        dims = self._books.dims.get(self._books.names.get(name, name))
        return None if dims is None else tuple(self._parent[ids] for ids in dims)

    @cached_property
    def _polynomial(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each term of the cost is a factor times lengths, each length a constant plus so many for each unit that stays."""
        owner = np.full(int(self._parent.max(initial=0)) + 1, len(self.groups))
        for i, group in enumerate(self.groups):
            owner[group.labels] = i
        sizes = np.array([g.size for g in self.groups], np.float64)
        rows, terms, factors = [np.append(np.zeros(len(sizes)), 1.0)], [], []
        place: dict[bytes, int] = {}
        for factor, arrays in self._books.macs:
            term = []
            for ids in arrays:
                if (key := ids.tobytes()) not in place:
                    place[key] = len(rows)
                    row = np.bincount(owner[self._parent[ids[ids >= 0]]], minlength=len(sizes) + 1).astype(np.float64)
                    row[-1] += (ids < 0).sum()
                    rows.append(row)
                term.append(place[key])
            factors.append(float(factor)), terms.append(term)
        width = max(map(len, terms), default=1)
        table = np.stack(rows)
        padded = np.array([[*t, *[0] * (width - len(t))] for t in terms], np.int64).reshape(-1, width)
        return np.array(factors), table[:, -1], (table[:, :-1] / sizes).T, padded

    def plan(
        self, kept: Mapping[str, Tensor | Sequence[int]], *, scores: Mapping[str, Tensor] | None = None,
        implanted: Mapping[str, Tensor] | None = None,
    ) -> ChannelPlan:  # fmt: skip
        """The kept units as a plan that can be stored and applied without this graph."""
        chosen = self._kept(kept)
        alive = self._alive(chosen)
        slices, shapes = {}, {}
        for name, dims in self._books.dims.items():
            cut = {d: torch.from_numpy(np.flatnonzero(alive[ids])) for d, ids in enumerate(dims) if not alive[ids].all()}
            if cut:
                slices[name], shapes[name] = cut, tuple(map(len, dims))
        return ChannelPlan(
            chosen, {g.id: g.size for g in self.groups}, slices, shapes, self._attributes(alive), self.cost(), self.cost(kept),
            dict(scores or {}), dict(implanted or {}), dict(self.frozen),
        )  # fmt: skip

    def _kept(self, kept: Mapping[str, Tensor | Sequence[int]]) -> dict[str, Tensor]:
        unknown = set(kept) - {g.id for g in self.groups}
        if unknown:
            self[min(unknown)]
        result = {}
        for group in self.groups:
            units = torch.arange(group.size) if group.id not in kept else torch.as_tensor(kept[group.id], dtype=torch.int64).unique()
            if group.id in kept and len(units) != len(kept[group.id]):
                raise BadInput(f"{group.id}: a unit is named twice")
            if not len(units):
                raise BadInput(f"{group.id}: at least one of its {group.size} units must stay")
            if units[0] < 0 or units[-1] >= group.size:
                raise BadInput(f"{group.id}: units are 0 to {group.size - 1}, got {int(units[0])} to {int(units[-1])}")
            result[group.id] = units
        return result

    def _alive(self, kept: Mapping[str, Tensor]) -> np.ndarray:
        """One truth value a label, and True at the end, for the index -1."""
        roots = np.ones(int(self._parent.max(initial=0)) + 1, bool)
        for group in self.groups:
            gone = np.ones(group.size, bool)
            gone[kept[group.id].numpy()] = False
            roots[group.labels[gone]] = False
        return np.append(roots[self._parent], True)

    def _attributes(self, alive: np.ndarray) -> dict[str, Any]:
        """Attributes that count channels: those that a rule named, and of a module that folds heads its own integers of that value."""
        result: dict[str, Any] = {}
        for path, attribute, ids in self._books.counts:
            before, after = len(ids), int(alive[ids].sum())
            if before == after:
                continue
            if attribute:
                result[f"{path}.{attribute}".lstrip(".")] = after
            else:
                for owner in self._owners(path, ids):
                    for name, value in self._integers.get(owner, {}).items():
                        if value == before and (name in _INNER or ("head" in name and "dim" not in name and "size" not in name)):
                            result[f"{owner}.{name}".lstrip(".")] = after
        return result

    def _owners(self, path: str, ids: np.ndarray) -> list[str]:
        """A module that folds channels, and those in it that hold the layers which make them (a method may be called from outside)."""
        roots = self._parent[ids[ids >= 0]]
        makers = [m.module for g in self.groups if np.isin(g.labels, roots).any() for m in g.members if m.side == "out"]
        start = f"{path}." if path else ""
        inside = {m[: i + len(start)] for m in makers if m.startswith(start) for i, c in enumerate(m[len(start) :]) if c == "."}
        return [path, *sorted(inside)]

    def _prove(self, model: nn.Module, example: Example) -> None:
        """Removes a unit of each group and traces again; freezes the groups for which the sizes are not as foretold."""
        self._integers = {
            path: {k: v for k, v in vars(m).items() if type(v) is int and not k.startswith("_")} for path, m in model.named_modules()
        }
        everything = [g for g in self.groups if g.size > 1]
        if self._stands(model, example, everything) is None:
            return
        folds = [self._parent[ids[ids >= 0]] for _, attribute, ids in self._books.counts if attribute is None]
        folded = np.concatenate([*folds, np.empty(0, int)])
        suspects = [g for g in everything if np.isin(g.labels, folded).any()]
        safe = [g for g in everything if g not in suspects]
        if not safe or self._stands(model, example, safe) is not None:
            suspects, safe = everything, []
        bad = {g.id: why for g in suspects if (why := self._stands(model, example, [g])) is not None}
        for group in self.groups:
            if group.id in bad:
                for member in group.members:
                    if member.side == "out":
                        self.frozen.setdefault(member.module, f"cannot shrink: {bad[group.id]}")
        self.groups = [g for g in self.groups if g.id not in bad]

    def _stands(self, model: nn.Module, example: Example, groups: Sequence[Group]) -> str | None:
        """None if the model without the first unit of these groups is as foretold, otherwise what is not."""
        kept = {g.id: torch.arange(1, g.size) for g in groups}
        alive = self._alive(self._kept(kept))
        try:
            smaller = _label(self.remove(model, kept), example)
        except Exception as error:
            return str(error).strip().split("\n")[0][:200] or type(error).__name__
        if len(smaller.nodes) != len(self._books.nodes):
            return "the forward pass takes another way"
        for (before, old), (after, new) in zip(self._books.nodes, smaller.nodes, strict=True):
            told = [tuple(int(alive[ids].sum()) for ids in t.labels) for t in old]
            if before != after or told != [t.shape for t in new]:
                return f"{before.split()[-1]} gives {[t.shape for t in new]} where {told} was needed: a size is fixed in the code"
        return None


_INNER = ("inner_dim", "inner_size", "all_head_size", "attention_dim")


def _label(model: nn.Module, example: Example) -> Labels:
    model = copy.deepcopy(model).eval()
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # transformers: a cache among the outputs cannot be exported
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(t), name) for name, t in everything}
    shapes = {name: tuple(t.shape) for name, t in everything}
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = () if kwargs else (example,) if isinstance(example, Tensor) else tuple(example)
    errors = []
    with torch.no_grad(), _plain_attention():
        if not kwargs:
            try:
                tracer = _Tracer()
                graph = fx.GraphModule(model, tracer.trace(model))
                books = Labels(graph, names, shapes, rule_of, LEAVES)
                books.run(*args)
                return books
            except Exception as error:  # whatever a forward does to a proxy
                errors.append(f"torch.fx says {_first_line(error)}")
        try:
            graph = torch.export.export(model, args, kwargs, strict=False).module(check_guards=False)
            books = Labels(graph, names, shapes, rule_of, LEAVES)
            books.run(*tree_leaves((args, kwargs)), enable_io_processing=False)
            return books
        except Exception as error:
            errors.append(f"torch.export says {_first_line(error)}")
    raise UnsupportedModel(f"cannot be traced on this example: {'; '.join(errors)}", module=type(model).__name__)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LEAVES or (m.__module__.startswith("torch.nn") and next(m.children(), None) is None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:160]}"


@contextmanager
def _plain_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _inventory(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int, bool, bool]]:
    """Each tensor once: shape, bytes an element, whether a parameter, whether in the state dict."""
    stored = model.state_dict(keep_vars=True)
    everything = [(n, t, True) for n, t in model.named_parameters()] + [(n, t, False) for n, t in model.named_buffers()]
    names = {id(t) for t in stored.values() if isinstance(t, Tensor)}
    return {n: (tuple(t.shape), t.element_size(), is_parameter, id(t) in names) for n, t, is_parameter in everything}


def _components(books: Labels) -> np.ndarray:
    a = np.concatenate([e[0] for e in books.edges] or [np.empty(0, int)])
    b = np.concatenate([e[1] for e in books.edges] or [np.empty(0, int)])
    if not books.total:
        return np.empty(0, int)
    return connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(books.total, books.total)), directed=False)[1]


def _collect(books: Labels, parent: np.ndarray) -> tuple[list[Group], dict[str, str]]:
    keys = [(name, d, ids) for name, dims in books.dims.items() for d, ids in enumerate(dims)]
    key_of, place = np.empty(books.total, int), np.empty(books.total, int)
    for i, (_, _, ids) in enumerate(keys):
        key_of[ids], place[ids] = i, np.arange(len(ids))
    marks = {}
    for what in ("made", "read", "scaled", "inexact"):
        marks[what] = np.zeros(books.total, bool)
        for ids in getattr(books, what):
            marks[what][ids[ids >= 0]] = True
    sides = np.select([marks["made"], marks["read"], marks["scaled"]], [0, 1, 2], 3)

    n = int(parent.max(initial=-1)) + 1
    has = {what: np.bincount(parent, mask, n) > 0 for what, mask in marks.items()}
    why: dict[int, str] = {}
    for ids, reason in books.frozen:
        for root in np.unique(parent[ids]).tolist():
            why.setdefault(root, reason)
    frozen: dict[str, str] = {}
    units: dict[tuple, list[np.ndarray]] = {}
    order = np.argsort(parent, kind="stable")
    for labels in np.split(order, np.cumsum(np.bincount(parent, minlength=n))[:-1]) if n else []:
        root = int(parent[labels[0]])
        if not has["made"][root]:
            continue
        if root in why or not has["read"][root]:
            for i in dict.fromkeys(key_of[labels[sides[labels] == 0]].tolist()):
                frozen.setdefault(_module(keys[i][0]), why.get(root, "is read by no layer"))
            continue
        used, counts = np.unique(key_of[labels], return_counts=True)
        units.setdefault(tuple(zip(used.tolist(), counts.tolist())), []).append(labels)
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for signature, members in units.items():
        table = np.stack(members)  # labels ascend, so that columns of one tensor's dimension lie side by side
        cells, start = {}, 0
        for key, count in signature:
            name, d, _ = keys[key]
            columns = table[:, start : start + count]
            index = place[columns]
            start += count
            side = ("out", "in", "norm", "raw")[sides[columns].min()]
            module, attribute = _module(name), name.rpartition(".")[2]
            cells.setdefault((module, side, index.tobytes()), (index, []))[1].append((attribute, d))
        found = tuple(Member(m, s, torch.from_numpy(index.copy()), tuple(t)) for (m, s, _), (index, t) in cells.items())
        first = next(m for m in found if m.side == "out")
        taken[first.module] = taken.get(first.module, 0) + 1
        name = first.module if taken[first.module] == 1 else f"{first.module}#{taken[first.module]}"
        roots = parent[table[:, 0]]
        groups.append(Group(name, found, len(table), first.index.shape[1], not has["inexact"][roots].any(), roots))
    return groups, frozen


def _module(name: str) -> str:
    return name.rpartition(".")[0]
