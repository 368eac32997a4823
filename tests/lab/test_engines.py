"""What an engine leaves behind in the process that called it."""

from __future__ import annotations

import pytest
import torch

from neurarium.lab import engines


def test_a_number_of_threads_that_an_experiment_sets_ends_with_it(monkeypatch):
    before, seen = torch.get_num_threads(), []

    def execute(unit, emit):
        seen.append(torch.get_num_threads())
        torch.set_num_threads(before + unit)
        if unit == 2:
            raise RuntimeError("an experiment that breaks")

    monkeypatch.setattr(engines, "execute", execute)
    with pytest.raises(RuntimeError, match="breaks"):
        engines.Inline().map([1, 2], lambda event: None)
    assert seen == [before, before]
    assert torch.get_num_threads() == before
