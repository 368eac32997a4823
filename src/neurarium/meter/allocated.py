"""How many bytes of tensors are alive at once: a trace of what an algorithm allocates, exact and repeatable.

Every storage that an operation makes inside the block is counted from its birth to its end; what existed before is not. Resident memory
of the process would count the allocator's habits instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef

__all__ = ["AllocatedBytes", "peak_bytes"]


class AllocatedBytes(TorchDispatchMode):
    """``with AllocatedBytes() as memory: ...``; then ``memory.peak`` and ``memory.live`` are bytes of tensors made in the block.

    Workspace that one operation uses inside (a convolution's scratch buffer) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[WeakIdRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = WeakIdRef(storage)
            if key in self._known:
                continue
            if given is None:  # a view of, or an in-place change to, something that was there before is not new
                given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            size = 0 if storage.data_ptr() in given else storage.nbytes()
            self._known[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: WeakIdRef) -> None:
        self.live -= self._known.pop(key, 0)


def peak_bytes(fn: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """Peak bytes of the tensors that ``fn(*inputs, **options)`` makes."""
    with AllocatedBytes() as memory:
        fn(*inputs, **options)
    return memory.peak
