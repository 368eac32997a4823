"""Formats found by brute force, diversity in closed form, training that only ever sees numbers of the format."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import AdaPT, fixed_point
from neurarium.compress.quant.adapt import divergence, diversity, init_weights, push_down, push_up, size_ratio, speedups, weight_plan
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import evaluate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    x = draw(32 * n, 6)
    return list(zip(x.split(32), (x @ draw(6, 3, seed=1)).argmax(1).split(32), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def on_grid(w: Tensor, word: int, frac: int) -> bool:
    codes = w.double() * 2.0**frac
    return bool((codes == codes.round()).all()) and -(2.0 ** (word - 1)) <= codes.min() and codes.max() <= 2.0 ** (word - 1) - 1


def test_the_divergence_is_zero_exactly_for_equal_histograms() -> None:
    a = draw(1000)
    assert divergence(a, a[torch.randperm(1000, generator=torch.Generator().manual_seed(0))], 20) == 0
    assert divergence(a, torch.cat([a[1:], a[:1] * 0 + 3]), 20) > 0
    assert divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), 2) == math.inf  # an empty bin: no NaN
    assert divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]), 2) == pytest.approx(math.log(2))
    assert divergence(torch.ones(3), torch.ones(3), 5) == 0


@pytest.mark.parametrize("bins", [4, 20, 90])
def test_push_down_finds_a_shortest_format_without_loss(bins: int) -> None:
    w = 0.3 * draw(400)
    word, frac = push_down(w, bins)
    assert divergence(w, fixed_point(w, word, frac, rounding="nearest"), bins) == 0
    if word > frac + 1:
        assert divergence(w, fixed_point(w, word - 1, frac, rounding="nearest"), bins) > 0
    assert divergence(w, fixed_point(w, 32, frac - 1, rounding="nearest"), bins) > 0
    assert push_down(torch.tensor([0.5, -0.25, 0.75]).repeat(10), 50) == (3, 2)  # multiples of 1/4 below 1: three bits hold them


def test_diversity_of_equal_orthogonal_and_opposing_gradients() -> None:
    assert diversity(9.0, 9 * torch.eye(9)[0]) == pytest.approx(1.0)
    assert diversity(9.0, torch.eye(9).sum(0)) == pytest.approx(3.0)
    assert diversity(2.0, torch.zeros(4)) > 1e6


def test_push_up_is_its_formula() -> None:
    assert push_up(8, 4, 1.0, "min") == (13, 5)  # agreement: one bit of fraction, WL >= FL + buffer
    delta = math.exp(1.5)  # a = 1/2: s1 = 4, s2 = 8 - 4
    assert {s: push_up(8, 4, delta, s)[1] for s in ("min", "mean", "max")} == {"min": 8, "mean": 8, "max": 8}
    delta = math.exp(1.6)  # s1 = 3, s2 = ceil(11.52) - 4 = 8
    assert {s: push_up(8, 4, delta, s)[1] for s in ("min", "mean", "max")} == {"min": 7, "mean": 10, "max": 12}
    assert push_up(8, 4, 1e9, "max") == (32, 24)
    for frac in range(25):
        for delta in (1.0, 3.0, 20.0):
            word, new = push_up(frac + 8, frac, delta, "mean")
            assert new + 8 <= word <= 32 and new <= 24


def test_every_weight_that_is_used_is_in_its_layers_format() -> None:
    model, seen = network(), []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            seen.append((module.weight.detach().clone(), module.bias.detach().clone()))

    handles = [m.register_forward_pre_hook(watch) for m in (model[0], model[2])]
    history = AdaPT(lookback=(2, 6)).fit(model, batches(), epochs=4)
    for h in handles:
        h.remove()
    rows = [(history.extra[f"word/{n}"], history.extra[f"frac/{n}"]) for n in ("0", "2")]
    assert len(seen) == 2 * history.steps == 32
    for i, (w, b) in enumerate(seen):
        word, frac = (int(r[i // 2]) for r in rows[i % 2])
        assert on_grid(w, word, frac) and on_grid(b, word, frac)
    assert len(set(rows[0][0])) > 1  # the formats did move
    for name, (words, fracs) in zip(("0", "2"), rows, strict=True):
        assert weight_plan(history).bits[name] == (int(words[-1]), 32)
        assert on_grid(model.get_submodule(name).weight.detach(), 32, int(fracs[-1]))  # no float refinement at the end


def test_a_long_format_is_float_training_with_the_same_gradients() -> None:
    results = []
    for options in ({"init": (32, 24), "down": False, "up": False}, {"quantise": False}):
        model = network()
        AdaPT(optimizer=partial(torch.optim.SGD, lr=0.05), l1=0.0, l2=0.0, **options).fit(model, batches(), epochs=5)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)
    assert (results[0] - torch.cat([p.detach().flatten() for p in network().parameters()])).abs().max() > 0.1


def test_without_pushes_the_format_is_fixed_and_validation_sees_rounded_weights() -> None:
    model, learner = network(), AdaPT(init=(6, 3), down=False, up=False, buffer_bits=3)
    history = learner.fit(model, batches(), epochs=3, val=batches())
    assert set(history.extra["word/0"]) == {6.0}
    assert on_grid(model[0].weight.detach(), 6, 3)
    assert history.val[-1] == evaluate(model, batches())
    assert size_ratio(model, history) == pytest.approx(
        sum(int((m.weight != 0).sum()) for m in (model[0], model[2])) * 6 / 32 / (6 * 16 + 16 * 3)
    )
    speed = speedups(history, {"0": 96, "2": 48}, weights={"0": 96, "2": 48}, batch=32)
    zeros = {n: history.extra[f"sparsity/{n}"][-1] for n in ("0", "2")}
    assert speed["inference"] == pytest.approx(144 / (6 / 32 * (96 * (1 - zeros["0"]) + 48 * (1 - zeros["2"]))))
    assert 1 < speed["training"] < 1.1 * speed["inference"] + 1


def test_it_learns() -> None:
    model = network()
    history = AdaPT(optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), lookback=(5, 20)).fit(model, batches(8), epochs=12)
    assert evaluate(model, batches(8))["accuracy"] > 0.9
    assert min(history.extra["word/0"]) < 32


def test_initial_weights_are_a_truncated_normal_of_variance_one_over_fan_in() -> None:
    w = init_weights(nn.Sequential(nn.Linear(400, 300)), seed=1)[0].weight.detach()
    assert float(w.var() * 400) == pytest.approx(1, rel=0.02)
    assert float(w.abs().max()) <= 2.0001 / 0.8796 / 20


def test_bad_input_is_named() -> None:
    for options, word in (
        ({"lookback": (5, 2)}, "lookback"), ({"resolution": (0, 3)}, "resolution"), ({"strategy": "x"}, "strategy"),
        ({"init": (8, 30)}, "init"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            AdaPT(**options)
    before = copy.deepcopy(network())
    model = network()
    for data in ([], [(x * float("nan"), y) for x, y in batches()]):
        with pytest.raises(BadInput):
            AdaPT().fit(model, data, epochs=1)
    assert torch.equal(model[0].weight, before[0].weight)
    with pytest.raises(UnsupportedModel, match="LSTM"):
        AdaPT().fit(nn.LSTM(3, 3), batches(), epochs=1)
