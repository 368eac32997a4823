"""What patch-based inference computes, and what it keeps in memory, before anything is run.

*Tiles* (:func:`cut_tiles`). The output map of the patch stage is cut into p x p tiles. Backward through the stage, an interval [a, b) of
an operation's output needs [a t - q, (b - 1) t - q + k) of its input, clipped to the map: what lies outside is zero padding of that
operation alone; inside the map there is none, so tiles fit together exactly.

*Memory* (:func:`schedule_memory`), bytes of all buffers alive while an operation runs: its inputs, its output, whatever a later operation
still reads. A depthwise convolution writes over its input, channel by channel; a sum is accumulated into the shortcut by the convolution
that ends the residual branch; activations are in place (:func:`overwrites`). Patch stage: the largest tile's maximum + its whole output.
The image is read in tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from neurarium.dynamic.opgraph import Graph, Op, Span, reach
from neurarium.errors import BadInput

__all__ = ["BytesOf", "MemoryPlan", "Step", "cut_tiles", "extra_flops", "overwrites", "pixels", "same_bytes", "schedule_memory", "slices"]

BytesOf = Callable[[str, int, tuple[int, int] | None], int]  # of a map, its elements, in a tile


@dataclass(frozen=True)
class Step:
    """Bytes alive while one operation runs. ``tile`` (row, column) in the patch stage."""

    op: str
    block: str
    tile: tuple[int, int] | None
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Every operation of one inference of one image, in order."""

    steps: tuple[Step, ...]

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(s.bytes for s in self.steps)

    @property
    def patch_peak(self) -> int:
        """Of the patch stage, with its output buffer."""
        return max((s.bytes for s in self.steps if s.tile is not None), default=0)

    @property
    def rest_peak(self) -> int:
        """Of what runs layer by layer."""
        return max((s.bytes for s in self.steps if s.tile is None), default=0)

    @property
    def worst(self) -> Step:
        """Where the peak is."""
        return max(self.steps, key=lambda s: s.bytes)

    def blocks(self) -> dict[str, int]:
        """The peak of each block."""
        peaks: dict[str, int] = {}
        for s in self.steps:
            peaks[s.block] = max(peaks.get(s.block, 0), s.bytes)
        return peaks


# ---- tiles -------------------------------------------------------------------------------------------------------------------------------


def cut_tiles(
    graph: Graph, stage: int, patches: tuple[int, int], sizes: Mapping[str, tuple[int, int]]
) -> list[tuple[tuple[int, int], dict[str, Span]]]:
    """Each tile's place and the part of each map that it needs."""
    if not stage:
        return []
    ops = graph.ops[:stage]
    height, width = sizes[ops[-1].name]
    if patches[0] > height or patches[1] > width:
        raise BadInput(f"an output map of {height}x{width} cannot be cut into {patches[0]}x{patches[1]} tiles")
    rows, columns = slices(height, patches[0]), slices(width, patches[1])
    return [((i, j), reach(ops, sizes, (r, c))) for i, r in enumerate(rows) for j, c in enumerate(columns)]


