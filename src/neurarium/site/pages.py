"""The pages of papers, rooms and comparisons, and the scoreboard, as Markdown with HTML where Markdown has no words."""

from __future__ import annotations

from collections import Counter

from neurarium.catalog import ROLES, Comparison, Paper
from neurarium.site.docstrings import public, source_file
from neurarium.site.facts import VERDICTS, Atlas, Facts, duration, order
from neurarium.site.markup import badges, card_list, e, framed, hue, link, pill, rel, size, stack, table, table_row, whisker
from neurarium.site.rooms import engine, room

__all__ = ["comparison_index", "comparison_page", "paper_page", "roles_table", "room_index", "room_page"]

_EVIDENCE = {"real": "Real data", "generated": "Generated data", "simulated": "Simulation"}
_EVIDENCE_MEANS = {
    "real": "measured on a real data set",
    "generated": "measured on data of a specified generator",
    "simulated": "measured on a stand-in for hardware, people or a large model",
}


def paper_page(one: Facts, atlas: Atlas) -> str:
    """One paper."""
    paper = one.entry
    assert isinstance(paper, Paper)
    question, snippet = atlas.snippet(one)
    told = one.told
    parts = [front(paper.title, paper.summary), _head(one, atlas)]
    if question:
        parts.append(f'<p class="question">{e(question)}</p>')
    if paper.summary:
        parts.append(f'<p class="lead">{e(paper.summary)}</p>')
    if one.status == "planned":
        parts.append('<p class="note">This paper is planned: there is no code for it yet, and so no verdict.</p>')
    if one.record is not None:
        parts += [_figure(one, atlas), "## Claims, and what became of them", _evidence(one), _claims(one)]
    elif paper.claims:
        parts += [
            "## Claims",
            '<p class="note">There is no published record yet. These claims and bounds stand before the measurement.</p>',
            _promises(paper),
        ]
    if snippet:
        parts += ["## Use it on your own model", f"```python\n{snippet}\n```"]
    if paper.use:
        parts.append(_names(one, paper))
    if paper.experiment and (paper.status == "works" or one.record):
        parts += ["## Measure it again", _again(one)]
    if told.idea:
        parts += ["## How it works", told.idea]
        parts += [f"### {name.capitalize()}\n\n{told.parts[name]}" for name in ("equations", "cost", "licence") if name in told.parts]
    if "departures" in told.parts:
        parts += ["## Departures from the paper", told.parts["departures"]]
    if sources := _sources(paper):
        parts += ["## The code", sources]
    parts += ["## Source", *([told.parts["source"]] if "source" in told.parts else []), _arxiv(paper), f"```bibtex\n{paper.bibtex()}\n```"]
    parts.append(_neighbours(one, atlas))
    return "\n\n".join(filter(None, parts)) + "\n"


def comparison_page(one: Facts, atlas: Atlas) -> str:
    """One comparison: its table, and its figure with the Pareto front."""
    entry = one.entry
    assert isinstance(entry, Comparison)
    crumbs = f'<p class="crumbs">{link(one.url, "comparisons/index.html", "Comparisons")}</p>'
    parts = [front(entry.question, entry.summary), crumbs, f"# {_md(entry.question)}"]
    if entry.summary:
        parts.append(f'<p class="lead">{e(entry.summary)}</p>')
    if one.record is not None:
        from neurarium.lab.report import measurements

        parts += [_figure(one, atlas), "## What was measured", _evidence(one), table(measurements(one.record), "measures")]
        parts.append('<p class="note">Mean over seeds and half the width of its 95 % interval.</p>')
    else:
        parts.append('<p class="note">There is no published record of this comparison yet.</p>')
    parts += ["## Measure it again", f"```sh\nneurarium compare {entry.id}\n```", _took(one)]
    parts += ["## Members", card_list(one.url, [atlas.by_id[id] for id in entry.members])]
    return "\n\n".join(filter(None, parts)) + "\n"


