"""Trials and arms: same random state, crash semantics, what may be logged, and that shared things leave no trace."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from neurarium.errors import BadInput
from neurarium.lab import Trial
from neurarium.lab.execute import Unit, execute
from neurarium.lab.measurement import Grid, as_curve, as_value


def test_every_arm_starts_from_the_seeds_own_random_state():
    def drawn(seed, finished=None):
        trial = Trial(seed, finished=finished)
        for arm in trial.arms("a", "b", "c"):
            arm.log(python=random.random(), numpy=np.random.rand())  # noqa: NPY002
            random.seed(len(arm.name) + 17)  # what an arm does to the generators is its own business
            np.random.rand(arm.name.count("a") * 5)  # noqa: NPY002
        return trial.runs

    runs = drawn(3)
    values = [[run.metrics[k] for k in ("python", "numpy")] for run in runs.values()]
    assert values[0] == values[1] == values[2]
    resumed = drawn(3, finished={"a": runs["a"]})
    assert resumed["c"].metrics["python"] == runs["c"].metrics["python"]
    assert drawn(4)["a"].metrics["python"] != runs["a"].metrics["python"]


def test_torch_is_seeded_with_the_rest():
    import torch

    trial = Trial(5)
    draws = []
    for arm in trial.arms("a", "b"):
        draws.append((torch.rand(3), torch.rand(2, generator=trial.generator())))
        arm.log(x=draws[-1][0])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert trial.device == torch.device("cpu")
    assert isinstance(trial.runs["a"].metrics["x"], list)


def test_shared_things_make_no_difference_to_who_asks_first():
    def measured(finished=None):
        trial, built = Trial(1, finished=finished), []

        def build():
            built.append(1)
            return [random.random()]

        for arm in trial.arms("a", "b"):
            before = random.random()
            thing = trial.shared("thing", build)
            arm.log(before=before, after=random.random(), thing=thing[0])
            thing[0] = 99.0  # an arm's copy is its own
            assert trial.shared("thing", build) is thing
        return trial.runs, len(built)

    runs, built = measured()
    assert built == 1
    assert runs["a"].metrics["thing"] == runs["b"].metrics["thing"] != 99.0
    assert runs["a"].metrics["after"] == runs["b"].metrics["after"]
    resumed, built = measured({"a": runs["a"]})
    assert built == 1
    assert {k: resumed["b"].metrics[k] for k in ("before", "after", "thing")} == {
        k: runs["b"].metrics[k] for k in ("before", "after", "thing")
    }
    assert measured(runs)[1] == 0  # nobody asks, nothing is built


def test_building_shared_things_counts_into_no_arm():
    trial = Trial()
    for arm in trial.arms("a", "b"):
        with arm.timed("fit_seconds"):
            trial.shared("slow", lambda: time.sleep(0.15))
            time.sleep(0.02)
    for run in trial.runs.values():
        assert 0.02 <= run.metrics["fit_seconds"] <= run.metrics["seconds"] < 0.1
        assert run.timed == ("seconds", "fit_seconds")


def test_timed_blocks_of_one_name_add_up():
    trial = Trial()
    for arm in trial.arms("a"):
        for _ in range(3):
            with arm.timed("step_seconds"):
                time.sleep(0.01)
    assert trial.runs["a"].metrics["step_seconds"] >= 0.03


def test_a_finished_arms_metric_can_be_read_and_a_wrong_name_lists_what_there_is():
    trial = Trial()
    for arm in trial.arms("a", "b"):
        if arm.name == "a":
            arm.log(best=2.0)
        else:
            assert trial.metric("a", "best") == 2.0
            with pytest.raises(BadInput, match="it logged best, seconds"):
                trial.metric("a", "worst")
            with pytest.raises(BadInput, match=r"'c' is not finished.*finished are a"):
                trial.metric("c", "best")


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"x": "high"}, "metric 'x' must be a number or a list of numbers, is str"),
        ({"x": None}, "is NoneType"),
        ({"x": 1j}, "is complex"),
        ({"x": [[1.0], [2.0]]}, "one dimension"),
        ({"x": [0.0] * 1001}, "1,001 numbers"),
        ({"x": 2**70}, "64 bits"),
        ({"a b": 1.0}, "metric 'a b' must be a Python identifier"),
        ({"_hidden": 1.0}, "identifier"),
        ({"größe": 1.0}, "ASCII"),
        ({"lambda": 1.0}, "identifier"),
        ({"seconds": 1.0}, "measured by the lab"),
    ],
)
def test_what_cannot_be_logged_is_refused_by_name(metrics, why):
    for arm in Trial().arms("a"):
        with pytest.raises(BadInput, match=why):
            arm.log(**metrics)


def test_a_metric_is_logged_once():
    for arm in Trial().arms("a"):
        arm.log(x=1)
        with pytest.raises(BadInput, match="already there"):
            arm.log(x=2)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "A"), ("a-b",), ("__class__",), ("../up",)])
def test_names_of_arms_are_identifiers_each_once(names):
    with pytest.raises(BadInput, match=r"arm"):
        list(Trial().arms(*names))


def test_loops_over_arms_cannot_be_nested():
    trial = Trial()
    with pytest.raises(BadInput, match="nested"):
        for _ in trial.arms("a"):
            for _ in trial.arms("b"):
                pass


def _executed(source: str, tmp_path, monkeypatch, finished=()):
    name = f"exp_{abs(hash((source, str(tmp_path))))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    events = []
    execute(Unit("key", name, 0, "smoke", finished=tuple(finished)), events.append)
    return {e.run.arm: e.run for e in events if e.run}, events[-1].end


def test_a_crash_loses_its_arm_and_no_other(tmp_path, monkeypatch):
    source = (
        "def run(trial):\n"
        "    for arm in trial.arms('a', 'b', 'c'):\n"
        "        arm.log(x=1)\n"
        "        if arm.name == 'b':\n"
        "            open('/no/such/folder/at_all.txt')\n"
    )
    runs, end = _executed(source, tmp_path, monkeypatch)
    assert [runs[a].status for a in "abc"] == ["done", "crashed", "done"]
    assert "FileNotFoundError" in runs["b"].error
    assert "at_all.txt" in runs["b"].error
    assert "/no/such" not in runs["b"].error, "folders of the machine are left out"
    assert str(tmp_path) not in runs["b"].error
    assert end.error is None
    assert end.arms == ("a", "b", "c")


def test_an_exception_outside_arms_fails_the_seed_with_what_was_measured(tmp_path, monkeypatch):
    source = "def run(trial):\n    for arm in trial.arms('a'):\n        arm.log(x=1)\n    raise RuntimeError('too late')\n"
    runs, end = _executed(source, tmp_path, monkeypatch)
    assert runs["a"].status == "done"
    assert "RuntimeError: too late" in end.error


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("    for arm in trial.arms('a', 'b'):\n        break\n", "left before the arm's body had ended"),
        ("    for arm in trial.arms('a', 'b'):\n        raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_leaving_the_loop_is_a_crash_too(body, why, tmp_path, monkeypatch):
    runs, _ = _executed("def run(trial):\n" + body, tmp_path, monkeypatch)
    assert [runs[a].status for a in "ab"] == ["crashed", "crashed"]
    assert why in runs["b"].error


@pytest.mark.parametrize(
    ("source", "why"), [("x = 1\n", "no attribute 'run'"), ("import no_such_thing\n", "no_such_thing"), ("def run(t): pass\n", "no arms")]
)
def test_an_experiment_that_is_none_fails_its_seed(source, why, tmp_path, monkeypatch):
    _, end = _executed(source, tmp_path, monkeypatch)
    assert why in end.error


def test_the_callers_random_state_and_torch_settings_are_given_back(tmp_path, monkeypatch):
    import torch

    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    body = "    torch.set_default_dtype(torch.float64)\n    for arm in trial.arms('a'):\n        arm.log(x=torch.rand(1))\n"
    source = "import torch\ndef run(trial):\n" + body
    runs, _ = _executed(source, tmp_path, monkeypatch)
    assert runs["a"].status == "done"
    after = random.getstate(), torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_importing_torch_inside_an_arm_is_refused(monkeypatch):
    from neurarium.lab import trial as module

    loaded = iter([False, True])
    monkeypatch.setattr(module, "torch_is_loaded", lambda: next(loaded))
    with pytest.raises(BadInput, match="import it at the top"):
        list(Trial().arms("a"))


def test_values_become_plain_python():
    import torch

    assert as_value(np.float32(0.5), "x") == 0.5
    assert as_value(torch.tensor(3), "x") == 3
    assert as_value(np.bool_(True), "x") is True
    assert as_value(torch.ones(2, requires_grad=True), "x") == [1.0, 1.0]
    assert as_value((1, 2), "x") == [1.0, 2.0]
    assert np.isnan(as_value(float("nan"), "x"))


def test_curves_are_thinned_and_keep_their_ends():
    x, y = as_curve(np.arange(10_001), np.arange(10_001) / 3, "curve")
    assert len(x) == len(y) == 400
    assert (x[0], x[-1]) == (0.0, 10_000.0)
    assert y[-1] == 3333.33
    assert as_curve(None, [5.0, 6.0], "curve") == ([0.0, 1.0], [5.0, 6.0])
    with pytest.raises(BadInput, match="x has 2 points, y has 3"):
        as_curve([1, 2], [1, 2, 3], "curve")
    with pytest.raises(BadInput, match="empty"):
        as_curve([], [], "curve")


def test_grids_keep_their_picture():
    array = np.random.default_rng(0).normal(size=(20, 30))
    array[3, 4] = np.nan
    back = Grid.of(array, "grid").array()
    assert np.isnan(back[3, 4])
    assert np.nanmax(np.abs(back - array)) <= (np.nanmax(array) - np.nanmin(array)) / 254
    large = Grid.of(np.add.outer(np.arange(1000.0), np.zeros(200)), "grid")
    assert (large.rows, large.columns) == (96, 96)
    assert np.all(np.diff(large.array()[:, 0]) > 0)
    assert Grid.of(np.full((2, 2), 7.0), "grid").array().tolist() == [[7.0, 7.0], [7.0, 7.0]]
    with pytest.raises(BadInput, match=r"shape \(3,\)"):
        Grid.of([1, 2, 3], "grid")
