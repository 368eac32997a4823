"""What must not change behind the user's back: snapshots of modules, tensors and the global random state."""
# ruff: noqa: NPY002 - the legacy global generators are what is being guarded

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ModuleState", "assert_same", "close", "rng_state", "seeded", "snapshot", "unchanged_rng"]


def rng_state() -> tuple[Any, ...]:
    """The state of the three global generators, comparable by ``==``."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), (kind, np.asarray(keys).tobytes(), *rest), random.getstate()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch, numpy and random for the block and restores them after it."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


@contextmanager
def unchanged_rng(what: str) -> Iterator[None]:
    """Fails if the block moves a global random generator."""
    before = rng_state()
    yield
    for name, a, b in zip(("torch", "numpy", "random"), before, rng_state(), strict=True):
        assert a == b, f"{what} changed the global random state of {name}: use a generator of its own"


class ModuleState:
    """Everything of a module that a reader must leave alone: tensors, gradients, flags, hooks, the modules themselves."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = {k: (v, v._version, v.detach().clone()) for k, v in _named_tensors(module)}
        self.grads = {k: None if p.grad is None else p.grad.detach().clone() for k, p in module.named_parameters()}
        self.requires_grad = {k: p.requires_grad for k, p in module.named_parameters()}
        self.training = {k: m.training for k, m in module.named_modules()}
        self.modules = {k: (type(m), id(m)) for k, m in module.named_modules()}
        self.hooks = {k: _hooks(m) for k, m in module.named_modules()}

    def assert_unchanged(self, module: nn.Module, what: str) -> None:
        now = ModuleState(module)
        assert now.modules == self.modules, f"{what} replaced, added or removed modules of its input"
        assert now.tensors.keys() == self.tensors.keys(), f"{what} added or removed parameters or buffers of its input"
        for name, (tensor, _, value) in self.tensors.items():
            assert now.tensors[name][0] is tensor, f"{what} replaced the tensor {name} of its input"
            assert _equal(now.tensors[name][2], value), f"{what} changed the values of {name} in its input"
        for name, grad in self.grads.items():
            after = now.grads[name]
            same = (grad is None and after is None) or (grad is not None and after is not None and _equal(grad, after))
            assert same, f"{what} changed the gradient of {name}"
        assert now.requires_grad == self.requires_grad, f"{what} changed requires_grad flags"
        assert now.training == self.training, f"{what} changed train/eval mode"
        assert now.hooks == self.hooks, f"{what} left hooks on its input"


def snapshot(module: nn.Module) -> ModuleState:
    """The state of a module now; ``snapshot(m).assert_unchanged(m, "f")`` later."""
    return ModuleState(module)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _hooks(module: nn.Module) -> int:
    return sum(
        len(getattr(module, name))
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
        if getattr(module, name, None)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def close(a: Any, b: Any, *, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Whether two outputs (tensors, or pytrees of them) agree."""
    left, right = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        torch.allclose(x.double(), y.double(), rtol=rtol, atol=atol, equal_nan=True) if isinstance(x, Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


def assert_same(a: Any, b: Any, why: str) -> None:
    """Bit equality of two outputs."""
    left, right = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    assert len(left) == len(right), why
    for x, y in zip(left, right, strict=True):
        assert _equal(x, y) if isinstance(x, Tensor) else x == y, why
