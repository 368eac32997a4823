"""Causal weights: their closed form, their limits, and the gradient that they must not carry."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from neurarium.errors import BadInput
from neurarium.physics import PINN, Box, Causal, CausalPINN, Problem, Progress, Slices, Uniform, allen_cahn, lorenz
from neurarium.physics.pinn import _Training
from neurarium.physics.solution import Solution

SMALL = {"width": 6, "depth": 2, "modes": 2}


def weights(losses: torch.Tensor, eps: float, initial: torch.Tensor | float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    schedule = Causal(eps=(eps,), chunks=len(losses)).begin(1)
    return schedule.weights(losses, initial, schedule.strength(losses))


def test_weights_are_the_exponential_of_the_earlier_losses() -> None:
    losses = torch.tensor([0.5, 0.25, 3.0, 0.1], dtype=torch.float64, requires_grad=True)
    w, sums = weights(losses, 2.0)
    assert sums.tolist() == [0, 0.5, 0.75, 3.75]
    assert w.tolist() == pytest.approx([math.exp(-2 * s) for s in (0, 0.5, 0.75, 3.75)])
    assert not w.requires_grad
    torch.testing.assert_close(weights(losses, 2.0, torch.tensor(0.1))[0], w * math.exp(-0.2))


def test_weights_keep_small_early_sums_beside_huge_late_losses() -> None:
    w, _ = weights(torch.tensor([1e-9, 1e9, 1.0], dtype=torch.float64), 1.0)
    assert w[0] == 1
    assert 1 - w[1].item() == pytest.approx(1e-9, rel=1e-6)
    assert w[2] == 0


def test_the_smallest_weight_is_reported_below_single_precision() -> None:
    schedule = Causal(eps=(100.0,), chunks=2).begin(1)
    _, sums = schedule.weights(torch.tensor([2.0, 1.0]), 0.0, schedule.strength(torch.zeros(1)))
    schedule.update(sums)
    assert schedule.min_weight == pytest.approx(math.exp(-200))


def test_the_gradient_with_respect_to_a_slice_loss_is_its_weight() -> None:
    schedule = Causal(eps=(3.0,), chunks=4).begin(10)
    squares = torch.rand(8, dtype=torch.float64, requires_grad=True)
    w, sums = schedule.weights(squares, 0.0, schedule.strength(squares))
    (g,) = torch.autograd.grad((w * squares).mean(), squares)
    torch.testing.assert_close(g, torch.exp(-3 * sums).repeat_interleave(2) / 8)  # dL_i/dsquare = 1/2, so d loss/dL_i = w_i / 4


@pytest.mark.parametrize("optimizer", ["lm", partial(torch.optim.Adam, lr=1e-3)])
def test_eps_zero_is_the_plain_solver_bit_for_bit(optimizer) -> None:
    common = {**SMALL, "optimizer": optimizer, "sampler": Slices(8, 8)}
    plain = PINN(**common).solve(allen_cahn(), steps=6)
    causal = CausalPINN(causal=Causal(eps=(0.0,), chunks=8), **common).solve(allen_cahn(), steps=6)
    assert causal.history["min_weight"] == [1.0] * 6
    assert causal.history["loss"] == plain.history["loss"]
    for a, b in zip(plain.pieces[0].parameters(), causal.pieces[0].parameters()):
        assert torch.equal(a, b)


def test_least_squares_and_the_loss_weigh_alike() -> None:
    causal = Causal(eps=(5.0,), chunks=8)
    first = [
        CausalPINN(causal=causal, optimizer=o, dtype=torch.float64, **SMALL).solve(allen_cahn(), steps=1).history for o in ("lm", "adam")
    ]
    assert first[0]["loss"][0] == pytest.approx(first[1]["loss"][0], rel=1e-12)
    assert first[0]["min_weight"][0] == pytest.approx(first[1]["min_weight"][0], rel=1e-9)


def test_soft_initial_data_are_the_first_slice() -> None:
    from dataclasses import replace

    soft = replace(allen_cahn(), hard=False)
    solver = CausalPINN(causal=Causal(eps=(1.0,), chunks=8), optimizer="adam", dtype=torch.float64, **SMALL)
    training = _Training(solver, Solution(soft, [solver.build(soft)], {}, {}), 0, 0)
    points = training.draw()
    schedule = solver.weights.begin(1)
    loss, sums = training.loss(points, schedule, schedule.strength(points[0]))
    (start,) = training.model.residual(training.parts[1][0], points[1], training.wanted[1])
    (r,) = training.model.residual(soft.residual, points[0], training.wanted[0])
    start, L = 100 * (start**2).mean(), (r**2).view(8, -1).mean(1)
    assert sums[0].item() == pytest.approx(start.item())
    assert sums[2].item() == pytest.approx((start + L[0] + L[1]).item())
    assert loss.item() == pytest.approx((start + (torch.exp(-sums) * L).mean()).item())


def test_points_come_in_order_of_time_from_any_sampler() -> None:
    solver = CausalPINN(causal=Causal(chunks=4), sampler=lambda d, g, dtype: d.points(torch.rand(16, 2, generator=g, dtype=dtype)), **SMALL)
    training = _Training(solver, Solution(allen_cahn(), [solver.build(allen_cahn())], {}, {}), 0, 0)
    t = training.draw()[0][:, 1]
    assert (t.diff() >= 0).all()
    slices = Slices(5, 3)(allen_cahn().domain, torch.Generator().manual_seed(0), torch.float64)
    assert slices.shape == (15, 2)
    assert (slices[:, 1].view(5, 3).std(1) == 0).all()
    assert ((slices[::3, 1] * 5).floor() == torch.arange(5)).all()


def test_annealing_takes_the_next_eps_when_solved_or_out_of_patience_and_ends_when_converged() -> None:
    schedule = Causal(eps=(1.0, 2.0, 4.0), delta=0.9, chunks=2).begin(30)
    assert (schedule.eps, schedule.patience) == (1.0, 10)

    def solved(weight: float) -> torch.Tensor:
        return torch.tensor([0.0, -math.log(weight) / schedule.eps])

    schedule.update(solved(0.95))
    assert (schedule.eps, schedule.converged) == (2.0, False)
    for _ in range(10):
        assert schedule.eps == 2.0
        schedule.update(solved(0.1))
    assert schedule.eps == 4.0
    schedule.update(solved(0.85))
    assert not schedule.converged
    schedule.update(solved(0.95))
    assert schedule.converged


def test_the_last_eps_must_have_been_used_before_it_counts_as_converged() -> None:
    schedule = Causal(eps=(1.0, 2.0), delta=0.9, chunks=2).begin(30)
    schedule.update(torch.tensor([0.0, -math.log(0.95)]))  # solved at eps = 1; at eps = 2 the weight would be 0.9025
    assert (schedule.eps, schedule.level, schedule.converged) == (2.0, 1, False)
    schedule.update(torch.tensor([0.0, -math.log(0.94)]))  # 0.94^2 < delta
    assert not schedule.converged
    schedule.update(torch.tensor([0.0, -math.log(0.97)]))
    assert schedule.converged
    lax = Causal(eps=(0.0,), chunks=2).begin(3)
    lax.update(torch.zeros(2))
    assert not lax.converged  # eps = 0 says nothing


def test_the_last_level_is_reached_by_being_solved_in_a_run() -> None:
    causal = Causal(eps=(1e-9, 1e-6), chunks=8, patience=10**9)  # each is solved at once
    solution = CausalPINN(causal=causal, sampler=Slices(8, 4), **SMALL).solve(allen_cahn(), steps=9)
    assert solution.history["eps"] == [1e-9, 1e-6]


def test_it_solves_lorenz_over_a_window() -> None:
    causal = Causal(eps=(1e-2, 1e-1, 1.0), delta=0.95, chunks=16, patience=1000)
    solution = CausalPINN(causal=causal, width=12, depth=2, sampler=Slices(16, 8)).solve(lorenz(horizon=0.3), steps=100, seed=0)
    assert max(solution.error().values()) < 1e-2
    assert solution.history["eps"][-1] == 1.0
    assert solution.history["min_weight"][-1] > 0.95
    assert len(solution.history["step"]) < 100  # it stopped by itself


def test_plain_arms_are_judged_by_the_rule_without_feeling_it() -> None:
    from neurarium.experiments.physics.causal_pinn import Watch

    rule, slices, problem = Causal(eps=(1e-9, 2.0), chunks=8), Slices(8, 4), allen_cahn()
    plain = PINN(sampler=slices, **SMALL)
    watch = Watch(1, rule, slices)
    seen: list[torch.Tensor] = []

    def by_hand(progress: Progress) -> None:
        points = slices(problem.domain, generator, torch.float64)
        (r,) = progress.solution.pieces[0].residual(problem.residual, points, problem.orders())
        seen.append((r.detach() ** 2).view(8, 4).mean(1)[:-1].sum())

    generator = torch.Generator().manual_seed(0)
    watched = plain.solve(problem, steps=6, callbacks=[watch, by_hand])
    assert watched.history["loss"] == plain.solve(problem, steps=6).history["loss"]
    assert watch.eps == 2.0  # the first was solved at once
    assert watch.min_weight() == pytest.approx([math.exp(-2 * float(s)) for s in seen])
    assert len(set(watch.min_weight())) == 6


def test_refusals() -> None:
    with pytest.raises(BadInput, match="multiple"):
        CausalPINN(causal=Causal(chunks=7), sampler=Slices(4, 4), **SMALL).solve(allen_cahn(), steps=1)
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "eps": ((), (-1.0,), (nan,), (1.0, inf), 1.0),
        "delta": (0.0, 1.0, nan),
        "chunks": (0, 2.5),
        "patience": (0, -3, nan),
    }.items():
        for value in values:
            with pytest.raises(BadInput, match=name):
                Causal(**{name: value})
    assert Causal(patience=1).begin(100).patience == 1
    assert Causal(eps=(1.0, 2.0)).begin(100).patience == 50
    still = Problem("still", Box(x=(0, 1)), ("u",), lambda f, c, p: f.d("u", "x"))
    with pytest.raises(BadInput, match="still: causal weights need a time coordinate"):
        PINN(weights=Causal(chunks=4), sampler=Uniform(16), **SMALL).solve(still, steps=1)
