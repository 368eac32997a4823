"""Moving skeletons: a stand-in for video of people, whose true joints and whose speed are known exactly.

A skeleton has 17 joints. Five slow oscillators move it through a mixing matrix that all sequences share, so poses lie near a
five-dimensional surface. Time itself runs in bursts: a clock that switches between nearly standing still and running, so some stretches of
frames are almost copies of each other and others are not. A camera at an angle of its own sees the joints in perspective, with an error on
each joint and frame like that of a detector. Everything is seeded, and sequence i of a part does not depend on how many there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurarium.data.tensors import TensorData, generator
from neurarium.errors import BadInput

__all__ = ["PoseTask", "pose_sequences"]

JOINTS, LATENTS = 17, 5
SLOW, FAST = 0.05, 2.0  # clock ticks a frame
_STAY = 0.88  # probability that the clock keeps its speed from one frame to the next
_CHUNK = 20  # sequences drawn at a time, each with a generator of its own
_DISTANCE = 4.0  # of the camera, in half body heights

#: x to the side, y up, z to the front; the root (hips) at the origin, half a body is about 1
_REST = (
    (0, 0, 0), (0.15, 0, 0), (0.17, -0.5, 0.03), (0.17, -1.0, 0), (-0.15, 0, 0), (-0.17, -0.5, 0.03), (-0.17, -1.0, 0),
    (0, 0.27, 0), (0, 0.55, 0), (0, 0.68, 0.05), (0, 0.85, 0.03),
    (-0.2, 0.5, 0), (-0.3, 0.22, 0), (-0.33, -0.02, 0.08), (0.2, 0.5, 0), (0.3, 0.22, 0), (0.33, -0.02, 0.08),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class PoseTask:
    """Seen joints (n, frames, 17, 2) with true root-relative joints (n, frames, 17, 3), and the clock's speed (n, frames)."""

    train: TensorData
    test: TensorData
    train_speed: Tensor
    test_speed: Tensor
    name: str = "pose-sequences"
    note: str = "moving skeletons with a bursty clock"

    @property
    def frames(self) -> int:
        return self.train.x.shape[1]

    @property
    def joints(self) -> int:
        return self.train.x.shape[2]


def pose_sequences(train: int = 480, test: int = 100, *, frames: int = 54, noise: float = 0.10, seed: int = 0) -> PoseTask:
    """Sequences of seen 2-D joints and their true 3-D joints.

    Args:
        train, test: numbers of sequences.
        frames: in each.
        noise: standard deviation of the error on each seen coordinate; half a body is about 1.
        seed: of everything, the mixing matrix included.
    """
    if train < 1 or test < 1 or frames < 2 or not 0 <= noise < math.inf:
        raise BadInput(f"train and test need a sequence, frames at least 2, noise at least 0; got {train}, {test}, {frames}, {noise}")
    g = generator(seed, 2, 0)
    mixing = torch.randn(LATENTS, JOINTS, 3, generator=g) * (0.12 + 0.28 * torch.tensor(_REST).norm(dim=1))[:, None]
    mixing[:, 0] = 0  # the root stays where it is
    parts = []
    for part, n in enumerate((train, test)):
        drawn = [_draw(generator(seed, part, i), frames, noise, mixing) for i in range(-(-n // _CHUNK))]
        parts.append([torch.cat(t)[:n] for t in zip(*drawn, strict=True)])
    return PoseTask(TensorData(*parts[0][:2]), TensorData(*parts[1][:2]), parts[0][2], parts[1][2])


def _draw(g: torch.Generator, frames: int, noise: float, mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = _CHUNK
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)  # noqa: E731
    switches = (torch.rand(n, frames, generator=g) > _STAY).cumsum(1)
    fast = (switches + torch.randint(2, (n, 1), generator=g)) % 2 == 1
    speed = torch.where(fast, FAST, SLOW)
    clock = speed.cumsum(1)
    phase = uniform(0, 2 * math.pi, 1, LATENTS) + uniform(0.06, 0.16, 1, LATENTS) * clock[:, :, None]
    pose = torch.tensor(_REST) + torch.einsum("nfl,ljc->nfjc", uniform(0.5, 1, 1, LATENTS) * phase.sin(), mixing)
    turn = uniform(-0.5, 0.5)
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    x, y, z = pose.unbind(3)
    seen = torch.stack([cos * x + sin * z, y, cos * z - sin * x], 3)  # in the camera's axes
    flat = _DISTANCE * seen[..., :2] / (_DISTANCE - seen[..., 2:])
    return flat + noise * torch.randn(flat.shape, generator=g), seen, speed
