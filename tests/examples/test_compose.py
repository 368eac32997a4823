"""The demo runs through, every step is measured, and parts of different papers really are combined."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "compose.py"


def test_the_demo_measures_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT))["main"](smoke=True)
    out = capsys.readouterr().out
    for paper in ("mono-forward", "root", "phnn", "chita", "jei-dnn"):
        assert paper in out
    assert "where the pruned network looks" in out
