"""What each torch operation does to the labels of channels: the table for functions and methods.

A rule gets the books (:class:`~neurarium.compress.labels.Labels`) and the call, and returns the tagged output, or None if it cannot tell
(the labels are then frozen by the caller). Functions, tensor methods and aten operators of one name share a rule: they have the same
arguments except where a rule says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from neurarium.compress.labels import Call, Labels, Tagged, blank, tagged

__all__ = ["gated", "pixels", "pointwise", "prelu", "reshape", "rule_of", "softmax"]

Rule = Callable[[Labels, Call], Any]

_POINTWISE = [
    "add", "sub", "mul", "div", "truediv", "true_divide", "rsub", "radd", "rmul", "iadd", "imul", "isub", "itruediv", "pow",
    "maximum", "minimum", "fmod", "remainder", "where", "masked_fill", "relu", "relu6", "gelu", "silu", "mish", "elu", "selu",
    "celu", "leaky_relu", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "logsigmoid", "log_sigmoid",
    "tanhshrink", "threshold", "sigmoid", "tanh", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "neg",
    "abs", "sign", "sin", "cos", "erf", "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num", "round", "floor", "ceil", "lerp",
    "addcmul", "addcdiv", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "logical_and", "logical_or", "logical_not",
    "bitwise_not", "bitwise_and", "bitwise_or", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
    "alpha_dropout", "feature_alpha_dropout", "clone", "contiguous", "detach", "alias", "to", "float", "double", "half",
    "bfloat16", "type", "type_as", "lift_fresh_copy", "_to_copy", "requires_grad", "zeros_like", "ones_like", "positive",
    "identity",
]  # fmt: skip
_RESHAPE = "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as ravel".split()  # noqa: SIM905


def rule_of(name: str) -> Rule | None:
    """The rule for an operation's name: with in-place and operator underscores ignored."""
    for key in (name, name.rstrip("_"), name.strip("_")):
        if key in _RULES:
            return _RULES[key]
    if re.search(r"pool[123]d|interpolate|upsample", name):
        return pixels
    return None


def pointwise(books: Labels, call: Call) -> Tagged:
    return books.pointwise(list(tagged((call.args, call.kwargs))), call.shape)


def reshape(books: Labels, call: Call) -> Tagged | None:
    return books.reshape(call(0, "input"), call.shape)


def pixels(books: Labels, call: Call) -> Tagged | None:
    """Pooling and resizing: channels stay, pixels are mixed."""
    x = call(0, "input")
    if not hasattr(call.out, "shape"):
        return None
    for labels in x.labels[2:]:
        books.freeze(labels, "is pooled over")
    return Tagged([*x.labels[:2], *blank(*call.shape[2:])])


