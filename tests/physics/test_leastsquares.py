"""Levenberg-Marquardt: exact Jacobian rows, exact answers where they are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.physics import ModifiedMLP
from neurarium.physics.jets import Jet, Orders, coordinates
from neurarium.physics.leastsquares import LevenbergMarquardt, Rows, jacobian


def burgers_rows(net: nn.Module, points: torch.Tensor) -> tuple[list[torch.Tensor], list]:
    tape: list = []
    c = coordinates(points, Orders(("x", "t"), {"xx", "t"}), tape)
    u = net(torch.stack([c["x"], c["t"]], -1))[:, 0]
    return [u["t"] + u[""] * u["x"] - 0.1 * u["xx"], u[""] - c["x"].value], tape


PLAIN = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 1))


@pytest.mark.parametrize("net", [PLAIN, ModifiedMLP(2, 1, 4, 2)])
def test_jacobian_equals_jacrev(net: nn.Module) -> None:
    net = net.double()
    points = torch.rand(7, 2, dtype=torch.float64)
    names, parameters = zip(*net.named_parameters())

    def all_rows(*values: torch.Tensor) -> torch.Tensor:
        called = lambda x: torch.func.functional_call(net, dict(zip(names, values)), (x,))  # noqa: E731
        return torch.cat(burgers_rows(called, points)[0])

    blocks = torch.func.jacrev(all_rows, argnums=tuple(range(len(names))))(*parameters)
    truth = torch.cat([b.flatten(1) for b in blocks], 1)
    scale = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    values, tape = burgers_rows(net, points)
    pieces = list(jacobian(Rows(values, tape, scale), parameters, piece=3))
    assert [len(r) for _, r in pieces] == [3, 3, 1, 3, 3, 1]
    torch.testing.assert_close(torch.cat([J for J, _ in pieces]), truth * scale.repeat(2)[:, None], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([r for _, r in pieces]), Rows(values, (), scale).scaled())


@pytest.mark.parametrize("rows", [40, 5])
def test_one_step_solves_a_linear_problem_as_lstsq_does(rows: int) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(7, 1).double(), torch.randn(rows, 7, dtype=torch.float64)
    y = torch.randn(rows, dtype=torch.float64)
    start = torch.cat([net.weight.detach()[0], net.bias.detach()])

    def residuals() -> list[Rows]:
        tape: list = []
        return [Rows([net(Jet.constant(x, Orders(("s",)), tape)).value[:, 0] - y], tape)]

    A = torch.cat([x, torch.ones(rows, 1, dtype=torch.float64)], 1)
    truth = start + torch.linalg.lstsq(A, y - A @ start, driver="gelsd").solution  # the nearest one where there are many
    LevenbergMarquardt(list(net.parameters()), damping=1e-13).step(residuals)
    torch.testing.assert_close(torch.cat([net.weight.detach()[0], net.bias.detach()]), truth, rtol=1e-8, atol=1e-8)


def fit(memory: int = 256 << 20, points: int = 60, steps: int = 10) -> tuple[list[float], torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.linspace(-1, 1, points, dtype=torch.float64)[:, None]

    def residuals() -> list[Rows]:
        tape: list = []
        return [Rows([net(Jet.constant(x, Orders(("x",)), tape)).value[:, 0] - torch.sin(3 * x[:, 0])], tape, len(x) ** -0.5)]

    lm = LevenbergMarquardt(list(net.parameters()), memory=memory)
    return [lm.step(residuals) for _ in range(steps)], nn.utils.parameters_to_vector(net.parameters()).detach()


def test_the_loss_never_rises_and_falls_fast() -> None:
    losses, _ = fit(steps=40)
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 1e-5 * losses[0]


def test_pieces_of_the_jacobian_do_not_change_the_steps() -> None:
    whole, pieces = fit()[1], fit(memory=25 * 8 * 7)[1]
    torch.testing.assert_close(whole, pieces, rtol=1e-6, atol=1e-8)


def test_a_step_that_cannot_improve_leaves_the_parameters() -> None:
    net = nn.Linear(1, 1).double()
    before = net.weight.detach().clone()

    def residuals() -> list[Rows]:
        tape: list = []
        value = net(Jet.constant(torch.ones(3, 1, dtype=torch.float64), Orders(("x",)), tape)).value[:, 0]
        return [Rows([value if torch.is_grad_enabled() else value * torch.inf], tape)]

    lm = LevenbergMarquardt(list(net.parameters()), damping=1.0, tries=3)
    lm.step(residuals)
    assert torch.equal(net.weight, before)
    assert lm.damping == 64.0


def test_parameters_outside_linear_layers_are_refused_by_name() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.slope = nn.Linear(1, 1), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return torch.tanh(self.layer(x) * self.slope[0])

    net = Slope()
    x = torch.ones(3, 1)

    def residuals() -> list[Rows]:
        tape: list = []
        return [Rows([net(Jet.constant(x, Orders(("x",)), tape)).value[:, 0]], tape)]

    with pytest.raises(UnsupportedModel, match=r"shape \(2,\)"):
        LevenbergMarquardt(list(net.parameters())).step(residuals)
    with pytest.raises(BadInput):
        LevenbergMarquardt([])
    x[0] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        LevenbergMarquardt(list(net.layer.parameters())).step(residuals)
