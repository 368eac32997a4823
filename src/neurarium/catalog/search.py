"""Ranked full-text search: BM25 over weighted fields, tolerant of word endings and of small typos.

A query word matches an indexed word when both share a stem (weight 1), when it is the beginning of it (0.8, from two letters on) or
when they are within one edit from five letters on, two from nine letters on (0.6), so that ``quantise``, ``quantization`` and
``quantzation`` find the same papers. Each query word counts with its best match in a paper; scores add over query words.

*Source*: S. Robertson and H. Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, equation 3.15, with field weights
applied to the term frequencies as in BM25F.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache

__all__ = ["Index"]

WEIGHTS = {"id": 4.0, "title": 3.0, "role": 2.0, "room": 2.0, "summary": 1.0, "claims": 0.5}
K1, B = 1.2, 0.5
MAX_WORDS = 32  # of a query
_STOP = frozenset({"a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "into", "is", "it", "its", "of", "on", "or", "that",
                   "the", "this", "to", "via", "with"})  # fmt: skip
_WORD = re.compile(r"[a-z0-9]+")


class Index:
    """An inverted index over documents given as ``{field: text}``."""

    def __init__(self, documents: Iterable[Mapping[str, str]]) -> None:
        self._postings: dict[str, dict[int, float]] = defaultdict(dict)  # stem -> document -> weighted frequency
        lengths: list[float] = []
        for number, document in enumerate(documents):
            counts: Counter[str] = Counter()
            for name, text in document.items():
                for word in words(text):
                    counts[stem(word)] += WEIGHTS[name]  # type: ignore[assignment]
            for word, count in counts.items():
                self._postings[word][number] = count
            lengths.append(float(sum(counts.values())))
        self._lengths = lengths
        self._mean = sum(lengths) / len(lengths) if lengths else 1.0

    def search(self, query: str, *, limit: int = 20) -> list[tuple[int, float]]:
        """The best documents as (number, score), best first; ties keep the order of the documents."""
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(words(query)[:MAX_WORDS]):
            best: dict[int, float] = {}
            for term, weight in self._matches(stem(word)):
                postings = self._postings[term]
                rarity = math.log(1 + (len(self._lengths) - len(postings) + 0.5) / (len(postings) + 0.5))
                for number, count in postings.items():
                    norm = count + K1 * (1 - B + B * self._lengths[number] / self._mean)
                    best[number] = max(best.get(number, 0.0), weight * rarity * count * (K1 + 1) / norm)
            for number, score in best.items():
                scores[number] += score
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]

    def _matches(self, word: str) -> list[tuple[str, float]]:
        found = {word: 1.0} if word in self._postings else {}
        if len(word) >= 2:
            found |= {term: 0.8 for term in self._postings if term.startswith(word) and term != word}
        if not found and len(word) >= 5:
            edits = 2 if len(word) >= 9 else 1
            found = {term: 0.6 for term in self._postings if abs(len(term) - len(word)) <= edits and within(word, term, edits)}
        return list(found.items())


def words(text: str) -> list[str]:
    """Lower-case words without accents and without the commonest function words."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return [word for word in _WORD.findall(plain) if word not in _STOP]


_ENDINGS = ("izations", "isations", "ization", "isation", "izing", "ising", "ized", "ised", "izes", "ises", "ize", "ise", "ations",
            "ation", "ings", "ing", "ions", "ion", "ies", "ers", "er", "ed", "es", "s", "e", "y")  # fmt: skip


@lru_cache(maxsize=8192)
def stem(word: str) -> str:
    """A word without its commonest English ending, never shorter than four letters: crude, and the same for query and document."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def within(a: str, b: str, edits: int) -> bool:
    """Whether two words are within this many insertions, deletions, substitutions or swaps of neighbours of each other."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > edits:
            return False
    return row[-1] <= edits
