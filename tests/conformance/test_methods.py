"""Every working paper's method keeps its role's contract."""

from __future__ import annotations

from collections.abc import Callable

from neurarium.testing import parametrize_methods


@parametrize_methods()
def test_conformance(conformance: Callable[[], None]) -> None:
    conformance()
