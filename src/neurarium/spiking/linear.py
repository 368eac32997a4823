"""Layers that remember a spiking input in one byte an element, or not at all.

The weight gradient needs the layer's input. A float32 copy of every step's spikes is as much memory as all membranes together; spikes are
0 or 1, so one byte does, exactly. After ``n x n`` average pooling the values are multiples of ``1 / n^2``: say ``levels=n*n``. An input
that is not what was declared (an image, say) is kept as it is, so the gradient is always that of the ordinary layer, bit for bit.
Average pooling is linear and needs its input's shape alone, though torch's keeps the input.

*Cost.* A quarter of the saved bytes (an eighth in float64), for one conversion in each direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput

__all__ = ["SpikeAvgPool2d", "SpikeConv2d", "SpikeLinear"]


class SpikeConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` for inputs that are multiples of ``1 / levels`` between 0 and ``255 / levels``."""

    def __init__(self, *args: Any, levels: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.levels = _levels(levels)

    def forward(self, input: Tensor) -> Tensor:
        plain = isinstance(self.padding, str) or self.padding_mode != "zeros" or input.dim() != 4 or not _useful(self.weight, input)
        if plain:
            return super().forward(input)
        return _Conv.apply(input, self.weight, self.bias, (self.stride, self.padding, self.dilation, self.groups), self.levels)


class SpikeLinear(nn.Linear):
    """:class:`torch.nn.Linear` for inputs that are multiples of ``1 / levels`` between 0 and ``255 / levels``."""

    def __init__(self, *args: Any, levels: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.levels = _levels(levels)

    def forward(self, input: Tensor) -> Tensor:
        return _Linear.apply(input, self.weight, self.bias, self.levels) if _useful(self.weight, input) else super().forward(input)


class SpikeAvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` that keeps nothing for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.requires_grad or input.dim() != 4 or torch.compiler.is_compiling():
            return super().forward(input)
        kernel, stride, padding = (list(nn.modules.utils._pair(a)) for a in (self.kernel_size, self.stride, self.padding))
        return _Pool.apply(input, kernel, stride, padding, self.ceil_mode, self.count_include_pad, self.divisor_override)


def _levels(levels: int) -> int:
    if not 1 <= levels <= 255:
        raise BadInput(f"levels must lie in 1..255, not {levels}")
    return levels


def _useful(weight: Tensor, x: Tensor) -> bool:
    mixed = x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type)
    return weight.requires_grad and torch.is_grad_enabled() and x.dim() > 1 and not mixed and not torch.compiler.is_compiling()


def _pack(x: Tensor, levels: int) -> Tensor:
    small = (x if levels == 1 else x * levels).to(torch.uint8)
    return small if torch.equal(_unpack(small, x.dtype, levels), x) else x


def _unpack(kept: Tensor, dtype: torch.dtype, levels: int) -> Tensor:
    if kept.dtype != torch.uint8:
        return kept
    return kept.to(dtype) if levels == 1 else kept.to(dtype).div_(levels)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, levels: int) -> Tensor:
        ctx.save_for_backward(_pack(x, levels), weight)
        ctx.geometry, ctx.levels, ctx.bias = geometry, levels, None if bias is None else list(bias.shape)
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        x = _unpack(kept, weight.dtype, ctx.levels)
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(g, x, weight, ctx.bias, stride, padding, dilation, False, [0, 0], groups, wanted)
        return *grads, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, levels: int) -> Tensor:
        ctx.save_for_backward(_pack(x, levels), weight)
        ctx.levels = levels
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = g.flatten(0, -2)
        return (
            g @ weight if need_x else None,
            rows.t() @ _unpack(kept, weight.dtype, ctx.levels).flatten(0, -2) if need_weight else None,
            rows.sum(0) if need_bias else None,
            None,
        )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        ctx.shape, ctx.settings = x.shape, settings
        ctx.memory_format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return F.avg_pool2d(x, *settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kernel, stride, padding = ctx.settings[:3]
        if kernel == stride and padding == [0, 0] and all(n == m * k for n, m, k in zip(ctx.shape[2:], g.shape[2:], kernel)):
            share = g * (1 / (ctx.settings[5] or kernel[0] * kernel[1]))  # each cell's error is spread evenly: one pass over fresh memory
            return F.interpolate(share, size=ctx.shape[2:], mode="nearest"), *[None] * 6
        like = torch.empty(ctx.shape, dtype=g.dtype, device=g.device, memory_format=ctx.memory_format)  # its values are never read
        return torch.ops.aten.avg_pool2d_backward(g, like, *ctx.settings), *[None] * 6
