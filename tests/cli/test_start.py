"""Starting is cheap: what a command does not need, it does not import."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

#: modules that cost more than they are worth where nothing is computed
HEAVY = ("torch", "numpy", "scipy", "sklearn", "matplotlib", "neurarium.lab", "neurarium.data")


def processor_seconds(*arguments: str) -> float:
    """Processor time of a fresh interpreter, best of five: on a quiet machine it is the wall time, on a busy one it is no longer."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


def loaded(code: str) -> set[str]:
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))


def test_importing_neurarium_loads_nothing_heavy():
    modules = loaded("import neurarium")
    assert not modules.intersection(HEAVY)
    assert not {m for m in modules if m.startswith("neurarium.")}


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["search", "x"], ["cite", "sltt"], ["--help"]])
def test_catalog_commands_load_nothing_heavy(arguments: list[str]):
    modules = loaded(f"sys.argv = ['neurarium', *{arguments}]; from neurarium.cli import main; main()")
    assert not modules.intersection(HEAVY)
    assert "rich" not in modules


def test_importing_neurarium_takes_under_a_tenth_of_a_second():
    assert processor_seconds("-c", "import neurarium") < 0.1


def test_list_takes_under_four_tenths_of_a_second():
    assert processor_seconds("-m", "neurarium", "list") < 0.4


def test_subpackages_load_on_first_use():
    assert "neurarium.catalog" in loaded("import neurarium; neurarium.catalog")
    done = subprocess.run([sys.executable, "-c", "import neurarium; neurarium.nothing"], capture_output=True, text=True)
    assert "module 'neurarium' has no attribute 'nothing'" in done.stderr
