"""DSnoT on a character GPT: the loss before and after its swaps, from three kinds of masks at four sparsities.

Every linear map of the blocks is pruned within its rows; the swaps are made in the second feed-forward maps, whose inputs come from a ReLU
and so have means (``all_layers`` makes them everywhere). Beside it: the swaps without the variance, without the rule of the sign, as
many swaps at random, and no swaps but the whole mean error added to the bias (``mean_in_bias``): what the mean alone is worth.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neurarium.compress import MaskPlan, apply, calibrate, dsnot, magnitude, sparsegpt, wanda
from neurarium.compress.prune.dsnot import row_error
from neurarium.experiments.compress import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
STARTS = ("wanda", "magnitude", "sparsegpt")
SWAPS: dict[str, dict] = {
    "dsnot": {},
    "no_variance": {"var_power": 0.0},
    "no_sign_rule": {"same_sign": False},
    "all_layers": {"modules": None},
}
BINS = torch.linspace(-0.3, 0.3, 41)


def run(trial: Trial) -> None:
    after = {"wanda_dsnot": ("wanda", "dsnot"), "magnitude_dsnot": ("magnitude", "dsnot"), "sparsegpt_dsnot": ("sparsegpt", "dsnot")}
    after |= {name: ("wanda", name) for name in ("no_variance", "no_sign_rule", "all_layers", "random_swaps", "mean_in_bias")}
    for arm in trial.arms("dense", *STARTS, *after):
        net = trial.shared("gpt", lambda: zoo.gpt(trial))
        loader, rows = net.loader(trial.scale(smoke=16, laptop=128), seed=trial.seed), trial.scale(smoke=20, laptop=250)
        if arm.name == "dense":
            arm.log(loss=net.loss(net.model, rows))
            continue
        start, how = after.get(arm.name, (arm.name, ""))
        models = trial.shared(start, partial(pruned, net.model, loader, start))
        layers = [n for n, _ in net.model.named_modules() if n.endswith(".down")]
        mean = {n: s.mean for n, s in calibrate(net.model, loader, modules=layers).items()}
        seconds = time.perf_counter()
        if how == "mean_in_bias":
            with torch.no_grad():
                for m, n in ((m, n) for m in models for n in layers):
                    m.get_submodule(n).bias += error(net.model, m, n, mean).float()
        elif how == "random_swaps":
            models = [at_random(m, dsnot(m, net.model, loader, **options(how)), net.model, trial.generator()) for m in models]
        elif how:
            models = [dsnot(m, net.model, loader, **options(how)) for m in models]
        seconds = time.perf_counter() - seconds
        arm.log(loss=[net.loss(m, rows) for m in models])
        if arm.name in ("wanda", "wanda_dsnot"):
            found = [torch.cat([error(net.model, m, n, mean) for n in layers]) for m in models]
            arm.log(row_error=[float(e.abs().mean()) for e in found])
            counts = torch.histogram(found[2].float().clamp(-0.299, 0.299), BINS).hist
            arm.curve("errors", x=((BINS[1:] + BINS[:-1]) / 2).tolist(), y=(counts / counts.sum()).tolist())
        if arm.name == "wanda_dsnot":
            arm.log_timed(dsnot_seconds=seconds / len(models), backward_seconds=backward(net.model, loader))


def options(how: str) -> dict:
    return {"modules": ["down"], "cycles": 0.05} | SWAPS.get(how, {})


def pruned(model: nn.Module, loader: list, start: str) -> list[nn.Module]:
    """One model a sparsity, pruned within rows."""
    if start == "magnitude":
        return [magnitude(model, sparsity=s, scope="row") for s in SPARSITIES]
    method = {"wanda": wanda, "sparsegpt": partial(sparsegpt, sequential=False)}[start]
    return [method(model, loader, sparsity=s, scope="row") for s in SPARSITIES]


def error(dense: nn.Module, sparse: nn.Module, name: str, mean: dict[str, Tensor]) -> Tensor:
    """The mean error of each output of a layer."""
    return row_error(dense.get_submodule(name).weight, sparse.get_submodule(name).weight, mean[name])


def at_random(start: nn.Module, swapped: nn.Module, dense: nn.Module, draw: torch.Generator) -> nn.Module:
    """As many swaps in each row as DSnoT made, whichever weights."""
    masks, values = {}, {}
    for name, module in swapped.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "mask"):
            old = start.get_submodule(name).mask
            made = (module.mask & ~old).sum(1, keepdim=True)
            noise = torch.rand(old.shape, generator=draw)
            back, gone = (torch.where(which, noise, 2.0).argsort(1).argsort(1) < made for which in (~old, old))
            masks[name] = (old | back) & ~gone
            before, full = (m.get_submodule(name).weight.detach() for m in (start, dense))
            values[name] = torch.where(old, before, full) * masks[name]
    return apply(start, MaskPlan(masks, values))


def backward(model: nn.Module, loader: list) -> float:
    """Seconds of one forward and backward pass over the calibration set."""
    seconds = time.perf_counter()
    for x, y in loader:
        zoo.next_token_loss(model(x), y).backward()
    model.zero_grad()
    return time.perf_counter() - seconds


def figure(record: RecordView, fig: Figure) -> None:
    colours = {"wanda": "#0072B2", "magnitude": "#999999", "sparsegpt": "#E69F00"}
    names = {"wanda": "Wanda", "magnitude": "magnitude", "sparsegpt": "SparseGPT"}
    fig.set_size_inches(11, 4)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
    x = [100 * s for s in SPARSITIES]
    for arm, colour in colours.items():
        for name, style, label in ((arm, "-", names[arm]), (f"{arm}_dsnot", "--", f"{names[arm]} + swaps")):
            if name in record.arms:
                left.plot(x, record.values(name, "loss").mean(0), style, color=colour, label=label, marker="o", markersize=3)
    left.axhline(record.mean("dense", "loss"), color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="weights removed (%)", ylabel="held-out loss (nats a character)")
    left.set_title("Three starts, solid; after the swaps, dashed", fontsize=10)
    left.legend(fontsize=7)
    kinds = {
        "wanda_dsnot": ("DSnoT", "#009E73"), "no_variance": ("without variance", "#56B4E9"),
        "no_sign_rule": ("without sign rule", "#D55E00"), "all_layers": ("in all layers", "#CC79A7"),
        "random_swaps": ("random swaps", "#000000"), "mean_in_bias": ("no swaps, mean into the bias", "#E69F00"),
    }  # fmt: skip
    for i, (arm, (label, colour)) in enumerate(kinds.items()):
        if arm in record.arms:
            gain = record.values("wanda", "loss") - record.values(arm, "loss")
            spread = gain.std(0, ddof=1) if len(gain) > 1 else 0 * gain[0]
            places = [v + 0.5 * (i - 2.5) for v in x]
            middle.errorbar(places, gain.mean(0), spread, color=colour, label=label, marker="o", markersize=4, capsize=2)
    middle.axhline(0, color="black", linewidth=0.8)
    middle.set(xlabel="weights removed (%)", ylabel="loss gained over Wanda (nats)")
    middle.set_yscale("symlog", linthresh=0.02)
    middle.set_title("What the swaps are worth", fontsize=10)
    middle.legend(fontsize=6, loc="lower left", framealpha=0.6)
    for arm, colour, label in (("wanda", "#0072B2", "Wanda"), ("wanda_dsnot", "#009E73", "after the swaps")):
        if curves := record.curves(arm, "errors"):
            right.step(curves[0][0], curves[0][1], where="mid", color=colour, label=label)
    right.set(xlabel="mean error of a row's output", ylabel="share of rows", yscale="log")
    right.set_title("Second feed-forward maps, 70 %", fontsize=10)
    right.legend(fontsize=7)
