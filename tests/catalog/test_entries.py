"""The shipped catalog, and the reading of entries."""

from __future__ import annotations

import pickle
import re
import tomllib
from pathlib import Path

import pytest

from neurarium import catalog
from neurarium.catalog import schema
from neurarium.catalog.schema import parse
from neurarium.errors import BadInput

PLANNED = '[[paper]]\nid = "a-paper"\ntitle = "A Paper"\nyear = 2020\nrole = "layer"\nstatus = "planned"\n'
CLAIM = '[[paper.claim]]\nsays = "is better"\nreported = "by far"\nmeasure = "a.x - b.x"\nholds = ">= 0.1"\n'
WORKS = (
    PLANNED.replace("planned", "works")
    + """
use = "neurarium.nn.paper:Paper"
experiment = "neurarium.experiments.nn.a_paper"
example = "neurarium.testing.examples.nn:a_paper"
summary = "Does something."
evidence = "real"
"""
    + CLAIM
)


def read(text: str, **options: str):
    papers, comparisons = parse(text.encode(), "nn.toml", **({"room": "nn"} | options))
    return [*papers, *comparisons]


def test_the_catalog_holds_all_280_papers():
    papers = catalog.load()
    assert len(papers) >= 280
    assert len({p.id for p in papers}) == len(papers)
    assert len(papers.rooms) == 18
    assert papers.problems == ()
    assert all(p.title and p.role in catalog.ROLES and p.status in catalog.STATUSES for p in papers)


def test_role_names_are_those_of_the_roles_module():
    from neurarium.roles import ROLES

    assert tuple(ROLES) == catalog.ROLES


def test_the_references_of_working_papers_resolve():
    for paper in catalog.load().filter(status="works"):
        for reference in (paper.use, paper.experiment, paper.example, *paper.also):
            assert reference is not None
            assert catalog.resolve(reference) is not None


def test_a_working_paper_is_read_field_by_field():
    (paper,) = read(WORKS + 'direction = "> 0"\nnull = { a = "b" }\n')
    assert (paper.id, paper.room, paper.role, paper.year, paper.seeds, paper.timed) == ("a-paper", "nn", "layer", 2020, 3, False)
    assert paper.use == "neurarium.nn.paper:Paper"
    (claim,) = paper.claims
    assert (claim.measure, claim.holds, claim.direction, claim.null) == ("a.x - b.x", ">= 0.1", "> 0", {"a": "b"})
    assert hash(paper) == hash(pickle.loads(pickle.dumps(paper)))


def test_a_comparison_is_read():
    text = '[[comparison]]\nid = "c"\nquestion = "?"\nmembers = ["x", "y"]\nexperiment = "neurarium.experiments.nn.compare_c"\n'
    (comparison,) = read(text)
    assert comparison.members == ("x", "y")
    assert comparison.room == "nn"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PLANNED.replace('id = "a-paper"\n', ""), "paper number 1: field 'id': is missing"),
        (PLANNED.replace("a-paper", "A_Paper"), "field 'id': 'A_Paper' must be"),
        (PLANNED.replace("a-paper", "a--paper"), "field 'id'"),
        (PLANNED.replace("2020", '"2020"'), "field 'year': must be an integer, is a string"),
        (PLANNED.replace("2020", "true"), "field 'year': must be an integer, is true or false"),
        (PLANNED.replace("2020", "20200"), "must be between 1940 and 2100"),
        (PLANNED.replace("layer", "lawyer"), "field 'role': must be one of layer, model"),
        (PLANNED.replace("planned", "done"), "field 'status': must be one of planned, works"),
        (PLANNED + 'arxiv = "2302.14311v2"', "field 'arxiv': '2302.14311v2' is not an arXiv number"),
        (PLANNED + 'arxiv = "2313.14311"', "is not an arXiv number"),
        (PLANNED + 'sumary = "x"', "unknown field 'sumary'; did you mean 'summary'?"),
        (PLANNED + "timed = 1", "field 'timed': must be true or false"),
        (PLANNED + 'also = "neurarium.nn:X"', "field 'also': must be an array"),
        (PLANNED + "seeds = 0", "field 'seeds': must be between 1 and 100"),
        (PLANNED + "null = { a = 1 }", "field 'null': must map"),
        (PLANNED + 'use = "neurarium.nn.paper"', "field 'use': 'neurarium.nn.paper' must be written as 'package.module:object'"),
        (PLANNED + 'experiment = "neurarium.nn:run"', "must be written as 'package.module'"),
        (PLANNED + PLANNED, "'a-paper': field 'id': appears twice in this file"),
        (PLANNED + "claim = 3", "field 'claim': must be an array of tables"),
        (PLANNED + CLAIM.replace(">= 0.1", "about 0.1"), "claim 1: field 'holds': 'about 0.1' is not a bound"),
        (PLANNED + CLAIM.replace(">= 0.1", "> 1 and < 0"), "no value satisfies"),
        (PLANNED + CLAIM.replace('measure = "a.x - b.x"\n', ""), "claim 1: field 'measure': is missing"),
        (WORKS.replace(CLAIM, ""), "field 'claim': a paper whose status is 'works' must have at least one"),
        (WORKS.replace('summary = "Does something."', ""), "field 'summary': a paper whose status is 'works' must have it"),
        (WORKS.replace('use = "neurarium.nn.paper:Paper"', ""), "field 'use'"),
        (WORKS.replace('evidence = "real"', 'evidence = "real"\nseeds = 2'), "field 'seeds': must be at least 3"),
        (WORKS.replace('evidence = "real"', 'evidence = "generated"'), "field 'evidence_note'"),
        ("papers = []", "unknown field 'papers'; did you mean 'paper'?"),
        ("[paper]\nid = 'x'", "field 'paper': must be an array of tables"),
        ('[[comparison]]\nid = "c"\nquestion = "?"\nmembers = ["x"]\nexperiment = "neurarium.x"\n', "at least two papers"),
        ("[[paper]\n", "not valid TOML"),
    ],
)
def test_an_error_names_the_file_and_the_field(text: str, says: str):
    with pytest.raises(BadInput) as caught:
        read(text)
    assert str(caught.value).startswith("nn.toml")
    assert says in str(caught.value)


