"""Files and answers that must not be trusted: each is refused with the reason, and nothing is left behind."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from neurarium import data
from neurarium.data import files, store
from neurarium.data.store import Remote
from neurarium.errors import BadInput, MissingData


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("NEURARIUM_DATA", str(folder))
    monkeypatch.setenv("NEURARIUM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(autouse=True)
def downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests download, from a server of their own."""
    monkeypatch.delenv("NEURARIUM_OFFLINE", raising=False)


def test_offline_nothing_is_fetched(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURARIUM_OFFLINE", "1")
    with pytest.raises(MissingData, match="NEURARIUM_OFFLINE forbids"):
        store.obtain(Remote("file", "http://127.0.0.1:9/file"), "the_call()")


# --- pickles


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch owned",)


class Getattr:
    def __reduce__(self) -> tuple[object, ...]:
        return getattr, ("x", "upper")


@pytest.mark.parametrize(
    "payload", [Evil(), {"data": [Evil()]}, Getattr(), io.BytesIO(b""), np.array([Evil()], object), np.random.default_rng(0)]
)
def test_a_pickle_cannot_run_code_or_make_foreign_objects(payload: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="refused"):
        files.read_pickle(pickle.dumps(payload, protocol=2), "evil")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "raw", [b"", b"garbage", pickle.dumps([1, 2])[:-4], b"\x80\x02]q\x00(" * 3, b"cposix\nsystem\n(S'ls'\ntR.", b"Pfoo\n."]
)
def test_garbage_is_no_pickle(raw: bytes) -> None:
    with pytest.raises(BadInput):
        files.read_pickle(raw, "garbage")


@pytest.mark.parametrize(
    "value", [np.arange(6.0).reshape(2, 3), np.arange(6, dtype=">i4")[::2], np.asfortranarray(np.ones((2, 3), np.uint8))]
)
def test_honest_arrays_survive(value: np.ndarray) -> None:
    assert np.array_equal(files.read_pickle(pickle.dumps(value, protocol=2), "a"), value)


def test_sparse_matrices_are_checked_before_they_are_built() -> None:
    honest = scipy.sparse.random(7, 5, 0.4, format="csr", random_state=0)
    assert np.allclose(files.read_pickle(pickle.dumps(honest, protocol=2), "m"), honest.toarray())
    for field, value in (
        ("indices", honest.indices + 5),
        ("indices", honest.indices - 5),
        ("indptr", honest.indptr[::-1].copy()),
        ("indptr", honest.indptr + 1),
    ):
        broken = honest.copy()
        setattr(broken, field, value.astype(np.int32))
        with pytest.raises(BadInput, match="sparse matrix"):
            files.read_pickle(pickle.dumps(broken, protocol=2), "m")


# --- archives and IDX


@pytest.mark.parametrize("name", ["../../evil.jpg", "/etc/evil.jpg", "train/../../evil.jpg", "C:\\evil.jpg", "..\\evil.jpg"])
def test_zip_members_that_leave_the_archive_are_refused(name: str, mirror: Path) -> None:
    with zipfile.ZipFile(mirror / "cifar10-jpeg.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(BadInput, match="not a path inside"):
        data.images("cifar10")


def test_a_zip_bomb_is_not_unpacked(mirror: Path) -> None:
    with zipfile.ZipFile(mirror / "free-spoken-digits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0_bob_0.wav", bytes(65 << 20))
    with pytest.raises(BadInput, match="more than 64 MiB"):
        data.audio()


def test_a_damaged_zip_and_a_false_picture_are_refused(mirror: Path) -> None:
    (mirror / "cifar10-jpeg.zip").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(BadInput, match="damaged zip"):
        data.images("cifar10")
    with zipfile.ZipFile(mirror / "cifar10-jpeg.zip", "w") as archive:
        archive.writestr("train/cat/0000.jpg", b"GIF89a")
    with pytest.raises(BadInput, match="picture"):
        data.images("cifar10")


def cifar(path: Path, batch: object, name: str = "cifar-10-batches-py/{}") -> None:
    with tarfile.open(path, "w:gz") as archive:
        for part in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            raw = pickle.dumps(batch, protocol=2)
            info = tarfile.TarInfo(name.format(part))
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))


def test_the_original_cifar_archive_is_read_and_hostile_ones_are_refused(mirror: Path) -> None:
    path = mirror / "cifar-10-python.tar.gz"
    pixels = np.arange(20 * 3072).reshape(20, 3072).astype(np.uint8)
    cifar(path, {b"data": pixels, b"labels": list(range(10)) * 2})
    task = data.images("cifar10")
    assert (len(task.train), len(task.test), task.classes, task.note) == (100, 20, 10, "")
    assert np.array_equal((task.test.x[3] * 255).round().numpy().astype(np.uint8), pixels[3].reshape(3, 32, 32))
    for batch in (
        {b"data": Evil(), b"labels": [0]},
        {b"data": pixels, b"labels": [0]},
        {b"data": pixels.astype(float), b"labels": [0] * 20},
        [1],
    ):
        cifar(path, batch)
        with pytest.raises(BadInput):
            data.images("cifar10")
    cifar(path, {}, "../{}")
    with pytest.raises(BadInput, match="not a path inside"):
        data.images("cifar10")
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(BadInput, match="not a plain file"):
        data.images("cifar10")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadInput, match="tar"):
        data.images("cifar10")


