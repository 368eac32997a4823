"""Training that knows of the quantiser: layers that put weights and inputs on their grids with the straight-through gradient.

BatchNorm is folded first, so the weights that are trained are those that the integer network stores. The grids of the inputs are those of
the calibration data and stay; those of the weights follow the weights. ``quantize_integer`` takes the result and keeps the input grids.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.quant.affine import UniformGrid, symmetric_grid
from neurarium.compress.quant.fold import fold_batchnorm
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["prepare_qat"]


class _Trained:
    """A layer with grids. Attributes: input_bits, input_unsigned, weight_bits, and the buffer input_scale."""

    def _grids(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top = 2**self.input_bits - 1 if self.input_unsigned else 2 ** (self.input_bits - 1) - 1  # type: ignore[attr-defined]
        scale = self.input_scale  # type: ignore[attr-defined]
        grid = UniformGrid(scale, torch.zeros_like(scale), 0 if self.input_unsigned else -top, top)  # type: ignore[attr-defined]
        weight = self.weight  # type: ignore[attr-defined]
        return grid(x), symmetric_grid(weight, self.weight_bits, axis=0)(weight)  # type: ignore[attr-defined]


class _TrainedLinear(_Trained, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*self._grids(x), self.bias)


class _TrainedConv1d(_Trained, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(*self._grids(x), self.bias)


class _TrainedConv2d(_Trained, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(*self._grids(x), self.bias)


_KINDS = {nn.Linear: _TrainedLinear, nn.Conv1d: _TrainedConv1d, nn.Conv2d: _TrainedConv2d}


def prepare_qat(model: nn.Module, loader: Iterable, *, bits: int | BitPlan = 8) -> nn.Module:
    """A copy with folded norms whose layers are fake-quantised; it trains like any module.

    Args:
        loader: calibration batches ``x`` or ``(x, y)``.
        bits: of weights and inputs, or a plan; layers that it leaves out stay in floating point.
    """
    result = fold_batchnorm(model)
    names = [n for n, m in result.named_modules() if type(m) in _KINDS]
    pairs = dict(bits.bits) if isinstance(bits, BitPlan) else dict.fromkeys(names, (bits, bits))
    if isinstance(bits, BitPlan):
        bits.check(result)
    chosen = {n: result.get_submodule(n) for n in names if n in pairs}
    if not chosen:
        raise UnsupportedModel("has no Linear, Conv1d or Conv2d layer to quantise", module=type(model).__name__)
    if bad := [n for n in chosen if not all(2 <= b <= 8 for b in pairs[n])]:
        raise BadInput(f"{bad[0]}: bits must be 2 to 8, got {pairs[bad[0]]}")
    ends: dict[nn.Module, tuple[float, float]] = {}

    def watch(module: nn.Module, args: tuple) -> None:
        low, high = (float(v) for v in args[0].aminmax())
        if not torch.isfinite(torch.tensor([low, high])).all():
            raise BadInput("the calibration loader has values that are not finite")
        before = ends.get(module, (low, high))
        ends[module] = min(low, before[0]), max(high, before[1])

    handles = [m.register_forward_pre_hook(watch) for m in chosen.values()]
    with torch.no_grad():
        for batch in loader:
            result(batch[0] if isinstance(batch, tuple | list) else batch)
    for handle in handles:
        handle.remove()
    if not ends:
        raise BadInput("the calibration loader is empty")
    for name, module in chosen.items():
        if module not in ends:
            continue
        low, high = ends[module]
        module.__class__ = _KINDS[type(module)]
        module.weight_bits, module.input_bits = pairs[name]
        module.input_unsigned = low >= 0
        top = 2**module.input_bits - 1 if low >= 0 else 2 ** (module.input_bits - 1) - 1
        module.register_buffer("input_scale", torch.tensor(max(abs(low), abs(high)) / top or 1.0).to(module.weight))
    return result.train(model.training)
