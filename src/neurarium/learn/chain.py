"""A model as the list of blocks whose composition it is: what every layer-local rule needs.

``as_chain(model, example)`` cuts a model into blocks and **proves** the cut on ``example``: running the blocks one after another must give
exactly ``model(example)``. What cannot be cut (a skip connection across a cut, a functional call between layers, two inputs) raises
``UnsupportedModel`` with the name of the first module that sees something else than the blocks before it produce.

A block starts at a module with weights and takes along the activations, norms, pools and reshapes that follow. A module that is no
``nn.Sequential``, such as a residual block, is never opened: it is one block. Blocks share the model's own modules, so training one
trains the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Chain", "as_chain"]

NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip
OUTSIDE = (
    "its input is not the output of the blocks before it: something between them (a skip connection, a functional call, a second "
    "input) is in no block. Make it a module, or put both ends into one block with blocks=[...]"
)


@dataclass(frozen=True)
class Chain:
    """Ordered blocks whose composition is a model.

    ``names[i]`` are the model's names of the modules in ``blocks[i]``; ``shapes[i]`` is the shape of its output for one sample.
    """

    blocks: tuple[nn.Module, ...]
    names: tuple[tuple[str, ...], ...]
    shapes: tuple[torch.Size, ...]
    input_shape: torch.Size

    @property
    def widths(self) -> tuple[int, ...]:
        """Features (or channels) that each block puts out: the last axis of vectors and sequences, the first of images."""
        return tuple(s[0] if len(s) > 2 else s[-1] for s in self.shapes)

    @property
    def head(self) -> nn.Linear | None:
        """The last block, where it is a bare linear layer on one vector a sample."""
        last = self.blocks[-1]
        return last if isinstance(last, nn.Linear) and len(self.shapes[-1]) == 1 else None

    @property
    def hidden(self) -> tuple[nn.Module, ...]:
        """The blocks without the head."""
        return self.blocks if self.head is None else self.blocks[:-1]

    def forward(self, x: Tensor, upto: int | None = None, detach: bool = True) -> list[Tensor]:
        """Outputs of the first ``upto`` blocks (all by default). ``detach`` cuts the graph between blocks."""
        outputs = []
        for block in self.blocks[:upto]:
            x = block(x.detach() if detach else x)
            outputs.append(x)
        return outputs


def as_chain(model: nn.Module, example: Tensor, blocks: Sequence[str | Sequence[str]] | None = None) -> Chain:
    """Cut ``model`` into blocks and verify the cut on ``example``.

    Args:
        example: a batch that the model takes.
        blocks: names of submodules in order; a nested list groups several into one block. By default an ``nn.Sequential`` (nested ones
            are flattened), the model's ``.blocks``, or its children in the order of registration, grouped by weights.

    Raises:
        UnsupportedModel: the composition of the blocks is not the model, or two blocks share weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if blocks is not None:
        groups = [tuple([b] if isinstance(b, str) else b) for b in blocks]
        if unknown := [n for g in groups for n in g if n not in modules]:
            raise BadInput(
                f"blocks names {unknown[0]!r}, which the model does not have; its children are {[n for n, _ in model.named_children()]}"
            )
    elif isinstance(getattr(model, "blocks", None), (nn.ModuleList, nn.Sequential)) and len(list(model.children())) == 1:
        groups = [(f"blocks.{i}",) for i in range(len(model.blocks))]
    else:
        groups = _grouped(_flat(model, ""), modules)
    if not groups or not all(groups):
        raise UnsupportedModel("has no blocks", module=type(model).__name__)

    parts = tuple(modules[g[0]] if len(g) == 1 else nn.Sequential(*(modules[n] for n in g)) for g in groups)
    owners: dict[nn.Parameter, int] = {}
    for i, part in enumerate(parts):
        for p in part.parameters():
            if owners.setdefault(p, i) != i:
                raise UnsupportedModel(
                    f"shares weights with {groups[owners[p]]}: a local rule cannot tell whose they are", module=groups[i][0]
                )
    outputs = _verified(model, parts, groups, example)
    return Chain(parts, tuple(groups), tuple(o.shape[1:] for o in outputs), example.shape[1:])


def _flat(model: nn.Module, prefix: str) -> list[str]:
    """Names of the modules to run in order: containers are opened, everything else is whole."""
    containers = (nn.Sequential, nn.ModuleList)
    if prefix and not isinstance(model, containers):
        return [prefix]
    children = [(n, m) for n, m in model._modules.items() if m is not None]  # named_children would skip a module's second use
    if not children:
        return [prefix]
    return [leaf for name, child in children for leaf in _flat(child, f"{prefix}.{name}" if prefix else name)]


def _grouped(names: Iterable[str], modules: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    groups: list[list[str]] = []
    weighted = False  # whether the open group has weights already
    for name in names:
        module = modules[name]
        starts = not isinstance(module, NORMS) and next(module.parameters(), None) is not None
        if not groups or (starts and weighted):
            groups.append([])
            weighted = False
        groups[-1].append(name)
        weighted = weighted or starts
    return [tuple(g) for g in groups]


def _verified(model: nn.Module, parts: Sequence[nn.Module], groups: Sequence[Sequence[str]], example: Tensor) -> list[Tensor]:
    """Run both ways in eval mode; raise at the first module whose input is not what the blocks before it produce."""
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) == 0:
        raise BadInput("example must be one tensor with at least one sample along its first axis")
    starts = {id(model.get_submodule(g[0])): i for i, g in enumerate(groups)}
    seen: dict[int, object] = {}
    modes = [(m, m.training) for m in model.modules()]
    model.eval()

    def note(module: nn.Module, args: tuple[object, ...]) -> None:
        seen.setdefault(starts[id(module)], args[0] if len(args) == 1 else args)

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if id(m) in starts]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[example.device] if example.is_cuda else []):
            whole = model(example)
            for handle in handles:
                handle.remove()
            outputs, h = [], example
            for part, group, i in zip(parts, groups, range(len(parts))):
                given = seen.get(i)
                if given is not None and not (isinstance(given, Tensor) and _equal(given, h)):
                    raise UnsupportedModel(OUTSIDE, module=group[0])
                h = part(h)
                if not isinstance(h, Tensor):
                    raise UnsupportedModel(f"returns a {type(h).__name__}, not one tensor", module=group[-1])
                outputs.append(h)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not isinstance(whole, Tensor) or not _equal(whole, h):
        raise UnsupportedModel("what the model does after this block is in no block", module=groups[-1][-1])
    return outputs


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
