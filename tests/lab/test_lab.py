"""The package as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from neurarium import lab
from neurarium.lab import machine, tracebacks


def test_judging_and_verifying_load_neither_torch_nor_matplotlib():
    source = "import sys; from neurarium.lab import *; assert not {'torch', 'matplotlib', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_every_public_name_is_there():
    for name in lab.__all__:
        assert getattr(lab, name) is not None
    assert dir(lab) == sorted(lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        lab.runs  # noqa: B018


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No such file: '/home/somebody/data/set.npz'", "No such file: 'set.npz'"),
        ("see https://example.org/a/b.html", "see https://example.org/a/b.html"),
        ("~/secret/key.pem is absent", "key.pem is absent"),
        (r"C:\Users\somebody\data\set.npz", "set.npz"),
        ("shapes (3/4) and a/b", "shapes (3/4) and a/b"),
        ("red \x1b[31mtext\x07", "red ?[31mtext?"),
        ("/tmp/x: gone, /var/y/z too", "x: gone, z too"),
    ],
)
def test_published_words_hold_no_folder_of_the_machine(text, expected):
    assert tracebacks.without_paths(text) == expected


def test_a_wish_for_fewer_threads_is_granted(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.threads() == 1
    assert machine.cores() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert machine.threads() == machine.cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert machine.threads() == machine.cores()
