"""Exact derivatives of networks and formulas by truncated Taylor arithmetic ("jets", or multivariate Taylor mode).

A jet carries a function's value and its derivatives with respect to the coordinates through a computation, all points at once. The set
of derivatives is any downward-closed set of multi-indices (:class:`Orders`), so ``u_t`` and ``u_xx`` cost four streams, not the six of
a full second-order expansion. Each stream holds a *normalised* coefficient ``c_a = d^a u / a!``, which makes every rule short:

* product (Leibniz):  ``(p q)_a = sum_{b <= a} p_b q_{a-b}``
* ``y = f(z)`` (chain): ``a_i y_a = sum_{0 < b <= a, b_i > 0} b_i z_b w_{a-b}`` for any axis i with ``a_i > 0``, where w is the jet of
  ``f'(z)``. If f solves a differential equation (``tanh' = 1 - tanh^2``), w is built from y along the way. One recursion serves every
  order and mixed derivative.
* linear layer: the same matrix on every stream, the bias on the value alone.

A :class:`Jet` answers ``torch.tanh``, ``torch.cat``, ``nn.functional.linear`` and the like, so an ordinary ``nn.Module`` made of them
takes a jet in place of a tensor, and a formula ``x**2 * torch.cos(math.pi * x)`` is written once for both. What has no rule raises
``TypeError``. Everything is plain differentiable torch code: ``backward``, ``torch.func`` and ``torch.compile`` go through it.

*Source*: Griewank and Walther, Evaluating Derivatives, 2nd ed., chapter 13 (univariate rules); the multivariate recursion follows by
applying the univariate one along an axis.
*Cost*: one matrix product a layer over all streams; an elementwise function costs about (pairs b <= a) fused multiply-adds a point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput

__all__ = ["Jet", "Orders", "Record", "coordinates", "derivatives_by_autograd"]

Index = tuple[int, ...]


class Orders:
    """The derivatives that a jet carries: the downward closure of what is wanted.

    ``Orders(("x", "t"), {"xx", "t"})`` holds ``u``, ``u_x``, ``u_xx`` and ``u_t``. A key is coordinate names in a row ("xxt"; the order
    does not matter); ``""`` is the value. Indices are in order of total degree, so that a stream depends on earlier ones only.
    """

    def __init__(self, coords: Sequence[str], wanted: Iterable[str] = ()) -> None:
        self.coords = tuple(coords)
        if len(set(self.coords)) != len(self.coords) or not all(self.coords):
            raise BadInput(f"coordinate names must be distinct and not empty, got {self.coords}")
        tops = {self.index(key) for key in wanted} | {(0,) * len(self.coords)}
        closed = {below for top in tops for below in product(*(range(n + 1) for n in top))}
        self.indices: tuple[Index, ...] = tuple(sorted(closed, key=lambda a: (sum(a), a[::-1])))
        self.position = {a: k for k, a in enumerate(self.indices)}
        self.factorials = tuple(math.prod(math.factorial(n) for n in a) for a in self.indices)
        pairs = [[(b, tuple(n - m for n, m in zip(a, b))) for b in self.indices if all(m <= n for m, n in zip(b, a))] for a in self.indices]
        #: for each stream the pairs (b, a-b) of the product rule
        self.products = tuple(tuple((self.position[b], self.position[d]) for b, d in of) for of in pairs)
        #: for each stream but the first the terms (b_i / a_i, b, a-b) of the chain rule, i the first axis with a_i > 0
        self.chains = tuple(
            tuple((b[i] / a[i], self.position[b], self.position[d]) for b, d in of if b[i] > 0)
            for a, of in list(zip(self.indices, pairs))[1:]
            for i in [next(i for i, n in enumerate(a) if n)]
        )
        #: streams of f'(z) that the chain rule asks for
        self.inner = frozenset(d for terms in self.chains for _, _, d in terms)

    def index(self, key: str) -> Index:
        """The multi-index of a key: "xxt" -> (2, 1)."""
        names = re.findall("|".join(sorted(map(re.escape, self.coords), key=len, reverse=True)), key)
        if "".join(names) != key:
            raise BadInput(f"{key!r} is not made of the coordinates {self.coords}")
        return tuple(names.count(c) for c in self.coords)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        keys = ["".join(c * n for c, n in zip(self.coords, a)) or "value" for a in self.indices]
        return f"Orders({', '.join(keys)})"


@lru_cache(maxsize=256)
def orders(coords: tuple[str, ...], wanted: frozenset[str]) -> Orders:
    """A cached :class:`Orders`: its tables are built once for a problem."""
    return Orders(coords, wanted)


class Record:
    """What a linear layer did on the way: its weight and bias, the stacked streams that went in and came out, ``(streams, n, width)``."""

    __slots__ = ("bias", "inputs", "outputs", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor) -> None:
        self.weight, self.bias, self.inputs, self.outputs = weight, bias, inputs, outputs


class Jet:
    """A value and its derivatives: ``streams[k]`` is the normalised Taylor coefficient of ``orders.indices[k]``, all of one shape.

    ``jet["xx"]`` is the ordinary second derivative, ``jet.value`` the value, ``jet[..., 0]`` a part of every stream. With a ``tape``
    (a list) every linear layer that the jet passes leaves a :class:`Record` in it, of which Jacobians are made.
    """

    __slots__ = ("orders", "streams", "tape")

    def __init__(self, streams: Sequence[Tensor], orders: Orders, tape: list[Record] | None = None) -> None:
        if len(streams) != len(orders):
            raise BadInput(f"{orders} needs {len(orders)} streams, got {len(streams)}")
        self.streams, self.orders, self.tape = tuple(streams), orders, tape

    @classmethod
    def constant(cls, value: Tensor, orders: Orders, tape: list[Record] | None = None) -> Jet:
        """A jet whose derivatives are zero."""
        zero = torch.zeros_like(value)
        return cls([value] + [zero] * (len(orders) - 1), orders, tape)

    @property
    def value(self) -> Tensor:
        return self.streams[0]

    @property
    def shape(self) -> torch.Size:
        return self.streams[0].shape

    @property
    def ndim(self) -> int:
        return self.streams[0].ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.streams[0].dtype

    @property
    def device(self) -> torch.device:
        return self.streams[0].device

    def dim(self) -> int:
        return self.streams[0].ndim

    def size(self, dim: int | None = None) -> Any:
        return self.streams[0].size() if dim is None else self.streams[0].size(dim)

    def derivative(self, key: str) -> Tensor:
        """The ordinary derivative ``jet.derivative("xx")``; shape of the value."""
        index = self.orders.index(key)
        if index not in self.orders.position:
            raise BadInput(f"the derivative {key!r} is not carried by {self.orders}")
        k = self.orders.position[index]
        return self.streams[k] * self.orders.factorials[k] if self.orders.factorials[k] != 1 else self.streams[k]

    def map(self, f: Callable[[Tensor], Tensor]) -> Jet:
        """``f`` on every stream; right for linear maps without offset: reshape, sum, index."""
        return Jet([f(s) for s in self.streams], self.orders, self.tape)

    def __getitem__(self, key: Any) -> Any:
        return self.derivative(key) if isinstance(key, str) else self.map(lambda s: s[key])

    def __repr__(self) -> str:
        return f"Jet(shape={tuple(self.shape)}, {self.orders})"

    def __add__(self, other: Any) -> Jet:
        return add(self, other)

    def __sub__(self, other: Any) -> Jet:
        return add(self, -other)

    def __rsub__(self, other: Any) -> Jet:
        return add(-self, other)

    def __mul__(self, other: Any) -> Jet:
        return mul(self, other)

    def __truediv__(self, other: Any) -> Jet:
        return div(self, other)

    def __rtruediv__(self, other: Any) -> Jet:
        return div(other, self)

    def __pow__(self, exponent: float) -> Jet:
        return power(self, exponent)

    def __neg__(self) -> Jet:
        return self.map(torch.neg)

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        return NotImplemented if rule is None else rule(*args, **(kwargs or {}))


# Arithmetic ------------------------------------------------------------------------------------------------------------------------


def _pair(a: Any, b: Any) -> tuple[Jet, Jet]:
    if a.orders is not b.orders and a.orders.indices != b.orders.indices:
        raise BadInput(f"two jets of different orders do not mix: {a.orders} and {b.orders}")
    return a, b


def add(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    b = b if alpha == 1 else b * alpha
    if not isinstance(a, Jet):
        a, b = b, a
    if isinstance(b, Jet):
        _pair(a, b)
        return Jet([p + q for p, q in zip(a.streams, b.streams)], a.orders, a.tape)
    value = a.value + b  # a constant meets the value alone
    return Jet([value, *(s.expand(value.shape) for s in a.streams[1:])], a.orders, a.tape)


def sub(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    return add(a, -b, alpha=alpha)


def mul(a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        return a.map(lambda s: s * b)
    _pair(a, b)
    return Jet([_leibniz(a.streams, b.streams, pairs) for pairs in a.orders.products], a.orders, a.tape)


def _leibniz(p: Sequence[Tensor], q: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    total: Any = 0
    for b, d in pairs:
        total = total + p[b] * q[d]
    return total


def _square(p: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    total: Any = 0
    for b, d in pairs:  # each mixed pair once, doubled
        if b <= d:
            total = total + (p[b] * p[d] if b == d else 2 * p[b] * p[d])
    return total


def div(a: Any, b: Any) -> Jet:
    """``c = a / b`` solved from ``a = b c``, lowest order first."""
    if not isinstance(b, Jet):
        return a.map(lambda s: s / b)
    if not isinstance(a, Jet):
        a = Jet.constant(torch.as_tensor(a, dtype=b.dtype, device=b.device).expand(b.shape), b.orders, b.tape)
    _pair(a, b)
    c: list[Tensor] = []
    for k, pairs in enumerate(a.orders.products):
        known = [(i, j) for i, j in pairs if i > 0]
        c.append((a.streams[k] - _leibniz(b.streams, c, known) if known else a.streams[k]) / b.value)
    return Jet(c, a.orders, a.tape)


def power(z: Any, exponent: Any) -> Jet:
    """``z ** p`` for a number p. Whole p >= 0 by repeated multiplication (z may be zero), other p by ``y' = p y z' / z``."""
    if isinstance(exponent, (Jet, Tensor)) or not isinstance(z, Jet):
        raise TypeError("a jet's exponent must be a number; write exp(p * log(z)) for a varying one")
    if exponent == int(exponent) and exponent >= 0:
        half = power(z, exponent // 2) if exponent > 1 else None
        if half is None:
            return z if exponent == 1 else Jet.constant(torch.ones_like(z.value), z.orders, z.tape)
        return mul(mul(half, half), z) if exponent % 2 else mul(half, half)
    w: list[Tensor] = []

    def slope(k: int, y: list[Tensor]) -> Tensor:  # w = p y / z, one order at a time
        known = [(i, j) for i, j in z.orders.products[k] if i > 0]
        w.append((exponent * y[k] - _leibniz(z.streams, w, known) if known else exponent * y[k]) / z.value)
        return w[k]

    return _chain(z, z.value**exponent, slope, every=True)


# Functions -------------------------------------------------------------------------------------------------------------------------


def _chain(z: Jet, value: Tensor, slope: Callable[[int, list[Tensor]], Tensor], *, every: bool = False) -> Jet:
    """``y = f(z)``: ``slope(k, y)`` is stream k of ``f'(z)``, asked for when streams 0..k of y are known and only if it is used."""
    y, w = [value], [slope(0, [value])]
    for k, terms in enumerate(z.orders.chains, 1):
        total: Any = 0
        for c, b, d in terms:
            total = total + (z.streams[b] * w[d] if c == 1 else c * z.streams[b] * w[d])
        y.append(total)
        w.append(slope(k, y) if every or k in z.orders.inner else total)  # the latter is never read
    return Jet(y, z.orders, z.tape)