def _pad(books: Labels, call: Call) -> Tagged | None:
    x, pads = call(0, "input"), call(1, "pad")
    mode, labels = call(2, "mode", "constant"), list(x.labels)
    for i in range(len(pads) // 2):
        before, after, d = pads[2 * i], pads[2 * i + 1], len(labels) - 1 - i
        if before == after == 0:
            continue
        if mode not in ("constant", None) or min(before, after) < 0:
            books.freeze(labels[d], "is padded by its own values")
            labels[d] = np.full(call.shape[d], -1)
        else:
            labels[d] = np.concatenate([np.full(before, -1), labels[d], np.full(after, -1)])
    return Tagged(labels)


def _linear(books: Labels, call: Call) -> Tagged:
    return books.linear(call(0, "input"), call(1, "weight"), call(2, "bias"))


def _conv(books: Labels, call: Call) -> Tagged | None:
    return books.conv(call(0, "input"), call(1, "weight"), call(2, "bias"), call(6, "groups", 1), False, call.shape)


def _conv_transpose(books: Labels, call: Call) -> Tagged | None:
    return books.conv(call(0, "input"), call(1, "weight"), call(2, "bias"), call(6, "groups", 1), True, call.shape)


def _batch_norm(books: Labels, call: Call) -> Tagged:
    """Functional and aten order differ, but all four tensors lie along the channels."""
    x, *rest = tagged((call.args, call.kwargs))
    return books.channels(x, *rest)


def _layer_norm(books: Labels, call: Call) -> Tagged:
    tensors = [t for t in (call(2, "weight"), call(3, "bias")) if isinstance(t, Tagged)]
    return books.layer_norm(call(0, "input"), len(call(1, "normalized_shape")), *tensors)


def _group_norm(books: Labels, call: Call) -> Tagged:
    return books.group_norm(call(0, "input"), call(1, "num_groups"), call(2, "weight"), call(3, "bias"))


def _embedding(books: Labels, call: Call) -> Tagged:
    a, b = call(0, "input"), call(1, "weight")
    weight, index = (a, b) if a.name and not b.name else (b, a)  # aten has the weight first
    books.made.append(weight.labels[1])
    return Tagged([*index.labels, weight.labels[1]])


def prelu(books: Labels, call: Call) -> Tagged:
    x, weight = call(0, "input"), call(1, "weight")
    return books.channels(x, weight) if len(weight.labels[0]) > 1 else Tagged(x.labels)


def _matmul(books: Labels, call: Call) -> Tagged:
    return books.matmul(call(0, "input"), call(1, "other") or call(1, "mat2"))


def _addmm(books: Labels, call: Call) -> Tagged:
    bias, a, b = call(0, "input"), call(1, "mat1"), call(2, "mat2")
    product = books.matmul(a, b)
    if bias.name and b.name:
        books.bias(bias, product.labels[-1])
        return product
    return books.pointwise([product, bias], call.shape)


def _einsum(books: Labels, call: Call) -> Tagged | None:
    equation, operands = call.args[0], list(tagged(call.args[1:]))
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    words = left.split(",")
    for t, word in zip(operands, words, strict=True):
        if t.name:  # a weight: its summed letters are read, the others made
            books.made += [labels for letter, labels in zip(word, t.labels, strict=True) if letter in out]
    return books.contract(operands, words, out)


def _attention(books: Labels, call: Call) -> Tagged:
    q, k, v, mask = call(0, "query"), call(1, "key"), call(2, "value"), call(3, "attn_mask")
    for labels in mask.labels if isinstance(mask, Tagged) else ():
        books.freeze(labels, "is a mask")
    return books.attention(q, k, v)


def softmax(books: Labels, call: Call) -> Tagged:
    x = call(0, "input")
    books.freeze(x.labels[call(1, "dim", -1)], "is normalised by a softmax")
    return Tagged(x.labels)


def _cumulative(books: Labels, call: Call) -> Tagged:
    x = call(0, "input")
    books.freeze(x.labels[call(1, "dim", -1)], "is accumulated in order")
    return Tagged(x.labels)


def _reducing(exact: bool) -> Rule:
    def rule(books: Labels, call: Call) -> Tagged | None:
        x = call(0, "input")
        dims = call(1, "dim", call.kwargs.get("axis"))
        if not hasattr(call.out, "shape") or isinstance(dims, bool):
            return None
        return books.reduce(x, dims, len(call.shape) == len(x.labels) and len(x.labels) > 0, exact=exact)

    return rule


def _permute(books: Labels, call: Call) -> Tagged:
    x = call(0, "input")
    return Tagged([x.labels[d] for d in call.rest(1, "dims")])


def _transpose(books: Labels, call: Call) -> Tagged:
    labels = list(call(0, "input").labels)
    a, b = (call(1, "dim0"), call(2, "dim1")) if len(call.args) + len(call.kwargs) > 1 else (0, -1)
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]
    return Tagged(labels)


def _attribute(books: Labels, call: Call) -> Tagged | None:
    """``x.T``, ``x.mT`` in a symbolic trace."""
    x, name = call.args[:2]
    if name == "T":
        return Tagged(x.labels[::-1])
    return Tagged([*x.labels[:-2], x.labels[-1], x.labels[-2]]) if name == "mT" else None


def _cat(books: Labels, call: Call) -> Tagged:
    parts, dim = call(0, "tensors"), call(1, "dim", 0)
    first = parts[0]
    for part in parts[1:]:
        for d in set(range(len(first.labels))) - {dim % len(first.labels)}:
            books.tie(first.labels[d], part.labels[d])
    labels = list(first.labels)
    labels[dim] = np.concatenate([part.labels[dim] for part in parts])
    return Tagged(labels)


def _stack(books: Labels, call: Call) -> Tagged:
    parts, dim = call(0, "tensors"), call(1, "dim", 0)
    both = books.pointwise(parts, parts[0].shape).labels
    dim %= len(both) + 1
    return Tagged([*both[:dim], *blank(len(parts)), *both[dim:]])


def _chunk(books: Labels, call: Call) -> Any:
    x, dim = call(0, "input"), call(2, "dim", 0)
    sizes = [part.shape[dim] for part in call.out]
    pieces = books.pieces(x, dim, sizes)
    for piece in pieces[1:]:  # equal pieces must stay equal
        if sizes[0] == len(piece.labels[dim]):
            books.tie(pieces[0].labels[dim], piece.labels[dim])
        else:
            books.freeze(x.labels[dim], "is cut into unequal chunks")
    return pieces


