"""Belief networks: do volatility beliefs pay, does structure, are the numbers pyhgf's, and what does a batch of series cost?

Parameters of every filter are fitted on training series, those of belief networks by gradients through the filter; what is compared are
the log-likelihoods of single observations of held-out series.
"""

from __future__ import annotations

import importlib.util
import math
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam

from neurarium import data
from neurarium.data import TensorData
from neurarium.errors import MissingData
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.predictive import HGF, HGFLearner, HGFNetwork, adapt_structure, surprise
from neurarium.learn.predictive_coding import PredictiveCoding, PredictiveCodingMLP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

DOUBLE = torch.float64
#: pyhgf 0.2.12, two levels, eHGF, on this input (tonic volatilities -3 and -2, input precision 100): means and precisions of both levels
INPUT = (0.2, 0.5, 0.1, -0.3, 1.2, 1.0)
PYHGF = {
    "level1": (
        (0.198113, 0.455885, 0.147636, -0.250632, 1.081343, 1.000120),
        (100.952574, 117.114101, 115.453953, 112.395786, 108.908367, 100.147383),
    ),
    "level2": (
        (-0.025662, 0.120622, 0.369065, 0.730433, 4.913364, 4.782332),
        (0.902380, 1.226767, 1.621246, 2.105211, 7.829279, 3.803293),
    ),
}
LABELS = {"hgf2": "volatility coupling", "flat": "none (Kalman)", "ewma": "EWMA variance"}


def run(trial: Trial) -> None:
    series, steps, fits = trial.scale(smoke=(4, 30, 2), laptop=(48, 150, 14))
    # each set: (training series, longer held-out series)
    generated = volatile_walks(2 * series, 2 * steps, trial.seed)
    sets = {"generator": (generated[:series, :steps], generated[series:])}
    sets["real"] = temperatures(trial, series, steps)
    outcomes = reversals(2 * series, steps, trial.seed)

    for arm in trial.arms("hgf2", "flat", "ewma", "hgf3", "rescorla_wagner", "structural", "fixed", "ours", "peer", "pc", "bp"):
        if arm.name in ("hgf2", "flat"):
            for name, (train, test) in sets.items():
                net = HGF(2 if arm.name == "hgf2" else 1, update="unbounded", tonic_volatility=(-2.0, -3.0, 0.0))
                wanted = ["level1.tonic_volatility", "u.log_precision"] + ["level2.tonic_volatility"] * (arm.name == "hgf2")
                fit(net, wanted, train, fits if arm.name == "hgf2" else 4 * fits)  # a Kalman filter's steps are cheap
                found = net.run(test)
                arm.log(**{f"loglik_{name}": -float(surprise(found).mean())})
                if name == "generator":
                    arm.curve("input", y=test[0])
                    arm.curve("deviation", y=(0.5 * (1 / found.expected_precision["level1"][0]).log()).exp())
        elif arm.name == "ewma":
            for name, (train, test) in sets.items():
                arm.log(**{f"loglik_{name}": ewma(train, test)})
        elif arm.name == "hgf3":
            net = HGF(3, "binary", update="unbounded", tonic_volatility=(0.0, -2.0, -4.0))
            fit(net, ["tonic_volatility"], outcomes[:series], fits)
            found = net.run(outcomes[series:])
            arm.log(surprise=float(surprise(found).mean()))
            arm.curve("belief", y=found.expected_mean["u"][0])
            arm.curve("outcome", y=outcomes[series])
        elif arm.name == "rescorla_wagner":
            rates = torch.logspace(-2.5, -0.05, 60, dtype=DOUBLE)
            best = rates[rescorla_wagner(outcomes[:series], rates)[0].argmin()]
            nats, belief = rescorla_wagner(outcomes[series:], best[None])
            arm.log(surprise=float(nats[0]), rate=float(best))
            arm.curve("belief", y=belief[0, 0])
        elif arm.name in ("structural", "fixed"):
            streams = two_causes(trial.scale(smoke=1, laptop=8), 2 * steps, trial.seed)
            edits = [second_cause, volatile_cause] if arm.name == "structural" else []
            after, edited = [], 0
            for x in streams:
                net = HGF(1, update="unbounded", tonic_volatility=(-6.0,), input_precision=100.0)
                _, nats, kept = adapt_structure(net, x, edits, threshold=1.0, window=20)
                after.append(-float(nats[steps:].mean()))
                edited += len(kept)
            arm.log(loglik_after=float(np.mean(after)), edits=edited / len(streams))
            arm.curve("surprise", y=nats)
        elif arm.name in ("ours", "peer"):
            x = volatile_walks(*trial.scale(smoke=(8, 20), laptop=(256, 1000)), trial.seed)
            settings = {"tonic_volatility": (-3.0, -3.0, 0.0), "input_precision": 100.0, "impossible": "keep"}
            if arm.name == "ours":
                with torch.no_grad():
                    HGF(**settings).run(x[:, :3])
                    began = time.perf_counter()
                    HGF(**settings).run(x, strict=False)  # some walks leave the range of the approximation; the peer goes on, too
                arm.log_timed(run_seconds=time.perf_counter() - began)
                arm.log(gap=published_gap())
            else:
                arm.log_timed(run_seconds=peer_seconds(trial, x))
        else:
            task = data.images("digits", train=trial.scale(smoke=128, laptop=1200), seed=trial.seed)
            rule = {"pc": PredictiveCoding(8, True, optimizer=partial(Adam, lr=3e-3)), "bp": Backprop(optimizer=partial(Adam, lr=3e-3))}
            model = PredictiveCodingMLP((64, 64, 32, 10))
            rule[arm.name].fit(model, task.train.batches(64, seed=trial.seed), epochs=trial.scale(smoke=1, laptop=10), seed=trial.seed)
            arm.log(accuracy=evaluate(model, task.test.batches(1000, shuffle=False))["accuracy"])


