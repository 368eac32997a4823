"""Starting is cheap: what a command does not need, it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

#: modules that cost more than they are worth where nothing is computed
HEAVY = ("torch", "numpy", "scipy", "sklearn", "matplotlib", "neurarium.lab", "neurarium.data")


def best_of(runs: int, *command: str) -> float:
    """Shortest wall time of a fresh interpreter: longer ones are noise of the machine."""

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
        return time.perf_counter() - start

    return min(seconds(*command) for _ in range(runs))


def loaded(code: str) -> set[str]:
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))


def test_importing_neurarium_loads_nothing_heavy():
    modules = loaded("import neurarium")
    assert not modules.intersection(HEAVY)
    assert not {m for m in modules if m.startswith("neurarium.")}


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["search", "x"], ["show", "poincare-resnet"], ["cite", "sltt"], ["--help"]]
)
def test_catalog_commands_load_nothing_heavy(arguments: list[str]):
    modules = loaded(f"sys.argv = ['neurarium', *{arguments}]; from neurarium.cli import main; main()")
    assert not modules.intersection(HEAVY)
    assert "rich" not in modules


def test_importing_neurarium_takes_under_a_tenth_of_a_second():
    script = "import time; t = time.perf_counter(); import neurarium; print(time.perf_counter() - t)"
    times = [float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout) for _ in range(5)]
    assert min(times) < 0.1


def test_list_takes_under_four_tenths_of_a_second():
    assert best_of(5, "-m", "neurarium", "list") < 0.4 * 2  # twice what it may take on a quiet machine


def test_subpackages_load_on_first_use():
    assert "neurarium.catalog" in loaded("import neurarium; neurarium.catalog")
    done = subprocess.run([sys.executable, "-c", "import neurarium; neurarium.nothing"], capture_output=True, text=True)
    assert "module 'neurarium' has no attribute 'nothing'" in done.stderr
