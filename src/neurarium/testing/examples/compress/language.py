"""Examples of the room `compress`: methods for language models that need no training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from neurarium.compress import GPT, explicit, wanda
from neurarium.compress import dsnot as swap
from neurarium.compress import flap as prune
from neurarium.testing import Example
from neurarium.testing.architectures import Subject


def _inputs(batch: int, seed: int) -> tuple[torch.Tensor]:
    return (torch.randint(0, 20, (batch, 8), generator=torch.Generator().manual_seed(seed)),)


def _gpt(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GPT(20, width=12, heads=3, layers=2, hidden=24, context=10)


def flap() -> Example:
    return Example(
        "transform",
        apply=partial(prune, loader=[_inputs(24, 7)], ratio=0.4),
        model=_gpt,
        inputs=_inputs,
        unsupported=lambda: nn.Embedding(20, 4),
    )


def _wanda_then_swaps(model: nn.Module, loader: list, sparsity: float = 0.5) -> nn.Module:
    dense = explicit(model)
    return swap(wanda(dense, loader, sparsity=sparsity), dense, loader)


def dsnot() -> Example:
    return Example(
        "transform",
        apply=partial(_wanda_then_swaps, loader=[_inputs(24, 7)]),
        model=_gpt,
        inputs=_inputs,
        unsupported=lambda: nn.Embedding(20, 4),
    )


COVER: dict[str, Callable[[Subject], nn.Module]] = {
    "dsnot": lambda s: _wanda_then_swaps(s.model, s.loader),
    "flap": lambda s: prune(s.model, s.loader, ratio=0.3),
}
