"""Small pieces of HTML that several pages share. What comes from a catalog or a record is escaped here."""

from __future__ import annotations

import html
import math
import posixpath
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from neurarium.catalog import Bound
from neurarium.errors import BadInput
from neurarium.site.facts import VERDICTS, Facts
from neurarium.site.rooms import room

if TYPE_CHECKING:
    from neurarium.lab import Verdict
    from neurarium.lab.report import Table

__all__ = ["badges", "card_list", "e", "framed", "hue", "link", "pill", "rel", "size", "stack", "table", "table_row", "whisker"]


def e(text: object) -> str:
    """Escaped, with line breaks as spaces."""
    return html.escape(" ".join(str(text).split()))


def rel(source: str, target: str) -> str:
    """The address of ``target`` as seen from the page ``source``, both below the site's root."""
    path, mark, anchor = target.partition("#")
    return posixpath.relpath(path, posixpath.dirname(source) or ".") + mark + anchor


def size(png: bytes) -> str:
    """Width and height of a PNG as attributes, so that a page does not jump when its pictures arrive."""
    width, height = struct.unpack(">II", png[16:24])
    return f'width="{width}" height="{height}"'


def link(source: str, target: str, text: str, kind: str = "") -> str:
    """A link between two pages."""
    return f'<a{f" class={chr(34)}{kind}{chr(34)}" if kind else ""} href="{rel(source, target)}">{e(text)}</a>'


def hue(rooms: Sequence[str], id: str) -> int:
    """The room's hue: spread evenly, and far from that of its neighbour in the list."""
    known = sorted(rooms)
    place = known.index(id) if id in known else 0
    return round((25 + place * 360 * 7 / max(len(known), 1)) % 360)


def pill(verdict: str, count: int | None = None) -> str:
    """A verdict with its sign."""
    number = "" if count is None else f"{count} "
    sign = f'<span aria-hidden="true">{VERDICTS.get(verdict, "·")}</span>'
    return f'<span class="pill {verdict.replace(" ", "-")}">{sign} {number}{e(verdict)}</span>'


def badges(one: Facts) -> str:
    """What the record says of the claims, or what there is instead of a record."""
    if one.verdicts:
        return "".join(pill(name, count) for name, count in one.counts.items())
    if one.record is not None:
        return '<span class="pill measured">measured</span>'
    if one.status == "works":
        return '<span class="pill works">works, not yet measured</span>'
    return '<span class="pill planned">planned</span>'


def stack(counts: Mapping[str, int], label: str) -> str:
    """A bar of verdicts, one part each, in proportion."""
    total = sum(counts.values())
    if not total:
        return ""
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    parts = "".join(f'<span class="{name.replace(" ", "-")}" style="flex:{count}"></span>' for name, count in counts.items() if count)
    return f'<span class="stack" role="img" aria-label="{e(label)}: {e(said)}">{parts}</span>'


def card_list(source: str, papers: Sequence[Facts], why: Mapping[str, str] | None = None, kind: str = "") -> str:
    """A list of papers with their badges."""
    rows = []
    for one in papers:
        words = (why or {}).get(one.id) or getattr(one.entry, "summary", "")
        year = getattr(one.entry, "year", None)
        title = getattr(one.entry, "title", None) or getattr(one.entry, "question", "")
        note = f'<span class="why">{e(words)}</span>' if words else ""
        facts = " · ".join(filter(None, (str(year or ""), getattr(one.entry, "role", "comparison"), room(one.entry.room).name)))
        head = f'{link(source, one.url, str(title))}<span class="meta">{e(facts)}</span>'
        rows.append(f'<li>{head}{note}<span class="badges">{badges(one)}</span></li>')
    return f'<ul class="papers {kind}">{"".join(rows)}</ul>' if rows else ""


def table(rows: Table, kind: str = "") -> str:
    """A table whose cells know their column's name, so that a narrow page can stack them."""
    names = rows.head[1:]
    body = "".join(table_row(e(first), dict(zip(names, map(e, rest)))) for first, *rest in rows.rows)
    return framed("Table", rows.head, body, kind)


def table_row(head: str, cells: Mapping[str, object], kind: str = "") -> str:
    """A row from HTML: its heading, and its cells by column."""
    body = "".join(f'<td data-label="{e(name)}">{cell}</td>' for name, cell in cells.items())
    return f'<tr class="{kind}"><th scope="row">{head}</th>{body}</tr>'


def framed(label: str, names: Sequence[str], body: str, kind: str = "") -> str:
    """The rows of a table in a frame that scrolls by itself where the page is narrow."""
    head = "".join(f'<th scope="col">{e(name)}</th>' for name in names)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{e(label)}"><table class="data {kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def whisker(v: Verdict) -> str:
    """The measure's mean, its interval and seeds against the region where the claim holds; the null check as an open diamond."""
    from neurarium.lab.report import number

    points = [x for x in v.values.values() if math.isfinite(x)]
    if not points or v.measured is None or not math.isfinite(v.measured):
        return ""
    try:
        bound = Bound.parse(v.holds)
    except BadInput:
        return ""
    null = v.null_measured if v.null_measured is not None and math.isfinite(v.null_measured) else None
    ends = [x for x in (bound.low, bound.high) if math.isfinite(x)]
    low, high = v.interval or (v.measured, v.measured)
    seen = [*points, *ends, low, high]
    span = max(seen) - min(seen) or abs(max(seen)) or 1.0
    if null is not None and min(seen) - 1.5 * span <= null <= max(seen) + 1.5 * span:
        seen.append(null)
    left, right = min(seen), max(seen)
    margin = 0.12 * ((right - left) or abs(right) or 1.0)
    left, right = left - margin, right + margin
    width, middle = 220, 15

    def x(value: float) -> float:
        return 4 + (width - 8) * (min(max(value, left), right) - left) / (right - left)

    region = f'<rect class="region" x="{x(bound.low):.1f}" y="3" width="{max(x(bound.high) - x(bound.low), 1.5):.1f}" height="24" rx="3"/>'
    marks = "".join(f'<line class="bound" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="3" y2="27"/>' for end in ends)
    dots = "".join(f'<circle class="seed" cx="{x(p):.1f}" cy="{middle}" r="2.2"/>' for p in points)
    diamond = ""
    if null is not None:
        at = x(null)
        diamond = f'<path class="null" d="M{at:.1f} {middle - 5}l5 5-5 5-5-5z"/>'
    said = f"{number(v.measured)}, interval {number(low)} to {number(high)}, claim holds where {v.holds}"
    said += f"; null check {number(null)}" if null is not None else ""
    return (
        f'<svg class="whisker {v.verdict.replace(" ", "-")}" viewBox="0 0 {width} 30" role="img" aria-label="{e(said)}">'
        f"{region}{marks}{diamond}"
        f'<line class="interval" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>{dots}'
        f'<line class="mean" x1="{x(v.measured):.1f}" x2="{x(v.measured):.1f}" y1="{middle - 8}" y2="{middle + 8}"/></svg>'
    )
