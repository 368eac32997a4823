"""Small layered diagrams as inline SVG: boxes, arrows, no script."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

__all__ = ["diagram", "from_mermaid"]

WIDTH, GAP_X, GAP_Y, LINE, PAD = 160, 16, 44, 16, 12


def diagram(
    nodes: Mapping[str, tuple[str, str]],
    edges: Sequence[tuple[str, str]],
    *,
    title: str,
    kinds: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """Boxes in rows, each above what it points to.

    Args:
        nodes: key -> (name, words below it).
        edges: (from, to) by key; those of a circle are drawn but do not shape the rows.
        title: what the picture shows, for readers who do not see it.
        kinds: key -> a class for the style sheet.
        links: key -> an address that its box leads to.
    """
    rows = _rows(list(nodes), edges)
    text = {key: [*textwrap.wrap(words, 25)[:3]] for key, (_, words) in nodes.items()}
    heights = [max(2 * PAD + LINE * (1 + len(text[key])) for key in row) for row in rows]
    widest = max(len(row) for row in rows) * (WIDTH + GAP_X) - GAP_X
    at: dict[str, tuple[float, float, float]] = {}
    y = 2.0
    for row, height in zip(rows, heights):
        x = 2 + (widest - (len(row) * (WIDTH + GAP_X) - GAP_X)) / 2
        for key in row:
            at[key] = (x, y, height)
            x += WIDTH + GAP_X
        y += height + GAP_Y
    size = (widest + 4, y - GAP_Y + 2)
    arrows = "".join(_arrow(at[a], at[b]) for a, b in edges if a in at and b in at)
    boxes = "".join(_box(nodes[key][0], text[key], at[key], (kinds or {}).get(key, ""), (links or {}).get(key)) for key in nodes)
    said = html.escape(f"{title}. " + "; ".join(f"{nodes[a][0]} uses {nodes[b][0]}" for a, b in edges if a in nodes and b in nodes))
    label = f'role="group" aria-label="{said}"' if links else f'role="img" aria-label="{said}"'
    return (
        f'<div class="diagram" tabindex="0" role="region" aria-label="{html.escape(title)}">'
        f'<svg viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" style="width:max(min({size[0]:.0f}px,100%),min({size[0]:.0f}px,30rem))" {label}>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker></defs>{arrows}{boxes}</svg></div>'
    )


def _rows(keys: list[str], edges: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Longest paths from the top; within a row, boxes stand near what points to them."""
    rank, edges = dict.fromkeys(keys, 0), _forward(keys, edges)
    for _ in keys:
        moved = False
        for a, b in edges:
            if rank[b] < rank[a] + 1:
                rank[b], moved = rank[a] + 1, True
        if not moved:
            break
    levels = sorted(set(rank.values()))
    rows = [[key for key in keys if rank[key] == level] for level in levels]
    for above, row in pairwise(rows):
        place = {key: i for i, key in enumerate(above)}
        centre = {key: [place[a] for a, b in edges if b == key and a in place] for key in row}
        row.sort(key=lambda key: sum(centre[key]) / len(centre[key]) if centre[key] else len(above) / 2)
    return rows


def _forward(keys: list[str], edges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges without those that close a circle."""
    kept: list[tuple[str, str]] = []
    state: dict[str, int] = {}  # 1: on the way to here, 2: done

    def visit(key: str) -> None:
        state[key] = 1
        for a, b in edges:
            if a == key and b in known and state.get(b) != 1:
                kept.append((a, b))
                if b not in state:
                    visit(b)
        state[key] = 2

    known = set(keys)
    for key in keys:
        if key not in state:
            visit(key)
    return kept


def _box(name: str, lines: list[str], at: tuple[float, float, float], kind: str, link: str | None) -> str:
    x, y, height = at
    middle = x + WIDTH / 2
    first = y + PAD + LINE - 4
    words = "".join(
        f'<text class="small" x="{middle:.0f}" y="{first + LINE * (i + 1):.0f}">{html.escape(line)}</text>' for i, line in enumerate(lines)
    )
    box = (
        f'<g class="node {kind}"><rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{height:.0f}" rx="8"/>'
        f'<text x="{middle:.0f}" y="{first:.0f}">{html.escape(name)}</text>{words}</g>'
    )
    return f'<a href="{html.escape(link)}">{box}</a>' if link else box


def _arrow(a: tuple[float, float, float], b: tuple[float, float, float]) -> str:
    x1, y1, x2, y2 = a[0] + WIDTH / 2, a[1] + a[2], b[0] + WIDTH / 2, b[1] - 2
    if y2 < y1:  # within a row, or of a circle
        return f'<path class="edge" d="M{x1:.0f} {y1:.0f}q{(x2 - x1) / 2:.0f} 30 {x2 - x1:.0f} 0"/>'
    bend = max((y2 - y1) / 2, 16)
    curve = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
    return f'<path class="edge" d="{curve}" marker-end="url(#tip)"/>'


_NODE = re.compile(r'(\w+)\s*\["([^"]*)"\]')


def from_mermaid(text: str, title: str) -> str:
    """The diagram of a small Mermaid flow chart: ``name["label"]`` and ``a --> b & c --> d``."""
    nodes: dict[str, tuple[str, str]] = {}
    for key, label in _NODE.findall(text):
        name, _, words = label.partition(": ")
        if not words or len(name) > 25:  # no short name before a colon: the first words are it
            name = textwrap.shorten(label, 25, placeholder="")
            words = label.removeprefix(name)
        nodes[key] = (name, words.strip())
    edges: list[tuple[str, str]] = []
    for line in text.splitlines():
        steps = [[re.sub(r"\[.*", "", part).strip() for part in group.split("&")] for group in _NODE.sub(r"\1", line).split("-->")]
        for left, right in pairwise(steps):
            for a in left:
                for b in right:
                    edges.append((a, b))
                    for key in (a, b):
                        nodes.setdefault(key, (key, ""))
    return diagram(nodes, edges, title=title)
