"""What an integer network must compute, in numpy's int64 and from the definitions: the reference that the network agrees with bit for bit.

With ``dyadic=False`` rescaling multiplies by the real factor in float64 and rounds to nearest: the fake-quantised network with the same
grids. The two differ where a dyadic number's 2^-31 decides a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurarium.compress.quant import integer as ops
from neurarium.compress.quant.integer import IntegerNetwork

__all__ = ["simulate"]

Array = np.ndarray


def simulate(network: IntegerNetwork, *codes: Tensor, dyadic: bool = True) -> tuple[Tensor, ...]:
    """The integer outputs (int64) for integer inputs, as ``network.core`` gives them.

    Args:
        codes: of :meth:`IntegerNetwork.encode`.
        dyadic: rescale by m / 2^e, else by the real factors.
    """
    values: list[Any] = [c.cpu().numpy().astype(np.int64) for c in codes]
    for step, places in zip(network.core.steps, network.core.wiring, strict=True):
        inputs = [values[p] for p in places]
        if isinstance(step, ops.Rescale | ops.Leaky):
            values.append(_rescale(step, inputs[0], dyadic) if isinstance(step, ops.Rescale) else _leaky(step, inputs[0], dyadic))
        else:
            values.append(_STEPS[type(step)](step, *inputs))
    return tuple(torch.from_numpy(np.ascontiguousarray(values[p])) for p in network.core.outputs)


def _rescale(step: ops.Rescale, x: Array, dyadic: bool) -> Array:
    shape = [1] * x.ndim
    if step.axis is not None:
        shape[step.axis] = -1
    m, e = (t.cpu().numpy().reshape(shape) if step.axis is not None else int(t) for t in (step.multiplier, step.shift))
    if dyadic:
        offset = 0 if step.offset is None else step.offset.cpu().numpy().reshape(shape)
        y = (x * m + offset + (np.int64(1) << (e - 1))) >> e
    else:
        parts = np.asarray(step.factor).reshape(1 if step.offset is None else 2, -1)
        factor = parts[0].reshape(shape) if step.axis is not None else parts[0][0]
        y = np.floor(x * factor + (0 if step.offset is None else parts[1].reshape(shape)) + 0.5).astype(np.int64)
    return np.clip(y, step.low, step.high)


def _leaky(step: ops.Leaky, x: Array, dyadic: bool) -> Array:
    return np.where(x >= 0, x, _rescale(step.negative, x, dyadic))


def _product(step: ops.Product, x: Array) -> Array:
    w, bias = step.weight().cpu().numpy().astype(np.int64), step.bias.cpu().numpy().astype(np.int64)
    if not step.stride:
        return np.einsum("...i,oi->...o", x, w) + bias
    n = len(step.stride)
    sides = [(0, 0), (0, 0)] + [(step.padding[2 * i], step.padding[2 * i + 1]) for i in reversed(range(n))]
    x = np.pad(x, [(max(a, 0), max(b, 0)) for a, b in sides])
    x = x[tuple(slice(max(-a, 0), s - max(-b, 0)) for (a, b), s in zip(sides, x.shape, strict=True))]
    size = [(x.shape[2 + i] - step.dilation[i] * (w.shape[2 + i] - 1) - 1) // step.stride[i] + 1 for i in range(n)]
    out = np.zeros((len(x), len(w), *size), np.int64)
    into, many = w.shape[1], len(w) // step.groups
    for tap in product(*(range(k) for k in w.shape[2:])):
        at = tuple(slice(t * d, t * d + (s - 1) * st + 1, st) for t, d, s, st in zip(tap, step.dilation, size, step.stride, strict=True))
        seen = x[(slice(None), slice(None), *at)]
        for g in range(step.groups):
            rows = slice(g * many, (g + 1) * many)
            out[:, rows] += np.einsum("bi...,oi->bo...", seen[:, g * into : (g + 1) * into], w[(rows, slice(None), *tap)])
    return out + bias.reshape(-1, *[1] * n)


def _max_pool(step: ops.MaxPool, x: Array) -> Array:
    kernel, stride, padding, dilation, ceil = step.options
    k, s, p, d = ((v, v) if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding, dilation))
    size = []
    for i in range(2):
        room = x.shape[2 + i] + 2 * p[i] - d[i] * (k[i] - 1) - 1
        count = (room + (s[i] - 1 if ceil else 0)) // s[i] + 1
        size.append(count - 1 if ceil and (count - 1) * s[i] >= x.shape[2 + i] + p[i] else count)
    y = np.full((*x.shape[:2], *size), -(2**40), np.int64)
    for row, column in product(range(size[0]), range(size[1])):
        for a, b in product(range(k[0]), range(k[1])):
            i, j = row * s[0] - p[0] + a * d[0], column * s[1] - p[1] + b * d[1]
            if 0 <= i < x.shape[2] and 0 <= j < x.shape[3]:
                y[:, :, row, column] = np.maximum(y[:, :, row, column], x[:, :, i, j])
    return y


def _sum_pool(step: ops.SumPool, x: Array) -> Array:
    if step.dims:
        return x.sum(tuple(step.dims), keepdims=step.keep)
    n = len(step.kernel)
    first = x.ndim - n
    x = np.pad(x, [(0, 0)] * first + [(step.padding[2 * i], step.padding[2 * i + 1]) for i in reversed(range(n))])
    size = [(x.shape[first + i] - step.kernel[i]) // step.stride[i] + 1 for i in range(n)]
    total = np.zeros((*x.shape[:first], *size), np.int64)
    for tap in product(*map(range, step.kernel)):
        total += x[(..., *(slice(t, t + (s - 1) * st + 1, st) for t, s, st in zip(tap, size, step.stride, strict=True)))]
    return total


def _upsample(step: ops.Upsample, x: Array) -> Array:
    for i, factor in enumerate(step.factors):
        x = np.repeat(x, factor, 2 + i)
    return x


def _dilate(step: ops.Dilate, x: Array) -> Array:
    size = [(s - 1) * f + 1 for s, f in zip(x.shape[2:], step.factors, strict=True)]
    y = np.zeros((*x.shape[:2], *size), np.int64)
    y[(slice(None), slice(None), *(slice(None, None, f) for f in step.factors))] = x
    return y


def _replay(step: ops.Replay, *inputs: Any) -> Any:
    """Sums, products, clipping and joining by numpy; what only moves codes as it is."""
    name = getattr(step.target, "__name__", step.target)
    if name in ("add", "sub", "_int_product"):
        return {"add": np.add, "sub": np.subtract, "_int_product": np.multiply}[name](*inputs)
    if name == "clamp":
        low, high = step.args[1:]
        return np.clip(inputs[0], low, high)
    if name == "_joined":
        return np.concatenate(inputs, step.args[1])
    out = step(*map(_torch, inputs))
    return out.numpy() if isinstance(out, Tensor) else tuple(o.numpy() for o in out) if _tensors(out) else out


def _torch(value: Any) -> Any:
    if isinstance(value, Array):
        return torch.from_numpy(np.ascontiguousarray(value))
    return tuple(map(_torch, value)) if isinstance(value, tuple) and value and isinstance(value[0], Array) else value


def _tensors(value: Any) -> bool:
    return isinstance(value, tuple | list) and bool(value) and isinstance(value[0], Tensor)


_STEPS: dict[type, Callable[..., Any]] = {
    ops.Product: _product, ops.MaxPool: _max_pool, ops.SumPool: _sum_pool, ops.Upsample: _upsample, ops.Dilate: _dilate,
    ops.Replay: _replay, ops.Constant: lambda step: step.value.cpu().numpy().astype(np.int64),
}  # fmt: skip
