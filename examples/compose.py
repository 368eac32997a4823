"""Six papers on one small network: trained, converted, pruned, given early exits, explained; measured after every step.

Copy what you need: every step is one call of a public function on an ordinary ``nn.Module``. It needs scikit-learn's digits only.

    python examples/compose.py            # less than a minute on two cores
    python examples/compose.py --smoke    # a few seconds
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from neurarium import data, meter
from neurarium.compress import chita, finalise
from neurarium.dynamic import JEIDNN, fit_policy, with_exits
from neurarium.learn import ROOT, Backprop, MonoForward
from neurarium.nn import dense, hypercomplex, replace_layers
from neurarium.trust.explain import class_activation


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def main(smoke: bool = False) -> None:
    console = Console(width=100)
    torch.manual_seed(0)
    epochs = 1 if smoke else 15
    task = data.images("digits", train=1200, seed=0)
    train, test, image = task.train.batches(64, seed=0), task.test, task.test.x[:1]
    tune = Backprop(optimizer=partial(ROOT, lr=5e-3, weight_decay=0.0))
    table = Table("step", "paper", "accuracy", "weights", "not zero", "kFLOPs", "ms/256", box=box.SIMPLE)

    def row(step: str, paper: str, model: nn.Module, flops: float | None = None) -> nn.Module:
        """Measures a model, all with the same meters, and shows the table so far."""
        model.eval()
        with torch.no_grad():
            accuracy = (model(test.x).argmax(1) == test.y).float().mean().item()
        flops = meter.flops(model, image) if flops is None else flops
        time = meter.latency(model, test.x[:256], repeats=3 if smoke else 20).median
        counts = f"{meter.parameters(model):,}", f"{meter.nonzero_parameters(finalise(model)):,}"
        table.add_row(step, paper, f"{accuracy:.3f}", *counts, f"{flops / 1000:,.0f}", f"{1000 * time:.2f}")
        console.print(f"  {step}: accuracy {accuracy:.3f}", highlight=False)
        return model

    # 1. Train without backpropagation: every layer learns from its own readout (mono-forward).
    model: nn.Module = small_cnn()
    MonoForward(order="parallel").fit(model, train, epochs=epochs, seed=0)
    row("trained by layer", "mono-forward", model)

    # 2. Train on with orthogonalised momentum (root).
    tune.fit(model, train, epochs=epochs // 3 + 1, seed=0)
    row("fine-tuned", "root", model)

    # 3. Convolutions become hypercomplex ones, fitted to the trained weights: a quarter of their parameters (phnn).
    model = replace_layers(model, hypercomplex(4, init="fit"), keep=["7", "9"])
    tune.fit(model, train, epochs=epochs // 3 + 1, seed=0)
    row("hypercomplex convs", "phnn", model)

    # 4. Back to ordinary convolutions of the same function; then four of five weights go and the others are corrected (chita).
    calibration = [(task.train.x[:500], task.train.y[:500])]
    model = chita(replace_layers(model, dense()), calibration, sparsity=0.8)
    tune.fit(model, train, epochs=epochs // 5 + 1, seed=0)
    row("pruned", "chita", model)

    # 5. Early exits whose gates and classifiers learn together (jei-dnn). Then: what does half the compute cost in accuracy?
    policy = JEIDNN(with_exits(model, task.train.x[:8], cuts=2), tradeoff=0.5, warmup_epochs=epochs // 5 + 1, alternate=20)
    fit_policy(policy, train, epochs=2 * epochs, seed=0)
    policy.calibrate(task.train.batches(256, shuffle=False))
    policy.eval()
    with torch.no_grad():
        row("early exits", "jei-dnn", policy, flops=policy.decide(test.x).cost.double().mean().item())
        budget = 0.45 * float(policy.decide(test.x, threshold=1.1).cost.max())
        policy.use(image, budget=budget)
        row("45 % of the budget", "jei-dnn", policy, flops=policy.decide(test.x).cost.double().mean().item())

    # 6. What did it look at? (smooth-gradcampp)
    report = class_activation(model, test.x[:3], layer="5", samples=8)
    console.print(table)
    console.print("kFLOPs: thousands an image, counted; ms/256: a batch of 256 images.\n")
    console.print("Three digits, and where the pruned network looks:\n")
    console.print(side_by_side(list(test.x[:3, 0])), side_by_side(list(report.map)), sep="\n\n", highlight=False, markup=False)


def side_by_side(pictures: list[Tensor]) -> str:
    """Pictures in [0, 1] as rows of characters."""
    shades = " .:-=+*#%@"
    lines = ["   ".join("".join(2 * shades[min(9, int(10 * v))] for v in line) for line in lines) for lines in zip(*pictures)]
    return "\n".join(lines)


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
