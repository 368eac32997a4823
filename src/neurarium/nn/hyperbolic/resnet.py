"""A residual network whose features are points of the Poincaré ball from the pixels to the classifier.

Pixels are tangent vectors at the origin. A block is convolution, batch normalisation, ReLU, convolution, batch normalisation, and the
Möbius sum with its input (a strided 1x1 convolution of it where the shape changes), then ReLU. Between layers the *logarithm at the
origin* of every point is carried, since convolutions and activations act on it anyway. Pooling averages these logarithms; the classifier
is a hyperbolic multinomial regression. Depth is 6n + 2: a stem, three stages of n blocks, a classifier.

*Source*: van Spengler, Berkhout, Mettes, "Poincaré ResNet" (2023).

*Departures*: running statistics in eval mode and a learnable curvature, as in :mod:`.layers`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput
from neurarium.nn.hyperbolic.ball import PoincareBall
from neurarium.nn.hyperbolic.layers import PMLR, PBatchNorm, PConv2d, PResidual

__all__ = ["PoincareBlock", "PoincareResNet"]


class PoincareBlock(nn.Module):
    """Two 3x3 convolutions and a Möbius sum, tangent vectors (n, inner, h, w) -> (n, out, h/stride, w/stride)."""

    def __init__(
        self, inner: int, out: int, ball: PoincareBall, *, stride: int = 1, init: str = "identity",
        center: Literal["midpoint", "frechet"] = "midpoint",
    ) -> None:  # fmt: skip
        super().__init__()
        across = ("tangent", "ball")

        def conv(inner: int, kernel: int, stride: int) -> PConv2d:
            return PConv2d(inner, out, kernel, ball, stride=stride, padding=kernel // 2, init=init, space=across)

        body = nn.Sequential(
            conv(inner, 3, stride),
            PBatchNorm(out, ball, center=center, space=("ball", "tangent")),
            nn.ReLU(),
            conv(out, 3, 1),
            PBatchNorm(out, ball, center=center),
        )
        same = stride == 1 and inner == out
        self.sum = PResidual(body, ball, shortcut=_Exp0(ball) if same else conv(inner, 1, stride))
        self.ball = ball

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.ball.logmap0(self.sum(x).movedim(1, -1)).movedim(-1, 1))


class _Exp0(nn.Module):
    """Tangent vectors to points, over the channels."""

    def __init__(self, ball: PoincareBall) -> None:
        super().__init__()
        self.ball = ball

    def forward(self, x: Tensor) -> Tensor:
        return self.ball.expmap0(x.movedim(1, -1)).movedim(-1, 1)


class PoincareResNet(nn.Module):
    """Images (n, in_channels, h, w) -> logits. ``depth`` is 6n + 2. One ball of curvature -c is shared by all layers, or give your own.

    ``init``: of the convolutions, ``"identity"`` as published, ``"centre"`` or ``"normal"``. ``center``: of the batch normalisations.
    """

    def __init__(
        self, channels: tuple[int, int, int] = (8, 16, 32), depth: int = 20, num_classes: int = 10, c: float = 0.1, *, in_channels: int = 3,
        init: Literal["identity", "centre", "normal"] = "identity", center: Literal["midpoint", "frechet"] = "midpoint",
        ball: PoincareBall | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise BadInput(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 26, 32, ...), not {depth}")
        if len(channels) != 3 or min(channels) < 1:
            raise BadInput(f"channels are three positive widths, not {channels}")
        self.ball = ball = PoincareBall(c) if ball is None else ball
        first = channels[0]
        self.stem = nn.Sequential(
            PConv2d(in_channels, first, 3, ball, padding=1, init=init, space=("tangent", "ball")),
            PBatchNorm(first, ball, center=center, space=("ball", "tangent")),
            nn.ReLU(),
        )
        blocks, inner = [], first
        for stage, width in enumerate(channels):
            for i in range((depth - 2) // 6):
                blocks.append(PoincareBlock(inner, width, ball, stride=2 if stage and not i else 1, init=init, center=center))
                inner = width
        self.blocks = nn.Sequential(*blocks)
        self.head = PMLR(inner, num_classes, ball, space="tangent")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
