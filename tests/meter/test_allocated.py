"""The allocation trace against programs whose peak is known by hand."""

from __future__ import annotations

import torch

from neurarium.meter.allocated import AllocatedBytes, peak_bytes


def test_a_chain_of_temporaries_keeps_two_alive() -> None:
    x = torch.zeros(1000)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x + 1  # old and new are alive while it runs
        return x

    assert peak_bytes(chain, x) == 2 * 4000


def test_views_in_place_operations_and_what_was_there_before_cost_nothing() -> None:
    x = torch.zeros(100, 100)
    with AllocatedBytes() as memory:
        x.add_(1)
        y = x.T.reshape(-1)[:5].view(5) if x.T.is_contiguous() else x[0].view(-1)
    assert memory.peak == 0
    assert len(y)


def test_a_list_that_grows_counts_all_and_lets_go() -> None:
    with AllocatedBytes() as memory:
        kept = [torch.ones(250) for _ in range(8)]
        assert memory.live == 8 * 1000
        del kept[:6]
        assert memory.live == 2 * 1000
        kept.append(torch.ones(250, dtype=torch.float64))
    assert memory.peak == 8 * 1000
    assert memory.live == 4 * 1000