def _split(books: Labels, call: Call) -> Any:
    x, dim = call(0, "input"), call(2, "dim", 0)
    books.freeze(x.labels[dim], "is split at fixed places")
    return books.pieces(x, dim, [part.shape[dim] for part in call.out])


def _unbind(books: Labels, call: Call) -> Any:
    x, dim = call(0, "input"), call(1, "dim", 0) % len(call(0, "input").labels)
    books.freeze(x.labels[dim], "is taken apart")
    return tuple(Tagged([labels for d, labels in enumerate(x.labels) if d != dim]) for _ in call.out)


def _select(books: Labels, call: Call) -> Tagged:
    x, dim = call(0, "input"), call(1, "dim") % len(call(0, "input").labels)
    books.freeze(x.labels[dim], "is indexed")
    return Tagged([labels for d, labels in enumerate(x.labels) if d != dim])


def _slice(books: Labels, call: Call) -> Tagged:
    """aten's slice and narrow: a cut at fixed places."""
    x, dim = call(0, "input"), call(1, "dim", 0)
    labels = list(x.labels)
    if call.shape[dim] != len(labels[dim]):
        books.freeze(labels[dim], "is sliced at fixed places")
        labels[dim] = np.full(call.shape[dim], -1)
    return Tagged(labels)


def _getitem(books: Labels, call: Call) -> Any:
    x, index = call.args
    if not isinstance(x, Tagged):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    used = sum(i is not None and i is not Ellipsis for i in index)
    if any(isinstance(i, (Tagged, list, bool)) for i in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (len(x.labels) - used), *index[at + 1 :])
    labels, result = iter(x.labels), []
    for i in index:
        if i is None:
            result += blank(1)
            continue
        here = next(labels)
        if i != slice(None):
            books.freeze(here, "is indexed at fixed places")
        if isinstance(i, slice):
            result.append(here[i])
    return Tagged([*result, *labels])


def _expand(books: Labels, call: Call) -> Tagged:
    x = call(0, "input")
    return books.pointwise([x], call.shape)


def _repeat(books: Labels, call: Call) -> Tagged:
    x = call(0, "input")
    full = [*blank(*[1] * (len(call.shape) - len(x.labels))), *x.labels]
    return Tagged([np.tile(labels, n // max(len(labels), 1)) for labels, n in zip(full, call.shape, strict=True)])


def _repeat_interleave(books: Labels, call: Call) -> Tagged | None:
    x, times, dim = call(0, "input"), call(1, "repeats"), call(2, "dim")
    if not isinstance(times, int) or dim is None:
        return None
    labels = list(x.labels)
    labels[dim] = np.repeat(labels[dim], times)
    return Tagged(labels)


def gated(books: Labels, call: Call) -> Tagged:
    x, dim = call(0, "input"), call(1, "dim", -1)
    first, second = books.pieces(x, dim, [call.shape[dim]] * 2)
    books.tie(first.labels[dim], second.labels[dim])
    return first


def _zeros(books: Labels, call: Call) -> Tagged:
    return Tagged(blank(*call.shape), zeros=True)


def _rnn(books: Labels, call: Call) -> Any:
    """aten's lstm, gru, rnn_tanh, rnn_relu on whole sequences."""
    x, states, weights, biased, layers, two = call.args[0], call.args[1], call.args[2], call.args[3], call.args[4], call.args[7]
    if not isinstance(weights, (list, tuple)):
        return None
    a = 4 if biased else 2
    cells = [list(weights[i : i + a]) for i in range(0, len(weights), a)]
    if len(cells) != layers * (2 if two else 1):
        return None  # a projection
    outputs, last = books.rnn(x, cells, list(tagged(states)), two, call.out[1:])
    return (outputs, *last)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_RESHAPE, reshape),
    "linear": _linear,
    **{f"conv{d}d": _conv for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv_transpose for d in (1, 2, 3)},
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "prelu": prelu,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv"), _matmul),
    "addmm": _addmm,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("softmax", "log_softmax", "_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod"), _cumulative),
    "sum": _reducing(True),
    **dict.fromkeys(("mean", "var", "std", "amax", "amin"), _reducing(False)),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "numpy_T"), _transpose),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "chunk": _chunk,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "unbind": _unbind,
    "select": _select,
    **dict.fromkeys(("slice", "narrow"), _slice),
    "getitem": _getitem,
    "getattr": _attribute,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "glu": gated,
    "pad": _pad,
    **dict.fromkeys(("zeros", "new_zeros"), _zeros),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _rnn),
}
