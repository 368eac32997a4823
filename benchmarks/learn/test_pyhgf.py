"""Belief networks beside pyhgf: the same filter on the same 256 series, in float64, and its gradient.

    pytest benchmarks/learn/test_pyhgf.py -s

pyhgf is measured three ways, each compiled before: one series after another as its users call it, its scan under ``jax.vmap``, and its scan
under ``jax.lax.map``, both compiled as one program that returns means and precisions alone. Ours is measured as it is and with
``compile=True``. One thread everywhere (set ``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`` and OMP_NUM_THREADS=1). The numbers are
compared before anything is timed.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from neurarium.learn.predictive import HGF, surprise
from neurarium.meter import latency

jax = pytest.importorskip("jax")
pytest.importorskip("pyhgf")

SERIES, STEPS, GRADED = 256, 500, 16
UPDATES = {"ehgf": "eHGF", "unbounded": "unbounded"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield
    torch.set_num_threads(threads)


def walks() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (0.2 * torch.randn(SERIES, STEPS, generator=g, dtype=torch.float64)).cumsum(1)


def peer(update: str):
    from pyhgf.model import HGF as Peer

    net = Peer(
        n_levels=2, model_type="continuous", update_type=UPDATES[update], continuous_precision=100.0,
        initial_mean={"1": 0.0, "2": 0.0}, initial_precision={"1": 1.0, "2": 1.0}, tonic_volatility={"1": -3.0, "2": -4.0},
        volatility_coupling={"1": 1.0},
    )  # fmt: skip
    net.create_belief_propagation_fn()

    def lean(series):
        inputs = (series[:, None],), (jax.numpy.ones(len(series), dtype=int),), jax.numpy.ones(len(series)), None
        run = jax.lax.scan(net.scan_fn, net.attributes, inputs)[1]
        return {i: {k: run[i][k] for k in ("mean", "precision", "expected_mean", "expected_precision")} for i in (1, 2)}

    return net, lean


@pytest.mark.parametrize("update", UPDATES)
def test_a_batch_of_series(update):
    x = walks()
    ours = HGF(update=update, tonic_volatility=(-3.0, -4.0, 0.0), input_precision=100.0)
    net, lean = peer(update)
    rows = jax.numpy.asarray(x.numpy())
    began = time.perf_counter()
    batched = jax.jit(jax.vmap(lean))
    theirs = jax.block_until_ready(batched(rows))
    compiled = time.perf_counter() - began
    mapped = jax.jit(lambda r: jax.lax.map(lean, r))
    jax.block_until_ready(mapped(rows))
    net.input_data(x[0].numpy())
    with torch.no_grad():
        run = ours.run(x)
    gaps = []
    for level in (1, 2):
        for what in ("mean", "precision"):
            a, b = getattr(run, what)[f"level{level}"].numpy(), np.asarray(theirs[level][what])
            gaps.append(np.abs(a - b).max() / np.abs(b).max())
    assert max(gaps) < 1e-9

    def one_by_one():
        for row in x.numpy():
            net.input_data(row)
        np.asarray(net.node_trajectories[1]["mean"])

    def our_run(compile=False):
        with torch.no_grad():
            return ours.run(x, compile=compile)

    began = time.perf_counter()
    again = our_run(compile=True)
    ours_compiled = time.perf_counter() - began
    torch.testing.assert_close(again.mean["level2"], run.mean["level2"])
    found = latency(
        {
            "ours": our_run,
            "ours, compiled": lambda: our_run(compile=True),
            "pyhgf, one by one": one_by_one,
            "pyhgf, vmap": lambda: jax.block_until_ready(batched(rows)),
            "pyhgf, lax.map": lambda: jax.block_until_ready(mapped(rows)),
        },
        repeats=5,
        warmup=1,
    )
    print(f"\n{update}: {SERIES} series of {STEPS} steps, two levels, float64; largest relative difference {max(gaps):.1e}")
    print(f"{'':>20}  seconds  to ours   (compilation: pyhgf, vmap {compiled:.1f} s, ours {ours_compiled:.1f} s)")
    for name, t in found.items():
        print(f"{name:>20}  {t.median:7.3f}  {t.median / found['ours'].median:7.2f}")
    assert found["ours"].low < found["pyhgf, one by one"].low


def test_gradient_of_the_surprise():
    x = walks()[:GRADED, :200]
    ours = HGF(tonic_volatility=(-3.0, -4.0, 0.0), input_precision=100.0)
    level = ours.nodes["level1"].tonic_volatility.requires_grad_()
    net, _ = peer("ehgf")
    rows = jax.numpy.asarray(x.numpy())

    def total(omega):
        attributes = {**net.attributes, 1: {**net.attributes[1], "tonic_volatility": omega}}

        def one(series):
            inputs = (series[:, None],), (jax.numpy.ones(len(series), dtype=int),), jax.numpy.ones(len(series)), None
            run = jax.lax.scan(net.scan_fn, attributes, inputs)[1]
            pi, mean = run[1]["expected_precision"], run[1]["expected_mean"]
            return 0.5 * (jax.numpy.log(2 * jax.numpy.pi / pi) + pi * (series - mean) ** 2)

        return jax.vmap(one)(rows).sum()

    graded = jax.jit(jax.grad(total))
    theirs = float(jax.block_until_ready(graded(-3.0)))

    def our_gradient(compile=False):
        return torch.autograd.grad(surprise(ours.run(x, compile=compile), noise=False).sum(), level)[0]

    assert float(our_gradient()) == pytest.approx(theirs, rel=1e-8)
    assert float(our_gradient(compile=True)) == pytest.approx(theirs, rel=1e-8)
    calls = {"ours": our_gradient, "ours, compiled": lambda: our_gradient(compile=True)}
    found = latency({**calls, "pyhgf": lambda: jax.block_until_ready(graded(-3.0))}, repeats=5, warmup=1)
    print(f"\ngradient, {GRADED} series of 200 steps: " + ", ".join(f"{n} {1e3 * t.median:.0f} ms" for n, t in found.items()))
