"""The shipped example runs its saved folder without torch and says the same as the policy."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "early_exit_onnx.py"


def test_the_saved_folder_runs_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path / "program"), epochs=1)
    out = capsys.readouterr().out
    assert "loaded in that process: numpy, onnxruntime" in out and "torch" not in out.split("process:")[1]
    assert " no " not in out and out.count("yes") == 3
    assert {p.name for p in (tmp_path / "program").iterdir()} >= {"host.py", "plan.json", "segment_0.onnx"}