def comparison_index(atlas: Atlas) -> str:
    """All comparisons."""
    parts = [front("Comparisons", "Methods that do one job, measured side by side."), "# Comparisons"]
    parts.append(
        '<p class="lead">Methods that do one job, on one task, under one budget, with one set of meters. '
        "A comparison defends no claim: it answers its question.</p>"
    )
    items = [
        f'<li>{link("comparisons/index.html", one.url, one.entry.question)}<span class="meta">{len(one.entry.members)} methods</span>'
        f'<span class="badges">{badges(one)}</span></li>'
        for one in atlas.comparisons
        if isinstance(one.entry, Comparison)
    ]
    parts.append(f'<ul class="papers">{"".join(items)}</ul>' if items else '<p class="note">The catalog has no comparison yet.</p>')
    return "\n\n".join(parts) + "\n"


def room_page(id: str, atlas: Atlas) -> str:
    """One room: what it is for, its engine, which paper to pick when, and all its papers."""
    papers, here = atlas.rooms[id], f"rooms/{id}.html"
    this = room(id)
    counts = Counter(v.verdict for one in papers for v in one.verdicts)
    verdicts = {name: counts[name] for name in VERDICTS if counts[name]}
    working = [one for one in papers if one.status != "planned"]
    crumbs = f'<p class="crumbs">{link(here, "rooms/index.html", "Rooms")}</p>'
    said = f"{len(papers)} papers, {len(working)} working" + (
        f"; claims: {', '.join(f'{n} {name}' for name, n in verdicts.items())}" if verdicts else ""
    )
    parts = [
        front(this.name, this.purpose),
        crumbs,
        f'<div class="room-head" style="--hue:{hue(list(atlas.rooms), id)}"></div>',
        f"# {_md(this.name)}",
    ]
    parts += [
        f'<p class="lead">{e(this.purpose)}</p>' if this.purpose else "",
        f'<p class="meta">{e(said)}</p>',
        stack(verdicts, this.name),
    ]
    pick = {one.id: this.pick[one.id] for one in papers if one.id in this.pick}
    if pick:
        parts += ["## Which one to pick", card_list(here, [one for one in papers if one.id in pick], pick)]
    if picture := engine(id, papers):
        parts += [
            "## The engine",
            "Methods, and the modules that they share, read from the code's own imports. An arrow means *builds on*.",
            picture,
        ]
    if compared := [c for c in atlas.comparisons if c.entry.room == id]:
        parts += ["## Comparisons", card_list(here, compared)]
    if rest := [one for one in working if one.id not in pick]:
        parts += ["## Working", card_list(here, rest)]
    if planned := [one for one in papers if one.status == "planned"]:
        parts += ["## Planned", card_list(here, planned, kind="compact")]
    if source_file(f"neurarium.{id}") is not None:
        parts.append(f"[The room's modules in the reference](../reference/{id}.md)")
    return "\n\n".join(filter(None, parts)) + "\n"


def room_index(atlas: Atlas) -> str:
    """All rooms."""
    items = []
    for id, papers in atlas.rooms.items():
        counts = Counter(v.verdict for one in papers for v in one.verdicts)
        bar = stack({name: counts[name] for name in VERDICTS if counts[name]}, room(id).name)
        working = sum(one.status != "planned" for one in papers)
        items.append(
            f'<li style="--hue:{hue(list(atlas.rooms), id)}"><h2>{link("rooms/index.html", f"rooms/{id}.html", room(id).name)}</h2>'
            f'<p>{e(room(id).purpose)}</p><p class="meta">{len(papers)} papers, {working} working</p>{bar}</li>'
        )
    lead = '<p class="lead">A room is a field of work with an engine of its own, which its papers share.</p>'
    return "\n\n".join([front("Rooms", "The rooms of the atlas."), "# Rooms", lead, f'<ul class="rooms">{"".join(items)}</ul>']) + "\n"


# ------------------------------------------------------------------------------------------------------------------ parts of a paper's page


def front(title: str, description: str) -> str:
    """Escaped here, because the theme does not."""
    import json

    hide = "hide:\n  - navigation"
    return f"---\ntitle: {json.dumps(e(title))}\ndescription: {json.dumps(e(description or title))}\n{hide}\n---"


def _md(text: str) -> str:
    import re

    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", e(text))


