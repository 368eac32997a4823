"""Exact optimal transport beside POT: the same cost, in how many seconds? And the same fused network with either.

    pytest benchmarks/compress/test_fusion.py --benchmark-disable-gc -s
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from neurarium.compress import optimal_transport, ot_fuse
from neurarium.compress.fuse import transport

SIZES = ((64, 64), (400, 400), (1000, 1000), (400, 200), (300, 200), (257, 131))


@pytest.fixture
def ot(monkeypatch: pytest.MonkeyPatch):
    for backend in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):
        monkeypatch.setenv(f"POT_BACKEND_DISABLE_{backend}", "1")  # importing them takes seconds
    return pytest.importorskip("ot")


def test_the_cost_is_that_of_pot_and_the_time_is_not_worse(ot) -> None:
    torch.set_num_threads(1)
    print(f"\n{'neurons':>12} {'neurarium':>10} {'POT':>10}   seconds, best of 3 (a linear program where no common grain is small)")
    for n, m in SIZES:
        a, b = (torch.randn(k, 50, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (n, m + 7))
        cost = torch.cdist(a, b[:m])
        seconds, values = [], []
        for solve in (lambda c: optimal_transport(c), lambda c: torch.from_numpy(ot.emd([], [], c.numpy(), numItermax=10_000_000))):
            times = []
            for _ in range(3):
                began = time.perf_counter()
                plan = solve(cost)
                times.append(time.perf_counter() - began)
            seconds.append(min(times)), values.append(float((plan * cost).sum()))
        print(f"{f'{n} x {m}':>12} {seconds[0]:>10.3f} {seconds[1]:>10.3f}")
        assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_the_fused_network_is_that_of_pot(ot, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, w), nn.ReLU(), nn.Linear(w, 5)) for w in (40, 32))
    loader = [(torch.randn(200, 20), torch.zeros(200))]
    ours = ot_fuse(a, b, loader)
    monkeypatch.setattr(transport, "optimal_transport", lambda c: torch.from_numpy(ot.emd([], [], c.numpy())))
    for p, q in zip(ours.parameters(), ot_fuse(a, b, loader).parameters(), strict=True):
        torch.testing.assert_close(p, q)
