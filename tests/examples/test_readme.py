"""The README's code runs, and its table of verdicts is what the records say."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from neurarium import catalog, lab

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_two_papers_example_runs() -> None:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "MonoForward" in block]
    g = torch.Generator().manual_seed(0)
    loader = [(torch.randn(16, 1, 6, 6, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(4)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    scope = {"model": model, "loader": loader}
    exec(code.replace("epochs=10", "epochs=1"), scope)
    weights = torch.cat([m.weight.flatten() for m in scope["small"] if hasattr(m, "weight")])
    assert 0.75 < (weights == 0).float().mean() < 0.85


def test_the_table_of_verdicts_is_the_records() -> None:
    report = lab.verify(catalog.load().papers)
    for paper in report.papers:
        counts = [sum(v.verdict == name for v in paper.claims) for name in ("held", "weaker", "failed")]
        row = rf"\| `{paper.id}` \|.*\| {counts[0]} \| {counts[1]} \| {counts[2]} \|"
        assert re.search(row, README), f"README's row of {paper.id} must end in | {counts[0]} | {counts[1]} | {counts[2]} |"
