"""Reference solutions: halving the step changes them by less than they are used for, and they solve what they claim to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurarium.errors import BadInput
from neurarium.physics import Reference, allen_cahn, burgers, kuramoto_sivashinsky, lorenz
from neurarium.physics.reference import cole_hopf_burgers, etdrk4, ode, relative_l2


def allen(steps: int, n: int = 256, times: int = 11) -> np.ndarray:
    x = np.linspace(-1, 1, n, endpoint=False)
    symbol = 5 - 1e-4 * (np.pi * np.arange(n // 2 + 1)) ** 2
    return etdrk4(symbol, lambda u: -5 * np.fft.rfft(u**3), x**2 * np.cos(np.pi * x), np.linspace(0, 1, times), steps=steps)


def test_etdrk4_is_converged_in_time_and_of_fourth_order() -> None:
    fine = allen(100)
    assert relative_l2(allen(50), fine) < 1e-8
    coarse, half = (np.abs(allen(s) - fine).max() for s in (5, 10))
    assert 12 < coarse / half < 20


def test_etdrk4_is_exact_for_linear_and_for_space_free_equations() -> None:
    x = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    k = np.arange(17)
    heat = etdrk4(-(k**2.0), lambda u: np.zeros(17), np.sin(3 * x), np.linspace(0, 1, 3), steps=2)
    np.testing.assert_allclose(heat[-1], np.exp(-9) * np.sin(3 * x), atol=1e-15)
    waves = etdrk4(-2j * k, lambda u: np.zeros(17), np.sin(3 * x), np.linspace(0, 1, 3), steps=2)  # complex symbol: convection
    np.testing.assert_allclose(waves[-1], np.sin(3 * (x - 2)), atol=1e-13)
    logistic = etdrk4(np.ones(17), lambda u: -np.fft.rfft(u**2), np.full(32, 0.1), np.linspace(0, 2, 3), steps=200)
    np.testing.assert_allclose(logistic[-1], 1 / (1 + 9 * np.exp(-2)), rtol=1e-10)
    with pytest.raises(BadInput, match="equally spaced"):
        etdrk4(np.ones(17), lambda u: u, np.zeros(32), np.array([0.0, 1.0, 3.0]), steps=1)


def test_cole_hopf_meets_an_independent_solution() -> None:
    x, t = np.linspace(-1, 1, 128, endpoint=False), np.linspace(0, 0.5, 6)
    k = np.pi * np.arange(65)
    flux = lambda u: -0.5j * k * np.fft.rfft(u**2) * (np.arange(65) < 43)  # noqa: E731
    spectral = etdrk4(-0.1 * k**2, flux, -np.sin(np.pi * x), t, steps=100)
    np.testing.assert_allclose(cole_hopf_burgers(0.1, x, t), spectral.T, atol=1e-9)


def test_named_references_are_ten_times_tighter_than_what_is_judged_by_them() -> None:
    assert allen_cahn().reference().error < 1e-4
    assert kuramoto_sivashinsky(horizon=0.2).reference().error < 1e-6
    assert burgers().reference().error < 1e-10
    reference = lorenz().reference()
    assert reference.error < 1e-8
    assert reference.points().shape == (301, 1)
    assert reference.fields().shape == (301, 3)


def test_integration_conserves_an_invariant_and_reports_failure() -> None:
    circle = ode(lambda t, y: np.array([y[1], -y[0]]), np.array([1.0, 0.0]), np.linspace(0, 20, 5))
    np.testing.assert_allclose(circle[0], np.cos(np.linspace(0, 20, 5)), atol=1e-10)
    with pytest.raises(BadInput, match="could not be integrated"), np.errstate(all="ignore"):
        ode(lambda t, y: y**2, np.array([1.0]), np.array([0.0, 2.0]))


def test_reference_checks_its_shapes() -> None:
    with pytest.raises(BadInput, match="shape"):
        Reference({"x": np.zeros(3)}, {"u": np.zeros(4)}, 0.0)
    grid = Reference({"x": np.array([0.0, 1.0]), "t": np.array([5.0, 6.0, 7.0])}, {"u": np.arange(6.0).reshape(2, 3)}, 0.0)
    assert grid.points()[4].tolist() == [1.0, 6.0]
    assert grid.fields()[4] == 4
    assert grid.points().dtype == torch.float64
