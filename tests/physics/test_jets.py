"""Jets: every derivative equals an independent computation of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sympy
import torch
from torch import nn

from neurarium.errors import BadInput
from neurarium.physics.jets import Jet, Orders, coordinates, derivatives_by_autograd, orders
from neurarium.physics.networks import MLP, ModifiedMLP

X, T = sympy.symbols("x t")
POINTS = torch.tensor([[0.3, 0.7], [-0.4, 0.2], [0.9, -0.5]], dtype=torch.float64)
ALL4 = {"x" * i + "t" * j for i, j in itertools.product(range(5), range(5)) if i + j <= 4}


def module(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), activation, nn.Linear(5, 5), activation, nn.Linear(5, 2)).double()


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.Softplus()])
def test_ordinary_modules_take_jets_and_give_the_derivatives_of_autograd(activation: nn.Module) -> None:
    net, wanted = module(activation), Orders(("x", "t"), ALL4)
    c = coordinates(POINTS, wanted)
    jet = net(torch.stack([c["x"], c["t"]], -1))
    truth = derivatives_by_autograd(net, POINTS, wanted)
    assert len(wanted) == 15
    for key in ALL4:
        torch.testing.assert_close(jet[key], truth[key], rtol=1e-12, atol=1e-12)
        assert torch.isfinite(jet[key]).all()


@pytest.mark.parametrize("net", [MLP(2, 1, width=6, depth=3), ModifiedMLP(2, 1, width=6, depth=2)])
def test_networks_of_the_room_in_mixed_third_order(net: nn.Module) -> None:
    net, wanted = net.double(), Orders(("x", "t"), {"xxt"})
    c = coordinates(POINTS, wanted)
    jet, truth = net(torch.stack([c["x"], c["t"]], -1)), derivatives_by_autograd(net, POINTS, wanted)
    for key in ("", "x", "t", "xx", "xt", "xxt"):
        torch.testing.assert_close(jet[key], truth[key], rtol=1e-12, atol=1e-12)


FORMULAS = {
    "product": (lambda x, t: (x**3 - 2 * t) * (x * t + 1), (X**3 - 2 * T) * (X * T + 1)),
    "quotient": (lambda x, t: (x + t) / (2 + x * x), (X + T) / (2 + X**2)),
    "reciprocal": (lambda x, t: 1 / (3 - x * t), 1 / (3 - X * T)),
    "powers": (lambda x, t: (2 + x) ** 1.5 * (3 + t) ** -2, (2 + X) ** sympy.Rational(3, 2) * (3 + T) ** -2),
    "sine": (lambda x, t: torch.sin(2 * x + t) * torch.cos(x * t), sympy.sin(2 * X + T) * sympy.cos(X * T)),
    "composed": (lambda x, t: torch.exp(-torch.tanh(x * t) + x), sympy.exp(-sympy.tanh(X * T) + X)),
    "logarithm": (lambda x, t: torch.log(2 + x * x + t), sympy.log(2 + X**2 + T)),
    "root": (lambda x, t: torch.sqrt(2 + x + t), sympy.sqrt(2 + X + T)),
    "error function": (lambda x, t: torch.erf(x - t), sympy.erf(X - T)),
    "from the right": (lambda x, t: 1 - 2 * x - (3 - t), 1 - 2 * X - (3 - T)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_arithmetic_equals_sympy_to_fourth_order(name: str) -> None:
    formula, symbolic = FORMULAS[name]
    wanted = Orders(("x", "t"), {"xxxx", "xxt", "tt"})
    jet = formula(*coordinates(POINTS, wanted).values())
    for key in ("", "x", "t", "xx", "xt", "tt", "xxx", "xxt", "xxxx"):
        derivative = sympy.diff(symbolic, *([{"x": X, "t": T}[k] for k in key])) if key else symbolic
        truth = [sympy.lambdify((X, T), derivative, modules=["scipy", "numpy"])(x, t) for x, t in POINTS.numpy()]
        np.testing.assert_allclose(jet[key].numpy(), truth, rtol=1e-11, atol=1e-11, err_msg=key)


def test_powers_are_exact_at_zero() -> None:
    x = coordinates(torch.zeros(1, 1, dtype=torch.float64), Orders(("x",), {"xxx"}))["x"]
    cube = x**3
    assert [cube[k].item() for k in ("", "x", "xx", "xxx")] == [0, 0, 0, 6]
    assert [(x**0)[k].item() for k in ("", "x")] == [1, 0]


def test_constants_enter_the_value_alone_and_tensors_mix_from_both_sides() -> None:
    x = coordinates(POINTS[:, :1], Orders(("x",), {"x"}))["x"]
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for jet in (v - x, -(x - v)):
        torch.testing.assert_close(jet[""], v - POINTS[:, 0])
        torch.testing.assert_close(jet["x"], -torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((v * x)["x"], v)
    torch.testing.assert_close((v / (2 + x))["x"], -v / (2 + POINTS[:, 0]) ** 2)
    torch.testing.assert_close((v + x)[""], v + POINTS[:, 0])


def test_orders_are_downward_closed_and_named_by_coordinates() -> None:
    o = Orders(("x", "theta"), {"xxtheta"})
    assert set(o.indices) == {(i, j) for i in range(3) for j in range(2)}
    assert o.index("thetaxx") == (2, 1)
    assert len(Orders(("x", "t"), ())) == 1
    with pytest.raises(BadInput, match="not made of the coordinates"):
        o.index("y")
    with pytest.raises(BadInput, match="not carried"):
        coordinates(POINTS, Orders(("x", "t"), {"x"}))["x"]["t"]
    with pytest.raises(BadInput, match="points must be"):
        coordinates(POINTS[:, :1], o)
    with pytest.raises(BadInput, match="different orders"):
        coordinates(POINTS, Orders(("x", "t"), {"x"}))["x"] * coordinates(POINTS, Orders(("x", "t"), {"t"}))["x"]


def test_what_has_no_rule_is_refused() -> None:
    x = coordinates(POINTS, orders(("x", "t"), frozenset({"x"})))["x"]
    for f in (torch.floor, torch.relu):
        with pytest.raises(TypeError):
            f(x)
    with pytest.raises(TypeError):
        x**x


def test_the_derivative_streams_are_differentiable() -> None:
    net, wanted = module(nn.Tanh()), Orders(("x", "t"), {"xx"})

    def second(x: torch.Tensor) -> torch.Tensor:
        c = coordinates(x, wanted)
        return net(torch.stack([c["x"], c["t"]], -1))["xx"].sum(1)

    points = POINTS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(second, (points,))
    third = Orders(("x", "t"), {"xxx"})
    (g,) = torch.autograd.grad(second(points).sum(), points)
    truth = derivatives_by_autograd(net, POINTS, third)["xxx"].sum(1)
    torch.testing.assert_close(g[:, 0], truth.detach())


def test_a_network_of_no_coordinate_gives_zero_derivatives_by_autograd() -> None:
    jet = derivatives_by_autograd(lambda x: torch.ones(len(x), 1) * math.pi, POINTS, Orders(("x", "t"), {"xt"}))
    assert jet["xt"].abs().max() == 0
    assert jet["x"].abs().max() == 0


def test_jet_shapes_read_like_a_tensor() -> None:
    jet = Jet.constant(torch.zeros(4, 3), Orders(("x",), {"x"}))
    assert jet.shape == (4, 3)
    assert (jet.ndim, jet.dim(), jet.size(1), jet.dtype) == (2, 2, 3, torch.float32)
    assert jet[:, 1].shape == (4,)
    assert torch.cat([jet, jet], -1).shape == (4, 6)
    with pytest.raises(BadInput, match="needs 2 streams"):
        Jet([torch.zeros(1)], jet.orders)
