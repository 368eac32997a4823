"""On what a record was measured: versions and hardware, never a name that tells whose machine it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from functools import cache
from pathlib import Path

import neurarium

__all__ = ["cores", "machine", "threads", "versions"]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads for a process that is alone: one a core, fewer if ``OMP_NUM_THREADS`` says so."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(wish)) if wish.isdecimal() and int(wish) > 0 else cores()


def versions() -> dict[str, str]:
    """Of Python, torch, numpy and neurarium; nothing is imported for it."""
    found = {"python": platform.python_version(), "neurarium": neurarium.__version__}
    for package in ("torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine(threads: int, device: str = "cpu") -> dict[str, str | int]:
    """Processor, cores, threads that were used, operating system, accelerator."""
    facts: dict[str, str | int] = {"cpu": _processor(), "cores": os.cpu_count() or 1, "threads": threads, "os": platform.system()}
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None and torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


@cache
def _processor() -> str:
    name = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        name = match[1] if match else ""
    return " ".join((name or platform.processor() or platform.machine() or "unknown").split())[:100]
