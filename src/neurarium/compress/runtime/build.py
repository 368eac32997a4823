"""The compiled kernel: built once into the user's cache, shared by all processes, and never required.

The first product on a machine compiles ``spmm.cpp`` (about half a minute) with ``torch.utils.cpp_extension`` and keeps the library under
the cache folder, named by a fingerprint of source, flags, compiler and torch. Builders wait for each other on a lock that the system
frees if one dies, and each writes to a folder of its own and renames the result, so that nobody ever loads half a file.

Without a C++ compiler or ninja, after a failed build, or with ``NEURARIUM_NO_COMPILE=1``, products run in torch; that is said once. Which
instructions the kernel uses is decided when it runs, from what the processor reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from neurarium.errors import BadInput

__all__ = ["backend", "kernel", "using"]

ISA = ("plain", "avx2", "avx512")
SOURCES = ("spmm.cpp", "spmm_kernels.cpp")
HEADERS = ("spmm.h", "spmm_float.h", "spmm_int8.h", "spmm_vnni.h")
FLAGS = ("-O2", "-ffp-contract=fast")

_lock = threading.Lock()
_known: list[int | None] = []  # empty: not tried; [None]: there is no kernel; [2]: the best instruction set
_limit: list[str] = []


def kernel() -> int | None:
    """The number of the instruction set to use (an index of :data:`ISA`), the kernel loaded; None where products run in torch."""
    if not _known:
        with _lock:
            if not _known:
                _known.append(_find())
    best = _known[0]
    if best is None or not _limit:
        return best
    return None if _limit[-1] == "torch" else min(best, ISA.index(_limit[-1]))


def backend() -> str:
    """What a product runs on now: "avx512", "avx2", "plain" (compiled, baseline instructions) or "torch" (no kernel)."""
    isa = kernel()
    return "torch" if isa is None else ISA[isa]


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Products inside the block use at most this backend: for comparisons, or where the wide units lower the clock."""
    if name not in (*ISA, "torch"):
        raise BadInput(f"no backend {name!r}; there are {', '.join((*ISA, 'torch'))}")
    _limit.append(name)
    try:
        yield
    finally:
        _limit.pop()


def _find() -> int | None:
    if os.environ.get("NEURARIUM_NO_COMPILE", "") not in ("", "0"):
        return _without("NEURARIUM_NO_COMPILE is set")
    try:
        _load()
        return int(torch.ops.neurarium_spmm.best_isa())
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "error" in line] or str(error).splitlines()[:1] or [type(error).__name__]
        return _without(lines[0].strip()[:200])


def _without(why: str) -> None:
    warnings.warn(f"sparse products run in torch, which is slower than the compiled kernel: {why}", RuntimeWarning, stacklevel=6)
    return None


def _load() -> None:
    from neurarium.data.store import cache_dir  # here: the data room is only needed by who builds

    compiler = os.environ.get("CXX", "c++")
    found = shutil.which(compiler)
    library = cache_dir() / "kernels" / f"spmm-{_fingerprint(found)}.so"
    if not library.exists():
        if found is None:
            raise RuntimeError(f"there is no C++ compiler ({compiler})")
        if shutil.which("ninja") is None:
            raise RuntimeError("there is no ninja (pip install ninja)")
        if _once(library, _build):
            return
    torch.ops.load_library(str(library))


def _once(target: Path, make: Callable[[Path], None]) -> bool:
    """Makes the target if no other process has, while this one waited for its turn; whether this one did."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        if target.exists():
            return False
        make(target)
        return True


def _fingerprint(compiler: str | None) -> str:
    here = Path(__file__).parent
    parts = [torch.__version__, platform.machine(), platform.system(), os.path.realpath(compiler or ""), *FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    """Compiles into a folder beside the target, loads it (which proves that it loads) and moves it into place."""
    from torch.utils import cpp_extension

    here = Path(__file__).parent
    # On Linux the symbols of OpenMP come from the runtime that torch has loaded; a second one would double the threads.
    threads = ("-fopenmp",) if platform.system() == "Linux" else ()
    folder = Path(tempfile.mkdtemp(prefix=f"build-{library.stem}-", dir=library.parent))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cpp_extension.load(
                "spmm",
                [str(here / name) for name in SOURCES],
                extra_cflags=[*FLAGS, *threads],
                build_directory=str(folder),
                is_python_module=False,
            )
        os.replace(next(p for p in folder.iterdir() if p.suffix in (".so", ".dylib", ".pyd")), library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process builds. Where there are no such locks, two may build; the second rename wins, and both are whole."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for folder in path.parent.glob(f"build-{path.stem}-*"):  # of a builder that was killed
            shutil.rmtree(folder, ignore_errors=True)
        yield
