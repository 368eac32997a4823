"""QuantMCU: few bits where a tile's values allow it.

Patch-based inference computes the halos twice. That work becomes cheaper with fewer bits for the activations, but values far from the rest
do not survive few bits. So tiles are told apart first, then every map of a tile gets its own number of bits, without training.

*Which tiles* (value-driven patch classification). The values of an image are taken as Gaussian; one with |v - mean| > z std is an outlier.
A tile in which most calibration images have a share of outliers above 1e-3 keeps 8 bits in all its maps.

*Which bits* (value-driven quantisation search), for map i of another tile and b in {8, 4, 2}, from the input on:

    Phi(i, b)   = BitOPs saved by b bits / BitOPs with 8 bits, of what reads the map      (BitOPs = MACs x 8 x bits of the map)
    Omega(i, b) = (H(i) - H_b(i)) / H(i)       entropies of a 256-bin histogram of the map, before and after rounding to b bits
    b_i         = argmax_b  -lambda Omega(i, b) + (1 - lambda) Phi(i, b)

Then, while the tile needs more memory than it may, the largest map of the operation at the peak gets fewer bits.

*Quantiser.* Uniform and affine with 0 on the grid, a range for each map and tile: from the least to the greatest calibration value for 8
bits, 99.9 % of the values for fewer. Weights: 8 bits, symmetric, a scale a channel, BatchNorm folded in. What comes after the patch stage
has 8 bits.

*What is real.* Without gradients every map is stored as packed integer codes, so a trace of the allocations shows the bytes that the plan
says. The arithmetic of an operation is floating-point on decoded values; the operations saved are counted (:attr:`QuantisedModel.bitops`),
no speed is gained on a processor without such instructions. Under autograd and export, values are rounded and kept as floats.

*Source.* "Value-Driven Mixed-Precision Quantization for Patch-Based Inference on Microcontrollers" (QuantMCU), arXiv 2401.13714.

*Departures.* The outlier rule, lambda and the normalisations are reconstructed. Operations saved are divided by those of the same map: by
those of the whole tile, no map would be worth fewer bits at a lambda near 1/2, or the one with most operations alone would get the fewest.
At lambda = 0.47 a map of 8 bits goes to 4 where it keeps about half of its entropy. The image's own mean and deviation define outliers,
and a tile's class is fixed at calibration. The output of the stage has 8 bits, one range for all tiles.

*Cost.* One pass over the calibration images and a histogram a map and tile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.dynamic.live import kernel
from neurarium.dynamic.opgraph import folded, run_local
from neurarium.dynamic.patch import PatchedModel, out_size, stitch
from neurarium.dynamic.patch_plan import MemoryPlan, overwrites, pixels, schedule_memory
from neurarium.errors import BadInput, UnsupportedModel

__all__ = [
    "Coded",
    "CodedChain",
    "Grid",
    "QuantisedModel",
    "Statistics",
    "entropy",
    "outlier_share",
    "outlier_tiles",
    "quantise",
    "quantmcu",
]

FINE = 2048  # bins from which percentiles and 256-bin histograms are read
SHARE = 1e-3  # of outliers that a tile may have
Place = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """x is round(x / scale) + zero, in 0 .. 2^bits - 1."""

    bits: int
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, bits: int) -> Grid:
        """The grid of this range, widened to contain 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(low.dtype).tiny)
        return cls(bits, scale, (-low / scale).round())

    def codes(self, x: Tensor) -> Tensor:
        return ((x / self.scale).round() + self.zero).clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero) * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """Rounded; gradients pass as if it had not been, inside the range."""
        rounded = self.values(self.codes(x))
        if not x.requires_grad:
            return rounded
        inside = self.values(torch.tensor([0.0, 2.0**self.bits - 1], dtype=x.dtype, device=x.device))
        passed = x.clamp(inside[0], inside[1])
        return passed + (rounded - passed).detach()


