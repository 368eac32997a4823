"""The site as files: what is on its pages, and whether every link leads somewhere."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from neurarium import catalog, site
from neurarium.errors import BadInput
from neurarium.site.diagram import diagram, from_mermaid
from neurarium.site.docstrings import markdown, split, told


class Links(HTMLParser):
    """Addresses, ids, pictures without words, and headings of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.to: list[str] = []
        self.ids: set[str] = set()
        self.mute: list[str] = []
        self.headings: list[int] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        self.ids |= {said[name] for name in ("id", "name") if said.get(name)}
        if tag == "a" and said.get("href"):
            self.to.append(said["href"])
        if tag in ("img", "script", "link", "iframe", "source") and (at := said.get("src") or said.get("href")):
            self.loads.append(at)
        if tag == "img" and said.get("alt") is None:
            self.mute.append(str(said.get("src")))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def parsed(built) -> dict[Path, Links]:
    pages = {}
    for file in built.folder.rglob("*.html"):
        pages[file] = Links()
        pages[file].feed(file.read_text(encoding="utf-8"))
    return pages


def text(built, page: str) -> str:
    return (built.folder / page).read_text(encoding="utf-8")


def test_it_is_built_in_under_90_seconds(built):
    assert built.seconds < 90


def test_every_paper_has_a_page_and_a_card(built):
    cards = text(built, "index.html")
    for paper in catalog.load():
        assert f'href="papers/{paper.room}/{paper.id}.html"' in cards
        assert (built.folder / "papers" / paper.room / f"{paper.id}.html").is_file()


