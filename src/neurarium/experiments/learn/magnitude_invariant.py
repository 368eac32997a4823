"""Denoising MNIST (14x14) by a small convolutional network whose weights are generated from the noise level.

The condition is the standard deviation of the noise, uniform in [0, 1], one a batch. The two parts of the parametrisation are measured
alone and together; other arms give the plain hypernetwork a normalised target, or conditions in [-1, 1]. Every arm runs at the same
learning rates and keeps the one with the smallest error on validation images; errors are means over four noise levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from neurarium.experiments.images import images
from neurarium.learn.hyper import HyperNetwork
from neurarium.learn.hyper_probes import magnitude_probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

RATES, SGD_RATES, BATCH, EVERY = (3e-4, 1e-3, 3e-3), (1e-4, 1e-3), 16, 20
LEVELS = (0.02, 0.2, 0.5, 0.9)
ENCODING, RESIDUAL = {"encoding": "cos_sin"}, {"residual": True, "delta_scale": 0.1}
ARMS = {
    "default": {}, "encoding": ENCODING, "residual": RESIDUAL, "mip": ENCODING | RESIDUAL,
    "norm": {}, "centred": {}, "sgd_default": {}, "sgd_mip": ENCODING | RESIDUAL,
}  # fmt: skip
LABELS = {
    "default": "plain", "encoding": "encoding only", "residual": "residual only", "mip": "both (MIP)",
    "norm": "plain, target normalised", "centred": "plain, condition in [-1, 1]",
    "sgd_default": "plain, SGD", "sgd_mip": "MIP, SGD",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#000000", "#0072B2", "#E69F00", "#D55E00", "#999999", "#56B4E9", "#000000", "#D55E00")))


def run(trial: Trial) -> None:
    train, val, test = (x.to(trial.device) for x in parts_of(trial))
    steps = trial.scale(smoke=20, laptop=300)
    levels = torch.linspace(0.02, 1, trial.scale(smoke=5, laptop=25), device=trial.device)[:, None]
    for arm in trial.arms(*ARMS):
        optimizer, rates = (SGD, SGD_RATES) if arm.name.startswith("sgd") else (Adam, RATES)
        rates, tried = trial.scale(smoke=rates[:1], laptop=rates), []
        for lr in rates:
            torch.manual_seed(trial.seed)
            model = denoiser(arm.name).to(trial.device)
            if lr == rates[0]:
                probed = magnitude_probe(model.hyper, model.range(levels), (noisy(val[:BATCH], 0.5, 0), val[:BATCH]), F.mse_loss)
            curve = fit(model, train, val, optimizer, lr, steps, trial.seed)
            tried.append((curve[-1][1], lr, model, curve))
        _, lr, model, curve = min(tried, key=lambda t: t[0] if np.isfinite(t[0]) else np.inf)
        final = curve[-1][1] if arm.name == "default" else trial.metric("default", "final")
        reached = [step for step, loss in curve if loss <= final]
        arm.log(mse=error(model, test), final=curve[-1][1], lr=lr, steps=steps, steps_to=reached[0] if reached else steps)
        arm.log(exponent=probed.slope, correlation=probed.correlation, grad_variance=probed.grad_variance)
        arm.curve("validation", *map(list, zip(*curve)))
        with torch.no_grad():
            fresh = denoiser(arm.name).to(trial.device)
            made = fresh.hyper.weights(fresh.range(levels))
            arm.curve("norm", levels[:, 0].cpu(), torch.cat([w.flatten(1) for w in made.values() if w.ndim > 2], 1).norm(dim=1).cpu())


def parts_of(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation, test images."""
    task = images(trial, train=(400, 4000), test=(50, 300))
    val, train = task.train.split(48, seed=trial.seed)
    return train.x, val.x, task.test.x


class Denoiser(nn.Module):
    def __init__(self, hyper: HyperNetwork, range_) -> None:
        super().__init__()
        self.hyper, self.range = hyper, range_

    def forward(self, level: float, x: Tensor) -> Tensor:
        return self.hyper(self.range(x.new_full((1,), level)), x)


