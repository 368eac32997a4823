"""Floating point operations and multiply-adds, as torch's counter sees them.

Two a multiply-add, for matrix products, convolutions and attention, forward and (on request) backward; element-wise work is not
counted, as is customary. torch's :class:`~torch.utils.flop_counter.FlopCounterMode` sees the operators that really run, so that a
skipped branch costs nothing. What it misses is added here (attention on the CPU, matrix-vector and integer products) or made
visible (the fused kernels of recurrent and transformer layers, which are switched off while counting). Operators of a
quantised engine (``quantized::linear``) and custom kernels are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from neurarium.errors import BadInput
from neurarium.meter.state import module_of, undisturbed

__all__ = ["flops", "macs"]


def flops(fn: Callable[..., Any], *inputs: Any, backward: bool = False, **options: Any) -> int:
    """FLOPs of ``fn(*inputs, **options)``, ``fn`` a module in its present mode or any function of tensors.

    With ``backward`` the gradients of the (first) output's sum to all that requires one are counted too. A module is run without
    gradients otherwise, and left as it was: gradients, buffers, mode and random number generators. Another function runs as the caller
    would run it, so that a whole training step can be counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_EXTRA)
    module = module_of(fn)
    graded = backward or (module is None and torch.is_grad_enabled())
    with undisturbed(module), _plain_kernels(), torch.set_grad_enabled(graded), counter:
        output = fn(*inputs, **options)
        if backward:
            loss = next((t for t in _tensors(output) if t.requires_grad), None)
            if loss is None:
                raise BadInput("backward=True needs an output that requires a gradient")
            loss.sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def macs(fn: Callable[..., Any], *inputs: Any, backward: bool = False, **options: Any) -> int:
    """Multiply-adds: half of :func:`flops`."""
    return flops(fn, *inputs, backward=backward, **options) // 2


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fused kernels off: each hides the products of a whole layer in one operator that the counter does not know."""
    fast, onednn, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = torch.backends.cudnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled = onednn, cudnn


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _matrix_vector(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a[0] * a[1])


def _added_matrix_vector(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return int(2 * a[0] * a[1])


def _dot(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a[0])


def _product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _added_product(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _extra() -> dict[Any, Callable[..., int]]:
    known: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "mv": _matrix_vector,
        "addmv": _added_matrix_vector,
        "dot": _dot,
        "vdot": _dot,
        "_int_mm": _product,
        "_addmm_activation": _added_product,
    }
    return {getattr(torch.ops.aten, name): count for name, count in known.items() if hasattr(torch.ops.aten, name)}


_EXTRA = _extra()
