"""A toy experiment that needs no torch, and records made by hand."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from neurarium.catalog import Claim, Paper
from neurarium.lab.record import ArmRun, Record, SeedRun

TOY = '''
"""A toy: two arms that draw numbers, one more that may crash."""
import os
import random
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def run(trial):
    count = trial.scale(smoke=4, laptop=40)
    pause = float(os.environ.get("TOY_PAUSE", "0"))
    for arm in trial.arms("base", "method", "third"):
        with open(HERE / "log.txt", "a") as log:
            log.write(f"{trial.seed} {arm.name} {os.getpid()}\\n")
        tuned = trial.shared("tuned", lambda: random.random() + np.random.rand())
        values = np.random.rand(count) * (0.5 if arm.name == "method" else 1.0)
        time.sleep(pause)
        print("what an experiment prints is no event")
        if arm.name == os.environ.get("TOY_CRASH"):
            raise ValueError("the toy fell from /home/somebody/shelf.txt")
        arm.log(value=values.mean(), tuned=tuned, many=[1.0, 2.0, 3.0], draw=random.random())
        arm.curve("walk", y=np.cumsum(values))
        arm.grid("map", np.outer(values[:4], values[:4]))


def figure(record, fig):
    axis = fig.subplots()
    for arm in record.arms:
        axis.plot(record.seeds, record.values(arm, "value"), label=arm)
'''


def toy_paper(module: str = "toy_experiment", **changes) -> Paper:
    claim = Claim("the method halves the value", "50 %", "method.value / base.value", "<= 0.8", direction="< 1")
    fields = {
        "id": "toy",
        "title": "A toy",
        "room": "nn",
        "year": 2020,
        "arxiv": None,
        "role": "study",
        "status": "works",
        "experiment": module,
        "summary": "Draws numbers.",
        "evidence": "generated",
        "evidence_note": "uniform numbers",
        "null": {"method": "base"},
        "claims": (claim,),
    }
    return Paper(**{**fields, **changes})


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Paper:
    """A paper whose experiment lies in a folder of its own; each test has a fresh module name, so that nothing is cached."""
    name = "toy_" + "".join(c if c.isalnum() else "_" for c in tmp_path.name)
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / f"{name}.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(str(folder))
    return toy_paper(name)


@pytest.fixture
def code(tmp_path) -> Path:
    return tmp_path / "code"


@pytest.fixture
def make_paper():
    return toy_paper


@pytest.fixture
def make_record():
    """``make_record({"base": {"value": [1, 2, 3]}, ...})``: a record of a list of values, one a seed; None for an arm that crashed."""

    def make(arms, *, scale="laptop", id="toy", errors=None, **changes) -> Record:
        count = max(len(values) for metrics in arms.values() for values in metrics.values())
        runs = []
        for seed in range(count):
            for arm, metrics in arms.items():
                logged = {name: values[seed] for name, values in metrics.items()}
                if None in logged.values():
                    runs.append(ArmRun(seed, arm, "crashed", {"seconds": 0.1}, ("seconds",), error="Boom: it crashed"))
                else:
                    runs.append(ArmRun(seed, arm, "done", {**logged, "seconds": 0.5}, ("seconds",)))
        machine = {"cpu": "a processor", "cores": 2, "threads": 1, "os": "Linux"}
        seeds = tuple(SeedRun(seed, tuple(arms), 1.5, (errors or {}).get(seed), machine) for seed in range(count))
        fields = {
            "id": id,
            "kind": "paper",
            "room": "nn",
            "scale": scale,
            "evidence": "generated",
            "evidence_note": "made by hand",
            "fingerprint": "0" * 64,
            "created": "2025-01-31",
            "device": "cpu",
            "versions": {"python": "3.11.0", "torch": "2.13.0", "numpy": "2.0.0", "neurarium": "0.1.0"},
            "seeds": seeds,
            "runs": tuple(runs),
        }
        return Record(**{**fields, **changes})

    return make
