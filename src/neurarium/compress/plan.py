"""Plans: what a planner decided, as frozen data that can be stored, compared and carried out by any executor.

``apply(model, plan)`` copies the model and gives each planned layer its mask. A masked layer is an ordinary subclass of the layer that
it replaces (``MaskedLinear`` is a ``Linear``) with one more buffer, ``mask``; its forward uses ``weight * mask``. Hence the pattern
survives further training, and the module pickles, deep-copies, exports and has its parameters under their old names.
(``torch.nn.utils.parametrize`` would rename the parameters and make the module unpicklable.) ``finalise`` bakes the masks in and gives the
plain layers back.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.pattern import Pattern, Unstructured
from neurarium.errors import BadInput, UnsupportedModel

__all__ = [
    "MaskPlan", "MaskedConv1d", "MaskedConv2d", "MaskedLinear", "apply", "finalise", "flat_weights", "prunable", "shaped", "weight_names",
]  # fmt: skip


class _Masked:
    """Multiplies the weight by the buffer `mask` on every use."""

    weight: Tensor
    mask: Tensor
    bias: Tensor | None


class MaskedLinear(_Masked, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv1d(_Masked, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedConv2d(_Masked, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


_MASKED: dict[type, type] = {nn.Linear: MaskedLinear, nn.Conv1d: MaskedConv1d, nn.Conv2d: MaskedConv2d}
_PLAIN = {masked: plain for plain, masked in _MASKED.items()}


@dataclass(frozen=True)
class MaskPlan:
    """Which weights stay, and with which values.

    Attributes:
        masks: module name -> bool tensor of the weight's shape, True = stays.
        values: module name -> new weight (already zero outside the mask); missing or None: the old values stay.
        pattern: the pattern that the masks have.
        skipped: module name -> why it was left alone.
    """

    masks: Mapping[str, Tensor]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    pattern: Pattern = field(default_factory=Unstructured)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Removed share of all planned weights."""
        total = sum(m.numel() for m in self.masks.values())
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / total

    def check(self, model: nn.Module) -> None:
        """Raises BadInput naming the first module that is missing or has another shape."""
        modules = dict(model.named_modules())
        for name, mask in self.masks.items():
            if name not in modules:
                raise BadInput(f"the plan names {name!r}, which the model does not have")
            shape = tuple(getattr(modules[name], "weight", torch.empty(0)).shape)
            if shape != tuple(mask.shape):
                raise BadInput(f"{name}: the plan's mask is {tuple(mask.shape)}, the weight {shape}")

    def describe(self) -> str:
        """A table: layer, weights, kept, sparsity."""
        rows = [f"{'layer':30} {'weights':>10} {'kept':>10} {'sparsity':>8}"]
        for name, mask in self.masks.items():
            kept = int(mask.sum())
            rows.append(f"{name or '(model)':30} {mask.numel():>10} {kept:>10} {1 - kept / mask.numel():>8.3f}")
        return "\n".join([*rows, *(f"{name}: left alone, {why}" for name, why in self.skipped.items())])

    def to_json(self) -> str:
        """Masks as packed bits and values as float32, base64; the pattern by name."""
        return json.dumps(
            {
                "kind": "mask",
                "pattern": repr(self.pattern),
                "masks": {k: {"shape": list(m.shape), "bits": _pack(np.packbits(m.cpu().numpy().ravel()))} for k, m in self.masks.items()},
                "values": {k: _pack(v.detach().cpu().float().numpy()) for k, v in self.values.items()},
                "skipped": dict(self.skipped),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> MaskPlan:
        """The plan that :meth:`to_json` wrote (the pattern becomes Unstructured: masks carry all that is needed)."""
        data = json.loads(text)
        if data.get("kind") != "mask":
            raise BadInput(f"not a mask plan: kind is {data.get('kind')!r}")
        masks = {}
        for name, m in data["masks"].items():
            count = int(np.prod(m["shape"]))
            bits = np.unpackbits(np.frombuffer(base64.b64decode(m["bits"]), np.uint8), count=count)
            masks[name] = torch.from_numpy(bits.astype(bool)).reshape(m["shape"])
        values = {
            name: torch.from_numpy(np.frombuffer(base64.b64decode(v), np.float32).copy()).reshape(masks[name].shape)
            for name, v in data["values"].items()
        }
        return cls(masks, values, skipped=data["skipped"])


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def prunable(model: nn.Module, modules: Sequence[type] = (nn.Linear, nn.Conv2d)) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose weights a mask can hold, by name, and why the others with a weight matrix were left alone.

    A module that is used several times is planned once. A weight that several modules share is left alone: a mask on one of them would
    not hold in the others.
    """
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            owners.setdefault(id(weight), []).append(name)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            continue
        base = _PLAIN.get(type(module), type(module))
        if base not in _MASKED:
            skipped[name] = f"{type(module).__name__} is not one of {', '.join(t.__name__ for t in _MASKED)}"
        elif not issubclass(base, tuple(modules)):
            skipped[name] = f"{base.__name__} was not asked for"
        elif len(owners[id(weight)]) > 1:
            other = next(n for n in owners[id(weight)] if n != name)
            skipped[name] = f"its weight is tied to {other}: a mask on one would not hold in the other"
        else:
            found[name] = module
    if not found:
        raise UnsupportedModel(
            f"has no prunable layer among {', '.join(m.__name__ for m in modules)}"
            + "".join(f"; {n}: {why}" for n, why in list(skipped.items())[:3]),
            module=type(model).__name__,
        )
    return found, skipped


def weight_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """The parameter names of the layers' weights."""
    return [f"{name}.weight".lstrip(".") for name in layers]


def flat_weights(layers: Mapping[str, nn.Module]) -> Tensor:
    """The layers' weights as one float32 vector, in their order."""
    return torch.cat([m.weight.detach().flatten() for m in layers.values()]).float()


def shaped(layers: Mapping[str, nn.Module], flat: Tensor) -> dict[str, Tensor]:
    """A vector over all weights, cut back into the layers' shapes."""
    parts = flat.split([m.weight.numel() for m in layers.values()])
    return {name: part.view(m.weight.shape) for (name, m), part in zip(layers.items(), parts, strict=True)}


def apply(model: nn.Module, plan: MaskPlan) -> nn.Module:
    """A copy of the model whose planned layers carry their masks (and new values). The input is untouched."""
    plan.check(model)
    result = copy.deepcopy(model)
    for name, mask in plan.masks.items():
        module = result.get_submodule(name)
        kind = type(module)
        if kind not in _MASKED and kind not in _PLAIN:
            raise UnsupportedModel(f"a {kind.__name__} cannot carry a mask", module=name)
        module.__class__ = _MASKED.get(kind, kind)
        mask = mask.to(module.weight.device)
        with torch.no_grad():
            if name in plan.values:
                module.weight.copy_(plan.values[name])
            module.weight.mul_(mask)
        module.register_buffer("mask", mask)
    return result


def finalise(model: nn.Module) -> nn.Module:
    """A copy with the masks baked into the weights and the plain layer types back."""
    result = copy.deepcopy(model)
    for module in _masked(result):
        with torch.no_grad():
            module.weight.mul_(module.mask)
        del module._buffers["mask"]
        module.__class__ = _PLAIN[type(module)]
    return result


def _masked(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if type(m) in _PLAIN)
