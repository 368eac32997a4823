"""Tiny examples: optimizers."""

from __future__ import annotations

from functools import partial

from neurarium.learn.orthogonal import ROOT
from neurarium.testing import Example

__all__ = ["root"]


def root() -> Example:
    """ROOT on whatever parameters it is given."""
    return Example("optimizer", make=partial(ROOT, lr=1e-2))
