"""Fingerprints: what is reached counts, and nothing else."""

from __future__ import annotations

import re
import textwrap

import pytest

from neurarium.errors import BadInput
from neurarium.lab.fingerprinting import Code

FILES = {
    "__init__.py": '"""A package."""\n',
    "nn/__init__.py": "from fpkg.nn.layers import Layer\nfrom .lazy import *\n",
    "nn/layers.py": '''
        """Layers."""
        from fpkg.nn import helpers
        SCALE = 2.0
        UNUSED = 3.0

        class Layer(helpers.Base):
            """A layer."""
            def forward(self, x):
                """Docs."""
                return helpers.double(x) * SCALE  # a comment

        def unrelated(x):
            return x
        ''',
    "nn/helpers.py": """
        class Base:
            pass

        def double(x):
            from fpkg.deep import inner
            return inner.add(x, x)

        def triple(x):
            return 3 * x
        """,
    "nn/lazy.py": "def starred(x):\n    return x + 1\n\ndef not_used(x):\n    return x\n",
    "deep/__init__.py": """
        import importlib
        def __getattr__(name):
            return getattr(importlib.import_module("fpkg.deep.hidden"), name)
        """,
    "deep/inner.py": "def add(x, y):\n    return x + y\n\ndef subtract(x, y):\n    return x - y\n",
    "deep/hidden.py": "def found(x):\n    return x\n",
    "rules.py": """
        RULES = {}
        def rule(name):
            def register(function):
                RULES[name] = function
                return function
            return register

        @rule("one")
        def first(x):
            return x + 1

        def apply(name, x):
            return RULES[name](x)
        """,
    "study.py": """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        import fpkg.nn as nets
        from fpkg.nn import starred
        from fpkg.deep import found
        from fpkg.rules import apply
        if TYPE_CHECKING:
            from fpkg.nn.helpers import triple

        EPOCHS = 3
        COLOUR = "red"

        def run(trial):
            layer = nets.Layer()
            for arm in trial.arms("a"):
                arm.log(x=_measure(layer, EPOCHS))

        def _measure(layer, epochs):
            return apply("one", found(starred(layer.forward(epochs))))

        def figure(record, fig):
            fig.suptitle(COLOUR)
        """,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, source in FILES.items():
        path = tmp_path / "fpkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "fpkg"


def digest(*references):
    return Code({"fpkg"}).digest(references or ("fpkg.study:run",))


def edit(package, file, pattern, replacement):
    path = package / file
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text
    path.write_text(changed)


def test_what_is_reached(package):
    found = {f"{module}:{name}" for module, name in Code({"fpkg"}).reached(["fpkg.study:run"])}
    assert found == {
        "fpkg.study:run",
        "fpkg.study:EPOCHS",
        "fpkg.study:_measure",
        "fpkg.nn.layers:Layer",
        "fpkg.nn.layers:SCALE",
        "fpkg.nn.helpers:Base",
        "fpkg.nn.helpers:double",
        "fpkg.deep.inner:add",
        "fpkg.deep.hidden:found",
        "fpkg.nn.lazy:starred",
        "fpkg.rules:RULES",
        "fpkg.rules:apply",
        "fpkg.rules:rule",
        "fpkg.rules:first",
    }


@pytest.mark.parametrize(
    ("file", "pattern", "replacement"),
    [
        ("nn/layers.py", '"""A layer."""', '"""Quite another text."""'),
        ("nn/layers.py", "  # a comment", ""),
        ("nn/layers.py", r"helpers.double\(x\) \* SCALE", "(helpers.double( x )\n            * SCALE)"),
        ("nn/layers.py", "return x\n", "return -x\n"),
        ("nn/layers.py", "UNUSED = 3.0", "UNUSED = 4.0\n\ndef new_function():\n    return 1\n"),
        ("nn/helpers.py", "3 \\* x", "4 * x"),
        ("nn/lazy.py", r"def not_used\(x\):\n    return x", "def not_used(x):\n    return 5"),
        ("deep/inner.py", "x - y", "y - x"),
        ("study.py", "fig.suptitle", "fig.legend"),
        ("study.py", '"red"', '"blue"'),
        ("study.py", "import triple", "import triple, double"),
    ],
)
def test_what_does_not_matter_does_not_count(file, pattern, replacement, package):
    before = digest()
    edit(package, file, pattern, replacement)
    assert digest() == before


@pytest.mark.parametrize(
    ("file", "pattern", "replacement"),
    [
        ("nn/layers.py", "SCALE = 2.0", "SCALE = 2.5"),
        ("nn/layers.py", r"\* SCALE", "+ SCALE"),
        ("nn/helpers.py", "pass", "bias = 1"),
        ("nn/helpers.py", r"inner.add\(x, x\)", "inner.add(x, 0)"),
        ("deep/inner.py", r"x \+ y", "x + y + 1e-9"),
        ("deep/hidden.py", "return x", "return 2 * x"),
        ("nn/lazy.py", r"x \+ 1", "x + 2"),
        ("rules.py", r"x \+ 1", "x + 2"),
        ("rules.py", "RULES = {}", "RULES = dict()"),
        ("nn/helpers.py", r"\Z", "\nBase.patched = True\n"),
        ("study.py", "EPOCHS = 3", "EPOCHS = 4"),
        ("study.py", r"_measure\(layer, EPOCHS\)", "_measure(layer, 1)"),
        ("nn/__init__.py", "from fpkg.nn.layers import Layer", "from fpkg.nn.helpers import Base as Layer"),
    ],
)
def test_what_is_reached_counts(file, pattern, replacement, package):
    before = digest()
    edit(package, file, pattern, replacement)
    assert digest() != before


def test_use_and_also_count_too(package):
    before = digest("fpkg.study:run", "fpkg.nn.helpers:triple")
    assert before != digest("fpkg.study:run")
    edit(package, "nn/helpers.py", "3 \\* x", "4 * x")
    assert digest("fpkg.study:run", "fpkg.nn.helpers:triple") != before


def test_a_re_exported_reference_is_followed(package):
    assert digest("fpkg.nn:Layer") == digest("fpkg.nn.layers:Layer")


def test_a_missing_reference_is_said(package):
    with pytest.raises(BadInput, match="no such definition"):
        digest("fpkg.nn:Nothing")


def test_nothing_is_imported(package):
    (package / "study.py").write_text("raise SystemExit('imported')\n\ndef run(trial):\n    pass\n")
    assert len(digest()) == 64


def test_the_machinery_is_set_apart(make_paper, toy):
    from neurarium.lab import fingerprint

    with pytest.raises(BadInput, match="no such definition"):
        Code().reached(["neurarium.lab.trial:Trial"])
    assert len(fingerprint(toy)) == 64
    with pytest.raises(BadInput, match="has no experiment"):
        fingerprint(make_paper(experiment=None))


def test_the_hash_does_not_depend_on_the_python_version(package):
    """The tree is written down by ourselves, without positions, empty fields and contexts; this pins it."""
    source = "def run(trial, *, n: int = 3) -> None:\n    '''Docs.'''\n    return [f'{x!r:>{n}}' for x in trial if x is not None]\n"
    (package / "study.py").write_text(source)
    assert digest() == PINNED


PINNED = "5e9f6188b7dca343598d60eaf78ace69c0c8c287fdffccfdf2cacde3891fa3c7"
