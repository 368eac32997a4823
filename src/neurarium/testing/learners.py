"""Checks of the role `learner`: fit(model, loader, epochs=...) -> History trains in place, repeatably and resumably."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import History
from neurarium.testing.example import Example, Skipped
from neurarium.testing.state import assert_same, seeded, unchanged_rng

__all__ = ["CHECKS"]


def _model(example: Example) -> nn.Module:
    with seeded(0):
        return example.model(0)  # type: ignore[misc]


def _loader(example: Example) -> Any:
    with seeded(0):
        return example.loader(0)  # type: ignore[misc]


def _fit(example: Example, model: nn.Module, *, epochs: int = 2, noise: int = 0, loader: Any = None, **options: Any) -> History:
    """fit under an arbitrary global random state: the seed argument alone must decide."""
    with seeded(noise):
        return example.make().fit(model, _loader(example) if loader is None else loader, epochs=epochs, seed=0, **options)  # type: ignore[misc]


def trains_in_place(example: Example) -> None:
    """The given model itself is changed; the History counts steps and has one finite entry an epoch."""
    model = _model(example)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    history = _fit(example, model)
    assert isinstance(history, History), f"fit returned {type(history).__name__}, not History"
    assert history.steps > 0, "History.steps is 0 after two epochs"
    assert len(history.train) >= 2, f"History.train has {len(history.train)} entries after two epochs (of each block, if they take turns)"
    assert all(math.isfinite(e["loss"]) for e in history.train), "a training loss is not finite"
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed, "two epochs changed no parameter of the model"


def same_seed_same_result(example: Example) -> None:
    """The seed argument alone decides: two fits of one seed agree bit for bit under different global random states."""
    first, second = _model(example), _model(example)
    _fit(example, first, noise=1)
    _fit(example, second, noise=2)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert_same(a, b, f"two fits of one seed differ in {name}: the seed is ignored")


def keeps_the_global_state(example: Example) -> None:
    """fit leaves the global random state as it was."""
    model, loader, learner = _model(example), _loader(example), example.make()  # type: ignore[misc]
    with unchanged_rng("fit"):
        learner.fit(model, loader, epochs=1, seed=0)


def resumes(example: Example) -> None:
    """One epoch, then resume=history.state up to two, equals two epochs bit for bit."""
    whole, parts = _model(example), _model(example)
    want = _fit(example, whole, epochs=2)
    half = _fit(example, parts, epochs=1)
    assert half.state, "History.state is empty: there is nothing to resume from"
    got = _fit(example, parts, epochs=2, resume=half.state, noise=3)
    for (name, a), (_, b) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        assert_same(a, b, f"{name} differs after a resume: some state is not carried")
    assert got.steps == want.steps, f"a resumed run counts {got.steps} steps, the undisturbed one {want.steps}"


def leaves_data_alone(example: Example) -> None:
    """The batches are the same before and after."""
    batches = [tuple(t.clone() for t in batch) for batch in _loader(example)]
    given = [tuple(t.clone() for t in batch) for batch in batches]
    _fit(example, _model(example), epochs=1, loader=given)
    for old, new in zip(batches, given, strict=True):
        assert_same(old, new, "fit changed a batch in place")


def batch_of_one(example: Example) -> None:
    """Batches of one row train without error and without NaN."""
    x, y = next(iter(_loader(example)))[:2]
    model = _model(example)
    _fit(example, model, epochs=1, loader=[(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert all(torch.isfinite(p).all() for p in model.parameters()), "batches of one row gave a parameter that is not finite"


def refuses_bad_input(example: Example) -> None:
    """An empty loader, and data with NaN, are refused with a clear error."""
    for what, loader in (("an empty loader", []), ("NaN in the data", _with_nan(example))):
        try:
            _fit(example, _model(example), epochs=1, loader=loader)
        except BadInput:
            continue
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}, not BadInput: {error}") from error
        raise AssertionError(f"{what} was accepted in silence")


def _with_nan(example: Example) -> list[tuple[Tensor, ...]]:
    batches = []
    for x, *rest in _loader(example):
        bad = x.clone()
        bad[0] = float("nan")
        batches.append((bad, *rest))
    return batches


def refuses_unsupported(example: Example) -> None:
    """A model that the rule cannot train is refused by UnsupportedModel before any parameter changes."""
    if example.unsupported is None:
        raise Skipped("the rule trains every differentiable model")
    with seeded(0):
        model = example.unsupported()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        _fit(example, model, epochs=1)
    except UnsupportedModel as error:
        assert str(error), "UnsupportedModel says nothing"
        assert error.module is not None, f"the refusal does not name the module: {error}"
    else:
        raise AssertionError("an unsupported model was trained in silence")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the refused model was changed"


CHECKS = {
    "trains_in_place": trains_in_place,
    "same_seed_same_result": same_seed_same_result,
    "keeps_the_global_state": keeps_the_global_state,
    "resumes": resumes,
    "leaves_data_alone": leaves_data_alone,
    "batch_of_one": batch_of_one,
    "refuses_bad_input": refuses_bad_input,
    "refuses_unsupported": refuses_unsupported,
}
