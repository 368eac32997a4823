"""The scoreboard: how all claims fared, how long that takes, on what machine; and every claim that did not hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from neurarium import __version__
from neurarium.site.facts import VERDICTS, Atlas, Facts, duration
from neurarium.site.markup import e, framed, link, pill, stack, table_row
from neurarium.site.pages import front
from neurarium.site.rooms import room

__all__ = ["scoreboard"]


def scoreboard(atlas: Atlas) -> str:
    """How all claims fared, how long the runs took, on what machine; and every claim that did not hold."""
    here = "scoreboard.html"
    measured = [one for one in atlas.facts if one.record is not None]
    totals = Counter(v.verdict for one in measured for v in one.verdicts)
    parts = [front("Scoreboard", "How the claims fared, all of them."), "# Scoreboard"]
    if not measured:
        parts.append('<p class="lead">No record is published yet. `neurarium run ID --publish` makes one.</p>'.replace("`", ""))
        return "\n\n".join(parts) + "\n"
    parts.append(
        f'<p class="lead">{sum(totals.values())} claims of {len(measured)} papers, judged on the 95 % interval over seeds. '
        "What failed is listed below, none is hidden.</p>"
    )
    tiles = "".join(
        f'<li class="{name.replace(" ", "-")}"><b>{totals[name]}</b>{pill(name)}</li>'
        for name in VERDICTS
        if totals[name] or name != "not judged"
    )
    parts += [
        f'<ul class="tiles">{tiles}</ul>',
        stack({name: totals[name] for name in VERDICTS}, "All claims"),
        "## By room",
        _by_room(atlas, here),
    ]
    parts += ["## Claims that did not hold", _not_held(measured, here), "## How long a measurement takes", _times(measured, here)]
    parts += ["## On which machine", _machines(measured)]
    return "\n\n".join(parts) + "\n"


def _by_room(atlas: Atlas, here: str) -> str:
    rows = ""
    for id, papers in atlas.rooms.items():
        counts = Counter(v.verdict for one in papers for v in one.verdicts)
        if not counts:
            continue
        measured = sum(one.record is not None for one in papers)
        bar = stack({name: counts[name] for name in VERDICTS}, room(id).name)
        cells = {"Papers measured": f"{measured} of {len(papers)}", **{name.capitalize(): counts[name] for name in VERDICTS}, "Share": bar}
        rows += table_row(link(here, f"rooms/{id}.html", room(id).name), cells)
    names = ("Room", "Papers measured", *(name.capitalize() for name in VERDICTS), "Share")
    return framed("Claims by room", names, rows)


def _not_held(measured: Sequence[Facts], here: str) -> str:
    from neurarium.lab.report import number

    items = []
    for name in ("failed", "weaker", "not judged"):
        for one in measured:
            for v in one.verdicts:
                if v.verdict == name:
                    ends = f" ({number(v.interval[0])} to {number(v.interval[1])})" if v.interval else ""
                    why = f'<span class="why">{e(v.reason)}</span>' if v.reason else ""
                    noise = ", within noise" if v.within_noise else ""
                    said = f"measured {number(v.measured)}{ends}, holds where {e(v.holds)}{noise}. The paper: {e(v.reported)}"
                    meta = f'<span class="meta">{link(here, one.url, one.id)}: {said}</span>'
                    items.append(f"<li>{pill(name)} <b>{e(v.says)}</b>{meta}{why}</li>")
    return f'<ul class="verdicts">{"".join(items)}</ul>' if items else "<p>Every measured claim held.</p>"


def _times(measured: Sequence[Facts], here: str) -> str:
    """A row a paper, its work on a logarithmic scale."""
    times = sorted(((one.record.seconds, one) for one in measured if one.record), key=lambda pair: pair[0])
    seconds = [t for t, _ in times]
    middle = seconds[len(seconds) // 2]
    top = max(math.log10(max(seconds[-1], 1) + 1), 1e-9)
    rows = ""
    for t, one in times:
        bar = f'<span class="time"><span style="width:{100 * math.log10(t + 1) / top:.1f}%"></span></span>'
        rows += f'<li>{link(here, one.url, one.id)}{bar}<span class="meta">{duration(t)}</span></li>'
    said = {"median": middle, "longest": seconds[-1], "together": sum(seconds)}
    words = ", ".join(f"{name} <b>{duration(value)}</b>" for name, value in said.items())
    return (
        f"<p>Work over all arms and seeds, one after another: {words}. Bars are on a logarithmic scale.</p>\n\n"
        f'<ul class="times">{rows}</ul>'
    )


def _machines(measured: Sequence[Facts]) -> str:
    rows: Counter[tuple[str, ...]] = Counter()
    for one in measured:
        record = one.record
        assert record is not None
        machine = record.machine
        versions = ", ".join(f"{name} {value}" for name, value in sorted(record.versions.items()) if name != "neurarium")
        rows[(str(machine.get("cpu", "unknown")), str(machine.get("cores", machine.get("cpus", "?"))), record.device, versions)] += 1
    body = "".join(
        table_row(e(cpu), {"Cores": e(cores), "Device": e(device), "Versions": e(versions), "Records": count})
        for (cpu, cores, device, versions), count in rows.most_common()
    )
    names = ("Processor", "Cores", "Device", "Versions", "Records")
    return framed("Machines", names, body) + f'\n\n<p class="meta">Pages generated by neurarium {__version__}.</p>'
