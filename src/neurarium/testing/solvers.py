"""Checks of the role `solver`: solve(problem) -> Solution that reports its own residual truthfully."""

from __future__ import annotations

import math
from typing import Any

import torch

from neurarium.testing.example import Example, Skipped
from neurarium.testing.state import close, seeded, unchanged_rng

__all__ = ["CHECKS"]


def _solve(example: Example, seed: int = 0, noise: int = 0) -> Any:
    with seeded(noise):
        return example.solve(seed)  # type: ignore[misc]


def reports_its_residual(example: Example) -> None:
    """residual() is a finite, non-negative number."""
    value = float(_solve(example).residual())
    assert math.isfinite(value) and value >= 0, f"residual() is {value}"


def residual_is_true(example: Example) -> None:
    """The reported residual agrees with an independent measure of it (within a factor of two: it may be sampled)."""
    if example.residual is None:
        raise Skipped("no independent measure is given")
    solution = _solve(example)
    said, true = float(solution.residual()), float(example.residual(solution))
    assert true <= 2 * said + 1e-12, f"the solution reports a residual of {said:.3g}, an independent measure finds {true:.3g}"


def deterministic(example: Example) -> None:
    """The seed alone decides: the same residual and values under different global random states."""
    first, second = _solve(example, noise=1), _solve(example, noise=2)
    a, b = float(first.residual()), float(second.residual())
    assert a == b or abs(a - b) <= 1e-9 * max(abs(a), abs(b)), f"two solves of one seed report residuals {a!r} and {b!r}"


def keeps_the_global_state(example: Example) -> None:
    """Solving leaves the global random state, the default dtype and grad mode as they were."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    with unchanged_rng("solve"):
        example.solve(0)  # type: ignore[misc]
    assert torch.get_default_dtype() == dtype, "solve changed the default dtype"
    assert torch.is_grad_enabled() == grad, "solve changed the grad mode"
    assert torch.get_num_threads() == threads, "solve changed the number of threads"


def evaluates_anywhere(example: Example) -> None:
    """A callable solution is evaluated at 1 and at 5 points with the same values row by row."""
    if example.inputs is None:
        raise Skipped("the solution is not a function of points")
    solution = _solve(example)
    points = example.inputs(5, 0)
    points = points if isinstance(points, tuple) else (points,)
    whole, one = solution(*points), solution(*(p[:1] for p in points))
    assert close(one, torch.utils._pytree.tree_map(lambda t: t[:1], whole)), "the first of 5 points gives another value alone"


CHECKS = {
    "reports_its_residual": reports_its_residual,
    "residual_is_true": residual_is_true,
    "deterministic": deterministic,
    "keeps_the_global_state": keeps_the_global_state,
    "evaluates_anywhere": evaluates_anywhere,
}
