"""What flows into each layer: streaming statistics of layer inputs, in one pass over a loader.

A layer is seen as the product X W^T, where X has one row for every position at which the weight is applied: every token of a linear
layer, every patch of a convolution (unfolded, padding included, with the columns in the order of ``weight.flatten(1)``). Over the rows of
X, ``calibrate`` accumulates count, mean, sum of squared deviations, largest magnitude and, if asked for, the Gram matrix E[x x^T] and a
histogram. That is all that Wanda (norms), FLAP (means and variances), DSnoT (both), SparseGPT (Gram) and range estimation (histogram)
need to know of the data.

Batches are merged by Chan, Golub and LeVeque's rule, exact however the data is cut: for parts a and b with delta = mean_b - mean_a,

    mean = mean_a + delta n_b / n,    M2 = M2_a + M2_b + delta^2 n_a n_b / n.

Everything is float64 on the CPU, whatever the model's type. The model runs in eval mode without gradients and is as before afterwards.

*Cost*: one forward pass; with ``gram`` 2 rows columns^2 more flops a layer and columns^2 numbers of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import undisturbed

__all__ = ["Histogram", "InputStats", "calibrate", "is_conv1d", "per_weight"]

_CHUNK = 2**21  # numbers converted to float64 at a time (16 MB)


@dataclass(frozen=True)
class Histogram:
    """Counts of a layer's input values in equal bins over [-limit, limit); limit is a power of two above the largest magnitude.

    The grid of a larger limit is a coarsening of that of a smaller one, so the counts do not depend on how the data was cut into batches.
    """

    counts: Tensor
    limit: float

    @property
    def edges(self) -> Tensor:
        """The (bins + 1) bin edges."""
        return torch.linspace(-self.limit, self.limit, len(self.counts) + 1, dtype=torch.float64)

    def quantile(self, q: float) -> float:
        """The value below which a share `q` of the inputs lies, linear within a bin."""
        if not 0.0 <= q <= 1.0:
            raise BadInput(f"a quantile must be in [0, 1], got {q}")
        below = torch.cat([torch.zeros(1, dtype=torch.float64), self.counts.double().cumsum(0)])
        rank = q * float(below[-1])
        i = min(int(torch.searchsorted(below, rank, right=True)) - 1, int(self.counts.nonzero()[-1]))
        inside = (rank - float(below[i])) / max(float(self.counts[i]), 1.0)
        return float(self.edges[i]) + min(max(inside, 0.0), 1.0) * 2 * self.limit / len(self.counts)


@dataclass(frozen=True)
class InputStats:
    """Statistics over all rows x of a layer's input matrix; vectors are float64 with one entry a column.

    Attributes:
        n: rows seen.
        mean: E x.
        m2: sum of (x - mean)^2.
        absmax: largest |x|.
        gram: E[x x^T], (columns, columns), or None; of a grouped convolution (groups, columns / groups, columns / groups).
        histogram: of all values of the layer together, or None.
    """

    n: int
    mean: Tensor
    m2: Tensor
    absmax: Tensor
    gram: Tensor | None = None
    histogram: Histogram | None = None

    @property
    def second(self) -> Tensor:
        """E x^2."""
        return self.m2 / self.n + self.mean.square()

    @property
    def variance(self) -> Tensor:
        """Unbiased; zero for a single row."""
        return self.m2 / max(self.n - 1, 1)

    @property
    def norm(self) -> Tensor:
        """Length of each column over all rows, sqrt(n E x^2)."""
        return (self.n * self.second).sqrt()

    @property
    def covariance(self) -> Tensor:
        """E[(x - mean)(x - mean)^T], shaped as the Gram matrix."""
        if self.gram is None:
            raise BadInput("these statistics hold no Gram matrix: calibrate(..., gram=True)")
        mean = self.mean.view(*self.gram.shape[:-2], -1, 1)
        return self.gram - mean @ mean.transpose(-1, -2)


def calibrate(
    model: nn.Module,
    loader: Iterable,
    *,
    modules: Sequence[str | type] | None = None,
    gram: bool = False,
    batches: int | None = None,
    histogram: int = 0,
) -> dict[str, InputStats]:
    """Input statistics of a model's linear and convolutional layers, by module name, in the order in which they are first called.

    Args:
        loader: batches ``x``, ``(x, y)`` (y is ignored) or mappings, which are passed as keyword arguments; where a mapping has a
            two-dimensional ``attention_mask``, padded positions are not counted.
        modules: names and types of the layers to look at; None: all Linear, Conv1d/2d/3d and Hugging Face Conv1D. Embeddings have no
            numbers as input and are left out.
        gram: accumulate E[x x^T].
        batches: stop after this many.
        histogram: bins of a histogram of each layer's values (a power of two), 0 for none.

    Layers that the data never reaches are not in the result, unless they were asked for by name: then that is an error.
    """
    if batches is not None and batches < 1:
        raise BadInput(f"batches must be at least 1, got {batches}")
    if histogram and (histogram < 2 or histogram & (histogram - 1)):
        raise BadInput(f"histogram needs a power of two of bins, got {histogram}")
    layers = _choose(model, modules)
    found: dict[str, _Accumulator] = {}
    position = [0, None]  # the batch's number and its mask of real tokens

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not bool(torch.isfinite(x).all()):
                raise BadInput(f"{name or type(model).__name__}: its input is not finite at batch {position[0]} of the calibration loader")
            if name not in found:
                found[name] = _Accumulator(_groups(module), gram, histogram)
            for rows in _rows(module, x.detach(), position[1]):
                found[name].add(rows)

        return hook

    handles, seen, fast = [], 0, torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layer would pass the hooks by
        with undisturbed(model), torch.no_grad():
            model.eval()
            handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in layers.items()]
            for i, batch in enumerate(islice(loader, batches)):
                x, position[:] = _input(model, batch, i), (i, _mask(batch))
                model(**x) if isinstance(x, dict) else model(x)
                seen += 1
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    if not seen:
        raise BadInput("the calibration loader is empty")
    for name in modules or ():
        if isinstance(name, str) and name not in found:
            raise BadInput(f"{name}: the model never called it on the calibration data{_inside_attention(model, name)}")
    return {name: part.stats() for name, part in found.items() if part.n}


def per_weight(vector: Tensor, module: nn.Module) -> Tensor:
    """A statistic with one entry a column, laid out as the layer's weight is: entry (i, ...) belongs to what weight (i, ...) multiplies."""
    weight = module.weight
    if is_conv1d(module):
        return vector[:, None].expand_as(weight)
    groups = _groups(module)
    rows = vector.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D: a linear layer with the transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", torch.empty(0)).ndim == 2


