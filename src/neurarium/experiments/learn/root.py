"""ROOT against Muon and AdamW: precision of the orthogonalisation, robustness to outliers, training with clean and with noisy gradients.

The training task is a character transformer on tiny Shakespeare. Every arm runs at the same four learning rates, for clean and for noisy
gradients, and is judged on test text at the one that is best on validation text. Noise: one gradient entry in a hundred gets 100
standard deviations times Student t(1.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from neurarium import data, meter
from neurarium.learn.fit import Backprop, Diverged, evaluate
from neurarium.learn.orthogonal import CLASSIC, MUON, ROOT, Muon, coefficients_for, matrix_groups, newton_schulz, spectral_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SHAPES = ((32, 32), (64, 64), (64, 128), (64, 256), (64, 512), (128, 512), (256, 256))
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
WIDTH, CONTEXT, SEQUENCES = 48, 32, 16
COLOURS = {"adamw": "#000000", "muon": "#0072B2", "root": "#D55E00", "root_uncut": "#E69F00", "root_muon": "#56B4E9", "classic": "#009E73"}
LABELS = {
    "adamw": "AdamW", "muon": "Muon", "root": "ROOT", "root_uncut": "ROOT without the cut", "root_muon": "ROOT, Muon's coefficients",
    "classic": "classic Newton-Schulz",
}  # fmt: skip


class Chained(Optimizer):
    """torch's Muon for the matrices and AdamW for the rest, as users chain them."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        orth = [p for g in groups if g["use_orth"] for p in g["params"]]
        rest = [p for g in groups if not g["use_orth"] for p in g["params"]]
        self.parts = [
            torch.optim.Muon(orth, lr=lr, adjust_lr_fn="match_rms_adamw"), AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        ]  # fmt: skip
        super().__init__([*orth, *rest], {"lr": lr})
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, betas=(0.9, 0.95), weight_decay=0.1),
    "muon": Chained,
    "root": ROOT,
    "root_uncut": partial(ROOT, quantile=None),
    "root_muon": partial(ROOT, coefficients="muon"),
}


def run(trial: Trial) -> None:
    text = data.text("tiny-shakespeare")
    steps = trial.scale(smoke=3, laptop=160)
    corpus = [Windows(text.encode(part.text), seed=trial.seed) for part in (text.train, text.valid, text.test)]
    train, valid, test = (replace(c, codes=c.codes.to(trial.device)) for c in corpus)
    valid, test = replace(valid, count=trial.scale(smoke=1, laptop=12)), replace(test, count=trial.scale(smoke=1, laptop=25))
    symbols = len(text.characters)

    def fit(optimizer: Callable[..., Optimizer], lr: float, noisy: bool, count: int) -> tuple[nn.Module, tuple[float, ...]]:
        torch.manual_seed(trial.seed)
        model = Characters(symbols, WIDTH, CONTEXT).to(trial.device)
        learner = (Noisy if noisy else Backprop)(
            optimizer=partial(optimizer, lr=lr), groups=matrix_groups,
            schedule=lambda optimizer: LambdaLR(optimizer, lambda step: max(0.0, 1 - step / count)),
        )  # fmt: skip
        history = learner.fit(model, replace(train, count=count), epochs=1, seed=trial.seed)
        return model, tuple(history.extra["loss"])

    def attempt(name: str, lr: float, noisy: bool) -> tuple[float, float, nn.Module, tuple[float, ...]]:
        try:
            model, curve = fit(OPTIMIZERS[name], lr, noisy, steps)
        except Diverged:
            return float("inf"), lr, nn.Identity(), ()
        return evaluate(model, valid)["loss"], lr, model, curve

    for arm in trial.arms(*OPTIMIZERS, "classic"):
        if arm.name in ("classic", "muon", "root"):
            momenta = trial.shared("momenta", lambda: recorded(fit, trial.scale(smoke=(2,), laptop=(20, 60))))
            coefficients = {"classic": lambda s: CLASSIC, "muon": lambda s: MUON, "root": coefficients_for}[arm.name]
            arm.log(error=precision(coefficients, momenta, trial.generator()))
        if arm.name in ("muon", "root"):
            cosines = robustness(coefficients, (None, 0.999, 0.99, 0.95, 0.9, 0.8, 0.6), trial.generator())
            arm.log(cosine=cosines[0 if arm.name == "muon" else 4])
            arm.curve("cosine", x=[1, 0.999, 0.99, 0.95, 0.9, 0.8, 0.6], y=cosines)
            seconds = trial.shared("step_seconds", lambda: step_seconds(symbols, trial.device, trial.scale(smoke=2, laptop=30)))
            arm.log_timed(step_seconds=seconds[arm.name])
        if arm.name == "classic":
            continue
        for condition, noisy in (("clean", False), ("noisy", True)):
            rates = RATES[:2] if trial.name == "smoke" else RATES
            tried = [attempt(arm.name, lr, noisy) for lr in rates]
            _, lr, model, curve = min(tried, key=lambda t: t[0])
            arm.log(**{f"{condition}_loss": evaluate(model, test)["loss"], f"{condition}_lr": lr})
            arm.curve(f"{condition}_loss", y=np.convolve(curve, np.ones(10) / 10, "valid") if len(curve) > 10 else curve)


