"""Seven ways to choose the range of a weight, at 4, 3 and 2 bits (the paper's at 8 and 6, too), on one trained ResNet-8.

Weights only, one range a tensor. Each quantised network re-estimates its BatchNorm statistics on the same 1,024 unlabelled training images
before it is judged: clipping shrinks what a layer puts out, rounding does not. ``raw_3`` is the accuracy without that at 3 bits,
``channel_2`` the one with a range for each channel at 2 bits. The arms ``golden``, ``golden_alone`` and ``grid1000`` search the plain range
of every layer at 4 bits: how good the minimum is, and how many evaluations it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neurarium.compress import RangeFit, RangePlan, apply_ranges, estimate_range
from neurarium.experiments.compress.zoo import accuracy, cifar, reestimate_bn, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

BITS = (4, 3, 2)
Rule = Callable[[Tensor, int], RangeFit]


def run(trial: Trial) -> None:
    task = cifar(trial)
    images = task.train.x[: trial.scale(smoke=64, laptop=1024)]
    rules: dict[str, Rule] = {
        "requant": partial(estimate_range, power=None),
        "alpha_only": estimate_range,
        "minmax": lambda w, b: _reach(w, b, 1.0),
        "percentile": lambda w, b: _reach(w, b, _percentile(w.abs().flatten(), 0.9999)),
        "sigma": lambda w, b: _reach(w, b, min(1.0, float(3 * w.std() / w.abs().max()))),
        "entropy": lambda w, b: _reach(w, b, _entropy(w.abs(), b)),
        "observer": _observer,
    }

    for arm in trial.arms("fp32", *rules):
        model = trial.shared("resnet", lambda: resnet(trial, task))
        weights = _weights(model)
        if arm.name == "fp32":
            arm.log(accuracy=accuracy(model, task))
            arm.log(reestimated=accuracy(reestimate_bn(apply_ranges(model, RangePlan({})), images), task))
            continue
        levels = (8, 6, *BITS) if arm.name == "requant" else BITS
        searched = arm.name in ("requant", "alpha_only", "minmax")
        fitted, mse = [], []
        for b in levels:
            fits = {name: rules[arm.name](w, b) for name, w in weights.items()}
            quantised = apply_ranges(model, RangePlan(fits))
            if searched and b == 3:
                arm.log(raw_3=accuracy(quantised, task))
            fitted.append(accuracy(reestimate_bn(quantised, images), task))
            mse.append(sum(float((f.values(weights[n]) - weights[n]).square().sum() / weights[n].square().sum()) for n, f in fits.items()))
        arm.curve("accuracy", x=list(levels), y=fitted)
        for b, after, m in zip(levels, fitted, mse, strict=True):
            arm.log(**{f"at_{b}": after, f"mse_{b}": m / len(weights)})
        if searched:
            quantised = apply_ranges(model, RangePlan({name: _by_channel(arm.name, w, 2) for name, w in weights.items()}))
            arm.log(channel_2=accuracy(reestimate_bn(quantised, images), task))

    for arm in trial.arms("golden", "golden_alone", "grid1000"):
        weights = _weights(trial.shared("resnet", lambda: resnet(trial, task)))
        fine = {"grid": trial.scale(smoke=200, laptop=1000), "tol": 1.0}
        settings = {"golden": {}, "golden_alone": {"grid": 0}, "grid1000": fine}[arm.name]
        fits = {name: estimate_range(w, 4, **settings) for name, w in weights.items()}  # type: ignore[arg-type]
        arm.log(error=sum(f.error for f in fits.values()), evaluations=max(f.evaluations for f in fits.values()))
        if arm.name == "grid1000":
            for i, name in enumerate(list(weights)[1:8:3]):
                w, m = weights[name].double(), float(weights[name].abs().max())
                shares = torch.linspace(0.1, 1, 91).tolist()
                y = [float((RangeFit(4, (a * m,)).values(w) - w).square().sum() / w.square().sum()) for a in shares]
                arm.curve(f"valley_{i}", x=shares, y=y)
                arm.curve(f"found_{i}", x=estimate_range(w, 4).alpha, y=[estimate_range(w, 4).error / float(w.square().sum())])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach().cpu() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def _by_channel(arm: str, w: Tensor, bits: int) -> RangeFit:
    if arm == "minmax":
        return RangeFit(bits, tuple(w.abs().flatten(1).amax(1).clamp_min(1e-12).tolist()))
    return estimate_range(w, bits, per="channel", power=None if arm == "requant" else 1.0)


def _percentile(size: Tensor, q: float) -> float:
    return float(size.kthvalue(max(1, round(q * len(size)))).values / size.max())


def _reach(w: Tensor, bits: int, share: float) -> RangeFit:
    return RangeFit(bits, (max(float(w.abs().max()) * share, 1e-12),), (share,))


def _entropy(size: Tensor, bits: int, bins: int = 2048) -> float:
    """The share whose quantised histogram is closest to the clipped one in relative entropy (the rule of TensorRT and onnxruntime)."""
    levels = 2 ** (bits - 1)
    counts = torch.histc(size.double(), bins, 0, float(size.max()))
    best, share = float("inf"), 1.0
    for edge in range(max(levels, bins // 32), bins + 1, bins // 64):
        kept = counts[:edge].clone()
        p = kept.clone()
        p[-1] += counts[edge:].sum()
        group = (torch.arange(edge) * levels) // edge
        full = (kept > 0).double()
        mean = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, kept)
        mean /= torch.zeros(levels, dtype=torch.float64).index_add_(0, group, full).clamp_min(1)
        q = mean[group] * full
        p, q = p / p.sum(), (q + 1e-10) / (q + 1e-10).sum()
        there = p > 0
        divergence = float((p[there] * (p[there] / q[there]).log()).sum())
        if divergence < best:
            best, share = divergence, edge / bins
    return share


def _observer(w: Tensor, bits: int) -> RangeFit:
    from torch.ao.quantization.observer import HistogramObserver

    q = 2 ** (bits - 1) - 1
    observer = HistogramObserver(quant_min=-q, quant_max=q, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    observer(w)
    return _reach(w, bits, q * float(observer.calculate_qparams()[0]) / float(w.abs().max()))


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "minmax": "min-max", "percentile": "99.99 %", "sigma": "3 sigma", "entropy": "entropy", "observer": "torch's observer",
        "alpha_only": "searched range", "requant": "searched and reshaped",
    }  # fmt: skip
    colours = ("#999999", "#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00")
    fig.set_size_inches(9.5, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    for (arm, label), colour in zip(names.items(), colours, strict=True):
        curves = record.curves(arm, "accuracy")
        x = -torch.tensor(curves[0][0])
        values = 100 * torch.stack([torch.as_tensor(y) for _, y in curves])
        spread = values.std(0) if len(values) > 1 else 0 * values[0]
        left.errorbar(x, values.mean(0), spread, label=label, color=colour, marker="o", markersize=4, capsize=2)
    left.set_xticks((-8, -6, -4, -3, -2), ("8", "6", "4", "3", "2"))
    dense = 100 * record.mean("fp32", "accuracy")
    left.axhline(dense, color="black", linewidth=0.8, linestyle=":")
    left.text(-8, dense + 1, "float", fontsize=8)
    left.set(xlabel="bits a weight", ylabel="test accuracy (%)", title="ResNet-8, weights quantised, BatchNorm re-estimated")
    left.legend(fontsize=8, loc="lower left")
    for i in range(3):
        (x, y), (at, value) = (record.curves("grid1000", f"{name}_{i}")[0] for name in ("valley", "found"))
        right.semilogy(x, y, color=colours[2 + i], linewidth=1.5)
        right.semilogy(at, value, "o", color="black", markersize=5, label="golden section" if i == 0 else None)
    right.set(xlabel="range, share of the largest weight", ylabel="squared error / squared weight", title="One valley a layer (4 bits)")
    right.legend(fontsize=8)
