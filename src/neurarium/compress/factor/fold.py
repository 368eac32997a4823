"""A convolution's weight as a matrix, and the best low-rank matrices near it.

A weight ``(f, c, k1, k2)`` can be folded in four ways; a matrix of rank j in each is a pair of convolutions:

======  =======================  ==================================================  ==============================
scheme  matrix                   first convolution, then second                      weights a unit of rank
======  =======================  ==================================================  ==============================
0       f x (c k1 k2)            c -> j with k1 x k2, then j -> f with 1 x 1         f + c k1 k2
1       (f k1) x (c k2)          c -> j with 1 x k2, then j -> f with k1 x 1         f k1 + c k2
2       (f k2) x (c k1)          c -> j with k1 x 1, then j -> f with 1 x k2         f k2 + c k1
3       (f k1 k2) x c            c -> j with 1 x 1, then j -> f with k1 x k2         f k1 k2 + c
======  =======================  ==================================================  ==============================

Columns run over (channel, taps) with the channel outermost, so cutting the columns into *splits* cuts the input channels: each of k slices
gets its own factors of rank j (the first convolution has k groups, the second reads k j channels) and a unit of j costs k times the left
term and once the right one. A linear layer is the case k1 = k2 = 1, where all schemes are scheme 0.

By Eckart and Young the truncated SVD is the nearest matrix of rank j in the operator and the Frobenius norm, and the distance is read off
the singular values: :func:`svd_curve` knows the error of every rank from one decomposition. For several slices the operator norm of the
whole error E = [E_1 .. E_k] lies between max ||E_i|| and sqrt(k) max ||E_i||.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.errors import BadInput

__all__ = ["factors", "fold", "folded_shape", "max_rank", "rank_size", "singular_values", "svd_curve", "unfold"]

_GRAM_FROM = 256  # smaller side from which singular values come from the Gram matrix


def folded_shape(shape: tuple[int, ...], scheme: int = 0) -> tuple[int, int]:
    """(rows, columns) of the matrix that a weight ``(f, c)`` or ``(f, c, k1, k2)`` folds to."""
    f, c, k1, k2 = _four(shape, scheme)
    return [(f, c * k1 * k2), (f * k1, c * k2), (f * k2, c * k1), (f * k1 * k2, c)][scheme]


def fold(weight: Tensor, scheme: int = 0) -> Tensor:
    """The weight as a matrix; rows (f, taps of the second convolution), columns (c, taps of the first)."""
    f, c, k1, k2 = _four(tuple(weight.shape), scheme)
    w = weight.reshape(f, c, k1, k2)
    order = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2), (0, 2, 3, 1)][scheme]
    return w.permute(order).reshape(folded_shape(tuple(weight.shape), scheme))


def unfold(matrix: Tensor, shape: tuple[int, ...], scheme: int = 0) -> Tensor:
    """The weight of this shape that :func:`fold` made the matrix of."""
    f, c, k1, k2 = _four(tuple(shape), scheme)
    if tuple(matrix.shape) != folded_shape(tuple(shape), scheme):
        raise BadInput(f"{tuple(matrix.shape)} is not the fold {folded_shape(tuple(shape), scheme)} of {tuple(shape)} in scheme {scheme}")
    sizes = [(f, c, k1, k2), (f, k1, c, k2), (f, k2, c, k1), (f, k1, k2, c)][scheme]
    order = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2)][scheme]
    return matrix.reshape(sizes).permute(order).reshape(tuple(shape))


def max_rank(shape: tuple[int, ...], splits: int = 1, scheme: int = 0) -> int:
    """The rank at which every slice is exact."""
    rows, columns = folded_shape(shape, scheme)
    if splits < 1 or shape[1] % splits:
        raise BadInput(f"{shape[1]} input channels cannot be cut into {splits} equal slices")
    return min(rows, columns // splits)


def rank_size(shape: tuple[int, ...], splits: int = 1, scheme: int = 0) -> int:
    """Weights that one unit of rank costs (in every slice): splits x rows + columns."""
    rows, columns = folded_shape(shape, scheme)
    return splits * rows + columns


def singular_values(weight: Tensor, splits: int = 1, scheme: int = 0) -> Tensor:
    """Singular values of each slice, descending, ``(splits, max rank)`` in float64 on the CPU.

    Where the smaller side of a slice is 256 or more they are the roots of its Gram matrix's eigenvalues: faster by far on a fold with
    thousands of columns, and exact to about 1e-8 of the largest one.
    """
    slices = _slices(weight, splits, scheme)
    if min(slices.shape[1:]) < _GRAM_FROM:
        return torch.linalg.svdvals(slices)
    gram = slices @ slices.mT if slices.shape[1] <= slices.shape[2] else slices.mT @ slices
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt()


def svd_curve(weight: Tensor, splits: int = 1, scheme: int = 0, *, norm: str = "operator") -> Tensor:
    """Relative error of every rank 1, 2, ..., max: entry j - 1 belongs to rank j, the last is 0.

    Args:
        norm: "operator", max over slices of sigma_(j+1)(W_i) / sigma_1(W), exact for one slice and else a lower bound of the error;
            "theorem", that times sqrt(splits), an upper bound; "frobenius", exact: the root of the share of squares that is cut off.
    """
    values = singular_values(weight, splits, scheme)
    last = torch.zeros(1, dtype=torch.float64)
    if norm == "frobenius":
        squares = values.square().sum(0)
        rest = squares.flip(0).cumsum(0).flip(0)
        return torch.cat([rest[1:] / rest[0].clamp_min(1e-300), last]).sqrt()
    if norm not in ("operator", "theorem"):
        raise BadInput(f"norm must be 'operator', 'theorem' or 'frobenius', got {norm!r}")
    largest = values[0, 0] if splits == 1 else singular_values(weight, 1, scheme)[0, 0]
    curve = torch.cat([values[:, 1:].amax(0), last]) / largest.clamp_min(1e-300)
    return curve * splits**0.5 if norm == "theorem" else curve


def factors(weight: Tensor, rank: int, splits: int = 1, scheme: int = 0) -> tuple[Tensor, Tensor]:
    """The best factors of each slice: ``left`` (rows, splits, rank) and ``right`` (splits, rank, columns / splits).

    Slice i is near ``left[:, i] @ right[i]``. Each singular value is shared evenly between both, which keeps their gradients of one size.
    """
    if not 1 <= rank <= (most := max_rank(tuple(weight.shape), splits, scheme)):
        raise BadInput(f"rank must be in 1..{most}, got {rank}")
    u, s, vh = torch.linalg.svd(_slices(weight, splits, scheme), full_matrices=False)
    root = s[:, :rank].sqrt()
    return (u[..., :rank] * root[:, None]).permute(1, 0, 2), root[..., None] * vh[:, :rank]


def _slices(weight: Tensor, splits: int, scheme: int) -> Tensor:
    """(splits, rows, columns / splits) in float64 on the CPU."""
    max_rank(tuple(weight.shape), splits, scheme)
    matrix = fold(weight.detach().cpu().double(), scheme)
    if not torch.isfinite(matrix).all():
        raise BadInput("the weight has values that are not finite")
    return matrix.reshape(matrix.shape[0], splits, -1).transpose(0, 1)


def _four(shape: tuple[int, ...], scheme: int) -> tuple[int, int, int, int]:
    if scheme not in (0, 1, 2, 3):
        raise BadInput(f"scheme must be 0, 1, 2 or 3, got {scheme!r}")
    if len(shape) == 2:
        return (*shape, 1, 1)  # type: ignore[return-value]
    if len(shape) == 4:
        return shape  # type: ignore[return-value]
    raise BadInput(f"a weight of shape {tuple(shape)} is neither a matrix nor that of a 2-D convolution")