@dataclass(frozen=True)
class Windows:
    """``count`` batches of windows at random places: (x, y) with y the next character."""

    codes: Tensor
    seed: int = 0
    count: int = 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            at = torch.randint(len(self.codes) - CONTEXT, (SEQUENCES, 1), generator=generator)
            rows = self.codes[(at + torch.arange(CONTEXT + 1)).to(self.codes.device)]
            yield rows[:, :-1], rows[:, 1:]


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, time, width = x.shape
        query, key, value = self.mix(self.norm1(x)).view(n, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Characters(nn.Module):
    """Scores (n, symbols, time) of the next character."""

    def __init__(self, symbols: int, width: int, context: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(Layer(width), Layer(width), nn.LayerNorm(width))
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.token(x) + self.place.weight[: x.shape[1]])).transpose(1, 2)


class Noisy(Backprop):
    """Backpropagation through a channel that spoils one gradient entry in a hundred."""

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        found = super().gradients(model, x, y)
        for p in model.parameters():
            flat = p.grad.view(-1)
            hit = torch.randint(len(flat), (len(flat) // 100 + (torch.rand(()) < len(flat) % 100 / 100),))
            normal, chi2 = torch.randn(len(hit)), torch._standard_gamma(torch.full((len(hit),), 0.75)) * 2
            flat[hit.to(flat.device)] += 100 * flat.std() * (normal / (chi2 / 1.5).sqrt()).to(flat)
        return found


def recorded(fit: Callable[..., Any], at: tuple[int, ...]) -> list[Tensor]:
    """Momentum matrices of real training, after some numbers of steps."""
    found = []
    for count in at:
        kept: list[Optimizer] = []

        def keep(groups: Any, lr: float) -> Optimizer:
            kept.append(Muon(groups, lr=lr))  # noqa: B023 (used in this round only)
            return kept[-1]  # noqa: B023

        fit(keep, 1e-2, False, count)
        found += [s["momentum_buffer"].flatten(1) for s in kept[0].state.values() if "momentum_buffer" in s]
    return found


def precision(coefficients: Callable[..., Any], momenta: list[Tensor], generator: torch.Generator) -> list[float]:
    """Mean squared distance of the singular values from 1: for each Gaussian shape, then for each shape of recorded momenta."""
    errors = []
    for shape in SHAPES:
        x = torch.randn(4, *shape, generator=generator, device=generator.device)
        errors.append(float(spectral_error(newton_schulz(x, coefficients(shape))).mean()))
    for shape in sorted({tuple(m.shape) for m in momenta}):
        x = torch.stack([m for m in momenta if m.shape == shape])
        errors.append(float(spectral_error(newton_schulz(x, coefficients(shape))).mean()))
    return errors


def robustness(coefficients: Callable[..., Any], quantiles: tuple[float | None, ...], generator: torch.Generator) -> list[float]:
    """Cosine between the update and the polar factor of the clean gradient: rank 16, with 1 % of the entries 50 times too large."""
    rows, columns, rank, device = 64, 128, 16, generator.device
    draw = partial(torch.randn, generator=generator, device=device)
    found = []
    for q in quantiles:
        generator.manual_seed(generator.initial_seed())
        cosines = []
        for _ in range(8):
            left, right = draw(rows, rank), draw(rank, columns)
            u, _, vh = torch.linalg.svd(left @ right, full_matrices=False)
            clean, want = left @ right, u[:, :rank] @ vh[:rank]
            hit = torch.rand(rows, columns, generator=generator, device=device) < 0.01
            p = nn.Parameter(torch.zeros_like(clean))
            p.grad = clean + 50 * clean.std() * draw(rows, columns) * hit
            ROOT([p], lr=1.0, weight_decay=0.0, coefficients=coefficients((rows, columns)), quantile=q).step()
            cosines.append(float(-(p.detach() * want).sum() / p.detach().norm() / want.norm()))
        found.append(sum(cosines) / len(cosines))
    return found


def step_seconds(symbols: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of one optimizer step of the whole model, measured in turn."""
    steps = {}
    for name in ("muon", "root"):
        model = Characters(symbols, WIDTH, CONTEXT).to(device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        steps[name] = OPTIMIZERS[name](matrix_groups(model), lr=1e-3).step
    return {name: timing.median for name, timing in meter.latency(steps, repeats=repeats).items()}


def figure(record: RecordView, fig: Figure) -> None:
    """Loss curves with clean and noisy gradients, error by shape, cosine by quantile."""
    fig.set_size_inches(11, 7.5)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(2, 2)
    for ax, condition in zip(axes[0], ("clean", "noisy")):
        for a in [a for a in OPTIMIZERS if a in record.arms]:
            curves = record.curves(a, f"{condition}_loss")
            if curves:
                x, y = curves[0][0], np.array([c[1] for c in curves])
                ax.plot(x, y.mean(0), color=COLOURS[a], label=f"{LABELS[a]}: {record.mean(a, f'{condition}_loss'):.3f}")
                ax.fill_between(x, y.min(0), y.max(0), color=COLOURS[a], alpha=0.15, lw=0)
        ax.set(title=f"{condition} gradients", xlabel="step", ylabel="training loss (nats)")
        ax.legend(fontsize=7, title="loss on test text", title_fontsize=7)
    error, cosine = axes[1]
    for a in [a for a in ("classic", "muon", "root") if record.has(a, "error")]:
        values = record.values(a, "error")
        momenta = sorted((m * WIDTH, n * WIDTH) for m, n in ((1, 1), (1, 4), (3, 1), (4, 1)))  # of the transformer
        names = [f"{m}x{n}" for m, n in SHAPES] + [f"momentum {m}x{n}" for m, n in momenta]
        error.errorbar(range(len(names)), values.mean(0), values.std(0), fmt="o-", capsize=2, color=COLOURS[a], label=LABELS[a])
        error.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    error.set(yscale="log", ylabel="mean (singular value - 1)^2", title="distance from orthogonality")
    error.legend(fontsize=7)
    for a in [a for a in ("muon", "root") if a in record.arms]:
        for x, y in record.curves(a, "cosine"):
            cosine.plot(100 * (1 - np.asarray(x)), y, "o-", color=COLOURS[a], alpha=0.7, label=f"{LABELS[a]}'s coefficients")
    handles = dict(zip(*reversed(cosine.get_legend_handles_labels())))
    cosine.legend(handles.values(), handles.keys(), fontsize=7)
    cosine.set(xlabel="share of entries cut (%); 0 = Muon", ylabel="cosine to clean polar factor", title="1 % outliers, 50 times too large")
