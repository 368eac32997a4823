"""run, verify, report, show and compare on papers of a plug-in package, in processes of their own, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neurarium import catalog, cli

CATALOG = """
[[paper]]
id = "acme-mean"
title = "Means of Noise"
year = 2024
role = "study"
status = "works"
use = "acme.experiments.mean:run"
experiment = "acme.experiments.mean"
example = "acme.experiments.mean:run"
summary = "Measures that two is more than one."
evidence = "generated"
evidence_note = "Gaussian noise stands in for everything"
null = { big = "small" }
[[paper.claim]]
says = "two is more than one"
reported = "twice"
measure = "big.value / small.value"
holds = ">= 1.9"
[[paper.claim]]
says = "two is more than five"
reported = "never"
measure = "big.value / small.value"
holds = "> 5"
direction = "> 1"

[[paper]]
id = "acme-crash"
title = "A Crash"
role = "study"
status = "works"
use = "acme.experiments.crash:run"
experiment = "acme.experiments.crash"
example = "acme.experiments.crash:run"
summary = "Crashes in one arm."
evidence = "real"
[[paper.claim]]
says = "runs"
reported = "yes"
measure = "fine.value"
holds = "> 0"

[[comparison]]
id = "acme-both"
question = "Which of the two is more?"
members = ["acme-mean", "acme-crash"]
experiment = "acme.experiments.mean"
"""

MEAN = """
import os, time
import numpy as np

def run(trial):
    for arm in trial.arms("small", "big"):
        if "ACME_SLEEP" in os.environ and arm.name == "big":
            time.sleep(60)
        noise = 0.01 * np.random.default_rng(trial.seed).normal()
        arm.log(value=(2 if arm.name == "big" else 1) + noise)
"""

CRASH = """
def run(trial):
    for arm in trial.arms("fine", "broken"):
        if arm.name == "broken":
            raise RuntimeError("this arm is broken")
        arm.log(value=1.0)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package `acme` whose entry point brings the catalog above."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in {
        "acme/__init__.py": "",
        "acme/papers/theory.toml": CATALOG,
        "acme/experiments/__init__.py": "",
        "acme/experiments/mean.py": MEAN,
        "acme/experiments/crash.py": CRASH,
        "acme-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n",
        "acme-1.0.dist-info/entry_points.txt": "[neurarium.catalog]\nacme = acme.papers\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def environment(site: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **more}


