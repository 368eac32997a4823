"""Running a model without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["module_of", "undisturbed"]


def module_of(fn: Callable[..., Any]) -> nn.Module | None:
    """The module that a callable is, or is a method of."""
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def undisturbed(model: nn.Module | None) -> Iterator[None]:
    """A block after which gradients, buffers, train/eval modes and the random number generators are as before.

    Gradients are None inside. Buffers get their values back in place, or their old tensor where the block put a new one.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the global stream is what a layer may draw from
    modules = list(model.modules()) if model is not None else []
    modes = [m.training for m in modules]
    buffers = [(m, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    grads = [(p, p.grad) for m in modules for p in m._parameters.values() if p is not None]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            for p, _ in grads:
                p.grad = None
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for m, training in zip(modules, modes):
            m.training = training
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for m, name, buffer, value in buffers:
                m._buffers[name] = buffer
                if not torch.equal(buffer, value):  # writing an unchanged one would still invalidate a graph that saved it
                    buffer.copy_(value)
