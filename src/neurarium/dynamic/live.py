"""What an inference really allocates, beside what a plan says.

:class:`BufferTrace` follows every storage from its birth to its end (:class:`~neurarium.meter.allocated.AllocatedBytes`) and keeps two
accounts: *buffers*, the maps that live between operations, which a microcontroller must hold; and *scratch*, what an operation makes
inside :func:`kernel` and gives back before it ends (a padded copy, a slab of channels), which a kernel written for the device keeps in
registers or a line buffer. A change in place makes nothing new, a view neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from neurarium.meter.allocated import AllocatedBytes

__all__ = ["BufferTrace", "kernel", "trace_memory"]

_inside: ContextVar[bool] = ContextVar("inside a kernel", default=False)


@contextmanager
def kernel() -> Iterator[None]:
    """What is made inside is workspace of one operation, not a buffer."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


class BufferTrace(AllocatedBytes):
    """``with BufferTrace() as memory: ...``; ``memory.peak`` bytes of buffers, ``memory.scratch`` bytes of the largest workspace,
    ``memory.largest`` of both together at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._workspace = AllocatedBytes()
        self.largest = 0

    @property
    def scratch(self) -> int:
        return self._workspace.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        account = self._workspace.__torch_dispatch__ if _inside.get() else super().__torch_dispatch__
        result = account(func, types, args, kwargs)
        self.largest = max(self.largest, self.live + self._workspace.live)
        return result


def trace_memory(fn: Callable[..., Any], *inputs: Any) -> BufferTrace:
    """Trace one call."""
    with BufferTrace() as memory:
        fn(*inputs)
    return memory