def test_no_internal_link_is_broken(built, parsed):
    broken = []
    for file, links in parsed.items():
        if file.name == "404.html":
            continue  # its links are absolute, from whatever address was wrong
        for address in [*links.to, *links.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchor = "" if target.name == "index.html" else unquote(parts.fragment)  # the gallery's own script reads it there
            if not target.is_file() or (anchor and target in parsed and anchor not in parsed[target].ids):
                broken.append((str(file.relative_to(built.folder)), address))
    assert not broken, f"{len(broken)} broken links: {broken[:20]}"


def test_nothing_is_loaded_from_elsewhere(parsed):
    assert {at for links in parsed.values() for at in links.loads if urlsplit(at).scheme not in ("", "data")} == set()


def test_pictures_have_words_and_headings_are_in_order(built, parsed):
    for file, links in parsed.items():
        assert not links.mute, (file, links.mute)
        assert links.headings.count(1) == 1, file
        if "reference" not in file.parts:  # there, the code's own nesting decides
            steps = [b - a for a, b in zip(links.headings, links.headings[1:])]
            assert max(steps, default=0) <= 1, (file, links.headings)


def test_what_a_catalog_says_is_escaped(built):
    for page in ("index.html", "papers/learn/demo-held.html", "rooms/learn.html"):
        assert "<script>alert" not in text(built, page)
    assert "Tidal &lt;b&gt;Averaging&lt;/b&gt; of Gradients &amp; Weights" in text(built, "index.html")
    assert "</script" not in text(built, "assets/atlas-index.js")


def test_a_measured_paper_shows_what_its_record_holds(built):
    page = text(built, "papers/learn/demo-held.html")
    for words in ("✓", "≈", "the demo is small", "fails, as it must", "half the loss", "Generated data", "demo-held.png"):
        assert words in page, words
    assert 'class="pill held"' in page and 'class="pill weaker"' in page and 'class="pill failed"' in page
    assert "neurarium run demo-held" in page.replace('<span class="w"> </span>', " ")
    assert "the tide is a sine" in page and "demo-held-2024" in page
    assert "Which of the two is quicker?" in page, "comparisons are linked from their members"
    assert (built.folder / "papers/learn/demo-held.png").read_bytes()[:4] == b"\x89PNG"


def test_no_verdict_or_figure_without_a_record(built):
    page = text(built, "papers/learn/demo-works.html")
    assert not re.search(r'class="pill (held|weaker|failed)"', page.partition('id="neighbours"')[0])
    assert "<figure" not in page and "no published record yet" in page
    planned = next(p for p in catalog.load() if p.status == "planned" and not p.use)
    page = text(built, f"papers/{planned.room}/{planned.id}.html")
    assert "<figure" not in page and "This paper is planned" in page and "@misc" in page


def test_the_scoreboard_hides_no_failure(built):
    page = text(built, "scoreboard.html")
    assert "needs no more memory" in page and "the loss is a tenth" in page and "the demo is small" in page


def test_a_comparison_has_its_table_and_figure(built):
    page = text(built, "comparisons/demo-compare.html")
    assert "demo-compare.png" in page and "tidal" in page and "neurarium" in page
    assert "demo-compare.html" in text(built, "comparisons/index.html")


def test_a_room_shows_its_engine_from_the_code(built):
    page = text(built, "rooms/learn.html")
    assert 'class="diagram"' in page and "mono_forward" in page and "Which one to pick" in page


def test_the_index_is_a_script_that_holds_every_paper(built):
    script = text(built, "assets/atlas-index.js")
    rows = json.loads(script.removeprefix("window.NEURARIUM = ").rstrip(";\n"))
    assert {row["id"] for row in rows} >= {paper.id for paper in catalog.load()}
    assert next(row for row in rows if row["id"] == "demo-held")["methods"] == "Tidal"


def test_a_folder_that_is_no_site_is_not_emptied(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        site.build(tmp_path)
    with pytest.raises(BadInput, match="no built site"):
        site.serve(tmp_path)


def test_it_is_served_on_this_machine_alone(built):
    with site.serve(built.folder, 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/index.html", timeout=10) as answer:
                assert answer.status == 200 and b"neurarium" in answer.read()
        finally:
            server.shutdown()


def test_docstrings_become_markdown():
    said = split(
        "One. line\n\nIdea with :class:`~a.b.C` and ``x``.\n\n    y = x * 2\n\n*Source*: here.\n\n*Departures.* None, a * b.\n*Cost*: O(n)."
    )
    assert said.title == "One. line" and "`C`" in said.idea and "\n\n    y = x * 2" in said.idea
    assert said.parts["source"] == "Here." and said.parts["departures"].startswith("None") and said.parts["cost"] == "O(n)."
    assert markdown(r"a :math:`\frac1T` b").count("<math") == 1
    assert "a &lt; b" in markdown("a < b") and markdown("the *shape* of") == "the *shape* of"


@pytest.mark.parametrize("paper", [p for p in catalog.load() if p.use and p.package == "neurarium"], ids=lambda p: p.id)
def test_every_method_tells_its_idea_source_and_departures(paper):
    said = told(str(paper.use))
    assert said.idea and said.parts.get("source") and said.parts.get("departures")


def test_diagrams_stand_above_what_they_point_to_and_are_escaped():
    svg = diagram({"a": ("A<", ""), "b": ("B", "words")}, [("a", "b")], title="T")
    y = [float(v) for v in re.findall(r'<rect x="[\d.]+" y="([\d.]+)"', svg)]
    assert y[0] < y[1] and "A&lt;" in svg and "A<<" not in svg
    svg = from_mermaid('flowchart TD\n  a["one"]\n  b["two: words"]\n  a --> b & c --> d\n', "T")
    assert svg.count("<rect") == 4 and svg.count('class="edge"') == 4
    assert diagram({"a": ("A", ""), "b": ("B", "")}, [("a", "b"), ("b", "a")], title="circle").count("<rect") == 2


def test_the_reference_shows_each_thing_once(built):
    page = text(built, "reference/learn.html")
    assert 'id="neurarium.learn.mono_forward.MonoForward"' in page and page.count('class="doc doc-heading"') == len(
        set(re.findall(r'<h\d id="([^"]+)" class="doc doc-heading"', page))
    )
    assert 'id="neurarium.learn.MonoForward"' not in re.sub(r"<a id=[^>]*>", "", page)
