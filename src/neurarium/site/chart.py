"""The chart on the landing page: every room an island, every paper a place on it. Laid out by arithmetic alone, the same at every build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from neurarium.site.facts import Facts
from neurarium.site.markup import e, hue
from neurarium.site.rooms import room

__all__ = ["chart"]

GOLDEN = math.pi * (3 - math.sqrt(5))
STEP = 10.2  # distance of two places
DEPTHS = ((36, "deep"), (20, "shelf"), (9, "land"))


def chart(rooms: Mapping[str, Sequence[Facts]], *, width: int, height: int, kind: str) -> str:
    """An SVG of this size. Rooms and papers are links; a place is filled where its paper is measured."""
    names = [name for name in rooms if rooms[name]]
    radius = {name: STEP * math.sqrt(len(rooms[name])) * 0.92 + 5 for name in names}
    at = _place(names, radius, width, height)
    waters = "".join(
        f'<g class="{depth}">' + "".join(f'<path d="{_coast(at[n], radius[n] + grow, i, depth)}"/>' for i, n in enumerate(names)) + "</g>"
        for grow, depth in DEPTHS
    )
    islands = ""
    for name in names:
        x0, y0 = at[name]
        places = ""
        for i, one in enumerate(rooms[name]):
            r, turn = STEP * math.sqrt(i + 0.4) * 0.92, i * GOLDEN
            title = getattr(one.entry, "title", one.id)
            size = 4.8 if one.status == "measured" else 4.2 if one.status == "works" else 2.9
            places += (
                f'<a href="{one.url}" tabindex="-1" data-id="{one.id}" class="{one.status}"><title>{e(title)}</title>'
                f'<circle cx="{x0 + r * math.cos(turn):.1f}" cy="{y0 + r * math.sin(turn):.1f}" r="{size}"/></a>'
            )
        label = (
            f'<a href="rooms/{name}.html" tabindex="-1"><text x="{x0:.0f}" y="{y0 + radius[name] + 17:.0f}">{e(room(name).name)}</text></a>'
        )
        islands += f'<g class="island" style="--hue:{hue(list(rooms), name)}" data-room="{name}">{places}{label}</g>'
    lines = "".join(f"M0 {y}H{width}" for y in range(60, height, 120)) + "".join(f"M{x} 0V{height}" for x in range(60, width, 120))
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false">'
        f'<g class="graticule"><path d="{lines}"/></g>{waters}{islands}</svg>'
    )


def _place(names: Sequence[str], radius: Mapping[str, float], width: int, height: int) -> dict[str, tuple[float, float]]:
    """Islands apart from each other and from the edges: pushed until they are."""
    columns = max(1, round(math.sqrt(len(names) * width / height)))
    rows = math.ceil(len(names) / columns)
    points = []
    for i in range(len(names)):
        row, column = divmod(i, columns)
        last = len(names) - row * columns  # islands of this row, if it is not full
        shift = (0.15 if row % 2 else -0.15) + max(columns - last, 0) / 2
        points.append([width * (column + 0.5 + shift) / columns, height * (row + 0.5 + 0.18 * math.sin(2.4 * i)) / rows])
    for _ in range(400):
        for i, a in enumerate(names):
            for j in range(i):
                b = names[j]
                dx, dy = points[i][0] - points[j][0], (points[i][1] - points[j][1])
                far = math.hypot(dx, dy) or 1e-6
                lack = radius[a] + radius[b] + 40 - far
                if lack > 0:
                    ux, uy = dx / far, dy / far
                    for k, sign in ((i, 1), (j, -1)):
                        points[k][0] += sign * ux * lack * 0.25
                        points[k][1] += sign * uy * lack * 0.25
        for k, name in enumerate(names):
            edge = radius[name] + 22
            points[k][0] = min(max(points[k][0], edge), width - edge)
            points[k][1] = min(max(points[k][1], edge - 8), height - edge - 8)
    return {name: (point[0], point[1]) for name, point in zip(names, points)}


def _coast(centre: tuple[float, float], radius: float, seed: int, depth: str) -> str:
    """A closed smooth line around a circle, with bays."""
    n, rough = 14, 0.05 if depth == "land" else 0.08
    points = []
    for k in range(n):
        turn = 2 * math.pi * k / n
        r = radius * (1 + rough * math.sin(3 * turn + seed * 1.7) + rough * 0.7 * math.sin(5 * turn + seed * 2.9 + len(depth)))
        points.append((centre[0] + r * math.cos(turn), centre[1] + r * math.sin(turn)))
    path = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for k in range(n):  # Catmull-Rom as Bezier
        p0, p1, p2, p3 = (points[(k + d) % n] for d in (-1, 0, 1, 2))
        c1 = (p1[0] + (p2[0] - p0[0]) / 6, p1[1] + (p2[1] - p0[1]) / 6)
        c2 = (p2[0] - (p3[0] - p1[0]) / 6, p2[1] - (p3[1] - p1[1]) / 6)
        path += f"C{c1[0]:.0f} {c1[1]:.0f} {c2[0]:.0f} {c2[1]:.0f} {p2[0]:.0f} {p2[1]:.0f}"
    return path + "z"
