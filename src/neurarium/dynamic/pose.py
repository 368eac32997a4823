"""Video pose transformers: from 2-D joints of F frames to their 3-D positions in every frame.

A block attends over the joints of each frame, then over the frames of each joint, so that every joint of every frame keeps a token of its
own through all blocks. With ``joint_tokens=False`` a frame is one token and a block attends over frames alone. Positions in time (from
sinusoids on) and among the joints are learned codes added once, before the first block.

*Source.* Zhang, Tu, Yang, Chen and Yuan, "MixSTE: Seq2seq Mixed Spatio-Temporal Encoder for 3D Human Pose Estimation in Video", CVPR 2022,
for the alternating blocks.

*Departures.* One block holds both attentions, so that ``blocks`` is one list of length ``depth``; no stochastic depth.

*Cost.* A layer of attention over F tokens, and what follows it, takes 4 (2 + mlp) F dim^2 + 4 F^2 dim FLOPs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from neurarium.dynamic.decoder import DecoderLayer
from neurarium.errors import BadInput

__all__ = ["VideoPoseTransformer", "mpjpe", "pose_loss"]


class _SpaceTimeBlock(nn.Module):
    """Joints of a frame, then frames of a joint: ``(n, frames, joints, dim)``."""

    def __init__(self, space: nn.Module, time: nn.Module) -> None:
        super().__init__()
        self.space, self.time = space, time

    def forward(self, x: Tensor) -> Tensor:
        n, frames, joints, _ = x.shape
        x = self.space(x.flatten(0, 1)).unflatten(0, (n, frames)).transpose(1, 2)
        return self.time(x.flatten(0, 1)).unflatten(0, (n, joints)).transpose(1, 2)


def _sinusoids(places: int, dim: int) -> Tensor:
    """Sines and cosines of ``dim / 2`` frequencies, from one radian a place down to about one over all places."""
    angle = torch.arange(places)[:, None] / (2 * places) ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim]


class VideoPoseTransformer(nn.Module):
    """``(n, frames, joints, inputs) -> (n, frames, joints, outputs)``.

    Args:
        frames, joints: of a sequence.
        dim: width of a token.
        depth: number of blocks.
        heads: of every attention; divides ``dim``.
        mlp: hidden width of a block's layers, in multiples of ``dim``.
        joint_tokens: a token for each joint of each frame; otherwise one for each frame.
    """

    def __init__(
        self,
        frames: int,
        joints: int,
        dim: int = 64,
        depth: int = 5,
        heads: int = 4,
        *,
        mlp: float = 2,
        inputs: int = 2,
        outputs: int = 3,
        joint_tokens: bool = True,
    ) -> None:
        super().__init__()
        if min(frames, joints, dim, depth, heads, mlp * dim, inputs, outputs) < 1 or dim % heads:
            raise BadInput(f"sizes must be at least 1 and heads divide dim; got dim {dim}, heads {heads}, {frames} frames, depth {depth}")
        self.frames, self.joints, self.dim, self.joint_tokens = frames, joints, dim, joint_tokens
        self.inputs, self.outputs = inputs, outputs
        per_token = 1 if joint_tokens else joints
        self.embed = nn.Linear(inputs * per_token, dim)
        self.joint_position = nn.Parameter(0.02 * torch.randn(joints, dim)) if joint_tokens else None
        self.temporal_position = nn.Parameter(0.3 * _sinusoids(frames, dim))
        layer = partial(DecoderLayer, dim, heads, round(mlp * dim), causal=False)
        self.blocks = nn.ModuleList(_SpaceTimeBlock(layer(), layer()) if joint_tokens else layer() for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, outputs * per_token))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != (self.frames, self.joints, self.inputs):
            raise BadInput(f"expected (n, {self.frames}, {self.joints}, {self.inputs}), got {tuple(x.shape)}")
        if self.joint_position is not None:
            x = self.embed(x) + self.joint_position + self.temporal_position[:, None]
        else:
            x = self.embed(x.flatten(2)) + self.temporal_position
        for block in self.blocks:
            x = block(x)
        out = self.head(x)
        return out if self.joint_tokens else out.unflatten(2, (self.joints, self.outputs))


def mpjpe(output: Tensor, target: Tensor) -> Tensor:
    """Mean distance of joints, ``(..., 3), (..., 3) -> ()``: the field's error, "mean per joint position error"."""
    if output.shape != target.shape:
        raise BadInput(f"the output has shape {tuple(output.shape)}, the target {tuple(target.shape)}; they must be the same")
    return (output - target).norm(dim=-1).mean()


def pose_loss(output: Tensor, target: Tensor, *, velocity: float = 0.5) -> Tensor:
    """:func:`mpjpe` of the positions + ``velocity`` times that of the steps from frame to frame; ``(n, frames, joints, 3)``."""
    positions = mpjpe(output, target)
    if output.shape[1] < 2 or not velocity:
        return positions
    return positions + velocity * mpjpe(output.diff(dim=1), target.diff(dim=1))
