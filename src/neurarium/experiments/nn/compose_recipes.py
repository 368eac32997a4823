"""Do the savings of two recipes multiply, and what does the second one cost where the first has already saved?

One residual backbone of fixed width; only the 3x3 convolutions of its blocks change. Alone: ``ph`` (Kronecker sums, n = 4), ``kernel``
(random features, a quarter of each layer's inputs, Psi trained), ``wave`` (wavelet blocks), ``poincare`` (hyperbolic convolutions between
tangent spaces, which save nothing by themselves). Composed: ``ph_wave`` and ``kernel_wave`` make the 1x1 convolutions inside the wavelet
blocks, ``ph_kernel`` makes Psi a Kronecker sum, ``ph_poincare`` the Euclidean kernel of the hyperbolic convolutions; ``ph_kernel_wave``
is all three. Saving factors are the dense network's parameters over the arm's: of the weights inside the blocks, and of the whole network.

Convolutions become hypercomplex by ``replace_layers``. A layer that is no standard one keeps its class and gets a
parametrization of its ``weight`` (:class:`Kronecker`, by ``torch.nn.utils.parametrize``), which starts from the weights that it has.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.experiments.nn.recipes import Backbone
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.hyperbolic import PConv2d, PoincareBall, hyperbolic
from neurarium.nn.hypercomplex import hypercomplex, kronecker_factors
from neurarium.nn.kernel_layer import KernelLinear, kernelise
from neurarium.nn.replace import replace_layers
from neurarium.nn.wavemix import wave_mixing

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

CHANNELS, N, SHARE, CURVATURE = 32, 4, 0.25, 0.01
#: arm -> its recipes in the order in which they are applied, the peak learning rate (the best of 1e-2, 3e-2, 1e-1 on another seed)
ARMS: dict[str, tuple[tuple[str, ...], float]] = {
    "dense": ((), 1e-2),
    "ph": (("ph",), 3e-2),
    "kernel": (("kernel",), 1e-1),
    "wave": (("wave",), 3e-2),
    "poincare": (("poincare",), 3e-2),
    "ph_wave": (("wave", "ph"), 3e-2),
    "kernel_wave": (("wave", "kernel"), 1e-1),
    "ph_kernel": (("kernel", "ph"), 1e-1),
    "ph_poincare": (("poincare", "ph"), 3e-2),
    "ph_kernel_wave": (("wave", "kernel", "ph"), 1e-1),
}


def run(trial: Trial) -> None:
    for arm in trial.arms(*ARMS):
        task = trial.shared("images", lambda: images(trial, train=(128, 2000), test=(200, 3000)))
        recipes, lr = ARMS[arm.name]
        model = composed(recipes).to(trial.device, memory_format=torch.channels_last)
        found = fitted(model, task, trial, lr)
        whole, weights = sizes(model)
        base, base_weights = trial.shared("dense_sizes", lambda: sizes(Backbone(CHANNELS)))
        arm.log(accuracy=found, params=whole, weights=weights, bytes=meter.stored_bytes(model))
        arm.log(saving=base / whole, weight_saving=base_weights / weights)


def fitted(model: nn.Module, task: data.ImageTask, trial: Trial, lr: float) -> float:
    """Trains, and returns the test accuracy."""
    epochs = trial.scale(smoke=1, laptop=2)
    batches = task.train.to(trial.device).batches(64, seed=trial.seed, drop_last=True)
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(batches))
    learner = Backprop(optimizer=partial(AdamW, lr=lr, weight_decay=0.01), schedule=schedule)
    learner.fit(model, batches, epochs=epochs, seed=trial.seed)
    return evaluate(model, task.test.to(trial.device).batches(500, shuffle=False))["accuracy"]


def sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters of the whole network, and of the weights (no biases, no norms) inside its blocks."""
    return meter.parameters(model), sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1)


