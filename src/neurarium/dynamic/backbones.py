"""Small networks with exits that the experiments of this room share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.dynamic.decoder import DecoderLayer
from neurarium.dynamic.exits import ExitChain
from neurarium.errors import BadInput

__all__ = ["BackboneS", "VisionTransformerS"]


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
