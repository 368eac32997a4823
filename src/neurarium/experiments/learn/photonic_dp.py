"""Private direct feedback alignment, digital and optical, against noisy backpropagation and DP-SGD on MNIST at 14x14.

Every rule is run with two or three learning rates and judged at the one that is best on a validation part, which counts as public (the
ranges are those in which pilots found their best). ``bp_noisy`` and ``dfa_noisy`` carry noise of the same power, relative to the signal,
on what each block is taught with. The label attack knows everything but one label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import beta
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from neurarium import data
from neurarium.experiments.images import images
from neurarium.learn.chain import as_chain
from neurarium.learn.feedback import DFA
from neurarium.learn.fit import Backprop, evaluate
from neurarium.learn.local import gradient_alignment
from neurarium.learn.photonic import OPU
from neurarium.learn.private_feedback import DPSGD, PrivateDFA, epsilon

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BATCH, DELTA = 64, 1e-5
MIDDLE, LARGE, SMALL = (0.03, 0.1, 0.3), (0.1, 0.3, 1.0), (0.003, 0.01, 0.03)
RATES = {"private": LARGE, "private_optical": LARGE, "private_s03": LARGE, "private_s1": SMALL, "bp_noisy": SMALL, "dfa_noisy": SMALL,
         "dpsgd_s03": MIDDLE[1:], "dpsgd_s1": MIDDLE[:2], "private_unclipped": MIDDLE[:2]}  # fmt: skip
RATIO = 2.0  # noise over signal, in amplitude, of the noisy twins
AUDITED = (3.0, 10.0, 30.0)  # sigmas at which epsilon is small enough for an attack to be told from it


@dataclass(frozen=True, kw_only=True)
class NoisyDFA(DFA):
    def signals(self, feedback, e, widths):
        return [noisy(s) for s in super().signals(feedback, e, widths)]


@dataclass(frozen=True, kw_only=True)
class NoisyBackprop(Backprop):
    """Noise on the error of each block's output, which travels on to the blocks below."""

    def gradients(self, model, x, y):
        h = x
        for i, layer in enumerate(model):
            h = layer(h)
            if isinstance(layer, nn.Tanh) or i == len(model) - 1:
                h.register_hook(noisy)
        loss = F.cross_entropy(h, y)
        loss.backward()
        return loss, h


def noisy(signal: torch.Tensor) -> torch.Tensor:
    return signal + RATIO * signal.square().mean().sqrt() * torch.randn_like(signal)


UNCLIPPED = {"feedback_clip": inf, "error_clip": inf, "activation_clip": inf, "activation_offset": 0.0}
RULES = {
    "bp": Backprop(), "bp_noisy": NoisyBackprop(), "dfa": DFA(), "dfa_noisy": NoisyDFA(),
    "private": PrivateDFA(sigma=0.1),
    "private_optical": PrivateDFA(sigma=0.1, ternary=0.15, projector=partial(OPU, noise=0.0, saturation=3.0)),
    "private_unclipped": PrivateDFA(sigma=0.1, **UNCLIPPED),
    "private_s03": PrivateDFA(sigma=0.3), "private_s1": PrivateDFA(sigma=1.0),
    "dpsgd_s03": DPSGD(sigma=0.3 / 2**0.5), "dpsgd_s1": DPSGD(sigma=1 / 2**0.5),  # the same epsilon as the two above
}  # fmt: skip