def slices(n: int, parts: int) -> list[tuple[int, int]]:
    """``n`` places in ``parts`` intervals of nearly the same length."""
    edges = [round(i * n / parts) for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def pixels(span: Span) -> int:
    """How many places of a map."""
    return (span[0][1] - span[0][0]) * (span[1][1] - span[1][0])


def extra_flops(model: nn.Module, graph: Graph, split: int, patches: tuple[int, int], size: Sequence[int]) -> int:
    """FLOPs of one image that are done more than once."""
    stage = graph.stage(split)
    sizes = graph.sizes(size[0], size[1], stage)
    cut = cut_tiles(graph, stage, patches, sizes)
    tiled = sum(_flops(model, op, pixels(spans[op.name])) for _, spans in cut for op in graph.ops[:stage])
    return tiled - sum(_flops(model, op, math.prod(sizes[op.name])) for op in graph.ops[:stage])


def _flops(model: nn.Module, op: Op, places: int) -> int:
    if op.kind != "conv":
        return 0
    weight: Any = model.get_submodule(op.call.target).weight
    return 2 * weight.numel() * places


# ---- the plan -----------------------------------------------------------------------------------------------------------------------


def schedule_memory(
    graph: Graph, split: int, patches: tuple[int, int], size: Sequence[int], bytes_of: BytesOf, flags: tuple[bool, bool]
) -> MemoryPlan:
    """The bytes alive at every operation of one image of this height and width.

    Args:
        split: how many blocks are run in tiles.
        bytes_of: bytes of a map of so many elements, in a tile or (``None``) whole.
        flags: depthwise convolutions, sums in place.
    """
    stage = graph.stage(split)
    steps: list[Step] = []
    sizes = graph.sizes(size[0], size[1], graph.local())
    memory = _Buffers(lambda name, numel: bytes_of(name, numel, None))
    if stage:
        last = graph.ops[stage - 1]
        memory.new(last.name, last.shape[0] * math.prod(sizes[last.name]))  # type: ignore[index]
        for place, spans in cut_tiles(graph, stage, patches, sizes):
            tile = _Buffers(lambda name, numel, place=place: bytes_of(name, numel, place))  # type: ignore[misc]
            tile.new(graph.source, graph.input_shape[0] * pixels(spans[graph.source]))
            held = {n: (s[0][1] - s[0][0], s[1][1] - s[1][0]) for n, s in spans.items()}
            _walk(
                graph, 0, stage, tile, held, flags, lambda op, live, at=place: steps.append(Step(op.name, op.block, at, live + memory.live))
            )
    else:
        memory.new(graph.source, graph.input_shape[0] * math.prod(size))
    _walk(graph, stage, len(graph.ops), memory, sizes, flags, lambda op, live: steps.append(Step(op.name, op.block, None, live)))
    if not steps:
        steps.append(Step(graph.source, "", None, memory.live))
    return MemoryPlan(tuple(steps))


def _walk(
    graph: Graph,
    first: int,
    stop: int,
    memory: _Buffers,
    held: Mapping[str, tuple[int, int]],
    flags: tuple[bool, bool],
    note: Callable[..., None],
) -> None:
    for i in range(first, stop):
        op = graph.ops[i]
        if op.kind == "other":
            for name in op.views:
                memory.share(op.name, name)
            if op.numel or not op.views:
                memory.new(op.name, op.numel)
        else:
            out = held.get(op.name, op.shape[1:])  # type: ignore[index]
            numel = op.shape[0] * math.prod(out)  # type: ignore[index]
            size = memory.bytes_of(op.name, numel)

            def free(name: str, i: int = i, size: int = size) -> bool:
                return graph.last[name] == i and memory.takes(name, size)

            target = overwrites(op, free, held.get(op.inputs[0], (0, 0)), out, flags)
            if target is None:
                memory.new(op.name, numel)
            else:
                memory.share(op.name, target)
        note(op, memory.live + (memory.bytes_of(op.name, op.inner) if op.inner else 0))
        for name in {n for n in (*op.reads, op.name) if graph.last.get(n, i) <= i}:
            memory.free(name)


class _Buffers:
    """Names on buffers: what the plan keeps of the memory."""

    def __init__(self, bytes_of: Callable[[str, int], int]) -> None:
        self.bytes_of = bytes_of
        self.size: dict[int, int] = {}
        self.names: dict[int, set[str]] = {}
        self.at: dict[str, set[int]] = {}
        self._number = itertools.count()

    @property
    def live(self) -> int:
        return sum(self.size.values())

    def new(self, name: str, numel: int) -> None:
        key = next(self._number)
        self.size[key], self.names[key] = self.bytes_of(name, numel), {name}
        self.at.setdefault(name, set()).add(key)

    def share(self, name: str, other: str) -> None:
        self.at.setdefault(name, set()).update(self.at[other])
        for key in self.at[other]:
            self.names[key].add(name)

    def free(self, name: str) -> None:
        for key in self.at.pop(name):
            self.names[key].discard(name)
            if not self.names[key]:
                del self.names[key], self.size[key]

    def takes(self, name: str, size: int) -> bool:
        """Nothing else is in the buffer of ``name``, and it has this many bytes."""
        (key, *more) = self.at[name]
        return not more and self.names[key] == {name} and size <= self.size[key]


def overwrites(op: Op, free: Callable[[str], bool], held: tuple[int, int], out: tuple[int, int], flags: tuple[bool, bool]) -> str | None:
    """The input whose buffer takes the result.

    Args:
        free: whether nobody reads a map again and its buffer has room and nothing else in it.
        held, out: height and width of the first input, as far as it is in memory, and of the output.
        flags: depthwise convolutions, sums in place.
    """
    depthwise, add = flags
    if op.kind == "conv" and op.other is not None:
        return op.other if add and op.other not in op.inputs and free(op.other) else None
    if op.kind == "conv" and op.depthwise:
        return op.inputs[0] if depthwise and out[0] <= held[0] and out[1] <= held[1] and free(op.inputs[0]) else None
    if op.kind == "point" or (op.kind == "binary" and add):
        return next((name for name in op.inputs if free(name)), None)
    return None


def same_bytes(bytes_per: float) -> BytesOf:
    """For every value."""
    return lambda name, numel, tile: math.ceil(numel * bytes_per)
