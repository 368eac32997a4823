"""A patched model whose maps are codes of few bits, each map of each tile with its own number and range.

*Quantiser.* Uniform and affine with 0 on the grid, a range for each map and tile: from the least to the greatest calibration value for 8
bits, 99.9 % of the values for fewer. Weights: 8 bits, symmetric, a scale a channel, BatchNorm folded in. What comes after the patch stage
has 8 bits; so has its output, with one range for all tiles.

*What is real.* Without gradients every map is stored as packed integer codes, so a trace of the allocations shows the bytes that the plan
says. The arithmetic of an operation is floating-point on decoded values; the operations saved are counted (:attr:`QuantisedModel.bitops`),
no speed is gained on a processor without such instructions. Under autograd and export, values are rounded and kept as floats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.dynamic.codes import Coded, Grid, byte_buffer
from neurarium.dynamic.live import kernel
from neurarium.dynamic.opgraph import folded, run_local
from neurarium.dynamic.patch import PatchedModel, out_size, stitch
from neurarium.dynamic.patch_plan import MemoryPlan, overwrites, pixels, schedule_memory
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["FINE", "CodedChain", "QuantisedModel", "Statistics", "has_outliers", "operations", "outlier_share", "quantise"]

FINE = 2048  # bins from which percentiles and 256-bin histograms are read
SHARE = 1e-3  # of outliers that a tile may have
Place = tuple[int, int]


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
    def collect(cls, patched: PatchedModel, images: Tensor, counted: Tensor | None = None) -> Statistics:
        """One pass of the plain network, tile by tile. ``counted``, (tiles, n): the images that count in a tile; where none does, all."""
        if not patched.stage:
            raise UnsupportedModel("runs nothing in tiles: give patch_inference a split", module=type(patched.model).__name__)
        shape = patched.graph.input_shape
        if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != shape:
            raise BadInput(f"calibration must be at least one image of shape {shape}, not {tuple(images.shape)}")
        if not torch.isfinite(images).all():
            raise BadInput("calibration images have NaN or infinite values")
        graph, names, rows, parts = patched.graph, tile_maps(patched), [], []
        modes = [(m, m.training) for m in patched.modules()]
        patched.eval()
        try:
            sizes = graph.sizes(*shape[1:], patched.stage)
            for t, spans in enumerate(patched.tiles().values()):
                (a, b), (c, d) = spans[graph.source]
                env = {graph.source: images[..., a:b, c:d]}
                some = slice(None) if counted is None or not counted[t].any() else counted[t]
                for i in range(patched.stage):
                    env[graph.ops[i].name] = patched._plain(i, env, spans, sizes, None)
                rows.append([_summary(env[n][some]) for n in names])
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
    """A patched model whose maps are codes of few bits. Made by :func:`quantise` from a table of bits, or by ``quantmcu``.

    Args:
        statistics: ranges of the maps.
        bits: of each tile's maps, ``(tiles, maps)``, in the order of :attr:`maps`.
        usual: two numbers. A tile of an image that has outliers outside of them (:func:`has_outliers`) is run with 8 bits, decided
            while it runs; ``None``: every image is run by the table.
        loud: ranges of the maps in tiles with outliers.
    """

    def __init__(
        self, patched: PatchedModel, statistics: Statistics, bits: Tensor, *, usual: Tensor | None = None, loud: Statistics | None = None
    ) -> None:
        super().__init__(copy.deepcopy(patched.model), patched.graph, patched.patches, patched.split, *patched.flags)
        if bits.shape != statistics.low.shape or not set(bits.flatten().tolist()) <= {8, 4, 2, 1}:
            raise BadInput(f"bits must be a table of 8, 4, 2, 1 of shape {tuple(statistics.low.shape)} (tiles, maps)")
        self.training = patched.training
        full = bits == 8
        self.table: list[list[int]] = bits.tolist()
        self.register_buffer("low", torch.where(full, statistics.low, statistics.inner_low))
        self.register_buffer("high", torch.where(full, statistics.high, statistics.inner_high))
        self.register_buffer("rest", statistics.rest.clone())
        loud = loud or statistics
        for name, value in (("usual", usual), ("loud_low", loud.low), ("loud_high", loud.high)):
            self.register_buffer(name, None if usual is None or value is None else value.clone())

    @property
    def bits(self) -> Tensor:
        """``(tiles, maps)``."""
        return torch.tensor(self.table)

    @property
    def maps(self) -> list[str]:
        """What a tile holds, in order; not the stage's output."""
        return tile_maps(self)

    @property
    def stage_bitops(self) -> int:
        """Multiply-adds of one image's tiles, times 8 bits of the weights, the bits of what they read; of an image without outliers."""
        return sum(8 * b * n for row, macs in zip(self.table, operations(self)) for b, n in zip(row, macs))

    @property
    def bitops(self) -> int:
        """Of the whole network: what comes after the stage has 8 bits."""
        stage = sum(
            _macs(self, op, pixels(s[op.name])) for s in self.tiles().values() for op in self.graph.ops[: self.stage] if op.kind == "conv"
        )
        return self.stage_bitops + 64 * (self.flops // 2 - stage)

    def counted(self, images: Tensor) -> Tensor:
        """BitOPs of the patch stage for each image, ``(n,)``: more for those with outliers, if they are told apart while it runs."""
        less = torch.tensor([sum(8 * (8 - b) * n for b, n in zip(row, macs)) for row, macs in zip(self.table, operations(self))])
        total = torch.full((len(images),), self.stage_bitops)
        if self.usual is not None:
            total += less @ has_outliers(self, images, self.usual).to(less)  # type: ignore[arg-type]
        return total

    def plan(self, *, bytes_per: float = 1, size: Sequence[int] | None = None) -> MemoryPlan:
        """Memory of one image, one with outliers if they are told apart; a value that is not packed in fewer bits takes ``bytes_per``."""
        at = {name: i for i, name in enumerate(self.maps)}
        table = dict(zip(self.tiles(), self.table))
        last = self.graph.ops[self.stage - 1].name

        def bytes_of(name: str, numel: int, tile: Place | None) -> int:
            if tile is None:
                return math.ceil(numel * bytes_per)
            if name == last:
                return 0  # it goes into the output
            return math.ceil(Coded.size(numel, 8 if self.usual is not None else table[tile][at[name]]) * bytes_per)

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
            tables = [_grids(self.low, self.high, self.table)]
            if self.usual is not None:
                tables.append(_grids(self.loud_low, self.loud_high, [[8] * len(row) for row in self.table]))
                loud = has_outliers(self, x, self.usual)  # type: ignore[arg-type]
        whole = None
        if coded:
            whole = Coded(byte_buffer(x, len(x) * math.prod(last.shape)), (len(x), *last.shape), rest[0])  # type: ignore[arg-type, misc]
        parts = []
        for t, spans in enumerate(self.tiles(x.shape[-2:]).values()):
            (a, b), (c, d) = spans[graph.source]
            image, made = x[..., a:b, c:d], []
            for rows, kind in _classes(None if self.usual is None else loud[t], coded):
                grids = dict(zip(self.maps, tables[kind][t]))
                with kernel():
                    part = image if rows is None else image[rows]
                env: dict[str, Any] = {graph.source: self._store(part, grids[graph.source], None, coded)}
                del part
                put = None if whole is None else partial(_put, whole, spans[last.name], rows)
                for i in range(self.stage):
                    self._run(i, env, spans, sizes, weights, grids.get(graph.ops[i].name), coded, put)
                if whole is None:
                    made.append(rest[0](env[last.name]))
                env.clear()
            if whole is None:
                parts.append(made[0] if len(made) == 1 else torch.where(loud[t].view(-1, 1, 1, 1), made[1], made[0]))
        env = {last.name: stitch(parts, self.patches) if whole is None else whole}
        del whole, put  # nothing else keeps the output of the stage alive
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
            buffer = byte_buffer(y, Coded.size(y.numel(), grid.bits))
        with kernel():
            value = Coded(buffer, tuple(y.shape), grid)
            value.write(y)
        return value

    def _run(self, i: int, env: dict[str, Any], spans: Any, sizes: Any, weights: Any, grid: Grid | None, coded: bool, put: Any) -> None:
        """One operation: its inputs decoded, its output coded: into the buffer of an input where it may be, or ``put`` in the whole map."""
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
            with kernel():
                put(y)
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


def _grids(low: Any, high: Any, table: Sequence[Sequence[int]]) -> list[list[Grid]]:
    return [[Grid.of(*ends, b) for *ends, b in zip(*row)] for row in zip(low, high, table)]


def _classes(loud: Tensor | None, coded: bool) -> list[tuple[Tensor | None, int]]:
    """Rows that are run together (``None``: all) and by which table: 0, or 1 for those with outliers. Floats are run by both."""
    if loud is None or (coded and not loud.any()):
        return [(None, 0)]
    if coded and loud.all():
        return [(None, 1)]
    return [(~loud, 0), (loud, 1)] if coded else [(None, 0), (None, 1)]


def _put(whole: Coded, span: Any, rows: Tensor | None, y: Tensor) -> None:
    (a, b), (c, d) = span
    part = whole.buffer.view(whole.shape)[..., a:b, c:d]
    part[slice(None) if rows is None else rows] = whole.grid.codes(y).to(torch.uint8)


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


def quantise(patched: PatchedModel, calibration: Tensor, bits: int | Tensor) -> QuantisedModel:
    """With the same bits for all maps of the patch stage, or by a table ``(tiles, maps)``."""
    statistics = Statistics.collect(patched, calibration)
    table = bits if isinstance(bits, Tensor) else torch.full(statistics.low.shape, bits)
    return QuantisedModel(patched, statistics, table)


def tile_maps(patched: PatchedModel) -> list[str]:
    """What a tile holds, but the stage's output."""
    return [patched.graph.source, *(op.name for op in patched.graph.ops[: patched.stage - 1])]


def _macs(patched: PatchedModel, op: Any, pixels: int) -> int:
    """Of a convolution; other operations count one for each element of what they make."""
    if op.kind == "conv":
        return int(patched.model.get_submodule(op.call.target).weight.numel()) * pixels  # type: ignore[union-attr]
    return op.shape[0] * pixels


def operations(patched: PatchedModel) -> list[list[int]]:
    """For each tile and map, the multiply-adds of the operations that read it."""
    names, table = tile_maps(patched), []
    for spans in patched.tiles().values():
        row = dict.fromkeys(names, 0)
        for op in patched.graph.ops[: patched.stage]:
            row[op.inputs[0]] += _macs(patched, op, pixels(spans[op.name]))
        table.append([row[n] for n in names])
    return table


def has_outliers(patched: PatchedModel, images: Tensor, usual: Tensor) -> Tensor:
    """Whether more than one value in a thousand of an image's part in a tile lies outside of ``usual``, ``(tiles, n)``."""
    return outlier_share(patched, images, usual) > SHARE


def outlier_share(patched: PatchedModel, images: Tensor, usual: Tensor) -> Tensor:
    """Share of the values of each image's part in each tile that lie outside of ``usual``, ``(tiles, n)``."""
    far = (images <= usual[0]) | (images >= usual[1])
    spans = [s[patched.graph.source] for s in patched.tiles(images.shape[-2:]).values()]
    return torch.stack([far[..., a:b, c:d].double().mean((1, 2, 3)) for (a, b), (c, d) in spans])