def idx(shape: tuple[int, ...], kind: int = 0x08, extra: int = 0) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(int(np.prod(shape)) + extra)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (gzip.compress(idx((4, 28, 28)), mtime=0)[:-12], "truncated gzip"),
        (b"\x1f\x8b" + bytes(20), "gzip"),
        (b"\x01\x00" + idx((4, 28, 28))[2:], "not an IDX file"),
        (idx((4, 28, 28), kind=0x77), "not an IDX file"),
        (idx((4, 28, 28), extra=3), "bytes of data follow"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 4), "bytes of data follow"),
        (bytes([0, 0, 8, 3, 0, 0]), "cut off"),
        (b"", "not an IDX file"),
        (idx((3, 28, 28)), "do not belong together"),
    ],
)
def test_idx_files_that_lie_are_refused(raw: bytes, why: str, mirror: Path) -> None:
    folder = mirror / "mnist"
    folder.mkdir()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(raw)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((4,))))
    with pytest.raises(BadInput, match=why):
        data.images("mnist")


# --- tables, series, graphs


@pytest.mark.parametrize(
    ("table", "target", "why"),
    [
        ("1 2 3\n4 nan 6\n7 8 9\n", "2", "row 1 holds a NaN"),
        ("1 2 3\n4 5\n", "2", r"rows of \[2, 3\] columns"),
        ("1 2 3\n4 5 6\n", "3", "column that does not exist"),
        ("1 2 3\n4 5 x\n", "2", "must hold numbers"),
        ("1 2 3\n2 3 3\n4 5 3\n5 6 3\n", "2", "does not vary"),
    ],
)
def test_tables_with_holes_are_refused(table: str, target: str, why: str, mirror: Path) -> None:
    folder = mirror / "uci-regression" / "yacht"
    folder.mkdir(parents=True)
    for file, content in (("data.txt", table), ("index_features.txt", "0\n1\n"), ("index_target.txt", target)):
        (folder / file).write_text(content)
    with pytest.raises(BadInput, match=why):
        data.tabular("yacht")


@pytest.mark.parametrize("line", ["2016-07-01 01:00:00,1,nan", "2016-07-01 01:00:00,1", "2016-07-01 01:00:00,1,two"])
def test_series_with_holes_are_refused(line: str, mirror: Path) -> None:
    (mirror / "ett").mkdir()
    (mirror / "ett" / "ETTh1.csv").write_text(f"date,HUFL,OT\n2016-07-01 00:00:00,1,2\n{line}\n")
    with pytest.raises(BadInput, match=r"ETTh1\.csv"):
        data.series("etth1")


def test_a_graph_whose_edges_leave_it_is_refused(mirror: Path) -> None:
    folder = mirror / "planetoid"
    folder.mkdir()
    csr, label = scipy.sparse.eye(4, format="csr"), np.eye(4, 2)
    parts: dict[str, object] = {"x": csr, "tx": csr, "allx": csr, "y": label, "ty": label, "ally": label, "graph": {0: [1], 1: [99]}}
    for part, value in parts.items():
        (folder / f"ind.cora.{part}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / "ind.cora.test.index").write_text("4\n5\n6\n7\n")
    with pytest.raises(BadInput, match="node 99"):
        data.graph("cora")
    (folder / "ind.cora.test.index").write_text("4\n5\n6\n900000000\n")
    with pytest.raises(BadInput, match="do not fit"):
        data.graph("cora")


# --- downloads

CONTENT = b"some text\n" * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(CONTENT) + (500 if self.path == "/short" else 0)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def left(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_download_is_cached_and_checked(mirror: Path, address: str, tmp_path: Path) -> None:
    remote = Remote("set/file.txt", f"{address}/file", hashlib.md5(CONTENT).hexdigest())
    path = store.obtain(remote, "call")
    assert path.read_bytes() == CONTENT
    assert left(tmp_path / "cache") == [path]
    assert store.obtain(Remote("set/file.txt", "http://127.0.0.1:9/gone"), "call") == path


@pytest.mark.parametrize(
    ("where", "md5", "why"),
    [
        ("/file", "0" * 32, "upstream publishes 0000"),
        ("/short", None, "connection broke|IncompleteRead"),
        ("/none", None, "failed: Not Found"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(
    where: str, md5: str | None, why: str, mirror: Path, address: str, tmp_path: Path
) -> None:
    with pytest.raises(MissingData, match=why) as caught:
        store.obtain(Remote("set/file.txt", address + where, md5), 'neurarium.data.text("x")')
    assert 'neurarium.data.text("x")' in str(caught.value)
    assert address in str(caught.value)
    assert left(tmp_path / "cache") == []


def test_without_a_network_the_call_and_the_address_are_named(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise store.urllib.error.URLError("no network")

    monkeypatch.setattr(store.urllib.request, "urlopen", refuse)
    with pytest.raises(MissingData, match="no network") as caught:
        data.images("fashion-mnist")
    assert 'neurarium.data.images("fashion-mnist")' in str(caught.value)
    assert "train-images-idx3-ubyte.gz" in str(caught.value)
    with pytest.raises(MissingData, match=r"restoration-images\.zip"):
        data.photos("set5")


def test_an_unwritable_cache_is_explained(mirror: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(MissingData, match="saving it as"):
        store.obtain(Remote("set/file.txt", f"{address}/file"), "call")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "c:/x"])
def test_names_cannot_leave_the_data_folder(path: str, mirror: Path) -> None:
    with pytest.raises(BadInput):
        store.locate(path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x"])
def test_only_http_is_downloaded(url: str, mirror: Path) -> None:
    with pytest.raises(BadInput, match="only http"):
        store.obtain(Remote("x", url), "call")


def test_a_mirror_that_is_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEURARIUM_DATA", str(tmp_path / "absent"))
    with pytest.raises(BadInput, match="NEURARIUM_DATA"):
        data.images("mnist")