def _supported(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_conv1d(module)


def _choose(model: nn.Module, modules: Sequence[str | type] | None) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    if isinstance(modules, str):
        raise BadInput(f"modules must be a sequence of names and types, got the string {modules!r}")
    for entry in modules or ():
        if isinstance(entry, str) and entry not in named:
            raise BadInput(f"the model has no module {entry!r}")
        if isinstance(entry, str) and not _supported(named[entry]):
            raise UnsupportedModel(f"a {type(named[entry]).__name__} is neither linear nor a convolution", module=entry)
    types = tuple(t for t in modules or () if isinstance(t, type))
    chosen = {k: m for k, m in named.items() if _supported(m) and (modules is None or k in modules or isinstance(m, types))}
    if not chosen:
        raise UnsupportedModel("has no linear or convolutional layer to calibrate", module=type(model).__name__)
    return chosen


def _input(model: nn.Module, batch: Any, index: int) -> Any:
    """What to call the model with, on its device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        x = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        tensors = x
    else:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            raise BadInput(f"batch {index} of the calibration loader is a {type(x).__name__}; expected x, (x, y) or a mapping of tensors")
        x = x.to(device)
        tensors = {"x": x}
    for key, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and key != "attention_mask" and not bool(torch.isfinite(value).all()):
            raise BadInput(f"batch {index} of the calibration loader has values that are not finite ({key})")
    return x


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.flatten().bool().cpu() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _inside_attention(model: nn.Module, name: str) -> str:
    parent = model.get_submodule(name.rpartition(".")[0])
    return " (torch's attention uses its weight directly: neurarium.compress.explicit(model) opens it)" * isinstance(
        parent, nn.MultiheadAttention
    )


def _groups(module: nn.Module) -> int:
    return getattr(module, "groups", 1) if not isinstance(module, nn.Linear) else 1


def _rows(module: nn.Module, x: Tensor, mask: Tensor | None) -> Iterable[Tensor]:
    """The layer's input matrix, (rows, columns) in float64, a chunk at a time."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        x = x.reshape(-1, x.shape[-1]).cpu()
        if mask is not None and len(mask) == len(x):
            x = x[mask]
        yield from (part.double() for part in x.split(max(1, _CHUNK // max(x.shape[1], 1))))
        return
    kernel = module.kernel_size
    if x.ndim == len(kernel) + 1:  # one sample without a batch dimension
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x.cpu(), module._reversed_padding_repeated_twice, mode=mode)
    for part in x.split(max(1, _CHUNK // (x[0].numel() * math.prod(kernel)))):
        part = part.double()
        for i, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
            part = part.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        where = range(2, 2 + len(kernel))  # (batch, channels, *positions, *taps) -> (batch * positions, channels * taps)
        part = part.permute(0, *where, 1, *(d + len(kernel) for d in where))
        yield part.reshape(-1, x.shape[1] * math.prod(kernel))


class _Accumulator:
    """Merges chunks of rows."""

    def __init__(self, groups: int, gram: bool, bins: int) -> None:
        self.n, self.groups, self.bins = 0, groups, bins
        self.mean = self.m2 = self.absmax = torch.zeros(())
        self.outer: Tensor | None = None
        self.want_gram = gram
        self.counts, self.limit = torch.zeros(bins, dtype=torch.int64), 0.0

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        mean = rows.mean(0)
        m2, absmax = (rows - mean).square().sum(0), rows.abs().amax(0)
        if self.n == 0:
            self.mean, self.m2, self.absmax = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
        total = self.n + len(rows)
        delta = mean - self.mean
        self.mean = self.mean + delta * (len(rows) / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.n * len(rows) / total)
        self.absmax = torch.maximum(self.absmax, absmax)
        if self.want_gram:
            parts = rows.view(len(rows), self.groups, -1).transpose(0, 1)
            outer = parts.transpose(1, 2) @ parts
            self.outer = outer if self.outer is None else self.outer + outer
        if self.bins:
            self._count(rows, float(absmax.max()))
        self.n = total

    def _count(self, rows: Tensor, largest: float) -> None:
        limit = max(self.limit, 2.0 ** max(math.frexp(largest)[1], -1000))
        while self.limit and self.limit < limit:  # coarsen the old grid: pairs of bins meet, around zero
            half = self.counts.view(-1, 2).sum(1)
            self.counts = F.pad(half, (self.bins // 4, self.bins // 4)) if self.bins >= 4 else self.counts
            self.limit *= 2
        self.limit = limit
        index = (rows.flatten() * (self.bins / 2 / limit)).floor().long() + self.bins // 2  # scaling by a power of two is exact
        self.counts = self.counts + torch.bincount(index, minlength=self.bins)

    def stats(self) -> InputStats:
        gram = None if self.outer is None else self.outer / self.n
        if gram is not None and self.groups == 1:
            gram = gram[0]
        return InputStats(self.n, self.mean, self.m2, self.absmax, gram, Histogram(self.counts, self.limit) if self.bins else None)
