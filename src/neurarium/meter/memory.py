"""Bytes that a graph keeps for its backward pass: exact, repeatable, on any device.

Not a profiler's view of the allocator: the number depends on the model and the inputs alone, never on fragmentation, other
processes or the moment of a garbage collection.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from neurarium.meter.size import parts
from neurarium.meter.state import module_of, undisturbed

__all__ = ["SavedBytes", "saved_bytes"]


class SavedBytes:
    """Context manager that follows what autograd saves inside it, and when the graph lets go of it again.

    ``live`` bytes are held now, ``peak`` is the largest that ``live`` ever was, ``total`` is the sum of all that was ever charged. The
    counts stay up to date after the block, while graphs that were built in it live on.

    What is counted. A storage counts once, however many tensors on it are saved, with all its bytes: they all stay allocated.
    Nothing is charged that exists without the graph: parameters and other leaves that require a gradient, and every tensor
    on memory that was there when the block was entered (inputs, a slice of the training data, a transposed weight). A tensor of
    an older graph that is saved anew counts with the elements that it shows. A batch that is made *inside* the block
    counts while the graph holds it; make it before if it should not.

    What passes by: tensors that a ``torch.autograd.Function`` puts on ``ctx`` without ``save_for_backward``, what
    ``checkpoint(..., use_reentrant=False)`` recomputes during the backward pass (with ``use_reentrant=True`` it is counted), and
    tensors that another ``saved_tensors_hooks`` inside the block takes over.
    Autograd's check for tensors that were modified in place after saving works as without the meter.

    Entering looks at every Python object once (some ten milliseconds): enter once around a fit, not once a step.
    """

    def __init__(self) -> None:
        self._count = _Count()
        self._hooks: Any = None

    @property
    def live(self) -> int:
        return self._count.live

    @property
    def peak(self) -> int:
        return self._count.peak

    @property
    def total(self) -> int:
        return self._count.total

    def __enter__(self) -> SavedBytes:
        self._count.older = _storages()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count.pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._count.older = {}


def saved_bytes(fn: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """The peak of :class:`SavedBytes` over ``fn(*inputs, **options)``: for a module, what one forward pass keeps for the backward pass.

    ``fn`` may be a whole training step; a module is run in its present mode with gradients on, and left as it was.
    """
    with undisturbed(module_of(fn)), torch.enable_grad(), SavedBytes() as meter:
        output = fn(*inputs, **options)
        del output
    return meter.peak


class _Held:
    """One saved tensor. Its death tells that the graph let go. Detached, for a graph that holds its own output would never die."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version


def _unpack(held: _Held) -> Tensor:
    if held.tensor._version != held.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a saved tensor of shape "
            f"{tuple(held.tensor.shape)} is at version {held.tensor._version}; expected version {held.version} instead"
        )
    return held.tensor


class _Count:
    """The books: how many saved tensors hold each storage, and what it was charged."""

    def __init__(self) -> None:
        self.live = self.peak = self.total = 0
        self.older: dict[int, StorageWeakRef] = {}
        # A storage is known by the address of its record. The weak reference keeps that address from being used again.
        self.held: dict[tuple[Any, ...], tuple[int, int, StorageWeakRef]] = {}

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        if not (tensor.is_leaf and tensor.requires_grad):
            for part in parts(held.tensor):
                charge = self.charge(part, tensor)
                if charge is not None:
                    finalizer = weakref.finalize(held, self.release, charge)
                    finalizer.atexit = False
        return held

    def charge(self, part: Tensor, saved: Tensor) -> tuple[Any, ...] | None:
        try:
            storage = part.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor without memory of its own
            return None
        key: tuple[Any, ...] = (storage._cdata,)
        size = storage.nbytes()
        if storage._cdata in self.older:
            if _root(saved).is_leaf:
                return None
            key = (storage._cdata, part.storage_offset(), part.shape, part.stride())
            size = part.numel() * part.element_size()
        holders, charged, ref = self.held.get(key) or (0, size, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        self.held[key] = (holders + 1, charged, ref)
        if holders == 0:
            self.live += charged
            self.total += charged
            self.peak = max(self.peak, self.live)
        return key

    def release(self, key: tuple[Any, ...]) -> None:
        holders, charged, ref = self.held[key]
        if holders == 1:
            del self.held[key]
            self.live -= charged
        else:
            self.held[key] = (holders - 1, charged, ref)


def _root(tensor: Tensor) -> Tensor:
    base = tensor._base
    return tensor if base is None else base


def _storages() -> dict[int, StorageWeakRef]:
    """The storages of all tensors that Python knows now."""
    kinds, found = _kinds(Tensor), dict[int, StorageWeakRef]()
    for thing in gc.get_objects():
        if type(thing) in kinds:
            try:
                pieces = list(parts(thing))
                for storage in (p.untyped_storage() for p in pieces):
                    found[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            except (NotImplementedError, RuntimeError, AttributeError):
                continue
    return found


def _kinds(kind: type[Any]) -> set[type[Any]]:
    below: list[type[Any]] = type.__subclasses__(kind)
    return {kind}.union(*map(_kinds, below))