def _head(one: Facts, atlas: Atlas) -> str:
    paper = one.entry
    assert isinstance(paper, Paper)
    where = link(one.url, f"rooms/{paper.room}.html", room(paper.room).name)
    crumbs = f'{link(one.url, "index.html", "Papers")} <span aria-hidden="true">/</span> {where}'
    dot = f'<span class="dot" aria-hidden="true" style="--hue:{hue(list(atlas.rooms), paper.room)}"></span>'
    facts = [str(paper.year) if paper.year else "", paper.role, f"from {paper.package}" if paper.package != "neurarium" else ""]
    if one.record is not None:
        facts.append(_EVIDENCE[one.record.evidence].lower())
    meta = " · ".join(e(fact) for fact in facts if fact)
    return (
        f'<p class="crumbs">{dot}{crumbs}</p>\n\n# {_md(paper.title)}\n\n<p class="meta">{meta}</p>\n\n<p class="badges">{badges(one)}</p>'
    )


def _figure(one: Facts, atlas: Atlas) -> str:
    if one.figure is None or one.record is None:
        return ""
    title = getattr(one.entry, "title", None) or getattr(one.entry, "question", "")
    arms = ", ".join(one.record.arms)
    count = len(one.record.seeds)
    return (
        f'<figure class="record"><img src="{rel(one.url, one.figure)}" {size(atlas.figures[one.figure])} '
        f'alt="Figure of the record of {e(one.id)}: {e(title)}. Arms: {e(arms)}; {count} seeds. The table below has the numbers.">'
        f"<figcaption>Drawn from the record alone: {count} seeds, {e(one.record.scale)} scale, arms {e(arms)}.</figcaption></figure>"
    )


def _evidence(one: Facts) -> str:
    record = one.record
    assert record is not None
    note = f": {e(record.evidence_note).rstrip('.')}" if record.evidence_note else ""
    said = f"<b>{_EVIDENCE[record.evidence]}</b>, {_EVIDENCE_MEANS[record.evidence]}{note}."
    return f'<p class="evidence {record.evidence}">{said}</p>'


def _claims(one: Facts) -> str:
    from neurarium.lab.report import number

    rows = []
    for v in one.verdicts:
        ends = f"<small>95 %: {number(v.interval[0])} to {number(v.interval[1])}</small>" if v.interval else ""
        noise = "<small>within noise</small>" if v.within_noise else ""
        null = {True: "fails, as it must", False: "holds too: parity", None: "cannot be told"}[v.null_fails]
        null_value = f"<small>at {number(v.null_measured)}</small>" if v.null_measured is not None else ""
        reason = f"<small>{e(v.reason)}</small>" if v.reason else ""
        cells = {
            "The paper": e(v.reported),
            "Here": f'<div class="here"><b>{number(v.measured)}</b>{ends}{whisker(v)}<small>holds where {e(v.holds)}</small></div>',
            "Seeds": v.n,
            "Verdict": pill(v.verdict) + noise,
            "Null check": null + null_value,
        }
        rows.append(table_row(e(v.says) + reason, cells, v.verdict.replace(" ", "-")))
    names = ("Claim", "The paper", "Here", "Seeds", "Verdict", "Null check")
    keys = {
        "region": "where the claim holds",
        "seed": "a seed",
        "interval": "mean and 95 % interval",
        "null": "the baseline in the method's place",
    }
    legend = " ".join(f'<span class="key {kind}"></span> {words}' for kind, words in keys.items())
    return f'{framed("Claims", names, "".join(rows), "claims")}\n\n<p class="legend">{legend}</p>'


def _promises(paper: Paper) -> str:
    rows = "".join(
        table_row(e(c.says), {"The paper": e(c.reported), "Measure": f"<code>{e(c.measure)}</code>", "Holds where": e(c.holds)})
        for c in paper.claims
    )
    names = ("Claim", "The paper", "Measure", "Holds where")
    return framed("Claims", names, rows)


