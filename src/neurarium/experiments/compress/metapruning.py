"""A metanetwork trained on a few networks, tried on networks that it has not seen: an MLP on digits and a small CNN on MNIST.

All data networks of a kind have one shape and differ in seed and order of the data; two of them are held out. Each arm prepares the held
out ones (metanetwork and fine-tuning, fine-tuning alone, fine-tuning with the same group penalty, an untrained metanetwork, nothing), and
then all prune alike, by normalised group norms: the area is the mean accuracy over eight rates of pruning without any further training.
The epochs of fine-tuning are the same in all arms but "l2".
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from neurarium import data
from neurarium.compress import ChannelGraph, PruningMetaNet, apply_channels, meta_train, plan_group_norm
from neurarium.compress.prune.meta import group_penalty
from neurarium.compress.prune.units import unit_norms
from neurarium.data import ImageTask
from neurarium.experiments.compress.zoo import accuracy
from neurarium.learn.fit import Backprop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

RATES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
THIRD = 1 - 1 / 3
KINDS = ("mlp", "cnn")


def run(trial: Trial) -> None:
    kinds = trial.scale(smoke=("mlp",), laptop=KINDS)
    for arm in trial.arms("meta", "plain", "lasso", "random_metanet", "l2"):
        areas, at_third, before, written, after = [], [], [], [], []
        for kind in kinds:
            bench = trial.shared(kind, partial(_Bench, trial, kind))
            results = [bench.judge(model, arm.name) for model in bench.held]
            curve = np.mean([r["curve"] for r in results], 0)
            arm.curve(kind, x=list(bench.rates), y=curve.tolist())
            arm.log(**{f"area_{kind}": float(curve.mean())})
            areas.append(curve.mean())
            for into, name in ((at_third, "third"), (before, "before"), (written, "written"), (after, "after")):
                into.append(np.mean([r[name] for r in results]))
        arm.log(
            area=float(np.mean(areas)), accuracy_at_third=float(np.mean(at_third)), gini_before=float(np.mean(before)),
            gini_written=float(np.mean(written)), gini_after=float(np.mean(after)),
        )  # fmt: skip


class _Bench:
    """The data networks of one kind, the metanetwork that learnt from the first of them, and what happens to the others."""

    def __init__(self, trial: Trial, kind: str) -> None:
        smoke = trial.name == "smoke"
        self.task, self.rates, self.steps = _task(trial, kind), (0.0, 0.5) if smoke else RATES, 2 if smoke else 4
        self.x = self.task.train.x[:1]
        self.epochs, self.lr, self.seed = (1 if smoke else 3), 0.02, trial.seed
        models = [self.train(kind, 100 * trial.seed + i, 2 if smoke else 12 if kind == "mlp" else 5) for i in range(3 if smoke else 8)]
        seen, self.held = models[:-2], models[-2:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial.seed)
            self.blank, self.trained = (PruningMetaNet(hidden=8 if smoke else 32, layers=2 if smoke else 4) for _ in range(2))
            self.trained.load_state_dict(self.blank.state_dict())
        whole = list(self.task.train.batches(500, seed=trial.seed))
        self.history = meta_train(self.trained, seen, whole, epochs=2 if smoke else 12, seed=trial.seed)

    def train(self, kind: str, seed: int, epochs: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _mlp(self.task) if kind == "mlp" else _cnn(self.task)
        return self.tune(model, epochs, 0.05, seed)

    def tune(self, model: nn.Module, epochs: int, lr: float, seed: int, loss: object = "cross_entropy") -> nn.Module:
        learner = Backprop(loss=loss, optimizer=partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4))  # type: ignore[arg-type]
        learner.fit(model, self.task.train.batches(64, seed=seed), epochs=epochs, seed=seed)
        return model.eval()

    def judge(self, model: nn.Module, arm: str) -> dict[str, object]:
        graph = ChannelGraph.trace(model, self.x)
        metanet = {"meta": self.trained, "random_metanet": self.blank}.get(arm)
        ready = apply_channels(model, graph.plan({})) if metanet is None else metanet.transform(model, self.x)
        written = _gini(ready, graph)
        if arm == "lasso":
            _tune_with_penalty(ready, graph, self)
        elif arm != "l2":
            self.tune(ready, self.epochs, self.lr, self.seed)
        plans = {rate: plan_group_norm(ready, graph, ratio=rate, steps=self.steps) for rate in (*self.rates, THIRD)}
        pruned = {rate: apply_channels(ready, plan) for rate, plan in plans.items()}
        curve = [accuracy(pruned[rate], self.task) for rate in self.rates]
        third = accuracy(self.tune(pruned[THIRD], self.epochs, self.lr, self.seed + 1), self.task)
        return {"curve": curve, "third": third, "before": _gini(model, graph), "written": written, "after": _gini(ready, graph)}


def _tune_with_penalty(model: nn.Module, graph: ChannelGraph, bench: _Bench) -> None:
    """The same epochs with the gamma rule applied to the weights themselves; its strength is the best of three for this network."""
    found: list[tuple[float, dict[str, Tensor]]] = []
    start = {k: v.clone() for k, v in model.state_dict().items()}
    held = bench.task.train.x[:500], bench.task.train.y[:500]
    for strength in (1e-4, 1e-3, 1e-2):
        model.load_state_dict(start)

        def loss(output: Tensor, y: Tensor, strength: float = strength) -> Tensor:
            return F.cross_entropy(output, y) + strength * group_penalty(dict(model.named_parameters()), graph)

        bench.tune(model, bench.epochs, bench.lr, bench.seed, loss)
        scores = []
        for rate in (0.3, 0.5, 0.7):
            small = apply_channels(model, plan_group_norm(model, graph, ratio=rate, steps=bench.steps)).eval()
            with torch.no_grad():
                scores.append(float((small(held[0]).argmax(1) == held[1]).double().mean()))
        found.append((float(np.mean(scores)), {k: v.clone() for k, v in model.state_dict().items()}))
    model.load_state_dict(max(found, key=lambda pair: pair[0])[1])


def _gini(model: nn.Module, graph: ChannelGraph) -> float:
    """Mean over groups of the Gini coefficient of the units' norms over all of their slices; 0 = all alike."""
    values = []
    for norms in unit_norms(model, graph, sides=("out", "in", "norm")).values():
        ordered = norms.sort().values.numpy()
        n = len(ordered)
        values.append(float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * max(ordered.sum(), 1e-300))))
    return float(np.mean(values))


