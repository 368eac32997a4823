"""The command line: ``neurarium list``, ``show``, ``run``, ``verify`` and the rest.

Commands here read arguments, call the library and print; they hold no logic of their own. Whatever is slow to import (torch through the
lab, rich) is imported inside the command that needs it, so that ``neurarium list`` answers at once.

Exit codes: 0 done; 1 done, and the answer is no (``verify``, ``doctor``, a crashed arm); 2 the request cannot be met; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurarium import __version__, catalog
from neurarium.errors import BadInput, NeurariumError

if TYPE_CHECKING:
    from neurarium.catalog import Paper

__all__ = ["app", "main"]

_OPTIONS: dict[str, Any] = {"add_completion": False, "no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(name="neurarium", help="Neural-network papers as working, composable PyTorch parts.", **_OPTIONS)
data_app = typer.Typer(help="Data sets: what there is, what is here, and where it lies.", **_OPTIONS)
app.add_typer(data_app, name="data")


class Scale(str, Enum):
    """How much work a run does."""

    smoke = "smoke"  # seconds; shows that it runs, its claims are not judged
    laptop = "laptop"  # minutes; every claim is judged


class Engine(str, Enum):
    """Where the seeds of a run are computed."""

    local = "local"
    ray = "ray"


Ids = Annotated[list[str] | None, typer.Argument(help="Papers, by id.", show_default=False)]
Room = Annotated[str | None, typer.Option("--room", help="All working papers of one room.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All working papers.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for records, figures and unfinished runs.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, max=1000, help="Number of seeds. Default: the paper's.", show_default=False)]
Jobs = Annotated[int, typer.Option("--jobs", min=1, max=1024, help="Seeds computed at a time.")]


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
    """Show what a paper is, how to use its method, and how its claims stand."""
    paper = _catalog().get(id)
    judged = _published(paper)
    if as_json:
        details = {
            "arxiv": paper.arxiv, "summary": paper.summary, "use": paper.use, "also": list(paper.also), "experiment": paper.experiment,
            "evidence": paper.evidence, "evidence_note": paper.evidence_note, "seeds": paper.seeds, "package": paper.package,
        }  # fmt: skip
        _print_json(_row(paper) | details | {"claims": judged or [_claim_json(claim) for claim in paper.claims]})
        return
    print(f"{paper.title}\n")
    facts = {
        "id": paper.id,
        "room": paper.room,
        "role": paper.role,
        "year": "" if paper.year is None else str(paper.year),
        "arXiv": f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else "",
        "status": paper.status,
        "use": _import_line(paper.use) if paper.use else "",
        "also": ", ".join(paper.also),
        "experiment": paper.experiment or "",
        "evidence": ": ".join(filter(None, (paper.evidence, paper.evidence_note))),
        "from": paper.package if paper.package != "neurarium" else "",
    }
    for name, value in facts.items():
        if value:
            print(f"  {name:<11}{value}")
    if paper.summary:
        print(f"\n{_wrapped(paper.summary)}")
    if paper.claims:
        print("\nClaims")
        for claim, verdict in zip(paper.claims, judged or [None] * len(paper.claims)):
            print(f"  - {claim.says}\n    the paper: {claim.reported}\n    measured as {claim.measure}, holds when {claim.holds}")
            if verdict:
                print(f"    here: {_measured(verdict)}: {verdict['verdict']}")
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
    scale: Annotated[Scale, typer.Option(help="smoke: seconds, claims not judged. laptop: minutes, claims judged.")] = Scale.laptop,
    seeds: Seeds = None,
    jobs: Jobs = 1,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    engine: Annotated[Engine, typer.Option(help="local: this machine. ray: a cluster, or this machine through ray.")] = Engine.local,
    out: Out = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming an unfinished run.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Put finished laptop records into the published records.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what papers claim. An interrupted run resumes where it stopped."""
    papers = _selected(ids, room, all_)
    if publish and scale is Scale.smoke:
        raise BadInput("--publish needs --scale laptop: a smoke run's claims are not judged")
    _check_out(out, [paper.id for paper in papers])
    command = "neurarium run " + " ".join(_arguments(ids, room, all_, scale, seeds, jobs, device, engine, out, publish, as_json))
    try:
        from neurarium import lab

        options: dict[str, Any] = {
            "scale": scale.value, "seeds": seeds, "jobs": jobs, "device": device, "engine": engine.value, "out": out, "fresh": fresh,
        }  # fmt: skip
        results, failed = [], False
        for result in lab.run_many(papers, progress=not as_json and sys.stderr.isatty(), **options):
            failed |= not result.record.complete
            if publish and result.record.complete:
                lab.publish(result.record)
            results.append(result)
            if not as_json:
                print(lab.report.text(result.paper, result.record))
                print(f"record  {result.path}")
                if result.figure is not None:
                    print(f"figure  {result.figure}")
                print()
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is finished is kept. Go on with: {command}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        _print_json({"papers": [lab.result_json(r) for r in results]})
    raise typer.Exit(1 if failed else 0)
