"""What ``neurarium doctor`` looks at: whether this machine has what neurarium needs, and what would help.

Each check is one :class:`Finding`. Only a finding of level ``broken`` fails the command; ``note`` is something optional that is absent.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from neurarium import __version__, catalog

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``level`` is ok, note or broken, ``advice`` what to do about it."""

    name: str
    level: str
    says: str
    advice: str = ""


#: package -> extra, or "" where the core needs it
PACKAGES = {
    "torch": "", "numpy": "", "scipy": "", "scikit-learn": "", "matplotlib": "", "safetensors": "", "typer": "", "rich": "",
    "scikit-image": "images", "ray": "ray", "torch-geometric": "graphs", "onnx": "export", "onnxruntime": "export", "onnxscript": "export",
}  # fmt: skip


def examine() -> Iterator[Finding]:
    """All findings, in the order in which they are worth reading. A check that itself fails is a finding too."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _torch, _catalog, _data, _folders, _compiler)
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation fails in ways that nobody listed
            yield Finding(check.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}", "reinstall in a fresh environment")


def _python() -> Iterator[Finding]:
    yield Finding("neurarium", "ok", f"{__version__}, in {Path(__file__).parent}")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical processors"
    yield Finding("python", "ok", f"{platform.python_version()} on {machine}")


def _packages() -> Iterator[Finding]:
    for name, extra in PACKAGES.items():
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            level, command = ("note", f"pip install 'neurarium[{extra}]'") if extra else ("broken", f"pip install {name}")
            yield Finding(name, level, "not installed", command)


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("threads", "ok", f"torch computes with {torch.get_num_threads()}")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not (2, 9) <= version <= (2, 13):
        yield Finding("torch version", "broken", torch.__version__, "neurarium is tested with torch 2.9 to 2.13.0")
    x = torch.arange(4.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((x**2).sum(), x)
    if gradient.tolist() != [0.0, 2.0, 4.0, 6.0]:
        yield Finding("torch", "broken", f"computes a wrong gradient: {gradient.tolist()}", "reinstall torch")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("cuda", "ok", f"{names}: use --device cuda")
    else:
        yield Finding("cuda", "note", "no CUDA device", "none is needed: experiments are sized for two CPU cores")


def _catalog() -> Iterator[Finding]:
    papers = catalog.load()
    works = sum(paper.status == "works" for paper in papers)
    yield Finding("catalog", "ok", f"{len(papers)} papers, {works} working, {len(papers.rooms)} rooms")
    for problem in papers.problems:
        yield Finding("plug-in", "note", problem, "tell its authors, or uninstall it")


def _data() -> Iterator[Finding]:
    from neurarium import data

    chosen = os.environ.get("NEURARIUM_DATA")
    if chosen and not Path(chosen).expanduser().is_dir():
        yield Finding("data mirror", "broken", f"NEURARIUM_DATA names {chosen!r}, which is not a folder", "correct it or unset it")
        return
    absent = "NEURARIUM_DATA is not set: data sets are downloaded on first use"
    yield Finding("data mirror", "ok" if chosen else "note", chosen or absent)
    here = data.available()
    yield Finding("data sets", "ok", f"{len(here)} of {len(data.SETS)} on this machine", "`neurarium data list` shows them")


def _folders() -> Iterator[Finding]:
    for name, folder in (("working folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            yield Finding(name, "note", f"{folder} is not writable", "give `neurarium run` a folder with --out")
        elif free < 200_000_000:
            yield Finding(name, "note", f"{folder} has {free / 1e6:.0f} MB left", "a run writes a few megabytes")
        else:
            yield Finding(name, "ok", f"{folder}, {free / 1e9:.0f} GB free")


def _compiler() -> Iterator[Finding]:
    found = next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++", "cl") if name and (path := shutil.which(name))), None)
    if found:
        yield Finding("C++ compiler", "ok", found)
    else:
        yield Finding("C++ compiler", "note", "none found", "only torch.compile needs one; everything runs without it")
