"""An int8 block-sparse matrix and its product: integers from end to end, one rounding of the inputs before, one scaling after.

Weights: symmetric int8 with one scale an output row, w ~ s_o q. Inputs: asymmetric uint8 with a scale and a zero point for each token,
found on the fly, x ~ s_t (c - z_t). Then ``y = s_t s_o (sum_k c_k q_k - z_t sum_k q_k) + b``: the first sum is exact in int32 (no
saturating instruction is used), the second is stored.

Two block shapes, after the dot-product instruction that takes four products at once: (16, 4), and (4, 1), whose blocks are stored in
quads of four columns (the last quad of a row block is filled with zeros).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.compress.runtime.build import kernel
from neurarium.compress.runtime.formats import BlockSparse, check_pointers
from neurarium.compress.runtime.product import ACTS
from neurarium.errors import BadInput

__all__ = ["Int8Sparse", "quantise_tokens"]

BLOCKS = ((16, 4), (4, 1))
KIND = 2


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of each row of x, scales and zero points: ``x ~ scale (code - zero)``. The codes' width is rounded up to four.

    Zero has a code of its own. A row with NaN or infinity, or wider than float32's range, gets scale NaN.
    """
    isa = kernel() if x.device.type == "cpu" else None
    if isa is not None:
        return torch.ops.neurarium_spmm.quantise.default(x, isa)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    span = high - low
    finite = x.isfinite().all(1) & (span < 3e38)
    scale = torch.where(span > 1e-30, span / 255, torch.ones_like(span))
    inverse = (1 / scale).double()  # the product is rounded once, as a fused multiply-add does
    zero = torch.round(-low.double() * inverse)
    codes = (torch.round(x.double() * inverse[:, None]) + zero[:, None]).clamp(0, 255)
    codes = torch.where(finite[:, None], codes, torch.zeros_like(codes)).to(torch.uint8)
    zero = torch.where(finite, zero, torch.zeros_like(zero))
    return F.pad(codes, (0, -x.shape[1] % 4)), torch.where(finite, scale, torch.full_like(scale, torch.nan)), zero.int()


