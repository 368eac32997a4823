"""Examples of the room `compress`: one network made of several, and teachers of landmarks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from neurarium.compress import LandmarkKD, cla_fuse
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _chain(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for into, out in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * widths[-1], 3))


def _small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _chain((4, 6))


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def clafusion() -> Example:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        large = _chain((5, 6, 8))
    loader = [(*_inputs(24, 7), torch.arange(24) % 3)]
    return Example(
        "transform",
        apply=lambda model: cla_fuse(large, model, loader),
        model=_small,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    )


def _fused(subject: Subject) -> nn.Module:
    """With a copy whose weights are slightly others."""
    other = copy.deepcopy(subject.model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=draw))
    return cla_fuse(other, subject.model, subject.loader, samples=8)


def _points(seed: int, hidden: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 8))


def _student(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(36, 8))


def landmark_kd() -> Example:
    with torch.random.fork_rng():
        tough, tolerant = _points(1), _points(2)

    def loader(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        return [(*_inputs(6, i), torch.rand(6, 8, generator=draw) - 0.5) for i in range(2)]

    return Example(
        "learner",
        make=lambda: LandmarkKD(tough, tolerant),
        model=_student,
        loader=loader,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.ReLU()),
    )


def _taught(subject: Subject) -> nn.Module:
    """A copy that learns, for two steps, points of the shape of its own outputs from two teachers near by."""
    student, *teachers = (copy.deepcopy(subject.model) for _ in range(3))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for teacher in teachers:
            for p in teacher.parameters():
                p.mul_(1 + 0.05 * torch.randn(p.shape, generator=draw))
        outputs = [subject.model(x) for x, _ in subject.loader]
        outputs = [getattr(out, "logits", out) for out in outputs]
        loader = [(x, out + 0.1 * torch.randn(out.shape, generator=draw)) for (x, _), out in zip(subject.loader, outputs, strict=True)]
    LandmarkKD(*teachers).fit(student, loader, epochs=1)
    return student.eval()


COVER: dict[str, Callable[[Subject], nn.Module]] = {"clafusion": _fused, "landmark-kd": _taught}
