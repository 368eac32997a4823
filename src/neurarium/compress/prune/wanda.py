"""Wanda: a weight matters as much as it is large and its input is loud.

The score of weight W_ij is |W_ij| * ||x_j||_2, the length of input column j over the calibration rows. Removing the weight alone changes
the layer's output by exactly that (in Frobenius norm), so with uncorrelated inputs it is the optimal choice; correlations are what
SparseGPT adds. Weights are compared within each output row, and none is changed.

*Source*: Sun, Liu, Bair and Kolter, A Simple and Effective Pruning Approach for Large Language Models (2024).
*Departures*: convolutions are pruned as products with their unfolded input. By default all statistics come from one pass of the dense
model; ``sequential=True`` measures each layer behind the pruned ones (the authors do so block by block).
*Cost*: one forward pass over the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from neurarium.compress.calibrate import InputStats, per_weight
from neurarium.compress.pattern import NM, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply
from neurarium.compress.prune.layerwise import layerwise
from neurarium.errors import BadInput

__all__ = ["plan_wanda", "wanda", "wanda_score"]


def wanda_score(module: nn.Module, stats: InputStats) -> Tensor:
    """|W_ij| ||x_j||, shaped as the weight, float64."""
    return module.weight.detach().double().cpu().abs() * per_weight(stats.norm, module)


def plan_wanda(
    model: nn.Module,
    loader: Iterable,
    *,
    sparsity: float | None = None,
    scope: str = "row",
    pattern: Pattern | None = None,
    modules: Sequence[type] = (nn.Linear, nn.Conv2d),
    skip: Sequence[str] = (),
    batches: int | None = None,
    sequential: bool = False,
) -> MaskPlan:
    """The plan of :func:`wanda`."""
    pattern, sparsity = resolve(pattern, sparsity)

    def decide(module: nn.Module, stats: InputStats) -> tuple[Tensor, None]:
        return pattern.mask(wanda_score(module, stats), sparsity, scope=scope), None

    return layerwise(
        model, loader, decide, pattern=pattern, modules=modules, skip=skip, batches=batches, sequential=sequential
    )  # fmt: skip


def wanda(model: nn.Module, loader: Iterable, **options: object) -> nn.Module:
    """A copy of the model without the weights of the smallest |W_ij| ||x_j||.

    Args:
        loader: calibration batches, see :func:`~neurarium.compress.calibrate.calibrate`.
        sparsity: share of the weights to remove, in [0, 1); with ``pattern=NM(n, m)`` it follows from the pattern.
        scope: "row" (each output keeps as many inputs) or "layer".
        pattern: :class:`~neurarium.compress.pattern.Unstructured` (default), NM, Block or Group.
        modules: layer types to prune.
        skip: names of layers to leave alone, e.g. the output head.
        batches: calibrate on this many only.
        sequential: measure each layer behind the layers already pruned.
    """
    return apply(model, plan_wanda(model, loader, **options))  # type: ignore[arg-type]


def resolve(pattern: Pattern | None, sparsity: float | None) -> tuple[Pattern, float]:
    """The pattern and the sparsity, of which an N:M pattern brings its own."""
    pattern = Unstructured() if pattern is None else pattern
    if isinstance(pattern, NM) and sparsity is None:
        sparsity = 1 - pattern.n / pattern.m
    if sparsity is None or not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    return pattern, sparsity