def composed(recipes: tuple[str, ...]) -> nn.Module:
    """The backbone with one recipe put into the other."""
    rules = {
        "ph": lambda: hypercomplex(N),
        "kernel": lambda: kernelise("relu", SHARE),
        "wave": lambda: wave_mixing(upsample="bilinear"),
        "poincare": lambda: hyperbolic(PoincareBall(CURVATURE)),
    }
    model: nn.Module = Backbone(CHANNELS)
    for recipe in recipes:
        model = replace_layers(model, rules[recipe](), keep=["stem", "head"])
        if recipe == "ph":
            for layer in list(model.modules()):
                if isinstance(layer, (PConv2d, KernelLinear)):
                    parametrize.register_parametrization(layer, "weight", Kronecker(N))
    return model


class Kronecker(nn.Module):
    """``weight = sum_i A_i (x) F_i``, n products, with A and F (stacked along the outputs) in the place of the weight."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, a: Tensor, f: Tensor) -> Tensor:
        out, inner, *kernel = f.shape
        blocks = torch.einsum("iab,icek->acbek", a, f.reshape(self.n, out // self.n, inner, -1))
        return blocks.reshape(out, self.n * inner, *kernel)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest sum, at the weight's own norm. Products that a structured weight leaves at zero get a random A.

        With both factors at zero no gradient would reach them.
        """
        a, f, s = kronecker_factors(weight, self.n)
        unused = s[: self.n] < 1e-6 * s[0]
        a[unused] = torch.randn_like(a[unused]) * math.sqrt(s[0].item()) / self.n
        f[unused] = 0
        f = f.flatten(0, 1)
        return a, f * (weight.norm() / self(a, f).norm())


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """What the composed arms save beside the product of the single savings; accuracy against parameters, from each recipe to its sum."""
    from matplotlib.ticker import NullLocator

    fig.set_size_inches(13, 5.2)
    left, right = fig.subplots(1, 2, width_ratios=(5, 6))
    names = {"ph": "hypercomplex", "kernel": "kernel", "wave": "wave", "poincare": "Poincaré"}
    pairs = [arm for arm, (recipes, _) in ARMS.items() if len(recipes) > 1 and arm in record.arms]
    metrics = (("weight_saving", "#0072B2", "block weights"), ("saving", "#E69F00", "whole network"))
    for i, arm in enumerate(pairs):
        for j, (metric, colour, label) in enumerate(metrics):
            product = math.prod(record.mean(single, metric) for single in ARMS[arm][0])
            at = i + 0.44 * j - 0.32
            left.bar(at, product, 0.2, facecolor="none", edgecolor=colour, hatch="///", label=f"{label}: product" if i == 0 else None)
            left.bar(at + 0.2, record.mean(arm, metric), 0.2, color=colour, label=f"{label}: composed" if i == 0 else None)
            left.annotate(f"{record.mean(arm, metric):.1f}", (at + 0.2, record.mean(arm, metric)), ha="center", va="bottom", fontsize=7)
    left.set(yscale="log", ylabel="saving factor", title="Do savings multiply?")
    left.set_xticks(range(len(pairs)), ["\nin ".join(names[r] for r in ARMS[arm][0][::-1]) for arm in pairs], fontsize=8)
    left.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    left.minorticks_off()
    left.legend(fontsize=8)

    centre = {arm: (record.mean(arm, "params"), 100 * record.mean(arm, "accuracy")) for arm in record.arms}
    for arm, (recipes, _) in ARMS.items():
        if arm not in centre:
            continue
        values = 100 * record.values(arm, "accuracy")
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        colour = ("#000000", "#E69F00", "#0072B2", "#CC79A7")[len(recipes)]
        right.errorbar(*centre[arm], yerr=spread, fmt="so^D"[len(recipes)], color=colour, capsize=3, markersize=8)
        label = " in ".join(names[r] for r in recipes[::-1]) or "dense"
        right.annotate(label, centre[arm], xytext=(7, 6), textcoords="offset points", fontsize=8, color=colour)
        for single in recipes if len(recipes) > 1 else ():
            right.plot(*zip(centre[single], centre[arm]), color="#BBBBBB", linewidth=1, zorder=0)
    right.set(xscale="log", xlabel="trained parameters", ylabel="test accuracy (%)", title="What the composition costs")
    right.set_xticks([4000, 10_000, 20_000, 40_000], ["4,000", "10,000", "20,000", "40,000"])
    right.xaxis.set_minor_locator(NullLocator())
    right.margins(0.12)
    fig.tight_layout()
