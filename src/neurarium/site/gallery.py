"""The landing page: the chart, the filters and one card a paper; and the index that the page's search reads."""

from __future__ import annotations

import json
from collections import Counter

from neurarium.catalog import ROLES, Paper
from neurarium.site.chart import chart
from neurarium.site.facts import VERDICTS, Atlas, Facts, order
from neurarium.site.markup import badges, e, hue, size, stack
from neurarium.site.rooms import room

__all__ = ["gallery", "index"]


def index(atlas: Atlas) -> str:
    """What the search looks through, as a script, because a page from ``file://`` may not fetch."""
    rows = []
    for one in atlas.facts:
        paper = one.entry
        assert isinstance(paper, Paper)
        names = [name.rpartition(":")[2] for name in (paper.use, *paper.also) if name]
        rows.append(
            {
                "id": paper.id,
                "title": paper.title,
                "methods": " ".join(names),
                "summary": paper.summary,
                "room": f"{paper.room} {room(paper.room).name}",
                "role": paper.role,
                "claims": " ".join(claim.says for claim in paper.claims),
            }
        )
    data = json.dumps(rows, ensure_ascii=True, separators=(",", ":")).replace("</", "<\\/")
    return f"window.NEURARIUM = {data};\n"


def gallery(atlas: Atlas) -> str:
    """The page's content, HTML all through."""
    papers = sorted(atlas.facts, key=order)
    rooms = list(atlas.rooms)
    totals = Counter(v.verdict for one in papers for v in one.verdicts)
    measured = sum(one.record is not None for one in papers)
    works = sum(one.status != "planned" for one in papers)
    verdicts = {name: totals[name] for name in VERDICTS if totals[name]}
    words = e(", ".join(f"{n} {name}" for name, n in verdicts.items()))
    tally = f'<a class="tally" href="scoreboard.html">{stack(verdicts, "Claims measured")}<span>{words}</span></a>' if verdicts else ""
    figures = {"papers": len(papers), "work": works, "measured": measured, "claims judged": sum(verdicts.values())}
    said = " · ".join(f"<b>{count}</b> {name}" for name, count in figures.items())
    charts = chart(atlas.rooms, width=860, height=560, kind="wide") + chart(atlas.rooms, width=480, height=900, kind="tall")
    head = (
        '<section class="hero"><div class="hero__words"><h1>Papers you can run, claims you can check</h1>'
        "<p>Neural-network papers as working, composable PyTorch parts. Each claim is measured again on a laptop, against its baseline, "
        "and what does not hold is shown as plainly as what does.</p>"
        f'<p class="hero__facts">{said}</p>{tally}'
        '<p class="hero__go"><a class="go" href="guides/start.html">Start in five minutes</a> '
        '<a href="scoreboard.html">See the scoreboard</a></p></div>'
        f'<div class="hero__chart">{charts}</div></section>'
    )
    cards = "".join(_card(one, hue(rooms, one.entry.room), atlas) for one in papers)
    return (
        f'{head}<section class="finder" aria-label="Find a paper">{_tools(atlas, papers, rooms)}</section>'
        f'<h2 class="visually-hidden" id="papers">Papers</h2><ul class="cards" id="cards">{cards}</ul>'
        '<p class="none" id="none" hidden>No paper matches. <button type="button" class="reset">Show all papers</button></p>'
    )


def _tools(atlas: Atlas, papers: list[Facts], rooms: list[str]) -> str:
    chips = "".join(
        f'<button type="button" class="chip" data-room="{r}" aria-pressed="false" style="--hue:{hue(rooms, r)}">'
        f"{e(room(r).name)} <small>{len(atlas.rooms[r])}</small></button>"
        for r in rooms
    )
    roles = Counter(getattr(one.entry, "role", "") for one in papers)
    statuses = Counter(one.status for one in papers)
    found = Counter(name for one in papers for name in one.counts)
    return (
        '<div class="bar"><label class="visually-hidden" for="q">Search papers</label>'
        '<input id="q" type="search" placeholder="Search titles, methods, ideas" autocomplete="off" spellcheck="false" '
        'aria-describedby="keys">'
        '<kbd aria-hidden="true">/</kbd>'
        + _select("role", "Role", [(r, r, roles[r]) for r in ROLES if roles[r]])
        + _select("status", "Status", [(s, s, statuses[s]) for s in ("measured", "works", "planned") if statuses[s]])
        + _select("verdict", "Verdict", [(v, f"some claim {v}", found[v]) for v in VERDICTS if v != "not judged"])
        + '<button type="button" class="reset" hidden>Reset</button></div>'
        f'<div class="chips" role="group" aria-label="Room">{chips}</div>'
        '<p class="count"><span id="count" role="status" aria-live="polite"></span>'
        '<span id="keys"><kbd>/</kbd> search <kbd>←</kbd><kbd>↑</kbd><kbd>↓</kbd><kbd>→</kbd> move <kbd>Enter</kbd> open '
        "<kbd>Esc</kbd> clear</span></p>"
    )


def _select(name: str, label: str, options: list[tuple[str, str, int]]) -> str:
    items = "".join(f'<option value="{e(value)}">{e(words)} ({count})</option>' for value, words, count in options)
    chosen = f'<select id="{name}" data-filter="{name}"><option value="">any</option>{items}</select>'
    return f'<label class="pick"><span>{label}</span>{chosen}</label>'


def _card(one: Facts, tint: int, atlas: Atlas) -> str:
    paper = one.entry
    assert isinstance(paper, Paper)
    picture = ""
    if one.thumbnail:
        picture = f'<img src="{one.thumbnail}" alt="" {size(atlas.figures[one.thumbnail])} loading="lazy" decoding="async">'
    data = {"id": paper.id, "room": paper.room, "role": paper.role, "status": one.status}
    verdicts = " ".join(name.replace(" ", "-") for name in one.counts)
    attributes = " ".join(f'data-{name}="{value}"' for name, value in (data | {"verdict": verdicts}).items())
    summary = f"<p>{e(paper.summary)}</p>" if paper.summary else ""
    return (
        f'<li class="card {one.status}" style="--hue:{tint}" {attributes}>{picture}<div class="card__body">'
        f'<p class="meta"><span class="dot" aria-hidden="true"></span>{e(room(paper.room).name)} · {paper.role}'
        f'{f" · {paper.year}" if paper.year else ""}</p><h3><a href="{one.url}">{e(paper.title)}</a></h3>{summary}'
        f'<p class="badges">{badges(one)}</p></div></li>'
    )
