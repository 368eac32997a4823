"""Text: corpora to model, messages and news to classify."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neurarium.data.files import open_zip, read_member, read_text
from neurarium.data.registry import fetch, find
from neurarium.data.tensors import stratified
from neurarium.errors import BadInput

__all__ = ["TextTask", "Texts", "text"]


@dataclass(frozen=True, eq=False)
class Texts:
    """Documents in order, with their labels int64 (n,) where there are any."""

    documents: tuple[str, ...]
    labels: Tensor | None = None

    @property
    def text(self) -> str:
        """All documents, one after another."""
        return "\n".join(self.documents)

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True, eq=False)
class TextTask:
    """A corpus (one document a part, no labels) or labelled documents (``classes`` names the labels)."""

    name: str
    train: Texts
    valid: Texts
    test: Texts
    classes: tuple[str, ...] = ()
    note: str = ""

    @property
    def characters(self) -> str:
        """Every character that occurs, sorted: the vocabulary of a character model."""
        return "".join(sorted({c for part in (self.train, self.valid, self.test) for d in part.documents for c in d}))

    def encode(self, string: str) -> Tensor:
        """Positions in :attr:`characters`, int64 (len(string),)."""
        table = {c: i for i, c in enumerate(self.characters)}
        unknown = sorted(set(string) - set(table))
        if unknown:
            raise BadInput(f"{self.name} has no character {unknown[0]!r}")
        return torch.tensor([table[c] for c in string], dtype=torch.int64)

    def decode(self, codes: Tensor) -> str:
        """The inverse of :meth:`encode`."""
        characters = self.characters
        return "".join(characters[i] for i in codes.tolist())


def text(name: str, *, seed: int = 0) -> TextTask:
    """``tiny-shakespeare``, ``wikitext-2`` (corpora), ``sms-spam`` or ``ag-news`` (labelled).

    tiny-shakespeare is cut at 90 and 95 %. WikiText-2 has its own parts; where a mirror lacks the train file, its valid file is cut
    at 90 % into train and valid, and the note says so. The labelled sets are split 80/10/10 by ``seed`` with equal class shares.
    """
    source = find(name, "text")
    paths = fetch(source)
    if name == "tiny-shakespeare":
        whole = read_text(paths[0])
        a, b = int(0.9 * len(whole)), int(0.95 * len(whole))
        return TextTask(name, Texts((whole[:a],)), Texts((whole[a:b],)), Texts((whole[b:],)), note=source.note)
    if name == "wikitext-2":
        parts = [read_text(p) for p in paths]
        note = source.note
        if len(parts) == 2:
            cut = parts[0].rfind("\n", 0, int(0.9 * len(parts[0]))) + 1
            parts = [parts[0][:cut], parts[0][cut:], parts[1]]
            note += "; no train file here: trained on 90 % of its valid file, validated on the rest"
        first, second, third = (Texts((p,)) for p in parts)
        return TextTask(name, first, second, third, note=note)
    documents, labels, classes = _sms(paths[0]) if name == "sms-spam" else _ag_news(paths[0])
    y = torch.tensor(labels)
    order = stratified(y, len(y), seed)
    held = stratified(y, round(0.2 * len(y)), seed)
    rest = order[~torch.isin(order, held)]
    valid = held[stratified(y[held], len(held) // 2, seed)]
    test = held[~torch.isin(held, valid)]
    train_part, valid_part, test_part = (Texts(tuple(documents[i] for i in rows.tolist()), y[rows]) for rows in (rest, valid, test))
    return TextTask(name, train_part, valid_part, test_part, classes, source.note)


def _sms(path: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    if path.suffix == ".zip":
        with open_zip(path) as archive:
            raw = read_member(archive, "SMSSpamCollection").decode("utf-8", "replace")
    else:
        raw = read_text(path)
    classes = ("ham", "spam")
    pairs = [line.split("\t", 1) for line in raw.split("\n") if line.strip()]
    bad = next((i for i, p in enumerate(pairs) if len(p) != 2 or p[0] not in classes), None)
    if bad is not None or not pairs:
        raise BadInput(f"{path.name}: line {bad} is not 'ham' or 'spam', a tab and a message")
    return [p[1].rstrip("\r") for p in pairs], [classes.index(p[0]) for p in pairs], classes


def _ag_news(path: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    rows = list(csv.reader(read_text(path).splitlines()))
    bad = next((i for i, r in enumerate(rows) if len(r) != 3 or r[0] not in "1234"), None)
    if bad is not None or not rows:
        raise BadInput(f"{path.name}: row {bad} is not a class 1..4, a title and a text")
    return [f"{r[1]}\n{r[2]}" for r in rows], [int(r[0]) - 1 for r in rows], ("world", "sports", "business", "science")
