"""Prune whole blocks of weights, shaped like what the processor multiplies at once.

A vector instruction takes 4, 8 or 16 weights together. If they are kept or removed together, the product over what is left runs without
a gap: one index for the block, contiguous values, nothing multiplied in vain. The price is freedom: a block stays for its sum, not for its
best weight. Blocks of b outputs x 1 input lie between single weights (b = 1) and whole inputs (b = number of outputs).

Score of a block: the sum over its weights of |w| ("magnitude"), or how much the loss of single samples moves without it, the mean over
samples of |sum g w| ("taylor"). In each layer the ``round(sparsity * blocks)`` of lowest score go; equal ones from the last on.

A matrix whose sides are no multiples of the block is thought to go on with zeros, as the compact format stores it
(:class:`~neurarium.compress.runtime.formats.BlockSparse`).

*Source*: arXiv 2306.16601 (constant blocks of 4 x 1 shaped like the dot-product instruction). *Departures*: other block shapes; the
paper's models are pruned during training by their publishers, here it is done in one shot and the masked model is trained on.

*Cost*: a sort a layer; "taylor" takes the gradients of `samples` samples, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.pattern import Unstructured
from neurarium.compress.plan import MaskPlan, apply, prunable, weight_names
from neurarium.compress.prune.layerwise import leave_alone
from neurarium.compress.sensitivity import Loss
from neurarium.compress.taylor import taylor
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Tiles", "block_prune", "plan_block_prune"]


@dataclass(frozen=True)
class Tiles:
    """Blocks of `out` x `into` weights of a weight seen as a matrix, padded with zeros at the ends. A pattern."""

    out: int
    into: int = 1

    def __post_init__(self) -> None:
        if self.out < 1 or self.into < 1:
            raise BadInput(f"a block has at least 1 output and 1 input, got {self.out} x {self.into}")

    def mask(self, score: Tensor, sparsity: float, *, scope: str = "layer") -> Tensor:
        return self.spread(Unstructured().mask(self.sums(score), sparsity, scope=scope), score.shape)

    def holds(self, mask: Tensor) -> bool:
        counts, whole = self.sums(mask.float()), self.sums(torch.ones_like(mask, dtype=torch.float32))
        return bool(((counts == 0) | (counts == whole)).all())

    def sums(self, x: Tensor) -> Tensor:
        """(row blocks, column blocks): the sum over each block."""
        x = x.flatten(1)
        x = F.pad(x, (0, -x.shape[1] % self.into, 0, -x.shape[0] % self.out))
        return x.unflatten(1, (-1, self.into)).unflatten(0, (-1, self.out)).sum((1, 3))

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """A value a block, given to each of its weights."""
        whole = units.repeat_interleave(self.out, 0).repeat_interleave(self.into, 1)
        return whole[: shape[0], : torch.Size(shape[1:]).numel()].reshape(shape)


def block_prune(model: nn.Module, *, block: tuple[int, int] = (4, 1), sparsity: float = 0.8, **options: object) -> nn.Module:
    """A masked copy of the model; ``result.plan`` is its :class:`~neurarium.compress.plan.MaskPlan`.

    Train it on if you like, then ``to_sparse_runtime(result)`` makes it small and fast. HF's Conv1D and the fused attention of
    ``torch.nn`` are reached by ``block_prune(explicit(model))``.

    Args:
        block: (outputs, inputs) of a block.
        sparsity: share of the blocks to remove in each layer, in [0, 1).
        score: "magnitude" or "taylor".
        loader: batches (x, y), for "taylor".
        samples: how many of its samples.
        loss_fn: ``loss_fn(output, y) -> ()``.
        modules: the types of layers that are pruned.
        skip: names of layers to leave alone.
    """
    plan = plan_block_prune(model, block=block, sparsity=sparsity, **options)  # type: ignore[arg-type]
    result = apply(model, plan)
    result.plan = plan  # type: ignore[assignment]
    return result


def plan_block_prune(
    model: nn.Module,
    *,
    block: tuple[int, int] = (4, 1),
    sparsity: float = 0.8,
    score: str = "magnitude",
    loader: Iterable | None = None,
    samples: int = 64,
    loss_fn: Loss = F.cross_entropy,
    modules: tuple[type, ...] = (nn.Linear,),
    skip: Sequence[str] = (),
) -> MaskPlan:
    """The plan of :func:`block_prune`."""
    tiles = Tiles(*block)
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must be in [0, 1), got {sparsity}")
    if score not in ("magnitude", "taylor"):
        raise BadInput(f"score must be 'magnitude' or 'taylor', got {score!r}")
    if score == "taylor" and loader is None:
        raise BadInput("score='taylor' needs a loader of calibration batches")
    layers, skipped = leave_alone(*prunable(model, modules), skip)
    for name, layer in list(layers.items()):
        if not bool(torch.isfinite(layer.weight).all()):
            raise BadInput(f"{name}: the weight has values that are not finite")
        units = tiles.sums(layer.weight.detach()).numel()
        if units and round(sparsity * units) == units:
            skipped[name] = f"{sparsity:.0%} of its {units} block(s) of {tiles.out} x {tiles.into} would be all"
            del layers[name]
    if not layers:
        first = next(iter(skipped), "")
        raise UnsupportedModel(f"no layer can be pruned in {tiles.out} x {tiles.into} blocks: {skipped.get(first)}", module=first)
    if score == "taylor":
        scores = _by_loss(model, layers, tiles, loader, samples, loss_fn)
    else:
        scores = {name: tiles.sums(_live(layer).abs()) for name, layer in layers.items()}
    kept = {name: Unstructured().mask(s, sparsity) for name, s in scores.items()}
    masks = {name: tiles.spread(k, layers[name].weight.shape).contiguous() for name, k in kept.items()}
    return MaskPlan(masks, {}, tiles, skipped)


def _live(layer: nn.Module) -> Tensor:
    """The weight in double precision, without what a mask on it hides."""
    weight = layer.weight.detach().double()
    return weight * layer.mask if isinstance(getattr(layer, "mask", None), Tensor) else weight


def _by_loss(model, layers, tiles: Tiles, loader, samples, loss_fn) -> dict[str, Tensor]:
    names = weight_names(layers)
    found = taylor(
        model, loader, names=names, per=lambda _, change: tiles.sums(change), reduce="sample", samples=samples, loss_fn=loss_fn
    )
    return {layer: found[name] for layer, name in zip(layers, names, strict=True)}
