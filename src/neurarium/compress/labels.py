"""Every channel gets a number, the numbers travel through the network, and numbers that meet belong together.

Removing a channel is safe only together with everything that assumes it exists. Here each index of each dimension of each parameter
is one *label*. The traced graph is run once on the example; beside the values run the labels of every tensor dimension (-1 where an
index is no channel: batch, time, pixels, inputs of the model). An operation moves labels (concat joins them, flatten repeats each over
the pixels, permute reorders) and states which must live and die together: a convolution ties its input's channels to its weight's
second dimension, an addition ties both sides, normalisation ties its scale. What is not understood freezes the labels that
reach it, with the reason. At the end the connected components are the units that can be removed.

The rules carry the names of torch functions; ``torch.fx`` graphs and ``torch.export`` graphs (aten) share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

__all__ = ["Array", "Call", "Labels", "Tagged", "blank", "tagged"]

Array = np.ndarray
_FIXED = "meets a dimension of fixed size"


class Tagged:
    """What is known of a tensor: one array of labels a dimension, and where it comes from."""

    __slots__ = ("labels", "name", "zeros")

    def __init__(self, labels: Sequence[Array], name: str | None = None, zeros: bool = False) -> None:
        self.labels, self.name, self.zeros = list(labels), name, zeros

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.labels))


def blank(*shape: int) -> list[Array]:
    return [np.full(n, -1) for n in shape]


def tagged(value: Any) -> Iterator[Tagged]:
    """All tagged tensors in a structure."""
    if isinstance(value, Tagged):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tagged(inner)
    elif isinstance(value, dict):
        yield from tagged(tuple(value.values()))


class Call:
    """The arguments of one operation, found by place or by name."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self.args, self.kwargs, self.out = list(args), kwargs, out

    def __call__(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.out.shape)

    def rest(self, place: int, name: str) -> tuple[int, ...]:
        """Integers given one by one or as one sequence."""
        value = self(place, name)
        return tuple(value) if isinstance(value, (list, tuple)) else tuple(self.args[place:])


