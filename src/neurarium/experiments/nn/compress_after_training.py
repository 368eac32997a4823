"""How small can a trained network be made, by which recipe: at once, and after one epoch of fine-tuning?

One MLP 256-256-256-10 is trained on MNIST at 16x16; its two hidden layers are then replaced. ``phN``: the nearest sum of N Kronecker
products. ``svdR``: the nearest matrix of rank R. ``isvdR``: of rank R with the nearest outputs on the training inputs. ``kernelM``: M
random ReLU features, Psi by least squares on those inputs. ``bundleM``: the same for layer and activation together, then multiplied out,
so that the hidden widths disappear; ``bundle_psiM`` starts from psi(W, b) instead, without data. ``dense``: nothing is replaced. All arms
are then fine-tuned for one epoch; the peak learning rate is each arm's best of one grid on validation images, which belong to neither
training nor test.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.features import ArcCos
from neurarium.nn.hypercomplex import hypercomplex
from neurarium.nn.kernel_layer import KernelLinear, bundle, fully_bundle, kernelise
from neurarium.nn.replace import Rule, replace_layers

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

WIDTH = 256
#: recipe -> its sizes, its name in figures, its colour and its mark
FAMILIES = {
    "ph": ((2, 4, 8, 16), "hypercomplex, n", "#0072B2", "o"),
    "svd": ((64, 32, 16, 8), "low rank, nearest weights", "#777777", "s"),
    "isvd": ((64, 32, 16, 8), "low rank, nearest outputs", "#000000", "s"),
    "kernel": ((128, 64, 32, 16), "kernel layers, m", "#D55E00", "^"),
    "bundle": ((256, 128, 64, 32), "bundled, fitted, m", "#009E73", "D"),
    "bundle_psi": ((256, 128, 64, 32), "bundled, from psi(W, b), m", "#CC79A7", "D"),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def run(trial: Trial) -> None:
    names = [f"{family}{n}" for family, (sizes, *_) in FAMILIES.items() for n in (sizes if trial.scale(smoke=0, laptop=1) else sizes[1:2])]
    for arm in trial.arms("dense", *names):
        train, val, test = trial.shared("parts", lambda: parts(trial))
        net = trial.shared("net", lambda train=train: pretrained(train, trial)).to(trial.device)
        x = train.x.to(trial.device)
        model = net if arm.name == "dense" else compressed(net, *split(arm.name), x)
        fixed = sum(b.numel() for b in model.buffers())
        arm.log(params=meter.parameters(model), stored=meter.parameters(model) + fixed, accuracy_before=accuracy(model, test, trial))
        state, found = {k: v.clone() for k, v in model.state_dict().items()}, {}
        for lr in RATES:
            model.load_state_dict(state)
            tune(model, train, trial, lr, epochs=1)
            found[lr] = accuracy(model, val, trial), accuracy(model, test, trial)
        best = max(RATES, key=lambda lr: found[lr][0])
        arm.log(accuracy=found[best][1], rate=best)


def split(name: str) -> tuple[str, int]:
    family = name.rstrip("0123456789")
    return family, int(name.removeprefix(family))


def parts(trial: Trial) -> tuple[data.TensorData, data.TensorData, data.TensorData]:
    """Training, validation and test images as rows."""
    task = images(trial, train=(600, 10_000), test=(300, 5000), size=16)
    rows = [data.TensorData(part.x.flatten(1), part.y) for part in (task.train, task.test)]
    val, train = rows[0].split(0.2, seed=trial.seed)
    return train, val, rows[1]


def pretrained(train: data.TensorData, trial: Trial) -> nn.Module:
    net = nn.Sequential(nn.Linear(256, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)).to(trial.device)
    tune(net, train, trial, 3e-3, epochs=trial.scale(smoke=2, laptop=8))
    return net


def tune(model: nn.Module, train: data.TensorData, trial: Trial, lr: float, epochs: int) -> None:
    batches = train.to(trial.device).batches(64, seed=trial.seed, drop_last=True)
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(batches))
    learner = Backprop(optimizer=partial(AdamW, lr=lr, weight_decay=0.01), schedule=schedule, clip=1.0)
    learner.fit(model, batches, epochs=epochs, seed=trial.seed)


def accuracy(model: nn.Module, part: data.TensorData, trial: Trial) -> float:
    return evaluate(model, part.to(trial.device).batches(1000, shuffle=False))["accuracy"]


def compressed(net: nn.Module, family: str, size: int, x: Tensor) -> nn.Module:
    """The trained network with its hidden layers in another form; the classifier stays (bundles take it in)."""
    if family == "bundle_psi":
        return bundle(net, features="relu", num_features=size)
    if family == "bundle":
        return bundled(net, size, x)
    rules = {
        "ph": lambda: hypercomplex(size, init="fit"),
        "svd": lambda: Rule(nn.Linear, lambda old: LowRank(old, size, aware=False), "fit"),
        "isvd": lambda: Rule(nn.Linear, lambda old: LowRank(old, size, aware=True), "fit"),
        "kernel": lambda: kernelise("relu", size, init="fit"),
    }
    return replace_layers(net, rules[family](), example=x, keep=["4"])


class LowRank(nn.Sequential):
    """U (V x) + b of a given rank."""

    def __init__(self, old: nn.Module, rank: int, aware: bool) -> None:
        super().__init__(nn.Linear(old.in_features, rank, bias=False), nn.Linear(rank, old.out_features))
        self.aware = aware

    @torch.no_grad()
    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> None:
        """The nearest weight, or (``aware``) the weight with the nearest outputs on ``inputs``, both in closed form."""
        weight, rank = old.weight.double(), len(self[0].weight)
        root = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        if self.aware and inputs is not None:
            gram = inputs.double().T @ inputs.double() / len(inputs)
            root = torch.linalg.cholesky(gram + 1e-4 * gram.diagonal().mean() * root)
        u, s, v = torch.linalg.svd(weight @ root)
        half = s[:rank].sqrt()
        self[1].weight.copy_(u[:, :rank] * half)
        self[0].weight.copy_(torch.linalg.solve_triangular(root, half[:, None] * v[:rank], upper=False, left=False))
        self[1].bias.copy_(old.bias)


@torch.no_grad()
def bundled(net: nn.Module, m: int, x: Tensor) -> nn.Module:
    """Each dense layer and its ReLU as one kernel layer, Psi by least squares, then all of them and the classifier multiplied out."""
    layers: list[nn.Module] = []
    target, given = x, x
    for i in (0, 2):
        target = net[i : i + 2](target)
        layer = KernelLinear(given.shape[1], WIDTH, ArcCos(given.shape[1], m, seed=i).to(x.device)).to(x.device)
        fitted = fully_bundle(layer.features, given, target, ridge=1e-6 * layer.features.phi(given).square().sum().item() / m)
        layer.weight.copy_(fitted[-1].weight)
        given = layer(given)
        layers.append(layer)
    return bundle(nn.Sequential(*layers, net[4]))


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Error against trained parameters, at once and after an epoch; a thin line leads to the numbers stored with fixed projections."""
    fig.set_size_inches(12, 5)
    axes = fig.subplots(1, 2, sharey=True)
    dense = record.mean("dense", "params")
    for axis, metric, title in zip(axes, ("accuracy_before", "accuracy"), ("At once", "After one epoch of fine-tuning"), strict=True):
        axis.axhline(100 - 100 * record.mean("dense", metric), color="#444444", linestyle="--", linewidth=1)
        axis.plot(dense, 100 - 100 * record.mean("dense", metric), "*", color="#444444", markersize=13, label="the trained network")
        for family, (sizes, label, colour, mark) in FAMILIES.items():
            found = [(n, f"{family}{n}") for n in sizes if f"{family}{n}" in record.arms]
            error = [100 - 100 * record.values(arm, metric) for _, arm in found]
            params, stored = ([record.mean(arm, name) for _, arm in found] for name in ("params", "stored"))
            mean = [float(e.mean()) for e in error]
            spread = [float(np.std(e, ddof=1)) if len(e) > 1 else 0.0 for e in error]
            axis.errorbar(params, mean, yerr=spread, fmt=f"-{mark}", color=colour, markersize=6, capsize=2, label=label)
            for (n, _), p, s, e in zip(found, params, stored, mean, strict=True):
                if s > 1.02 * p:
                    axis.plot([p, s], [e, e], ":", color=colour, linewidth=1)
                    axis.plot(s, e, "|", color=colour, markersize=7)
                axis.annotate(str(n), (p, e), xytext=(4, 5), textcoords="offset points", fontsize=7, color=colour)
        axis.set(xscale="log", yscale="log", xlabel="trained parameters (dotted: with fixed projections)", title=title)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axes[0].set_ylabel("test error (%)")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
