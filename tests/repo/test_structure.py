"""The repository keeps its own rules: layers, packaging, and what a committed file may say."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from neurarium import catalog

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "neurarium"
ROOMS = {
    "adapt", "combinatorial", "compress", "dynamic", "generate", "graph", "hardware", "language", "learn", "nn", "physics", "science",
    "search", "sequence", "spiking", "theory", "trust", "vision",
}  # fmt: skip
OUR_MODULES = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p.is_dir() and list(p.glob("*.py")))} - {"__init__"}


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    return parser


def layers(contracts: configparser.ConfigParser, name: str) -> list[set[str]]:
    lines = contracts[f"importlinter:contract:{name}"]["layers"].split("\n")
    return [set(re.findall(r"\w+", line)) for line in lines if line.strip()]


def test_every_package_is_covered_by_both_layer_contracts(contracts):
    for name in ("layers", "catalog"):
        listed = set().union(*layers(contracts, name))
        assert not OUR_MODULES - listed, f"contract {name!r} does not cover {OUR_MODULES - listed}"
        assert not ROOMS - listed
        assert contracts[f"importlinter:contract:{name}"]["exhaustive"] == "True"


def test_the_contract_is_the_design(contracts):
    order = {module: i for i, layer in enumerate(layers(contracts, "layers")) for module in layer}
    chain = ["cli", "lab", "experiments", "spiking", "learn", "nn", "data", "meter", "roles", "errors"]
    assert sorted(chain, key=order.__getitem__) == chain
    assert order["lab"] == order["testing"] < order["catalog"] < order["experiments"]
    assert len({order[room] for room in ROOMS - {"nn", "learn"}}) == 1


def test_every_package_folder_has_an_init_so_that_the_contracts_see_it():
    assert [p for p in SOURCE.rglob("*.py") if not (p.parent / "__init__.py").exists()] == []


def test_rooms_of_the_catalog_are_the_rooms():
    assert set(catalog.load().rooms) == ROOMS


def test_every_package_can_be_reached_from_the_top():
    import neurarium

    packages = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists()}
    assert packages <= set(neurarium._SUBPACKAGES)


def test_unchecked_packages_of_the_type_checker_are_rooms_and_experiments_alone():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    ignored = {module for entry in overrides if entry.get("ignore_errors") for module in entry["module"]}
    assert ignored == {f"neurarium.{name}.*" for name in (*ROOMS, "experiments", "testing.examples")}


def test_the_version_is_one():
    import neurarium

    assert f"version: {neurarium.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {neurarium.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_torch_that_make_installs_is_one_that_the_package_accepts():
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "torch"]
    (version,) = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert Version(version) in torch.specifier


def test_the_contributing_guides_entry_is_valid():
    (entry,) = re.findall(r"```toml\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    papers, _ = catalog.schema.parse(entry.encode(), "CONTRIBUTING.md", "learn")
    works, _ = catalog.schema.parse(entry.replace('"planned"', '"works"', 1).encode(), "CONTRIBUTING.md", "learn")
    assert [p.id for p in papers + works] == ["tiny-rule"] * 2


def test_links_between_documents_lead_somewhere():
    for file in tracked():
        if file.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
                assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}"


def test_no_committed_file_names_a_machine():
    paths = re.compile(r"(?<![\w.])/(?:work|root|tmp/\w+|home/\w+|Users/\w+)/")
    for file in tracked():
        in_tests = file.is_relative_to(ROOT / "tests")  # tests of what hides such paths may name some
        if file.suffix in {".py", ".toml", ".md", ".json", ".yaml", ".cff", ".ini"} and not in_tests:
            found = paths.search(file.read_text(encoding="utf-8"))
            assert found is None, f"{file.relative_to(ROOT)} holds the machine path {found and found[0]}"


def test_hooks_need_no_host():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"^\s*- repo: (\S+)", text, re.M)) == {"local"}
    assert set(re.findall(r"^\s*language: (\S+)", text, re.M)) == {"system"}
