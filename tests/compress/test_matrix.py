"""Every transform of the room meets twelve kinds of network, and data and models that no transform can use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import ARCHITECTURES, Subject, subject
from neurarium.testing.matrix import Cell, attempt, matrix, render, transforms

TRANSFORMS = transforms("compress")
HUGGING_FACE = {"llama", "opt", "gpt2"}
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "compress.md"

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_cell_is_what_the_guide_says(architecture: str) -> None:
    if architecture in HUGGING_FACE:
        pytest.importorskip("transformers")
    rows = {line.split("|")[1].strip(" `"): line for line in GUIDE.read_text().splitlines() if line.startswith("| `")}
    column = list(ARCHITECTURES).index(architecture) + 2
    for paper, transform in TRANSFORMS.items():
        found = attempt(paper, transform, architecture)
        assert rows[paper].split("|")[column].strip() == ("no" if found.refusal else "yes"), (paper, found.refusal)


class Watched(list):
    """A loader that knows whether anybody read it."""

    read = False

    def __iter__(self) -> Iterator:
        self.read = True
        return super().__iter__()


@pytest.mark.parametrize("kind", ["empty", "nan"])
@pytest.mark.parametrize("paper", TRANSFORMS)
def test_a_loader_without_numbers_is_refused_and_the_model_stays(paper: str, kind: str) -> None:
    case = subject("vgg")
    batches = [] if kind == "empty" else [(torch.full_like(x, torch.nan), y) for x, y in case.loader]
    case = replace(case, loader=Watched(batches))
    before = copy.deepcopy(case.model.state_dict())
    try:
        result = TRANSFORMS[paper](case)
    except BadInput:
        pass
    else:
        assert not case.loader.read, "it read a useless loader and said nothing"
        assert bool(case.run(result).isfinite().all())
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())


class Tied(nn.Module):
    """Two layers with one weight, used one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(768, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


class Branching(nn.Module):
    """Takes a way that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(768, 12), nn.Linear(768, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(torch.relu(self.a(x) if bool(x.sum() > 0) else self.b(x)))


def tried(paper: str, case: Subject) -> nn.Module | None:
    """The transform's result, or None where it refused by name; the input must be as before in both cases."""
    before = copy.deepcopy(case.model.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = TRANSFORMS[paper](case)
    except (BadInput, UnsupportedModel) as refusal:
        assert any(name in str(refusal) for name, _ in case.model.named_modules() if name) or type(case.model).__name__ in str(refusal)
        result = None
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
    return result


@pytest.mark.parametrize("paper", TRANSFORMS)
def test_shared_weights_stay_shared_or_are_refused(paper: str) -> None:
    torch.manual_seed(0)
    case = replace(subject("mlp"), model=Tied().eval())
    result = tried(paper, case)
    if result is not None:
        assert bool(case.run(result).isfinite().all())
        a, b = getattr(result, "a", None), getattr(result, "b", None)
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
            assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("paper", TRANSFORMS)
def test_control_flow_on_data_is_refused_or_survives(paper: str) -> None:
    torch.manual_seed(0)
    case = replace(subject("mlp"), model=Branching().eval())
    result = tried(paper, case)
    if result is not None:
        for sign in (1, -1):
            assert bool(case.run(result).isfinite().all()), sign
            x = sign * case.inputs[0]
            with torch.no_grad():
                assert result(x).shape == (4, 5)


def test_the_table_shows_refusals_with_their_reasons() -> None:
    text = render([Cell("a", "mlp"), Cell("a", "vgg", "0: no"), Cell("b", "mlp"), Cell("b", "vgg")])
    assert text.splitlines()[2:4] == ["| `a` | yes | no |", "| `b` | yes | yes |"]
    assert text.endswith("- `a`, vgg: 0: no")


def test_a_changed_input_an_idle_transform_or_a_silent_refusal_is_a_defect() -> None:
    def spoil(case: Subject) -> nn.Module:
        with torch.no_grad():
            next(case.model.parameters()).zero_()
        return copy.deepcopy(case.model)

    def grumble(case: Subject) -> nn.Module:
        raise UnsupportedModel("no")

    def idle(case: Subject) -> nn.Module:
        return copy.deepcopy(case.model)

    with pytest.raises(AssertionError, match="did nothing"):
        attempt("x", idle, "mlp")
    with pytest.raises(AssertionError, match="changed its input"):
        attempt("x", spoil, "mlp")
    with pytest.raises(AssertionError, match="names no layer"):
        attempt("x", grumble, "mlp")
    with pytest.raises(BadInput, match="not in the matrix"):
        matrix("compress", ["none"])
    with pytest.raises(BadInput, match="no transform"):
        transforms("nowhere")
