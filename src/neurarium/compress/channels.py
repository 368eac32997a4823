"""Channel plans: which units of which layers stay, as frozen data, and the executor that cuts the rest out of a model.

A plan names groups of coupled channels (they come from :class:`~neurarium.compress.graph.ChannelGraph`) and carries what the cut needs:
for every parameter and buffer the indices that stay in each dimension, and the few plain attributes that count channels (``groups``,
``num_heads``). So a plan that was stored is carried out on any model of the same architecture, without tracing it again.

``apply_channels`` copies the model and gives it fresh, smaller parameters; names, types and tied weights stay. Cost: one copy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["ChannelPlan", "Cost", "apply_channels"]


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds for the example that was traced, and bytes of the saved model."""

    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class ChannelPlan:
    """Which units stay.

    Attributes:
        kept: group id -> indices of the units that stay, ascending.
        sizes: group id -> number of units before.
        slices: tensor name -> {dimension: indices that stay}, for every tensor that shrinks.
        shapes: tensor name -> shape before.
        attributes: "module.attribute" -> new value, for attributes that count channels.
        cost_before, cost_after: what the model costs for the traced example.
        scores: group id -> the scores that led here, if any.
        implanted: module -> its outputs (numbered as before) that get a cheap substitute (used by methods that have one).
        skipped: module -> why its output cannot be pruned.
    """

    kept: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    slices: Mapping[str, Mapping[int, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Any]
    cost_before: Cost
    cost_after: Cost
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    implanted: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """As text: a model that carries its plan pickles without further tensors."""
        return ChannelPlan.from_json, (self.to_json(),)

    def check(self, model: nn.Module) -> None:
        """Raises BadInput naming the first tensor that is missing or has another shape."""
        tensors = _tensors(model)
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise BadInput(f"the plan names {name!r}, which the model does not have")
            if tuple(tensors[name].shape) != tuple(shape):
                raise BadInput(f"{name}: the plan was made for shape {tuple(shape)}, the model has {tuple(tensors[name].shape)}")

    def describe(self) -> str:
        """A table: group, units, kept; then the cost; then what was left alone."""
        rows = [f"{'group':40} {'units':>7} {'kept':>7}"]
        rows += [f"{name:40} {self.sizes[name]:>7} {len(kept):>7}" for name, kept in self.kept.items()]
        for what in ("params", "macs", "bytes"):
            before, after = getattr(self.cost_before, what), getattr(self.cost_after, what)
            rows.append(f"{what:40} {before:>7} {after:>7}  ({after / max(before, 1):.3f})")
        return "\n".join([*rows, *(f"{name or '(model)'}: left alone, {why}" for name, why in self.skipped.items())])

    def to_json(self) -> str:
        """All of it as text."""
        lists = lambda tensors: {k: v.tolist() for k, v in tensors.items()}  # noqa: E731
        return json.dumps(
            {
                "kind": "channel",
                "kept": lists(self.kept),
                "sizes": dict(self.sizes),
                "slices": {name: lists(cut) for name, cut in self.slices.items()},
                "shapes": {k: list(v) for k, v in self.shapes.items()},
                "attributes": dict(self.attributes),
                "cost_before": asdict(self.cost_before),
                "cost_after": asdict(self.cost_after),
                "scores": lists(self.scores),
                "implanted": lists(self.implanted),
                "skipped": dict(self.skipped),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """The plan that :meth:`to_json` wrote."""
        data = json.loads(text)
        if data.get("kind") != "channel":
            raise BadInput(f"not a channel plan: kind is {data.get('kind')!r}")
        indices = lambda lists: {k: torch.tensor(v, dtype=torch.int64) for k, v in lists.items()}  # noqa: E731
        return cls(
            kept=indices(data["kept"]),
            sizes=data["sizes"],
            slices={name: {int(d): v for d, v in indices(cut).items()} for name, cut in data["slices"].items()},
            shapes={k: tuple(v) for k, v in data["shapes"].items()},
            attributes=data["attributes"],
            cost_before=Cost(**data["cost_before"]),
            cost_after=Cost(**data["cost_after"]),
            scores={k: torch.tensor(v, dtype=torch.float64) for k, v in data["scores"].items()},
            implanted=indices(data["implanted"]),
            skipped=data["skipped"],
        )


def apply_channels(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """A smaller copy of the model. The input is untouched; the new parameters share no memory with it."""
    plan.check(model)
    result = copy.deepcopy(model)
    aliases: dict[int, list[str]] = {}
    for name, tensor in _tensors(result).items():
        aliases.setdefault(id(tensor), []).append(name)
    touched: dict[str, None] = {}
    for name, cut in plan.slices.items():
        old = _tensor(result, name)
        value = old.detach()
        for dim, kept in cut.items():
            value = value.index_select(dim, kept.to(value.device))
        value = value.clone(memory_format=torch.preserve_format)
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for alias in aliases[id(old)]:
            path, _, attribute = alias.rpartition(".")
            setattr(result.get_submodule(path), attribute, new)
            touched[path] = None
    for name, value in plan.attributes.items():
        path, _, attribute = name.rpartition(".")
        setattr(result.get_submodule(path), attribute, tuple(value) if isinstance(value, list) else value)
    for path in touched:
        _resize(path, result.get_submodule(path))
    return result


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def _resize(path: str, module: nn.Module) -> None:
    """The counts that a layer keeps beside its tensors, read off the new tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight if weight is not None else module.running_mean)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.RNNBase):
        module.hidden_size, module.input_size = module.weight_hh_l0.shape[1], module.weight_ih_l0.shape[1]
        module._init_flat_weights()
    elif isinstance(module, nn.MultiheadAttention):
        raise UnsupportedModel("a MultiheadAttention ties its width to its heads", module=path)
    elif isinstance(weight, Tensor) and hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D: (in, out)
        module.nx, module.nf = weight.shape
