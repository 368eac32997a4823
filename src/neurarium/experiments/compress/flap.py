"""FLAP on a character GPT: perplexity after removing 20, 30 and 50 % of the units' parameters, nothing trained afterwards.

All arms prune the same trained network and see the same 128 windows of training text. ``flap`` ranks heads and feed-forward units of all
layers together; ``flap_mm`` ranks the two kinds apart; the ``_ul`` arms give every layer the same share, as do the baselines. Latency is
measured at 50 %, interleaved with the dense model.
"""

from __future__ import annotations

from functools import partial
from math import exp
from typing import TYPE_CHECKING

import torch
from torch import nn

from neurarium import meter
from neurarium.compress import TransformerBlocks, calibrate, flap, magnitude_sp, wanda_sp
from neurarium.experiments.compress import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

RATIOS = (0.2, 0.3, 0.5)
METHODS = {
    "flap": partial(flap, structure="AL-AM"),
    "flap_mm": partial(flap, structure="AL-MM"),
    "flap_ul": partial(flap, structure="UL-UM"),
    "flap_ul_nobias": partial(flap, structure="UL-UM", bias=False),
    "ifv_ul": partial(flap, structure="UL-UM", metric="IFV"),
    "wanda_sp": wanda_sp,
    "magnitude_sp": magnitude_sp,
}
LAYER = "blocks.1"


def run(trial: Trial) -> None:
    for arm in trial.arms("dense", *METHODS, "random"):
        net = trial.shared("gpt", lambda: zoo.gpt(trial))
        loader = net.loader(trial.scale(smoke=16, laptop=128), seed=trial.seed)
        rows = trial.scale(smoke=20, laptop=250)
        if arm.name == "dense":
            models = [net.model] * len(RATIOS)
        elif arm.name == "random":
            models = [at_random(net.model, ratio, trial.seed) for ratio in RATIOS]
        else:
            with arm.timed("prune_seconds"):
                models = [METHODS[arm.name](net.model, loader, ratio=ratio) for ratio in RATIOS]
        arm.log(ppl=[exp(net.loss(m, rows)) for m in models], parameters=[meter.parameters(m) for m in models])
        if arm.name in ("dense", "flap"):
            x = net.test[: 16 * net.model.context].view(16, -1)
            with torch.no_grad():
                time = meter.latency({"dense": net.model, "small": models[-1]}, x, repeats=trial.scale(smoke=3, laptop=30))
            arm.log_timed(latency=time["small"].median, dense_latency=time["dense"].median)
        if arm.name in METHODS:
            share = [[len(m.plan.kept[k]) / n for k, n in m.plan.sizes.items() if k.endswith("heads")] for m in models]
            arm.log(heads_kept=[sum(s) / len(s) for s in share])
        if arm.name == "flap_ul":
            stats = calibrate(net.model, loader, modules=[f"{LAYER}.down"])[f"{LAYER}.down"]
            stays = torch.zeros(len(stats.mean), dtype=torch.bool)
            stays[list(models[1].plan.kept[f"{LAYER}.ffn"])] = True
            length = net.model.get_submodule(f"{LAYER}.down").weight.detach().double().norm(dim=0)
            for name, which in (("kept", stays), ("removed", ~stays)):
                at = which.nonzero()[:, 0]
                arm.curve(name, x=(length * stats.mean)[at].tolist(), y=(length * stats.variance.sqrt())[at].tolist())


def at_random(model: nn.Module, ratio: float, seed: int) -> nn.Module:
    """The same share of each group, whichever units."""
    blocks, draw = TransformerBlocks.of(model), torch.Generator().manual_seed(seed)
    return blocks.remove({k: torch.randperm(n, generator=draw)[: round((1 - ratio) * n)] for k, n in blocks.sizes().items()})


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "flap_ul": ("FLAP, every layer alike", "#0072B2", "-"), "flap_ul_nobias": ("without the bias", "#56B4E9", "--"),
        "flap_mm": ("FLAP, heads and units apart", "#009E73", "-"), "flap": ("FLAP, all units together", "#D55E00", "-"),
        "ifv_ul": ("variance alone", "#CC79A7", ":"), "wanda_sp": ("Wanda-sp", "#E69F00", "-"),
        "magnitude_sp": ("magnitude", "#999999", "-"), "random": ("random", "#000000", ":"),
    }  # fmt: skip
    fig.set_size_inches(10, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.25))
    for name, colour, label in (("kept", "#0072B2", "stay"), ("removed", "#D55E00", "go, their mean becomes a bias")):
        if curves := record.curves("flap_ul", name):
            left.scatter(*curves[0], s=9, color=colour, alpha=0.7, label=label, linewidths=0)
    left.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="mean x length of its column", ylabel="standard deviation x length of its column", yscale="log")
    left.set_title("The feed-forward units of one block, 30 %", fontsize=10)
    left.legend(fontsize=8)
    x = [100 * r for r in RATIOS]
    for i, (arm, (label, colour, style)) in enumerate(names.items()):
        if arm in record.arms:
            values = record.values(arm, "ppl")
            spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
            places = [v + 0.3 * (i - 3.5) for v in x]
            right.errorbar(places, values.mean(0), spread, label=label, color=colour, linestyle=style, marker="o", markersize=4, capsize=2)
    dense = record.mean("dense", "ppl")[0]
    right.axhline(dense, color="black", linewidth=0.8, linestyle=":")
    right.text(x[0] - 1.5, dense * 1.005, "dense", fontsize=8, va="bottom")
    right.set(xlabel="parameters of heads and units removed (%)", ylabel="perplexity of a character", yscale="log")
    right.set_title("Held-out text, nothing trained", fontsize=10)
    right.legend(fontsize=8)