def denoiser(name: str) -> Denoiser:
    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 16), (16, 1)):
        layer = nn.Conv2d(a, b, 3, padding=1)
        nn.init.kaiming_normal_(layer.weight, 0.01)
        nn.init.zeros_(layer.bias)
        layers += [layer, *([nn.GroupNorm(1, b, affine=False)] if name == "norm" and b > 1 else []), nn.LeakyReLU()]
    return Denoiser(
        HyperNetwork(nn.Sequential(*layers[:-1]), 1, hidden=(16, 64), **ARMS[name]),
        (lambda c: 2 * c - 1) if name == "centred" else (lambda c: c),
    )


def noisy(x: Tensor, level: float, seed: int) -> Tensor:
    return x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


@torch.no_grad()
def error(model: nn.Module, x: Tensor) -> float:
    """Mean squared error over the four levels, with the same noise for everyone."""
    return float(np.mean([float(F.mse_loss(model(s, noisy(x, s, i)), x)) for i, s in enumerate(LEVELS)]))


def fit(model, train, val, optimizer, lr, steps, seed) -> list[tuple[int, float]]:
    """(step, validation error), every few steps."""
    generator = torch.Generator().manual_seed(seed)
    opt = optimizer(model.parameters(), lr=lr, **({"momentum": 0.9} if optimizer is SGD else {}))
    curve = [(0, error(model, val))]
    for step in range(1, steps + 1):
        x = train[torch.randint(len(train), (BATCH,), generator=generator).to(train.device)]
        level = float(torch.rand((), generator=generator))
        y = x + level * torch.randn(x.shape, generator=generator).to(x)
        opt.zero_grad()
        F.mse_loss(model(level, y), x).backward()
        opt.step()
        if step % EVERY == 0:
            curve.append((step, error(model, val)))
    return curve


def figure(record: RecordView, fig: Figure) -> None:
    """Size of the generated weights against the condition; convergence; error of every arm."""
    fig.set_size_inches(12, 4.4)
    fig.set_layout_engine("constrained")
    size, learning, errors = fig.subplots(1, 3)
    for a in ("default", "encoding", "residual", "mip"):
        curves = record.curves(a, "norm")
        y = np.array([c[1] for c in curves])
        size.loglog(
            curves[0][0], np.exp(np.log(y).mean(0)), color=COLOURS[a], label=f"{LABELS[a]}: exponent {record.mean(a, 'exponent'):.2f}"
        )
    size.set(xlabel="condition: noise level", ylabel="norm of the generated weights", title="Before training")
    size.legend(fontsize=7)
    for a in ("default", "encoding", "residual", "mip", "sgd_default", "sgd_mip"):
        curves = record.curves(a, "validation")
        y = np.array([c[1] for c in curves])
        learning.plot(curves[0][0], y.mean(0), "--" if a.startswith("sgd") else "-", color=COLOURS[a], label=LABELS[a])
        learning.fill_between(curves[0][0], y.min(0), y.max(0), color=COLOURS[a], alpha=0.12, lw=0)
    learning.set(xlabel="step", ylabel="validation error (MSE)", yscale="log", title="At the best learning rate")
    low = min(c[1].min() for a in LABELS for c in record.curves(a, "validation"))
    learning.set_ylim(0.9 * low, 0.15)
    learning.legend(fontsize=7)
    values = [record.values(a, "mse") for a in LABELS]
    errors.barh(list(LABELS.values()), [v.mean() for v in values], xerr=[v.std() for v in values], color=list(COLOURS.values()), capsize=3)
    errors.invert_yaxis()
    errors.tick_params(axis="y", labelsize=7)
    errors.set(xlabel="test error (MSE)", title="After training")
    for ax in (size, learning, errors):
        ax.grid(alpha=0.3, which="both" if ax is size else "major")
    fig.suptitle("A denoiser generated from the noise level: 14x14 MNIST, convolutions 1-16-16-1, hypernetwork 16-64")