def run(trial: Trial) -> None:
    task = images(trial, train=(256, 4000), test=(200, None))
    test = task.test.to(trial.device).batches(1000, shuffle=False)
    val, train = task.train.to(trial.device).split(len(task.train) // 5, seed=trial.seed)
    batches, watched = train.batches(BATCH, seed=trial.seed), train[:256]
    epochs, width = trial.scale(smoke=(1, 16), laptop=(7, 128))

    for arm in trial.arms(*RULES):
        rates = RATES.get(arm.name, MIDDLE)
        runs = []
        for rate in trial.scale(smoke=rates[-1:], laptop=rates):
            rule = replace(RULES[arm.name], optimizer=partial(SGD, lr=rate, momentum=0.9))
            torch.manual_seed(trial.seed)
            model, audit = mlp(width, train), Audit(rule, train, trial.seed)
            watch = [audit] if isinstance(rule, PrivateDFA) else []
            history = rule.fit(model, batches, epochs=epochs, seed=trial.seed, callbacks=watch)
            runs.append((evaluate(model, val.batches(1000, shuffle=False))["accuracy"], rate, rule, model, audit, history))
        _, rate, rule, model, audit, history = max(runs, key=lambda r: r[0])
        arm.log(accuracy=evaluate(model, test)["accuracy"], rate=rate, images=len(train), width=width)
        if isinstance(rule, DFA):
            found = gradient_alignment(rule, model, watched, seed=trial.seed)
            arm.log(alignment=[v for n, v in found.items() if n.endswith("weight")][:-1])
        if isinstance(rule, (PrivateDFA, DPSGD)):
            spent = partial(epsilon, n=len(train), batch=BATCH, steps=history.steps, delta=DELTA)
            promised = rule if arm.name != "private_unclipped" else replace(rule, feedback_clip=1.0, error_clip=1.0)
            arm.log(epsilon=spent(promised).epsilon)
            if isinstance(rule, PrivateDFA):
                arm.log(epsilon_published=spent(promised, layers=3, analysis="published").epsilon, clipped=audit.clipped(model))
                arm.log(epsilon_label=[spent(replace(promised, sigma=s)).epsilon for s in AUDITED])
                arm.log(epsilon_lower=[audit.attack(s, draws=trial.scale(smoke=2000, laptop=100_000)) for s in AUDITED])


class Audit:
    """Notes, epoch by epoch, how far apart training sees one sample under two labels; then plays the attacker who must tell them apart."""

    def __init__(self, rule, train: data.TensorData, seed: int) -> None:
        self.rule, self.seed, self.gaps = rule, seed, []
        self.x, y = train.x[:64], train.y[:64]
        self.labels = y, (y + 1) % 10

    def released(self, model: nn.Module, label: torch.Tensor, sigma: float = 0.0) -> torch.Tensor:
        """Clean releases (samples, values) of this model."""
        chain = as_chain(model, self.x)
        feedback = self.rule.projector(10, sum(chain.widths[:-1]), seed=self.seed).to(self.x.device)
        with torch.no_grad():
            e = model(self.x).softmax(1) - F.one_hot(label, 10)
            return torch.cat(replace(self.rule, sigma=sigma).signals(feedback, e, chain.widths[:-1]), 1)

    def __call__(self, progress) -> None:
        gap = self.released(progress.model, self.labels[0]) - self.released(progress.model, self.labels[1])
        self.gaps.append(gap.square().sum(1))

    def clipped(self, model: nn.Module) -> float:
        """Share of samples whose feedback the clip shortened."""
        norms = self.released(model, self.labels[0])[:, :-10].norm(dim=1)
        return float((norms > 0.999 * self.rule.feedback_clip).float().mean())

    def attack(self, sigma: float, draws: int) -> float:
        """Largest epsilon that the true and false positives of the likelihood-ratio test prove, each bound at 99.9 %.

        The log-likelihood ratio of all releases is Gaussian with mean +-d/2 and variance d, d the sum of squared gaps over sigma^2. The
        sample that is easiest to attack is taken.
        """
        d = float(torch.stack(self.gaps).sum(0).max()) / sigma**2
        ratio = d**0.5 * torch.randn(2, draws) + torch.tensor([[d / 2], [-d / 2]])
        thresholds = ratio[0].quantile(torch.linspace(0.01, 0.99, 50))
        hits, false = ((r[:, None] > thresholds).sum(0).numpy() for r in ratio)
        true_rate, false_rate = beta.ppf(1e-3, hits, draws - hits + 1), beta.ppf(1 - 1e-3, false + 1, draws - false)
        return float(np.log(np.maximum(true_rate - DELTA, 1e-12) / false_rate).clip(0).max())


def mlp(width: int, train: data.TensorData) -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(196, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).to(train.x.device)


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy against privacy; what noise costs each rule; what an attack proves against what was promised."""
    fig.set_size_inches(12, 4.4)
    fig.set_layout_engine("constrained")
    privacy, noise, attack = fig.subplots(1, 3)
    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#666666"

    def points(ax, arms, label, colour, marker):
        arms = [a for a in arms if a in record.arms]
        x = [record.mean(a, "epsilon") for a in arms]
        y = [100 * record.values(a, "accuracy") for a in arms]
        ax.errorbar(x, [v.mean() for v in y], yerr=[v.std() for v in y], fmt=marker, capsize=3, color=colour, label=label)

    points(privacy, ("private_s1", "private_s03", "private"), "private feedback", blue, "o-")
    points(privacy, ("private_optical",), "private feedback, optical", orange, "D")
    points(privacy, ("dpsgd_s1", "dpsgd_s03"), "DP-SGD", green, "s-")
    for a, label, style in (("dfa", "feedback alignment, no privacy", "--"), ("bp", "backpropagation, no privacy", ":")):
        if a in record.arms:
            privacy.axhline(100 * record.mean(a, "accuracy"), color=grey, ls=style, label=label)
    privacy.set(xscale="log", xlabel="epsilon of a label (delta = 1e-5)", ylabel="test accuracy (%)")
    privacy.set_title("what a smaller epsilon costs", fontsize=10)
    privacy.legend(fontsize=7)

    pairs = (("bp", "bp_noisy", "backpropagation"), ("dfa", "dfa_noisy", "feedback\nalignment"))
    for k, (clean, spoiled, _) in enumerate(pairs):
        for shift, a, colour, name in ((-0.2, clean, grey, "clean"), (0.2, spoiled, orange, "noisy")):
            if a in record.arms:
                v = 100 * record.values(a, "accuracy")
                noise.bar(k + shift, v.mean(), 0.38, yerr=v.std(), capsize=3, color=colour, label=None if k else name)
    noise.set_xticks(range(len(pairs)), [p[2] for p in pairs])
    noise.set(ylabel="test accuracy (%)", ylim=(0, 100))
    noise.set_title(f"errors with noise of {RATIO:g} times their size", fontsize=10)
    noise.legend(fontsize=8)

    top = 1.0
    for a, label, colour, marker in (("private", "clipped", blue, "o"), ("private_unclipped", "clips left out", orange, "D")):
        if a in record.arms:
            x, y = record.values(a, "epsilon_label").mean(0), record.values(a, "epsilon_lower").mean(0)
            attack.plot(x, y, marker + "-", color=colour, label=label)
            top = max(top, *x, *y)
    line = np.array([0.05, 2 * top])
    attack.plot(line, line, color=grey, lw=1)
    attack.fill_between(line, line, 2 * top, color=orange, alpha=0.08)
    attack.text(0.07, top, "promise broken", fontsize=8, color=orange)
    attack.set(xscale="log", yscale="log", xlabel="epsilon promised", ylabel="epsilon proved by an attack on a label", xlim=(0.05, 2 * top))
    attack.set_ylim(0.05, 2 * top)
    attack.legend(fontsize=8, loc="lower right")
    count = int(max(record.mean(a, "images") for a in record.arms))
    fig.suptitle(f"Feedback alignment under differential privacy of labels: MNIST 14x14, {count} images")
