"""What a step of a family trains."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from neurarium.dynamic.samplers import Important, Progressive, Sandwich, Sorted, Uniform
from neurarium.errors import BadInput


def count(sampler, steps: int = 3000) -> Counter:
    g = torch.Generator().manual_seed(0)
    return Counter(c for step in range(steps) for c in sampler.sample(step, g))


def test_shares():
    assert all(abs(n / 3000 - 0.5) < 0.05 for n in count(Uniform("abcd", 2)).values())
    n = count(Sandwich("abcd", 2))
    assert n["a"] == n["d"] == 3000 and abs(n["b"] - 3000) < 200
    n = count(Sorted("abc", 1, [1, 0, 3]))
    assert n["b"] == 0 and abs(n["c"] / n["a"] - 3) < 0.4
    n = count(Important(["ab", "", "c"], [[0.0, 0.5], [], [9.0]], largest="Z", smallest="z", n=2, temperature=0.5))
    assert n["Z"] == n["z"] == 3000 and abs(n["c"] - 3000) < 200 and abs(n["b"] / n["a"] - 2.718) < 0.4


def test_without_replacement_all_is_all():
    assert all(sorted(Sorted("abcde", 5, replacement=False).sample(s)) == list("abcde") for s in range(5))


def test_phases():
    sampler = Progressive([(2, "a", 1), (0, "b", 1), (3, "ac", 2), (1, "d", 4)])
    assert [sampler.phase(s) for s in range(8)] == [0, 0, 2, 2, 2, 3, 3, 3]
    assert [len(sampler.sample(s)) for s in range(8)] == [1, 1, 2, 2, 2, 4, 4, 4] and sampler.sample(100) == ["d"] * 4


def test_the_generator_decides():
    for sampler in (Uniform("abcdef", 3), Sandwich("abcdef"), Sorted("abcdef", 3)):
        a, b = (sampler.sample(0, torch.Generator().manual_seed(3)) for _ in range(2))
        assert a == b


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform([]), lambda: Sorted("ab", 2, [1.0]), lambda: Sorted("ab", 2, [0.0, 0.0]), lambda: Sorted("ab", 2, [1, -1]),
        lambda: Sorted("ab", 3, replacement=False), lambda: Progressive([]), lambda: Important([""], [[]], largest=1, smallest=0),
        lambda: Important(["a"], [[1.0]], largest=1, smallest=0, temperature=0), lambda: Important(["ab"], [[1.0]], largest=1, smallest=0),
        lambda: Sorted("ab", 1, [float("nan"), 1]),
    ],
)  # fmt: skip
def test_bad_settings(make):
    with pytest.raises(BadInput):
        make()
