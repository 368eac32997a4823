"""What it costs to set a unit to zero, by the loss's Taylor series: -g . w, and with curvatures also w^2 h / 2.

For a unit p (a weight, a channel, a layer) with weights w_p the first-order change is ``-sum_p g w``. Averaged over samples *before* the
absolute value it is the change of the mean loss, near zero at a minimum; averaged *after*, sample by sample, it says how much the unit does
for single inputs (the head importance of Michel et al., 2019); squared instead, the importance of Molchanov et al. (2019). The diagonal
of the Hessian (:mod:`neurarium.compress.curvature`) adds the second-order term of optimal brain damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.curvature import Per, units
from neurarium.compress.sensitivity import Loss, collect, per_sample_grads
from neurarium.errors import BadInput

__all__ = ["taylor"]


def taylor(
    model: nn.Module,
    loader: Iterable,
    *,
    names: Sequence[str],
    per: Per = "channel",
    reduce: str = "batch",
    curvature: Mapping[str, Tensor] | None = None,
    samples: int = 512,
    loss_fn: Loss = F.cross_entropy,
) -> dict[str, Tensor]:
    """Taylor scores of the units of the named parameters; larger = more harm. Eval mode; the model stays as it was.

    Args:
        per: "parameter", "channel" (dimension 0), "layer", or a function of (parameter name, tensor of its shape) that sums it into units.
        reduce: over samples: "batch", the absolute value of the mean change; "sample", the mean absolute change; "square", the mean squared
            change; "signed", the mean change itself, an estimate of how the loss moves.
        curvature: parameter name -> diagonal of the Hessian (``hessian_trace(..., per="parameter").mean``), added as w^2 h / 2; for
            "batch" and "signed".

    Returns:
        parameter name -> score of each unit, float64.
    """
    if reduce not in ("batch", "sample", "square", "signed"):
        raise BadInput(f"reduce must be 'batch', 'sample', 'square' or 'signed', got {reduce!r}")
    if curvature is not None and reduce in ("sample", "square"):
        raise BadInput(f"a curvature is one of the mean loss: it goes with reduce='batch' or 'signed', not {reduce!r}")
    x, y = collect(loader, samples)
    known, total, scores = dict(model.named_parameters()), units(per), {}
    for name in names:
        rows = per_sample_grads(model, x, y, loss_fn, names=[name])
        weight = known[name].detach().cpu().double()
        if reduce in ("batch", "signed"):
            change = -rows.mean(0, dtype=torch.float64).cpu().view(weight.shape) * weight
            if curvature is not None:
                change = change + weight.square() * curvature[name].cpu().double() / 2
            scores[name] = total(name, change).abs() if reduce == "batch" else total(name, change)
        else:
            each = torch.stack([total(name, row.cpu().double().view(weight.shape) * weight) for row in rows])  # (samples, units)
            scores[name] = (each.abs() if reduce == "sample" else each.square()).mean(0)
    return scores