def test_an_error_names_the_paper():
    with pytest.raises(BadInput, match=r"^nn\.toml: paper 'b-paper': field 'year'"):
        read(PLANNED + PLANNED.replace("a-paper", "b-paper").replace("2020", "'x'"))


def test_ids_are_unique_over_files(tmp_path: Path):
    for room in ("nn", "learn"):
        (tmp_path / f"{room}.toml").write_text(PLANNED)
    with pytest.raises(BadInput, match=r"room 'nn'.*'a-paper': field 'id': already taken in room 'learn'"):
        catalog.load_files(sorted(tmp_path.glob("*.toml")))


def test_members_of_a_comparison_must_exist(tmp_path: Path):
    (tmp_path / "nn.toml").write_text(
        PLANNED + '[[comparison]]\nid = "c"\nquestion = "?"\nmembers = ["a-paper", "a-papr"]\nexperiment = "neurarium.experiments.nn.c"\n'
    )
    with pytest.raises(BadInput, match="no paper has the id 'a-papr'; did you mean a-paper"):
        catalog.load_files([tmp_path / "nn.toml"])


def test_get_suggests_near_ids():
    assert catalog.load().get("sltt").room == "spiking"
    with pytest.raises(BadInput, match=r"no paper has the id 'stlt'; did you mean .*sltt"):
        catalog.load().get("stlt")


def test_filter_narrows_and_refuses_unknown_values():
    papers = catalog.load()
    chosen = papers.filter(room="spiking", role="learner")
    assert chosen
    assert all(p.room == "spiking" and p.role == "learner" for p in chosen)
    assert papers.filter() == papers.papers
    for wrong in ({"room": "spikin"}, {"role": "learners"}, {"status": "work"}):
        with pytest.raises(BadInput, match="did you mean"):
            papers.filter(**wrong)


def test_resolve_imports_on_demand_and_explains():
    assert catalog.resolve("neurarium.errors:BadInput") is BadInput
    for reference, says in {
        "neurarium.nowhere:X": "there is no module 'neurarium.nowhere'",
        "neurarium.errors:Nothing": "has no 'Nothing'",
        "neurarium.catalog:schema": "names a module, not an object",
        "neurarium.errors:__builtins__": "must be written",
    }.items():
        with pytest.raises(BadInput, match=re.escape(says)):
            catalog.resolve(reference)


def test_room_files_carry_no_more_than_the_schema_knows():
    folder = Path(schema.__file__).parent / "rooms"
    for file in folder.glob("*.toml"):
        assert set(tomllib.loads(file.read_text(encoding="utf-8"))) <= {"paper", "comparison"}, file.name
