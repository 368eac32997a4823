"""How learning rate, momentum and weight decay are coupled, what early losses tell, and what the recipe is worth. MNIST at 14x14.

``grid``: a small MLP at every combination of rates, momenta and decays, all trained at once as one batched network. ``averaged`` is its
sceptic: with momentum as an average of gradients, ``v = m v + (1 - m) g``, the step does not grow with the momentum and the coupling of
rate and momentum should go. ``clue``: cycles at other settings, validation loss at a quarter of the run against accuracy at its end;
``chance`` is the same with the settings' order shuffled. ``cycled`` and ``constant``: the largest stable peak. ``recipe`` and ``random``:
a search each, charged for every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from neurarium import data
from neurarium.experiments.images import images
from neurarium.learn.balance import First, Recipe, balance_search
from neurarium.learn.fit import Diverged, evaluate
from neurarium.learn.schedule import OneCycle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

HIDDEN, BATCH = 48, 64
RATES = tuple(0.003 * 2.5**i for i in range(8))  # .003 to 1.8
DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MOMENTA = (0.8, 0.9, 0.95, 0.975)
LABELS = {"grid": "momentum", "averaged": "averaged gradients"}


@dataclass(frozen=True)
class Settings:
    """One column a network: rate, momentum and decay, at each step where they change."""

    rate: Tensor  # (steps, networks)
    momentum: Tensor  # (steps, networks)
    decay: Tensor  # (networks,)
    averaged: bool = False


def run(trial: Trial) -> None:
    task = images(trial, train=(400, 4000), test=(200, 5000))
    val, train = task.train.split(trial.scale(smoke=100, laptop=1000), seed=trial.seed)
    val, train, test = (flat(part.to(trial.device)) for part in (val, train, task.test))
    steps = trial.scale(smoke=4, laptop=120)
    rates, decays, momenta = trial.scale(smoke=(RATES[::4], DECAYS[::3], MOMENTA[::3]), laptop=(RATES, DECAYS, MOMENTA))

    for arm in trial.arms("grid", "averaged", "clue", "chance", "cycled", "constant", "recipe", "random"):
        if arm.name in LABELS:
            few = decays if arm.name == "grid" else decays[::6]
            mesh = [t.flatten().to(trial.device) for t in torch.meshgrid(*map(torch.tensor, (momenta, few, rates)), indexing="ij")]
            constant = Settings(mesh[2].expand(steps, -1), mesh[0].expand(steps, -1), mesh[1], arm.name == "averaged")
            (found,) = train_all(constant, train, [val], trial.seed, at=(steps,))
            losses = found[0].view(len(momenta), len(few), len(rates)).cpu().numpy()
            best = [lowest(np.log10(rates), losses[m].min(0)) for m in range(len(momenta))]
            arm.log(log_best_lr=best, log_free=np.log10(1 - np.array(momenta)).tolist())
            if arm.name == "grid":
                shown = momenta.index(0.95) if 0.95 in momenta else 0
                usable = [r for r in range(len(rates)) if losses[shown, :, r].min() < 0.9 * np.log(10)] or [0, len(rates) - 1]
                at = [lowest(np.log10(np.maximum(few, 3e-5)), losses[shown, :, r]) for r in usable]
                arm.log(log_lr=np.log10(np.array(rates)[usable]).tolist(), log_best_decay=at)
                arm.grid("loss", np.minimum(losses[shown], 2.3))
        elif arm.name in ("clue", "chance"):
            early, accuracy = trial.shared("clues", lambda: early_and_late(trial, train, val, steps))
            order = np.random.default_rng(trial.seed).permutation(len(early)) if arm.name == "chance" else np.arange(len(early))
            arm.log(early_loss=early[order].tolist(), final_accuracy=accuracy.tolist())
        elif arm.name in ("cycled", "constant"):
            peaks = torch.tensor(np.geomspace(0.05, 20, trial.scale(smoke=4, laptop=40)), dtype=torch.float32, device=trial.device)
            cycle = one_cycle(steps, peaks, (0.95, 0.85) if arm.name == "cycled" else (0.95, 0.95), torch.full_like(peaks, 1e-4))
            (found,) = train_all(cycle, train, [train.take(torch.arange(500 if steps > 10 else 50))], trial.seed, at=(steps,))
            stable = (found[0] < 0.9 * np.log(10)).cpu().numpy()
            broken = np.flatnonzero(~stable)
            last = len(stable) - 1 if not len(broken) else max(int(broken[0]) - 1, 0)
            arm.log(max_lr=float(peaks[last]), log_max_lr=float(peaks[last].log10()))
            arm.curve("loss", x=peaks.log10().tolist(), y=found[0].clamp(max=3).nan_to_num(3).tolist())
        else:
            searched(arm, trial, train, val, test)


def flat(part: data.TensorData) -> data.TensorData:
    return data.TensorData((part.x.flatten(1) - 0.13) / 0.3, part.y)


def train_all(
    settings: Settings, train: data.TensorData, watch: list[data.TensorData], seed: int, at: tuple[int, ...]
) -> list[list[Tensor]]:
    """Train one MLP a column of ``settings``, all from one start on the same batches; their losses on ``watch`` after ``at`` steps.

    ``train_all(...)[k][j]``: watch j after at[k] steps; a loss that is not finite is inf.
    """
    n, device = settings.decay.numel(), train.x.device
    torch.manual_seed(seed)
    start = nn.Sequential(nn.Linear(train.x.shape[1], HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 10)).to(device)
    weights = [w for layer in start for w in (layer.weight.detach().T.repeat(n, 1, 1), layer.bias.detach().repeat(n, 1, 1))]
    weights = [w.contiguous().requires_grad_() for w in weights]
    velocity = [torch.zeros_like(w) for w in weights]

    def outputs(x: Tensor) -> Tensor:
        h = torch.relu(torch.matmul(x, weights[0]) + weights[1])
        h = torch.relu(torch.baddbmm(weights[3], h, weights[2]))
        return torch.baddbmm(weights[5], h, weights[4])  # (networks, batch, classes)

    def losses(part: data.TensorData) -> Tensor:
        each = F.cross_entropy(outputs(part.x).transpose(1, 2), part.y.expand(n, -1), reduction="none").mean(1)
        return each

    column = partial(torch.reshape, shape=(n, 1, 1))
    found = []
    for step, (x, y) in enumerate(First(train.batches(BATCH, seed=seed), len(settings.rate))):
        grads = torch.autograd.grad(losses(data.TensorData(x, y)).sum(), weights)
        with torch.no_grad():
            m, rate, decay = column(settings.momentum[step]), column(settings.rate[step]), column(settings.decay)
            for w, v, g in zip(weights, velocity, grads):
                v.mul_(m).add_((g + decay * w) * ((1 - m) if settings.averaged else 1))
                w.sub_(rate * v)
            if step + 1 in at:
                found.append([torch.nan_to_num(losses(part), nan=torch.inf, posinf=torch.inf) for part in watch])
                found[-1] += [(outputs(part.x).argmax(2) == part.y).float().mean(1) for part in watch]
    return found


def one_cycle(steps: int, peaks: Tensor, momentum: tuple[float, float], decay: Tensor) -> Settings:
    """The library's cycle, written out for all columns."""
    cycle = OneCycle(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1.0, steps)
    share, low = (torch.tensor(v, device=peaks.device, dtype=peaks.dtype) for v in zip(*(cycle.at(i) for i in range(steps))))
    high, deep = (torch.as_tensor(m, device=peaks.device) for m in momentum)
    return Settings(share[:, None] * peaks, (high + (deep - high) * low[:, None]).expand(steps, len(peaks)), decay)


