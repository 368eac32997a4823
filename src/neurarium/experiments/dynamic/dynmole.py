"""A small decoder, pretrained on Shakespeare and frozen, is tuned on a mixture of four kinds of text by low-rank experts.

All arms have about as many trainable weights: one LoRA of the experts' ranks together, or experts with different routers. They see the same
batches. The learning rate is the best of 0.005, 0.01 and 0.02 for LoRA, MoLA and DynMoLE alike, on other seeds; the other arms use it
untuned. While it learns, a model is judged on the same held-out text as at the end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.dynamic.lora_experts import DynMoLE, mole_transform, tsallis_entropy
from neurarium.experiments.dynamic.zoo import Language, bits_per_character, characters, decoder, language
from neurarium.meter import flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

LAYERS, WIDTH, CONTEXT = 4, 64, 32
EXPERTS, RANK, SCALE = 8, 2, 2.0  # alpha / rank
MOLA = (3, 6, 10, 13)  # experts by layer, in the proportion 2:4:6:8 and as many in all as the others have
ENTROPY, BALANCE = 1e-2, 1e-3  # of the mean over layers
TARGETS = ("q", "v", "up", "down")
DOMAINS = ("wikitext", "sms", "upper", "reversed")
NEVER = float("inf")

#: arm -> (learning rate, coefficient of the entropy loss, of the balance loss, options of the layers)
ARMS: dict[str, tuple[float, float, float, dict[str, Any]]] = {
    "lora": (1e-2, 0.0, 0.0, {"experts": 1, "rank": 19}),  # 16 of the experts, 3 for the routers' weights
    "mola": (1e-2, 0.0, BALANCE, {"entropy_threshold": NEVER, "top_p": 0.0, "top_k": 2}),
    "soft": (1e-2, 0.0, 0.0, {"entropy_threshold": -NEVER}),
    "top_p": (1e-2, ENTROPY, BALANCE, {"entropy_threshold": NEVER, "top_k": 1}),
    "dynmole": (1e-2, ENTROPY, BALANCE, {}),
    "no_entropy_loss": (1e-2, 0.0, BALANCE, {}),
}
LABELS = {
    "lora": "LoRA", "mola": "MoLA, top 2", "soft": "all experts", "top_p": "top-p", "dynmole": "DynMoLE",
    "no_entropy_loss": "… no entropy loss",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#555555", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7")))


def run(trial: Trial) -> None:
    steps, rows = trial.scale(smoke=(4, 1), laptop=(180, 2))  # rows of each domain
    every = max(1, steps // 9)

    def prepared() -> tuple[nn.Module, dict[str, Language]]:
        return pretrained(trial)

    for arm in trial.arms(*ARMS):
        base, texts = trial.shared("pretrained", prepared)
        model = tuned(arm.name, base)
        context = base.context
        held = {name: texts[name].held_out(context, rows=trial.scale(smoke=2, laptop=60)) for name in DOMAINS}
        parts = [texts[name].batches(context, steps, rows, seed=trial.seed + i) for i, name in enumerate(DOMAINS)]
        batches = [tuple(torch.cat(pair) for pair in zip(*same)) for same in zip(*parts)]
        seen, spread, at = [judge(model, held)], [], [0]
        lr, entropy, balance, _ = ARMS[arm.name]
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        dispatch(model, "dense")  # the same numbers, and faster for ranks as small as these
        model.train()
        for step, (ids, target) in enumerate(batches, 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids).flatten(0, 1), target.flatten())
            routers = routed(model)
            if entropy or balance:
                loss = loss + torch.stack([m.auxiliary(entropy, balance) for m in routers.values()]).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % every == 0:
                if routers:
                    spread.append(float(np.mean([uncertainty(m) for m in routers.values()])))
                seen.append(judge(model, held))
                at.append(step)
        dispatch(model, "sparse")
        model.eval()
        bits = [bits_per_character(model(ids), target) for ids, target in (held[n] for n in DOMAINS)]
        arm.log(bpc=float(np.mean(bits)), bpc_by_domain=bits)
        arm.curve("bpc", at, seen)
        ids = torch.cat([held[n][0] for n in DOMAINS])
        with torch.no_grad():
            arm.log(
                flops_per_token=flops(model, ids) / ids.numel(), trainable=sum(p.numel() for p in model.parameters() if p.requires_grad)
            )
        arm.log(**usage(model, ids))
        if routers := routed(model):
            arm.curve("spread", at[1:], spread)
            arm.grid("active", by_domain(model, held))
        if arm.name != "lora":
            goal = trial.metric("mola", "bpc") if arm.name != "mola" else seen[-1]
            reached = [s for s, b in zip(at, seen) if b <= goal]
            arm.log(steps_to_mola=reached[0] / steps if reached else 2.0)  # 2: never


def pretrained(trial: Trial) -> tuple[nn.Module, dict[str, Language]]:
    """The decoder, and the four kinds of text that it will be tuned on."""
    raw = characters(trial, "tiny-shakespeare", "wikitext-2", "sms-spam")
    play = raw["tiny-shakespeare"][:400_000]
    backwards = "\n".join(line[::-1] for line in play.split("\n"))
    texts = {"shakespeare": play, "wikitext": raw["wikitext-2"], "sms": raw["sms-spam"], "upper": play.upper(), "reversed": backwards}
    parts, vocabulary = language(texts, longest=trial.scale(smoke=20_000, laptop=400_000))
    trained = decoder(trial, parts["shakespeare"], vocabulary, layers=LAYERS, width=WIDTH, context=CONTEXT, steps=400)
    return trained.model, {name: parts[name] for name in DOMAINS}


def tuned(name: str, base: nn.Module) -> nn.Module:
    """The frozen decoder with an arm's experts."""
    options = {"experts": EXPERTS, "rank": RANK, "dropout": 0.0, **ARMS[name][3]}
    if name == "mola":
        options["experts"] = lambda path: MOLA[int(path.split(".")[1])]
    return mole_transform(base, TARGETS, alpha=SCALE * options["rank"], **options)


