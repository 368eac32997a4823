"""The site in a real browser, from ``file://``. Every test also fails on a console error and on any request that leaves the disk."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser


def shown(page) -> list[str]:
    return page.eval_on_selector_all(".card:not([hidden])", "cards => cards.map(card => card.dataset.id)")


def wide(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_filters_narrow_the_cards_and_the_address_keeps_them(page, built):
    page.goto(built.url("index.html"))
    every = len(shown(page))
    page.click('.chip[data-room="learn"]')
    learn = shown(page)
    assert 0 < len(learn) < every and "demo-held" in learn
    page.select_option("#role", "learner")
    page.select_option("#verdict", "weaker")
    assert "demo-held" in shown(page) and "demo-works" not in shown(page)
    assert page.evaluate("location.hash") == "#room=learn&role=learner&verdict=weaker"
    assert "of" in page.text_content("#count")
    page.reload()
    assert "demo-held" in shown(page) and page.get_attribute('.chip[data-room="learn"]', "aria-pressed") == "true"
    page.select_option("#status", "planned")
    assert shown(page) == [] and page.is_visible("#none")
    page.click("#none .reset")
    assert len(shown(page)) == every and page.evaluate("location.hash") == ""


def test_a_shared_address_opens_filtered_and_nonsense_in_it_does_no_harm(page, built):
    page.goto(built.url("index.html") + "#q=tidal&status=measured")
    assert shown(page)[0] == "demo-held" and page.input_value("#q") == "tidal"
    page.goto(built.url("index.html") + "#role=nonsense&room=%3Cb%3E")
    assert shown(page) == [] and page.is_visible("#none")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("tidal averaging", "demo-held"),
        ("tidla", "demo-held"),  # a typo: two letters swapped
        ("mono forward", "mono-forward"),
        ("MonoForward", "mono-forward"),  # the name of a method
        ("monoforwrad", "mono-forward"),
        ("jei", "jei-dnn"),
        ("combinatorial pruning hessian", "chita"),
        ("hypercomplx", "phnn"),
    ],
)
def test_search_ranks_and_forgives_typos(page, built, query, first):
    page.goto(built.url("index.html"))
    page.fill("#q", query)
    assert first in shown(page)[:2], shown(page)[:5]


def test_search_in_the_browser_agrees_with_the_library(page, built):
    from neurarium import catalog

    page.goto(built.url("index.html"))
    for query in ("spiking", "quantization", "pruning", "causal"):
        page.fill("#q", query)
        ours = {paper.id for paper, _ in catalog.load().search(query, limit=5)}
        assert len(ours & set(shown(page)[:8])) >= min(3, len(ours)), (query, ours, shown(page)[:8])


def test_keyboard(page, built):
    page.goto(built.url("index.html"))
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("tidal")
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.closest('.card')?.dataset.id"
    assert page.evaluate(focused) == "demo-held"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    assert page.input_value("#q") == ""
    page.keyboard.press("ArrowDown")
    first = page.evaluate(focused)
    page.keyboard.press("ArrowRight")
    second = page.evaluate(focused)
    page.keyboard.press("ArrowDown")
    third = page.evaluate(focused)
    assert len({first, second, third}) == 3
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == second
    page.keyboard.press("Enter")
    page.wait_for_url("**/papers/**")


def test_the_chart_fades_what_a_filter_leaves_out(page, built):
    page.goto(built.url("index.html") + "#room=spiking")
    off = page.eval_on_selector_all(".chart.wide a[data-id]", "a => a.filter(x => x.classList.contains('off')).length")
    every = page.eval_on_selector_all(".chart.wide a[data-id]", "a => a.length")
    assert 0 < off < every and every - off == len(shown(page))


def test_a_paper_page_shows_its_figure_and_opens_its_code(page, built):
    page.goto(built.url("papers/learn/demo-held.html"))
    assert page.eval_on_selector("figure.record img", "img => img.complete && img.naturalWidth") > 400
    assert page.is_visible("table.claims svg.whisker")
    page.click("details.code summary >> nth=0")
    assert page.is_visible("details.code[open] pre")


def test_dark_mode(page, built):
    page.goto(built.url("index.html"))
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("label[for=__palette_1]")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [sum(int(v) for v in colour[4:-1].split(",")) for colour in (light, dark)]
    assert brightness[0] > 650 and brightness[1] < 150
    page.goto(built.url("papers/learn/demo-held.html"))
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark, "it is remembered on other pages"


def test_dark_mode_follows_the_system(page, built):
    page.emulate_media(color_scheme="dark")
    page.goto(built.url("scoreboard.html"))
    assert page.get_attribute("body", "data-md-color-scheme") == "slate"


PAGES = (
    "index.html", "papers/learn/demo-held.html", "papers/learn/mono-forward.html", "comparisons/demo-compare.html", "rooms/learn.html",
    "rooms/index.html", "scoreboard.html", "guides/measure.html", "guides/roles.html", "architecture.html", "reference/roles.html",
)  # fmt: skip


@pytest.mark.parametrize("where", PAGES)
def test_pages_fit_a_phone(page, built, where):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(built.url(where))
    assert wide(page) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("where", ["index.html", "papers/learn/demo-held.html", "scoreboard.html", "rooms/learn.html", "guides/roles.html"])
def test_accessibility(page, built, where, scheme):
    pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.goto(built.url(where))
    options = {
        "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"],
        "preload": False,  # it would ask for style sheets, which file:// refuses
        "resultTypes": ["violations"],
        "rules": {"landmark-unique": {"enabled": False}},  # the theme's copy buttons are landmarks of one name
    }
    found = Axe().run(page, options=options).response["violations"]
    said = [(v["id"], v["impact"], [(node["target"], node["failureSummary"]) for node in v["nodes"]][:4]) for v in found]
    assert not said, "\n".join(map(str, said))
