"""Runs the checks: on one example, or as pytest parameters over the catalog."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from neurarium.errors import BadInput
from neurarium.testing import datasets, learners, modules, optimizers, policies, probes, searchers, solvers, transforms
from neurarium.testing.example import Example, Skipped

__all__ = ["CHECKS", "Check", "check_method", "checks_for", "load_example", "parametrize_methods"]

Check = Callable[[Example], None]

#: role -> name of a check -> the check
CHECKS: Mapping[str, Mapping[str, Check]] = {
    "layer": modules.CHECKS,
    "model": modules.CHECKS,
    "optimizer": optimizers.CHECKS,
    "learner": learners.CHECKS,
    "transform": transforms.CHECKS,
    "policy": policies.CHECKS,
    "searcher": searchers.CHECKS,
    "probe": probes.CHECKS,
    "solver": solvers.CHECKS,
    "dataset": datasets.CHECKS,
    "study": {},
}


def checks_for(role: str) -> dict[str, Check]:
    """The checks of one role by name."""
    if role not in CHECKS:
        raise BadInput(f"role {role!r} is none of {', '.join(CHECKS)}")
    return dict(CHECKS[role])


def run_check(example: Example, name: str) -> None:
    """One check; raises AssertionError where the contract is broken, Skipped where the example declares it not applicable."""
    if name in example.skip:
        raise Skipped(example.skip[name])
    CHECKS[example.role][name](example)


def check_method(example: Example) -> list[str]:
    """All checks of the example's role. Returns the names that ran; raises AssertionError that lists every failure."""
    unknown = set(example.skip) - set(CHECKS[example.role])
    if unknown:
        known = ", ".join(CHECKS[example.role])
        raise BadInput(f"skip names no check of role {example.role!r}: {', '.join(sorted(unknown))}; there are {known}")
    ran, failed = [], []
    for name in CHECKS[example.role]:
        try:
            run_check(example, name)
            ran.append(name)
        except Skipped:
            continue
        except Exception as error:  # every failure is reported, not only the first
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if failed:
        raise AssertionError(f"{len(failed)} of {len(failed) + len(ran)} checks failed:\n  " + "\n  ".join(failed))
    return ran


def load_example(reference: str) -> Example:
    """The example behind a catalog entry's ``example = "package.module:function"``."""
    module, _, name = reference.partition(":")
    example = getattr(importlib.import_module(module), name)()
    if not isinstance(example, Example):
        raise BadInput(f"{reference} returned {type(example).__name__}, not an Example")
    return example


def parametrize_methods(ids: Iterable[str] | None = None, *, roles: Iterable[str] | None = None) -> Any:
    """A pytest decorator: the test gets ``conformance``, a callable that runs one check of one working paper (all papers by default)."""
    import pytest

    from neurarium import catalog

    wanted, kinds = (None if ids is None else set(ids)), (None if roles is None else set(roles))
    params = []
    for paper in catalog.load().papers:
        if paper.status != "works" or (wanted is not None and paper.id not in wanted) or (kinds is not None and paper.role not in kinds):
            continue
        for name in CHECKS[paper.role]:
            params.append(pytest.param(_deferred(paper.example, paper.role, name), id=f"{paper.id}-{name}"))
    return pytest.mark.parametrize("conformance", params)


def _deferred(reference: str | None, role: str, name: str) -> Callable[[], None]:
    def conformance() -> None:
        import pytest

        assert reference, "the catalog names no example"
        example = load_example(reference)
        assert example.role == role, f"{reference} is an example of role {example.role!r}, the catalog says {role!r}"
        unknown = set(example.skip) - set(CHECKS[role])
        assert not unknown, f"{reference} skips checks that do not exist: {sorted(unknown)}"
        try:
            run_check(example, name)
        except Skipped as why:
            pytest.skip(f"not applicable: {why}")

    return conformance
