"""How alike two layers are: costs between the layers of two networks, from their outputs on the same samples.

Linear centred kernel alignment of X (n, p) and Y (n, q), columns centred: CKA = |Y^t X|_F^2 / (|X^t X|_F |Y^t Y|_F), in [0, 1],
unchanged by rotations and by the scale of either side. It is computed from the n x n Gram matrices, so the width does not matter.

*Source*: Kornblith, Norouzi, Lee and Hinton, Similarity of Neural Network Representations Revisited (2019); singular-vector CCA of Raghu et
al. (2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurarium.compress.fuse.transport import optimal_transport
from neurarium.errors import BadInput

__all__ = ["cka", "layer_costs", "svcca"]


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two layers' outputs, (samples, ...) each. Zero for an output that is constant."""
    return float(_alignment(_gram(x), _gram(y)))


def svcca(x: Tensor, y: Tensor, variance: float = 0.99) -> float:
    """Mean squared canonical correlation of the singular directions that hold `variance` of each side."""
    bases = []
    for t in (x, y):
        u, s, _ = torch.linalg.svd(_centred(t), full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum().clamp_min(1e-300)
        bases.append(u[:, : int((share < variance).sum()) + 1])
    return float((bases[0].T @ bases[1]).square().sum() / min(b.shape[1] for b in bases))


def layer_costs(large: list[Tensor], small: list[Tensor], kind: str = "cka") -> Tensor:
    """(large layers, small layers) costs.

    Args:
        large, small: outputs of the layers, (samples, ...); of maps (samples, channels, height, width).
        kind: "cka" and "cca": one minus the similarity; "wasserstein": cost of the optimal transport between the neurons' responses,
            scaled to length one; "index": difference of relative depth; "width": difference of width.
    """
    if kind in ("index", "width"):
        rows, columns = (
            [[i / max(len(side) - 1, 1) if kind == "index" else float(t.shape[1]) for i, t in enumerate(side)] for side in (large, small)]
        )  # fmt: skip
        return (torch.tensor(rows)[:, None] - torch.tensor(columns)[None]).abs().double()
    if kind == "cka":
        grams = [[_gram(t) for t in side] for side in (large, small)]
        return torch.stack([torch.stack([1 - _alignment(p, q) for q in grams[1]]) for p in grams[0]])
    if kind == "cca":
        return torch.tensor([[1 - svcca(p, q) for q in small] for p in large], dtype=torch.float64)
    if kind == "wasserstein":
        sides = [[_neurons(t) for t in side] for side in (large, small)]
        costs = [[_transport(p, q) for q in sides[1]] for p in sides[0]]
        return torch.tensor(costs, dtype=torch.float64)
    raise BadInput(f"layer_cost must be one of cka, cca, wasserstein, index, width; got {kind!r}")


def _centred(t: Tensor) -> Tensor:
    rows = t.detach().double().cpu().flatten(1)
    return rows - rows.mean(0)


def _gram(t: Tensor) -> Tensor:
    rows = _centred(t)
    return rows @ rows.T


def _alignment(p: Tensor, q: Tensor) -> Tensor:
    size = p.norm() * q.norm()
    return (p * q).sum() / size if size > 0 else torch.zeros((), dtype=torch.float64)


def _neurons(t: Tensor) -> Tensor:
    rows = t.detach().double().cpu()
    rows = rows.mean(tuple(range(2, rows.ndim))) if rows.ndim > 2 else rows
    rows = rows.T - rows.T.mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)


def _transport(p: Tensor, q: Tensor) -> float:
    cost = torch.cdist(p, q)
    return float((optimal_transport(cost) * cost).sum())
