"""Patch-based inference: the first, large maps of a network are never whole in memory.

The first blocks of an image network work at high resolution and need an order of magnitude more memory than all others. They are
computed tile by tile: a tile of the stage's small output, the part of every earlier map that it needs (with the halo), and nothing else.
Then the rest runs layer by layer. Halos overlap, so some work is done twice.

Which part of which map a tile needs, and the bytes alive at every operation: :mod:`neurarium.dynamic.patch_plan`.

*Source.* Lin, Chen, Cai, Gan, Han, "MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning", arXiv 2110.15352.

*Departures.* Splits and numbers of tiles are searched exhaustively for a given network (:func:`search_schedule`). The paper searches
networks and schedules together, in a super-network by evolution; here that is a loop over a few networks, each trained by itself, with
their schedules (the experiment does it). Batches run a tile of all rows at a time. A buffer that is overwritten keeps its size until what
is in it is dead.

*Cost.* FLOPs of the halos (:attr:`PatchedModel.overhead`); p^2 times as many, smaller, operations. Training and export run the same
function without changes in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neurarium.dynamic.live import kernel
from neurarium.dynamic.opgraph import Graph, Op, Span, convolve, folded, padded, run_local, trace
from neurarium.dynamic.patch_plan import MemoryPlan, cut_tiles, extra_flops, overwrites, same_bytes, schedule_memory, slices
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["PatchedModel", "Schedule", "patch_inference", "plan_memory", "search_schedule"]

SLABS = 8  # channels are overwritten, or summed up, in this many parts


@dataclass(frozen=True)
class Schedule:
    """``split`` blocks are run in ``patches`` tiles; ``split`` 0: layer by layer. ``overhead``: extra FLOPs / FLOPs."""

    patches: tuple[int, int]
    split: int
    peak: int
    overhead: float


def plan_memory(
    model: nn.Module, example: Tensor, *, bytes_per: float = 1, inplace_depthwise: bool = True, inplace_add: bool = True
) -> MemoryPlan:
    """What one image like ``example``'s needs: of a :class:`PatchedModel` by its schedule, of any other model layer by layer.

    Args:
        bytes_per: of one value: 1 for int8, 4 for float32.
        inplace_depthwise, inplace_add: whether the kernels overwrite; a patched model has its own settings instead.

    Raises:
        UnsupportedModel: the model cannot be traced.
    """
    if bytes_per <= 0:
        raise BadInput(f"bytes_per must be positive, not {bytes_per}")
    if isinstance(model, PatchedModel):
        return model.plan(bytes_per=bytes_per, size=tuple(example.shape[-2:]))
    graph = trace(model, example)
    return schedule_memory(graph, 0, (1, 1), graph.input_shape[1:], same_bytes(bytes_per), (inplace_depthwise, inplace_add))


def patch_inference(
    model: nn.Module,
    example: Tensor,
    *,
    patches: tuple[int, int] = (4, 4),
    split: int | str | Literal["auto"] = "auto",
    limit_bytes: float | None = None,
    bytes_per: float = 1,
    inplace_depthwise: bool = True,
    inplace_add: bool = True,
) -> PatchedModel:
    """A copy of ``model`` whose first blocks run tile by tile.

    Args:
        example: images ``(n, channels, height, width)``; other sizes work later.
        patches: tiles down and across.
        split: how many blocks are tiled (see :attr:`PatchedModel.blocks`), or the name of the last one; ``"auto"``: the split of the
            smallest peak, or, with a limit, of the fewest extra FLOPs among those that fit; layer by layer where tiles do not help.
        limit_bytes: what the memory may be, at ``bytes_per`` bytes a value.

    Raises:
        UnsupportedModel: the stage contains what mixes the whole map, by name; or the model cannot be traced.
        BadInput: the limit cannot be met; the message has the smallest that can.
    """
    graph = trace(model, example)
    flags = inplace_depthwise, inplace_add
    _check_patches(patches)
    if split == "auto":
        schedule = _search(model, graph, [patches], limit_bytes, bytes_per, flags)
        if limit_bytes is not None and schedule.peak > limit_bytes:
            raise BadInput(f"a limit of {limit_bytes:g} bytes cannot be met by {patches} tiles: the smallest feasible is {schedule.peak}")
        count = schedule.split
    else:
        count = _number(graph, split)
    patched = PatchedModel(copy.deepcopy(model), graph, patches if count else (1, 1), count, *flags)
    patched.tiles()  # refuses more tiles than pixels
    if limit_bytes is not None and (peak := patched.plan(bytes_per=bytes_per).peak) > limit_bytes:
        raise BadInput(f"a limit of {limit_bytes:g} bytes cannot be met with this split: it needs {peak}")
    return patched


def search_schedule(
    model: nn.Module,
    example: Tensor,
    *,
    limit_bytes: float | None = None,
    patches: Sequence[tuple[int, int]] = ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6)),
    bytes_per: float = 1,
) -> Schedule:
    """The best of all splits and numbers of tiles: the fewest extra FLOPs that fit the limit, or without a limit the smallest peak.

    If nothing fits, the schedule of the smallest peak is returned: compare ``schedule.peak``.
    """
    for p in patches:
        _check_patches(p)
    return _search(model, trace(model, example), patches, limit_bytes, bytes_per, (True, True))


def _check_patches(patches: tuple[int, int]) -> None:
    if len(patches) != 2 or min(patches) < 1:
        raise BadInput(f"patches must be two numbers of at least 1, tiles down and across, not {patches}")


def _number(graph: Graph, split: int | str) -> int:
    names = [name for name, _ in graph.blocks]
    if isinstance(split, str):
        inside = [i for i, name in enumerate(names, 1) if f"{name}.".startswith(f"{split}.")]
        if not inside:
            raise BadInput(f"no block {split!r}; there are {names}")
        split = inside[-1]
    if not 0 <= split <= len(names):
        raise BadInput(f"split must be 0 to {len(names)} blocks, not {split}")
    if split:
        upto = graph.blocks[split - 1][1] + 1
        if (local := graph.local()) < upto:
            op = graph.ops[local]
            raise UnsupportedModel("mixes the whole map, so it cannot be computed from a part of it", module=op.block or op.name)
    return split


def _search(
    model: nn.Module, graph: Graph, patches: Sequence[tuple[int, int]], limit: float | None, bytes_per: float, flags: tuple[bool, bool]
) -> Schedule:
    size, local = graph.input_shape[1:], graph.local()

    def schedule(p: tuple[int, int], split: int) -> Schedule:
        peak = schedule_memory(graph, split, p, size, same_bytes(bytes_per), flags).peak
        return Schedule(p, split, peak, extra_flops(model, graph, split, p, size) / max(graph.flops, 1))

    found = [schedule((1, 1), 0)]
    for split, (_, end) in enumerate(graph.blocks, 1):
        height, width = graph.ops[end].shape[1:] if end < local else (0, 0)  # type: ignore[index]
        found += [schedule(p, split) for p in patches if p[0] <= height and p[1] <= width and p != (1, 1)]
    fitting = [s for s in found if limit is not None and s.peak <= limit]
    return min(fitting, key=lambda s: (s.overhead, s.peak)) if fitting else min(found, key=lambda s: (s.peak, s.overhead))


# ---- running it ---------------------------------------------------------------------------------------------------------------------


class PatchedModel(nn.Module):
    """The model with its first :attr:`split` blocks run tile by tile; the same function. Made by :func:`patch_inference`.

    Without gradients and in evaluation mode it allocates what :meth:`plan` says for the values' size, operation by operation. In training
    it is the plain model; under autograd or export the tiles are run without changes in place.

    Attributes:
        model: the copy that holds the weights.
        blocks: names of the blocks that ``split`` counts.
        graph: its operations.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, patches: tuple[int, int], split: int, inplace_depthwise: bool, inplace_add: bool
    ) -> None:
        super().__init__()
        self.model, self.graph, self.patches, self.split = model, graph, tuple(patches), split
        self.flags = inplace_depthwise, inplace_add
        self.stage = graph.stage(split)
        self.training = model.training

    @property
    def blocks(self) -> list[str]:
        return [name for name, _ in self.graph.blocks]

    @cached_property
    def overhead(self) -> float:
        """FLOPs done more than once / FLOPs of the plain model."""
        return self.flops / max(self.graph.flops, 1) - 1

    @cached_property
    def flops(self) -> int:
        """Of one image, halos included."""
        return self.graph.flops + extra_flops(self.model, self.graph, self.split, self.patches, self.graph.input_shape[1:])

    def plan(self, *, bytes_per: float = 1, size: Sequence[int] | None = None) -> MemoryPlan:
        """Memory of one image of this height and width (the example's by default)."""
        return schedule_memory(self.graph, self.split, self.patches, size or self.graph.input_shape[1:], same_bytes(bytes_per), self.flags)

    def tiles(self, size: Sequence[int] | None = None) -> dict[tuple[int, int], dict[str, Span]]:
        """Place of a tile -> the part of each map that it needs, by the name of the operation that makes it."""
        height, width = size or self.graph.input_shape[1:]
        return dict(cut_tiles(self.graph, self.stage, self.patches, self.graph.sizes(height, width, self.stage)))

    def extra_repr(self) -> str:
        return f"patches={self.patches}, split={self.split} of {len(self.graph.blocks)} blocks"

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.model(x)
        channels = self.graph.input_shape[0]
        if x.ndim != 4 or x.shape[1] != channels:
            raise BadInput(f"expected images (n, {channels}, height, width), not {tuple(x.shape)}")
        plain = torch.compiler.is_exporting() or torch.is_grad_enabled()
        return self._inference(x, self._plain if plain else self._inplace, not plain)

    def _inference(self, x: Tensor, execute: Callable[..., Any], own: bool) -> Tensor:
        """``own``: the image is copied into a buffer, tile by tile, so that it may be overwritten, and tiles into one for the output."""
        graph, last = self.graph, self.graph.ops[self.stage - 1]
        sizes = graph.sizes(x.shape[2], x.shape[3], self.stage)
        if self.stage:
            tiles = cut_tiles(graph, self.stage, self.patches, sizes)
            with kernel():
                weights = {op.name: folded(self.model, op) for op in graph.ops[: self.stage] if op.kind == "conv"}
            whole = x.new_empty(len(x), last.shape[0], *sizes[last.name]) if own else None  # type: ignore[misc]
            parts = []
            for _, spans in tiles:
                (top, bottom), (left, right) = spans[graph.source]
                env = {graph.source: x[..., top:bottom, left:right]}
                if own:
                    env[graph.source] = env[graph.source].clone(memory_format=torch.contiguous_format)
                for i in range(self.stage):
                    self._step(i, env, spans, sizes, weights, execute)
                if whole is None:
                    parts.append(env[last.name])
                else:
                    (top, bottom), (left, right) = spans[last.name]
                    whole[..., top:bottom, left:right] = env[last.name]
                env.clear()
            env = {last.name: stitch(parts, self.patches) if whole is None else whole}
            del whole
        else:
            env = {graph.source: x.clone() if own else x}
        for i in range(self.stage, len(graph.ops)):
            self._step(i, env, None, sizes, None, execute)
        return env[graph.result]

    def _step(self, i: int, env: dict[str, Any], spans: Any, sizes: Any, weights: Any, execute: Callable[..., Any]) -> None:
        op = self.graph.ops[i]
        if op.kind == "other":
            env[op.name] = op.call.run(self.model, env)
        else:
            env[op.name] = execute(i, env, spans, sizes, weights and weights.get(op.name))
        for name in {n for n in (*op.reads, op.name) if self.graph.last.get(n, i) <= i}:
            del env[name]

    def _reads(self, op: Op, env: Mapping[str, Any], spans: Any, sizes: Any) -> tuple[dict[str, Tensor], tuple[int, int, int, int] | None]:
        """The maps that an operation reads, cropped to what it needs, and the padding around the first."""
        if spans is None:
            return {n: env[n] for n in op.reads}, None
        pads, views = None, {}
        for name in op.reads:
            (top, bottom), (left, right) = spans[op.name]
            if op.window is not None and name != op.other:
                wanted = op.window.needs(0, top, bottom), op.window.needs(1, left, right)
                clipped = [(min(max(a, 0), n), max(min(b, n), 0)) for (a, b), n in zip(wanted, sizes[name])]
                pads = tuple(p for (a, b), (c, d) in zip(wanted, clipped) for p in (c - a, b - d))
                (top, bottom), (left, right) = clipped
            down, across = spans[name][0][0], spans[name][1][0]
            views[name] = env[name][..., top - down : bottom - down, left - across : right - across]
        return views, pads  # type: ignore[return-value]

    def _plain(self, i: int, env: Mapping[str, Any], spans: Any, sizes: Any, weights: Any) -> Tensor:
        op = self.graph.ops[i]
        return run_local(self.model, op, *self._reads(op, env, spans, sizes), weights)

    def _inplace(self, i: int, env: Mapping[str, Any], spans: Any, sizes: Any, weights: Any) -> Tensor:
        """As :meth:`_plain`, in the buffers that :func:`overwrites` names."""
        op, model = self.graph.ops[i], self.model
        views, pads = self._reads(op, env, spans, sizes)
        first = views[op.inputs[0]]
        out = out_size(op, first, pads)

        def free(name: str) -> bool:
            mine = env[name].untyped_storage().data_ptr()
            others = (t for n, v in env.items() if n != name for t in tree_leaves(v) if isinstance(t, Tensor))
            return self.graph.last[name] == i and all(t.untyped_storage().data_ptr() != mine for t in others)

        target = overwrites(op, free, tuple(env[op.inputs[0]].shape[2:]), out, self.flags)  # type: ignore[arg-type]
        if op.kind != "conv":
            if target is None:
                y = _pooled(model, op, views, pads, out)
            else:
                y = views[target]
                with kernel():
                    y.copy_(run_local(model, _bare(op), views))
        else:
            conv: Any = model.get_submodule(op.call.target)
            if pads is None and conv.padding == "same":
                (top, left), (down, across) = op.window.pad, op.window.total_pad  # type: ignore[union-attr]
                pads = (top, down - top, left, across - left)
            with kernel():
                weight, bias = weights or folded(model, op)
                padding, x = padded(first, pads, conv.padding, 0.0)
            if target is None:
                y = convolve(model, op, x, padding, (weight, bias))
                if op.other is not None:
                    y += views[op.other]
            else:
                y = views[target] if target == op.other else views[target][..., : out[0], : out[1]]
                with kernel():
                    slabs = SLABS if op.depthwise or conv.groups == 1 else 1
                    for a, b in slices(len(weight), min(slabs, len(weight))):
                        read = x[:, a:b] if op.depthwise else x
                        part = convolve(
                            model, op, read, padding, (weight[a:b], None if bias is None else bias[a:b]), b - a if op.depthwise else None
                        )
                        y[:, a:b] = y[:, a:b] + part if target == op.other else part
                        del part
            del x
        return _finish_inplace(model, op, y)


