"""One layer after the other: statistics of its input, a decision, the next. The loop below Wanda, SparseGPT and their like.

Either all statistics come from the dense model in one pass, or (``sequential``) each layer is measured behind the layers already pruned,
which costs one pass a layer and lets a later layer answer for the errors of the earlier ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from neurarium.compress.calibrate import InputStats, calibrate
from neurarium.compress.pattern import Pattern
from neurarium.compress.plan import MaskPlan, prunable
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Decide", "layerwise", "leave_alone", "per_group"]

Decide = Callable[[nn.Module, InputStats], tuple[Tensor, Tensor | None]]


def layerwise(
    model: nn.Module,
    loader: Iterable,
    decide: Decide,
    *,
    pattern: Pattern,
    modules: Sequence[type],
    skip: Sequence[str],
    gram: bool = False,
    batches: int | None = None,
    sequential: bool = False,
) -> MaskPlan:
    """The plan that `decide` makes of each layer and its input statistics: a mask and, if the weights change, new weights."""
    layers, skipped = leave_alone(*prunable(model, modules), skip)
    names = list(layers)
    masks: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    data = list(islice(loader, batches)) if sequential else loader
    work = copy.deepcopy(model) if sequential else model
    seen = calibrate(work, data, modules=tuple(modules), gram=gram and not sequential, batches=batches)
    order = [name for name in seen if name in layers]  # as called
    for name in order:
        module = work.get_submodule(name)
        stats = calibrate(work, data, modules=[name], gram=gram, batches=batches)[name] if sequential else seen[name]
        mask, value = decide(module, stats)
        masks[name] = mask
        if value is not None:
            values[name] = value
        if sequential:
            with torch.no_grad():
                module.weight.copy_(module.weight * mask if value is None else value)
    skipped |= {name: "the calibration data never reached it" for name in names if name not in masks}
    if not masks:
        raise UnsupportedModel("the calibration data reaches no prunable layer", module=type(model).__name__)
    return MaskPlan(masks, values, pattern, skipped)


def leave_alone(layers: dict[str, nn.Module], skipped: dict[str, str], skip: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers without those named in `skip`."""
    if isinstance(skip, str) or (unknown := [name for name in skip if name not in layers and name not in skipped]):
        raise BadInput(f"skip names {skip if isinstance(skip, str) else unknown[0]!r}, which is no prunable layer of the model")
    return {k: m for k, m in layers.items() if k not in skip}, skipped | dict.fromkeys(skip, "was asked to be left alone")


def per_group(module: nn.Module, gram: Tensor) -> list[tuple[slice, Tensor]]:
    """The rows of a weight and the Gram matrix of the inputs that they multiply: one pair, or one a group of a convolution."""
    grams = gram if gram.ndim == 3 else gram[None]
    rows = module.weight.shape[0] // len(grams)
    return [(slice(i * rows, (i + 1) * rows), part) for i, part in enumerate(grams)]
