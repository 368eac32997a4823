"""Examples of the room `compress`: channels chosen with the help of gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from neurarium.compress import explicit
from neurarium.compress import hap as remove
from neurarium.compress import trainable_gate as train_gates
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(72, 12), nn.GELU(), nn.Linear(12, 3),
    )  # fmt: skip


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def _unsupported() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def hap() -> Example:
    loader = [(*_inputs(24, 7), torch.arange(24) % 3)]
    return Example(
        "transform",
        apply=partial(remove, loader=loader, ratio=0.4, implant=0.4, probes=4, samples=24),
        model=_model,
        inputs=_inputs,
        unsupported=_unsupported,
    )


def trainable_gate() -> Example:
    loader = [(*_inputs(8, 7 + i), torch.arange(8) % 3) for i in range(2)]
    return Example(
        "transform",
        apply=partial(train_gates, loader=loader, target=0.5, epochs=2, finetune=1),
        model=_model,
        inputs=_inputs,
        unsupported=_unsupported,
    )


def _hap(s: Subject) -> nn.Module:
    return remove(explicit(s.model), s.loader, ratio=0.3, implant=0.3, probes=2, samples=8, loss_fn=s.loss)


def _gated(s: Subject) -> nn.Module:
    return train_gates(explicit(s.model), s.loader, target=0.8, epochs=1, finetune=1, loss_fn=s.loss)


COVER: dict[str, Callable[[Subject], nn.Module]] = {"hap": _hap, "trainable-gate": _gated}
