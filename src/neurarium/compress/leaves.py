"""What each layer of ``torch.nn`` does to the labels of channels, in the words of the functions in :mod:`neurarium.compress.rules`.

A rule gets the books, the layer, its name and the call. Only the layers themselves are listed, no subclasses: a subclass may compute
anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from neurarium.compress.labels import Call, Labels, Tagged, tagged
from neurarium.compress.rules import Rule, gated, pixels, pointwise, prelu, reshape, softmax

__all__ = ["LEAVES"]


def _tensor(books: Labels, path: str, name: str) -> Tagged | None:
    full = f"{path}.{name}".lstrip(".")
    return books.parameter(full) if full in books.names else None


def _leaf_linear(books: Labels, module: Any, path: str, call: Call) -> Any:
    return books.linear(call.args[0], _tensor(books, path, "weight"), _tensor(books, path, "bias"))


def _leaf_conv(books: Labels, module: Any, path: str, call: Call) -> Any:
    weight, bias = _tensor(books, path, "weight"), _tensor(books, path, "bias")
    return books.conv(call.args[0], weight, bias, module.groups, module.transposed, call.shape)


def _leaf_channels(books: Labels, module: Any, path: str, call: Call) -> Any:
    return books.channels(call.args[0], *(_tensor(books, path, k) for k in ("weight", "bias", "running_mean", "running_var")))


def _leaf_layer_norm(books: Labels, module: Any, path: str, call: Call) -> Any:
    if module.weight is None:
        for labels in call.args[0].labels[-len(module.normalized_shape) :]:
            books.freeze(labels, "is normalised by a layer without weights")
    return books.layer_norm(call.args[0], len(module.normalized_shape), _tensor(books, path, "weight"), _tensor(books, path, "bias"))


def _leaf_group_norm(books: Labels, module: Any, path: str, call: Call) -> Any:
    if module.weight is None:
        books.freeze(call.args[0].labels[1], "is normalised by a layer without weights")
    return books.group_norm(call.args[0], module.num_groups, _tensor(books, path, "weight"), _tensor(books, path, "bias"))


def _leaf_embedding(books: Labels, module: Any, path: str, call: Call) -> Any:
    weight = _tensor(books, path, "weight")
    books.made.append(weight.labels[1])
    return Tagged([*call.args[0].labels, weight.labels[1]])


def _leaf_prelu(books: Labels, module: Any, path: str, call: Call) -> Any:
    return prelu(books, Call([call.args[0], _tensor(books, path, "weight")], {}, call.out))


def _leaf_softmax(books: Labels, module: Any, path: str, call: Call) -> Any:
    return softmax(books, Call([call.args[0], -1 if module.dim is None else module.dim], {}, call.out))


def _leaf_glu(books: Labels, module: Any, path: str, call: Call) -> Any:
    return gated(books, Call([call.args[0], module.dim], {}, call.out))


def _leaf_rnn(books: Labels, module: Any, path: str, call: Call) -> Any:
    if getattr(module, "proj_size", 0):
        return None
    two = module.bidirectional
    cells = [
        [t for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if (t := _tensor(books, path, f"{k}_l{layer}{side}"))]
        for layer in range(module.num_layers)
        for side in (("", "_reverse") if two else ("",))
    ]
    last = call.out[1] if isinstance(call.out[1], tuple) else (call.out[1],)
    outputs, states = books.rnn(call.args[0], cells, list(tagged(call.args[1:])), two, last)
    return outputs, (states if isinstance(call.out[1], tuple) else states[0])


def _of(rule: Rule) -> Callable[[Labels, Any, str, Call], Any]:
    return lambda books, module, path, call: rule(books, call)


_ACTIVATIONS = [
    "ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "SELU", "CELU", "LeakyReLU", "Hardtanh", "Hardsigmoid", "Hardswish",
    "Softplus", "Softsign", "LogSigmoid", "Tanhshrink", "Threshold", "Sigmoid", "Tanh", "Identity", "Dropout", "Dropout1d",
    "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
]  # fmt: skip
_POOLS = [f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)]

LEAVES: dict[type, Callable[[Labels, Any, str, Call], Any]] = {
    nn.Linear: _leaf_linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _leaf_conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _leaf_channels),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _leaf_channels),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _leaf_layer_norm),
    nn.GroupNorm: _leaf_group_norm,
    nn.Embedding: _leaf_embedding,
    nn.PReLU: _leaf_prelu,
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _leaf_softmax),
    nn.GLU: _leaf_glu,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _leaf_rnn),
    **{getattr(nn, name): _of(pointwise) for name in _ACTIVATIONS},
    **{getattr(nn, name): _of(pixels) for name in [*_POOLS, "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"]},
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _of(reshape)),
}  # fmt: skip
