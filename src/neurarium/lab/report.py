"""Reports of a record: on the terminal, as Markdown, as one HTML page that needs nothing else.

Each says what the evidence is before it gives a number. A paper's report is its claims with the paper's figure beside ours; a
comparison's is its arms with what was measured of each. Everything that comes from a record or a catalog is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neurarium.catalog import Comparison
from neurarium.lab.record import Record
from neurarium.lab.verdict import Verdict, interval, judge
from neurarium.lab.view import RecordView

if TYPE_CHECKING:
    from neurarium.lab.runner import Subject

__all__ = ["Report", "Table", "as_html", "as_markdown", "as_text", "measurements", "number", "report"]

_EVIDENCE = {"real": "real data", "generated": "generated data", "simulated": "a simulation"}
_COLOURS = {"held": "green", "weaker": "yellow", "failed": "red", "not judged": "dim"}


@dataclass(frozen=True)
class Table:
    """A table before it is drawn."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """What every form of a report says."""

    title: str
    source: str
    summary: str
    evidence: str
    setting: str
    verdicts: tuple[Verdict, ...]
    table: Table  # claims of a paper, arms of a comparison
    notes: tuple[str, ...]
    arms: Table


def report(record: Record, paper: Subject) -> Report:
    """Gather what is to be said of a record."""
    verdicts: tuple[Verdict, ...] = () if isinstance(paper, Comparison) else tuple(judge(paper, record))
    arms = measurements(record)
    if isinstance(paper, Comparison):
        title, source, table = paper.question, f"comparison {paper.id}: {', '.join(paper.members)}", arms
    else:
        arxiv = f"arXiv:{paper.arxiv}" if paper.arxiv else ""
        title, source, table = paper.title, ", ".join(filter(None, (paper.id, paper.role, str(paper.year or ""), arxiv))), _claims(verdicts)
    note = f" {record.evidence_note}" if record.evidence_note else ""
    if record.stand_in:
        note += f" This run: {record.stand_in}."
    crashes = [
        f"seed {seed}, {f'arm {arm}' if arm else 'outside its arms'} crashed: {error.splitlines()[-1]}"
        for seed, arm, error in record.crashes
    ]
    claims_of = {v.reason: [w.says for w in verdicts if w.reason == v.reason] for v in verdicts if v.reason}
    reasons = [f"{says[0] if len(says) == 1 else f'{len(says)} claims'}: {reason}" for reason, says in claims_of.items()]
    noise = [f"{v.says}: within noise, the interval straddles the bound {v.holds}" for v in verdicts if v.within_noise]
    return Report(
        title,
        source,
        paper.summary,
        f"Evidence: {_EVIDENCE[record.evidence]}.{note}",
        _setting(record),
        verdicts,
        table,
        tuple(crashes + noise + reasons),
        arms,
    )


def as_text(record: Record, paper: Subject) -> Any:
    """For ``rich.print`` or a console."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    said = report(record, paper)
    table = RichTable(show_lines=False, pad_edge=False, box=None, padding=(0, 2, 0, 0), expand=True)
    for i, name in enumerate(said.table.head):
        table.add_column(Text(name), overflow="fold", ratio=(4, 3, 2, None, None, None)[i] if said.verdicts else None)
    for i, row in enumerate(said.table.rows):
        style = _COLOURS.get(said.verdicts[i].verdict, "") if said.verdicts else ""
        table.add_row(*(Text(cell, style=style if said.verdicts and j == 4 else "") for j, cell in enumerate(row)))
    lines = [Text(said.title, style="bold"), Text(said.source, style="dim"), Text(said.evidence), Text(said.setting, style="dim")]
    return Group(*lines, Text(""), table, *(Text(f"- {note}", style="dim") for note in said.notes))


def as_markdown(record: Record, paper: Subject, figure: str | None = None) -> str:
    """A section of a page; ``figure`` is the address of its picture."""
    said = report(record, paper)
    parts = [f"## {_md(said.title)}", _md(said.source), _md(said.summary), f"**{_md(said.evidence)}** {_md(said.setting)}"]
    parts.append(_md_table(said.table))
    parts.append("\n".join(f"- {_md(note)}" for note in said.notes))
    if figure is not None:
        address = re.sub(r"[<>\s]", "", figure)
        parts.append(f"![{_md(said.title)}](<{address}>)")
    if said.arms != said.table:
        parts.append(_md_table(said.arms))
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(record: Record, paper: Subject, *, figure: bool = True) -> str:
    """A whole page with its figure inside; it asks no other server for anything."""
    said = report(record, paper)
    picture = ""
    if figure:
        data = base64.b64encode(_picture(record, paper)).decode("ascii")
        picture = f'<figure><img alt="{_h(said.title)}" src="data:image/png;base64,{data}"></figure>'
    notes = "".join(f"<li>{_h(note)}</li>" for note in said.notes)
    arms = f"<h2>Measurements</h2>{_html_table(said.arms, ())}" if said.arms != said.table else ""
    return _PAGE.format(
        title=_h(said.title),
        source=_h(said.source),
        summary=_h(said.summary),
        evidence=_h(said.evidence),
        setting=_h(said.setting),
        table=_html_table(said.table, said.verdicts),
        notes=f"<ul>{notes}</ul>" if notes else "",
        picture=picture,
        arms=arms,
    )


