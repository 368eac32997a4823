"""Examples of kernel layers."""

from __future__ import annotations

import torch
from torch import nn

from neurarium.nn.kernel_layer import KernelConv2d, KernelLinear
from neurarium.testing.example import Example


def snnk() -> Example:
    """Kernel layers on patches and on vectors, with features of three kinds and both parametrisations."""

    def make(seed: int) -> nn.Module:
        return nn.Sequential(
            KernelConv2d(3, 4, 3, "relu", 8, stride=2, padding=1, seed=seed), nn.Flatten(),
            KernelLinear(48, 6, "cos", 8, seed=seed), KernelLinear(6, 5, "exp", 8, parametrisation="weights", seed=seed),
        )  # fmt: skip

    def inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, 7, 5, generator=torch.Generator().manual_seed(seed)),)

    return Example("layer", make=make, inputs=inputs)
