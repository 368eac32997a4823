"""Latency, energy, and all meters at once."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from neurarium import meter
from neurarium.errors import BadInput


def test_functions_are_interleaved_and_take_turns_at_the_start() -> None:
    calls: list[str] = []
    result = meter.latency({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=4, warmup=2)
    assert "".join(calls) == "abab" + "abbaabba"
    assert set(result) == {"a", "b"}
    assert result["a"].repeats == 4
    assert gc.isenabled()


def test_latency_measures_time() -> None:
    table = meter.latency({"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}, repeats=7, warmup=1)
    assert table["slow"].low >= 0.004
    assert table["slow"].median > 2 * table["fast"].median
    assert table["fast"].low <= table["fast"].median <= table["fast"].high
    one = meter.latency(torch.square, torch.zeros(3), repeats=3)
    assert 0.0 < one.median < 0.01
    assert "us" in str(meter.Timing(5e-5, 4e-5, 6e-5, 3))


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_nonsense(arguments: dict[str, int]) -> None:
    with pytest.raises(BadInput):
        meter.latency(lambda: None, **arguments)
    with pytest.raises(BadInput):
        meter.latency({})


def test_energy_has_the_published_constants() -> None:
    assert meter.energy(macs=1) == pytest.approx(4.6e-12)
    assert meter.energy(acs=1) == pytest.approx(0.9e-12)
    assert meter.energy(macs=1, bits=16) == pytest.approx(1.5e-12)
    assert meter.energy(macs=1, bits=8) == pytest.approx(0.3e-12)
    assert meter.energy(bytes=4) == pytest.approx(5e-12)
    assert meter.energy(bytes=4, memory="dram") == pytest.approx(640e-12)
    assert meter.energy(macs=3, acs=5, bytes=8) == pytest.approx(3 * 4.6e-12 + 5 * 0.9e-12 + 10e-12)
    assert meter.energy() == 0.0


def test_energy_can_be_overridden_and_refuses_what_it_does_not_know() -> None:
    mine = dataclasses.replace(meter.CMOS_45NM, name="mine", accumulate={4: 1e-14}, multiply={4: 1e-13})
    assert meter.energy(macs=10, bits=4, table=mine) == pytest.approx(1.1e-12)
    with pytest.raises(BadInput, match="multiply 4; it has 32, 16, 8"):
        meter.energy(macs=1, bits=4)
    with pytest.raises(BadInput, match="'tape'"):
        meter.energy(bytes=1, memory="tape")
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="macs"):
            meter.energy(macs=bad)


def test_profile_agrees_with_its_meters_and_prints() -> None:
    model, x = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 10)), torch.randn(32, 20)
    got = meter.profile(model, x, repeats=3)
    assert (got.parameters, got.stored_bytes) == (1560, 6240)
    assert (got.flops, got.macs) == (2 * 32 * 1500, 32 * 1500)
    assert got.saved_bytes == 32 * 50 * 4
    assert got.energy == pytest.approx(48_000 * 4.6e-12 + 6240 * 160e-12)
    assert got.latency.median > 0
    assert "96,000" in str(got)
    assert "6.09 KiB" in str(got)
    page = io.StringIO()
    Console(file=page, width=80).print(got)
    assert "saved for backward" in page.getvalue()
    assert json.loads(json.dumps(got.to_dict()))["macs"] == 48_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.flops = 1  # type: ignore[misc]
