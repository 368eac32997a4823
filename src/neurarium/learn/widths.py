"""How the parameters of a network grow with its width: read off a narrower network, kept beside the model, never on its tensors.

A dimension grows where the model and its base differ. A weight whose input and output both grow is *hidden*, one whose output alone grows
is *input* (of a layer) or *embedding* (of an embedding or a position), a layer whose input alone grows is *output*; biases and gains are
*vector*, what does not grow is *fixed*. A readout that shares its weight with an embedding counts as an embedding, and its module is
listed among the readouts. :mod:`neurarium.learn.parametrize` makes scales and learning rates of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Parametrization", "Shape", "infer_shapes"]

ROLES = ("input", "embedding", "hidden", "output", "vector", "fixed")


@dataclass(frozen=True)
class Shape:
    """How a parameter grows. ``branch`` and ``step`` are of depth: the factor of its branch, and the size its update should have."""

    role: str
    fan_in_mult: float = 1.0
    fan_out_mult: float = 1.0
    branch: float = 1.0
    step: float = 1.0


@dataclass(frozen=True)
class Parametrization(Mapping[str, Shape]):
    """Parameter name -> :class:`Shape`, and what the forward pass is multiplied by. Plain data: copy, pickle and compare it freely.

    ``readouts``: module -> growth of its input; ``branches``: module -> factor of its output (see :mod:`neurarium.learn.depth`).
    """

    shapes: Mapping[str, Shape]
    readouts: Mapping[str, float]
    readout_multiplier: float = 1.0
    table: int = 8
    branches: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Shape:
        return self.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __str__(self) -> str:
        return "\n".join(f"{n:40} {s.role:10} in x{s.fan_in_mult:g}, out x{s.fan_out_mult:g}" for n, s in self.items())


def infer_shapes(
    model: nn.Module,
    base: nn.Module | Mapping[str, Sequence[int]] | float | None = None,
    delta: nn.Module | Mapping[str, Sequence[int]] | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    readout_multiplier: float = 1.0,
    table: int = 8,
) -> Parametrization:
    """Which dimensions grow, and by how much.

    Args:
        base: the narrow network (may live on the meta device), or its shapes by parameter name, or a number: "this model is so many times
            as wide as its base". With a number, the first layer (or the embeddings) and the last are taken to face the data; where this
            is wrong, pass a module. ``None``: the model is its own base.
        delta: a second narrow network or its shapes; a dimension grows where it differs from ``base`` (default: where the model does).
        overrides: regular expression searched in a parameter's name -> one of ``input, embedding, hidden, output, vector, fixed``.
        readout_multiplier: alpha; worth tuning at the base width.
        table: 8, with a multiplier at the readout, or 3, without.
    """
    if table not in (3, 8):
        raise BadInput(f"table is 8 (multiplier at the readout) or 3 (none), not {table!r}")
    if not 0 < readout_multiplier < float("inf"):
        raise BadInput(f"readout_multiplier={readout_multiplier!r} is not a positive number")
    for pattern, role in (overrides or {}).items():
        if role not in ROLES:
            raise BadInput(f"overrides: role {role!r} of {pattern!r} is not one of {ROLES}")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise UnsupportedModel("has no parameters", module=type(model).__name__)
    for name, p in parameters.items():
        if isinstance(p, nn.UninitializedParameter):
            raise UnsupportedModel("is not initialised yet: run the model once before", module=name)
    owners = _owners(model)
    growth = _growth(model, parameters, owners, base, delta)
    shapes, readouts = {}, {}
    for name, p in parameters.items():
        shapes[name] = _shape(name, p, owners[p], growth[name], overrides or {})
        for owner, module in owners[p]:
            tied = shapes[name].role == "embedding" and isinstance(module, nn.Linear) and p is module.weight
            if shapes[name].role == "output" or tied:
                readouts[owner] = shapes[name].fan_out_mult if tied else shapes[name].fan_in_mult
                if tied and table == 3:
                    raise UnsupportedModel("shares its weight with an embedding, which needs the multiplier of table=8", module=owner)
    return Parametrization(shapes, readouts, readout_multiplier, table)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module]]]:
    """Every module that holds a parameter, embeddings first."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                found.setdefault(p, []).append((name, module))
    return {p: sorted(o, key=lambda nm: not isinstance(nm[1], (nn.Embedding, nn.EmbeddingBag))) for p, o in found.items()}


