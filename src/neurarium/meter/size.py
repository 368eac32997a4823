"""How large a model is: parameters, non-zero parameters, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["nonzero_parameters", "parameters", "stored_bytes"]


def parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of parameters, a shared one once; only those that require a gradient with ``trainable``."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def nonzero_parameters(model: nn.Module) -> int:
    """The number of parameters that are not exactly zero, a shared one once.

    Where ``torch.nn.utils.prune`` keeps a mask beside the weights, the masked ones count as zero.
    """
    masks = {
        id(p): getattr(module, f"{name[:-5]}_mask")
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name.endswith("_orig") and isinstance(getattr(module, f"{name[:-5]}_mask", None), Tensor)
    }
    total = 0
    for p in model.parameters():
        value = p.detach()
        for part in parts(value * masks[id(p)] if id(p) in masks else value):
            total += int(torch.count_nonzero(part))
    return total


def stored_bytes(model: nn.Module | Mapping[str, Any] | Iterable[Tensor]) -> int:
    """The bytes of everything that saving the model would store: parameters, persistent buffers, packed and quantised weights.

    ``model`` may also be a state dict or tensors. Every tensor counts with what it really holds: an int8 or bit-packed buffer with
    its own bytes, a quantised tensor with its integers and its scales and zero points, a sparse one with its indices and values, a
    wrapper (a ``__tensor_flatten__`` subclass) with what it wraps. Memory that several entries share counts once, a view with the
    elements that it shows.
    """
    source: Any = model.state_dict() if isinstance(model, nn.Module) else model
    by_storage: dict[int, dict[tuple[Any, ...], int]] = defaultdict(dict)
    room: dict[int, int] = {}
    total = 0
    keep = list(_tensors(source))  # state_dict makes fresh tensors: keep them, so that no address is used twice
    for tensor in keep:
        for part in parts(tensor):
            total += _scales(part)
            storage = part.untyped_storage()
            size = storage.nbytes() if part.is_quantized else part.numel() * part.element_size()
            by_storage[storage._cdata][part.storage_offset(), part.shape, part.stride()] = size
            room[storage._cdata] = storage.nbytes()
    return total + sum(min(sum(views.values()), room[key]) for key, views in by_storage.items())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a state dict, also where a module packs several into one entry."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for inner in value:
            yield from _tensors(inner)


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or the components of a sparse one or of a wrapper subclass."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten(tensor)[0]:
            yield from parts(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def _scales(tensor: Tensor) -> int:
    """The bytes of a quantised tensor's scales and zero points: double and int64 for the tensor, or tensors of them for channels."""
    if not tensor.is_quantized:
        return 0
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return 16
    both = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
    return sum(t.numel() * t.element_size() for t in both)
