"""Random-number state: seeded before an arm, set aside while something shared is built, given back to the caller afterwards.

An arm's randomness must depend on the trial's seed alone: not on the arms before it, nor on whether they ran in this process or in one
that was killed yesterday. torch is seeded where it is loaded; an arm that loads it for the first time half-way is refused, because part
of its randomness would then depend on what had been imported earlier.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["derived_seed", "preserved", "seed_all", "torch_is_loaded"]


def torch_is_loaded() -> bool:
    """Whether torch has been imported (completely) in this process."""
    return hasattr(sys.modules.get("torch"), "manual_seed")


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and, where it is loaded, torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - experiments may use the global generator
    if torch_is_loaded():
        sys.modules["torch"].manual_seed(seed)


def derived_seed(seed: int, name: str) -> int:
    """A fixed seed for the thing of this name at this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever happens inside, the global generators go on afterwards as if nothing had."""
    python, numpy, torch = random.getstate(), np.random.get_state(), _torch_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if torch is not None:
            module = sys.modules["torch"]
            module.set_rng_state(torch[0])
            if torch[1] is not None:
                module.cuda.set_rng_state_all(torch[1])


def _torch_state() -> tuple[Any, Any] | None:
    if not torch_is_loaded():
        return None
    torch = sys.modules["torch"]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