def tanh(z: Jet) -> Jet:
    pairs = z.orders.products
    return _chain(z, torch.tanh(z.value), lambda k, y: -_square(y, pairs[k]) if k else 1 - y[0] * y[0])


def sigmoid(z: Jet) -> Jet:
    pairs = z.orders.products
    return _chain(z, torch.sigmoid(z.value), lambda k, y: y[k] - _square(y, pairs[k]))


def exp(z: Jet) -> Jet:
    return _chain(z, torch.exp(z.value), lambda k, y: y[k])


def log(z: Jet) -> Jet:
    w = div(1.0, z).streams
    return _chain(z, torch.log(z.value), lambda k, y: w[k])


def sqrt(z: Jet) -> Jet:
    return power(z, 0.5)


def _sin_cos(z: Jet) -> tuple[Jet, Jet]:
    s, c = [torch.sin(z.value)], [torch.cos(z.value)]
    for terms in z.orders.chains:
        up: Any = 0
        down: Any = 0
        for f, b, d in terms:
            fz = z.streams[b] if f == 1 else f * z.streams[b]
            up, down = up + fz * c[d], down - fz * s[d]
        s.append(up)
        c.append(down)
    return Jet(s, z.orders, z.tape), Jet(c, z.orders, z.tape)


def sin(z: Jet) -> Jet:
    return _sin_cos(z)[0]