def fit(net: HGFNetwork, parameters: list[str], train: Tensor, epochs: int) -> None:
    one = TensorData(train, torch.ones(len(train))).batches(len(train))
    HGFLearner(parameters, partial(Adam, lr=0.3)).fit(net, one, epochs=epochs)


def volatile_walks(n: int, steps: int, seed: int) -> Tensor:
    """Random walks whose log-variance is a random walk of its own, with a little observation noise."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, n, steps, generator=g, dtype=DOUBLE)
    level = (0.15 * noise[0]).cumsum(1) - 3
    return ((level / 2).exp() * noise[1]).cumsum(1) + 0.05 * noise[2]


def temperatures(trial: Trial, series: int, steps: int) -> tuple[Tensor, Tensor]:
    """Pieces of the hourly oil temperature of ETTh1, each from 0, in units of its training deviation; held-out pieces lie later."""
    try:
        task = data.series("etth1")
        values = task.values[:, task.columns.index("OT")].double()
    except MissingData:
        trial.stand_in("a generated walk in the place of the transformer temperatures, which are not here")
        values = volatile_walks(1, 17_000, 5)[0]
    half = len(values) // 2
    unit = values[:half].diff().std()
    g = torch.Generator().manual_seed(100 + trial.seed)
    pieces = []
    for first, last, length in ((0, half - steps, steps), (half, len(values) - 2 * steps, 2 * steps)):
        at = first + (torch.rand(series, generator=g) * (last - first)).long()
        piece = torch.stack([values[i : i + length] for i in at.tolist()])
        pieces.append((piece - piece[:, :1]) / unit)
    return pieces[0], pieces[1]


def reversals(n: int, steps: int, seed: int) -> Tensor:
    """Outcomes of a bandit whose probability is stable, then reverses often, then is stable again."""
    g = torch.Generator().manual_seed(200 + seed)
    third, often = steps // 3, max(4, steps // 14)
    high = torch.ones(n, steps, dtype=DOUBLE)
    for k in range(third, 2 * third):
        high[:, k] = float(((k - third) // often) % 2)
    flip = torch.rand(n, 1, generator=g, dtype=DOUBLE) < 0.5
    high = torch.where(flip, 1 - high, high)
    return (torch.rand(n, steps, generator=g, dtype=DOUBLE) < 0.15 + 0.7 * high).double()


def rescorla_wagner(outcomes: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Mean surprise for every rate, and the beliefs (rates, series, time)."""
    p = torch.full((len(rates), len(outcomes)), 0.5, dtype=DOUBLE)
    beliefs = []
    for u in outcomes.unbind(1):
        beliefs.append(p)
        p = p + rates[:, None] * (u - p)
    belief = torch.stack(beliefs, -1).clamp(1e-6, 1 - 1e-6)
    nats = -(outcomes * belief.log() + (1 - outcomes) * (-belief).log1p())
    return nats.mean((1, 2)), belief


