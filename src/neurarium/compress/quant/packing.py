"""Codes of few bits stored in as few bytes, and layers that keep their weights so.

:func:`pack` writes codes back to back, lowest bit first: n codes of b bits take ceil(n b / 8) bytes, 3-bit codes too. A
:class:`PackedLinear` or :class:`PackedConv2d` has no weight but buffers: packed codes, a table of values (a codebook, a reshaped or an even
grid) and scales. Its saved state is as small as :func:`neurarium.meter.stored_bytes` says. It unpacks on every forward pass: smaller, not
faster. Its bias stays a parameter; ``layer.table = nn.Parameter(layer.table)`` makes the values trainable under fixed codes.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.quant.affine import UniformGrid
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["PackedConv2d", "PackedLinear", "pack", "pack_layer", "packed_bytes", "unpack"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8) if bits <= 8 else count + packed_bytes(count, bits - 8)


def pack(codes: Tensor, bits: int, *, signed: bool = False) -> Tensor:
    """Integer codes in 0 .. 2^bits - 1 as bytes; signed ones (-2^(bits-1) .. 2^(bits-1) - 1) are shifted up first.

    Codes of more than 8 bits are stored as their low bytes, then the packed rest.
    """
    if not 1 <= bits <= 32:
        raise BadInput(f"bits must be in 1..32, got {bits}")
    flat = codes.reshape(-1).to(torch.int64) + (2 ** (bits - 1) if signed else 0)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise BadInput(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {'signed ' if signed else ''}{bits} bits")
    if bits > 8:
        return torch.cat([pack(flat & 255, 8), pack(flat >> 8, bits - 8)])
    group = 8 // math.gcd(8, bits)  # this many codes fill whole bytes
    padded = F.pad(flat, (0, -flat.numel() % group)).view(-1, group)
    word = (padded << (bits * torch.arange(group, device=flat.device))).sum(1)
    out = (word[:, None] >> (8 * torch.arange(bits * group // 8, device=flat.device))) & 255
    return out.flatten()[: packed_bytes(flat.numel(), bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool = False) -> Tensor:
    """The `count` codes that :func:`pack` wrote, int64."""
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, bits):
        size = packed_bytes(count, bits)
        raise BadInput(f"{count} codes of {bits} bits are {size} bytes of uint8, got {packed.numel()} of {packed.dtype}")
    if bits > 8:
        codes = packed[:count].to(torch.int64) + (unpack(packed[count:], bits - 8, count) << 8)
    else:
        group = 8 // math.gcd(8, bits)
        width = bits * group // 8
        padded = torch.constant_pad_nd(packed.to(torch.int64), (0, -packed.numel() % width), 0).view(-1, width)  # F.pad hands on a float
        word = (padded << (8 * torch.arange(width, device=packed.device))).sum(1)
        codes = ((word[:, None] >> (bits * torch.arange(group, device=packed.device))) & (2**bits - 1)).flatten()[:count]
    return codes - (2 ** (bits - 1) if signed else 0)


class _Packed(nn.Module):
    """Buffers ``codes`` (packed), ``table`` (2^bits or fewer values) and ``scale`` (a scalar or one an output channel)."""

    codes: Tensor
    table: Tensor
    scale: Tensor
    bias: Tensor | None

    def _store(self, layer: nn.Module, codes: Tensor, bits: int, table: Tensor, scale: Tensor) -> None:
        shape = tuple(layer.weight.shape)
        if tuple(codes.shape) != shape:
            raise BadInput(f"the codes are {tuple(codes.shape)}, the weight {shape}")
        if table.ndim != 1 or int(codes.max()) >= len(table):
            raise BadInput(f"codes up to {int(codes.max())} need a longer table than {tuple(table.shape)}")
        if scale.ndim and tuple(scale.shape) != shape[:1]:
            raise BadInput(f"scale must be a scalar or one number an output channel ({shape[0]}), got {tuple(scale.shape)}")
        self.bits, self.shape = bits, shape
        dtype, device = layer.weight.dtype, layer.weight.device
        self.register_buffer("codes", pack(codes, bits).to(device))
        self.register_buffer("table", table.detach().to(device, dtype))
        self.register_buffer("scale", scale.detach().to(device, dtype))
        self.bias = copy.deepcopy(layer.bias)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, unpacked anew on every use."""
        values = self.table[unpack(self.codes, self.bits, math.prod(self.shape))].view(self.shape)
        return values * (self.scale.view(-1, *[1] * (len(self.shape) - 1)) if self.scale.ndim else self.scale)

    def _plain(self, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.train(self.training)


class PackedLinear(_Packed):
    """A linear layer whose weight is ``scale * table[codes]``, codes of `bits` bits."""

    def __init__(self, layer: nn.Linear, codes: Tensor, bits: int, table: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._store(layer, codes, bits, table, scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def unpacked(self) -> nn.Linear:
        """An ordinary layer with the same weight."""
        like = {"device": self.table.device, "dtype": self.table.dtype}
        return self._plain(nn.Linear(self.in_features, self.out_features, self.bias is not None, **like))  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class PackedConv2d(_Packed):
    """A convolution whose weight is ``scale * table[codes]``, codes of `bits` bits."""

    def __init__(self, layer: nn.Conv2d, codes: Tensor, bits: int, table: Tensor, scale: Tensor) -> None:
        super().__init__()
        self._options = {
            "in_channels": layer.in_channels, "out_channels": layer.out_channels, "kernel_size": layer.kernel_size, "stride": layer.stride,
            "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups, "padding_mode": layer.padding_mode,
        }  # fmt: skip
        frame = nn.Conv2d(**self._options, bias=False, device="meta")
        frame.weight = None  # type: ignore[assignment]
        self._frame = (frame,)  # knows how to pad; a tuple keeps it out of the state
        self._store(layer, codes, bits, table, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self._frame[0]._conv_forward(x, self.weight, self.bias)

    def unpacked(self) -> nn.Conv2d:
        """An ordinary layer with the same weight."""
        like = {"device": self.table.device, "dtype": self.table.dtype, "bias": self.bias is not None}
        return self._plain(nn.Conv2d(**self._options, **like))  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self._options['in_channels']}, {self._options['out_channels']}, bits={self.bits}"


def pack_layer(
    layer: nn.Module, codes: Tensor | UniformGrid, bits: int | None = None, *, table: Tensor | None = None, scale: Tensor | None = None
) -> PackedLinear | PackedConv2d:
    """A layer with the same sizes whose weights are packed codes.

    Args:
        layer: a plain Linear or Conv2d; its bias is kept in floating point.
        codes: a grid (scalar or along dimension 0), which quantises the layer's own weight; or integer codes of the weight's shape, 0 to
            ``len(table) - 1``.
        bits: of a code; default: of the grid, or what the table needs.
        table: the value of each code.
        scale: a scalar or one factor an output channel, default 1.
    """
    kinds = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
    if type(layer) not in kinds:
        raise UnsupportedModel(f"only {' and '.join(k.__name__ for k in kinds)} can be packed", module=type(layer).__name__)
    if isinstance(codes, UniformGrid):
        grid = codes
        if grid.axis not in (None, 0):
            raise BadInput(f"weights are packed with a scale for the tensor or an output channel (axis 0), got axis {grid.axis}")
        if grid.axis == 0 and int(grid.zero.min()) != int(grid.zero.max()):
            raise BadInput("channels with different zero points cannot share a table: use a symmetric grid")
        zero = int(grid.zero.reshape(-1)[0])
        table = torch.arange(grid.low - zero, grid.high - zero + 1, dtype=torch.float32)
        codes, bits, scale = grid.codes(layer.weight).to(torch.int64) - grid.low, grid.bits if bits is None else bits, grid.scale
    elif table is None:
        raise BadInput("codes need a table of their values")
    bits = max(1, (len(table) - 1).bit_length()) if bits is None else bits
    return kinds[type(layer)](layer, codes, bits, table, torch.ones(()) if scale is None else scale)
