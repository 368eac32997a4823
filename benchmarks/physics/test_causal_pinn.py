"""The engine beside DeepXDE (PyTorch): seconds of 1,000 first-order steps on one problem, network and set of points; error at equal time.

    pytest benchmarks/physics -s

Allen-Cahn, 2,048 points, 3 x 48 tanh network on four Fourier modes, initial data and periodicity exact on both sides, Adam, float32, one
thread. The two take turns, so that a drift of the machine meets both.
"""

from __future__ import annotations

import os
import time
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch

from neurarium.physics import PINN, Causal, CausalPINN, Slices, allen_cahn

os.environ.setdefault("DDE_BACKEND", "pytorch")
pytest.importorskip("skopt")
dde = pytest.importorskip("deepxde")

ROUNDS, STEPS, POINTS, WIDTH, RATE = 4, 100, 2048, 48, 3e-3


def deepxde_model(points: np.ndarray):
    def pde(x, u):
        u_t = dde.grad.jacobian(u, x, i=0, j=1)
        u_xx = dde.grad.hessian(u, x, i=0, j=0)
        return u_t - 1e-4 * u_xx + 5 * u**3 - 5 * u

    def features(x):
        angle = torch.pi * x[:, :1] * torch.arange(1, 5, dtype=x.dtype)
        return torch.cat([torch.cos(angle), torch.sin(angle), 2 * x[:, 1:] - 1], 1)

    def ansatz(x, u):
        return x[:, :1] ** 2 * torch.cos(torch.pi * x[:, :1]) + x[:, 1:] * u

    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    data = dde.data.TimePDE(domain, pde, [], num_domain=0, anchors=points)
    net = dde.nn.FNN([9, WIDTH, WIDTH, WIDTH, 1], "tanh", "Glorot normal")
    net.apply_feature_transform(features)
    net.apply_output_transform(ansatz)
    model = dde.Model(data, net)
    model.compile("adam", lr=RATE, verbose=0)
    return model


@pytest.mark.timeout(900)
def test_against_deepxde() -> None:
    torch.set_num_threads(1)
    problem = allen_cahn()
    points = problem.domain.points(torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(0)))
    adam = {
        "width": WIDTH,
        "optimizer": partial(torch.optim.Adam, lr=RATE, fused=True),
        "sampler": lambda domain, generator, dtype: points.to(dtype),
    }
    theirs = deepxde_model(points.numpy())
    spent: dict[str, list[float]] = {"DeepXDE": [], "compiled": [], "not compiled": []}

    class InTurn:
        """After each stretch of STEPS of our steps, as many of DeepXDE's; our clock stands still in callbacks."""

        def __init__(self, name: str) -> None:
            self.name, self.last = name, 0.0

        def __call__(self, progress) -> None:
            if progress.step % STEPS:
                return
            spent[self.name].append(progress.seconds - self.last)
            self.last, began = progress.seconds, time.perf_counter()
            theirs.train(iterations=STEPS, display_every=10**9, verbose=0)
            spent["DeepXDE"].append(time.perf_counter() - began)

    for name, compiled in (("compiled", True), ("not compiled", False)):
        PINN(**adam, compile=compiled).solve(problem, steps=(ROUNDS + 1) * STEPS, callbacks=[InTurn(name)])
    thousand = {name: 1000 / STEPS * median(s[1:]) for name, s in spent.items()}  # the first stretch compiles and warms up
    print(f"\nseconds of 1,000 Adam steps, median of {ROUNDS} stretches (one run, one thread, torch {torch.__version__}):")
    for name, seconds in thousand.items():
        print(f"  {name:13} {seconds:7.2f}   {thousand['DeepXDE'] / seconds:5.2f} x DeepXDE's speed")
    print(f"  compilation once: {spent['compiled'][0] - median(spent['compiled']):.1f} s")

    reference = problem.reference()
    grid, truth = reference.points(), reference.fields().numpy()
    wrong = theirs.predict(grid.numpy().astype(np.float32)) - truth
    budget = thousand["DeepXDE"] * 2 * (ROUNDS + 1) * STEPS / 1000
    causal = Causal(eps=tuple(10.0 * 3.0**k for k in range(9)), delta=0.95, patience=10**9)
    ours = CausalPINN(causal=causal, sampler=Slices(32, 64)).solve(problem, seconds=budget)
    print(f"relative L2 error after {budget:.0f} s each:")
    print(f"  DeepXDE, Adam                                    {np.linalg.norm(wrong) / np.linalg.norm(truth):.3g}")
    print(f"  causal Levenberg-Marquardt, {len(ours.history['step']):3d} steps of 3 x 24     {ours.error()['u']:.3g}")
    assert thousand["compiled"] < thousand["DeepXDE"]
