"""Range plans: which grid every layer's weight and input get, and the network of packed layers that follows."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.blocks import explicit
from neurarium.compress.calibrate import is_conv1d
from neurarium.compress.quant.affine import UniformGrid, affine_grid
from neurarium.compress.quant.packing import PackedConv2d, PackedLinear, pack_layer
from neurarium.errors import BadInput

__all__ = ["RangeFit", "RangePlan", "apply_ranges", "levels", "opened", "rows"]


@dataclass(frozen=True)
class RangeFit:
    """The grid of a weight.

    Attributes:
        bits: of a code; the codes are -q .. q with q = 2^(bits-1) - 1.
        top: the largest level, one number a tensor or one an output channel.
        alpha: share of the largest magnitude (of |w|^power) that it is.
        power: p of the reshaping; 1: evenly spaced levels.
        error: |w - Q(w)|^2 over the whole tensor.
        evaluations: of the error, by the search for alpha at the chosen power.
    """

    bits: int
    top: tuple[float, ...]
    alpha: tuple[float, ...] = ()
    power: float = 1.0
    error: float = float("nan")
    evaluations: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16 or not 0 < self.power <= 1 or not self.top or not all(0 < t < math.inf for t in self.top):
            raise BadInput(f"a range needs 2..16 bits, 0 < power <= 1 and finite tops > 0, got {self.bits}, {self.power}, {self.top[:3]}")

    @property
    def table(self) -> Tensor:
        """The level of each code -q .. q as a share of the top, float64."""
        return levels(self.bits, self.power)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes of a weight, shifted up to 0 .. 2 q, int64."""
        q = 2 ** (self.bits - 1) - 1
        w = rows(weight, len(self.top))
        size = (w.abs() / self._tops()).pow(self.power).mul_(q).round_().clamp_(max=q)
        return (size.long() * w.sign().long() + q).view(weight.shape)

    def values(self, weight: Tensor) -> Tensor:
        """The weight on its grid, float64."""
        return (rows(self.table[self.codes(weight)], len(self.top)) * self._tops()).view(weight.shape)

    def _tops(self) -> Tensor:
        return torch.tensor(self.top, dtype=torch.float64)[:, None]


@dataclass(frozen=True)
class RangePlan:
    """Ranges of layers.

    Attributes:
        fits: module name -> the grid of its weight.
        inputs: module name -> (low, high, bits) of its input; layers that are not in it take any number.
        skipped: module name -> why it was left alone.
    """

    fits: Mapping[str, RangeFit]
    inputs: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> BitPlan:
        """The bits alone, with the squared errors as perturbation."""
        pairs = {name: (fit.bits, self.inputs[name][2] if name in self.inputs else 32) for name, fit in self.fits.items()}
        return BitPlan(pairs, {name: fit.error for name, fit in self.fits.items()}, skipped=self.skipped)

    def check(self, model: nn.Module) -> None:
        """Raises BadInput naming the first module that is missing, of another kind or of another width."""
        for name, fit in self.fits.items():
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise BadInput(f"the plan names {name!r}, which the model does not have") from error
            if not (type(module) in (nn.Linear, nn.Conv2d) or is_conv1d(module) or isinstance(module, PackedLinear | PackedConv2d)):
                raise BadInput(f"{name}: a {type(module).__name__} cannot take packed weights")
            out = module.nf if is_conv1d(module) else module.weight.shape[0]
            if len(fit.top) not in (1, out):
                raise BadInput(f"{name}: the plan has {len(fit.top)} ranges, the layer {out} output channels")

    def describe(self) -> str:
        """A table: layer, bits, ranges, power, error."""
        lines = [f"{'layer':30} {'bits':>4} {'ranges':>6} {'mean alpha':>10} {'power':>6} {'error':>10}"]
        for name, fit in self.fits.items():
            alpha = sum(fit.alpha) / len(fit.alpha) if fit.alpha else float("nan")
            lines.append(f"{name or '(model)':30} {fit.bits:>4} {len(fit.top):>6} {alpha:>10.3f} {fit.power:>6.2f} {fit.error:>10.4g}")
        return "\n".join([*lines, *(f"{name}: left alone, {why}" for name, why in self.skipped.items())])

    def to_json(self) -> str:
        """The plan as text; :meth:`from_json` reads it."""
        fits = {name: asdict(fit) for name, fit in self.fits.items()}
        return json.dumps({"kind": "ranges", "fits": fits, "inputs": dict(self.inputs), "skipped": dict(self.skipped)})

    @classmethod
    def from_json(cls, text: str) -> RangePlan:
        """The plan that :meth:`to_json` wrote."""
        data = json.loads(text)
        if data.get("kind") != "ranges":
            raise BadInput(f"not a range plan: kind is {data.get('kind')!r}")
        fits = {name: RangeFit(**{**fit, "top": tuple(fit["top"]), "alpha": tuple(fit["alpha"])}) for name, fit in data["fits"].items()}
        return cls(fits, {name: tuple(ends) for name, ends in data["inputs"].items()}, data["skipped"])


def apply_ranges(model: nn.Module, plan: RangePlan) -> nn.Module:
    """A copy of the model with packed weights (and quantised inputs) where the plan has ranges. The input is untouched."""
    plan.check(model)
    plain = opened(model)
    result = copy.deepcopy(model) if plain is model else plain
    made: dict[nn.Module, nn.Module] = {}
    for name, fit in plan.fits.items():
        old = result.get_submodule(name)
        if isinstance(old, PackedLinear | PackedConv2d):
            continue
        top = torch.tensor(fit.top, dtype=torch.float64)
        layer = pack_layer(old, fit.codes(old.weight.detach().cpu()), fit.bits, table=fit.table, scale=top if len(top) > 1 else top[0])
        if name in plan.inputs:
            low, high, width = plan.inputs[name]
            grid = affine_grid(low, high, width)
            layer.__class__ = _RangedLinear if isinstance(layer, PackedLinear) else _RangedConv2d
            layer.input_bits = width
            layer.register_buffer("input_scale", grid.scale.to(layer.table))
            layer.register_buffer("input_zero", grid.zero.to(layer.table.device))
        made[old] = layer
    if result in made:
        result = made[result]
    else:
        for parent in list(result.modules()):
            for child_name, child in list(parent._modules.items()):
                if child in made:
                    parent._modules[child_name] = made[child]
    result.plan = plan
    return result


class _RangedLinear(PackedLinear):
    """A packed linear layer whose input is put on a grid first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(UniformGrid(self.input_scale, self.input_zero, 0, 2**self.input_bits - 1)(x))


class _RangedConv2d(PackedConv2d):
    """A packed convolution whose input is put on a grid first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(UniformGrid(self.input_scale, self.input_zero, 0, 2**self.input_bits - 1)(x))


def opened(model: nn.Module) -> nn.Module:
    """The model itself, or a copy with plain linear layers where it hides them."""

    def hides(m: nn.Module) -> bool:
        return is_conv1d(m) or (isinstance(m, nn.TransformerEncoderLayer) and type(m.self_attn) is nn.MultiheadAttention)

    return explicit(model) if any(map(hides, model.modules())) else model


def rows(weight: Tensor, n: int) -> Tensor:
    """The weight in float64 as (n, ...)."""
    return weight.detach().double().reshape(n, -1)


def levels(bits: int, power: float) -> Tensor:
    q = 2 ** (bits - 1) - 1
    k = torch.arange(-q, q + 1, dtype=torch.float64) / q
    return k.sign() * k.abs().pow(1 / power)
