"""data, doctor and demo: what they answer, and with which exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from neurarium import catalog, cli, data, doctor


@pytest.fixture
def neurarium(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neurarium", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def test_data_list(neurarium):
    code, out, _ = neurarium("data", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == set(data.SETS)
    assert rows["digits"]["here"] is True  # a dependency embeds it
    assert {"name", "kind", "here", "licence", "note", "home"} == set(rows["mnist"])
    assert "digits" in neurarium("data", "list")[1]


def test_data_where_and_get_of_an_embedded_set(neurarium):
    assert neurarium("data", "where", "digits") == (0, "embedded in scikit-learn\n", "")
    assert neurarium("data", "get", "digits") == (0, "digits: embedded in scikit-learn\n", "")


@pytest.mark.parametrize("name", ["mnits", "../mnist", "/etc/passwd", "--", "http://example.org/x", "mnist\n"])
def test_an_unknown_data_set_is_refused(neurarium, name: str):
    code, out, err = neurarium("data", "where", "--", name)
    assert (code, out) == (2, "")
    assert "no data set" in err
    assert err.count("\n") == 1


def test_a_mirror_that_is_no_folder_is_named(neurarium, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NEURARIUM_DATA", str(tmp_path / "absent"))
    code, out, _ = neurarium("doctor")
    assert code == 1
    assert "BAD   data mirror" in out
    assert "1 broken" in out


def test_doctor_finds_a_sound_installation(neurarium, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NEURARIUM_DATA", raising=False)
    code, out, _ = neurarium("doctor")
    assert code == 0, out
    for name in ("neurarium", "python", "torch", "threads", "catalog", "data sets", "C++ compiler"):
        assert f"  {name} " in out


def test_doctor_advises_where_something_needed_is_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "")
    monkeypatch.setitem(doctor.PACKAGES, "no-such-extra", "ray")
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["no-such-package"].level == "broken"
    assert findings["no-such-package"].advice == "pip install no-such-package"
    assert findings["no-such-extra"].level == "note"
    assert findings["no-such-extra"].advice == "pip install 'neurarium[ray]'"


def test_doctor_survives_a_check_that_fails(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(catalog, "load", fail)
    broken = [finding for finding in doctor.examine() if finding.level == "broken"]
    assert [(finding.name, finding.says) for finding in broken] == [("catalog", "ImportError: libtorch.so: cannot open shared object file")]


def test_demo_runs_the_example(neurarium, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr("runpy.run_path", lambda path: {"main": lambda *, smoke: asked.append((Path(path).name, smoke))})
    assert neurarium("demo")[0] == neurarium("demo", "--smoke")[0] == 0
    assert asked == [("compose.py", False), ("compose.py", True)]
