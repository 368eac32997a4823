"""Examples of the room `compress`: sparse layers that run as such."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from neurarium.compress import block_prune, explicit, sparsebyte, to_sparse_runtime
from neurarium.testing import Example

if TYPE_CHECKING:
    from neurarium.testing.architectures import Subject


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Flatten(), nn.Linear(36, 20), nn.GELU(),
        nn.LayerNorm(20), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def _run_sparse(model: nn.Module) -> nn.Module:
    """4 x 1 blocks, in their compact form whatever a clock would say."""
    return to_sparse_runtime(block_prune(model, block=(4, 1), sparsity=0.7), block=(4, 1), min_sparsity=0.3, planner="always")


def sparse_cpu() -> Example:
    return Example(
        "transform",
        apply=_run_sparse,
        model=_model,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    )


def sparsebytenn() -> Example:
    return Example(
        "transform",
        apply=lambda model: sparsebyte(model, [(*_inputs(4, 0), torch.arange(4) % 3)], sparsity=0.5, group=(4, 1), planner="always"),
        model=_pointwise,
        inputs=_inputs,
        unsupported=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    )


def _pointwise(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(),
        nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 3), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


COVER: dict[str, Callable[[Subject], nn.Module]] = {
    "sparse-cpu": lambda subject: _run_sparse(explicit(subject.model)),
    "sparsebytenn": lambda subject: sparsebyte(
        explicit(subject.model), subject.loader, sparsity=0.3, group=(4, 1), planner="always"
    ),
}