def cos(z: Jet) -> Jet:
    return _sin_cos(z)[1]


def erf(z: Jet) -> Jet:
    w = (exp(-(z * z)) * (2 / math.sqrt(math.pi))).streams
    return _chain(z, torch.erf(z.value), lambda k, y: w[k])


def silu(z: Jet, inplace: bool = False) -> Jet:
    del inplace
    return z * sigmoid(z)


def softplus(z: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    w = sigmoid(z * beta).streams
    return _chain(z, F.softplus(z.value, beta, threshold), lambda k, y: w[k])


def gelu(z: Jet, approximate: str = "none") -> Jet:
    if approximate == "tanh":
        return 0.5 * z * (1 + tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + erf(z * math.sqrt(0.5)))


def linear(z: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    """``weight @ z + bias`` on the last axis: one stacked matrix product."""
    inputs = torch.stack(z.streams)  # (streams, n, in)
    outputs = inputs @ weight.t()
    if bias is not None:
        outputs = torch.cat([outputs[:1] + bias, outputs[1:]]) if len(z.orders) > 1 else outputs + bias
    if z.tape is not None and outputs.requires_grad:
        z.tape.append(Record(weight, bias, inputs, outputs))
    return Jet(outputs.unbind(0), z.orders, z.tape)


def cat(jets: Sequence[Any], dim: int = 0) -> Jet:
    first = next(j for j in jets if isinstance(j, Jet))
    full = [j if isinstance(j, Jet) else Jet.constant(j, first.orders) for j in jets]
    dim = dim % first.ndim
    return Jet([torch.cat(s, dim) for s in zip(*(j.streams for j in full))], first.orders, first.tape)


def stack(jets: Sequence[Any], dim: int = 0) -> Jet:
    first = next(j for j in jets if isinstance(j, Jet))
    full = [j if isinstance(j, Jet) else Jet.constant(j, first.orders) for j in jets]
    return Jet([torch.stack(s, dim) for s in zip(*(j.streams for j in full))], first.orders, first.tape)


_RULES: dict[Any, Callable[..., Any]] = {
    torch.tanh: tanh, torch.sigmoid: sigmoid, torch.exp: exp, torch.log: log, torch.sqrt: sqrt, torch.sin: sin, torch.cos: cos,
    torch.erf: erf, F.silu: silu, F.softplus: softplus, F.gelu: gelu, F.linear: linear, torch.cat: cat, torch.stack: stack,
    torch.add: add, torch.sub: sub, torch.mul: mul, torch.div: div, torch.pow: power, torch.neg: lambda z: -z,
    torch.square: lambda z: z * z, torch.reciprocal: lambda z: 1.0 / z,
    torch.zeros_like: lambda z: Jet.constant(torch.zeros_like(z.value), z.orders, z.tape),
    torch.ones_like: lambda z: Jet.constant(torch.ones_like(z.value), z.orders, z.tape),
    Tensor.add: add, Tensor.sub: sub, Tensor.mul: mul, Tensor.div: div, Tensor.__add__: add, Tensor.__radd__: add,
    Tensor.__sub__: sub, Tensor.__rsub__: lambda a, b: add(-a, b), Tensor.__mul__: mul, Tensor.__rmul__: mul,
    Tensor.__truediv__: div, Tensor.__rtruediv__: lambda a, b: div(b, a),
}  # fmt: skip


# Where jets begin ------------------------------------------------------------------------------------------------------------------


def coordinates(points: Tensor, orders: Orders, tape: list[Record] | None = None) -> dict[str, Jet]:
    """The coordinates of ``points`` (n, coordinates) as jets of shape (n,): ``x`` has ``x_x = 1`` and no other derivative."""
    if points.ndim != 2 or points.shape[1] != len(orders.coords):
        raise BadInput(f"points must be (n, {len(orders.coords)}) for the coordinates {orders.coords}, got {tuple(points.shape)}")
    zero, one = points.new_zeros(len(points)), points.new_ones(len(points))
    jets = {}
    for i, name in enumerate(orders.coords):
        unit = tuple(int(j == i) for j in range(len(orders.coords)))
        streams = [one if a == unit else zero for a in orders.indices]
        streams[0] = points[:, i]
        jets[name] = Jet(streams, orders, tape)
    return jets


def derivatives_by_autograd(f: Callable[[Tensor], Tensor], points: Tensor, orders: Orders) -> Jet:
    """The jet of any pointwise ``f``: (n, coordinates) -> (n, channels) by nested ``torch.autograd.grad``.

    The way out for modules without jet rules, and the oracle of the rules: slow (one more backward pass an order and channel), not
    compilable, and no Jacobian records.
    """
    points = points.detach().requires_grad_(True)
    with torch.enable_grad():
        value = f(points)
        channels = []
        for channel in value.unbind(1):
            known: dict[Index, Tensor] = {orders.indices[0]: channel}
            gradients: dict[Index, Tensor] = {}
            for a in orders.indices[1:]:
                i = next(i for i, n in enumerate(a) if n)
                below = tuple(n - (j == i) for j, n in enumerate(a))
                if below not in gradients:
                    gradients[below] = _gradient(known[below], points)
                known[a] = gradients[below][:, i]
            channels.append([known[a] / f for a, f in zip(orders.indices, orders.factorials)])
    return Jet([torch.stack(s, 1) for s in zip(*channels)], orders)


def _gradient(y: Tensor, points: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(points)
    (g,) = torch.autograd.grad(y.sum(), points, create_graph=True, allow_unused=True)
    return torch.zeros_like(points) if g is None else g


def takes_jets(module: nn.Module, width: int) -> bool:
    """Whether ``module`` computes with jets: it is tried on one point."""
    parameter = next(module.parameters(), torch.zeros(()))
    probe = Orders(("x",), {"x"})
    try:
        out = module(Jet.constant(torch.zeros(1, width, dtype=parameter.dtype, device=parameter.device), probe))
    except (TypeError, AttributeError):
        return False
    return isinstance(out, Jet)
