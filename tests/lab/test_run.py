"""Runs: the same record whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neurarium.catalog import Comparison
from neurarium.errors import BadInput, MissingExtra, NeurariumError, RecordError
from neurarium.lab import Record, compare, run, run_many
from neurarium.lab.execute import Event
from neurarium.lab.progress import Progress
from neurarium.lab.record import ArmRun, SeedRun

QUIET = {"progress": False}


@pytest.fixture
def go(toy, tmp_path):
    """Run the toy; inline unless told otherwise."""

    def call(paper=None, **options):
        return run(paper or toy, **{"engine": "inline", "out": tmp_path / "runs", **QUIET, **options})

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "toy" / "laptop"


def executed(code: Path) -> list[str]:
    """The (seed, arm) that were really begun, in order."""
    log = code / "log.txt"
    return [" ".join(line.split()[:2]) for line in log.read_text().splitlines()] if log.exists() else []


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def script(code: Path, paper, **options) -> list[str]:
    """The command of another process that runs the paper."""
    source = f"""
import sys
from neurarium.catalog import Claim, Paper
from neurarium.lab import run
record = run({paper!r}, **{options!r})
print(len(record.runs), flush=True)
"""
    return [sys.executable, "-c", source.replace("mappingproxy", "")]


def environment(code: Path, **more) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), *filter(None, sys.path)]), **more}


class TestRecord:
    def test_a_run_leaves_a_record_and_a_figure(self, go, folder, code):
        record = go()
        assert [seed.seed for seed in record.seeds] == [0, 1, 2]
        assert record.arms == ("base", "method", "third")
        assert record.scale == "laptop"
        assert record.claims[0].holds == "<= 0.8"
        assert Record.load(folder / "record.json").to_bytes() == record.to_bytes()
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert not list(folder.rglob("*.tmp"))
        assert len(executed(code)) == 9
        text = (folder / "record.json").read_text()
        assert os.uname().nodename not in text
        assert str(Path.home()) not in text

    def test_smoke_takes_one_seed_and_a_folder_of_its_own(self, go, tmp_path):
        record = go(scale="smoke")
        assert len(record.seeds) == 1
        assert record.run(0, "base").curves["walk"][0] == [0.0, 1.0, 2.0, 3.0]
        assert (tmp_path / "runs/toy/smoke/record.json").exists()

    def test_seeds_can_be_chosen(self, go):
        assert [s.seed for s in go(seeds=[7, 3]).seeds] == [7, 3]
        assert [s.seed for s in go(seeds=2).seeds] == [0, 1]

    def test_engines_and_jobs_make_the_same_record(self, go, tmp_path):
        one = go()
        alone = go(engine="local", jobs=1, out=tmp_path / "alone")
        pair = go(engine="local", jobs=2, out=tmp_path / "pair")
        assert one.same_measurements(alone)
        assert one.same_measurements(pair)
        assert pair.machine["threads"] == 1

    def test_what_is_finished_is_not_run_again(self, go, code, folder):
        first = go()
        assert go().to_bytes() == first.to_bytes()
        assert len(executed(code)) == 9

    def test_more_seeds_use_those_that_are_there(self, go, code):
        go(seeds=2)
        assert len(go(seeds=3).runs) == 9
        assert executed(code)[6:] == ["2 base", "2 method", "2 third"]

    def test_a_resumed_run_does_what_is_left(self, go, code, folder):
        first = go()
        for name in ("1.method.json", "1.json", "2.json"):
            (folder / "parts" / name).unlink()
        (folder / "record.json").unlink()
        assert go().same_measurements(first)
        assert executed(code)[9:] == ["1 method"]

    def test_parts_of_other_code_are_not_used(self, go, toy, code, folder):
        go()
        source = code / f"{toy.experiment}.py"
        source.write_text(source.read_text().replace("many=[1.0, 2.0, 3.0]", "many=[1.0, 2.0, 4.0]"))
        del sys.modules[toy.experiment]
        again = go()
        assert len(executed(code)) == 18
        assert again.run(0, "base").metrics["many"] == [1.0, 2.0, 4.0]

    def test_comments_are_not_other_code(self, go, toy, code):
        go()
        source = code / f"{toy.experiment}.py"
        source.write_text("# a comment\n" + source.read_text())
        go()
        assert len(executed(code)) == 9

    def test_fresh_starts_anew(self, go, code):
        go()
        go(fresh=True)
        assert len(executed(code)) == 18

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": 1}', b"\xff", b'{"settings": {}, "part": {}}'])
    def test_a_damaged_part_is_made_again(self, content, go, code, folder):
        first = go()
        (folder / "parts" / "0.base.json").write_bytes(content)
        (folder / "record.json").write_bytes(content)
        assert go().same_measurements(first)
        assert executed(code)[9:] == ["0 base"]


class TestCrash:
    def test_a_crash_is_recorded_and_tried_again_next_time(self, go, code, monkeypatch):
        monkeypatch.setenv("TOY_CRASH", "method")
        record = go()
        assert [run.status for run in record.runs] == ["done", "crashed", "done"] * 3
        assert record.run(0, "method").error.endswith("ValueError: the toy fell from shelf.txt")
        monkeypatch.delenv("TOY_CRASH")
        assert not go().crashes
        assert executed(code)[9:] == ["0 method", "1 method", "2 method"]

    def test_a_process_that_dies_costs_its_arm_alone(self, go, toy, code):
        source = code / f"{toy.experiment}.py"
        source.write_text(
            source.read_text().replace("time.sleep(pause)", "arm.name == 'method' and trial.seed == 1 and os.kill(os.getpid(), 9)")
        )
        record = go(engine="local", jobs=2)
        assert [(seed, arm) for seed, arm, _ in record.crashes] == [(1, "method")]
        assert "killed by SIGKILL" in record.run(1, "method").error
        assert record.run(1, "third").status == "done"

    def test_a_process_that_dies_outside_arms_fails_its_seed(self, go, toy, code):
        source = code / f"{toy.experiment}.py"
        source.write_text(source.read_text().replace("    count =", "    if trial.seed == 1: os._exit(3)\n    count ="))
        record = go(engine="local", jobs=1)
        assert record.crashes == [(1, None, "the process that ran this ended with code 3")]
        assert len(record.runs) == 6

    def test_nothing_measured_is_an_error_that_keeps_the_old_record(self, go, toy, code, folder):
        go()
        before = (folder / "record.json").read_bytes()
        source = code / f"{toy.experiment}.py"
        source.write_text(source.read_text().replace("    count =", "    raise RuntimeError('no data')\n    count ="))
        del sys.modules[toy.experiment]
        with pytest.raises(RecordError, match="nothing was measured: RuntimeError: no data"):
            go()
        assert (folder / "record.json").read_bytes() == before

    def test_one_paper_that_fails_does_not_lose_the_others(self, toy, make_paper, tmp_path, code):
        (code / "broken_toy.py").write_text("def run(trial):\n    raise RuntimeError('broken')\n")
        papers = [make_paper("broken_toy", id="broken"), toy]
        results = run_many(papers, engine="inline", out=tmp_path / "runs", **QUIET)
        assert isinstance(results["broken"], NeurariumError)
        assert isinstance(results["toy"], Record)

    def test_a_figure_that_fails_is_replaced_by_a_plain_one(self, go, toy, code, folder, capsys):
        source = code / f"{toy.experiment}.py"
        source.write_text(source.read_text().replace("axis = fig.subplots()", "raise KeyError('no such arm')"))
        go(progress=True)
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert "its figure failed (KeyError" in capsys.readouterr().err


class TestKill:
    def test_ten_kills_and_the_same_record(self, go, toy, code, tmp_path):
        undisturbed = go(out=tmp_path / "undisturbed")
        chance, kills, outs = random.Random(0), 0, [tmp_path / "killed0"]
        log = code / "log.txt"
        while kills < 10:
            command = script(code, toy, out=str(outs[-1]), jobs=2, progress=False)
            before = len(executed(code))
            process = subprocess.Popen(command, env=environment(code, TOY_PAUSE="0.15"), stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 30
            while kills % 4 and process.poll() is None and len(executed(code)) == before:  # three of four kills come while arms run
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.4))
            if process.poll() is None:
                process.kill()
                kills += 1
            else:  # it had finished: there is nothing left to kill, go on with another run
                outs.append(tmp_path / f"killed{len(outs)}")
            process.wait()
            self.assert_nothing_runs(code)
            for part in outs[-1].rglob("*.json"):
                json.loads(part.read_text())
        assert log.exists()
        for out in outs:
            record = go(out=out, engine="local", jobs=2)
            assert record.same_measurements(undisturbed)
            assert not list(out.rglob("*.tmp"))
            parts = sorted(p.name for p in (out / "toy/laptop/parts").iterdir())
            assert parts == sorted([f"{s}{arm}.json" for s in range(3) for arm in ("", ".base", ".method", ".third")])

    @staticmethod
    def assert_nothing_runs(code: Path) -> None:
        log = code / "log.txt"
        workers = {int(line.split()[2]) for line in log.read_text().splitlines()} if log.exists() else set()
        deadline = time.monotonic() + 5
        while alive := [pid for pid in workers - {os.getpid()} if _runs(pid)]:
            assert time.monotonic() < deadline, f"{alive} outlived their parent"
            time.sleep(0.01)

    def test_ctrl_c_leaves_a_run_that_can_be_resumed(self, go, toy, code, tmp_path):
        out = tmp_path / "runs"
        process = subprocess.Popen(
            script(code, toy, out=str(out), jobs=1, progress=False),
            env=environment(code, TOY_PAUSE="0.3"),
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background passes on that it is ignored
        )
        deadline = time.monotonic() + 20
        while not list(out.rglob("0.base.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode != 0
        assert errors.count(b"KeyboardInterrupt") == 1, "the workers say nothing"
        self.assert_nothing_runs(code)
        before = executed(code)
        go()
        assert "0 base" not in executed(code)[len(before) :]


class TestTwoAtOnce:
    def test_the_second_waits_and_finds_the_work_done(self, toy, code, tmp_path):
        out = tmp_path / "runs"
        options = {"out": str(out), "jobs": 1}
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                script(code, toy, **options),
                env=environment(code, TOY_PAUSE="0.1", TOY_CRASH="third"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
        answers = [process.communicate(timeout=60) for process in processes]
        assert [p.returncode for p in processes] == [0, 0]
        assert [answer[0] for answer in answers] == ["9\n", "9\n"]
        assert sorted(executed(code)) == sorted(f"{s} {arm}" for s in range(3) for arm in ("base", "method", "third"))
        notes = [" ".join(answer[1].split()) for answer in answers]
        waited = next(i for i, note in enumerate(notes) if "waiting" in note)
        assert f"is being run by process {processes[1 - waited].pid}" in notes[waited]
        assert Record.load(out / "toy/laptop/record.json").run(0, "base").status == "done"


class TestDisk:
    @pytest.mark.parametrize("call", ["open", "fsync", "replace"])
    @pytest.mark.parametrize("number", [0, 3, 8])
    def test_a_full_disk_is_told_and_keeps_what_was_there(self, call, number, go, folder, code, monkeypatch):
        go(seeds=1)
        before = files(folder)
        real, count = getattr(os, call), 0

        def full(*args, **kwargs):
            nonlocal count
            if call != "open" or str(args[0]).endswith(".tmp"):
                count += 1
                if count > number * (2 if call == "fsync" else 1):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(RecordError, match=r"\.json: cannot be written: No space left on device; what was there is kept"):
                go()
        after = files(folder)
        assert after["record.json"] == before["record.json"]
        assert all(after[name] == content for name, content in before.items() if name != "lock")
        assert not list(folder.rglob("*.tmp"))
        assert len(go().runs) == 9
        assert len(executed(code)) <= 3 + 6 + 1, "what had been written down was not run again"

    def test_a_full_disk_with_processes(self, go, folder, monkeypatch):
        real = os.replace

        def full(source, target):
            if str(target).endswith("1.base.json"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(RecordError, match="No space left"):
            go(engine="local", jobs=2)
        assert not (folder / "record.json").exists()

    def test_a_full_device(self, make_record):
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        with pytest.raises(RecordError, match="cannot be written"):
            make_record({"a": {"x": [1.0]}}).save("/dev/full/record.json")

    def test_targets_that_cannot_be_written(self, go, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(RecordError, match="cannot be made a folder: File exists"):
            go(out=tmp_path / "file")
        with pytest.raises(RecordError, match="cannot be made a folder: Not a directory"):
            go(out=tmp_path / "file" / "below")
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/toy").write_text("mine too")
        with pytest.raises(RecordError, match="runs/toy"):
            go()
        assert (tmp_path / "file").read_text() == "mine"
        (tmp_path / "other/toy/laptop/record.json").mkdir(parents=True)
        with pytest.raises(RecordError, match=r"record\.json: cannot be written: Is a directory"):
            go(out=tmp_path / "other")
        assert not list((tmp_path / "other").rglob("*.tmp"))

    @pytest.mark.parametrize("link", ["toy", "toy/laptop", "toy/laptop/parts"])
    def test_a_run_folder_that_is_a_link_is_refused(self, link, go, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        path = tmp_path / "runs" / link
        path.parent.mkdir(parents=True)
        path.symlink_to(elsewhere)
        with pytest.raises(RecordError, match="is a symbolic link"):
            go()
        assert not list(elsewhere.iterdir())

    def test_links_in_the_place_of_files_lead_nowhere(self, go, folder, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        (folder / "parts").mkdir(parents=True)
        for name in ("record.json", "figure.png", "parts/0.base.json"):
            (folder / name).symlink_to(victim)
        go()
        assert victim.read_text() == "precious"
        assert not (folder / "record.json").is_symlink()
        (folder / "lock").unlink()
        (folder / "lock").symlink_to(victim)
        with pytest.raises(RecordError, match="lock: cannot be opened"):
            go()
        assert victim.read_text() == "precious"


class TestArguments:
    @pytest.mark.parametrize(
        "id", ["", ".", "..", "../up", "a/b", "a\\b", "/etc", "-rf", "A", "a b", "a\n", "a\0b", "ä", "x" * 65, "~root", "$HOME"]
    )
    def test_ids_cannot_leave_the_folder(self, id, go, toy, make_paper, tmp_path):
        with pytest.raises(BadInput, match="must be 1 to 64 lower-case"):
            go(make_paper(toy.experiment, id=id))
        assert sorted(p.name for p in tmp_path.iterdir()) in (["code"], ["code", "runs"])
        assert not any((tmp_path / "runs").rglob("*"))

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"scale": "../laptop"}, "scales are smoke, laptop"),
            ({"device": "cpu; reboot"}, "device 'cpu; reboot' must be"),
            ({"seeds": 0}, "seeds must be"),
            ({"seeds": [1, 1]}, "seeds must be"),
            ({"seeds": [-1]}, "seeds must be"),
            ({"seeds": ["0/../.."]}, "seeds must be"),
            ({"jobs": 0}, "jobs must be at least 1"),
            ({"engine": "slurm"}, "engines are inline, local, ray"),
        ],
    )
    def test_wrong_arguments_are_refused(self, options, why, go):
        with pytest.raises(BadInput, match=why):
            go(**options)

    def test_a_planned_paper_cannot_be_run(self, go, make_paper):
        with pytest.raises(BadInput, match="planned"):
            go(make_paper(experiment=None, status="planned"))

    def test_an_unknown_id_is_refused_by_the_catalog(self):
        with pytest.raises(BadInput, match="no paper has the id"):
            run("no-such-paper-at-all", **QUIET)

    def test_the_same_paper_twice_is_refused(self, toy, tmp_path):
        with pytest.raises(BadInput, match="named twice"):
            run_many([toy, toy], out=tmp_path, **QUIET)


def test_papers_with_seconds_run_alone_after_the_others(toy, make_paper, code, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_PAUSE", "0.02")
    timed = make_paper(toy.experiment, id="timed", timed=True)
    results = run_many([timed, toy], out=tmp_path / "runs", jobs=2, **QUIET)
    assert results["timed"].same_measurements(results["timed"])
    seeds = [line.split()[0] for line in executed(code)[9:]]
    assert seeds == ["0"] * 3 + ["1"] * 3 + ["2"] * 3


def test_an_engine_of_ones_own(go):
    class Backwards:
        def map(self, units, emit):
            from neurarium.lab.execute import execute

            for unit in reversed(units):
                execute(unit, emit)

    assert go(engine=Backwards()).same_measurements(go())


def test_an_engine_that_forgets_a_seed_is_found_out(go):
    class Lazy:
        def map(self, units, emit):
            pass

    with pytest.raises(RecordError, match="before every seed had ended"):
        go(engine=Lazy())


def test_a_comparison_is_run_like_a_paper(toy, tmp_path):
    comparison = Comparison("speed", "Which is fastest?", ("a", "b"), toy.experiment, "nn", plot=("draw", "value"), evidence="generated")
    record = compare(comparison, engine="inline", out=tmp_path / "runs", **QUIET)
    assert (record.kind, record.id, record.claims) == ("comparison", "speed", ())
    assert (tmp_path / "runs/compare-speed/laptop/figure.png").exists()


def test_the_time_left_is_estimated_from_finished_arms():
    progress = Progress(show=False)
    progress.add("toy", [0, 1], [ArmRun(0, "a", "done", {"seconds": 4.0})], [])
    progress.event(Event("toy", 0, arm="b", arms=("a", "b")))
    line = progress._lines["toy"]
    assert line.left(line.running[0][1] + 1.0) == pytest.approx(4 + 4 + 4 - 1)  # b, then a and b at seed 1
    progress.event(Event("toy", 0, run=ArmRun(0, "b", "done", {"seconds": 2.0})))
    assert line.left(0.0) == pytest.approx(6)
    progress.event(Event("toy", 0, end=SeedRun(0, ("a", "b"), 6.0)))
    from rich.console import Console

    console = Console(width=120, force_terminal=True)
    with console.capture() as shown:
        console.print(progress._table())
    assert "2/4" in shown.get()
    assert "about 6 s left" in shown.get()


def test_nothing_is_drawn_where_nobody_looks(go, capfd):
    go(progress=True)
    out, err = capfd.readouterr()
    assert "toy" not in out.replace("no event", "") + err


@pytest.mark.ray
def test_ray_makes_the_same_record(go, tmp_path):
    pytest.importorskip("ray")
    assert go(engine="ray", out=tmp_path / "ray").same_measurements(go())


def test_ray_is_an_extra(go, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"neurarium\[ray\]"):
        go(engine="ray")


def _runs(pid: int) -> bool:
    """Whether a process of this number lives (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
