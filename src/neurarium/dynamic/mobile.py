"""Networks of inverted residuals, described by a small record that can be changed before they are built.

:func:`redistribute` makes a network whose patch stage sees less: the same FLOPs, moved behind the split. Depthwise kernels of the stage
that do not stride become 1x1, repeated blocks leave it, and blocks are added to the later stages until the FLOPs are those of before.
Halos shrink with the receptive field, and with them the work that patch-based inference does twice. MobileNetV2 with 7x7 output tiles at
stride 8 then reads 63x63 pixels a tile instead of 75x75.

*Source.* Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381 (the network);
Lin, Chen, Cai, Gan, Han, "MCUNetV2", arXiv 2110.15352 (redistribution).

*Departures.* Which blocks to add is found by trying all combinations instead of by a search over trained networks: the FLOPs decide, not
accuracy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from torch import Tensor, nn

from neurarium.errors import BadInput

__all__ = ["MOBILENET_V2", "Block", "ConvNorm", "InvertedResidual", "MobileConfig", "flops", "mobile_net", "redistribute"]


@dataclass(frozen=True)
class Block:
    """An inverted residual: 1x1 to ``expand`` times the channels, depthwise ``kernel``, 1x1 to ``channels``."""

    expand: int
    channels: int
    stride: int = 1
    kernel: int = 3


@dataclass(frozen=True)
class MobileConfig:
    """Stem (3x3, stride 2), blocks, a last 1x1 convolution of ``head`` channels (0: none), global average, linear classifier."""

    stem: int
    blocks: tuple[Block, ...]
    head: int
    classes: int = 1000
    inputs: int = 3

    def scaled(self, width: float) -> MobileConfig:
        """All channels times ``width``, rounded to 4."""

        def to(n: int) -> int:
            return max(4, round(n * width / 4) * 4)

        blocks = tuple(replace(b, channels=to(b.channels)) for b in self.blocks)
        return replace(self, stem=to(self.stem), blocks=blocks, head=to(self.head) if self.head else 0)


def _stages(*rows: tuple[int, int, int, int]) -> tuple[Block, ...]:
    return tuple(Block(t, c, s if i == 0 else 1) for t, c, n, s in rows for i in range(n))


#: the published network, 3.5 M parameters
MOBILENET_V2 = MobileConfig(
    32, _stages((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)), 1280
)


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, unless it is linear, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([] if linear else [nn.ReLU6()]))


class InvertedResidual(nn.Module):
    """One :class:`Block` on ``inputs`` channels; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        hidden = inputs * block.expand
        self.expand = ConvNorm(inputs, hidden) if block.expand != 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, block.kernel, block.stride, hidden)
        self.project = ConvNorm(hidden, block.channels, linear=True)
        self.shortcut = block.stride == 1 and inputs == block.channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


def mobile_net(config: MobileConfig = MOBILENET_V2) -> nn.Sequential:
    """The network: children stem, one for each block, head (if any), pool, flatten, classifier."""
    layers: list[nn.Module] = [ConvNorm(config.inputs, config.stem, 3, 2)]
    width = config.stem
    for block in config.blocks:
        layers.append(InvertedResidual(width, block))
        width = block.channels
    if config.head:
        layers.append(ConvNorm(width, config.head))
        width = config.head
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, config.classes))


def redistribute(config: MobileConfig, example: Tensor, *, split: int | None = None) -> MobileConfig:
    """A network of nearly the same FLOPs with a smaller receptive field in the patch stage.

    Args:
        example: an image ``(n, channels, height, width)``, for the FLOPs.
        split: children of :func:`mobile_net` in the patch stage, the stem included; by default those up to the first of stride 8.
    """
    total = list(itertools.accumulate((b.stride for b in config.blocks), lambda a, b: a * b, initial=2))[1:]
    if split is None:
        split = 2 + next((i for i, s in enumerate(total) if s >= 8), len(total) - 1)
    if not 1 <= split <= len(config.blocks):
        raise BadInput(f"split must be 1 to {len(config.blocks)} (the stem and the blocks before the rest), not {split}")
    early, late = list(config.blocks[: split - 1]), list(config.blocks[split - 1 :])
    widths = [config.stem, *(b.channels for b in early)]
    repeated = [b.stride == 1 and b.channels == w for w, b in zip(widths, early)]
    early = [b if b.stride > 1 else replace(b, kernel=1) for b, again in zip(early, repeated) if not again]
    aim = flops(config, example)

    def with_extra(extra: tuple[int, ...]) -> MobileConfig:
        grown = [b for block, n in zip(late, extra) for b in (block, *[replace(block, stride=1)] * n)]
        return replace(config, blocks=(*early, *grown))

    base = flops(with_extra((0,) * len(late)), example)
    ends = [i for i, b in enumerate(late) if i + 1 == len(late) or late[i + 1].channels != b.channels or late[i + 1].stride > 1]
    one = {i: flops(with_extra(tuple(int(i == j) for j in range(len(late)))), example) - base for i in ends}
    ranges = [range(int((aim - base) // one[i]) + 2) if i in one else range(1) for i in range(len(late))]
    if max(len(r) for r in ranges) > 8:
        ranges = [range(min(len(r), 8)) for r in ranges]
    best = min(itertools.product(*ranges), key=lambda e: (abs(base + sum(n * one.get(i, 0) for i, n in enumerate(e)) - aim), sum(e)))
    return with_extra(best)


def flops(config: MobileConfig, example: Tensor) -> int:
    """Of one image, as a FLOP counter counts them."""
    channels, height, width = example.shape[1:]
    if channels != config.inputs:
        raise BadInput(f"the network takes {config.inputs} channels, the example has {channels}")
    height, width = -(-height // 2), -(-width // 2)
    macs, inputs = height * width * 9 * channels * config.stem, config.stem
    for b in config.blocks:
        hidden = inputs * b.expand
        macs += height * width * inputs * hidden * (b.expand != 1)
        padding = 2 * (b.kernel // 2) - b.kernel
        height, width = (height + padding) // b.stride + 1, (width + padding) // b.stride + 1
        macs += height * width * hidden * (b.kernel**2 + b.channels)
        inputs = b.channels
    macs += height * width * inputs * config.head
    return 2 * (macs + (config.head or inputs) * config.classes)
