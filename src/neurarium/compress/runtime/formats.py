"""Compact forms of a sparse weight matrix that a vectorised product can walk.

``BlockSparse`` keeps whole blocks of ``block = (outputs, inputs)`` weights, row block after row block, with one index a block: 16 x 1
fills a vector with the outputs of a block, 4 x 1 and 8 x 1 share each loaded input among their outputs, 1 x 1 is unstructured sparsity.
``GroupSparse`` keeps n of every m inputs of a row (N:M), so that a byte is enough for an index and no pointers are needed; with ``rows``
> 1, that many consecutive rows share their choice.

Both are made of plain tensors, hold what was kept bit for bit, and know their bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.compress.runtime.product import Layout, dense, product
from neurarium.errors import BadInput

__all__ = ["BlockSparse", "GroupSparse", "SparseMatrix", "from_tensors"]

HEIGHTS = (1, 4, 8, 16)  # outputs a block that the kernel has a loop for


@dataclass(eq=False)
class SparseMatrix:
    """What both formats share: tensors in, tensors out, and the product."""

    row_ptr: Tensor  # int32, (row blocks + 1,) blocks before each row block; empty for N:M
    col: Tensor  # index of each block: its column block (int16 or int32), or the offset in its group (uint8)
    values: Tensor  # float32, (entries, outputs a block)
    shape: tuple[int, int]

    kind: ClassVar[int]

    @property
    def layout(self) -> Layout:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors: values (with the zeros that fill the last blocks), indices and pointers."""
        return sum(t.numel() * t.element_size() for t in (self.row_ptr, self.col, self.values))

    @property
    def density(self) -> float:
        """Stored share of the matrix; the filling may lift it above one."""
        return self.values.numel() / (self.shape[0] * self.shape[1])

    def to_dense(self) -> Tensor:
        return dense(self.values, self.row_ptr, self.col, self.layout)

    def matmul(self, x: Tensor, *, bias: Tensor | None = None, act: str | None = None) -> Tensor:
        """``act(x W^T + bias)`` for float32 x (..., inputs), any strides; `act` is None, "relu" or "gelu" (by erf).

        Differentiable in x, values and bias. Sums are float32, so that an other order than the dense product's shows in the last digits.
        """
        return product(x, self.values, self.row_ptr, self.col, self.layout, bias, act)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, for a state dict or safetensors; :func:`from_tensors` is the way back."""
        meta = torch.tensor([self.kind, *self.layout], dtype=torch.int64)
        return {"meta": meta, "row_ptr": self.row_ptr, "col": self.col, "values": self.values}

    def to_json(self) -> str:
        """All of it as text."""
        tensors = {k: {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "data": _text(t)} for k, t in self.tensors().items()}
        return json.dumps({"kind": "sparse matrix", "tensors": tensors})

    @staticmethod
    def from_json(text: str) -> SparseMatrix:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("kind") != "sparse matrix":
            raise BadInput("not a sparse matrix: the text has another kind")
        return from_tensors({k: _tensor(t) for k, t in data["tensors"].items()})


@dataclass(eq=False)
class BlockSparse(SparseMatrix):
    """Whole blocks of weights. The last row block and column block may reach beyond the matrix; they are filled with zeros."""

    block: tuple[int, int] = (16, 1)
    kind: ClassVar[int] = 0

    @property
    def layout(self) -> Layout:
        return Layout(*self.shape, *self.block)

    @classmethod
    def from_dense(cls, weight: Tensor, block: tuple[int, int] = (16, 1), *, mask: Tensor | None = None) -> BlockSparse:
        """The blocks of a matrix (outputs, inputs) that hold a non-zero weight, or an entry of `mask` (then the others count as zero)."""
        out, into = block
        if out not in HEIGHTS or into < 1:
            raise BadInput(f"a block has {', '.join(map(str, HEIGHTS))} outputs and at least 1 input, got {block}; cut larger ones")
        weight, mask = _checked(weight, mask)
        rows, columns = weight.shape
        pad = (0, -columns % into, 0, -rows % out)
        blocks = _cut(F.pad(weight, pad), out, into)  # (row blocks, column blocks, into, out)
        kept = _cut(F.pad(mask, pad), out, into).any(-1).any(-1)
        index = torch.int16 if kept.shape[1] <= 2**15 else torch.int32
        if into > 1:
            index = torch.int32
        row_ptr = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        return cls(row_ptr, kept.nonzero()[:, 1].to(index), blocks[kept].reshape(-1, out).contiguous(), (rows, columns), (out, into))


@dataclass(eq=False)
class GroupSparse(SparseMatrix):
    """n of every m consecutive inputs, the same ones in each of `rows` consecutive outputs."""

    n: int = 2
    m: int = 4
    rows: int = 1
    kind: ClassVar[int] = 1

    @property
    def layout(self) -> Layout:
        return Layout(*self.shape, self.rows, self.m, self.n)

    @classmethod
    def from_dense(cls, weight: Tensor, n: int = 2, m: int = 4, *, rows: int = 1, mask: Tensor | None = None) -> GroupSparse:
        """Refuses a matrix with more than n non-zero (or masked-in) inputs in a group; a last, shorter group is filled up."""
        if not 0 < n <= m <= 256 or rows not in HEIGHTS:
            raise BadInput(f"N:M needs 0 < n <= m <= 256 and rows in {HEIGHTS}, got {n}:{m} and {rows}")
        weight, mask = _checked(weight, mask)
        count, columns = weight.shape
        pad = (0, -columns % m, 0, -count % rows)
        blocks = F.pad(weight, pad).unflatten(0, (-1, rows)).transpose(1, 2)  # (row blocks, inputs, rows)
        kept = F.pad(mask, pad).unflatten(0, (-1, rows)).any(1).unflatten(1, (-1, m))  # (row blocks, groups, m)
        if int(most := kept.sum(-1).max()) > n:
            raise BadInput(f"the matrix is not {n}:{m} in groups of {rows} rows: a group keeps {most}")
        # Kept ones first, then free places, so that the n offsets of a group differ: a filled place stays a place of its own.
        order = torch.argsort(kept.byte(), dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
        values = blocks.unflatten(1, (-1, m)).gather(2, order[..., None].expand(*order.shape, rows))
        return cls(torch.empty(0, dtype=torch.int32), order.to(torch.uint8).flatten(), values.reshape(-1, rows).contiguous(),
                   (count, columns), n, m, rows)  # fmt: skip


def from_tensors(tensors: Mapping[str, Tensor]) -> SparseMatrix:
    """The matrix whose :meth:`SparseMatrix.tensors` these are, checked: the kernel trusts its indices."""
    matrix = from_numbers(tensors["meta"].tolist(), tensors)
    layout, index = matrix.layout, matrix.col.long()
    units = -(-layout.rows // layout.block)
    if layout.kept:
        entries, limit = units * -(-layout.columns // layout.depth) * layout.kept, layout.depth
        fits = index.numel() == entries and matrix.row_ptr.numel() == 0
    else:
        entries, limit = index.numel() * layout.depth, -(-layout.columns // layout.depth)
        fits = check_pointers(matrix.row_ptr, units, index.numel())
    fits = fits and layout.block in HEIGHTS and matrix.values.shape == (entries, layout.block)
    if not fits or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit):
        raise BadInput(f"the tensors do not make a sparse matrix of {layout}")
    return matrix


def check_pointers(pointers: Tensor, units: int, entries: int) -> bool:
    """Whether pointers cut `entries` into `units` runs."""
    if pointers.shape != (units + 1,) or pointers.dtype != torch.int32:
        return False
    return bool((pointers.diff() >= 0).all()) and int(pointers[0]) == 0 and int(pointers[-1]) == entries


def from_numbers(numbers: Sequence[int], tensors: Mapping[str, Tensor]) -> SparseMatrix:
    """The same with the contents of `meta` as plain numbers."""
    kind, rows, columns, block, depth, kept = numbers
    common = tensors["row_ptr"], tensors["col"], tensors["values"], (rows, columns)
    if kind not in (0, 1):
        raise BadInput(f"unknown sparse format {kind}")
    return BlockSparse(*common, (block, depth)) if kind == 0 else GroupSparse(*common, kept, depth, block)


def _checked(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weight = weight.detach()
    if weight.ndim != 2 or not weight.numel():
        raise BadInput(f"the weight must be a non-empty matrix (outputs, inputs), got {tuple(weight.shape)}")
    if not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise BadInput("the weight must be floating point and finite")
    if mask is None:
        mask = weight != 0
    elif mask.shape != weight.shape:
        raise BadInput(f"the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    mask = mask.bool()
    return (weight.float() * mask).contiguous(), mask


def _cut(matrix: Tensor, out: int, into: int) -> Tensor:
    return matrix.unflatten(1, (-1, into)).unflatten(0, (-1, out)).permute(0, 2, 3, 1)


def _text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.detach().cpu().contiguous().numpy().tobytes()).decode()


def _tensor(entry: Mapping) -> Tensor:
    array = np.frombuffer(base64.b64decode(entry["data"]), np.dtype(entry["dtype"]))
    return torch.from_numpy(array.copy()).reshape(entry["shape"])
