"""BibTeX that BibTeX can read, and that claims nothing that the catalog does not know."""

from __future__ import annotations

import dataclasses
import re

import pytest

from neurarium import catalog


def fields(entry: str) -> dict[str, str]:
    """A small BibTeX reader: braces must balance, a value ends where its braces do."""
    head = re.match(r"@(\w+)\{([A-Za-z0-9:-]+),\n", entry)
    assert head
    found, at = {"type": head[1], "key": head[2]}, head.end()
    while entry[at] != "}":
        match = re.compile(r"\s*(\w+)\s*=\s*\{").match(entry, at)
        assert match, entry[at:]
        depth, start, at = 1, match.end(), match.end()
        while depth:
            if entry[at] == "\\":
                at += 1
            elif entry[at] in "{}":
                depth += 1 if entry[at] == "{" else -1
            at += 1
        found[match[1]] = entry[start : at - 1]
        at += entry[at] == ","
        at += len(re.match(r"\s*", entry[at:])[0])
    assert entry[at:] == "}"
    return found


def test_every_paper_makes_a_readable_entry():
    keys = []
    for paper in catalog.load():
        entry = fields(paper.bibtex())
        keys.append(entry["key"])
        assert "author" not in entry
        assert entry["type"] == "misc"
        if paper.arxiv:
            assert entry["eprint"] == paper.arxiv
            assert entry["url"].endswith(paper.arxiv)
        else:
            assert "eprint" not in entry
            assert "to be completed" in entry["note"]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("title", "tex"),
    [
        ("Poincaré ResNet", r"Poincar{\'e} {ResNet}"),
        ("50 % of R&D_x", r"50 \% of {R\&D\_x}"),
        (r"{a} \b $c$ #1 ~ ^", r"\{a\} \textbackslash{}b \$c\$ \#1 \textasciitilde{} \textasciicircum{}"),
        ("GradCAM++: Sharper", r"{GradCAM++:} Sharper"),
        ("Sharpness – or “not”", "Sharpness -- or ``not''"),
    ],
)
def test_titles_are_escaped_and_their_capitals_kept(title: str, tex: str):
    paper = dataclasses.replace(catalog.load().get("sltt"), title=title)
    assert fields(paper.bibtex())["title"] == tex


def test_a_paper_without_year_and_number():
    paper = dataclasses.replace(catalog.load().get("sltt"), year=None, arxiv=None)
    entry = fields(paper.bibtex())
    assert entry["key"] == "sltt"
    assert "year" not in entry
