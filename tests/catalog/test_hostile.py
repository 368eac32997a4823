"""Catalog files and plug-ins that nobody should trust: each is refused, and the message says why."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from neurarium import catalog
from neurarium.catalog import plugins, schema
from neurarium.catalog.library import read
from neurarium.errors import BadInput

PLANNED = '[[paper]]\nid = "acme-paper"\ntitle = "A Paper"\nrole = "layer"\nstatus = "planned"\n'


def parse(text: str | bytes, package: str = "neurarium"):
    return schema.parse(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"), "x.toml", "nn", package)


@pytest.mark.parametrize(
    "id",
    [
        "../../etc/passwd", "..", ".", "a/b", "a\\b", "/etc/passwd", "C:x", "a b", "a.b", "-rf", "--out", "a-", "a--b", "", "a\n", "a\0b",
        "A", "x" * 65, "аbc", "ａbc", "a\u200bb", "a\u202eb", "é", "٣", "~", "$HOME", "`id`", "*", "a;b",
    ],
)  # fmt: skip
def test_an_id_is_never_a_path_an_option_or_a_look_alike(id: str):
    text = PLANNED.replace('"acme-paper"', '"' + "".join(f"\\U{ord(c):08x}" for c in id) + '"')
    with pytest.raises(BadInput, match=r"field 'id': .* must be 1 to 64 lower-case ASCII letters and digits"):
        parse(text)


@pytest.mark.parametrize(
    "character", ["\x1b", "\x00", "\x07", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\U000e0041", "\ue000"]
)
def test_invisible_characters_in_text_are_refused(character: str):
    with pytest.raises(BadInput, match=f"field 'title': holds the control or invisible character U\\+{ord(character):04X}"):
        parse(PLANNED.replace("A Paper", f"A \\U{ord(character):08x} Paper"))


def test_every_control_and_format_character_of_unicode_is_refused():
    let_through = [
        f"U+{code:04X}"
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Co") and not schema._INVISIBLE.search(chr(code))
    ]
    assert let_through == []
    assert not schema._INVISIBLE.search("Poincaré – “naïve” λ Ω 中文 ∑ 😀")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("os:system", "must be written as"),
        ("os.path:join", "lies outside the package that declares it: its code must be in acme or neurarium"),
        ("subprocess.x:Popen", "lies outside"),
        ("acme_evil.x:run", "lies outside"),
        ("acme.x:__class__", "must be written as"),
        ("acme.__init__:x", "must be written as"),
        ("acme.x:y()", "must be written as"),
        ("acme.x:y;import os", "must be written as"),
        ("acme..x:y", "must be written as"),
        (".acme.x:y", "must be written as"),
        ("acme/x:y", "must be written as"),
        ("-m acme.x:y", "must be written as"),
        ("аcme.x:y", "must be written as"),  # a Cyrillic a
        ("acme.x:y\\n", "must be written as"),
        ("acme." + "x" * 300 + ":y", "must be written as"),
    ],
)
def test_a_reference_stays_inside_the_package_that_declares_it(reference: str, says: str):
    with pytest.raises(BadInput) as caught:
        parse(PLANNED + f'use = "{reference}"\n', "acme")
    assert "field 'use'" in str(caught.value)
    assert says in str(caught.value)
    parse(PLANNED + 'use = "acme.x:y"\nexperiment = "neurarium.experiments.z"\n', "acme")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = " + "[" * 5000, "nested too deeply"),
        ("x = " + "[\n" * 50_000, "nested too deeply"),
        ("x = " + "{a=" * 2000, "nested too deeply"),
        ("a." * 100_000 + "b = 1", "line 1 is longer than"),
        ("# " + "x" * 10_000, "line 1 is longer than"),
        (b"#" * 2_000_000, "larger than 1,000,000 bytes"),
        (b"title = '\xff\xfe'", "not UTF-8 text (byte 9)"),
        ("x = " + "9" * 5000, "not valid TOML"),
        (PLANNED + "year = " + "9" * 400, "field 'year': must be between"),
        (PLANNED + "year = 0x7fffffffffffffffffff", "field 'year': must be between"),
        (PLANNED + 'summary = """' + "word \n" * 3000 + '"""', "field 'summary': has 14,999 characters, at most 2,000"),
        (PLANNED + "also = [" + "'neurarium.x:y',\n" * 500 + "]", "field 'also': holds 500 items, at most 100"),
        (PLANNED + "[[paper.claim]]\nsays='s'\nreported='r'\nmeasure='a.b'\nholds='> 0'\n" * 31, "31 claims, at most 30"),
        (PLANNED + '"__class__" = 1', "unknown field '__class__'"),
        (PLANNED + "title = 'again'", "not valid TOML"),
    ],
)
def test_bombs_are_refused_in_no_time(text: str | bytes, says: str):
    start = time.perf_counter()
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - start < 5


def test_only_regular_files_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    for name in ("pipe.toml", "folder.toml", "absent.toml"):
        with pytest.raises(BadInput, match=f"{name}: not a regular file"):
            read(tmp_path / name)


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `acme` whose import would raise, with an empty folder `papers`."""
    folder = tmp_path / "site" / "acme"
    (folder / "papers").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the plug-in was imported')")
    (folder / "papers" / "__init__.py").write_text("raise SystemExit('the plug-in was imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder / "papers"


def extend(value: str, name: str = "acme") -> catalog.Catalog:
    return plugins.extend(catalog.load(), [EntryPoint(name=name, value=value, group=plugins.GROUP)])


def test_a_plugin_adds_papers_and_is_not_imported(acme: Path):
    (acme / "vision.toml").write_text(PLANNED + 'use = "acme.x:y"\n')
    (acme / "nn.toml").write_text(PLANNED.replace("acme-paper", "acme-other"))
    both = extend("acme.papers")
    assert both.problems == ()
    assert both.get("acme-paper").room == "vision"
    assert both.get("acme-paper").package == "acme"
    assert len(both) == len(catalog.load()) + 2
    assert [p.id for p in extend("acme.papers:vision").papers[-1:]] == ["acme-paper"]
    assert "acme" not in sys.modules


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (PLANNED.replace("acme-paper", "sltt"), "'sltt': field 'id': already taken in room 'spiking' (neurarium)"),
        (PLANNED + 'use = "shutil.x:rmtree"\n', "its code must be in acme or neurarium"),
        (PLANNED + 'experiment = "antigravity"\n', "its code must be in acme or neurarium"),
        ("x = " + "[" * 5000, "nested too deeply"),
        ("this is not TOML", "not valid TOML"),
        ("#" * 2_000_000, "larger than"),
    ],
)
def test_a_broken_plugin_is_left_out_and_told_of(acme: Path, content: str, says: str):
    (acme / "vision.toml").write_text(content)
    found = extend("acme.papers")
    assert found.papers == catalog.load().papers
    (problem,) = found.problems
    assert problem.startswith("plug-in catalog 'acme' (acme.papers) is left out: ")
    assert says in problem


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere_at_all.papers", "there is no package 'nowhere_at_all'"),
        ("os", "there is no package 'os' with a folder of its own"),
        ("sys", "there is no package 'sys'"),
        ("acme.empty", "names no TOML file"),
        ("acme.papers:absent", "names no TOML file"),
        ("acme.papers:../../x", "must be 'package.folder'"),
        ("../acme", "must be 'package.folder'"),
        ("/etc", "must be 'package.folder'"),
        ("acme.papers:x [extra]", "must be 'package.folder'"),
        ("neurarium.catalog.rooms", "a package of its own"),
        ("a" * 5000, "must be 'package.folder'"),
    ],
)
def test_an_entry_point_names_a_folder_of_a_package(acme: Path, value: str, says: str):
    (problem,) = extend(value).problems
    assert says in problem
    assert len(problem) < 700


def test_a_link_out_of_the_plugins_package_is_refused(acme: Path, tmp_path: Path):
    (tmp_path / "secret.toml").write_text("password = 'x'")
    (acme / "vision.toml").symlink_to(tmp_path / "secret.toml")
    (problem,) = extend("acme.papers").problems
    assert "vision.toml is a link that leads out of the package" in problem
    assert "password" not in problem


def test_a_plugins_name_cannot_write_to_the_terminal(acme: Path):
    (problem,) = extend("acme.empty", name="x\x1b[2Jx\u202e").problems
    assert problem.isprintable()


def test_two_broken_plugins_do_not_hide_a_good_one(acme: Path):
    (acme / "vision.toml").write_text(PLANNED)
    points = [EntryPoint(name=n, value=v, group=plugins.GROUP) for n, v in (("a", "os"), ("b", "acme.papers"), ("c", "nowhere_at_all"))]
    found = plugins.extend(catalog.load(), points)
    assert "acme-paper" in found
    assert len(found.problems) == 2