def ewma(train: Tensor, test: Tensor) -> float:
    """Log-likelihood of exponentially weighted mean and variance, both rates chosen on the training series."""
    grid = torch.cartesian_prod(torch.tensor([0.5, 0.7, 0.85, 0.95, 1.0]), torch.tensor([0.01, 0.02, 0.04, 0.08, 0.15, 0.3])).double()

    def nats(x: Tensor, settings: Tensor) -> Tensor:
        level, rate = settings[:, :1], settings[:, 1:]
        mean, variance = x.new_zeros(len(settings), len(x)), x.diff(dim=1).var().expand(len(settings), len(x))
        total = 0.0
        for u in x.unbind(1):
            total = total + 0.5 * (math.log(2 * math.pi) + variance.log() + (u - mean) ** 2 / variance)
            variance = (1 - rate) * variance + rate * (u - mean) ** 2 + 1e-6
            mean = mean + level * (u - mean)
        return total.mean(1) / x.shape[1]

    best = grid[nats(train, grid).argmin()]
    return -float(nats(test, best[None])[0])


def two_causes(n: int, steps: int, seed: int) -> Tensor:
    """A slow cause throughout, and a second, faster one from the middle on."""
    g = torch.Generator().manual_seed(300 + seed)
    noise = torch.randn(3, n, steps, generator=g, dtype=DOUBLE)
    fast = 0.5 * noise[1]
    fast[:, : steps // 2] = 0
    return (0.05 * noise[0]).cumsum(1) + fast.cumsum(1) + 0.1 * noise[2]


def second_cause(net: HGFNetwork) -> None:
    net.add_continuous("b", tonic_volatility=-1.5).value("b", "u")


def volatile_cause(net: HGFNetwork) -> None:
    net.add_continuous("volatility", tonic_volatility=-2.0).volatility("volatility", "level1")


def published_gap() -> float:
    found = HGF(tonic_volatility=(-3.0, -2.0, 0.0), input_precision=100.0).run(torch.tensor(INPUT, dtype=DOUBLE))
    gaps = []
    for name, (mean, precision) in PYHGF.items():
        gaps.append((found.mean[name] - torch.tensor(mean, dtype=DOUBLE)).abs().max())
        gaps.append((found.precision[name] - torch.tensor(precision, dtype=DOUBLE)).abs().max())
    return float(torch.stack(gaps).max())


def peer_seconds(trial: Trial, x: Tensor) -> float:
    """pyhgf over the series one after another, compiled before; a filter in plain Python where it is not installed."""
    if not trial.scale(smoke=False, laptop=importlib.util.find_spec("pyhgf") is not None):  # compiling takes longer than a smoke test
        trial.stand_in("the same filter, one series after another on plain numbers, in the place of pyhgf")
        began = time.perf_counter()
        for row in x.tolist():
            plain_filter(row)
        return time.perf_counter() - began
    from pyhgf.model import HGF as Peer

    net = Peer(
        n_levels=2, model_type="continuous", tonic_volatility={"1": -3.0, "2": -3.0}, continuous_precision=100.0,
        initial_mean={"1": 0.0, "2": 0.0}, initial_precision={"1": 1.0, "2": 1.0}, volatility_coupling={"1": 1.0},
    )  # fmt: skip
    rows = x.float().numpy()
    net.input_data(rows[0])
    began = time.perf_counter()
    for row in rows:
        net.input_data(row)
    np.asarray(net.node_trajectories[1]["mean"])
    return time.perf_counter() - began


def plain_filter(row: list[float]) -> tuple[float, float]:
    m1, p1, m2, p2 = 0.0, 1.0, 0.0, 1.0
    for u in row:
        q2 = 1 / (1 / p2 + math.exp(-3.0))
        omega = math.exp(min(-3.0 + m2, 50.0))
        q1 = 1 / (1 / p1 + omega)
        gamma, p1 = omega * q1, q1 + 100.0
        delta = 100.0 * (u - m1) / p1
        m1 += delta
        push = q1 / p1 + q1 * delta * delta - 1
        m2 += gamma * push / (2 * q2)
        p2 = q2 + gamma * gamma * (0.5 + push) - 0.5 * gamma * push
        p2 = p2 if p2 > 0 else q2
    return m1, m2


def figure(record: RecordView, fig: Figure) -> None:
    """A tracked series with its believed deviation, the likelihoods, beliefs about a reversing coin, surprise with and without edits."""
    fig.set_size_inches(11, 6.4)
    fig.set_layout_engine("constrained")
    (track, bars), (coin, structure) = fig.subplots(2, 2)
    x, y = (np.asarray(v) for v in record.curves("hgf2", "input")[0])
    track.plot(x, y, color="k", lw=0.9, label="input")
    twin = track.twinx()
    for arm, colour in (("hgf2", "#D55E00"), ("flat", "#0072B2")):
        twin.plot(*record.curves(arm, "deviation")[0], color=colour, lw=1.3, label=f"deviation, {LABELS[arm]}")
    twin.set_ylabel("predicted deviation of the level")
    track.set(xlabel="step", ylabel="input", title="A random walk whose volatility walks (held out, fitted parameters)")
    handles = [*track.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
    track.legend(handles, [h.get_label() for h in handles], fontsize=7, loc="upper left")

    width, places = 0.25, np.arange(2)
    for i, (arm, colour) in enumerate(zip(LABELS, ("#D55E00", "#0072B2", "#999999"))):
        gains = [record.values(arm, f"loglik_{s}") - record.values("flat", f"loglik_{s}") for s in ("generator", "real")]
        bars.bar(places + (i - 1) * width, [g.mean() for g in gains], width, yerr=[g.std() for g in gains], capsize=3, color=colour)
        bars.patches[-1].set_label(LABELS[arm])
    bars.axhline(0, color="k", lw=0.6)
    bars.set_xticks(places, ["generated walks", "transformer temperature"])
    bars.set(ylabel="log-likelihood a step, above Kalman (nats)", title="Held-out predictions (mean and deviation over seeds)")
    bars.legend(fontsize=7)

    x, y = (np.asarray(v) for v in record.curves("hgf3", "outcome")[0])
    coin.plot(x, 1.06 * y - 0.03, ".", color="k", ms=2)
    for arm, colour, label in (("hgf3", "#D55E00", "HGF, 3 levels"), ("rescorla_wagner", "#0072B2", "Rescorla-Wagner")):
        nats = record.mean(arm, "surprise")
        coin.plot(*record.curves(arm, "belief")[0], color=colour, lw=1.2, label=f"{label}: {nats:.3f} nats an outcome")
    coin.set(xlabel="trial", ylabel="believed probability", title="Stable, reversing, stable")
    coin.legend(fontsize=7, loc="lower left")

    for arm, colour, label in (("fixed", "#0072B2", "fixed structure"), ("structural", "#D55E00", "may add a parent")):
        x, y = (np.asarray(v) for v in record.curves(arm, "surprise")[0])
        smooth = np.convolve(y, np.ones(10) / 10, mode="valid")
        structure.plot(x[9:], smooth, color=colour, lw=1.2, label=label)
    structure.axvline(len(y) // 2, color="k", ls=":", lw=0.9)
    structure.set(yscale="symlog", xlabel="step", ylabel="surprise, mean of 10 (nats)", title="A second cause begins at the dotted line")
    structure.legend(fontsize=7)
