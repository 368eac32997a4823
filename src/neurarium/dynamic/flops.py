"""Attention has a price on the CPU, too.

torch's FLOP counter has formulas for the attention kernels of GPUs and none for the one that runs on a CPU, so there the two products of
attention would look free and cutting tokens would look dearer than it is. Importing this room registers torch's own formula for that
kernel (2 FLOPs a multiply-add for both products, all positions, masked or not); every counter opened afterwards charges it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["register_attention"]


def register_attention() -> None:
    """Teach torch's FLOP counter the CPU's attention kernels, unless it knows them already."""
    kernels = torch.ops.aten
    forward = kernels._scaled_dot_product_flash_attention_for_cpu
    backward = kernels._scaled_dot_product_flash_attention_for_cpu_backward
    if forward not in flop_registry:
        register_flop_formula(forward)(_forward)
    if backward not in flop_registry:
        register_flop_formula(backward)(_backward)


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
