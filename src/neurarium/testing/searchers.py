"""Checks of the role `searcher`: ask/tell, reproducible and resumable."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from neurarium.roles import Study
from neurarium.testing.example import Example
from neurarium.testing.state import seeded, unchanged_rng

__all__ = ["CHECKS"]


def _make(example: Example, noise: int = 0) -> Any:
    with seeded(noise):
        return example.make(0)  # type: ignore[misc]


def _asks(searcher: Any, n: int, start: int = 0) -> list[Any]:
    configs = []
    for i in range(start, start + n):
        config = searcher.ask()
        searcher.tell(config, float(i % 3))
        configs.append(copy.deepcopy(dict(config)))
    return configs


def reproducible(example: Example) -> None:
    """Two searchers of one seed ask the same, whatever the global random state is."""
    with seeded(1):
        first = _asks(_make(example, 1), 6)
    with seeded(2):
        second = _asks(_make(example, 2), 6)
    assert first == second, "two searchers of one seed ask for different configurations: the seed is ignored"


def resumes(example: Example) -> None:
    """A pickled searcher goes on as if it had never stopped."""
    whole, parts = _make(example), _make(example)
    want = _asks(whole, 8)
    got = _asks(parts, 4)
    got += _asks(pickle.loads(pickle.dumps(parts)), 4, start=4)
    assert got == want, "a searcher restored in the middle asks for other configurations: some state is lost"


def keeps_the_best(example: Example) -> None:
    """search returns a Study whose best is the smallest value that was told."""
    study = example.search(_make(example))  # type: ignore[misc]
    assert isinstance(study, Study), f"search returned {type(study).__name__}, not a Study"
    assert study.evaluations, "the Study is empty"
    assert study.best.value == min(e.value for e in study.evaluations), "Study.best is not the best"


def keeps_the_global_state(example: Example) -> None:
    """ask and tell leave the global random state as it was."""
    searcher = _make(example)
    with unchanged_rng("ask/tell"):
        _asks(searcher, 3)


CHECKS = {
    "reproducible": reproducible,
    "resumes": resumes,
    "keeps_the_best": keeps_the_best,
    "keeps_the_global_state": keeps_the_global_state,
}