def _task(trial: Trial, kind: str) -> ImageTask:
    if kind == "mlp":
        return data.images("digits", train=trial.scale(smoke=300, laptop=None), seed=trial.seed)
    return data.images("mnist", train=1500, test=1000, size=14, seed=trial.seed)


def _mlp(task: ImageTask) -> nn.Module:
    pixels = task.train.x[0].numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, task.classes))


def _cnn(task: ImageTask) -> nn.Module:
    layers: list[nn.Module] = []
    for into, out, stride in ((1, 8, 2), (8, 16, 1), (16, 16, 2)):
        layers += [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, task.classes))


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "meta": "metanetwork, fine-tuned", "lasso": "group penalty, fine-tuned", "plain": "fine-tuned", "l2": "as trained",
        "random_metanet": "untrained metanetwork, fine-tuned",
    }  # fmt: skip
    colours = ("#D55E00", "#009E73", "#0072B2", "#999999", "#E69F00")
    fig.set_size_inches(9.5, 4.0)
    kinds = (("mlp", "MLP 64-48-48-10, digits"), ("cnn", "CNN 8-16-16, MNIST 14 x 14"))
    for axes, (kind, title) in zip(fig.subplots(1, 2), kinds, strict=True):
        for (arm, label), colour in zip(names.items(), colours, strict=True):
            try:
                curves = record.curves(arm, kind)
            except KeyError:
                continue
            values = 100 * np.array([y for _, y in curves])
            x = 100 * np.array(curves[0][0])
            error = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
            style = ":" if arm in ("random_metanet", "l2") else "-"
            axes.errorbar(x, values.mean(0), error, label=label, color=colour, marker="o", markersize=3, capsize=2, linestyle=style)
        axes.set(xlabel="multiply-adds removed (%)", ylabel="test accuracy right after pruning (%)", title=title)
    fig.axes[0].legend(fontsize=7, loc="lower left")
