"""Images with classes, and photographs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neurarium.data.files import open_zip, read_idx, read_member, read_pickle, read_tar
from neurarium.data.registry import fetch, find
from neurarium.data.store import atomic, cache_dir
from neurarium.data.tensors import TensorData, generator, stratified
from neurarium.errors import BadInput, MissingExtra

__all__ = ["ImageTask", "images", "photos"]

Array = np.ndarray[Any, Any]
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, eq=False)
class ImageTask:
    """A classification task: x float32 (n, channels, height, width) in [0, 1], y int64 (n,) in 0..classes-1."""

    name: str
    train: TensorData
    test: TensorData
    classes: int
    note: str = ""  # what differs from the published set, for the evidence line of a record

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w


def images(name: str, *, train: int | None = None, test: int | None = None, size: int | None = None, seed: int = 0) -> ImageTask:
    """``digits``, ``mnist``, ``fashion-mnist`` or ``cifar10``, with its published split.

    ``train`` and ``test`` take a subset of so many images, with the class shares of the whole, chosen and ordered by ``seed``;
    ``size`` resizes to size x size by averaging areas. scikit-learn's digits have no published split: a fixed, stratified fifth is
    the test set, whatever the seed. Same arguments, same tensors.
    """
    source = find(name, "images")
    if source.name == "digits":
        arrays, note = _digits(), ""
    elif source.name == "cifar10":
        arrays, note = _cifar10(fetch(source))
    else:
        arrays, note = _idx(fetch(source)), ""
    x_train, y_train, x_test, y_test = arrays
    classes = int(y_train.max()) + 1
    return ImageTask(name, _prepare(x_train, y_train, train, size, seed), _prepare(x_test, y_test, test, size, seed), classes, note)


def _prepare(x: Array, y: Array, n: int | None, size: int | None, seed: int) -> TensorData:
    labels = torch.from_numpy(y.astype(np.int64))
    rows: Tensor | None = None
    if n is not None:
        rows = stratified(labels, n, seed)
        x, labels = x[rows.numpy()], labels[rows]
    pixels = torch.from_numpy(np.ascontiguousarray(x))
    pixels = pixels.float().div_(255.0) if pixels.dtype == torch.uint8 else pixels.float()
    if size is not None:
        if size < 1:
            raise BadInput(f"size must be at least 1, got {size}")
        pixels = F.interpolate(pixels, size=(size, size), mode="area")
    return TensorData(pixels, labels)


def _digits() -> tuple[Array, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[:, None] / 16.0).astype(np.float32), digits.target.astype(np.int64)
    test = stratified(torch.from_numpy(y), 360, seed=0).numpy()
    train = np.setdiff1d(np.arange(len(y)), test)
    train = train[torch.randperm(len(train), generator=generator(0)).numpy()]
    return x[train], y[train], x[test], y[test]


def _idx(paths: tuple[Path, ...]) -> tuple[Array, ...]:
    x_train, y_train, x_test, y_test = (read_idx(p) for p in paths)
    for x, y, path in ((x_train, y_train, paths[0]), (x_test, y_test, paths[2])):
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or x.dtype != np.uint8 or len(x) == 0:
            raise BadInput(f"{path.name}: images {x.shape} {x.dtype} and labels {y.shape} do not belong together")
    return x_train[:, None], y_train, x_test[:, None], y_test


def _cifar10(paths: tuple[Path, ...]) -> tuple[tuple[Array, ...], str]:
    (path,) = paths
    if path.suffix == ".zip":
        return _cifar10_jpeg(path), "re-encoded JPEG copy of CIFAR-10"
    folder = "cifar-10-batches-py"
    names = tuple(f"{folder}/{b}" for b in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"))
    parts = []
    for name, raw in read_tar(path, names).items():
        batch = read_pickle(raw, name)
        x: Any = batch.get("data") if isinstance(batch, dict) else None
        y: Any = batch.get("labels") if isinstance(batch, dict) else None
        pixels = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == 3072
        if not pixels or not isinstance(y, list) or len(y) != len(x) or not all(v in range(10) for v in y):
            raise BadInput(f"{path.name}: {name} holds no images and labels")
        parts.append((name, x.reshape(-1, 3, 32, 32), np.asarray(y, np.int64)))
    parts.sort(key=lambda p: names.index(p[0]))
    *train, test = parts
    return (np.concatenate([p[1] for p in train]), np.concatenate([p[2] for p in train]), test[1], test[2]), ""


def _cifar10_jpeg(path: Path) -> tuple[Array, ...]:
    """``train|test/CLASS/NNNN.jpg``, decoded once and kept in the cache; shuffled, since the archive is sorted by class."""
    with open_zip(path) as archive:
        pictures = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        names = {split: [n for n in pictures if n.startswith(f"{split}/")] for split in ("train", "test")}
        print_ = hashlib.sha256(repr([(i.filename, i.CRC) for i in archive.infolist()]).encode()).hexdigest()[:16]
        arrays: list[Array] = []
        for split, members in names.items():
            if not members or any(m.split("/")[1] not in CIFAR10 for m in members):
                raise BadInput(f"{path.name}: {split}/ must hold .jpg files in folders named {', '.join(CIFAR10)}")
            order = torch.randperm(len(members), generator=generator(0)).tolist()
            members = [members[i] for i in order]
            x = _cached(cache_dir() / "decoded" / f"cifar10-{split}-{print_}.npy", len(members))
            if x is None:
                x = np.stack([_rgb(read_member(archive, m, 1 << 20)) for m in members])
                if x.shape[1:] != (3, 32, 32):
                    raise BadInput(f"{path.name}: images are {x.shape[1:]}, not (3, 32, 32)")
                _keep(cache_dir() / "decoded" / f"cifar10-{split}-{print_}.npy", x)
            arrays += [x, np.array([CIFAR10.index(m.split("/")[1]) for m in members])]
    return tuple(arrays)


def _cached(path: Path, n: int) -> Array | None:
    with suppress(OSError, ValueError, EOFError):
        x = np.load(path, allow_pickle=False)
        if isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape == (n, 3, 32, 32):
            return x
    return None


def _keep(path: Path, x: Array) -> None:
    with suppress(OSError), atomic(path) as out:  # a cache that cannot be written costs time, not the data
        np.save(out, x, allow_pickle=False)


def _rgb(data: bytes) -> Array:
    return np.asarray(_decode(data).convert("RGB")).transpose(2, 0, 1)


def _decode(data: bytes) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("pillow", "images") from None
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP"))
        picture.load()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"not a readable picture ({error})") from error
    return picture


_SKIMAGE = ("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "moon", "page", "rocket", "text")


def photos(name: str = "scikit-image") -> Mapping[str, Tensor]:
    """Photographs by name, each float32 (channels, height, width) in [0, 1], 1 (grey) or 3 channels, sizes as they come.

    ``scikit-image`` (embedded, needs the extra ``images``) or the restoration test sets ``set5``, ``set12``, ``set14``, ``bsd68``.
    """
    source = find(name, "photos")
    if source.embedded:
        try:
            from skimage import data
        except ImportError:
            raise MissingExtra("scikit-image", "images") from None
        return {n: _photo(np.asarray(getattr(data, n)())) for n in _SKIMAGE}
    (path,) = fetch(source)
    found: dict[str, Tensor] = {}
    with open_zip(path) as archive:
        for member in sorted(archive.namelist()):
            folder, _, file = member.rpartition("/")
            if folder.lower() == name and file.lower().endswith((".png", ".bmp", ".jpg")):
                picture = _decode(read_member(archive, member))
                found[file.rpartition(".")[0]] = _photo(np.asarray(picture if picture.mode == "L" else picture.convert("RGB")))
    if not found:
        raise BadInput(f"{path.name}: holds no pictures of {name}")
    return found


def _photo(pixels: Array) -> Tensor:
    planes = pixels[None] if pixels.ndim == 2 else pixels[..., :3].transpose(2, 0, 1)
    return torch.from_numpy(planes.copy()).float().div_(255.0)
