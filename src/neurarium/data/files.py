"""Reading foreign files without trusting them: IDX, zip, tar, and the pickles of CIFAR-10 and Planetoid.

Archives are read member by member into memory, never unpacked to disk; names that leave the archive are refused all the same.
The pickles are read by an unpickler that knows no class of any library: arrays arrive as inert records that are checked
and rebuilt here, so that a pickle can neither run code nor make a malformed array or sparse matrix.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from neurarium.data.store import LIMIT, safe_name
from neurarium.errors import BadInput

__all__ = ["open_zip", "read_idx", "read_member", "read_pickle", "read_tar", "read_text"]

_IDX: dict[int, np.dtype[Any]] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The array in an IDX file, gzipped or not (the format of MNIST: magic 0 0 TYPE NDIM, sizes as big-endian int32, data)."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(raw)) as stream:
                raw = stream.read(LIMIT + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path.name}: damaged or truncated gzip ({error})") from error
    if len(raw) > LIMIT:
        raise BadInput(f"{path.name}: unpacks to more than {LIMIT >> 20} MiB")
    if len(raw) < 4 or raw[0] or raw[1] or raw[2] not in _IDX or not 1 <= raw[3] <= 8:
        raise BadInput(f"{path.name}: not an IDX file (it starts with {raw[:4].hex(' ') or 'nothing'})")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise BadInput(f"{path.name}: the IDX header is cut off")
    dtype, shape = _IDX[raw[2]], tuple(int(s) for s in np.frombuffer(raw, ">u4", raw[3], 4))
    if len(raw) - start != math.prod(shape) * dtype.itemsize:
        raise BadInput(f"{path.name}: the header announces shape {shape}, but {len(raw) - start} bytes of data follow")
    array: np.ndarray[Any, Any] = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file; :class:`BadInput` where it is not in ``encoding``."""
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name}: not {encoding} text ({error.reason} at byte {error.start})") from error


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file all of whose member names stay inside it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                safe_name(name)
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{path.name}: damaged zip file ({error})") from error


def read_member(archive: zipfile.ZipFile, name: str, limit: int = 64 << 20) -> bytes:
    """One member, refused where it would unpack to more than ``limit`` bytes."""
    with archive.open(name) as member:
        data = member.read(limit + 1)
    if len(data) > limit:
        raise BadInput(f"{name}: unpacks to more than {limit >> 20} MiB")
    return data


def read_tar(path: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The members of a (compressed) tar file that are named in ``wanted``; all must be there, as plain files."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                safe_name(member.name)
                if member.name in wanted:
                    stream = archive.extractfile(member) if member.isreg() and member.size <= LIMIT else None
                    if stream is None:
                        raise BadInput(f"{path.name}: member {member.name!r} is not a plain file of at most {LIMIT >> 20} MiB")
                    found[member.name] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path.name}: damaged or truncated tar file ({error})") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise BadInput(f"{path.name}: lacks {', '.join(missing)}")
    return found


# --- pickles -----------------------------------------------------------------------------------------------------------------


class _Record:
    """What stands in for numpy's and scipy's classes while a pickle is read: it keeps arguments and state, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record): ...


class _Dtype(_Record): ...


class _Csr(_Record): ...


def _defaultdict(*_: Any) -> dict[Any, Any]:
    return {}


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise BadInput("a pickle may encode text as latin1 only")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("scipy.sparse._csr", "csr_matrix"): _Csr,
    ("collections", "defaultdict"): _defaultdict,
    ("builtins", "list"): list,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module.replace("__builtin__", "builtins"), name))
        if known is None:
            raise BadInput(f"the pickle asks for {module}.{name}; only arrays, sparse matrices and dictionaries are read")
        return known

    def persistent_load(self, pid: Any) -> NoReturn:
        raise BadInput("the pickle refers to objects outside itself")


def read_pickle(data: bytes, name: str) -> Any:
    """The dicts, lists, numbers, strings, dense arrays and CSR matrices (as dense arrays) in a pickle; :class:`BadInput` otherwise."""
    try:
        value = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        return _build(value)
    except BadInput as error:
        raise BadInput(f"{name}: refused: {error}") from error
    except (MemoryError, RecursionError):
        raise BadInput(f"{name}: refused: too large or too deep") from None
    except Exception as error:  # a pickle machine that is fed garbage raises anything
        raise BadInput(f"{name}: not a readable pickle ({type(error).__name__}: {error})") from error


def _build(value: Any) -> Any:
    if isinstance(value, _Csr):
        return _dense(value.state)
    if isinstance(value, _Array):
        return _array(value.state)
    if isinstance(value, dict):
        return {(k.decode("latin1") if isinstance(k, bytes) else k): _build(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_build(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise BadInput(f"it holds a {type(value).__name__.lstrip('_')}")


_NUMBERS = {"b1", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"}


def _array(state: Any) -> np.ndarray[Any, Any]:
    # numpy's state: (version, shape, dtype, column-major, data)
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype) and isinstance(state[1], tuple)):
        raise BadInput("an array without a proper state")
    _, shape, kind, columns, data = state
    code = kind.args[0] if kind.args else None
    order: Any = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "|"
    if not isinstance(code, str) or code not in _NUMBERS or order not in ("<", ">", "|", "="):
        raise BadInput(f"an array of dtype {code!r}")
    dtype = np.dtype(code).newbyteorder("|" if order == "|" else order)
    if isinstance(data, str):
        data = data.encode("latin1")
    sizes = all(isinstance(s, int) and s >= 0 for s in shape)
    if not sizes or not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise BadInput(f"an array of shape {shape} whose data does not fit")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if columns else "C").astype(dtype.newbyteorder("="))


def _dense(state: Any) -> np.ndarray[Any, Any]:
    """A CSR matrix (its ``__dict__``) as a dense float32 array, after checking that its indices fit."""
    if not isinstance(state, dict):
        raise BadInput("a sparse matrix without a proper state")
    shape: Any = state.get("_shape")
    indptr, indices, data = (_build(state.get(k)) for k in ("indptr", "indices", "data"))
    sizes = isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(s, int) and s >= 0 for s in shape)
    if not sizes or 4 * math.prod(shape) > LIMIT:
        raise BadInput(f"a sparse matrix of shape {shape}")
    if not all(isinstance(a, np.ndarray) and a.ndim == 1 for a in (indptr, indices, data)):
        raise BadInput("a sparse matrix without its three arrays")
    rows, columns = shape
    counts = np.diff(indptr)
    fits = len(indptr) == rows + 1 and indptr[0] == 0 and (counts >= 0).all() and indptr[-1] == len(indices) == len(data)
    if not fits or (len(indices) and not (indices.min() >= 0 and indices.max() < columns)):
        raise BadInput("a sparse matrix whose indices do not fit its shape")
    dense = np.zeros(shape, np.float32)
    np.add.at(dense, (np.repeat(np.arange(rows), counts), indices), data)
    return dense
