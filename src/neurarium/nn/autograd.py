"""Custom gradients that are exact: a forward, the tensors to keep, and a backward written in torch operations.

A hand-written backward pays where it keeps less than autograd would (the output instead of three intermediates) or is better behaved
(no 0 * inf at a border). :func:`exact_function` makes an operation of three plain functions; because the backward itself consists of
torch operations, it can be differentiated again and vectorised by ``torch.func.vmap``. :func:`assert_gradients` is the test that
every such operation has to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurarium import meter

__all__ = ["assert_gradients", "exact_function"]


def exact_function(
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., Tensor | tuple[Tensor | None, ...] | None],
    saves: Callable[[tuple[Any, ...], Any], tuple[Tensor, ...]],
) -> Callable[..., Any]:
    """An operation with its own gradient.

    ``forward(*inputs) -> output``; ``saves(inputs, output) -> tensors to keep``; ``backward(kept, *output gradients) -> one gradient an
    input`` (None for an input without one; a single tensor for a single input). Inputs that are not tensors are constants.
    Double backward, ``torch.func.grad`` and ``torch.func.vmap`` work if ``backward`` uses torch operations only.
    """

    class Exact(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*saves(inputs, output))

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx.saved_tensors, *grads)

    Exact.__name__ = Exact.__qualname__ = getattr(forward, "__name__", "Exact")
    return Exact.apply


def assert_gradients(
    fn: Callable[..., Tensor],
    *inputs: Tensor,
    reference: Callable[..., Tensor] | None = None,
    vmap: bool = False,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Assert that ``fn`` has the gradients that it claims; raises ``AssertionError`` (or torch's ``GradcheckError``) with what is off.

    First and second order against finite differences in float64. With ``reference``, the same function in plain torch: equal values and
    gradients in float32, and strictly fewer bytes kept for the backward pass. With ``vmap``: equal to a loop over the first axis.
    """
    doubles = tuple(t.detach().double().requires_grad_() for t in inputs)
    torch.autograd.gradcheck(fn, doubles)
    torch.autograd.gradgradcheck(fn, doubles)
    if reference is not None:
        floats = tuple(t.detach().float().requires_grad_() for t in inputs)
        (ours, grads), (theirs, expected) = _run(fn, floats), _run(reference, floats)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
        torch.testing.assert_close(grads, expected, rtol=rtol, atol=atol)
        kept, plain = meter.saved_bytes(fn, *floats), meter.saved_bytes(reference, *floats)
        assert kept < plain, f"keeps {kept} bytes for the backward pass, plain autograd keeps {plain}"
    if vmap:
        rows = torch.func.vmap(fn)(*inputs)
        torch.testing.assert_close(rows, torch.stack([fn(*row) for row in zip(*inputs)]), rtol=rtol, atol=atol)


def _run(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value, and gradients under a fixed cotangent."""
    out = fn(*inputs)
    cotangent = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, inputs, cotangent)
