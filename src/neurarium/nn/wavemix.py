"""WaveMix: mix the pixels of an image by a fixed wavelet transform, and learn only what happens to channels.

    r = conv1x1(x)                          C -> C/4 channels
    z = [LL, details] of the Haar transform of r      C channels at half the resolution; nothing is lost
    y = x + norm(upsample(conv1x1(gelu(conv1x1(z)))))   C -> mult C -> ff -> C channels, back at full resolution

The transform has no weights, spreads every pixel over its neighbourhood and leaves a quarter of the positions for the layers that cost
something. With L levels the same r is transformed to level 1..L; the coarsest map is mixed first and handed, twice enlarged, to the next
finer one, so that one block sees 2^L pixels around.

*Source*: Jeevan, Viswanathan, Sethi, "WaveMix: A Resource-efficient Neural Network for Image Analysis" (2022).

The bands come in the order of the authors' package: LL of all channels, then LH, HL, HH of the first, of the second, ...

*Departures*: sides that 2^L does not divide are padded with zeros and cropped. The norm's scale starts at 1/sqrt 2 instead of 1, so that
the signal of ten blocks in a row grows less than threefold. ``dropout=0.5`` is the paper's; networks below some 10,000 parameters need
less (0 to 0.1). :func:`wave_mixing` puts blocks into a user's own model.

*Cost*: a block of one level has C^2/4 + 2 mult C^2 weights, applied at the full and at a quarter of the positions; the
transposed convolution, if used, adds 16 C ff and most of the work; ``upsample="bilinear"`` has no weights.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.nn.replace import Rule
from neurarium.nn.wavelet import HaarDWT2d

__all__ = ["WaveBlock", "WaveMix", "WaveMixLite", "wave_mixing"]

Upsample = Literal["deconv", "bilinear"]


class WaveBlock(nn.Module):
    """``(batch, channels, h, w)`` to the same shape: x + what the wavelet bands of x say.

    Args:
        channels: C, a multiple of 4.
        levels: L of the transform. mult, ff_channels: widths mult C and ff (default C) of the two 1x1 convolutions.
        upsample: ``"deconv"``, a transposed 4x4 convolution, or ``"bilinear"``, which needs ff = C (C/2 on the coarser levels).
        residual: whether x is added.
    """

    def __init__(
        self, channels: int, *, levels: int = 1, mult: int = 2, ff_channels: int | None = None, dropout: float = 0.5,
        upsample: Upsample = "deconv", residual: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if channels < 4 or channels % 4 or levels < 1 or mult < 1:
            raise BadInput(f"channels = {channels} must be a multiple of 4, levels = {levels} and mult = {mult} at least 1")
        if upsample not in ("deconv", "bilinear"):
            raise BadInput(f"upsample is 'deconv' or 'bilinear', not {upsample!r}")
        if upsample == "bilinear" and ff_channels not in (None, channels):
            raise BadInput(f"without a transposed convolution ff_channels = {ff_channels} cannot become {channels} channels")
        self.channels, self.levels, self.residual = channels, levels, residual
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.transform = HaarDWT2d()
        self.mix = nn.ModuleList()  # level 1, 2, ...
        for level in range(1, levels + 1):
            inner = channels if level == levels else channels + channels // 2
            self.mix.append(_Mix(inner, channels if level == 1 else channels // 2, mult * channels, ff_channels, dropout, upsample))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise BadInput(f"the block mixes (batch, {self.channels}, height, width), x is {tuple(x.shape)}")
        height, width = x.shape[2:]
        unit = 2**self.levels
        r = F.pad(self.reduce(x), (0, -width % unit, 0, -height % unit))
        bands = []
        for _ in range(self.levels):
            z = self.transform(r)
            r, details = z.split([z.shape[1] // 4, 3 * z.shape[1] // 4], 1)
            # bands of one channel side by side, as in the authors' package
            bands.append(torch.cat([r, details.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2)], 1))
        h = self.mix[-1](bands[-1])
        for z, mix in zip(bands[-2::-1], list(self.mix)[-2::-1]):
            h = mix(torch.cat([z, h], 1))
        h = h[..., :height, :width]
        return x + h if self.residual else h

    def extra_repr(self) -> str:
        return f"channels={self.channels}, levels={self.levels}"


class _Mix(nn.Sequential):
    """1x1 convolutions on the bands of one level, and back to twice the resolution."""

    def __init__(self, inner: int, out: int, hidden: int, ff: int | None, dropout: float, upsample: Upsample) -> None:
        ff = out if ff is None or upsample == "bilinear" else ff
        up = nn.ConvTranspose2d(ff, out, 4, stride=2, padding=1) if upsample == "deconv" else _Twice()
        super().__init__(
            nn.Conv2d(inner, hidden, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(hidden, ff, 1), up, nn.BatchNorm2d(out)
        )  # fmt: skip
        nn.init.constant_(self[-1].weight, 0.5**0.5)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class WaveMix(nn.Module):
    """The whole network: stem, ``depth`` blocks, head.

    Args:
        in_channels: of the image. num_classes: outputs (``head="restore"``: channels of the image that comes out).
        patch: the stem's factor of resolution, a power of 2 unless ``head="classify"``.
        stem: ``"patch"`` (two 3x3 convolutions and one of patch size, GELU, batch norm) or ``"strided"`` (3x3 convolutions of stride 2, one
            for each factor of 2 in ``patch``, then GELU and batch norm), or ``"plain"`` (two 3x3 convolutions, full resolution).
        head: ``"classify"``: (batch, classes). ``"segment"``, ``"restore"``: maps of the input's size, by transposed convolutions, or by
            bilinear enlargement and a 3x3 convolution.
        mult, dropout, upsample, levels: see :class:`WaveBlock`.
    """

    def __init__(
        self, in_channels: int, num_classes: int, depth: int = 16, channels: int = 192, levels: int = 3, patch: int = 4, *,
        stem: Literal["patch", "strided", "plain"] = "patch", head: Literal["classify", "segment", "restore"] = "classify",
        mult: int = 2, dropout: float = 0.5, upsample: Upsample = "deconv",
    ) -> None:  # fmt: skip
        super().__init__()
        if stem not in ("patch", "strided", "plain") or head not in ("classify", "segment", "restore"):
            raise BadInput(f"stem {stem!r} is patch, strided or plain; head {head!r} is classify, segment or restore")
        steps = patch.bit_length() - 1
        if patch < 1 or (2**steps != patch and (stem == "strided" or head != "classify")):
            raise BadInput(f"patch = {patch} must be a power of 2 for this stem and head")
        self.head_kind, self.patch = head, 1 if stem == "plain" else patch
        half, quarter = channels // 2, channels // 4
        if stem == "plain":
            layers: list[nn.Module] = [nn.Conv2d(in_channels, half, 3, padding=1), nn.Conv2d(half, channels, 3, padding=1)]
        elif stem == "patch":
            layers = [nn.Conv2d(in_channels, quarter, 3, padding=1), nn.Conv2d(quarter, half, 3, padding=1)]
            layers += [nn.Conv2d(half, channels, patch, stride=patch), nn.GELU(), nn.BatchNorm2d(channels)]
        else:
            widths = [in_channels, *[half] * (steps - 1), channels]
            layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)]
            layers += [nn.GELU(), nn.BatchNorm2d(channels)]
        self.stem = nn.Sequential(*layers)
        options = {"levels": levels, "mult": mult, "dropout": dropout, "upsample": upsample}
        self.blocks = nn.Sequential(*[WaveBlock(channels, **options) for _ in range(depth)])
        if head == "classify":
            self.head: nn.Module = nn.Linear(channels, num_classes)
        elif head == "segment":
            ups: list[nn.Module] = []
            for _ in range(self.patch.bit_length() - 1):
                ups += [nn.ConvTranspose2d(channels, half, 4, stride=2, padding=1), nn.GELU()]
                channels, half = half, max(half // 2, 1)
            self.head = nn.Sequential(*ups, nn.Conv2d(channels, num_classes, 1))
        else:
            up = [nn.Upsample(scale_factor=self.patch, mode="bilinear")] if self.patch > 1 else []
            self.head = nn.Sequential(*up, nn.Conv2d(channels, num_classes, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.head_kind == "classify":
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))
        x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        return self.head(self.blocks(self.stem(x)))[..., :height, :width]


class WaveMixLite(WaveMix):
    """The small network of one level at full resolution: two 3x3 convolutions, ``depth`` blocks, a classifier.

    With ``upsample="bilinear"``: 8 channels and 10 blocks make 3,566 parameters for MNIST, 32 and 7 37,058 for CIFAR-10. With
    ``"deconv"``: 8 and 5 7,156 for Fashion-MNIST, 64 and 6 520,106 for CIFAR-10.
    """

    def __init__(
        self, in_channels: int, num_classes: int, depth: int, channels: int, *, mult: int = 2, dropout: float = 0.5,
        upsample: Upsample = "deconv",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, num_classes, depth, channels, 1, 1, stem="plain", mult=mult, dropout=dropout, upsample=upsample)


def wave_mixing(
    *, levels: int = 1, mult: int = 2, dropout: float = 0.0, upsample: Upsample = "bilinear", init: Literal["fresh"] = "fresh"
) -> Rule:  # fmt: skip
    """The rule for :func:`neurarium.nn.replace.replace_layers` that puts a :class:`WaveBlock` in the place of spatial convolutions.

    Where the number of channels changes, a 1x1 convolution changes it in front of the block. Kept, with the reason in the report:
    1x1 convolutions, those that change the resolution (stride, padding), outputs that are no multiple of 4, subclasses. There is no
    ``init="fit"``: a block reads its bands through a narrow nonlinear layer and has no weights that come near a given kernel.
    """
    if init != "fresh":
        raise BadInput(f"init={init!r}: no weights of a WaveBlock come near those of a convolution; it starts 'fresh' and is trained")

    def match(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)

    def build(old: nn.Module) -> nn.Module:
        if type(old) is not nn.Conv2d:
            raise BadInput(f"{type(old).__name__} derives from Conv2d and may compute something else: give it a rule of its own")
        reach = [d * (k - 1) for d, k in zip(old.dilation, old.kernel_size)]
        same = old.padding == "same" or (not isinstance(old.padding, str) and [2 * p for p in old.padding] == reach)
        if old.stride != (1, 1) or not same:
            raise BadInput(f"stride {old.stride} and padding {old.padding} change the resolution, which a WaveBlock keeps")
        if old.out_channels % 4:
            raise BadInput(f"its {old.out_channels} outputs are no multiple of 4")
        block = WaveBlock(old.out_channels, levels=levels, mult=mult, dropout=dropout, upsample=upsample)
        if old.in_channels == old.out_channels:
            return block
        return nn.Sequential(nn.Conv2d(old.in_channels, old.out_channels, 1), block)

    return Rule(match, build)
