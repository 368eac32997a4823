"""neurarium: neural-network papers as working, composable PyTorch parts, each with its claim re-measured on a laptop.

``import neurarium`` is cheap and loads no torch; sub-packages load on first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBPACKAGES = (
    "catalog", "compress", "data", "dynamic", "errors", "experiments", "lab", "learn", "meter", "nn", "physics", "roles", "sequence",
    "site", "spiking", "testing", "trust",
)  # fmt: skip

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"neurarium.{name}")
    raise AttributeError(f"module 'neurarium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