def _bare(op: Op) -> Op:
    return replace(op, points=())


def out_size(op: Op, x: Tensor, pads: tuple[int, int, int, int] | None) -> tuple[int, int]:
    """Height and width of what the operation makes of this crop."""
    if op.window is None:
        return tuple(x.shape[2:])  # type: ignore[return-value]
    total = op.window.total_pad if pads is None else (pads[0] + pads[1], pads[2] + pads[3])
    window = replace(op.window, total_pad=total)
    return window.out(0, x.shape[2]), window.out(1, x.shape[3])


def _pooled(model: nn.Module, op: Op, views: Mapping[str, Tensor], pads: tuple[int, int, int, int] | None, out: tuple[int, int]) -> Tensor:
    """Into a buffer of its own: PyTorch's pooling makes indices or a padded copy besides."""
    if op.kind != "pool":
        return run_local(model, _bare(op), views, pads)
    x = views[op.inputs[0]]
    y = x.new_empty(*x.shape[:2], *out)
    with kernel():
        y.copy_(run_local(model, _bare(op), views, pads))
    return y


def _finish_inplace(model: nn.Module, op: Op, y: Tensor) -> Tensor:
    for call in op.points:
        module = model.get_submodule(call.target) if call.how == "call_module" else None
        if type(module) is nn.ReLU:
            y.clamp_(min=0)
        elif type(module) is nn.ReLU6:
            y.clamp_(0, 6)
        else:
            with kernel():
                y.copy_(call.of(model, y))
    return y


def stitch(parts: Sequence[Tensor], patches: tuple[int, int]) -> Tensor:
    rows = [torch.cat(list(parts[k : k + patches[1]]), 3) for k in range(0, len(parts), patches[1])]
    return torch.cat(rows, 2)
