"""Checks of the role `probe`: f(model, data) -> Report reads only."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from neurarium.roles import Report
from neurarium.testing.example import Example, Skipped
from neurarium.testing.modules import feed
from neurarium.testing.state import assert_same, seeded, snapshot, unchanged_rng

__all__ = ["CHECKS"]


def _probe(example: Example, *, batch: int = 3, noise: int = 0) -> Any:
    with seeded(0):
        model = example.model(0)  # type: ignore[misc]
    inputs = feed(example, batch)
    with seeded(noise):
        return example.apply(model, *inputs)  # type: ignore[misc]


def reads_only(example: Example) -> None:
    """Weights, buffers, gradients, mode, hooks, inputs and the global RNG are as before, in train and in eval mode."""
    for training in (True, False):
        with seeded(0):
            model = example.model(0)  # type: ignore[misc]
        model.train(training)
        inputs = feed(example, 3)
        given = [t.clone() for t in inputs if isinstance(t, Tensor)]
        before = snapshot(model)
        with unchanged_rng("the probe"):
            example.apply(model, *inputs)  # type: ignore[misc]
        before.assert_unchanged(model, "the probe")
        for old, new in zip(given, [t for t in inputs if isinstance(t, Tensor)], strict=True):
            assert_same(old, new, "the probe changed its input in place")
            assert new.grad is None and not new.requires_grad, "the probe left a gradient or requires_grad on its input"


def returns_a_report(example: Example) -> None:
    """The result is a frozen dataclass of role Report whose tensors are finite and detached."""
    report = _probe(example)
    assert isinstance(report, Report) and dataclasses.is_dataclass(report), f"the probe returned {type(report).__name__}, not a Report"
    try:
        object.__getattribute__(report, "__dataclass_params__")
        assert report.__dataclass_params__.frozen, "the Report is not frozen"  # type: ignore[attr-defined]
    except AttributeError as error:
        raise AssertionError("the Report is not a dataclass of its own") from error
    for f in dataclasses.fields(report):
        value = getattr(report, f.name)
        if isinstance(value, Tensor):
            assert not value.requires_grad, f"{f.name} still carries a graph"
            assert torch.isfinite(value).all(), f"{f.name} is not finite"
    report.to_dict(), report.describe()


def deterministic(example: Example) -> None:
    """Two calls agree bit for bit whatever the global random state is."""
    assert_same(_probe(example, noise=1).to_dict(), _probe(example, noise=2).to_dict(), "two calls differ: the seed is ignored")


def any_batch_size(example: Example) -> None:
    """One row works as well as seven."""
    for batch in (1, 7):
        _probe(example, batch=batch)


def sound(example: Example) -> None:
    """A bound that the probe reports is not violated."""
    if example.sound is None:
        raise Skipped("the probe reports no bound")
    for seed in range(3):
        with seeded(seed):
            model = example.model(seed)  # type: ignore[misc]
        report = example.apply(model, *feed(example, 3, seed))  # type: ignore[misc]
        assert example.sound(model, report, seed), f"the reported bound is violated on seed {seed}"


def refuses_bad_input(example: Example) -> None:
    """NaN in the input and an empty batch are refused."""
    with seeded(0):
        model = example.model(0)  # type: ignore[misc]
    inputs = feed(example, 3)
    bad = tuple(torch.full_like(t, float("nan")) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)
    empty = tuple(t[:0] if isinstance(t, Tensor) else t for t in inputs)
    for what, data in (("NaN in the input", bad), ("an empty batch", empty)):
        try:
            example.apply(model, *data)  # type: ignore[misc]
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}, not BadInput: {error}") from error
        raise AssertionError(f"{what} was accepted in silence")


CHECKS = {
    "reads_only": reads_only,
    "returns_a_report": returns_a_report,
    "deterministic": deterministic,
    "any_batch_size": any_batch_size,
    "sound": sound,
    "refuses_bad_input": refuses_bad_input,
}