class Labels(fx.Interpreter):
    """Runs a graph and keeps the books.

    Attributes:
        dims: tensor name -> its labels a dimension.
        edges: pairs of label arrays that are tied.
        frozen: (labels, reason).
        made, read, scaled, inexact: labels of outputs, of contracted inputs, of normalisation, and those whose removal changes more
            than their own contribution (a mean over them).
        macs: (factor, label arrays): multiply-adds are the factor times the lengths.
        counts: (module, attribute, labels): an attribute that counts them. ``attribute`` None: found by name among the module's own.
        nodes: (operation, tagged outputs) in order.
    """

    def __init__(
        self, graph: fx.GraphModule, names: dict[str, str], shapes: dict[str, tuple[int, ...]],
        rule: Callable[[str], Any], leaves: dict[type, Any],
    ) -> None:  # fmt: skip
        super().__init__(graph)
        self.names, self.shapes, self.rule, self.leaves = names, shapes, rule, leaves
        self.dims: dict[str, list[Array]] = {}
        self.total = 0
        self.edges: list[tuple[Array, Array]] = []
        self.frozen: list[tuple[Array, str]] = []
        self.made, self.read, self.scaled, self.inexact = [], [], [], []
        self.macs: list[tuple[int, list[Array]]] = []
        self.counts: list[tuple[str, str | None, Array]] = []
        self.nodes: list[tuple[str, list[Tagged]]] = []
        self.tags: dict[fx.Node, Any] = {}
        self.owner = ""

    # books

    def tie(self, a: Array, b: Array) -> None:
        both = (a >= 0) & (b >= 0)
        self.edges.append((a[both], b[both]))
        self.freeze(np.concatenate([a[~both], b[~both]]), _FIXED)

    def freeze(self, labels: Array, why: str) -> None:
        labels = labels[labels >= 0]
        if len(labels):
            self.frozen.append((labels, why))

    def parameter(self, name: str) -> Tagged:
        name = self.names[name]
        if name not in self.dims:
            self.dims[name] = []
            for n in self.shapes[name]:
                self.dims[name].append(np.arange(self.total, self.total + n))
                self.total += n
        return Tagged(self.dims[name], name)

    # the run

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        args, kwargs = fx.map_arg(n.args, self.tags.get), fx.map_arg(n.kwargs, self.tags.get)
        stack = list((n.meta.get("nn_module_stack") or {}).values())
        self.owner = stack[-1][0] if stack else ""
        tags: Any = None
        if n.op == "output":
            for t in tagged(args):
                for labels in t.labels:
                    self.freeze(labels, "is an output of the model")
        elif n.op == "get_attr" and isinstance(value, Tensor) and n.target in self.names:
            tags = self.parameter(n.target)
        elif n.op in ("call_function", "call_method", "call_module") and any(isinstance(v, Tensor) for v in _leaves(value)):
            tags = self._call(n, args, kwargs, value)
        if tags is None:
            tags = _plain(value)
        self.tags[n] = tags
        self.nodes.append((f"{n.op} {n.target if isinstance(n.target, str) else operation(n.target)}", list(tagged(tags))))
        return value

    def _call(self, n: fx.Node, args: Any, kwargs: Any, value: Any) -> Any:
        call = Call(args, kwargs, value)
        try:
            if n.op == "call_module":
                module = self.fetch_attr(n.target)
                name, rule = f"{type(module).__name__} {n.target}", self.leaves.get(type(module))
                computed = isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters
                tags = rule(self, module, n.target, call) if rule and not computed else None
            else:
                name = n.target if isinstance(n.target, str) else operation(n.target)
                rule = self.rule(name)
                tags = rule(self, call) if rule else None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a use that the rule did not expect
            tags = None
        if tags is None or [t.shape for t in tagged(tags)] != [tuple(v.shape) for v in _leaves(value) if isinstance(v, Tensor)]:
            for t in tagged((args, kwargs)):
                for labels in t.labels:
                    self.freeze(labels, f"reaches {name}, which is not analysed")
            tags = None
        return tags

    # rules that several operations share

    def linear(self, x: Tagged, weight: Tagged, bias: Tagged | None, *, out: int = 0) -> Tagged:
        outs, ins = weight.labels[out], weight.labels[1 - out]
        self.tie(x.labels[-1], ins)
        self.made.append(outs), self.read.append(ins)
        self.macs.append((1, [*x.labels[:-1], outs, ins]))
        self.bias(bias, outs)
        return Tagged([*x.labels[:-1], outs])

    def bias(self, bias: Tagged | None, outs: Array) -> None:
        if bias is not None:
            self.tie(bias.labels[-1], outs)
            self.made.append(bias.labels[-1])

    def conv(self, x: Tagged, weight: Tagged, bias: Tagged | None, groups: int, transposed: bool, shape: tuple[int, ...]) -> Tagged | None:
        if len(x.labels) != len(weight.labels):
            return None  # without a batch dimension
        first, second, *kernel = weight.labels
        into = x.labels[1].reshape(groups, -1)
        path = (weight.name or "").rpartition(".")[0] or self.owner
        for pixels in x.labels[2:]:
            self.freeze(pixels, "is convolved over")
        if groups > 1 and into.shape[1] == 1 and (not transposed or len(second) == 1):  # depthwise: a unit is a group
            for outs in first.reshape(groups, -1).T:
                self.tie(into[:, 0], outs)
            self.counts.append((path, "groups", into[:, 0]))
            made = outs = first
        elif transposed:
            for part in into:
                self.tie(part, first.reshape(groups, -1)[0])
            for part in first.reshape(groups, -1):
                self.tie(part, first.reshape(groups, -1)[0])
            made, outs = second, np.tile(second, groups)
            self.read.append(first)
        else:
            for part in into:
                self.tie(part, second)
            for part in first.reshape(groups, -1):  # one width for all groups
                self.tie(part, first.reshape(groups, -1)[0])
            made = outs = first
            self.read.append(second)
        self.made.append(made)
        self.bias(bias, outs)
        places = x.shape[2:] if transposed else shape[2:]
        self.macs.append((math.prod(places) * math.prod(map(len, kernel)), [x.labels[0], first, second]))
        return Tagged([x.labels[0], outs, *blank(*shape[2:])])

    def scale(self, labels: Array, *tensors: Tagged | None) -> None:
        for t in tensors:
            if t is not None:
                self.tie(t.labels[0], labels)
                self.scaled.append(t.labels[0])

    def channels(self, x: Tagged, *tensors: Tagged | None) -> Tagged:
        self.scale(x.labels[min(1, len(x.labels) - 1)], *tensors)
        return Tagged(x.labels)

    def layer_norm(self, x: Tagged, dims: int, *tensors: Tagged | None) -> Tagged:
        for i in range(-dims, 0):
            self.inexact.append(x.labels[i])
            for t in tensors:
                if t is not None:
                    self.tie(t.labels[i], x.labels[i])
                    self.scaled.append(t.labels[i])
        return Tagged(x.labels)

    def group_norm(self, x: Tagged, groups: int, *tensors: Tagged | None) -> Tagged:
        parts = x.labels[1].reshape(groups, -1)
        if parts.shape[1] == 1:
            path = next((t.name.rpartition(".")[0] for t in tensors if t is not None and t.name), self.owner)
            self.counts.append((path, "num_groups", parts[:, 0]))
        else:
            self.inexact.append(x.labels[1])
            for part in parts[1:]:
                self.tie(part, parts[0])
        return self.channels(x, *tensors)

    def pointwise(self, operands: Sequence[Tagged], shape: tuple[int, ...]) -> Tagged:
        result = []
        for i, n in enumerate(shape):
            here = [t.labels[i - len(shape)] for t in operands if len(t.labels) >= len(shape) - i]
            here = [labels for labels in here if len(labels) == n]
            for labels in here[1:]:
                self.tie(here[0], labels)
            result.append(next((labels for labels in here if (labels >= 0).any()), np.full(n, -1)))
        return Tagged(result)

    def contract(self, operands: Sequence[Tagged], letters: Sequence[Sequence[Any]], out: Sequence[Any]) -> Tagged:
        """einsum: equal letters are tied, letters that vanish are summed over."""
        by: dict[Any, Array] = {}
        for t, word in zip(operands, letters, strict=True):
            for letter, labels in zip(word, t.labels, strict=True):
                if letter in by and len(by[letter]) == len(labels):
                    self.tie(by[letter], labels)
                if letter not in by or len(by[letter]) < len(labels) or (by[letter] < 0).all():
                    by[letter] = labels
        summed = [labels for letter, labels in by.items() if letter not in out]
        self.read += summed
        for t, word in zip(operands, letters, strict=True):
            self.read += [labels for letter, labels in zip(word, t.labels, strict=True) if letter not in out]
        if summed and len(operands) == 2:
            self.macs.append((1, list(by.values())))
        return Tagged([by[letter] for letter in out])

    def matmul(self, a: Tagged, b: Tagged) -> Tagged:
        na, nb = len(a.labels), len(b.labels)
        batch = list(range(max(na, nb, 2) - 2))
        left = [*batch[len(batch) - na + 2 :], "m", "k"] if na > 1 else ["k"]
        right = [*batch[len(batch) - nb + 2 :], "k", "n"] if nb > 1 else ["k"]
        if b.name and nb == 2:
            self.made.append(b.labels[1])
        return self.contract((a, b), (left, right), [*batch, *(["m"] if na > 1 else []), *(["n"] if nb > 1 else [])])

    def attention(self, q: Tagged, k: Tagged, v: Tagged) -> Tagged:
        lead = q.labels[:-2]
        for t in (k, v):
            for mine, other in zip(lead, t.labels[:-2], strict=True):
                if len(other) > 1 and len(mine) % len(other) == 0:
                    self.tie(mine, np.repeat(other, len(mine) // len(other)))
        for labels in (q.labels[-1], k.labels[-1]):
            self.freeze(labels, "sets the scale of attention")
        for labels in (q.labels[-2], k.labels[-2], v.labels[-2]):
            self.freeze(labels, "is attended over")
        self.macs.append((1, [*q.labels, k.labels[-2]]))
        self.macs.append((1, [*q.labels[:-1], k.labels[-2], v.labels[-1]]))
        return Tagged([*q.labels[:-1], v.labels[-1]])

    def reduce(self, x: Tagged, dims: Any, keep: bool, *, exact: bool) -> Tagged:
        n = len(x.labels)
        dims = range(n) if dims is None or dims == [] or dims == () else ([dims] if isinstance(dims, int) else dims)
        gone = {d % n for d in dims}
        for d in gone:
            self.read.append(x.labels[d])
            if not exact:
                self.inexact.append(x.labels[d])
        return Tagged([np.full(1, -1) if d in gone else labels for d, labels in enumerate(x.labels) if keep or d not in gone])

    def reshape(self, x: Tagged, shape: tuple[int, ...]) -> Tagged | None:
        if 0 in shape:
            return None
        result: list[Array] = blank(*shape)
        source = [labels for labels in x.labels if len(labels) > 1]
        target = [i for i, n in enumerate(shape) if n > 1]
        for labels in x.labels:
            if len(labels) == 1:
                self.freeze(labels, "is the only one of its kind")
        while source:
            block, places = [source.pop(0)], [target.pop(0)]
            while (a := math.prod(map(len, block))) != (b := math.prod(shape[i] for i in places)):
                if a < b:
                    block.append(source.pop(0))
                else:
                    places.append(target.pop(0))
            for i, labels in zip(places, self._refold(block, [shape[i] for i in places]), strict=True):
                result[i] = labels
        return Tagged(result)

    def _refold(self, block: list[Array], shape: list[int]) -> list[Array]:
        live = [i for i, labels in enumerate(block) if (labels >= 0).any()]
        if len(live) != 1:
            for labels in block:
                self.freeze(labels, "is flattened together with other channels")
            return blank(*shape)
        full = np.broadcast_to(block[live[0]].reshape([-1 if i == live[0] else 1 for i in range(len(block))]), [len(b) for b in block])
        full = full.reshape(shape)
        result = blank(*shape)
        rows = [np.moveaxis(full, i, 0).reshape(n, -1) for i, n in enumerate(shape)]
        for i, table in enumerate(rows):
            if (table == table[:, :1]).all():  # the channels lie along this dimension already
                result[i] = table[:, 0].copy()
                return result
        # channels become (heads, head size) or (3, heads, head size): a unit is a head
        i = 1 if len(shape) > 2 and shape[0] <= 3 else 0
        for column in rows[i].T[1:]:
            self.tie(rows[i][:, 0], column)
        result[i] = rows[i][:, 0].copy()
        self.counts += [(self.owner, None, result[i]), (self.owner, None, full.ravel())]
        return result

    def pieces(self, x: Tagged, dim: int, sizes: Sequence[int]) -> tuple[Tagged, ...]:
        cuts = np.cumsum(sizes)[:-1]
        return tuple(Tagged([part if i == dim % len(x.labels) else labels for i, labels in enumerate(x.labels)])
                     for part in np.split(x.labels[dim], cuts))  # fmt: skip

    def rnn(self, x: Tagged, weights: list[list[Tagged]], states: Sequence[Tagged], two: bool, last: Sequence[Any]) -> Any:
        """One hidden size for all layers and directions: a unit is removed in all of them."""
        directions, hidden = 2 if two else 1, weights[0][1].labels[1]
        for state in states:
            if not state.zeros:
                self.freeze(hidden, "has an initial state of fixed size")
                for labels in state.labels:
                    self.freeze(labels, "is an initial state")
        for i, (into, again, *biases) in enumerate(weights):
            self.tie(into.labels[1], x.labels[-1] if i < directions else np.tile(hidden, directions))
            self.tie(again.labels[1], hidden)
            self.read += [into.labels[1], again.labels[1]]
            for t in (into, again, *biases):
                self.tie(t.labels[0], np.tile(hidden, len(t.labels[0]) // len(hidden)))
                self.made.append(t.labels[0])
            self.macs += [(1, [*x.labels[:-1], *into.labels]), (1, [*x.labels[:-1], *again.labels])]
        return Tagged([*x.labels[:-1], np.tile(hidden, directions)]), tuple(Tagged([*blank(*t.shape[:-1]), hidden]) for t in last)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tagged(blank(*value.shape))
    if type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    return value


def operation(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))
