"""Sparse convolutions through the same product: pixels are tokens.

A 1 x 1 convolution on channels-last memory is a linear layer over pixels, without a copy. A larger kernel gathers its windows first
(inputs x taps values a pixel), which costs what it costs: the planner measures it against the dense convolution. The matrix has the
columns of ``weight.flatten(1)``; a block 16 x 1 in the 1 x 1 case is 16 filters at one channel.

*Source*: arXiv 2310.19509 (sparse 1 x 1 convolutions over groups of filters). *Departure*: kernels larger than 1 x 1 gather windows
explicitly, no panels are made inside the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.runtime.formats import SparseMatrix
from neurarium.compress.runtime.planner import Choice, candidates
from neurarium.compress.runtime.sparse import SparseLinear
from neurarium.errors import UnsupportedModel
from neurarium.meter import latency

__all__ = ["SparseConv2d", "choose_conv", "unfit"]


class SparseConv2d(SparseLinear):
    """``act(conv2d(x, W) + b)`` with W in a compact form. The output lies in memory channels last."""

    def __init__(self, matrix: SparseMatrix, conv: nn.Conv2d, act: str | None = None) -> None:
        """`conv` gives bias, stride, padding and dilation; its weight is not looked at."""
        if why := unfit(conv):
            raise UnsupportedModel(why, module=type(conv).__name__)
        super().__init__(matrix, conv.bias, act)
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, tuple(conv.kernel_size)
        self.stride, self.dilation, self.padding = tuple(conv.stride), tuple(conv.dilation), conv.padding
        self.edges = tuple(conv._reversed_padding_repeated_twice)  # left, right, top, bottom

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, block: tuple[int, int] = (16, 1), *, act: str | None = None) -> SparseConv2d:
        """The sparse twin of a (masked) convolution, whatever the planner would say."""
        mask = getattr(conv, "mask", None)
        (matrix,) = candidates(conv.weight.detach().flatten(1), mask=None if mask is None else mask.flatten(1), block=block).values()
        return cls(matrix, conv, act).train(conv.training)

    @property
    def weight(self) -> Tensor:
        return self.matrix.to_dense().view(self.out_channels, self.in_channels, *self.kernel_size)

    def to_linear(self) -> nn.Module:
        """A plain dense convolution of the same weights."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, bias=self.bias is not None
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            if self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.to(self.values.device).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self(x[None])[0]
        return super().forward(self._windows(x)).permute(0, 3, 1, 2)

    def _windows(self, x: Tensor) -> Tensor:
        """(batch, height, width, inputs x taps): what each output pixel sees."""
        if any(self.edges):
            x = F.pad(x, self.edges)
        if self.kernel_size == (1, 1):
            return x.permute(0, 2, 3, 1)[:, :: self.stride[0], :: self.stride[1]]
        for i in (0, 1):
            reach = (self.kernel_size[i] - 1) * self.dilation[i] + 1
            x = x.unfold(2 + i, reach, self.stride[i])[..., :: self.dilation[i]]
        return x.permute(0, 2, 3, 1, 4, 5).flatten(3)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def unfit(conv: nn.Conv2d) -> str | None:
    """Why a convolution has no sparse twin, if it has none."""
    if conv.groups != 1:
        return f"has {conv.groups} groups; a grouped convolution has little to skip"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, not with zeros"
    return None


def choose_conv(
    conv: nn.Conv2d, shape: tuple[int, ...], *, block: tuple[int, int] | None = None, margin: float = 1.05, repeats: int = 9
) -> Choice:
    """The fastest way to run a sparse convolution on inputs of this shape: measured as layers, windows and layout included.

    The dense rivals are torch's convolution on channels-last memory and, for a pointwise one, a linear layer over the pixels.
    """
    mask = getattr(conv, "mask", None)
    weight = (conv.weight if mask is None else conv.weight * mask).detach().contiguous(memory_format=torch.channels_last)
    forms = candidates(weight.flatten(1), mask=None if mask is None else mask.flatten(1), block=block)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    runs: dict[str, Callable] = {"dense convolution": lambda: conv._conv_forward(x, weight, conv.bias)}
    if conv.kernel_size == (1, 1) and not any(conv._reversed_padding_repeated_twice) and tuple(conv.stride) == (1, 1):
        flat = weight.flatten(1).contiguous()
        runs["dense linear"] = lambda: F.linear(x.permute(0, 2, 3, 1), flat, conv.bias)
    runs |= {name: partial(SparseConv2d(form, conv), x) for name, form in forms.items()}
    with torch.no_grad():
        seconds = {n: t.low for n, t in latency(runs, repeats=repeats, warmup=2).items()}
    return _best(forms, seconds, margin, pixels(conv, shape))


def pixels(conv: nn.Conv2d, shape: tuple[int, ...]) -> int:
    """Output pixels of a whole batch."""
    with torch.device("meta"):
        probe = nn.Conv2d(conv.in_channels, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)
        return probe(torch.empty(shape)).numel()


def _best(forms: Mapping[str, SparseMatrix], seconds: Mapping[str, float], margin: float, tokens: int) -> Choice:
    dense = min((n for n in seconds if n not in forms), key=lambda n: seconds[n])
    best = min(forms, key=lambda n: seconds[n])
    winner = best if seconds[best] * margin < seconds[dense] else dense
    return Choice(winner, forms.get(winner), seconds, tokens, True)
