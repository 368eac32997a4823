"""The engine: manufactured solutions, conditions, windows, engines and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput, RecordError, UnsupportedModel
from neurarium.physics import (
    MLP,
    PINN,
    Box,
    BoxFeatures,
    Condition,
    FourierFeatures,
    LevenbergMarquardt,
    Problem,
    Progress,
    Slices,
    Solution,
    Uniform,
    allen_cahn,
    burgers,
    kuramoto_sivashinsky,
    lorenz,
)
from neurarium.physics.solution import Approximation

DECAY = Problem(  # u = exp(-2 t) cos(x + 1/2), exactly
    name="decay",
    domain=Box(x=(0, 2 * math.pi), t=(0, 1), time="t", periodic=("x",)),
    fields=("u",),
    residual=lambda f, c, p: f.d("u", "t") - p.rate * f.d("u", "xx"),
    initial=lambda c: {"u": torch.cos(c.x + 0.5)},
    parameters={"rate": 2.0},
    exact=lambda X: (torch.exp(-2 * X[:, 1]) * torch.cos(X[:, 0] + 0.5))[:, None],
)
SMALL = PINN(width=8, depth=2, modes=1, sampler=Slices(8, 16))


def manufactured(problem: Problem, exact) -> Problem:
    """The problem whose ansatz is the exact solution, whatever the network."""
    return replace(problem, ansatz=lambda f, c: exact(c), hard=True)


@pytest.mark.parametrize(
    ("problem", "exact"),
    [
        (DECAY, lambda c: {"u": torch.exp(-2 * c.t) * torch.cos(c.x + 0.5)}),
        (burgers(viscosity=0.3), lambda c: {"u": (c.x + 2) / (c.t + 1)}),
        (kuramoto_sivashinsky(), lambda c: {"u": (c.x + 2) / (5 * (c.t + 1))}),
        (allen_cahn(), lambda c: {"u": 1 / torch.sqrt(1 + torch.exp(-10 * c.t)) + 0 * c.x}),
        (lorenz(), lambda c: {"x": 0 * c.t, "y": 0 * c.t, "z": torch.exp(-8 / 3 * c.t)}),
    ],
)
def test_exact_solutions_leave_no_residual(problem: Problem, exact) -> None:
    approximation = SMALL.build(manufactured(problem, exact))
    solution = Solution(problem, [approximation], {}, {})
    assert solution.residual(n=200) < 1e-10


def test_only_the_wanted_derivatives_are_carried() -> None:
    assert set(allen_cahn().orders().indices) == {(0, 0), (1, 0), (2, 0), (0, 1)}
    assert len(kuramoto_sivashinsky().orders()) == 6
    assert len(lorenz().orders()) == 2


def test_least_squares_finds_the_exact_solution() -> None:
    solution = SMALL.solve(DECAY, steps=30, seed=0)
    assert solution.error()["u"] < 1e-3
    assert solution.residual(seed=1) < 1e-2
    points = torch.tensor([[0.3, 0.4], [2.0, 0.9]])
    truth = -torch.exp(-2 * points[:, 1]) * torch.sin(points[:, 0] + 0.5)
    torch.testing.assert_close(solution.d("u", "x")(points), truth.double(), rtol=0, atol=1e-2)
    assert len(solution.history["loss"]) == 30
    assert solution.history["loss"][-1] < solution.history["loss"][0]


def test_initial_data_and_periodicity_hold_exactly_before_any_training() -> None:
    solution = SMALL.solve(DECAY, steps=0)
    x = torch.linspace(0, 6, 9, dtype=torch.float64)
    at_start = solution(torch.stack([x, torch.zeros(9)], 1))[:, 0]
    torch.testing.assert_close(at_start, torch.cos(x + 0.5))
    a, b = (solution(torch.tensor([[x, 0.7]])) for x in (0.2, 0.2 + 2 * math.pi))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_soft_conditions_reach_what_hard_ones_impose() -> None:
    soft = replace(DECAY, hard=False, conditions=(Condition.neumann("u", "t", lambda c: -2 * torch.cos(c.x + 0.5), weight=0.1, t=0.0),))
    assert len(soft.penalties()) == 2
    solution = replace_solver(SMALL, condition_points=32).solve(soft, steps=40)
    assert solution.error()["u"] < 5e-3
    hard, both = SMALL.solve(burgers(), steps=0), SMALL.solve(burgers(hard=False), steps=0)
    wall = torch.tensor([[1.0, 0.3], [-1.0, 0.8]])
    assert hard(wall).abs().max() < 1e-12
    assert both(wall).abs().max() > 1e-3
    assert both.residual() > hard.residual() * 0.1


def replace_solver(solver: PINN, **changes) -> PINN:
    keep = {k: getattr(solver, k) for k in ("width", "depth", "modes", "sampler", "optimizer")}
    return PINN(**{**keep, **changes})


def test_first_order_training_lowers_the_same_loss() -> None:
    adam = replace_solver(SMALL, optimizer=partial(torch.optim.Adam, lr=1e-2), dtype=torch.float64)
    solution = adam.solve(DECAY, steps=60)
    assert solution.history["loss"][-1] < 0.1 * solution.history["loss"][0]
    first = replace_solver(SMALL, optimizer="adam", dtype=torch.float64).solve(DECAY, steps=1).history["loss"][0]
    assert first == pytest.approx(SMALL.solve(DECAY, steps=1).history["loss"][0], rel=1e-12)  # two routes to one number
    closure = replace_solver(SMALL, optimizer=partial(torch.optim.LBFGS, max_iter=4), dtype=torch.float64, resample_every=9)
    assert closure.solve(DECAY, steps=3).history["loss"][-1] < first


def test_networks_of_ones_own_and_the_autograd_engine_agree_with_jets() -> None:
    class Absolute(nn.Module):  # abs has no jet rule
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x.abs())

    torch.manual_seed(0)
    body = MLP(2, 1, 6, 2)
    problem = Problem(
        "heat",
        Box(x=(0.1, 1), t=(0, 1), time="t"),
        ("u",),
        lambda f, c, p: f.d("u", "t") - f.d("u", "xx"),
        initial=lambda c: {"u": torch.sin(c.x)},
    )
    jets, fallback = (PINN(net, optimizer="adam", dtype=torch.float64, sampler=Uniform(32)) for net in (body, Absolute(body)))
    a, b = jets.build(problem), fallback.build(problem)
    assert a.jets
    assert not b.jets
    points = problem.domain.points(torch.rand(9, 2, dtype=torch.float64))
    for u, v in zip(a.residual(problem.residual, points, problem.orders()), b.residual(problem.residual, points, problem.orders())):
        torch.testing.assert_close(u, v)
    before = body[0].weight.clone()
    one, two = jets.solve(problem, steps=5), fallback.solve(problem, steps=5)
    assert one.history["loss"] == pytest.approx(two.history["loss"], rel=1e-9)
    assert torch.equal(body[0].weight, before)  # the user's module is not touched
    with pytest.raises(UnsupportedModel, match="Absolute"):
        PINN(Absolute(body), optimizer="lm").solve(problem, steps=1)


def test_windows_hand_over_exactly_and_derivatives_do_not_see_time_before() -> None:
    solver = replace_solver(SMALL, windows=3, overlap=0.1)
    solution = solver.solve(DECAY, steps=18)
    assert [p.problem.domain.bounds["t"] for p in solution.pieces][1] == pytest.approx((1 / 3, 2 / 3 + 0.1 / 3))
    x = torch.linspace(0, 6, 7, dtype=torch.float64)
    for k in (1, 2):
        left, right = solution.pieces[k - 1], solution.pieces[k]
        points = torch.stack([x, torch.full_like(x, k / 3)], 1)
        torch.testing.assert_close(left(points), right(points), rtol=0, atol=1e-12)
    assert solution.error()["u"] < 5e-3
    # the hand-over data are constant in time: u_t of the ansatz at its start is the network itself
    piece = solution.pieces[1]
    points = torch.tensor([[0.5, 1 / 3]], dtype=torch.float64)
    (u_t,) = piece.residual(lambda f, c, p: f.d("u", "t"), points, DECAY.orders())
    torch.testing.assert_close(u_t, piece.network(points)[:, 0])
    assert set(solution.history["window"]) == {0, 1, 2}
    with pytest.raises(BadInput, match="no ansatz"):
        replace_solver(SMALL, windows=2).solve(burgers(), steps=1)


def test_saved_solutions_come_back(tmp_path) -> None:
    for solver in (SMALL, replace_solver(SMALL, windows=2)):
        solution = solver.solve(DECAY, steps=3)
        solution.save(tmp_path / "s.safetensors")
        again = Solution.load(tmp_path / "s.safetensors", DECAY)
        points = DECAY.domain.points(torch.rand(20, 2, dtype=torch.float64))
        assert torch.equal(solution(points), again(points))
        assert again.history == solution.history
    own = PINN(MLP(2, 1, 4, 1), sampler=Uniform(16))
    own.solve(DECAY, steps=1).save(tmp_path / "o.safetensors")
    with pytest.raises(BadInput, match="pass the solver"):
        Solution.load(tmp_path / "o.safetensors", DECAY)
    assert isinstance(Solution.load(tmp_path / "o.safetensors", DECAY, own).pieces[0], Approximation)
    with pytest.raises(RecordError, match="decay"):
        Solution.load(tmp_path / "o.safetensors", lorenz(), own)


def test_damaged_files_are_named(tmp_path) -> None:
    path, beside = tmp_path / "s.safetensors", tmp_path / "s.json"
    solution = replace_solver(SMALL, windows=2).solve(DECAY, steps=1)
    solution.save(path)
    assert {p.name for p in tmp_path.iterdir()} == {"s.safetensors", "s.json"}
    good, weights = json.loads(beside.read_text()), path.read_bytes()
    settings = good["settings"]
    for change in (
        {"settings": {**settings, "dtype": "load"}},
        {"settings": {**settings, "dtype": "float16"}},
        {"settings": {**settings, "width": "8"}},
        {"settings": {**settings, "compile": True}},
        {"settings": {**settings, "net": "other"}},
        {"settings": {**settings, "width": 9}},
        {"windows": []},
        {"windows": [[0, 1], "x"]},
        {"windows": [[0.5, 0.0], [0.5, 1.0]]},
        {"windows": [[0.0, 1.0]]},
        {"history": None},
        {"history": {"step": 3}},
        {"problem": 7},
    ):
        beside.write_text(json.dumps(good | change))
        with pytest.raises(RecordError, match=r"s\.(json|safetensors)"):
            Solution.load(path, DECAY)
    for text in (b"{", b"\xff\xfe", b"[]", b""):
        beside.write_bytes(text)
        with pytest.raises(RecordError, match=r"s\.json is damaged"):
            Solution.load(path, DECAY)
    beside.write_text(json.dumps(good))
    for data in (weights[:-8], weights[:4], b""):
        path.write_bytes(data)
        with pytest.raises(RecordError, match=r"s\.safetensors is damaged"):
            Solution.load(path, DECAY)


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch) -> None:
    solution = SMALL.solve(DECAY, steps=1)
    solution.save(tmp_path / "s.safetensors")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    broken = Solution(DECAY, solution.pieces, {"net": object()}, {})
    with pytest.raises(TypeError):
        broken.save(tmp_path / "s.safetensors")

    def full(path, data) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        SMALL.solve(DECAY, steps=2).save(tmp_path / "s.safetensors")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(BadInput, match="name the file of the weights"):
        solution.save(tmp_path / "s.json")


def test_many_windows_of_an_ordinary_equation_cost_one_network_each() -> None:
    calls = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP(1, 3, 3, 1)

        def forward(self, x):
            nonlocal calls
            calls += 1
            return self.body(x)

    solution = PINN(Counted(), windows=400, sampler=Uniform(4)).solve(lorenz(), steps=0)  # far beyond a chain's recursion
    calls = 0
    end = solution(torch.tensor([[3.0], [2.9999]]))
    assert calls == 1
    assert torch.isfinite(end).all()
    for k in (1, 200, 399):
        left, right = solution.pieces[k - 1], solution.pieces[k]
        start = torch.tensor([[right.problem.domain.bounds["t"][0]]], dtype=torch.float64)
        torch.testing.assert_close(left(start), right(start), rtol=0, atol=1e-12)


def test_callbacks_see_every_step_and_can_stop() -> None:
    seen = []

    def watch(progress: Progress) -> bool:
        seen.append((progress.step, progress.solution.residual(64)))
        return progress.step == 4

    solution = SMALL.solve(DECAY, steps=9, callbacks=[watch, lambda p: None])
    assert [s for s, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][1] < seen[0][1]
    assert len(solution.history["step"]) == 4
    assert SMALL.solve(DECAY, seconds=0.0).history["step"] == []


def test_a_seed_is_the_whole_randomness() -> None:
    torch.manual_seed(1)
    a = SMALL.solve(DECAY, steps=3, seed=5).history["loss"]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert SMALL.solve(DECAY, steps=3, seed=5).history["loss"] == a
    assert torch.equal(torch.get_rng_state(), state)
    assert SMALL.solve(DECAY, steps=3, seed=6).history["loss"] != a


def test_clear_refusals() -> None:
    with pytest.raises(BadInput, match="finite and rising"):
        Box(x=(1, 0))
    with pytest.raises(BadInput, match="not a coordinate"):
        Box(x=(0, 1), time="t")
    with pytest.raises(BadInput, match="time coordinate"):
        Problem("p", Box(x=(0, 1)), ("u",), lambda f, c, p: f.u, initial=lambda c: {"u": c.x})
    with pytest.raises(BadInput, match="time coordinate"):
        PINN(sampler=Slices()).solve(Problem("p", Box(x=(0, 1)), ("u",), lambda f, c, p: f.u), steps=1)
    with pytest.raises(BadInput, match="net must be"):
        PINN("transformer")
    with pytest.raises(BadInput, match="optimizer"):
        PINN(optimizer="sgd")
    with pytest.raises(AttributeError, match="no field 'v'"):
        replace(DECAY, residual=lambda f, c, p: f.v).orders()
    with pytest.raises(AttributeError, match="no parameter 'kappa'"):
        replace(DECAY, residual=lambda f, c, p: p.kappa * f.u).orders()
    with pytest.raises(BadInput, match="not made of the coordinates"):
        replace(DECAY, residual=lambda f, c, p: f.d("u", "y")).orders()
    solution = SMALL.solve(DECAY, steps=0)
    with pytest.raises(BadInput, match=r"points must be \(n, 2\)"):
        solution(torch.zeros(3))
    with pytest.raises(BadInput, match="no field"):
        solution.d("v", "x")
    with pytest.raises(BadInput, match="neither"):
        replace_solver(SMALL).solve(replace(DECAY, exact=None), steps=0).error()
    with pytest.raises(BadInput, match="not finite"):
        SMALL.solve(replace(DECAY, residual=lambda f, c, p: f.d("u", "t") / 0.0), steps=1)
    with pytest.raises(BadInput, match="the loss at the start is"):
        replace_solver(SMALL, optimizer="adam").solve(replace(DECAY, residual=lambda f, c, p: f.d("u", "t") / 0.0), steps=1)
    with pytest.raises(BadInput, match=r"must return \(n, 1\)"):
        PINN(MLP(2, 3, 4, 1)).solve(DECAY, steps=1)


def test_features_and_second_order_settings() -> None:
    domain = Box(x=(-1, 3), t=(0, 2), time="t", periodic=("x",))
    assert BoxFeatures(domain, modes=3).width == 7
    corners = BoxFeatures(Box(x=(-1, 3), t=(0, 2)))(torch.tensor([[-1.0, 0.0], [3.0, 2.0]]))
    assert corners.tolist() == [[-1, -1], [1, 1]]
    fourier = PINN(features=partial(FourierFeatures, count=5), width=4, depth=1, sampler=Uniform(20))
    assert fourier.solve(DECAY, steps=2).history["loss"][-1] > 0
    damped = PINN(width=4, depth=1, sampler=Uniform(20), optimizer=partial(LevenbergMarquardt, damping=1.0))
    assert damped.second_order
    assert damped.dtype == torch.float64
    assert PINN(optimizer="adam").dtype == torch.float32


@pytest.mark.slow
def test_compiled_training_is_the_same_training() -> None:
    eager, compiled = (
        replace_solver(SMALL, optimizer="adam", dtype=torch.float64, compile=c).solve(DECAY, steps=3).history["loss"] for c in (False, True)
    )
    assert compiled == pytest.approx(eager, rel=1e-10)
