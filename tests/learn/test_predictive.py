"""Belief networks: the published equations on known numbers, the Kalman filter as a limit, and pyhgf itself where it is installed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn import Diverged
from neurarium.learn.predictive import HGF, HGFLearner, HGFNetwork, adapt_structure, surprise

DOUBLE = torch.float64


def walk(steps=60, series=1, seed=0, volatile=0.3):
    g = torch.Generator().manual_seed(seed)
    level = (volatile * torch.randn(series, steps, generator=g, dtype=DOUBLE)).cumsum(1) - 3
    return (torch.exp(level / 2) * torch.randn(series, steps, generator=g, dtype=DOUBLE)).cumsum(1)


def two_levels(**options):
    settings = {"tonic_volatility": (-3, -2, -3), "input_precision": 100.0, **options}
    return HGF(**settings)


JUMP = torch.cat([torch.zeros(50, dtype=DOUBLE), 3 * torch.randn(50, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))])


def zoo(**options):
    """Two inputs, shared and nonlinear value parents, two volatility parents of one node, drift, an AR(1)."""
    net = HGFNetwork(**options)
    net.add_input("u", precision=50.0).add_input("v", precision=20.0)
    net.add_continuous("a", tonic_volatility=-2.0, precision=2.0).add_continuous("b", tonic_volatility=-3.0, drift=0.02)
    net.add_continuous("c", mean=0.3, tonic_volatility=-4.0, autoconnection=0.9)
    net.add_continuous("d", tonic_volatility=-3.5).add_continuous("e", tonic_volatility=-2.5)
    net.value("a", "u").value("b", "v", 0.8).value("a", "v", 0.5, fn=torch.tanh).value("c", "a", 0.3, fn=lambda x: x * x + x)
    return net.volatility("d", "a", 0.7).volatility("e", "a", 0.5).volatility("e", "b")


def test_two_levels_on_known_numbers():
    run = two_levels().run(torch.tensor([0.2, 0.5, 0.1, -0.3, 1.2, 1.0], dtype=DOUBLE))
    want = {
        "level1": (
            [0.198113, 0.455885, 0.147636, -0.250632, 1.081343, 1.000120],
            [100.952574, 117.114101, 115.453953, 112.395786, 108.908367, 100.147383],
        ),
        "level2": (
            [-0.025662, 0.120622, 0.369065, 0.730433, 4.913364, 4.782332],
            [0.902380, 1.226767, 1.621246, 2.105211, 7.829279, 3.803293],
        ),
    }
    for name, (mean, precision) in want.items():
        np.testing.assert_allclose(run.mean[name], mean, atol=6e-7)
        np.testing.assert_allclose(run.precision[name], precision, atol=6e-7)


@pytest.mark.parametrize("dt", [1.0, "irregular"])
def test_without_volatility_coupling_it_is_the_kalman_filter(dt):
    x = walk()[0]
    gaps = torch.ones(60, dtype=DOUBLE) if dt == 1.0 else torch.rand(60, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) + 0.2
    seen = torch.rand(60, generator=torch.Generator().manual_seed(2)) > 0.2
    run = two_levels(coupling=(0.0, 0.0)).run(torch.where(seen, x, torch.nan), gaps, seen)
    mean, variance, nats = 0.0, 1.0, []
    for k in range(60):
        variance = variance + float(gaps[k]) * np.exp(-3)
        if seen[k]:
            spread = variance + 0.01
            nats.append(0.5 * (np.log(2 * np.pi * spread) + (float(x[k]) - mean) ** 2 / spread))
            mean, variance = mean + variance / spread * (float(x[k]) - mean), variance * 0.01 / spread
        else:
            nats.append(0.0)
        assert float(run.mean["level1"][k]) == pytest.approx(mean, abs=1e-12)
        assert float(run.precision["level1"][k]) == pytest.approx(1 / variance, rel=1e-12)
    np.testing.assert_allclose(surprise(run), nats, atol=1e-12)


def test_a_batch_is_a_loop_over_series_and_parameters_may_differ_between_them():
    x = walk(12, 6).view(2, 3, 12)
    whole = zoo().run(torch.stack([x, -x.flip(0)], -1))
    for i in range(2):
        for j in range(3):
            one = zoo().run(torch.stack([x, -x.flip(0)], -1)[i, j])
            for name in one.mean:
                torch.testing.assert_close(whole.mean[name][i, j], one.mean[name])
                torch.testing.assert_close(whole.precision[name][i, j], one.precision[name])
    omegas = torch.tensor([-4.0, -3.0, -1.0], dtype=DOUBLE)
    many = two_levels(tonic_volatility=(omegas, -2, -3)).run(x[0])
    for j, omega in enumerate(omegas):
        torch.testing.assert_close(many.mean["level2"][j], two_levels(tonic_volatility=(omega, -2, -3)).run(x[0, j]).mean["level2"])


def test_the_order_of_insertion_changes_nothing():
    x = walk(30)
    plain = HGF(levels=3).run(x)
    net = HGFNetwork()
    net.add_continuous("level3").add_input("u").add_continuous("level1").add_continuous("level2")
    net.volatility("level3", "level2").value("level1", "u").volatility("level2", "level1")
    other = net.run(x)
    for name in plain.mean:
        assert torch.equal(plain.mean[name], other.mean[name])


@pytest.mark.parametrize("net", [two_levels(), two_levels(update="unbounded"), zoo()], ids=["two levels", "unbounded", "zoo"])
def test_gradients_of_the_surprise_are_those_of_finite_differences(net):
    x = walk(6, 2)
    x = x if len(net.inputs) == 1 else torch.stack([x, x.flip(0)], -1)
    for name, p in net.named_parameters():
        if name.startswith("nodes.u") or name.startswith("nodes.v"):
            continue
        p.requires_grad_(True)
        (found,) = torch.autograd.grad(surprise(net.run(x)).sum(), p)
        p.requires_grad_(False)
        p.add_(1e-5)
        high = float(surprise(net.run(x)).sum())
        p.sub_(2e-5)
        low = float(surprise(net.run(x)).sum())
        p.add_(1e-5)
        assert float(found) == pytest.approx((high - low) / 2e-5, rel=1e-4, abs=1e-5), name


def test_a_constant_input_is_believed_in_the_end():
    run = two_levels().run(torch.full((300,), 1.5, dtype=DOUBLE))
    assert float(run.mean["level1"][-1]) == pytest.approx(1.5, abs=1e-6)
    assert run.mean["level2"][-1] < run.mean["level2"][20]  # and the world seems calmer and calmer


def test_volatility_rises_when_the_input_jumps():
    run = two_levels(impossible="keep").run(JUMP)
    level = run.mean["level2"]
    assert level[-20:].mean() > level[30:50].mean() + 2
    assert all((p > 0).all() for p in run.precision.values())


def test_binary_beliefs_follow_the_closed_form_of_one_step():
    net = HGF(3, "binary", tonic_volatility=(0, -2, -6))
    run = net.run(torch.tensor([1.0, 0.0], dtype=DOUBLE))
    predicted = 1 / (1 + np.exp(-2.0))  # tonic volatility and the volatility parent's mean of 0
    pi = 1 / (1 / 1 + np.exp(-2)) + 0.25
    assert float(run.precision["level2"][0]) == pytest.approx(pi)
    assert float(run.mean["level2"][0]) == pytest.approx(0.5 / pi)
    assert float(surprise(run)[0]) == pytest.approx(np.log(2))
    assert float(run.expected_mean["u"][1]) == pytest.approx(1 / (1 + np.exp(-0.5 / pi)))
    assert predicted > 0.5


def test_what_saw_nothing_only_predicts():
    x = walk(30)[0]
    mask = torch.ones(30, dtype=torch.bool)
    mask[10:20] = False
    net = two_levels()
    run = net.run(torch.where(mask, x, torch.nan), mask=mask)
    for name in ("level1", "level2"):
        assert torch.equal(run.mean[name][10:20], run.mean[name][9].expand(10))
        torch.testing.assert_close(run.precision[name][10:20], run.expected_precision[name][10:20])
        assert (run.precision[name][10:19] > run.precision[name][11:20]).all()
    assert (surprise(run)[10:20] == 0).all()
    for p in net.parameters():
        p.requires_grad_(True)
    total = surprise(net.run(torch.where(mask, x, torch.nan), mask=mask)).sum()
    grads = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)


def test_of_two_inputs_one_may_be_missing():
    x = torch.stack([walk(20)[0], walk(20, seed=1)[0]], -1)
    mask = torch.ones(20, 2, dtype=torch.bool)
    mask[5:, 1] = False
    net = HGFNetwork().add_input("u", precision=10).add_input("v", precision=5).add_continuous("a").value("a", "u").value("a", "v")
    alone = HGFNetwork().add_input("u", precision=10).add_continuous("a").value("a", "u")
    both = net.run(x, mask=mask)
    start = net.run(x[:5]).last
    torch.testing.assert_close(both.mean["a"][5:], alone.run(x[5:, 0], start=start).mean["a"])


def test_observing_one_by_one_is_running():
    x, net = walk(12, 3), two_levels()
    run = net.run(x)
    for k in range(12):
        now = net.observe(x[:, k])
        for name in ("level1", "level2"):
            torch.testing.assert_close(now.mean[name], run.mean[name][:, k])
    halves = net.run(x[:, 7:], start=net.run(x[:, :7]).last)
    torch.testing.assert_close(halves.mean["level2"], run.mean["level2"][:, 7:])
    assert net.reset().beliefs is None
    assert float(net.observe(0.5).mean["level1"]) > 0


def test_structure_is_edited_while_it_runs():
    x = walk(30)[0]
    net = HGFNetwork().add_input("u").add_continuous("a").value("a", "u")
    for value in x[:10]:
        net.observe(value)
    before = net.beliefs
    with net.edit():
        net.add_continuous("vol", mean=0.5).volatility("vol", "a")
    after = net.observe(x[10])
    assert set(after.mean) == {"u", "a", "vol"}
    again = HGFNetwork().add_input("u").add_continuous("a").add_continuous("vol", mean=0.5).value("a", "u").volatility("vol", "a")
    torch.testing.assert_close(after.mean["vol"], again.run(x[10:11], start=before).mean["vol"][0])
    net.remove("vol")
    assert set(net.observe(x[11]).mean) == {"u", "a"}
    with pytest.raises(BadInput, match="circle"), net.edit():
        net.add_continuous("b").value("a", "b").value("b", "a")
    assert "b" not in net.nodes
    assert len(net.edges) == 1
    assert set(net.observe(x[12]).mean) == {"u", "a"}


def test_structure_adapts_where_a_second_cause_begins():
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(400, generator=g, dtype=DOUBLE)
    x[200:] += torch.randn(200, generator=g, dtype=DOUBLE).cumsum(0)
    net = HGFNetwork().add_input("u", precision=100.0).add_continuous("a", tonic_volatility=-6.0).value("a", "u")

    def second_cause(n):
        n.add_continuous("b", tonic_volatility=0.0).value("b", "u")

    def useless(n):
        n.add_continuous("c", tonic_volatility=-12.0, precision=1e6).value("c", "u")

    fixed = surprise(net.run(x))
    grown, found, kept = adapt_structure(net, x, [useless, second_cause], threshold=2.0, window=20)
    assert kept == [(220, 1)]
    assert set(grown.nodes) == {"u", "a", "b"}
    assert set(net.nodes) == {"u", "a"}
    torch.testing.assert_close(found[:200], fixed[:200])
    assert found[220:].mean() < fixed[220:].mean() - 1


def jax():
    jax = pytest.importorskip("jax")
    pytest.importorskip("pyhgf")
    jax.config.update("jax_enable_x64", True)
    return jax


def test_it_is_pyhgf_in_float64():
    jax()
    from pyhgf.model import Network

    x = torch.stack([walk(30, volatile=0.1)[0], walk(30, seed=1, volatile=0.1)[0]], -1)
    peer = Network()
    peer.add_nodes(precision=50.0).add_nodes(precision=20.0)
    peer.add_nodes(value_children=([0], [1.0]), precision=2.0, tonic_volatility=-2.0)
    peer.add_nodes(value_children=([1], [0.8]), tonic_volatility=-3.0, tonic_drift=0.02)
    settings = {"mean": 0.3, "tonic_volatility": -4.0, "autoconnection_strength": 0.9}
    peer.add_nodes(value_children=([2], [0.3]), coupling_fn=(lambda v: v * v + v,), **settings)
    peer.add_nodes(volatility_children=([2], [0.7]), tonic_volatility=-3.5)
    peer.add_nodes(volatility_children=([2, 3], [0.5, 1.0]), tonic_volatility=-2.5)
    ours = zoo().disconnect("a", "v")
    gaps = np.linspace(0.5, 2.0, 30)
    mask = torch.ones(30, 2, dtype=torch.bool)
    mask[8:12] = False
    mask[20:24, 1] = False
    for options in ({}, {"dt": gaps}, {"mask": mask}):
        ours.like_pyhgf = bool(options)
        peer.input_data(x.numpy(), time_steps=options.get("dt"), observed=mask.numpy().astype(int) if "mask" in options else None)
        run = ours.run(x, **{k: torch.as_tensor(v) for k, v in options.items()})
        for i, name in enumerate("uvabcde"):
            for what in ("mean", "precision", "expected_mean", "expected_precision"):
                if i > 1 or what.startswith("expected"):
                    theirs = np.asarray(peer.node_trajectories[i][what])
                    np.testing.assert_allclose(getattr(run, what)[name], theirs, rtol=1e-10, atol=1e-10, err_msg=f"{name} {what} {options}")


@pytest.mark.parametrize(("levels", "kind", "update"), [(3, "continuous", "standard"), (3, "binary", "ehgf")])
def test_the_usual_hierarchies_are_pyhgfs_and_so_is_their_surprise(levels, kind, update):
    jax()
    from pyhgf.model import HGF as Peer

    coin = (torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    x = 0.2 * walk(40, volatile=0.1)[0] if kind == "continuous" else coin
    means, omegas = (0.0, 0.1, 0.2), (-3.0, -4.0, -8.0)
    named = {"initial_mean": dict(zip("123", means)), "tonic_volatility": dict(zip("123", omegas))}
    peer = Peer(n_levels=levels, model_type=kind, update_type={"ehgf": "eHGF", "standard": "standard"}[update], **named)
    peer.input_data(x.numpy())
    run = HGF(levels, kind, update, mean=means, tonic_volatility=omegas).run(x)
    for i in range(1, levels + (kind == "continuous")):
        name = f"level{i + (kind == 'binary')}"
        np.testing.assert_allclose(run.mean[name], np.asarray(peer.node_trajectories[i]["mean"]), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(run.precision[name], np.asarray(peer.node_trajectories[i]["precision"]), rtol=1e-10)
    np.testing.assert_allclose(surprise(run, noise=False), np.asarray(peer.surprise()).reshape(-1, 40).sum(0), rtol=1e-9)


def test_the_unbounded_update_is_pyhgfs_and_takes_any_surprise():
    for net in (two_levels(update="unbounded"), HGF(3, update="unbounded", input_precision=100.0)):
        run = net.run(JUMP)
        assert all((p > 0).all() for p in run.precision.values())
        assert all(torch.isfinite(m).all() for m in run.mean.values())
        assert run.mean["level2"][-20:].mean() > run.mean["level2"][30:50].mean() + 2
    with pytest.raises(UnsupportedModel, match=r"^e: .*one child"):
        zoo(update="unbounded").run(torch.zeros(3, 2))
    jax()
    from pyhgf.model import HGF as Peer

    x = torch.cat([JUMP, 1e4 * JUMP, 0.1 * walk(40)[0]])
    named = {"initial_mean": {"1": 0.0, "2": 0.1, "3": 0.2}, "tonic_volatility": {"1": -3.0, "2": -2.0, "3": -4.0}}
    peer = Peer(n_levels=3, model_type="continuous", update_type="unbounded", continuous_precision=100.0, **named)
    peer.input_data(x.numpy())
    run = HGF(3, update="unbounded", mean=(0, 0.1, 0.2), tonic_volatility=(-3.0, -2.0, -4.0), input_precision=100.0).run(x)
    for i in (1, 2, 3):
        for what in ("mean", "precision"):
            theirs = np.asarray(peer.node_trajectories[i][what])
            np.testing.assert_allclose(getattr(run, what)[f"level{i}"], theirs, rtol=1e-8, atol=1e-9)


def test_the_learner_finds_the_volatility_that_made_the_series():
    g = torch.Generator().manual_seed(0)
    x = (np.exp(-1.0) * torch.randn(64, 30, generator=g, dtype=DOUBLE)).cumsum(1)
    net = HGFNetwork().add_input("u").add_continuous("a", tonic_volatility=-5.0, precision=1e4).value("a", "u")
    data = TensorData(x, torch.ones(64))
    history = HGFLearner(["a.tonic_volatility"], partial(Adam, lr=0.5)).fit(net, data.batches(64), epochs=35, val=[(x, torch.ones(64))])
    assert float(net.nodes["a"].tonic_volatility) == pytest.approx(-2, abs=0.15)
    assert history.last["loss"] < history.train[0]["loss"]
    assert history.val[-1]["loss"] == pytest.approx(float(surprise(net.run(x)).mean()))
    assert not any(p.requires_grad for p in net.parameters())
    assert float(net.nodes["u"].tonic_volatility) == 0


def test_the_learner_names_what_it_cannot_do():
    x, one = walk(20, 4), torch.ones(4)
    with pytest.raises(UnsupportedModel, match=r"Linear.*HGFNetwork") as refused:
        HGFLearner().fit(nn.Linear(2, 2), [(x, one)], epochs=1)
    assert refused.value.module == "Linear"
    for learner, batch, why in (
        (HGFLearner(["omega"]), (x, one), "no parameter is called 'omega'"),
        (HGFLearner([]), (x, one), "nothing to learn"),
        (HGFLearner(), (x, torch.ones(3)), "mask of the series' shape"),
        (HGFLearner(), (x, 0 * one), "nothing to learn from"),
        (HGFLearner(), (x * torch.nan, one), "not finite"),
    ):
        with pytest.raises(BadInput, match=why):
            learner.fit(two_levels(), [batch], epochs=1)
    with pytest.raises(Diverged, match=r"step 0.*'nodes\.level2'") as raised:
        HGFLearner(optimizer=partial(SGD, lr=0.1)).fit(two_levels(), [(JUMP[None], one[:1])], epochs=1)
    assert (raised.value.step, raised.value.module) == (0, "nodes.level2")


def test_bad_networks_and_series_are_refused():
    x = walk(10)
    net = two_levels()
    for call, why in (
        (lambda: net.run(x * torch.nan), "not finite"),
        (lambda: zoo().run(x), r"inputs \['u', 'v'\]"),
        (lambda: net.run(x, mask=torch.ones(3)), "mask has shape"),
        (lambda: net.run(x, 0.0), "dt must be positive"),
        (lambda: net.run(x, torch.ones(4)), "one a step"),
        (lambda: net.run([1.0]), "tensor"),
        (lambda: net.value("level1", "w"), "no node 'w'"),
        (lambda: net.value("level1", "u"), "connected already"),
        (lambda: net.value("u", "level1"), "no children"),
        (lambda: net.volatility("level2", "u"), "does not walk"),
        (lambda: net.disconnect("level2", "u"), "no edge"),
        (lambda: net.add_continuous("u"), "already"),
        (lambda: net.add_continuous("a.b"), "name"),
        (lambda: net.add_continuous("p", precision=0.0), "positive"),
        (lambda: HGFNetwork().add_input("u").run(x), "no value parent"),
        (lambda: HGFNetwork().run(x), "no input"),
        (lambda: HGFNetwork(update="fast"), "update"),
        (lambda: HGF(4), "levels"),
        (lambda: HGF(2, "binary").run(x), "0 or 1"),
        (lambda: HGFNetwork(impossible="no"), "impossible"),
        (lambda: two_levels().run(JUMP), "'level2' is not positive at step 50"),
    ):
        with pytest.raises(BadInput, match=why):
            call()
    assert net.run(x[:, :0]).mean["level1"].shape == (1, 0)
