"""One product, ``act(x W^T + b)`` with a compact W: compiled, in torch, with a gradient, or inside an exported graph.

A call that needs neither a gradient nor a graph goes straight to the kernel. The others go through the operator
``neurarium::sparse_linear``, which has a shape rule (so ``torch.export`` and ``torch.compile`` keep it as one node) and a gradient: for
the input ``g W``, for the values ``g^T x`` at the kept places, as dense products.

Layout of ``values``: (entries, block), an entry being one kept column of one row block. ``depth`` columns make a block (``kept = 0``), or
``kept`` of every ``depth`` columns are there (N:M); then ``pointers`` is empty, and ``indices`` are offsets within the groups.

*Departure*: a column that a row dropped is never multiplied, so that NaN or infinity in it does not reach that row; 0 * NaN would.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from neurarium.compress.runtime.build import kernel
from neurarium.errors import BadInput

__all__ = ["ACTS", "Layout", "coordinates", "dense", "product"]

ACTS = (None, "relu", "gelu")


class Layout(NamedTuple):
    """What the numbers beside the tensors say."""

    rows: int
    columns: int
    block: int = 16
    depth: int = 1
    kept: int = 0


def product(
    x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, layout: Layout, bias: Tensor | None = None, act: str | None = None
) -> Tensor:
    """``act(x W^T + bias)`` of float32 x (..., columns)."""
    if act not in ACTS:
        raise BadInput(f"act must be None, 'relu' or 'gelu', got {act!r}")
    if x.ndim == 0 or x.shape[-1] != layout.columns:
        raise BadInput(f"the input must be (..., {layout.columns}), got {tuple(x.shape)}")
    if x.dtype != torch.float32 or values.dtype != torch.float32:
        raise BadInput(f"a sparse product is float32; the input is {x.dtype}, the weights {values.dtype}")
    flat = x.reshape(-1, layout.columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    number = ACTS.index(act)
    graded = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad))
    if graded or torch.compiler.is_compiling():
        out = _sparse_linear(flat, values, pointers, indices, bias, *layout, number)
    else:
        out = _run(flat, values, pointers, indices, bias, *layout, number)
    return out.view(*x.shape[:-1], layout.rows)


def coordinates(pointers: Tensor, indices: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The row block and the column of every entry."""
    index = indices.long()
    if layout.kept:
        each = -(-layout.columns // layout.depth) * layout.kept
        place = torch.arange(index.numel(), device=index.device)
        return place // each, place % each // layout.kept * layout.depth + index
    counts = pointers.diff().long()
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=index.device), counts)
    columns = index[:, None] * layout.depth + torch.arange(layout.depth, device=index.device)
    return rows.repeat_interleave(layout.depth), columns.flatten()


def dense(values: Tensor, pointers: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    """W, (rows, columns)."""
    rows, columns = coordinates(pointers, indices, layout)
    shape = (-(-layout.rows // layout.block), -(-layout.columns // layout.depth) * layout.depth, layout.block)
    blocks = values.new_zeros(shape).index_put((rows, columns), values.reshape(-1, layout.block), accumulate=True)
    return blocks.transpose(1, 2).reshape(-1, shape[1])[: layout.rows, : layout.columns]


def _run(
    x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, bias: Tensor | None,
    rows: int, columns: int, block: int, depth: int, kept: int, act: int,
) -> Tensor:  # fmt: skip
    isa = kernel() if x.device.type == "cpu" else None
    if isa is not None:
        return torch.ops.neurarium_spmm.spmm.default(x, values, pointers, indices, bias, rows, block, depth, kept, act, isa)
    out = _in_torch(x, values, pointers, indices, Layout(rows, columns, block, depth, kept))
    if bias is not None:
        out = out + bias
    return _act(out, act).contiguous()


def _act(z: Tensor, act: int) -> Tensor:
    return F.relu(z) if act == 1 else F.gelu(z) if act == 2 else z


#: indices -> (version, row pointers, columns, places of the values) of the same matrix in compressed rows.
_rows_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _in_torch(x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    if not (torch.backends.mkl.is_available() and x.device.type == "cpu" and indices.numel() and x.shape[0]):
        return x @ dense(values, pointers, indices, layout).T
    found = _rows_of.get(indices)
    if found is None or found[0] != indices._version:
        found = _rows_of[indices] = (indices._version, *_compressed_rows(pointers, indices, layout))
    _, row_pointers, columns, places = found
    shape = (layout.rows, layout.columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(row_pointers, columns, values.reshape(-1)[places], shape, check_invariants=False)
    return (matrix @ x.T).T


def _compressed_rows(pointers: Tensor, indices: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    blocks, columns = coordinates(pointers, indices, layout)
    rows = (blocks[:, None] * layout.block + torch.arange(layout.block, device=blocks.device)).flatten()
    columns = columns.repeat_interleave(layout.block)
    inside = (rows < layout.rows) & (columns < layout.columns)
    places = inside.nonzero()[:, 0]
    places = places[torch.argsort(rows[places] * layout.columns + columns[places], stable=True)]
    counts = torch.bincount(rows[places], minlength=layout.rows)
    return F.pad(counts.cumsum(0), (1, 0)).int(), columns[places].int(), places


@torch.library.custom_op("neurarium::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, bias: Tensor | None,
    rows: int, columns: int, block: int, depth: int, kept: int, act: int,
) -> Tensor:  # fmt: skip
    return _run(x, values, pointers, indices, bias, rows, columns, block, depth, kept, act)


@_sparse_linear.register_fake
def _(x, values, pointers, indices, bias, rows, columns, block, depth, kept, act):
    return x.new_empty(x.shape[0], rows)


def _setup(ctx, inputs, output):
    x, values, pointers, indices, bias, *layout, act = inputs
    ctx.save_for_backward(x, values, pointers, indices, bias)
    ctx.layout, ctx.act = Layout(*layout), act


def _backward(ctx, grad):
    x, values, pointers, indices, bias = ctx.saved_tensors
    layout = ctx.layout
    if ctx.act:  # the argument of the activation is computed again rather than kept
        with torch.no_grad():
            z = _run(x, values, pointers, indices, bias, *layout, 0)
        with torch.enable_grad():
            z = z.requires_grad_()
            (grad,) = torch.autograd.grad(_act(z, ctx.act), z, grad)
    for_x = grad @ dense(values.detach(), pointers, indices, layout) if ctx.needs_input_grad[0] else None
    for_values = None
    if ctx.needs_input_grad[1]:
        rows, columns = coordinates(pointers, indices, layout)
        pad = (0, -layout.columns % layout.depth, 0, -layout.rows % layout.block)
        whole = F.pad(grad.T @ x, pad)
        for_values = whole.view(-1, layout.block, whole.shape[1])[rows, :, columns].view(values.shape)
    for_bias = grad.sum(0) if bias is not None and ctx.needs_input_grad[4] else None
    return for_x, for_values, None, None, for_bias, None, None, None, None, None, None


_sparse_linear.register_autograd(_backward, setup_context=_setup)
