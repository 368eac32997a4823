"""The command line: ``neurarium list``, ``show``, ``run``, ``verify`` and the rest.

Commands here read arguments, call the library and print; they hold no logic of their own. Whatever is slow to import (torch through the
lab, rich) is imported inside the command that needs it, so that ``neurarium list`` answers at once.

Exit codes: 0 done; 1 done, and the answer is no (``verify``, ``doctor``, a crashed arm); 2 the request cannot be met; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from neurarium import __version__, catalog
from neurarium.catalog import Catalog, Claim, Comparison, Paper
from neurarium.errors import BadInput, NeurariumError

if TYPE_CHECKING:
    from rich.console import Console

    from neurarium.lab import Record, VerifyReport

__all__ = ["app", "main"]

T = TypeVar("T")

_OPTIONS: dict[str, Any] = {"add_completion": False, "no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(name="neurarium", help="Neural-network papers as working, composable PyTorch parts.", **_OPTIONS)
data_app = typer.Typer(help="Data sets: what there is, what is here, and where it lies.", **_OPTIONS)
app.add_typer(data_app, name="data")
site_app = typer.Typer(help="The atlas: a static site of all papers, verdicts and guides.", **_OPTIONS)
app.add_typer(site_app, name="site")


class Scale(StrEnum):
    """How much work a run does."""

    smoke = "smoke"  # seconds; shows that it runs, its claims are not judged
    laptop = "laptop"  # minutes; every claim is judged


class Engine(StrEnum):
    """Where the seeds of a run are computed."""

    local = "local"
    ray = "ray"


Ids = Annotated[list[str] | None, typer.Argument(help="Papers, by id.", show_default=False)]
Room = Annotated[str | None, typer.Option("--room", help="All working papers of one room.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All working papers.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
ScaleOption = Annotated[Scale, typer.Option("--scale", help="smoke: seconds, claims not judged. laptop: minutes, claims judged.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, max=1000, help="Number of seeds. Default: the paper's.", show_default=False)]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, max=1024, help="Processes at once. Default: one a core.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, mps, cuda, cuda:1.")]
EngineOption = Annotated[Engine, typer.Option("--engine", help="local: processes here. ray: a cluster.")]
Address = Annotated[str | None, typer.Option("--address", help="Of the ray cluster. Default: a ray of its own, here.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="Folder of all runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on with what an earlier run finished.")]


def main() -> None:
    """Entry point: like ``app()``, with the library's own errors as one line on stderr and exit code 2."""
    try:
        app()
    except (NeurariumError, OSError) as error:
        if os.environ.get("NEURARIUM_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):  # `neurarium list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        print(f"neurarium: {_plain(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"neurarium {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    del version


# ------------------------------------------------------------------------------------------------------------------ the catalog


@app.command("list")
def list_(
    room: Annotated[str | None, typer.Option(help="Only one room.", show_default=False)] = None,
    role: Annotated[str | None, typer.Option(help="Only one role.", show_default=False)] = None,
    status: Annotated[str | None, typer.Option(help="Only 'works' or 'planned'.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the papers."""
    papers = _catalog().filter(room=room, role=role, status=status)
    if as_json:
        _print_json([_row(paper) for paper in papers])
        return
    _print_papers(papers)
    works = sum(paper.status == "works" for paper in papers)
    print(f"\n{len(papers)} papers, {works} working. `neurarium show ID` tells more, `neurarium run ID` measures.")


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="What to look for in titles, summaries, rooms and roles.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many papers.")] = 15,
    as_json: Json = False,
) -> None:
    """Search the papers; best matches first."""
    found = _catalog().search(" ".join(words), limit=limit)
    if as_json:
        _print_json([_row(paper) | {"score": round(score, 3)} for paper, score in found])
    elif found:
        _print_papers([paper for paper, _ in found])
    else:
        print("nothing found")


@app.command()
def show(id: Annotated[str, typer.Argument(help="A paper's id.")], as_json: Json = False) -> None:
    """Show what a paper is and how to use its method.

    With its claims and, where there is a published record, the verdicts.
    """
    paper = _catalog().get(id)
    judged = _published(paper)
    if as_json:
        details = {
            "arxiv": paper.arxiv, "summary": paper.summary, "use": paper.use, "also": list(paper.also), "experiment": paper.experiment,
            "evidence": paper.evidence, "evidence_note": paper.evidence_note, "seeds": paper.seeds, "package": paper.package,
        }  # fmt: skip
        _print_json(_row(paper) | details | {"claims": judged or [_claim_row(claim) for claim in paper.claims]})
        return
    print(f"{paper.title}\n")
    facts = {
        "id": paper.id,
        "room": paper.room,
        "role": paper.role,
        "year": "" if paper.year is None else str(paper.year),
        "arXiv": f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else "",
        "status": paper.status,
        "use": "from {} import {}".format(*paper.use.split(":")) if paper.use else "",
        "also": ", ".join(paper.also),
        "experiment": paper.experiment or "",
        "evidence": ": ".join(filter(None, (paper.evidence, paper.evidence_note))),
        "from": paper.package if paper.package != "neurarium" else "",
    }
    for name, value in facts.items():
        if value:
            print(f"  {name:<11}{value}")
    if paper.summary:
        print(f"\n{textwrap.fill(paper.summary, min(100, shutil.get_terminal_size().columns))}")
    if paper.claims:
        print("\nClaims")
        for claim, row in zip(paper.claims, judged or map(_claim_row, paper.claims)):
            print(f"  - {claim.says}\n    the paper: {claim.reported}\n    measured as {claim.measure}, holds when {claim.holds}")
            if row["measured"] is not None:
                print(f"    here: {row['measured']:.4g}, {row['verdict']}")
            if claim.reason:
                print(f"    {claim.reason}")
    if paper.status == "works":
        print(f"\n`neurarium run {paper.id}` measures the claims; `neurarium report {paper.id}` shows the published record.")
    else:
        print("\nThis paper is planned: there is no code for it yet.")


@app.command()
def cite(ids: Annotated[list[str], typer.Argument(help="Papers, by id.")]) -> None:
    """Print BibTeX of papers."""
    papers = [_catalog().get(id) for id in ids]
    print("\n\n".join(paper.bibtex() for paper in papers))


# ------------------------------------------------------------------------------------------------------------------ the lab


@app.command()
def run(
    ids: Ids = None,
    room: Room = None,
    all_: All = False,
    scale: ScaleOption = Scale.laptop,
    seeds: Seeds = None,
    jobs: Jobs = None,
    device: Device = "cpu",
    engine: EngineOption = Engine.local,
    address: Address = None,
    out: Out = Path("runs"),
    fresh: Fresh = False,
    publish: Annotated[bool, typer.Option("--publish", help="Put the records among the published ones.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what papers claim.

    A run that was interrupted goes on where it stopped.
    """
    if publish and scale is not Scale.laptop:
        raise BadInput("--publish takes laptop records only: the claims of a smoke run are not judged")
    papers = _chosen(ids, room, all_)

    def measure() -> Mapping[str, Record | NeurariumError]:
        from neurarium import lab

        return lab.run_many(
            papers,
            scale=scale.value,
            seeds=seeds,
            jobs=jobs,
            device=device,
            engine=engine.value,
            address=address,
            out=out,
            fresh=fresh,
            progress=not as_json,
        )

    results = _resumable(measure)
    from neurarium import lab

    rows: list[dict[str, Any]] = []
    for paper in papers:
        record = results[paper.id]
        if isinstance(record, NeurariumError):
            rows.append({"id": paper.id, "error": str(record)})
            print(f"neurarium: {_plain(str(record), lines=True)}", file=sys.stderr)
            continue
        files = _files(out / paper.id / scale.value)
        if publish and not record.crashes:
            files["published"] = lab.publish(record)
        elif publish:
            print(f"neurarium: {paper.id} is not published: an arm crashed", file=sys.stderr)
        if as_json:
            rows.append(_record_row(paper, record) | {name: str(path) for name, path in files.items()})
        else:
            _print_report(paper, record, files)
    if as_json:
        _print_json({"papers": rows})
    raise typer.Exit(int(any(isinstance(result, NeurariumError) or result.crashes for result in results.values())))


@app.command()
def verify(
    ids: Ids = None,
    room: Room = None,
    all_: All = False,
    records: Annotated[Path | None, typer.Option("--records", help="Folder. Default: the published ones.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Judge published records again.

    From the numbers in them, without training; with the null check. Exit code 1 if a working paper has no valid record. Comparisons are
    checked with their room, or with all.
    """
    papers = _chosen(ids, room, all_ or not (ids or room))
    comparisons = [] if ids else [c for c in _catalog().comparisons if room is None or c.room == room]
    from neurarium import lab

    report = lab.verify(papers, records, comparisons=comparisons)
    if as_json:
        _print_json(report.to_json())
    else:
        _print_verification(report)
    raise typer.Exit(report.exit_code)


@app.command()
def report(
    id: Annotated[str, typer.Argument(help="A paper's or a comparison's id.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML file, figure included.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    record: Annotated[Path | None, typer.Option("--record", help="A record file. Default: the published one.", show_default=False)] = None,
    out: Out = Path("runs"),
) -> None:
    """Show a record in full.

    The published one or, where there is none, that of the last run.
    """
    library = _catalog()
    compared = any(comparison.id == id for comparison in library.comparisons)
    paper: Paper | Comparison = library.comparison(id) if compared else library.get(id)
    from neurarium import lab

    if record is None:
        ran = out / (f"compare-{id}" if compared else id) / "laptop" / "record.json"
        found = [path for path in (lab.record_path(paper), ran) if path.is_file()]
        if not found:
            raise BadInput(f"{paper.id} has no record yet; `neurarium {'compare' if compared else 'run'} {paper.id}` makes one")
        record = found[0]
    measured = lab.Record.load(record)
    if measured.id != paper.id:
        raise BadInput(f"{record} is a record of {measured.id!r}, not of {paper.id!r}")
    if html is not None:
        from neurarium.lab.files import atomic_write

        atomic_write(html, lab.as_html(measured, paper).encode("utf-8"))
        print(html)
    elif markdown:
        print(lab.as_markdown(measured, paper))
    else:
        _print_report(paper, measured, {"record": record})


@app.command()
def compare(
    id: Annotated[str | None, typer.Argument(help="A comparison's id; without one, all are listed.", show_default=False)] = None,
    scale: ScaleOption = Scale.laptop,
    seeds: Seeds = None,
    jobs: Jobs = None,
    device: Device = "cpu",
    engine: EngineOption = Engine.local,
    address: Address = None,
    out: Out = Path("runs"),
    fresh: Fresh = False,
    publish: Annotated[bool, typer.Option("--publish", help="Put the record among the published ones.")] = False,
) -> None:
    """Measure methods that do one job side by side."""
    if publish and scale is not Scale.laptop:
        raise BadInput("--publish takes laptop records only")
    if id is None:
        comparisons = _catalog().comparisons
        for entry in comparisons:
            print(f"{entry.id}: {entry.question}\n    {', '.join(entry.members)}")
        if not comparisons:
            print("The catalog has no comparison yet.")
        return
    comparison = _catalog().comparison(id)

    def measure() -> Record:
        from neurarium import lab

        return lab.compare(
            comparison,
            scale=scale.value,
            seeds=seeds,
            jobs=jobs,
            device=device,
            engine=engine.value,
            address=address,
            out=out,
            fresh=fresh,
        )

    record = _resumable(measure)
    files = _files(out / f"compare-{comparison.id}" / scale.value)
    if publish and not record.crashes:
        from neurarium import lab

        files["published"] = lab.publish(record)
    elif publish:
        print(f"neurarium: {comparison.id} is not published: an arm crashed", file=sys.stderr)
    _print_report(comparison, record, files)
    raise typer.Exit(1 if record.crashes else 0)


# ------------------------------------------------------------------------------------------------------------------ data, demo, doctor


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the data sets, and which of them are on this machine."""
    from neurarium import data

    here = set(data.available())
    rows = [
        {"name": s.name, "kind": s.kind, "here": s.name in here, "licence": s.licence, "note": s.note, "home": s.home}
        for s in data.SETS.values()
    ]
    if as_json:
        _print_json(rows)
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        print(_cut(f"{row['name']:<{width}}  {row['kind']:<8} {'here' if row['here'] else '-':<5} {row['note']} ({row['licence']})"))


@data_app.command("get")
def data_get(names: Annotated[list[str], typer.Argument(help="Data sets, by name.")]) -> None:
    """Download data sets, unless they are on this machine already."""
    from neurarium import data

    for name in names:
        print(f"{name}: {data.get(name)}")


@data_app.command("where")
def data_where(name: Annotated[str, typer.Argument(help="A data set's name.")]) -> None:
    """Say where a data set lies."""
    from neurarium import data

    print(data.where(name))


SiteOut = Annotated[Path, typer.Option("--out", help="Folder of the built site.")]


@site_app.command("build")
def site_build(
    out: SiteOut = Path("site"),
    records: Annotated[Path | None, typer.Option("--records", help="Folder. Default: the published ones.", show_default=False)] = None,
) -> None:
    """Build the atlas from the catalog, the docstrings and the published records."""
    from neurarium import site

    print(site.build(out, records=records) / "index.html")


@site_app.command("serve")
def site_serve(
    out: SiteOut = Path("site"), port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000
) -> None:
    """Serve the built atlas on 127.0.0.1; it is built first if it is not there."""
    from neurarium import site

    if not (out / "index.html").is_file():
        site.build(out)
    with site.serve(out, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@site_app.command("screenshots")
def site_screenshots(
    out: SiteOut = Path("site"), to: Annotated[Path, typer.Option("--to", help="Folder of the pictures.")] = Path("docs/assets")
) -> None:
    """Take the README's pictures of the built atlas; needs Chromium."""
    from neurarium.site.screenshots import screenshots

    for path in screenshots(out, to):
        print(path)


@app.command()
def demo(smoke: Annotated[bool, typer.Option("--smoke", help="A few seconds only: shows that it runs.")] = False) -> None:
    """Combine several papers on one network.

    Trained, pruned, given early exits and explained by different papers' methods, in less than a minute. This runs examples/compose.py.
    """
    import runpy

    package = Path(__file__).parent
    script = next((f for f in (package.parent.parent / "examples/compose.py", package / "_examples/compose.py") if f.is_file()), None)
    if script is None:
        raise BadInput("this installation holds no examples/compose.py; install neurarium from its repository or its wheel")
    runpy.run_path(str(script))["main"](smoke=smoke)


@app.command()
def doctor() -> None:
    """Look at this installation.

    Versions, threads, data, extras, compiler, each with advice. Exit code 1 if something needed is broken.
    """
    from neurarium.doctor import examine

    broken = 0
    for finding in examine():
        broken += finding.level == "broken"
        mark = {"ok": "ok  ", "note": "note", "broken": "BAD "}[finding.level]
        advice = f"  ({finding.advice})" if finding.advice else ""
        print(f"{mark}  {finding.name:<17} {_plain(finding.says)}{advice}")
    print(f"\n{broken} broken: see the advice in brackets" if broken else "\nEverything that neurarium needs is here.")
    raise typer.Exit(1 if broken else 0)


@app.command("matrix")
def matrix_(
    room: Annotated[str, typer.Argument(help="The room, for example compress.")] = "compress",
    paper: Annotated[list[str] | None, typer.Option(help="Only this paper; may be given several times.")] = None,
) -> None:
    """Try the room's transforms on twelve kinds of network.

    Prints a Markdown table: what each takes, what it refuses, and the layer that stands in its way.
    """
    from neurarium.testing.matrix import matrix, render

    print(_plain(render(matrix(room, paper or None)), lines=True))


# ------------------------------------------------------------------------------------------------------------------ helpers


def _catalog() -> Catalog:
    found = catalog.load()
    for problem in found.problems:
        print(f"neurarium: {problem}", file=sys.stderr)
    return found


def _chosen(ids: Sequence[str] | None, room: str | None, all_: bool) -> list[Paper]:
    """The papers that a command is about: named ones, or the working ones of a room or of all."""
    if (bool(ids) + (room is not None) + all_) != 1:
        raise BadInput("name papers by id, or give --room ROOM, or --all: one of the three")
    papers = _catalog()
    if ids:
        chosen = [papers.get(id) for id in dict.fromkeys(ids)]
        if planned := [paper.id for paper in chosen if paper.status != "works"]:
            raise BadInput(f"{', '.join(planned)}: planned, there is no code yet; `neurarium list --status works` shows what there is")
        return chosen
    chosen = list(papers.filter(room=room, status="works"))
    if not chosen:
        raise BadInput(f"no paper of the room {room} works yet" if room else "no paper of the catalog works yet")
    return chosen


def _resumable(work: Callable[[], T]) -> T:
    """The result of ``work``; when it is interrupted, says how to go on and exits with 130."""
    try:
        return work()
    except KeyboardInterrupt:
        again = shlex.join(["neurarium", *(word for word in sys.argv[1:] if word != "--fresh")])
        print(f"\nInterrupted. What is finished is kept; go on with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None


def _published(paper: Paper) -> list[dict[str, Any]] | None:
    """The claims of a working paper as its published record shows them; None where there is no valid one."""
    if paper.status != "works":
        return None
    from neurarium import lab

    if not lab.record_path(paper).is_file():
        return None
    try:
        return [verdict.to_dict() for verdict in lab.judge(paper, lab.published(paper))]
    except NeurariumError as error:
        print(f"neurarium: {_plain(str(error))}", file=sys.stderr)
        return None


def _row(paper: Paper) -> dict[str, Any]:
    return {"id": paper.id, "title": paper.title, "year": paper.year, "room": paper.room, "role": paper.role, "status": paper.status}


def _record_row(paper: Paper, record: Record) -> dict[str, Any]:
    from neurarium import lab

    head = {
        "id": paper.id,
        "scale": record.scale,
        "seconds": round(record.seconds, 3),
        "seeds": len(record.seeds),
        "crashes": len(record.crashes),
    }
    return head | {"claims": [verdict.to_dict() for verdict in lab.judge(paper, record)]}


def _files(folder: Path) -> dict[str, Path]:
    """What a run leaves in its folder."""
    return {name: path for name, path in (("record", folder / "record.json"), ("figure", folder / "figure.png")) if path.is_file()}


def _claim_row(claim: Claim) -> dict[str, Any]:
    unjudged = {"measured": None, "interval": None, "verdict": "not judged", "null_fails": None}
    return {"says": claim.says, "reported": claim.reported} | unjudged


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _print_papers(papers: Iterable[Paper]) -> None:
    rows = [(p.id, "" if p.year is None else str(p.year), p.role, p.room, p.status, p.title) for p in papers]
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(_cut("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def _print_report(subject: Paper | Comparison, record: Record, files: Mapping[str, Path]) -> None:
    from neurarium import lab

    _console().print(lab.as_text(record, subject))
    print()
    for name, path in files.items():
        print(f"{name:<10}{path}")
    print()


def _print_verification(report: VerifyReport) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = {"held": "green", "weaker": "yellow", "failed": "red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("paper", "record", "seeds", "seconds", "claims", "null fails", ""):
        table.add_column(name, justify="right" if name in ("seeds", "seconds") else "left")
    for paper in report.papers + report.comparisons:
        verdicts = [claim.verdict for claim in paper.claims]
        parts = [(f"{verdicts.count(v)} {v}  ", colours.get(v, "dim")) for v in dict.fromkeys(verdicts)]
        remarks = [*filter(None, [paper.why]), *(f"bound changed since: {says}" for says in paper.moved)]
        table.add_row(
            Text(paper.id),
            Text("invalid", "red") if not paper.valid else Text("stale", "yellow") if paper.stale else Text("valid", "green"),
            "-" if paper.record is None else str(len(paper.record.seeds)),
            "-" if paper.record is None else f"{paper.record.seconds:.0f}",
            Text.assemble(*parts),
            f"{sum(claim.null_fails is True for claim in paper.claims)} of {len(verdicts)}" if verdicts else "",
            Text(_plain("; ".join(remarks))),
        )
    _console().print(table)
    print("\n" + ", ".join(f"{count} {name}" for name, count in report.totals.items()))


def _cut(line: str) -> str:
    """A line that fits the terminal; whole where the output is no terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    return line if not width or len(line) <= width else line[: width - 1] + "…"


def _plain(text: str, *, lines: bool = False) -> str:
    """Text without characters that could steer a terminal."""
    return "".join(c if c.isprintable() or (lines and c == "\n") else "?" for c in text)