def _growth(model, parameters, owners, base, delta) -> dict[str, list[float | None]]:
    """For each dimension of each parameter its growth, or None if it does not grow."""
    if base is None or (isinstance(base, (int, float)) and not isinstance(base, bool)):
        if delta is not None:
            raise BadInput("delta says which dimensions of a base network grow: it needs one as base, not a number")
        if not 0 < (factor := float(base or 1)) < float("inf"):
            raise BadInput(f"base={base!r}: the growth of the width is a positive number")
        return _guess(model, parameters, owners, factor, strict=base is not None)
    shapes = [_named(s, parameters, what) for s, what in ((base, "base"), (delta, "delta")) if s is not None]
    if isinstance(base, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and base.get_submodule(name).head_dim != module.head_dim:
                raise UnsupportedModel(
                    "its heads grow, and its 1/sqrt(width of a head) cannot be changed: let their number grow, or use attention "
                    "of your own with attention_scale()", module=name,
                )  # fmt: skip
    if len(shapes) == 1 and all(tuple(p.shape) == shapes[0][n] for n, p in parameters.items()):
        return _guess(model, parameters, owners, 1.0, strict=False)
    return {
        n: [d / b if grows else None for d, b, grows in zip(p.shape, shapes[0][n], _differs(shapes, n, p), strict=True)]
        for n, p in parameters.items()
    }


def _differs(shapes: list[dict[str, tuple[int, ...]]], name: str, p: Tensor) -> list[bool]:
    other = shapes[1][name] if len(shapes) > 1 else tuple(p.shape)
    return [a != b for a, b in zip(shapes[0][name], other, strict=True)]


def _named(source: nn.Module | Mapping[str, Any], parameters: Mapping[str, Tensor], what: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(source, (nn.Module, Mapping)):
        raise BadInput(f"{what} must be a module, shapes by parameter name or a number, not {type(source).__name__}")
    named = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    shapes = {n: tuple(getattr(s, "shape", s)) for n, s in named.items()}
    if odd := sorted(set(shapes) ^ set(parameters)):
        raise BadInput(f"{what} and the model have different parameters, e.g. {odd[:3]}")
    for name, p in parameters.items():
        if len(shapes[name]) != p.ndim or any(n < 1 for n in shapes[name]):
            raise BadInput(f"{what}: {name} has shape {shapes[name]}, the model's has {tuple(p.shape)}")
    return shapes


def _guess(model, parameters, owners, factor, *, strict) -> dict[str, list[float | None]]:
    """Growth from the kinds and order of layers."""
    kinds = [(m, type(m)) for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    linear = [m for m, _ in kinds if isinstance(m, nn.Linear)]
    embedded = any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in model.modules())
    first, last = (kinds[0][0] if kinds and not embedded else None), (linear or [m for m, _ in kinds] or [None])[-1]
    found = {}
    for name, p in parameters.items():
        module, leaf = owners[p][0][1], name.rpartition(".")[2]
        if isinstance(module, (nn.Linear, _ConvNd)):
            out, into = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
            grows = {out} if module is not last else set()
            if p.ndim > 1 and module is not first and p.shape[into] > 1:
                grows.add(into)
        elif isinstance(module, nn.MultiheadAttention):
            grows = {0, 1} if leaf.endswith("weight") else {p.ndim - 1}
        elif p.ndim < 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or re.search("pos|emb|token|cls", leaf):
            grows = {p.ndim - 1}
        elif strict:
            raise UnsupportedModel(
                f"cannot tell which dimensions of {leaf} {tuple(p.shape)} grow: pass a base model", module=owners[p][0][0]
            )
        else:
            grows = set()
        found[name] = [factor if i in grows else None for i in range(p.ndim)]
    return found


def _shape(name: str, p: Tensor, owners: list[tuple[str, nn.Module]], growth: list[float | None], overrides: Mapping[str, str]) -> Shape:
    module = owners[0][1]
    growing = [i for i, g in enumerate(growth) if g is not None]
    if len(growing) > 2:
        raise UnsupportedModel(f"{name} {tuple(p.shape)} grows in more than two dimensions", module=owners[0][0])
    layer = isinstance(module, (nn.Linear, _ConvNd))
    out, into = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
    if p.ndim < 2:
        role, sizes = "vector", (1.0, (growth or [None])[0] or 1.0)
    elif len(growing) == 2:
        out, into = (out, into) if layer else growing
        role, sizes = "hidden", (growth[into] or 1.0, growth[out] or 1.0)
    elif not growing:
        role, sizes = "fixed", (1.0, 1.0)
    elif layer and growing == [into]:
        role, sizes = "output", (growth[into] or 1.0, 1.0)
    else:  # from something of fixed size to the width: layers, recurrent layers, embeddings and positions
        wide = growth[growing[0]] or 1.0
        role, sizes = ("input" if layer or isinstance(module, nn.RNNBase) else "embedding"), (1.0, wide)
    for pattern, chosen in overrides.items():
        if re.search(pattern, name):
            role = chosen
            if role == "output" and len(growing) == 1:
                sizes = (growth[growing[0]] or 1.0, 1.0)
            break
    return Shape(role, *sizes)
