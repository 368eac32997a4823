"""Examples of the room `compress`: channels chosen by a search or by a network that has learnt to."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from neurarium.compress import PruningMetaNet, meta_prune
from neurarium.compress import cacp as search
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(72, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 3),
    )  # fmt: skip


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def _loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(*_inputs(24, 7), torch.arange(24) % 3)]


def cacp() -> Example:
    return Example(
        "transform",
        apply=lambda model: search(model, _loader(), rates=(0.4,), episodes=6)[0.4],
        model=_model,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    )


def _metanet() -> PruningMetaNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PruningMetaNet(hidden=8, layers=2)


def metapruning() -> Example:
    return Example(
        "transform",
        apply=partial(meta_prune, metanet=_metanet(), loader=_loader(), ratio=0.4, first=0.1, finetune_epochs=(1, 1)),
        model=_model,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    )


def _cover_cacp(s: Subject) -> nn.Module:
    x, y = s.loader[0] if s.loader else (s.inputs[0], None)

    def reward(model: nn.Module) -> float:
        return -float(s.loss(model(x), y))

    return search(s.model, s.loader, rates=(0.2,), episodes=2, reward=reward, samples=8)[0.2]


def _cover_metapruning(s: Subject) -> nn.Module:
    return meta_prune(s.model, _metanet(), s.loader, ratio=0.2, first=0.1, loss_fn=s.loss)


COVER = {"cacp": _cover_cacp, "metapruning": _cover_metapruning}
