"""The commands that read the catalog, through ``main()`` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from neurarium import __version__, catalog, cli


@pytest.fixture
def neurarium(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the command line in this process; returns exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neurarium", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_list_as_json_has_stable_keys(neurarium):
    code, out, err = neurarium("list", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert len(rows) == len(catalog.load())
    assert all(list(row) == ["id", "title", "year", "room", "role", "status"] for row in rows)


def test_list_filters(neurarium):
    _, out, _ = neurarium("list", "--room", "spiking", "--role", "policy", "--json")
    assert {(row["room"], row["role"]) for row in json.loads(out)} == {("spiking", "policy")}
    code, out, _ = neurarium("list", "--room", "spiking")
    assert code == 0
    assert "sltt" in out
    assert "\x1b" not in out


def test_list_of_nothing_is_no_error(neurarium):
    code, out, _ = neurarium("list", "--room", "combinatorial", "--role", "optimizer")
    assert code == 0
    assert out.strip().startswith("0 papers")


def test_search_finds_and_ranks(neurarium):
    code, out, _ = neurarium("search", "spiking", "memory", "backpropagation")
    assert code == 0
    assert out.startswith("sltt ")
    _, out, _ = neurarium("search", "poincaré", "--json")
    assert json.loads(out)[0]["id"] == "poincare-resnet"
    assert neurarium("search", "qqqqzzzz")[:2] == (0, "nothing found\n")


def test_show(neurarium):
    code, out, _ = neurarium("show", "sltt")
    assert code == 0
    assert "Towards Memory- and Time-Efficient Backpropagation" in out
    assert "https://arxiv.org/abs/2302.14311" in out
    _, out, _ = neurarium("show", "sltt", "--json")
    row = json.loads(out)
    assert list(row)[:6] == ["id", "title", "year", "room", "role", "status"]
    assert {"arxiv", "summary", "use", "experiment", "evidence", "claims"} <= set(row)
    for claim in row["claims"]:
        assert {"says", "reported", "measured", "interval", "verdict", "null_fails"} <= set(claim)


def test_cite_prints_bibtex(neurarium):
    code, out, _ = neurarium("cite", "sltt", "phnn")
    assert code == 0
    assert out.count("@misc{") == 2
    assert "2302.14311" in out


def test_version_and_help(neurarium):
    assert neurarium("--version") == (0, f"neurarium {__version__}\n", "")
    code, out, _ = neurarium("--help")
    assert code == 0
    for command in ("list", "search", "show", "run", "verify", "report", "compare", "cite", "data", "demo", "doctor"):
        assert command in out
        assert neurarium(command, "--help")[0] == 0


@pytest.mark.parametrize("command", ["show", "cite", "run", "verify", "report"])
def test_an_unknown_id_suggests_near_ones(neurarium, command: str):
    code, out, err = neurarium(command, "slttt")
    assert (code, out) == (2, "")
    assert err == "neurarium: no paper has the id 'slttt'; did you mean sltt?\n"


def test_a_planned_paper_does_not_run(neurarium):
    planned = next(p.id for p in catalog.load() if p.status == "planned")
    code, _, err = neurarium("run", planned)
    assert code == 2
    assert f"{planned}: planned, there is no code yet" in err


@pytest.mark.parametrize("arguments", [["run"], ["run", "sltt", "--all"], ["run", "--all", "--room", "spiking"], ["verify", "x", "--all"]])
def test_papers_are_chosen_in_one_way(neurarium, arguments: list[str]):
    code, _, err = neurarium(*arguments)
    assert code == 2
    assert "one of the three" in err


HOSTILE = [
    (["show", "../../etc/passwd"], "no paper has the id '../../etc/passwd'"),
    (["report", "../../../etc/passwd"], "no paper has the id '../../../etc/passwd'"),
    (["run", "sltt/../../x"], "no paper has the id 'sltt/../../x'"),
    (["show", "/etc/passwd"], "no paper has the id '/etc/passwd'"),
    (["show", "--", "--help"], "no paper has the id '--help'"),
    (["run", "--", "--out=/tmp"], "no paper has the id '--out=/tmp'"),
    (["show", "sltt\n"], "no paper has the id 'sltt\\n'"),
    (["show", "ѕltt"], "no paper has the id 'ѕltt'"),  # a Cyrillic letter
    (["show", "x\x1b]0;owned\x07"], "no paper has the id 'x\\x1b]0;owned\\x07'"),
    (["show", "a\u202eb"], "no paper has the id 'a\\u202eb'"),
    (["show", "x" * 100_000], "no paper has the id 'xxxx"),
    (["show", ""], "no paper has the id ''"),
    (["list", "--room", "../spiking"], "no paper has the room '../spiking'"),
    (["list", "--role", "learner; rm -rf /"], "no paper has the role 'learner; rm -rf /'"),
    (["run", "--room", "__import__('os')"], "no paper has the room"),
    (["compare", "../x"], "no comparison has the id '../x'"),
    (["run", "sltt", "--scale", "huge"], "huge"),
    (["run", "sltt", "--engine", "os.system"], "os.system"),
    (["run", "sltt", "--seeds", "0"], "seeds"),
    (["run", "sltt", "--seeds", "1e99"], "seeds"),
    (["run", "sltt", "--jobs", "-1"], "jobs"),
    (["run", "sltt", "--publish", "--scale", "smoke"], "publish"),
    (["list", "--config", "x"], "--config"),
    (["shw", "sltt"], "shw"),
]


@pytest.mark.parametrize(("arguments", "says"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_arguments_are_refused_with_a_reason(neurarium, arguments: list[str], says: str):
    code, out, err = neurarium(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert len(err) < 1000
    assert all(c.isprintable() or c == "\n" for c in err)


def test_a_broken_plugin_is_told_of_on_stderr_only(neurarium, monkeypatch: pytest.MonkeyPatch):
    base = catalog.load()
    broken = catalog.Catalog(base.papers, base.comparisons, ("plug-in catalog 'x' is left out: why",))
    monkeypatch.setattr(catalog, "load", lambda: broken)
    code, out, err = neurarium("list", "--json")
    assert code == 0
    assert len(json.loads(out)) == len(base)
    assert err == "neurarium: plug-in catalog 'x' is left out: why\n"


def test_a_system_error_is_one_line_unless_a_traceback_is_asked_for(neurarium, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(catalog, "load", fail)
    code, _, err = neurarium("list")
    assert code == 2
    assert err.startswith("neurarium: ")
    assert "Permission denied" in err
    assert err.count("\n") == 1
    monkeypatch.setenv("NEURARIUM_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        neurarium("list")


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m neurarium list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