def _names(one: Facts, paper: Paper) -> str:
    items = []
    for reference in filter(None, (paper.use, *paper.also)):
        module, _, name = reference.partition(":")
        target = reference_page(module)
        known = any(name == public_name for public_name, _ in public(module))
        address = f"{rel(one.url, target)}#{module}{f'.{name}' if known else ''}" if target else ""
        items.append(f'<a href="{address}"><code>{e(module)}.{e(name)}</code></a>' if address else f"<code>{e(module)}.{e(name)}</code>")
    return f'<p class="names">In the reference: {", ".join(items)}</p>'


def reference_page(module: str) -> str | None:
    """The reference page that documents a module of neurarium."""
    parts = module.split(".")
    return f"reference/{parts[1]}.html" if parts[0] == "neurarium" and len(parts) > 1 and source_file(module) else None


def _again(one: Facts) -> str:
    return f"```sh\nneurarium run {one.id}\n```\n\n{_took(one)}"


def _took(one: Facts) -> str:
    record = one.record
    if record is None:
        return ""
    machine = record.machine
    return (
        f"<p>The published run took <b>{duration(record.seconds)}</b> of work ({len(record.seeds)} seeds, {len(record.arms)} arms) on "
        f"{e(machine.get('cpu', 'an unknown processor'))}, {e(machine.get('threads', 1))} thread(s) a seed, "
        f"torch {e(record.versions.get('torch', '?'))}, {e(record.created)}.</p>"
    )


def _sources(paper: Paper) -> str:
    blocks = []
    for words, module in (("The method", str(paper.use or "").partition(":")[0]), ("The experiment", paper.experiment or "")):
        file = source_file(module) if module else None
        if file is None:
            continue
        text = file.read_text(encoding="utf-8").rstrip()
        fence = "````" if "```" in text else "```"
        body = "\n".join(f"    {line}" if line else "" for line in f"{fence}python\n{text}\n{fence}".splitlines())
        blocks.append(f'??? code "{words}: `{module}`, {len(text.splitlines())} lines"\n\n{body}')
    return "\n\n".join(blocks)


def _arxiv(paper: Paper) -> str:
    return f'<p><a href="https://arxiv.org/abs/{paper.arxiv}" rel="external">arXiv:{paper.arxiv}</a></p>' if paper.arxiv else ""


def _neighbours(one: Facts, atlas: Atlas) -> str:
    paper = one.entry
    assert isinstance(paper, Paper)
    compared = [c for c in atlas.comparisons if isinstance(c.entry, Comparison) and one.id in c.entry.members]
    words = {word for word in paper.title.lower().split() if len(word) > 4}

    def near(other: Facts) -> tuple:
        return (-len(words & set(str(getattr(other.entry, "title", "")).lower().split())), *order(other))

    role = [
        o
        for o in sorted(atlas.facts, key=near)
        if getattr(o.entry, "role", "") == paper.role and o.id != one.id and o.entry.room != paper.room
    ][:4]
    same = [o for o in sorted(atlas.rooms[paper.room], key=near) if o.id != one.id][:5]
    parts = ["## Neighbours"]
    if compared:
        parts += ["### Compared in", card_list(one.url, compared)]
    if same:
        parts += [f"### In the same room: {_md(room(paper.room).name)}", card_list(one.url, same)]
    if role:
        parts += [f"### In the same role: {paper.role}", card_list(one.url, role)]
    return "\n\n".join(parts)


def roles_table(atlas: Atlas, here: str) -> str:
    """The roles with their contract, their conformance checks by name, and how many papers have them."""
    from neurarium.roles import ROLES as CONTRACT
    from neurarium.testing import checks_for

    rows = ""
    for role in ROLES:
        count = sum(getattr(one.entry, "role", "") == role for one in atlas.facts)
        checks = checks_for(role)
        names = ", ".join(f"<span>{e(name)}</span>" for name in checks) or "none: its experiment is its proof"
        head = f'<a href="{rel(here, "index.html")}#role={role}">{role}</a>'
        rows += table_row(head, {"What it looks like": e(CONTRACT[role]), "Conformance checks": names, "Papers": count})
    return framed("Roles", ("Role", "What it looks like", "Conformance checks", "Papers"), rows)