@dataclass(frozen=True)
class Coded:
    """A map as packed codes in a buffer of bytes, from the first byte on."""

    buffer: Tensor
    shape: tuple[int, ...]
    grid: Grid

    @staticmethod
    def size(numel: int, bits: int) -> int:
        """Bytes."""
        return -(-numel * bits // 8)

    def write(self, x: Tensor) -> None:
        codes, each = self.grid.codes(x).to(torch.uint8).flatten(), 8 // self.grid.bits
        if each > 1:
            codes = torch.cat([codes, codes.new_zeros(-len(codes) % each)]).view(-1, each)
            codes = (codes << _shifts(self.grid.bits, codes)).sum(1, dtype=torch.uint8)
        self.buffer[: len(codes)] = codes

    def read(self) -> Tensor:
        numel, bits = math.prod(self.shape), self.grid.bits
        codes = self.buffer[: self.size(numel, bits)]
        if bits < 8:
            codes = ((codes[:, None] >> _shifts(bits, codes)) & (2**bits - 1)).flatten()[:numel]
        return self.grid.values(codes.to(self.grid.scale.dtype)).view(self.shape)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def quantmcu(
    patched: PatchedModel,
    calibration: Tensor,
    *,
    bits: Sequence[int] = (8, 4, 2),
    lam: float = 0.47,
    outlier_z: float = 3.0,
    limit_bytes: float | None = None,
) -> QuantisedModel:
    """A quantised copy of a patched model.

    Args:
        calibration: images ``(n, channels, height, width)`` of the size that the model will see.
        bits: to choose from: 8, 4, 2, 1.
        lam: 1 keeps 8 bits everywhere, 0 gives the fewest.
        outlier_z: 0 makes every tile one with outliers, ``inf`` none.
        limit_bytes: for the patch stage, its output included.

    Raises:
        UnsupportedModel: nothing is run in tiles.
        BadInput: the limit cannot be met with these bits; the message has the smallest feasible.
    """
    if not 0 <= lam <= 1:
        raise BadInput(f"lam must lie in 0..1, not {lam}")
    if not outlier_z >= 0:
        raise BadInput(f"outlier_z must be at least 0, not {outlier_z}")
    choices = sorted(set(bits), reverse=True)
    if not choices or choices[0] != 8 or not set(choices) <= {8, 4, 2, 1}:
        raise BadInput(f"bits must be 8 and others of 4, 2, 1, not {tuple(bits)}")
    statistics = Statistics.collect(patched, calibration)
    table = torch.full(statistics.low.shape, 8)
    quiet = [t for t, loud in enumerate(outlier_tiles(patched, calibration, outlier_z)) if not loud]
    for t in quiet:
        for i in range(table.shape[1]):
            scores = {b: -lam * statistics.entropy_loss(t, i, b) + (1 - lam) * (8 - b) / 8 for b in choices}
            table[t, i] = max(scores, key=lambda b: scores[b])  # the most bits of equals
    model = QuantisedModel(patched, statistics, table)
    if limit_bytes is not None:
        _fit(model, statistics, quiet, choices, limit_bytes)
    return model


def outlier_share(patched: PatchedModel, images: Tensor, z: float) -> Tensor:
    """Share of the values of each image's part in each tile that lie further than ``z`` deviations from the image's mean, (tiles, n)."""
    flat = images.flatten(1)
    mean, std = (v.view(-1, 1, 1, 1) for v in (flat.mean(1), flat.std(1)))
    far = ((images - mean).abs() >= z * std) if z == 0 else ((images - mean).abs() > z * std)
    spans = [s[patched.graph.source] for s in patched.tiles(images.shape[-2:]).values()]
    return torch.stack([far[..., a:b, c:d].double().mean((1, 2, 3)) for (a, b), (c, d) in spans])


def outlier_tiles(patched: PatchedModel, images: Tensor, z: float) -> list[bool]:
    """Whether most images have outliers in a tile."""
    return ((outlier_share(patched, images, z) > SHARE).double().mean(1) > 0.5).tolist()


def entropy(histogram: Tensor) -> float:
    """In bits, of counts."""
    p = histogram.double() / histogram.sum().clamp(min=1)
    return float(-(p * p.clamp(min=1e-300).log2()).sum())


def _maps(patched: PatchedModel) -> list[str]:
    """What a tile holds, but the stage's output."""
    return [patched.graph.source, *(op.name for op in patched.graph.ops[: patched.stage - 1])]


def _macs(patched: PatchedModel, op: Any, pixels: int) -> int:
    """Of a convolution; other operations count one for each element of what they make."""
    if op.kind == "conv":
        return int(patched.model.get_submodule(op.call.target).weight.numel()) * pixels  # type: ignore[union-attr]
    return op.shape[0] * pixels


def _operations(patched: PatchedModel) -> list[list[int]]:
    """For each tile and map, the multiply-adds of the operations that read it."""
    names, table = _maps(patched), []
    for spans in patched.tiles().values():
        row = dict.fromkeys(names, 0)
        for op in patched.graph.ops[: patched.stage]:
            row[op.inputs[0]] += _macs(patched, op, pixels(spans[op.name]))
        table.append([row[n] for n in names])
    return table


@dataclass(frozen=True)
class Statistics:
    """Of every map: range, range of 99.9 % of the values, histogram; ``rest``: ranges of the maps from the stage's output on."""

    low: Tensor  # (tiles, maps)
    high: Tensor
    inner_low: Tensor
    inner_high: Tensor
    histogram: Tensor  # (tiles, maps, FINE) between low and high
    rest: Tensor  # (maps, 2)

    @classmethod
    @torch.no_grad()
    def collect(cls, patched: PatchedModel, images: Tensor) -> Statistics:
        """One pass of the plain network, tile by tile."""
        if not patched.stage:
            raise UnsupportedModel("runs nothing in tiles: give patch_inference a split", module=type(patched.model).__name__)
        shape = patched.graph.input_shape
        if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != shape:
            raise BadInput(f"calibration must be at least one image of shape {shape}, not {tuple(images.shape)}")
        if not torch.isfinite(images).all():
            raise BadInput("calibration images have NaN or infinite values")
        graph, names, rows, parts = patched.graph, _maps(patched), [], []
        modes = [(m, m.training) for m in patched.modules()]
        patched.eval()
        try:
            sizes = graph.sizes(*shape[1:], patched.stage)
            for spans in patched.tiles().values():
                (a, b), (c, d) = spans[graph.source]
                env = {graph.source: images[..., a:b, c:d]}
                for i in range(patched.stage):
                    env[graph.ops[i].name] = patched._plain(i, env, spans, sizes, None)
                rows.append([_summary(env[n]) for n in names])
                parts.append(env[graph.ops[patched.stage - 1].name])
            last = graph.ops[patched.stage - 1].name
            env = {last: stitch(parts, patched.patches)}
            rest = [env[last]]
            for i in range(patched.stage, len(graph.ops)):
                op = graph.ops[i]
                env[op.name] = op.call.run(patched.model, env) if op.kind == "other" else patched._plain(i, env, None, sizes, None)
                rest.append(env[op.name])
        finally:
            for m, mode in modes:
                m.training = mode
        ranges = [torch.stack(r.aminmax()) if _is_map(r) else images.new_zeros(2) for r in rest]
        low, high, inner_low, inner_high, histogram = (torch.stack([torch.stack([m[k] for m in row]) for row in rows]) for k in range(5))
        return cls(low, high, inner_low, inner_high, histogram, torch.stack(ranges))

    def entropy_loss(self, tile: int, i: int, bits: int) -> float:
        """Omega: the share of a map's entropy that rounding loses."""
        fine = self.histogram[tile, i]
        coarse = fine.view(256, -1).sum(1)
        before = entropy(coarse)
        if bits == 8 or before == 0:
            return 0.0
        low, high = self.low[tile, i], self.high[tile, i]
        centres = low + (high - low) * (torch.arange(FINE, dtype=low.dtype, device=low.device) + 0.5) / FINE
        levels = self.grid(tile, i, bits).codes(centres).long()
        after = entropy(torch.zeros(2**bits, dtype=fine.dtype, device=fine.device).index_add(0, levels, fine))
        return max(before - after, 0.0) / before

    def grid(self, tile: int, i: int, bits: int) -> Grid:
        """Of a map of a tile."""
        if bits == 8:
            return Grid.of(self.low[tile, i], self.high[tile, i], bits)
        return Grid.of(self.inner_low[tile, i], self.inner_high[tile, i], bits)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _summary(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    low, high = x.aminmax()
    counts = torch.histc(x.float(), FINE, float(low), float(high) if high > low else float(low) + 1).to(x.dtype)
    share = counts.cumsum(0) / counts.sum()
    width = (high - low) / FINE
    below, above = (share < 0.0005).sum(), (share < 0.9995).sum() + 1
    return low, high, low + below * width, low + above * width, counts


class QuantisedModel(PatchedModel):
    """A patched model whose maps are codes of few bits. Made by :func:`quantmcu`, or from a table of bits.

    Attributes:
        table: bits of each tile's maps, in the order of :attr:`maps`.
    """

    def __init__(self, patched: PatchedModel, statistics: Statistics, bits: Tensor) -> None:
        super().__init__(copy.deepcopy(patched.model), patched.graph, patched.patches, patched.split, *patched.flags)
        if bits.shape != statistics.low.shape or not set(bits.flatten().tolist()) <= {8, 4, 2, 1}:
            raise BadInput(f"bits must be a table of 8, 4, 2, 1 of shape {tuple(statistics.low.shape)} (tiles, maps)")
        self.training = patched.training
        full = bits == 8
        self.table: list[list[int]] = bits.tolist()
        self.register_buffer("low", torch.where(full, statistics.low, statistics.inner_low))
        self.register_buffer("high", torch.where(full, statistics.high, statistics.inner_high))
        self.register_buffer("rest", statistics.rest.clone())

    @property
    def bits(self) -> Tensor:
        """``(tiles, maps)``."""
        return torch.tensor(self.table)

    @property
    def maps(self) -> list[str]:
        """What a tile holds, in order; not the stage's output."""
        return _maps(self)

    @property
    def stage_bitops(self) -> int:
        """Multiply-adds of one image's tiles, times 8 bits of the weights, times the bits of what they read."""
        return sum(8 * b * n for row, macs in zip(self.table, _operations(self)) for b, n in zip(row, macs))

    @property
    def bitops(self) -> int:
        """Of the whole network: what comes after the stage has 8 bits."""
        stage = sum(
            _macs(self, op, pixels(s[op.name])) for s in self.tiles().values() for op in self.graph.ops[: self.stage] if op.kind == "conv"
        )
        return self.stage_bitops + 64 * (self.flops // 2 - stage)

    def plan(self, *, bytes_per: float = 1, size: Sequence[int] | None = None) -> MemoryPlan:
        """Memory of one image; a value that is not packed in fewer bits takes ``bytes_per``."""
        at = {name: i for i, name in enumerate(self.maps)}
        table = dict(zip(self.tiles(), self.table))
        last = self.graph.ops[self.stage - 1].name

        def bytes_of(name: str, numel: int, tile: Place | None) -> int:
            if tile is None:
                return math.ceil(numel * bytes_per)
            return 0 if name == last else math.ceil(Coded.size(numel, table[tile][at[name]]) * bytes_per)  # the last goes into the output

        return schedule_memory(self.graph, self.split, self.patches, size or self.graph.input_shape[1:], bytes_of, self.flags)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.model(x)
        coded = not (torch.compiler.is_exporting() or torch.is_grad_enabled())
        out = self._result(x, coded)
        with kernel():
            return out.read() if isinstance(out, Coded) else out

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The output as codes of one byte, batch first; :meth:`values` turns them into numbers."""
        out = self._result(x, True)
        return out.buffer.view(out.shape)

    def values(self, codes: Tensor) -> Tensor:
        """The numbers that codes of the output stand for."""
        return Grid.of(*self.rest[-1], 8).values(codes.to(self.rest.dtype))  # type: ignore[call-arg]

    def _result(self, x: Tensor, coded: bool) -> Any:
        if tuple(x.shape[1:]) != self.graph.input_shape:
            raise BadInput(f"was calibrated on images of shape {self.graph.input_shape}, not {tuple(x.shape[1:])}")
        graph, last = self.graph, self.graph.ops[self.stage - 1]
        sizes = graph.sizes(x.shape[2], x.shape[3], self.stage)
        with kernel():  # constants, not maps
            weights = {op.name: self._weights(op) for op in graph.ops if op.kind == "conv"}
            rest = [Grid.of(low, high, 8) for low, high in self.rest]
            tiles = [[Grid.of(*ends, b) for *ends, b in zip(low, high, bits)] for low, high, bits in zip(self.low, self.high, self.table)]
        whole = None
        if coded:
            whole = Coded(_bytes(x, len(x) * math.prod(last.shape)), (len(x), *last.shape), rest[0])  # type: ignore[arg-type, misc]
        parts = []
        for t, spans in enumerate(self.tiles(x.shape[-2:]).values()):
            grids = dict(zip(self.maps, tiles[t]))
            (a, b), (c, d) = spans[graph.source]
            env: dict[str, Any] = {graph.source: self._store(x[..., a:b, c:d], grids[graph.source], None, coded)}
            for i in range(self.stage):
                self._run(i, env, spans, sizes, weights, grids.get(graph.ops[i].name), coded, whole)
            if whole is None:
                parts.append(rest[0](env[last.name]))
            env.clear()
        env = {last.name: stitch(parts, self.patches) if whole is None else whole}
        del whole
        for k, i in enumerate(range(self.stage, len(graph.ops)), 1):
            self._run(i, env, None, sizes, weights, rest[k], coded, None)
        return env[graph.result]

    def _weights(self, op: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = folded(self.model, op)
        scale = (weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127).clamp(min=1e-12)
        return weight + ((weight / scale).round() * scale - weight).detach(), bias

    def _store(self, y: Tensor, grid: Grid, buffer: Tensor | None, coded: bool) -> Any:
        if not coded:
            return grid(y)
        if buffer is None:
            buffer = _bytes(y, Coded.size(y.numel(), grid.bits))
        with kernel():
            value = Coded(buffer, tuple(y.shape), grid)
            value.write(y)
        return value

    def _run(
        self, i: int, env: dict[str, Any], spans: Any, sizes: Any, weights: Any, grid: Grid | None, coded: bool, whole: Coded | None
    ) -> None:
        """One operation: its inputs decoded, its output coded, into the buffer of an input where it may be."""
        op = self.graph.ops[i]
        with kernel():
            read = {n: v.read() if isinstance(v, Coded) else v for n, v in ((n, env[n]) for n in op.reads)}
            if op.kind == "other":
                y = op.call.run(self.model, read)
            else:
                views, pads = self._reads(op, read, spans, sizes)
                y = run_local(self.model, op, views, pads, weights.get(op.name))
        if not _is_map(y) or (grid is None and not coded):
            env[op.name] = y
        elif grid is None:
            assert whole is not None and spans is not None
            with kernel():
                (a, b), (c, d) = spans[op.name]
                whole.buffer.view(whole.shape)[..., a:b, c:d] = whole.grid.codes(y).to(torch.uint8)
        else:
            target = None
            if coded:
                size = Coded.size(y.numel(), grid.bits)

                def free(name: str) -> bool:
                    held = env[name]
                    others = (v for n, v in env.items() if n != name and isinstance(v, Coded))
                    mine = isinstance(held, Coded) and self.graph.last[name] == i and size <= len(held.buffer)
                    return mine and all(v.buffer.data_ptr() != held.buffer.data_ptr() for v in others)

                if op.kind == "other":
                    target = next((n for n in op.views if not op.numel and free(n)), None)
                else:
                    held = read[op.inputs[0]].shape[2:]
                    target = overwrites(op, free, tuple(held), out_size(op, views[op.inputs[0]], pads), self.flags)  # type: ignore[arg-type]
            buffer = env[target].buffer if target is not None else None
            env[op.name] = self._store(y, grid, buffer, coded)
        for name in {n for n in (*op.reads, op.name) if self.graph.last.get(n, i) <= i}:
            del env[name]


class CodedChain(nn.Module):
    """A network with exits (:class:`~neurarium.dynamic.exits.ExitChain`) whose maps are codes, also between its segments.

    Args:
        segments: quantised ones, each calibrated on what the one before it puts out.
        heads: the classifiers of the plain network, one a segment.

    It is ``Staged``: an ``EarlyExit`` decides on it as on the plain one. For inference: codes have no gradient.
    """

    def __init__(self, segments: Sequence[QuantisedModel], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(segments) != len(heads) or not segments:
            raise BadInput(f"need one head for each segment and at least one of both, not {len(segments)} segments and {len(heads)} heads")
        self.segments, self.heads = nn.ModuleList(segments), nn.ModuleList(copy.deepcopy(list(heads)))

    @property
    def n_stages(self) -> int:
        return len(self.segments)

    def start(self, x: Tensor) -> Tensor:
        return x

    def stage(self, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
        segments: Any = self.segments
        with kernel():
            x = segments[k - 1].values(state) if k else state
        codes = segments[k].codes(x)
        with kernel():
            return codes, self.heads[k](segments[k].values(codes))


def _bytes(like: Tensor, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.uint8, device=like.device)


def quantise(patched: PatchedModel, calibration: Tensor, bits: int | Tensor) -> QuantisedModel:
    """With the same bits for all maps of the patch stage, or by a table ``(tiles, maps)``."""
    statistics = Statistics.collect(patched, calibration)
    table = bits if isinstance(bits, Tensor) else torch.full(statistics.low.shape, bits)
    return QuantisedModel(patched, statistics, table)


def _fit(model: QuantisedModel, statistics: Statistics, tiles: Sequence[int], choices: Sequence[int], limit: float) -> None:
    """Lower the bits of the largest map where the memory of the patch stage is highest until it is within the limit."""
    places, at = list(model.tiles()), {n: i for i, n in enumerate(model.maps)}
    ops = {op.name: op for op in model.graph.ops[: model.stage]}
    spans: list[Mapping[str, Any]] = list(model.tiles().values())
    shape = {n: (model.graph.shape(n) or (1,))[0] for n in model.maps}
    while (plan := model.plan()).patch_peak > limit:
        worst = max((s for s in plan.steps if s.tile is not None), key=lambda s: s.bytes)
        t = places.index(worst.tile)  # type: ignore[arg-type]
        there = [n for n in (*ops[worst.op].reads, worst.op) if n in at and t in tiles and model.table[t][at[n]] > choices[-1]]
        if not there:
            raise BadInput(
                f"a limit of {limit:g} bytes for the patch stage cannot be met with these bits: the smallest found is {plan.patch_peak}"
            )
        name = max(there, key=lambda n: shape[n] * pixels(spans[t][n]) * model.table[t][at[n]])
        lower = next(b for b in choices if b < model.table[t][at[name]])
        model.table[t][at[name]] = lower
        model.low[t, at[name]], model.high[t, at[name]] = statistics.inner_low[t, at[name]], statistics.inner_high[t, at[name]]
