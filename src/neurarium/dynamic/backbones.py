"""Small networks with exits that the experiments of this room share."""

from __future__ import annotations

from torch import nn

from neurarium.dynamic.exits import ExitChain

__all__ = ["BackboneS"]


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
