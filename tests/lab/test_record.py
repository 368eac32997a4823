"""Records: what is written is read back, and nothing foreign is trusted."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

from neurarium.errors import BadInput, RecordError
from neurarium.lab import Record, RecordView
from neurarium.lab.measurement import Grid
from neurarium.lab.record import ArmRun, SeedRun


@pytest.fixture
def record(make_record):
    return make_record(
        {"base": {"value": [1.0, 2.0, math.nan], "many": [[1.0, 2.0], [3.0, math.inf], [-math.inf, 0.0]]}, "method": {"value": [1, 2, 3]}}
    )


def test_a_record_comes_back_as_it_was(record, tmp_path):
    path = record.save(tmp_path / "record.json")
    back = Record.load(path)
    assert back.to_bytes() == record.to_bytes()
    assert back.same_measurements(record)
    assert math.isnan(back.run(2, "base").metrics["value"])
    assert back.run(1, "base").metrics["many"] == [3.0, math.inf]
    assert back.run(0, "method").metrics["value"] == 1
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_curves_and_pictures_come_back(make_record, tmp_path):
    record = make_record({"a": {"x": [1.0]}})
    run = ArmRun(
        0,
        "a",
        "done",
        {"x": 1.0, "seconds": 0.1},
        ("seconds",),
        {"loss": ([0.0, 1.0], [3.0, math.nan])},
        {"map": Grid.of(np.eye(4), "map")},
    )
    record = Record(**{**record.__dict__, "runs": (run,)})
    view = RecordView(Record.load(record.save(tmp_path / "r.json")))
    x, y = view.curves("a", "loss")[0]
    assert x.tolist() == [0.0, 1.0]
    assert y[0] == 3.0
    assert np.isnan(y[1])
    assert np.array_equal(view.grids("a", "map")[0], np.eye(4))
    with pytest.raises(BadInput, match="no curve 'los'; it has loss"):
        view.curves("a", "los")


def test_the_view_pairs_seeds_and_names_what_there_is(make_record):
    view = RecordView(make_record({"a": {"x": [1.0, None, 3.0]}, "b": {"x": [[1.0, 2.0], [3.0], [5.0, 6.0]]}}))
    assert np.array_equal(view.values("a", "x"), [1.0, np.nan, 3.0], equal_nan=True)
    assert view.mean("a", "x") == 2.0
    assert np.array_equal(view.values("b", "x"), [[1, 2], [3, np.nan], [5, 6]], equal_nan=True)
    assert view.metrics("a") == ("x", "seconds")
    with pytest.raises(BadInput, match="no arm 'c'; it has a, b"):
        view.values("c", "x")
    with pytest.raises(BadInput, match="no metric 'y'; it logged x, seconds"):
        view.values("a", "y")


def test_seconds_do_not_make_measurements_differ(make_record):
    one, other = (make_record({"a": {"x": [1.0]}}) for _ in range(2))
    slower = ArmRun(0, "a", "done", {"x": 1.0, "seconds": 9.0}, ("seconds",))
    assert one.same_measurements(Record(**{**other.__dict__, "runs": (slower,)}))
    changed = ArmRun(0, "a", "done", {"x": 1.0000001, "seconds": 0.5}, ("seconds",))
    assert not one.same_measurements(Record(**{**other.__dict__, "runs": (changed,)}))


def test_a_record_stays_under_a_megabyte(make_record, tmp_path):
    record = make_record({"a": {"x": [1.0] * 5}})
    noise = np.random.default_rng(0)
    grids = {f"g{i}": Grid.of(noise.random((96, 96)), "g") for i in range(30)}
    runs = tuple(ArmRun(s, "a", "done", {"x": 1.0}, (), {}, grids) for s in range(5))
    heavy = Record(**{**record.__dict__, "runs": runs})
    back = Record.load(heavy.save(tmp_path / "r.json"))
    assert (tmp_path / "r.json").stat().st_size <= 1_000_000
    assert [len(run.grids) for run in back.runs] == [30, 0, 0, 0, 0], "pictures of the first seed are kept"
    lists = tuple(ArmRun(s, "a", "done", {f"m{i}": noise.random(1000).tolist() for i in range(20)}) for s in range(5))
    with pytest.raises(RecordError, match="metrics alone"):
        Record(**{**record.__dict__, "runs": lists}).save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json").to_bytes() == back.to_bytes(), "what was there is kept"


HOSTILE = [
    (("format",), 2, "field 'format': is 2; this neurarium reads format 1"),
    (("format",), True, "field 'format'"),
    (("format",), ..., "field 'format': is missing"),
    (("id",), "../../etc/passwd", "field 'id': id '../../etc/passwd' must be"),
    (("id",), "toy\n", "field 'id'"),
    (("id",), "CON/x", "field 'id'"),
    (("room",), "..", "field 'room'"),
    (("kind",), "virus", "field 'kind': must be one of paper, comparison"),
    (("scale",), "galaxy", "field 'scale'.*scales are smoke, laptop"),
    (("evidence",), "hearsay", "field 'evidence'"),
    (("evidence_note",), "x" * 10_000, "10,000 characters"),
    (("evidence_note",), "\x1b]0;owned\x07", "control character U\\+001B"),
    (("fingerprint",), "0" * 63, "64 hexadecimal digits"),
    (("created",), "yesterday", "field 'created'"),
    (("device",), "cuda:0; rm -rf", "field 'device'"),
    (("versions",), [], "field 'versions': must be a table, is a list"),
    (("versions", "torch"), {"a": 1}, "field 'versions.torch': must be a string"),
    (("extra",), 1, "unknown field 'extra'"),
    (("seeds",), [], "field 'seeds': is empty"),
    (("seeds", 0, "seed"), -1, "field 'seeds\\[0\\]'.*field 'seed'"),
    (("seeds", 0, "seed"), 1, "the same seed twice"),
    (("seeds", 0, "seconds"), -5, "must be seconds"),
    (("seeds", 0, "arms"), ["base"], "not announced"),
    (("seeds", 0, "arms"), ["base", "method", "ghost"], "lacks its arm 'ghost'"),
    (("runs", 0, "arm"), "__class__", "field 'runs\\[0\\]'.*field 'arm'"),
    (("runs", 0, "status"), "perfect", "field 'status': must be 'done' or 'crashed'"),
    (("runs", 0, "status"), "crashed", "field 'error'"),
    (("runs", 0, "metrics"), [1.0], "field 'metrics': must be a table"),
    (("runs", 0, "metrics", "value"), "1.0", "must be a number, 'nan', 'inf', '-inf'"),
    (("runs", 0, "metrics", "value"), None, "is null"),
    (("runs", 0, "metrics", "value"), {"__import__": "os"}, "is a table"),
    (("runs", 0, "metrics", "value"), 10**30, "must be a number"),
    (("runs", 0, "metrics", "value"), [0.0] * 1001, "at most 1,000"),
    (("runs", 0, "metrics", "a.b"), 1.0, "identifier"),
    (("runs", 0, "timed"), ["fast"], "no metric"),
    (("runs", 0, "curves"), {"c": {"x": [1.0], "y": [1.0, 2.0]}}, "x has 1 points, y has 2"),
    (("runs", 0, "curves"), {"c": {"x": [0.0] * 401, "y": [0.0] * 401}}, "at most 400"),
    (("runs", 0, "grids"), {"g": {"rows": 9999, "columns": 1, "low": 0, "high": 1, "cells": ""}}, "field 'rows'"),
    (("runs", 0, "grids"), {"g": {"rows": 2, "columns": 2, "low": 0, "high": 1, "cells": "AAAA"}}, "3 cells do not make 2 x 2"),
    (("runs", 0, "grids"), {"g": {"rows": 1, "columns": 1, "low": 0, "high": 1, "cells": "!!"}}, "not base64"),
    (("claims",), [{"measure": 1, "holds": "< 1"}], "claims\\[0\\]"),
    (("runs",), None, "field 'runs': must be a list, is null"),
]


@pytest.mark.parametrize(("path", "value", "why"), HOSTILE, ids=[f"{'.'.join(map(str, p))}-{i}" for i, (p, _, _) in enumerate(HOSTILE)])
def test_hostile_fields_are_refused_with_their_name(path, value, why, record, tmp_path):
    table = json.loads(record.to_bytes())
    target = table
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(table))
    with pytest.raises(RecordError, match=rf"hostile\.json.*{why}"):
        Record.load(file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested more than 12 levels"),
        (b'{"a":' * 5_000, "nested more than 12 levels"),
        (b'{"format": 1, "format": 1}', "'format' appears twice"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b'{"format": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b"[]", "must be a table"),
        (b'"just text"', "must be a table"),
        (b" " * 1_000_001, "1,000,001 bytes"),
        (b"import os; os.abort()", "not valid JSON"),
    ],
)
def test_hostile_files_are_refused(content, why, tmp_path):
    file = tmp_path / "hostile.json"
    file.write_bytes(content)
    with pytest.raises(RecordError, match=rf"hostile\.json.*{why}"):
        Record.load(file)


def test_what_is_no_file_is_refused_without_blocking(tmp_path):
    with pytest.raises(RecordError, match="No such file"):
        Record.load(tmp_path / "absent.json")
    with pytest.raises(RecordError, match="not a regular file"):
        Record.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(RecordError, match="not a regular file"):
        Record.load(tmp_path / "pipe.json")
    with pytest.raises(RecordError, match="not a regular file"):
        Record.load("/dev/zero")


def test_arm_and_seed_parts_come_back():
    run = ArmRun(1, "a", "crashed", {"x": math.nan}, (), error="Boom")
    assert ArmRun.from_dict(json.loads(json.dumps({**run.to_dict(), "metrics": {"x": "nan"}})), "part").error == "Boom"
    seed = SeedRun(1, ("a",), 2.0, None, {"cores": 2})
    assert SeedRun.from_dict(seed.to_dict(), "part") == seed
