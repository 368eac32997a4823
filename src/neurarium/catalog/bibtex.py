"""BibTeX of a catalog entry, from what the catalog knows: title, year and arXiv number.

Authors are not in the catalog and none are invented: the entry has no author field, and its note says so.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurarium.catalog.schema import Paper

__all__ = ["bibtex", "escape"]

_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u2013": "--", "\u2014": "---", "\u2018": "`", "\u2019": "'",
    "\u201c": "``", "\u201d": "''",
}  # fmt: skip
_ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u030a": "r ", "\u030c": "v ", "\u0327": "c "}


def bibtex(paper: Paper) -> str:
    """One entry: ``@misc`` with eprint and URL where the arXiv number is known, ``@misc`` with a note otherwise."""
    fields = {"title": protect(paper.title)}
    if paper.year is not None:
        fields["year"] = str(paper.year)
    if paper.arxiv is not None:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{paper.arxiv}"}
        fields["note"] = "Authors: see the arXiv page"
    else:
        fields["note"] = "Title and year as listed by neurarium; authors and venue to be completed"
    body = ",\n".join(f"  {name:<13} = {{{value}}}" for name, value in fields.items())
    key = paper.id if paper.year is None else f"{paper.id}-{paper.year}"
    return f"@misc{{{key},\n{body}\n}}"


def escape(text: str) -> str:
    """The text with TeX's special characters escaped and accented letters as TeX commands, which classic BibTeX needs to sort them."""
    return "".join(_ESCAPES.get(character) or _accented(character) for character in text)


def _accented(character: str) -> str:
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        return f"{{\\{_ACCENTS[parts[1]]}{parts[0]}}}"
    return character


def protect(title: str) -> str:
    """The escaped title, with braces around each word that has a capital after its first letter, so that styles keep its case."""
    return " ".join(f"{{{escape(word)}}}" if re.search(r".[A-Z]", word) else escape(word) for word in title.split(" "))