def call(site: Path, where: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neurarium", *arguments]
    return subprocess.run(
        command,
        cwd=where,
        env=environment(site, NEURARIUM_RECORDS=str(where / "records"), **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def inside(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call a command that runs nothing in this process, with the plug-in installed; returns what :func:`call` would."""

    def invoke(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.chdir(where)
        monkeypatch.setenv("NEURARIUM_RECORDS", str(where / "records"))
        monkeypatch.setattr(sys, "argv", ["neurarium", *arguments])
        catalog.load.cache_clear()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return subprocess.CompletedProcess(arguments, int(stop.value.code or 0), *capsys.readouterr())

    yield invoke
    catalog.load.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "acme"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def published(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which acme-mean was run and published."""
    where = tmp_path_factory.mktemp("where")
    (where / "records").mkdir()
    done = call(site, where, "run", "acme-mean", "--publish", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    (where / "stdout").write_text(done.stdout)
    return where


def test_run_ends_with_the_claims_and_the_files(published: Path):
    out = (published / "stdout").read_text()
    assert "Means of Noise" in out
    assert "two is more than one" in out
    assert "held" in out
    assert "weaker" in out
    lines = dict(line.split(None, 1) for line in out.strip().splitlines()[-3:])
    assert set(lines) == {"record", "figure", "published"}
    for path in lines.values():
        assert (published / path).is_file()


def test_a_second_run_has_nothing_to_do_and_fresh_does_it_again(site: Path, published: Path):
    record = published / "runs" / "acme-mean" / "laptop" / "record.json"
    before = record.stat().st_mtime_ns
    assert call(site, published, "run", "acme-mean", "--jobs", "1").returncode == 0
    assert record.stat().st_mtime_ns == before
    assert call(site, published, "run", "acme-mean", "--jobs", "1", "--fresh").returncode == 0
    assert record.stat().st_mtime_ns > before


def test_run_as_json(site: Path, tmp_path: Path):
    done = call(site, tmp_path, "run", "acme-mean", "--json", "--out", "elsewhere", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    (paper,) = json.loads(done.stdout)["papers"]
    assert {"id", "scale", "seconds", "seeds", "crashes", "claims", "record", "figure"} <= set(paper)
    assert paper["record"].startswith("elsewhere")
    first, second = paper["claims"]
    assert list(first) == ["says", "reported", "measured", "interval", "verdict", "null_fails"]
    assert (first["verdict"], second["verdict"], first["null_fails"]) == ("held", "weaker", True)
    assert first["interval"][0] <= first["measured"] <= first["interval"][1]


def test_a_crashed_arm_fails_the_command_and_a_smoke_run_is_not_judged(site: Path, tmp_path: Path):
    done = call(site, tmp_path, "run", "acme-crash", "acme-mean", "--scale", "smoke", "--json", "--jobs", "1")
    assert done.returncode == 1
    crash, mean = json.loads(done.stdout)["papers"]
    assert (crash["crashes"], mean["crashes"]) == (1, 0)
    assert [claim["verdict"] for claim in mean["claims"]] == ["not judged"] * 2


def test_verify_has_stable_keys_and_its_exit_code_says_whether_all_is_valid(inside, published: Path):
    done = inside(published, "verify", "acme-mean", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["totals"] == {"held": 1, "weaker": 1, "failed": 0, "invalid": 0, "stale": 0}
    (paper,) = found["papers"]
    assert {"id", "valid", "stale", "seconds", "seeds", "claims"} <= set(paper)
    assert (paper["valid"], paper["stale"], paper["seeds"]) == (True, False, 3)
    missing = inside(published, "verify", "acme-mean", "acme-crash")
    assert missing.returncode == 1
    assert "acme-crash" in missing.stdout
    assert "invalid" in missing.stdout


def test_report_and_show_read_the_published_record(inside, published: Path):
    text = inside(published, "report", "acme-mean")
    assert "Gaussian noise stands in for everything" in text.stdout
    assert "records" in text.stdout.strip().splitlines()[-1]
    markdown = inside(published, "report", "acme-mean", "--markdown").stdout
    assert "| two is more than one |" in markdown
    page = inside(published, "report", "acme-mean", "--html", "page.html")
    assert page.stdout == "page.html\n"
    assert "<table>" in (published / "page.html").read_text()
    shown = json.loads(inside(published, "show", "acme-mean", "--json").stdout)
    assert shown["package"] == "acme"
    assert [claim["verdict"] for claim in shown["claims"]] == ["held", "weaker"]
    assert "held" in inside(published, "show", "acme-mean").stdout


def test_report_refuses_a_record_of_another_paper_and_a_file_that_is_none(inside, published: Path):
    record = str(published / "runs" / "acme-mean" / "laptop" / "record.json")
    for arguments, says in {
        ("acme-crash", "--record", record): "is a record of 'acme-mean', not of 'acme-crash'",
        ("acme-mean", "--record", "absent.json"): "absent.json",
        ("acme-mean", "--record", "."): "not a regular file",
        ("acme-mean", "--html", "no/such/folder.html"): "cannot be written",
        ("acme-crash",): "acme-crash has no record yet; `neurarium run acme-crash` makes one",
    }.items():
        done = inside(published, "report", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


def test_compare_lists_and_runs(site: Path, inside, tmp_path: Path):
    assert "acme-both: Which of the two is more?" in inside(tmp_path, "compare").stdout
    done = call(site, tmp_path, "compare", "acme-both", "--scale", "smoke", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "Which of the two is more?" in done.stdout
    assert "compare-acme-both" in done.stdout
    assert "laptop records only" in call(site, tmp_path, "compare", "acme-both", "--scale", "smoke", "--publish").stderr


def test_compare_publishes_a_record_that_verify_and_report_read(site: Path, inside, tmp_path: Path):
    (tmp_path / "records").mkdir()
    missing = inside(tmp_path, "report", "acme-both")
    assert missing.returncode == 2 and "neurarium compare acme-both" in missing.stderr
    done = call(site, tmp_path, "compare", "acme-both", "--publish", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "records" / "theory" / "compare-acme-both.json").is_file()
    assert "Which of the two is more?" in inside(tmp_path, "report", "acme-both").stdout
    found = json.loads(inside(tmp_path, "verify", "--room", "theory", "--json").stdout)
    assert [(one["id"], one["valid"], one["stale"]) for one in found["comparisons"] if one["id"] == "acme-both"] == [
        ("acme-both", True, False)
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_unwritable_folder_is_a_clear_error(site: Path, tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    done = call(site, tmp_path, "run", "acme-mean", "--scale", "smoke", "--out", "closed/runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert "closed/runs" in done.stderr


def test_an_output_folder_that_is_a_file_or_leads_elsewhere_is_refused(inside, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "runs").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "runs" / "acme-mean").symlink_to(tmp_path / "target")
    for out, says in {"file": "file", "runs": "is a symbolic link"}.items():
        done = inside(tmp_path, "run", "acme-mean", "--scale", "smoke", "--out", out)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert list((tmp_path / "target").iterdir()) == []


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(site: Path, tmp_path: Path):
    command = [sys.executable, "-m", "neurarium", "run", "acme-mean", "--jobs", "1", "--fresh", "--out", "my runs"]
    env = environment(site, ACME_SLEEP="1")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite that runs in the background passes on that it is ignored
    )  # fmt: skip
    part = tmp_path / "my runs" / "acme-mean" / "laptop" / "parts" / "0.small.json"
    limit = time.monotonic() + 60
    while not part.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "go on with: neurarium run acme-mean --jobs 1 --out 'my runs'" in err
    written = part.stat().st_mtime_ns
    done = call(site, tmp_path, "run", "acme-mean", "--jobs", "1", "--out", "my runs")
    assert done.returncode == 0, done.stderr
    assert part.stat().st_mtime_ns == written