def routed(model: nn.Module) -> dict[str, DynMoLE]:
    return {name: m for name, m in model.named_modules() if isinstance(m, DynMoLE) and m.router is not None}


def dispatch(model: nn.Module, how: str) -> None:
    for m in model.modules():
        if isinstance(m, DynMoLE):
            m.dispatch = how


def uncertainty(m: DynMoLE) -> float:
    """Mean entropy of the last batch as a share of the largest."""
    p = m.last_probabilities.detach()
    return float(tsallis_entropy(p, m.entropic_index).mean() / tsallis_entropy(torch.full_like(p[0, 0], 1 / m.experts), m.entropic_index))


@torch.no_grad()
def judge(model: nn.Module, held: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Mean over domains of the bits per character."""
    training = model.training
    model.eval()
    bits = float(np.mean([bits_per_character(model(ids), target) for ids, target in held.values()]))
    model.train(training)
    return bits


@torch.no_grad()
def usage(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Experts a token, how evenly they are used, and how much their number differs between tokens: means over layers."""
    model(ids)
    layers = list(routed(model).values())
    if not layers:
        return {"active": 1.0, "usage_entropy": 1.0, "variance": 0.0}
    entropies = []
    for m in layers:
        share = m.choose(m.last_probabilities.flatten(0, -2)).double().sum(0)
        entropies.append(float(torch.special.entr(share / share.sum()).sum()) / math.log(m.experts))
    active = torch.stack([m.last_active.flatten().double() for m in layers])
    return {"active": float(active.mean()), "usage_entropy": float(np.mean(entropies)), "variance": float(active.var(1).mean())}


@torch.no_grad()
def by_domain(model: nn.Module, held: dict[str, tuple[Tensor, Tensor]]) -> np.ndarray:
    """Mean number of active experts, (domains, layers with experts)."""
    rows = []
    for ids, _ in held.values():
        model(ids)
        rows.append([float(m.last_active.double().mean()) for m in routed(model).values()])
    return np.array(rows)


def figure(record: RecordView, fig: Figure) -> None:
    """Learning curves, quality against cost, routers over time, and active experts by layer and domain."""
    fig.set_size_inches(11, 7.5)
    axes = fig.subplots(2, 2)
    arms = [a for a in LABELS if a in record.arms]
    for arm in arms:
        curves = record.curves(arm, "bpc")
        x, y = (np.mean([np.asarray(c[i]) for c in curves], 0) for i in (0, 1))
        axes[0, 0].plot(x, y, color=COLOURS[arm], label=LABELS[arm])
        cost, bits = record.values(arm, "flops_per_token") / 1e3, record.values(arm, "bpc")
        axes[0, 1].errorbar(cost.mean(), bits.mean(), bits.std(), color=COLOURS[arm], marker="o", capsize=2)
        axes[0, 1].annotate(LABELS[arm], (cost.mean(), bits.mean()), xytext=(4, 4), textcoords="offset points", fontsize=8)
        if arm in ("soft", "top_p", "dynmole", "no_entropy_loss"):
            curves = record.curves(arm, "spread")
            x, y = (np.mean([np.asarray(c[i]) for c in curves], 0) for i in (0, 1))
            axes[1, 0].plot(x, y, color=COLOURS[arm], label=LABELS[arm])
    axes[0, 0].set(xlabel="step", ylabel="bits per character, mean of four domains", title="Tuning")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(xlabel="thousand FLOPs a token, counted", ylabel="bits per character", title="Quality against cost")
    axes[1, 0].axhline(0.9, color="#555555", lw=1, ls=":")
    axes[1, 0].set(xlabel="step", ylabel="entropy / largest", title="How unsure routers are (dotted: mixed softly above)", ylim=(0, 1.03))
    axes[1, 0].legend(fontsize=8)
    for ax in axes.flat[:3]:
        ax.grid(alpha=0.25)
    ax, grid = axes[1, 1], np.mean(record.grids("dynmole", "active"), 0)
    image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=EXPERTS)
    per = grid.shape[1] // LAYERS or 1
    ax.set_xticks(np.arange(grid.shape[1]), list("qvud" * LAYERS)[: grid.shape[1]], fontsize=7)
    for i in range(1, LAYERS):
        ax.axvline(i * per - 0.5, color="white", lw=1.5)
    ax.set_yticks(range(len(DOMAINS)), DOMAINS)
    ax.set(title="Active experts of DynMoLE, blocks from left to right", xlabel="q, v, up, down of each block")
    fig.colorbar(image, ax=ax, label="experts a token")
    fig.tight_layout()
