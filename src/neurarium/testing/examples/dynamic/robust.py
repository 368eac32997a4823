"""Tiny examples: families of networks under attack."""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.elastic import Config, ElasticFamily
from neurarium.dynamic.robust_family import ProARD
from neurarium.testing.example import Example


def _images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three bright bars in [0, 1], one of which is thicker."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    x = 0.3 * torch.rand(n, 1, 8, 8, generator=g)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 2 * label : 2 * label + 3] += 0.6
    return x, y


def _family(seed: int, norm: str = "group") -> ElasticFamily:
    torch.manual_seed(seed)
    model = ElasticBackbone(classes=3, widths=(4, 6), strides=(2, 1), blocks=(0, 1), norm=norm)
    configs = [Config((4, w, e), (d,)) for w in (2, 4, 6) for e in (2, 6) for d in (0, 1)]
    return ElasticFamily(model, configs, torch.zeros(2, 1, 8, 8))


def proard() -> Example:
    """Twelve students: three widths, two depths, two expansions."""

    def make() -> ProARD:
        return ProARD(
            eps=0.1, step=0.05, attack_steps=2, teacher_epochs=1, stage_epochs=1, open_epochs=1, warmup=0,
        )  # fmt: skip

    def plain() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))

    batches = lambda seed: [_images(12, seed + i) for i in range(3)]  # noqa: E731
    return Example("learner", make=make, model=_family, loader=batches, unsupported=plain)