def early_and_late(trial: Trial, train: data.TensorData, val: data.TensorData, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation loss after a quarter of a cycle and accuracy after all of it, for 24 settings drawn at random."""
    rng = np.random.default_rng([trial.seed, 7])
    count = 24
    peaks = torch.tensor(10 ** rng.uniform(-2, 0.3, count), dtype=torch.float32, device=trial.device)
    decay = torch.tensor(10 ** rng.uniform(-5, -1.5, count), dtype=torch.float32, device=trial.device)
    low = torch.tensor(rng.uniform(0.7, 0.95, count), dtype=torch.float32, device=trial.device)
    settings = one_cycle(steps, peaks, (0.95, low), decay)
    quarter, end = train_all(settings, train, [val], trial.seed, at=(max(steps // 4, 1), steps))
    return quarter[0].clamp(max=10).cpu().numpy(), end[1].cpu().numpy()


def searched(arm, trial: Trial, train: data.TensorData, val: data.TensorData, test: data.TensorData) -> None:
    """A search of so many steps, by the recipe or at random, then a final run of its best settings."""
    final, short, sweep = trial.scale(smoke=(6, 4, 6), laptop=(240, 60, 60))

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(196, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
        ).to(trial.device)

    def search() -> Recipe:
        found = balance_search(
            make, train.batches(BATCH, seed=trial.seed), watched, steps=short, optimizer=partial(SGD, momentum=0.9), seed=trial.seed,
            range_steps=sweep, decays=(1e-2, 1e-3, 1e-4, 0.0),
        )  # fmt: skip
        return found

    watched = val.batches(1000, shuffle=False)
    if arm.name == "recipe":
        recipe = search()
        spent = recipe.steps
    else:
        rng, best, spent = np.random.default_rng([trial.seed, 11]), np.inf, 0
        budget = int(trial.metric("recipe", "search_steps"))
        while spent < budget:
            lr, high, decay = 10 ** rng.uniform(-3, 0.5), 1 - 10 ** rng.uniform(-2, -1), 10 ** rng.uniform(-5, -2)
            candidate, model = Recipe(lr, (high, high), decay, 0, (), None, partial(SGD, momentum=0.9)), make()
            spent += short
            try:
                candidate.learner(short).fit(model, First(train.batches(BATCH, seed=trial.seed), short), epochs=1, seed=trial.seed)
                loss = evaluate(model, watched)["loss"]
            except Diverged:
                continue
            if loss < best:
                best, recipe = loss, candidate
    torch.manual_seed(trial.seed)
    model = make()
    recipe.learner(final).fit(model, First(train.batches(BATCH, seed=trial.seed), final), epochs=1, seed=trial.seed)
    arm.log(accuracy=evaluate(model, test.batches(1000, shuffle=False))["accuracy"], search_steps=spent)
    arm.log(lr=recipe.max_lr, momentum=recipe.momentum[0], weight_decay=recipe.weight_decay)


def lowest(x: np.ndarray, y: np.ndarray) -> float:
    """Where ``y`` is lowest, refined by the parabola through its neighbours; ``x`` may be unevenly spaced."""
    y = np.where(np.isfinite(y), y, 10.0)
    i = int(np.argmin(y))
    if not 0 < i < len(x) - 1:
        return float(x[i])
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], np.log(y[i - 1 : i + 2]), 2)
    return float(np.clip(x[i] - b / (2 * a), x[i - 1], x[i + 1])) if a > 0 else float(x[i])


def figure(record: RecordView, fig: Figure) -> None:
    """Loss over rate and decay, best rate by momentum, early loss against final accuracy, loss by peak."""
    fig.set_size_inches(11, 7.5)
    fig.set_layout_engine("constrained")
    (heat, coupled), (clue, peak) = fig.subplots(2, 2)
    grids = record.grids("grid", "loss") if "grid" in record.arms else []
    if grids:
        picture = heat.imshow(np.mean(grids, 0), aspect="auto", cmap="viridis", origin="lower")
        fig.colorbar(picture, ax=heat, label="validation loss (cut at 2.3)")
        whole = grids[0].shape == (len(DECAYS), len(RATES))
        rates, decays = (RATES, DECAYS) if whole else (RATES[::4], DECAYS[::3])
        heat.set_xticks(range(len(rates)), [f"{r:.2g}" for r in rates])
        heat.set_yticks(range(len(decays)), [f"{d:g}" for d in decays])
        heat.set(xlabel="learning rate", ylabel="weight decay", title="momentum 0.95" if whole else "momentum 0.8")
        heat.plot(np.arange(len(rates)), np.argmin(np.mean(grids, 0), 0), "o", mfc="none", mec="w", label="best decay")
        heat.legend(fontsize=7, loc="upper left")
    for arm, colour in (("grid", "#0072B2"), ("averaged", "#D55E00")):
        if arm in record.arms:
            x, y = record.mean(arm, "log_free"), record.values(arm, "log_best_lr")
            slope = np.polyfit(x, y.mean(0), 1)[0]
            coupled.errorbar(x, y.mean(0), y.std(0), fmt="o-", capsize=3, color=colour, label=f"{LABELS[arm]}: slope {slope:.2f}")
    coupled.set(xlabel="log10(1 - momentum)", ylabel="log10 best learning rate", title="the rate that momentum asks for (theory: slope 1)")
    coupled.legend(fontsize=8)
    if "clue" in record.arms:
        x, y = record.values("clue", "early_loss"), 100 * record.values("clue", "final_accuracy")
        for row, marker in zip(range(len(x)), "os^Dv*<>"):
            clue.plot(x[row], y[row], marker, mfc="none", color="#009E73", alpha=0.7, ls="none")
        clue.set(xscale="log", xlabel="validation loss after a quarter of the cycle", ylabel="final validation accuracy (%)")
        clue.set(title="24 settings a seed: an early look", ylim=(max(np.quantile(y, 0.02) - 2, 0), 100))
    for arm, colour, label in (("cycled", "#0072B2", "momentum .95 to .85 to .95"), ("constant", "#D55E00", "momentum .95")):
        if arm in record.arms:
            for i, (x, y) in enumerate(record.curves(arm, "loss")):
                peak.plot(10 ** np.asarray(x), y, color=colour, alpha=0.7, label=label if not i else None)
    peak.set(xscale="log", xlabel="peak learning rate of the cycle", ylabel="training loss at the end (cut at 3)")
    peak.set(title="how high may the peak be?")
    peak.legend(fontsize=8)
