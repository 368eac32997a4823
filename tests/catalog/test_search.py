"""Search finds what a person means, in a sensible order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurarium import catalog
from neurarium.catalog.search import Index, stem, within


def ids(query: str, limit: int = 20) -> list[str]:
    return [paper.id for paper, _ in catalog.load().search(query, limit=limit)]


@pytest.mark.parametrize("paper", ["sltt", "chita", "jei-dnn", "ar-net", "phnn", "root", "poincare-resnet", "mono-forward", "causal-pinn"])
def test_an_id_finds_its_paper_first(paper: str):
    assert ids(paper)[0] == paper


def test_every_title_finds_its_paper_among_the_first_two():
    papers = catalog.load()
    missed = [p.id for p in papers if p.id not in ids(p.title, 2)]
    assert missed == []


def test_word_endings_prefixes_accents_and_typos_do_not_matter():
    assert ids("prune")[:5] == ids("pruning")[:5]
    assert ids("Poincaré") == ids("poincare")
    assert "sltt" in ids("spik memory backprop", 3)  # beginnings of words
    assert "smooth-gradcampp" in ids("gradcam", 3)
    assert set(ids("quantzation")) & set(ids("quantization"))  # a letter is missing
    assert set(ids("reinforcment lerning")) & set(ids("reinforcement learning"))


def test_room_and_role_are_searched():
    papers = catalog.load()
    assert all(papers.get(id).role == "optimizer" or "optim" in papers.get(id).title.lower() for id in ids("optimizer", 5))
    assert papers.get(ids("spiking policy")[0]).room == "spiking"


def test_nothing_and_nonsense_find_nothing():
    assert ids("") == []
    assert ids("the of and") == []
    assert ids("zzzzqqqq") == []
    assert ids("'; -- \x00\x1b[ \u202e") == []
    assert len(ids("neural " * 10_000)) == 20


def test_scores_are_those_of_bm25():
    documents = ["alpha", "alpha beta", "beta beta gamma"]
    index = Index({"summary": text} for text in documents)
    k1, b, mean = 1.2, 0.5, 2.0

    def score(count: float, length: float) -> float:
        rarity = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # both words are in two of three documents
        return rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * length / mean))

    assert dict(index.search("beta")) == pytest.approx({1: score(1, 2), 2: score(2, 3)})
    assert dict(index.search("alpha beta"))[1] == pytest.approx(2 * score(1, 2))


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_within_is_the_edit_distance(a: str, b: str):
    def distance(i: int, j: int) -> int:  # optimal string alignment, by its recursion
        if min(i, j) == 0:
            return max(i, j)
        best = min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            best = min(best, distance(i - 2, j - 2) + 1)
        return best

    exact = distance(len(a), len(b))
    assert [within(a, b, edits) for edits in (0, 1, 2)] == [exact <= edits for edits in (0, 1, 2)]


@pytest.mark.parametrize(
    "family", [("quantize", "quantise", "quantization", "quantisation", "quantized"), ("prune", "pruning", "pruned", "prunes")]
)
def test_a_word_family_has_one_stem(family: tuple[str, ...]):
    assert len({stem(word) for word in family}) == 1
