"""Small networks that the experiments of this room share: stages with exits, an elastic one, a vision transformer.

They are large enough to show what a method does and small enough to train in seconds on a laptop.

*Source.* Exits after the stages of a convolutional network: Teerapittayanon et al., BranchyNet, 2016. The transformer: Dosovitskiy et al.,
"An Image is Worth 16x16 Words", arXiv 2010.11929; it is what the techniques of the survey arXiv 2307.07982 are measured on.

*Departures.* Heads pool to 2x2 instead of to a point; the transformer has no class token, its head reads the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from neurarium.dynamic.decoder import DecoderLayer
from neurarium.dynamic.elastic import Depth, ElasticConv2d, ElasticLinear, ElasticNorm, Statistics, Width
from neurarium.dynamic.exits import ExitChain
from neurarium.errors import BadInput

__all__ = ["BackboneS", "ElasticBackbone", "VisionTransformerS"]


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class BackboneS(ExitChain):
    """Four convolutional stages on images ``(n, channels, height, width)``, each with a 2x2-pooled linear head.

    3x3 convolutions 1->16 (stride 2), 16->16 | 16->32 | 32->48 (stride 2) | 48->64, each with batch normalisation and ReLU.
    28x28x1 costs 6.84 MFLOPs with all four heads.
    """

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        segments = [
            nn.Sequential(_block(channels, 16, 2), _block(16, 16, 1)),
            _block(16, 32, 1),
            _block(32, 48, 2),
            _block(48, 64, 1),
        ]
        super().__init__(segments, [self.head(width, classes) for width in (16, 32, 48, 64)])

    @staticmethod
    def head(width: int, classes: int) -> nn.Sequential:
        """A fresh head on ``width`` channels."""
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))


class _Patches(nn.Module):
    """Images to tokens with a learned position each."""

    def __init__(self, channels: int, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.position


class _MeanTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class VisionTransformerS(nn.Sequential):
    """A small pre-norm vision transformer on images ``(n, channels, image, image)``: ``embed``, ``blocks``, ``norm``, mean, ``head``.

    Without a class token: the head reads the mean over tokens, so any number of them will do.
    """

    def __init__(
        self,
        channels: int = 1,
        image: int = 28,
        patch: int = 4,
        *,
        width: int = 64,
        depth: int = 6,
        heads: int = 4,
        mlp: float = 2,
        classes: int = 10,
    ) -> None:
        if image % patch:
            raise BadInput(f"images of {image} pixels a side cannot be cut into patches of {patch}")
        super().__init__()
        self.embed = _Patches(channels, image, patch, width)
        self.blocks = nn.Sequential(*(DecoderLayer(width, heads, int(mlp * width), causal=False) for _ in range(depth)))
        self.norm, self.pool, self.head = nn.LayerNorm(width), _MeanTokens(), nn.Linear(width, classes)


class ElasticBackbone(nn.Sequential):
    """A convolutional net whose widths and depths are elastic: ``stages`` and a 2x2-pooled linear ``head``, each stage a 3x3 convolution
    and residual blocks (3x3 to ``expand`` times the width, 1x1 back) that may be skipped from the last on.

    :func:`~neurarium.dynamic.elastic.slots` lists its dimensions: of each stage the width ``"stage k"`` and, with blocks, the depth of the
    same name and the inner width ``"expand k.i"`` of each block. Without blocks and with four stages it is BackboneS with elastic layers.

    Args:
        widths, strides, blocks: for each stage.
        norm: ``"group"`` (groups of ``group`` channels, of which whole ones are cut) or ``"batch"``.
        statistics: what batch normalisation keeps for which config, see :class:`~neurarium.dynamic.elastic.ElasticNorm`.
        step: widths come in multiples of it; a group of channels with ``"group"``.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        *,
        widths: Sequence[int] = (16, 32, 48, 64),
        strides: Sequence[int] = (2, 1, 2, 1),
        blocks: Sequence[int] = (0, 0, 1, 1),
        expand: float = 1.0,
        norm: Literal["group", "batch"] = "group",
        statistics: Statistics = "config",
        step: int = 2,
    ) -> None:
        if not len(widths) == len(strides) == len(blocks) or not widths:
            raise BadInput("widths, strides and blocks need one entry a stage")
        if norm not in ("group", "batch"):
            raise BadInput(f"norm must be 'group' or 'batch', not {norm!r}")
        super().__init__()

        def normed(width: Width) -> ElasticNorm:
            plain = nn.GroupNorm(width.size // step, width.size) if norm == "group" else nn.BatchNorm2d(width.size)
            return ElasticNorm(plain, width, statistics)

        self.stages, before = nn.Sequential(), None
        for k, (size, stride, n) in enumerate(zip(widths, strides, blocks)):
            width = Width(f"stage {k}", size, step)
            entry = ElasticConv2d(
                before.size if before else channels, size, 3, inputs=before, outputs=width, stride=stride, padding=1, bias=False
            )
            stage = nn.Sequential(entry, normed(width), nn.ReLU())
            if n:
                inner = [Width(f"expand {k}.{i}", step * max(1, round(expand * size / step)), step) for i in range(n)]
                stage.append(Depth(*(_Residual(width, hidden, normed) for hidden in inner), name=f"stage {k}"))
            self.stages.append(stage)
            before = width
        assert before is not None
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), ElasticLinear(4 * before.size, classes, inputs=before))


class _Residual(nn.Module):
    def __init__(self, width: Width, hidden: Width, normed: Callable[[Width], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ElasticConv2d(width.size, hidden.size, 3, inputs=width, outputs=hidden, padding=1, bias=False), normed(hidden), nn.ReLU(),
            ElasticConv2d(hidden.size, width.size, 1, inputs=hidden, outputs=width, bias=False), normed(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))