@dataclass(eq=False)
class Int8Sparse:
    """See the module. ``values`` is (quads, outputs a block, 4); ``col`` has one index a quad (16 x 4) or four (4 x 1)."""

    row_ptr: Tensor
    col: Tensor
    values: Tensor
    scale: Tensor  # float32 (outputs,)
    row_sum: Tensor  # int32 (outputs,)
    shape: tuple[int, int]
    block: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, block: tuple[int, int] = (16, 4), *, mask: Tensor | None = None) -> Int8Sparse:
        """Rounds the kept weights to int8, largest of each row to 127."""
        if tuple(block) not in BLOCKS:
            raise BadInput(f"int8 blocks are {' and '.join(map(str, BLOCKS))}, got {block}")
        exact = BlockSparse.from_dense(weight, block, mask=mask)
        rows, columns = exact.shape
        out, into = block
        whole = exact.to_dense()
        scale = whole.abs().amax(1) / 127
        scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
        per_block = F.pad(scale, (0, -rows % out), value=1.0).view(-1, out)
        counts = exact.row_ptr.diff().long()
        owner = torch.repeat_interleave(torch.arange(counts.numel()), counts)  # row block of each block
        codes = torch.round(exact.values.view(-1, into, out) / per_block[owner][:, None]).clamp(-127, 127).to(torch.int8)
        index = torch.int16 if columns <= 2**15 else torch.int32
        if into == 4:
            values, col, row_ptr = codes.transpose(1, 2), exact.col, exact.row_ptr
        else:
            quads = (counts + 3) // 4
            row_ptr = F.pad(quads.cumsum(0), (1, 0)).int()
            inside = torch.arange(owner.numel()) - exact.row_ptr[:-1].long()[owner]  # number of the block in its row block
            place = row_ptr[:-1].long()[owner] * 4 + inside
            values = codes.new_zeros(int(quads.sum()) * 4, out)
            values[place] = codes[:, 0]
            values = values.view(-1, 4, out).transpose(1, 2)
            col = exact.col.new_zeros(int(quads.sum()) * 4)
            col[place] = exact.col
        made = cls(row_ptr, col.to(index), values.contiguous(), scale, torch.empty(0), (rows, columns), (out, into))
        made.row_sum = made.codes().sum(1, dtype=torch.int32)
        return made

    def codes(self) -> Tensor:
        """The int8 matrix q, dense."""
        rows, columns = self.shape
        out, into = self.block
        counts = self.row_ptr.diff().long()
        owner = torch.repeat_interleave(torch.arange(counts.numel(), device=self.col.device), counts)
        col = self.col.long()
        col = col[:, None] * 4 + torch.arange(4, device=col.device) if into == 4 else col.view(-1, 4)
        dense = torch.zeros(counts.numel(), -(-columns // 4) * 4, out, dtype=torch.int32, device=col.device)
        dense.index_put_((owner[:, None].expand_as(col), col), self.values.transpose(1, 2).int(), accumulate=True)
        return dense.transpose(1, 2).reshape(-1, dense.shape[1])[:rows, :columns].to(torch.int8)

    def to_dense(self) -> Tensor:
        """The weights that it stands for, float32."""
        return self.codes().float() * self.scale[:, None]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in (self.row_ptr, self.col, self.values, self.scale, self.row_sum))

    @property
    def density(self) -> float:
        """Stored share of the matrix, the filling included."""
        return self.values.numel() / (self.shape[0] * self.shape[1])

    def matmul(self, x: Tensor, *, bias: Tensor | None = None, act: str | None = None) -> Tensor:
        """``act(x W^T + bias)`` of float32 x (..., inputs). It has no gradient and says so."""
        if act not in ACTS:
            raise BadInput(f"act must be None, 'relu' or 'gelu', got {act!r}")
        if x.ndim == 0 or x.shape[-1] != self.shape[1] or x.dtype != torch.float32:
            raise BadInput(f"the input must be float32 (..., {self.shape[1]}), got {x.dtype} {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise BadInput("an int8 product has no gradient: run it under torch.no_grad(), or use float32 below what is trained")
        flat = x.reshape(-1, self.shape[1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        if torch.compiler.is_compiling():
            parts = self.values, self.row_ptr, self.col, self.scale, self.row_sum
            out = _int8_linear(flat, *parts, bias, self.shape[0], self.block[0], ACTS.index(act))
        else:
            out = self._run(flat, bias, ACTS.index(act))
        return out.view(*x.shape[:-1], self.shape[0])

    def sums(self, codes: Tensor) -> Tensor:
        """The exact int32 product of uint8 codes (tokens, inputs) with the int8 matrix."""
        if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != self.shape[1]:
            raise BadInput(f"codes must be uint8 (tokens, {self.shape[1]}), got {codes.dtype} {tuple(codes.shape)}")
        isa = kernel() if codes.device.type == "cpu" else None
        if isa is None:
            return _exact(codes, self.codes())
        return self._call(F.pad(codes, (0, -codes.shape[1] % 4)).contiguous(), None, None, None, 0, isa)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        meta = torch.tensor([KIND, *self.shape, *self.block], dtype=torch.int64)
        return {"meta": meta, **{k: getattr(self, k) for k in ("row_ptr", "col", "values", "scale", "row_sum")}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Int8Sparse:
        """The matrix whose :meth:`tensors` these are, checked: the kernel trusts its indices."""
        matrix = cls.from_numbers(tensors["meta"].tolist(), tensors)
        (rows, columns), out, index = matrix.shape, matrix.block[0], matrix.col.long()
        quads = index.numel() if out == 16 else index.numel() // 4
        fits = matrix.block in BLOCKS and check_pointers(matrix.row_ptr, -(-rows // out), quads) and matrix.values.shape == (quads, out, 4)
        fits = fits and matrix.scale.shape == matrix.row_sum.shape == (rows,)
        limit = -(-columns // 4) if out == 16 else columns
        if not fits or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit):
            raise BadInput(f"the tensors do not make an int8 matrix of {matrix.shape} in {matrix.block} blocks")
        return matrix

    @classmethod
    def from_numbers(cls, numbers: Sequence[int], tensors: Mapping[str, Tensor]) -> Int8Sparse:
        """The same with the contents of `meta` as plain numbers."""
        kind, rows, columns, out, into = numbers
        if kind != KIND:
            raise BadInput(f"not an int8 matrix: format {kind}")
        return cls(*(tensors[k] for k in ("row_ptr", "col", "values", "scale", "row_sum")), (rows, columns), (out, into))

    def _run(self, x: Tensor, bias: Tensor | None, act: int) -> Tensor:
        codes, scales, zeros = quantise_tokens(x)
        isa = kernel() if x.device.type == "cpu" else None
        if isa is not None:
            return self._call(codes, scales, zeros, bias, act, isa)
        sums = _exact(codes[:, : self.shape[1]], self.codes()) - zeros[:, None] * self.row_sum
        out = sums.float() * (scales[:, None] * self.scale)
        out = out if bias is None else out + bias
        return F.relu(out) if act == 1 else F.gelu(out) if act == 2 else out

    def _call(self, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, act: int, isa: int) -> Tensor:
        matrix = self.values, self.row_ptr, self.col, self.scale, self.row_sum
        return torch.ops.neurarium_spmm.spmm_int8.default(codes, scales, zeros, *matrix, bias, self.shape[0], self.block[0], act, isa)


def _exact(codes: Tensor, weights: Tensor) -> Tensor:
    return (codes.double() @ weights.double().T).to(torch.int32)  # every sum is below 2^53


@torch.library.custom_op("neurarium::int8_linear", mutates_args=())
def _int8_linear(
    x: Tensor, values: Tensor, row_ptr: Tensor, col: Tensor, scale: Tensor, row_sum: Tensor, bias: Tensor | None,
    rows: int, block: int, act: int,
) -> Tensor:  # fmt: skip
    matrix = Int8Sparse(row_ptr, col, values, scale, row_sum, (rows, x.shape[1]), (block, 4 if block == 16 else 1))
    return matrix._run(x, bias, act)


@_int8_linear.register_fake
def _(x, values, row_ptr, col, scale, row_sum, bias, rows, block, act):
    return x.new_empty(x.shape[0], rows)
