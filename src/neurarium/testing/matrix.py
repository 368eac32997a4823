"""The matrix of methods and architectures: each transform of a room tried on each of
:data:`~neurarium.testing.architectures.ARCHITECTURES`.

A cell is good if the transform leaves its input as it was and returns a module with another state that gives a finite output of the old
shape, or if it refuses and says which layer stands in its way. Anything else is a defect, and :func:`attempt` raises it.

A room takes part by dictionaries ``COVER`` (paper's id -> function of a
:class:`~neurarium.testing.architectures.Subject`) in the modules of ``neurarium.testing.examples.ROOM``.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import ARCHITECTURES, Subject, subject

__all__ = ["Cell", "attempt", "matrix", "render", "transforms"]

Transform = Callable[[Subject], nn.Module]


@dataclass(frozen=True)
class Cell:
    """What came of one attempt: `refusal` is empty if the transform succeeded."""

    paper: str
    architecture: str
    refusal: str = ""


def transforms(room: str) -> dict[str, Transform]:
    """Every paper of the room that takes part, by its id.

    Raises:
        BadInput: the room has no dictionary ``COVER``.
    """
    found: dict[str, Transform] = {}
    try:
        package = importlib.import_module(f"neurarium.testing.examples.{room}")
    except ModuleNotFoundError:
        package = None
    for info in pkgutil.iter_modules(getattr(package, "__path__", [])):
        found |= getattr(importlib.import_module(f"neurarium.testing.examples.{room}.{info.name}"), "COVER", {})
    if not found:
        raise BadInput(f"no transform of the room {room!r} says how it is tried on other architectures")
    return dict(sorted(found.items()))


def attempt(paper: str, transform: Transform, architecture: str, seed: int = 0) -> Cell:
    """Tries one transform on one fresh model.

    Raises:
        AssertionError: the input was changed, the result is the input again, has another output shape or is not finite, or a refusal names
            no layer.
    """
    case = subject(architecture, seed)
    before, shape = copy.deepcopy(case.model.state_dict()), case.run().shape
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            result = transform(case)
    except (UnsupportedModel, BadInput) as refusal:
        message = " ".join(str(refusal).split())
        names = {part for name, module in case.model.named_modules() for part in (name, type(module).__name__) if part}
        assert any(name in message for name in names), f"{paper} refuses {architecture} and names no layer: {message}"
        result = None
    after = case.model.state_dict()
    changed = [k for k in before if k not in after or not torch.equal(before[k], after[k])] + [k for k in after if k not in before]
    assert not changed, f"{paper} changed its input, {architecture}: {', '.join(changed[:3])}"
    if result is None:
        return Cell(paper, architecture, message)
    made = result.state_dict()
    same = made.keys() == before.keys() and all(made[k].shape == v.shape and torch.equal(made[k], v) for k, v in before.items())
    assert not same, f"{paper} did nothing to {architecture} and did not say so"
    output = case.run(result)
    assert output.shape == shape, f"{paper} on {architecture}: output {tuple(output.shape)}, before {tuple(shape)}"
    assert bool(output.isfinite().all()), f"{paper} on {architecture}: the output is not finite"
    return Cell(paper, architecture)


def matrix(room: str, papers: Iterable[str] | None = None, architectures: Iterable[str] = ARCHITECTURES) -> list[Cell]:
    """All cells of a room (or of some of its papers), row by row."""
    known, architectures = transforms(room), list(architectures)
    chosen = list(known) if papers is None else list(papers)
    if unknown := [p for p in chosen if p not in known]:
        raise BadInput(f"{', '.join(unknown)}: not in the matrix of the room {room!r}; there are {', '.join(known)}")
    return [attempt(paper, known[paper], name) for paper in chosen for name in architectures]


def render(cells: list[Cell]) -> str:
    """A Markdown table, a row a paper, and under it the reason of each refusal."""
    columns = list(dict.fromkeys(c.architecture for c in cells))
    lines = [f"| paper | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for paper in dict.fromkeys(c.paper for c in cells):
        marks = ["no" if c.refusal else "yes" for c in cells if c.paper == paper]
        lines.append(f"| `{paper}` | {' | '.join(marks)} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for c in cells:
        if c.refusal:
            reasons.setdefault((c.paper, c.refusal), []).append(c.architecture)
    notes = [f"- `{paper}`, {', '.join(names)}: {why}" for (paper, why), names in reasons.items()]
    return "\n".join([*lines, *(["", "Refused:", "", *notes] if notes else [])])
