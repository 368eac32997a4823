"""The in-memory data type and its batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurarium.data import TensorData, stratified
from neurarium.errors import BadInput


def rows(n: int = 23) -> TensorData:
    return TensorData(torch.arange(n).float()[:, None], torch.arange(n) % 3)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_pass_visits_each_row_once_with_its_label(n: int, size: int, seed: int, epoch: int) -> None:
    batches = rows(n).batches(size, seed=seed)
    batches.set_epoch(epoch)
    got = list(batches)
    assert len(got) == len(batches)
    x, y = torch.cat([b[0] for b in got])[:, 0], torch.cat([b[1] for b in got])
    assert sorted(x.tolist()) == list(range(n))
    assert torch.equal(y, x.long() % 3)


def order(batches: object) -> list[float]:
    return [v for x, _ in batches for v in x[:, 0].tolist()]  # type: ignore[attr-defined]


def test_passes_differ_repeat_under_a_seed_and_resume_by_epoch() -> None:
    first, second = rows().batches(4, seed=1), rows().batches(4, seed=1)
    passes = [order(first) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    assert passes == [order(second) for _ in range(3)]
    resumed = rows().batches(4, seed=1)
    resumed.set_epoch(1)
    assert [order(resumed), order(resumed)] == passes[1:]
    assert order(rows().batches(4, seed=2)) != passes[0]
    assert order(rows().batches(4, shuffle=False)) == list(range(23))


def test_a_half_used_pass_and_the_global_generator_do_not_disturb_the_order() -> None:
    a, b = rows().batches(4, seed=1), rows().batches(4, seed=1)
    next(iter(a))
    order(b)
    state = torch.get_rng_state()
    assert order(a) == order(b)
    assert torch.equal(state, torch.get_rng_state())


def test_drop_last() -> None:
    batches = rows(23).batches(5, drop_last=True)
    assert [len(x) for x, _ in batches] == [5] * 4
    assert len(batches) == 4


def test_batches_are_copies() -> None:
    data = rows()
    for x, _ in data.batches(5, shuffle=False):
        x.add_(100.0)
    assert torch.equal(data.x, rows().x)


def test_loader_is_seeded() -> None:
    assert order(rows().loader(4, seed=3)) == order(rows().loader(4, seed=3)) != order(rows().loader(4, seed=4))


@pytest.mark.parametrize("size", [0.25, 6])
def test_split_is_a_partition(size: float | int) -> None:
    first, rest = rows(24).split(size, seed=1)
    assert (len(first), len(rest)) == (6, 18)
    assert sorted(torch.cat([first.x, rest.x])[:, 0].tolist()) == list(range(24))
    assert torch.equal(rows(24).split(size, seed=1)[0].x, first.x)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), share=st.floats(0.05, 1.0), seed=st.integers(0, 9))
def test_stratified_keeps_class_shares_to_within_one_row(counts: list[int], share: float, seed: int) -> None:
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = max(1, int(share * len(y)))
    index = stratified(y, n, seed)
    assert len(index) == len(set(index.tolist())) == n
    got = y[index].bincount(minlength=len(counts))
    assert all(abs(g - c * n / len(y)) <= 1.0 for g, c in zip(got.tolist(), counts))
    assert torch.equal(index, stratified(y, n, seed))


@pytest.mark.parametrize(
    "call",
    [
        lambda: TensorData(torch.zeros(3, 2), torch.zeros(2)),
        lambda: TensorData(torch.zeros(()), torch.zeros(())),
        lambda: rows().batches(0),
        lambda: rows(3).batches(4, drop_last=True),
        lambda: TensorData(torch.zeros(0, 2), torch.zeros(0)).batches(1),
        lambda: rows().split(23),
        lambda: rows().split(0.0),
        lambda: rows().batches(2, seed=-1).__iter__().__next__(),
        lambda: rows().batches(2).set_epoch(-1),
        lambda: stratified(torch.zeros(4), 5),
    ],
)
def test_unusable_arguments_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput):
        call()