def measurements(record: Record) -> Table:
    """The arms with the mean and 95 % interval of what each logged as a number; a metric that only some logged is left open elsewhere."""
    view = RecordView(record)
    metrics = [m for m in dict.fromkeys(m for arm in view.arms for m in view.metrics(arm)) if m != "seconds"] + ["seconds"]
    single = [m for m in metrics if all(view.values(a, m).ndim == 1 for a in view.arms if view.has(a, m))]
    rows = []
    for arm in view.arms:
        cells = [_spread(list(view.values(arm, m)[_there(view, arm)])) if view.has(arm, m) else "" for m in single]
        rows.append((arm, *cells))
    return Table(("arm", *single), tuple(rows))


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where that is short."""
    if value is None or not math.isfinite(value):
        return "not finite" if value is not None else "-"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _claims(verdicts: tuple[Verdict, ...]) -> Table:
    rows = []
    for v in verdicts:
        ends = f" [{number(v.interval[0])}, {number(v.interval[1])}]" if v.interval else ""
        null = {True: "fails", False: "holds (parity)", None: "-"}[v.null_fails]
        rows.append((v.says, v.reported, f"{number(v.measured)}{ends}", str(v.n), v.verdict, null))
    return Table(("claim", "the paper", "here [95 %]", "seeds", "verdict", "null check"), tuple(rows))


def _setting(record: Record) -> str:
    machine, count = record.machine, len(record.seeds)
    threads = machine.get("threads", 1)
    accelerator = f", {machine['accelerator']}" if "accelerator" in machine else ""
    return (
        f"{record.scale.capitalize()} scale, {count} seed{'s' if count > 1 else ''}, {number(round(record.seconds, 1))} s of work"
        f" ({threads} thread{'s' if threads != 1 else ''} a seed) on {machine.get('cpu', 'an unknown processor')}{accelerator},"
        f" torch {record.versions.get('torch', '?')}, {record.created}."
    )


def _there(view: RecordView, arm: str) -> list[int]:
    runs = [view.record.run(seed, arm) for seed in view.seeds]
    return [i for i, run in enumerate(runs) if run is not None and run.status == "done"]


def _spread(values: list[float]) -> str:
    mean, low, _ = interval(values)
    return number(mean) if not math.isfinite(low) or low == mean else f"{number(mean)} ± {number(mean - low)}"


def _picture(record: Record, paper: Subject) -> bytes:
    from neurarium.lab.figures import render

    try:
        return render(record, paper)
    except Exception:  # an experiment's own drawing must not cost the page
        return render(record, paper, default=True)


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _md_table(table: Table) -> str:
    rows = [table.head, tuple("---" for _ in table.head), *table.rows]
    return "\n".join("| " + " | ".join(cell if cell == "---" else _md(cell) for cell in row) + " |" for row in rows)


def _h(text: str) -> str:
    return html.escape(text, quote=True)


def _html_table(table: Table, verdicts: tuple[Verdict, ...]) -> str:
    head = "".join(f"<th>{_h(cell)}</th>" for cell in table.head)
    body = ""
    for i, row in enumerate(table.rows):
        kind = f' class="{verdicts[i].verdict.replace(" ", "-")}"' if verdicts else ""
        body += f"<tr{kind}>" + "".join(f"<td>{_h(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }} .source, .setting {{ color: #666; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.4rem 0.6rem; border-bottom: 1px solid #ddd; }}
.held td:nth-child(5) {{ color: #00664b; }} .weaker td:nth-child(5) {{ color: #8a5a00; }} .failed td:nth-child(5) {{ color: #b03000; }}
img {{ max-width: 100%; }} figure {{ margin: 1.5rem 0; }}
</style></head><body>
<h1>{title}</h1><p class="source">{source}</p><p>{summary}</p>
<p><strong>{evidence}</strong></p><p class="setting">{setting}</p>
{table}{notes}{picture}{arms}
</body></html>
"""
