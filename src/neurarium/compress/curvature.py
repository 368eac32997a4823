"""How strongly the loss bends along each weight, channel or layer: traces of Hessian blocks by random probes (Hutchinson).

For random signs v, E[v * (H v)] is the diagonal of H, and summed over a block of weights the trace of that block. One product H v costs
about two gradients (the gradient of g . v), whatever the number of weights: all blocks are probed at once. One probe of block p varies by
``2 sum_{i != j in p} H_ij^2 + sum_{i in p, j not in p} H_ij^2``: a diagonal Hessian is exact after one probe, and a block of a few weights
is noisy, since all the others shake it. The report carries standard errors; probing ends early once they are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurarium.compress.sensitivity import Loss, collect
from neurarium.errors import BadInput
from neurarium.meter import undisturbed

__all__ = ["Per", "TraceReport", "hessian_trace", "hutchinson_trace", "units"]

#: "parameter", "channel" (dimension 0), "layer", or a function of (parameter name, tensor of its shape) that sums it into units.
Per = str | Callable[[str, Tensor], Tensor]
_BLOCK = 8  # probes between two looks at the standard errors; a loss's graph is built once for so many


@dataclass(frozen=True)
class TraceReport:
    """Estimated traces.

    Attributes:
        mean: parameter name -> trace of each block, float64: the parameter's shape ("parameter"), (channels,) or a scalar ("layer").
        stderr: the standard error of each; ``inf`` after a single probe.
        probes: how many were drawn.
    """

    mean: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor]
    probes: int

    @property
    def relative_error(self) -> float:
        """The norm of all standard errors over the norm of all traces."""
        error, size = (float(sum(t.square().sum() for t in part.values())) ** 0.5 for part in (self.stderr, self.mean))
        return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def hutchinson_trace(
    loss: Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
    params: Mapping[str, Tensor],
    *,
    probes: int = 64,
    per: Per = "layer",
    generator: torch.Generator | None = None,
    tol: float = 0.0,
) -> TraceReport:
    """Traces of the blocks of the Hessian of a loss.

    Args:
        loss: makes the scalar, with its graph, when called; or several such functions, whose sum is meant (one graph in memory at a time).
        params: name -> leaf tensor that the loss depends on. Weights of other names are held fixed.
        probes: at most so many random sign vectors.
        per: "parameter" (the diagonal), "channel" (along dimension 0), "layer", or a function of (name, v * Hv) that sums it into blocks.
        generator: of the signs, on the CPU, so that they do not depend on the device.
        tol: stop as soon as ``relative_error`` is at most this, looked at every 8 probes; 0 draws them all, unless they agree exactly.
    """
    if probes < 1:
        raise BadInput(f"probes must be at least 1, got {probes}")
    losses = [loss] if callable(loss) else list(loss)
    reduce = units(per)
    if not losses or not params:
        raise BadInput("hutchinson_trace needs a loss and at least one parameter")
    total: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    done = 0
    while done < probes:
        count = min(_BLOCK, probes - done)
        signs = [[(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in params.values()] for _ in range(count)]
        for v, product in zip(signs, _products(losses, list(params.values()), signs), strict=True):
            for name, a, b in zip(params, v, product, strict=True):
                if not torch.isfinite(b).all():
                    raise BadInput(f"{name}: its curvature is not finite")
                one = reduce(name, (a * b).cpu().double())
                total[name] = total.get(name, 0) + one
                square[name] = square.get(name, 0) + one.square()
        done += count
        report = _report(total, square, done)
        if done >= _BLOCK and report.relative_error <= tol:
            break
    return report


def hessian_trace(
    model: nn.Module,
    loader: Iterable,
    *,
    names: Sequence[str],
    probes: int = 64,
    per: Per = "layer",
    samples: int = 512,
    chunk: int = 256,
    loss_fn: Loss = F.cross_entropy,
    tol: float = 0.0,
    seed: int = 0,
) -> TraceReport:
    """:func:`hutchinson_trace` of a model's mean loss over the first `samples` rows of a loader.

    Runs in eval mode (BatchNorm frozen, no dropout) and with plain attention (the fused kernels have no second derivative). Mode,
    gradients, buffers and random state of the model stay as they were.

    Args:
        names: the parameters whose blocks are meant.
        chunk: rows in memory at a time.
        loss_fn: ``loss_fn(model(x), y)``, a mean over the rows.
    """
    x, y = collect(loader, samples)
    known = dict(model.named_parameters())
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"the model has no parameter {unknown[0]!r}")
    params = {name: known[name].detach().clone().requires_grad_() for name in names}
    rest = {k: v.detach() for k, v in (*known.items(), *model.named_buffers()) if k not in params}
    device = next(iter(known.values())).device

    def part(start: int) -> Callable[[], Tensor]:
        rows, targets = x[start : start + chunk].to(device), y[start : start + chunk].to(device)
        return lambda: loss_fn(functional_call(model, {**rest, **params}, (rows,)), targets) * (len(rows) / len(x))

    with undisturbed(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        losses = [part(start) for start in range(0, len(x), chunk)]
        return hutchinson_trace(losses, params, probes=probes, per=per, generator=generator, tol=tol)


def units(per: Per) -> Callable[[str, Tensor], Tensor]:
    """The function that sums a tensor of a parameter's shape into its units."""
    if callable(per):
        return per
    known: dict[str, Callable[[str, Tensor], Tensor]] = {
        "parameter": lambda _, t: t,
        "channel": lambda _, t: t.reshape(len(t), -1).sum(1),
        "layer": lambda _, t: t.sum(),
    }
    if per not in known:
        raise BadInput(f"per must be {', '.join(map(repr, known))} or a function, got {per!r}")
    return known[per]


def _products(losses: Sequence[Callable[[], Tensor]], leaves: list[Tensor], vectors: list[list[Tensor]]) -> list[list[Tensor]]:
    """H v for each vector, H of the summed losses."""
    result = [[torch.zeros_like(p) for p in leaves] for _ in vectors]
    for fn in losses:
        value = fn()
        if value.numel() != 1 or not torch.isfinite(value).all():
            raise BadInput(f"the loss must be one finite number, got {value.detach()}")
        grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        bent = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]  # the others are constant
        if not bent:
            continue
        for v, into in zip(vectors, result, strict=True):
            chosen = [grads[i] for i in bent]
            rows = torch.autograd.grad(chosen, leaves, [v[i] for i in bent], retain_graph=True, allow_unused=True)
            for total, row in zip(into, rows, strict=True):
                if row is not None:
                    total += row.detach()
    return result


def _report(total: Mapping[str, Tensor], square: Mapping[str, Tensor], n: int) -> TraceReport:
    mean = {name: t / n for name, t in total.items()}
    if n == 1:
        return TraceReport(mean, {name: torch.full_like(m, float("inf")) for name, m in mean.items()}, n)
    error = {name: ((square[name] - n * m.square()).clamp_min(0) / (n - 1) / n).sqrt() for name, m in mean.items()}
    return TraceReport(mean, error, n)
