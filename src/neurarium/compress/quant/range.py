"""REQuant: how far a quantiser should reach, found by a one-dimensional search on the quantisation error.

A b-bit grid that spans the largest weight wastes its levels on outliers. Let it reach only the share alpha of the largest magnitude m: with
q = 2^(b-1) - 1 and the top level t = alpha m,

    Q(w) = (t / q) clip(round(q w / t), -q, q),        alpha = argmin |w - Q(w)|^2 on [0.02, 1].

Clipping costs more and rounding less as alpha falls; the sum has one valley, up to ripples of the size of single weights. A grid of 16
points finds the cell, golden-section search the minimum in it: about 33 evaluations in all.

*Reshaping.* Trained weights crowd around zero. Quantise u = sign(w) (|w| / m)^p with 0 < p <= 1 evenly instead: the levels of w are then
t sign(k) (|k| / q)^(1/p), fine near zero. An outer search of the same kind finds p; the error is always that of w, not that of u.

Weights are stored as packed codes with a table of the 2 q + 1 levels (one p a layer) and one t a tensor or an output channel. They are
looked up when the layer runs: the network is smaller, not faster. Activations get the plain search on a histogram of each layer's
inputs, with an affine grid whose range shrinks towards zero from both ends.

Clipping shrinks what a layer puts out. A network with BatchNorm should see a few unlabelled batches afterwards, so that its running
statistics fit again; at 3 bits or fewer that decides whether the smaller error helps at all.

*Source*: "Quantization Range Estimation for Convolutional Neural Networks", arXiv 2510.04044.
*Departures*: the form of the reshaping is a reconstruction: the paper asks for a monotone one, the power law and its search are ours. The
grid in front of the golden section is ours too: it makes ripples harmless.
*Cost*: about 33 passes over the weights, 400 with reshaping; no gradients, no data for the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.calibrate import Histogram, calibrate
from neurarium.compress.quant.affine import affine_grid
from neurarium.compress.quant.packing import PackedConv2d, PackedLinear
from neurarium.compress.quant.range_plan import RangeFit, RangePlan, apply_ranges, levels, opened, rows
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Minimum", "estimate_input_range", "estimate_range", "golden_section", "plan_ranges", "requant"]

_LOW, _GRID = 0.02, 16
_GOLDEN = (math.sqrt(5) - 1) / 2
_POWERS = (0.3, 1.0)
_BINS = 2048


@dataclass(frozen=True)
class Minimum:
    """Where n functions are smallest: ``x`` and ``value`` are (n,); ``evaluations`` of each."""

    x: Tensor
    value: Tensor
    evaluations: int


def golden_section(f: Callable[[Tensor], Tensor], low: float, high: float, *, tol: float = 1e-4, grid: int = _GRID, n: int = 1) -> Minimum:
    """The minima of n functions of one variable on [low, high], all at once.

    Args:
        f: (n,) points, one a function, to their n values.
        tol: width of the last bracket.
        grid: evenly spaced points (both ends among them) that choose the cell to search; 0: golden section on the whole interval, right
            where there is one valley.

    Returns:
        The best points seen, never worse than the grid's.
    """
    if not low < high or not tol > 0 or (grid and grid < 3):
        raise BadInput(f"golden_section needs low < high, tol > 0 and a grid of 0 or at least 3, got {low}, {high}, {tol}, {grid}")
    a, b = (torch.full((n,), end, dtype=torch.float64) for end in (low, high))
    best, value, used = a.clone(), torch.full((n,), math.inf, dtype=torch.float64), 0

    def look(x: Tensor) -> Tensor:
        nonlocal best, value, used
        y, used = f(x), used + 1
        best, value = torch.where(y < value, x, best), torch.minimum(y, value)
        return y

    if grid:
        for x in torch.linspace(low, high, grid, dtype=torch.float64).tolist():
            look(torch.full_like(a, x))
        step = (high - low) / (grid - 1)
        a, b = (best - step).clamp_min(low), (best + step).clamp_max(high)
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = look(c), look(d)
    while float((b - a).max()) > tol:
        left = at_c < at_d  # the minimum lies in [a, d], else in [c, b]
        a, b = torch.where(left, a, c), torch.where(left, d, b)
        new = torch.where(left, b - _GOLDEN * (b - a), a + _GOLDEN * (b - a))
        c, d, at = torch.where(left, new, d), torch.where(left, c, new), look(new)
        at_c, at_d = torch.where(left, at, at_d), torch.where(left, at_c, at)
    return Minimum(best, value, used)


def estimate_range(
    weight: Tensor, bits: int, *, per: str = "tensor", power: float | None = 1.0, tol: float = 1e-4, grid: int = _GRID
) -> RangeFit:
    """The grid with the least squared error on a weight.

    Args:
        per: "tensor", or "channel": one range for each index of dimension 0.
        power: p of the reshaping; 1 for none, None to search it in [0.3, 1].
        tol, grid: of :func:`golden_section`.
    """
    if per not in ("tensor", "channel"):
        raise BadInput(f"per must be 'tensor' or 'channel', got {per!r}")
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise BadInput(f"bits must be an integer in 2..16, got {bits!r}")
    if power is not None and not 0 < power <= 1:
        raise BadInput(f"power must be in (0, 1] or None, got {power}")
    if not weight.numel() or not torch.isfinite(weight).all():
        raise BadInput("a range needs at least one weight, all of them finite")
    size = rows(weight, len(weight) if per == "channel" else 1).abs()
    largest = size.amax(1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    unit = size / largest[:, None]

    def at(p: float) -> Minimum:
        return golden_section(_error(unit, largest, bits, p), _LOW, 1.0, tol=tol, grid=grid, n=len(unit))

    found, p = at(1.0 if power is None else power), 1.0 if power is None else power
    if power is None:

        def total(x: Tensor) -> Tensor:
            nonlocal found, p
            new = at(float(x))
            if float(new.value.sum()) < float(found.value.sum()):
                found, p = new, float(x)
            return new.value.sum()[None]

        golden_section(total, *_POWERS, tol=0.05, grid=4)
    top = largest * found.x.pow(1 / p)
    return RangeFit(bits, tuple(top.tolist()), tuple(found.x.tolist()), p, float(found.value.sum()), found.evaluations)


def estimate_input_range(histogram: Histogram, bits: int, *, tol: float = 1e-4) -> tuple[float, float]:
    """The interval [low, high] around 0 whose affine grid has the least squared error on the values counted in a histogram."""
    seen = histogram.counts.nonzero().flatten()
    if not len(seen):
        raise BadInput("the histogram is empty")
    centre, count = (histogram.edges[seen] + histogram.edges[seen + 1]) / 2, histogram.counts[seen].double()
    low, high = min(float(histogram.edges[seen[0]]), 0.0), max(float(histogram.edges[seen[-1] + 1]), 0.0)

    def error(alpha: Tensor) -> Tensor:
        return (count * (affine_grid(*(end * alpha.squeeze() for end in ends), bits)(centre) - centre).square()).sum()[None]

    ends = (torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))
    alpha = float(golden_section(error, _LOW, 1.0, tol=tol).x)
    return low * alpha, high * alpha


def plan_ranges(
    model: nn.Module,
    *,
    bits: int | BitPlan = 4,
    per: str = "channel",
    transform: str | None = "power",
    activations: Iterable | None = None,
    act_bits: int = 8,
    modules: Sequence[type] = (nn.Conv2d, nn.Linear),
    edges: int | None = None,
    tol: float = 1e-4,
) -> RangePlan:
    """Searches the ranges of all layers; see :func:`requant`."""
    if transform not in ("power", None):
        raise BadInput(f"transform must be 'power' or None, got {transform!r}")
    model = opened(model)
    layers, skipped = _layers(model, modules)
    if isinstance(bits, BitPlan):
        bits.check(model)
        skipped |= {name: "the bit plan leaves it out" for name in layers if name not in bits.bits}
        if missing := [name for name in bits.bits if name not in layers]:
            raise BadInput(f"{missing[0]}: the bit plan names it, but {skipped.get(missing[0], 'it is packed already')}")
        layers = {name: layers[name] for name in bits.bits}
        width = {name: pair[0] for name, pair in bits.bits.items()}
    else:
        width = dict.fromkeys(layers, bits)
        if edges is not None and layers:
            width |= dict.fromkeys((next(iter(layers)), next(reversed(layers))), edges)
    fits = {}
    for name, module in layers.items():
        try:
            fits[name] = estimate_range(module.weight.detach().cpu(), width[name], per=per, power=None if transform else 1.0, tol=tol)
        except BadInput as error:
            raise BadInput(f"{name or type(model).__name__}: {error}") from error
    inputs = {}
    if activations is not None and fits:
        given = {name: pair[1] for name, pair in bits.bits.items()} if isinstance(bits, BitPlan) else {}
        for name, stats in calibrate(model, activations, modules=tuple(modules), histogram=_BINS).items():
            count = given.get(name, act_bits)
            if name in fits and count < 32 and stats.histogram is not None:
                inputs[name] = (*estimate_input_range(stats.histogram, count, tol=tol), count)
    return RangePlan(fits, inputs, skipped)


def requant(
    model: nn.Module,
    *,
    bits: int | BitPlan = 4,
    per: str = "channel",
    transform: str | None = "power",
    activations: Iterable | None = None,
    act_bits: int = 8,
    modules: Sequence[type] = (nn.Conv2d, nn.Linear),
    edges: int | None = None,
    tol: float = 1e-4,
) -> nn.Module:
    """A copy of the model whose convolutions and linear layers hold bit-packed weights on searched ranges.

    Args:
        bits: of a weight, for all layers or by layer.
        per: one range a "channel" (of the output) or a "tensor".
        transform: "power" to reshape the weights, None for evenly spaced levels.
        activations: a loader of calibration batches; then the layers' inputs are quantised to `act_bits` bits, too.
        modules: the kinds of layers that are quantised.
        edges: bits of the first and the last layer, if they are to differ (8 is usual).
        tol: width of the last bracket of alpha.

    Returns:
        The network in the input's mode, with ``plan`` (a :class:`RangePlan`). Biases, norms, embeddings and tied weights stay as they are.
        Hugging Face's Conv1D and torch's encoder layers are opened by :func:`~neurarium.compress.explicit`.
    """
    plan = plan_ranges(
        model, bits=bits, per=per, transform=transform, activations=activations, act_bits=act_bits, modules=modules, edges=edges, tol=tol
    )
    return apply_ranges(model, plan)


def _layers(model: nn.Module, modules: Sequence[type]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What can be packed, by name, and why the other layers with a weight matrix cannot. Layers that are packed already are in neither."""
    owners: dict[int, list[str]] = {}
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    packed = False
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        packed |= isinstance(module, PackedLinear | PackedConv2d)
        if weight is None or weight.ndim < 2:
            continue
        if type(module) not in (nn.Linear, nn.Conv2d):
            skipped[name] = f"a {type(module).__name__} is no plain Linear or Conv2d"
        elif type(module) not in modules:
            skipped[name] = f"{type(module).__name__} was not asked for"
        elif len(tied := owners[id(weight)]) > 1:
            skipped[name] = f"its weight is tied to {next(n for n in tied if n != name)}"
        else:
            found[name] = module
    if not found and not packed:
        listed = "".join(f"; {n}: {why}" for n, why in list(skipped.items())[:3])
        raise UnsupportedModel(f"has no Linear or Conv2d layer to quantise{listed}", module=type(model).__name__)
    return found, skipped


def _error(unit: Tensor, largest: Tensor, bits: int, power: float) -> Callable[[Tensor], Tensor]:
    """alpha (n,) -> the squared errors of the rows of w, given |w| / m and m."""
    q = 2 ** (bits - 1) - 1
    bent, table = unit.pow(power) * q, levels(bits, power)[q:]

    def error(alpha: Tensor) -> Tensor:
        codes = (bent / alpha[:, None]).round_().clamp_(max=q)
        level = codes / q if power == 1.0 else table[codes.long()]
        return (unit - level * alpha.pow(1 / power)[:, None]).square_().sum(1) * largest.square()

    return error
