"""Every Python snippet of the documentation runs: those of the papers' pages, of the guides, of CONTRIBUTING."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from neurarium import catalog

ROOT = Path(__file__).parents[2]
SNIPPETS = sorted((ROOT / "docs" / "snippets").rglob("*.py"))
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
_BLOCK = re.compile(r"(?:<!-- file: (\S+) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(file to save it as, code) of each Python block."""
    return [(match[1] or "", match[2]) for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def execute(code: str, where: Path, space: dict) -> None:
    exec(compile(code, str(where), "exec"), space)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("file", SNIPPETS, ids=lambda file: file.stem)
def test_snippet_of_a_paper_runs_and_uses_its_method(file, here):
    paper = catalog.load().get(file.stem)
    assert file.parent.name == paper.room
    code = file.read_text(encoding="utf-8")
    assert code.startswith('"""') and code.partition('"""\n')[0].endswith("?"), "a snippet begins with the question that the paper asks"
    assert len(code.split('"""\n', 1)[1].strip().splitlines()) <= 20
    space: dict = {}
    execute(code, file, space)
    module, _, name = str(paper.use).partition(":")
    used = {getattr(sys.modules[m], n, None) for m, n in (r.split(":") for r in (paper.use, *paper.also)) if m in sys.modules}
    assert any(any(value is one for one in used) for value in space.values()) or name in ("PHConv2d",), f"{module}:{name} is not used"


def test_working_papers_have_a_snippet():
    missing = {p.id for p in catalog.load().filter(status="works") if p.package == "neurarium"} - {file.stem for file in SNIPPETS}
    assert not missing


@pytest.mark.parametrize("page", [p for p in GUIDES if blocks(p)], ids=lambda page: page.stem)
def test_code_of_a_guide_runs(page, here, monkeypatch):
    guide = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", guide)  # as if typed into a session: what is defined can be pickled
    space = vars(guide)
    for file, code in blocks(page):
        if file:
            (here / file).write_text(code, encoding="utf-8")
        execute(code, page, space)


def test_code_of_contributing_runs(here, monkeypatch):
    """Its experiment runs with a stand-in for the paper that it adds, its entry is read, its example passes the suite."""
    import torch
    from torch import nn

    from neurarium import lab
    from neurarium.catalog import load_files
    from neurarium.data import TensorData
    from neurarium.learn import Backprop
    from neurarium.testing import Example, check_method

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    entry = re.search(r"```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert entry
    (here / "learn.toml").write_text(entry[1], encoding="utf-8")
    assert load_files([here / "learn.toml"]).get("tiny-rule").claims[0].holds == "<= 0.5"

    method = types.ModuleType("neurarium.learn.tiny_rule")
    method.TinyRule = Backprop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "neurarium.learn.tiny_rule", method)
    experiment, example = (code for _, code in blocks(ROOT / "CONTRIBUTING.md"))
    net = "\n\ndef make_model():\n    from torch import nn\n\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (here / "tiny_rule_experiment.py").write_text(experiment + net, encoding="utf-8")
    loaded = load_files([here / "learn.toml"]).get("tiny-rule")
    import dataclasses

    paper = dataclasses.replace(
        loaded, use="neurarium.learn.fit:Backprop", experiment="tiny_rule_experiment", package="tiny_rule_experiment", status="works"
    )
    record = lab.run(paper, scale="smoke", engine="inline", out=here / "runs", progress=False)
    assert record.arms == ("backprop", "tiny")
    lab.draw(record, paper, here / "figure.png")

    def small_net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def small_loader(seed: int):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)

    space = {"Example": Example, "TinyRule": Backprop, "small_net": small_net, "small_loader": small_loader}
    execute(example, ROOT / "CONTRIBUTING.md", space)
    assert check_method(space["tiny_rule"]())
