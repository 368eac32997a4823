"""Bit plans: how many bits every layer's weights and inputs get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from neurarium.errors import BadInput

__all__ = ["BitPlan"]


@dataclass(frozen=True)
class BitPlan:
    """Weight and activation bits of each layer; 32 means floating point.

    Attributes:
        bits: module name -> (bits of a weight, bits of an input activation).
        perturbation: module name -> the planner's harm of that choice.
        cost: what the plan costs in the planner's unit (bytes, BOPs, seconds).
        skipped: module name -> why it was left alone.
    """

    bits: Mapping[str, tuple[int, int]]
    perturbation: Mapping[str, float] = field(default_factory=dict)
    cost: float = float("nan")
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, pair in self.bits.items():
            if len(pair) != 2 or not all(isinstance(b, int) and 1 <= b <= 32 for b in pair):
                raise BadInput(f"{name}: bits must be (weight, activation), each 1..32, got {pair}")

    def check(self, model: nn.Module) -> None:
        """Raises BadInput naming the first module that is missing or has no weight matrix."""
        modules = dict(model.named_modules())
        for name in self.bits:
            if name not in modules:
                raise BadInput(f"the plan names {name!r}, which the model does not have")
            weight = getattr(modules[name], "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim < 2:
                raise BadInput(f"{name}: a {type(modules[name]).__name__} has no weight matrix to quantise")

    def weight_bytes(self, model: nn.Module) -> int:
        """Bytes of the planned layers' bit-packed weights, without scales; a shared module counts once."""
        sizes = {m: -(-m.weight.numel() * self.bits[name][0] // 8) for name, m in self._layers(model)}
        return sum(sizes.values())

    def mean_bits(self, model: nn.Module) -> float:
        """Bits of a weight, averaged over the weights of the planned layers."""
        sizes = {m: (m.weight.numel(), self.bits[name][0]) for name, m in self._layers(model)}
        return sum(n * b for n, b in sizes.values()) / max(sum(n for n, _ in sizes.values()), 1)

    def bops(self, macs: Mapping[str, float]) -> float:
        """Bit operations: the sum over layers of multiply-adds times weight bits times activation bits."""
        return sum(macs[name] * w * a for name, (w, a) in self.bits.items())

    def _layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        self.check(model)
        return [(name, model.get_submodule(name)) for name in self.bits]

    def describe(self) -> str:
        """A table: layer, weight bits, activation bits, perturbation."""
        rows = [f"{'layer':30} {'weight':>6} {'input':>6} {'perturbation':>12}"]
        for name, (weight, activation) in self.bits.items():
            harm = f"{self.perturbation[name]:.4g}" if name in self.perturbation else "-"
            rows.append(f"{name or '(model)':30} {weight:>6} {activation:>6} {harm:>12}")
        if self.cost == self.cost:
            rows.append(f"cost {self.cost:.6g}")
        return "\n".join([*rows, *(f"{name}: left alone, {why}" for name, why in self.skipped.items())])

    def to_json(self) -> str:
        """The plan as text; :meth:`from_json` reads it."""
        return json.dumps(
            {
                "kind": "bits",
                "bits": {name: list(pair) for name, pair in self.bits.items()},
                "perturbation": dict(self.perturbation),
                "cost": self.cost if self.cost == self.cost else None,
                "skipped": dict(self.skipped),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> BitPlan:
        """The plan that :meth:`to_json` wrote."""
        data = json.loads(text)
        if data.get("kind") != "bits":
            raise BadInput(f"not a bit plan: kind is {data.get('kind')!r}")
        cost = float("nan") if data["cost"] is None else data["cost"]
        return cls({name: tuple(pair) for name, pair in data["bits"].items()}, data["perturbation"], cost, data["skipped"])
