"""Sorted fine-tuning of a character decoder against fine-tuning as usual.

A decoder of eight layers is pretrained on one text, once for all seeds, as one fine-tunes a released checkpoint. Every arm fine-tunes it
on another text from the same weights, on the same batches, with the same schedule. ``sft`` asks the last layer alone, ``soft`` all depths
of B; ``sft_ict`` is ``sft``, after which each early depth trains a norm and head of its own on the frozen body for as many steps again;
``alone`` is a model of half the depth, pretrained and fine-tuned as often; ``soft_own_heads`` gives every depth of ``soft`` a norm and head
of its own.

Bits per character are of held-out text at every position. Tokens per second are of real generation with a cache, after a warm-up, depths
interleaved. Exits per token: thresholds on the likeliest character; accuracy of the character after held-out windows.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.sorted_llm import SortedFineTuning
from neurarium.dynamic.staged import dense, pick
from neurarium.dynamic.train import fit_policy
from neurarium.experiments.compress.zoo import next_token_loss
from neurarium.experiments.dynamic.zoo import Language, bits_per_character, characters, language, train, trained
from neurarium.meter import flops, latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

ARMS = ("sft", "soft", "sft_ict", "soft_own_heads", "alone")
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 2.0)
RATE = 8e-3  # the best of 1, 2, 4, 8 and 16 e-3 for fine-tuning as usual, and for sorted fine-tuning too
PRETRAINING_RATE = 8e-3
ROWS = 12

LABELS = {
    "soft": "sorted fine-tuning, shared head",
    "sft": "fine-tuned as usual",
    "sft_ict": "as usual, then early heads",
    "soft_own_heads": "sorted, a head for each depth",
    "alone": "half as deep, trained alone",
}
COLOURS = dict(zip(LABELS, ("#d55e00", "#555555", "#0072b2", "#cc79a7", "#009e73")))


def run(trial: Trial) -> None:
    depths = trial.scale(smoke=(1, 2, 4), laptop=(2, 3, 4, 5, 6, 8))
    steps, context = trial.scale(smoke=(15, 32), laptop=(160, 64))
    half, full = depths[-1] // 2, depths[-1]

    def texts() -> tuple[dict[str, Language], str]:
        return trial.shared("texts", lambda: language(characters(trial, "wikitext-2", "tiny-shakespeare")))

    def pretrained(layers: int) -> Decoder:
        return deepcopy(trial.shared(f"pretrained{layers}", lambda: checkpoint(trial, *texts(), layers, context)))

    def tuned(policy: SortedFineTuning, *, fresh: int = 0) -> SortedFineTuning:
        batches = texts()[0]["tiny-shakespeare"].batches(context, steps, ROWS, seed=trial.seed + 1000 * (1 + fresh))
        schedule = partial(OneCycleLR, max_lr=RATE, total_steps=steps)
        fit_policy(policy, batches, epochs=1, optimizer=partial(AdamW, lr=RATE), schedule=schedule, seed=trial.seed)
        return policy.eval()

    def usual() -> Decoder:
        """The model itself; what reads it at other depths is up to the arm."""
        return tuned(SortedFineTuning(pretrained(full), (full,))).staged.model

    for arm in trial.arms(*ARMS):
        task = texts()[0]["tiny-shakespeare"]
        if arm.name == "alone":
            policy = tuned(SortedFineTuning(pretrained(half), (half,)))
        elif arm.name == "soft":
            policy = tuned(SortedFineTuning(pretrained(full), depths))
        elif arm.name == "soft_own_heads":
            policy = tuned(SortedFineTuning(pretrained(full), depths, shared_head=False))
        else:
            policy = SortedFineTuning(deepcopy(trial.shared("usual", usual)), depths, shared_head=arm.name == "sft").eval()
            if arm.name == "sft_ict":
                policy.staged.model.requires_grad_(False)
                tuned(policy, fresh=1)
        bits, right = judge(policy, *task.held_out(context, trial.scale(smoke=20, laptop=250)))
        known = dict(zip(policy.depths, bits))
        arm.log(layers=list(policy.depths), bpc=bits, accuracy=right, bpc_half=known[half])
        if arm.name != "alone":
            arm.log(bpc_full=known[full])
        if arm.name in ("sft", "soft"):
            ids, target = task.batches(context, 1, ROWS, seed=trial.seed)[0]
            asked = policy if arm.name == "soft" else SortedFineTuning(policy.staged.model, (full,))
            arm.log(step_flops=flops(lambda asked=asked, ids=ids, target=target: asked.loss(ids, target).backward()))
            speed(arm, policy, ids[:, : context // 4], half, trial.scale(smoke=1, laptop=5))
        if arm.name != "alone":
            arm.log(**exits(policy, task, context, trial.scale(smoke=40, laptop=800)))


def checkpoint(trial: Trial, known: dict[str, Language], vocabulary: str, layers: int, context: int) -> Decoder:
    """A decoder pretrained under one seed for all trials, kept on disk."""
    text, steps, width = known["wikitext-2"], *trial.scale(smoke=(20, 32), laptop=(800, 64))

    def make() -> nn.Module:
        model = Decoder(len(vocabulary), width=width, layers=layers, context=context)
        for name, module in model.named_modules():  # the usual scales for a width as small as this
            if isinstance(module, nn.Linear) and name != "head":
                into_the_stream = name.endswith((".o", ".down"))
                nn.init.normal_(module.weight, std=(0.35 if into_the_stream else 1) * module.in_features**-0.5)
        nn.init.normal_(model.token.weight, std=0.3)
        nn.init.normal_(model.position.weight, std=0.1)
        return model

    def fit(model: nn.Module) -> None:
        train(model, text.batches(context, steps, ROWS, seed=0), epochs=1, lr=PRETRAINING_RATE, loss=next_token_loss, clip=1.0)

    once: Any = SimpleNamespace(seed=0, name=trial.name, device=trial.device)
    mark = hashlib.sha256(text.train.numpy().tobytes()).hexdigest()
    model = trained("sorted-checkpoint", once, make, fit, text=mark, layers=layers, context=context, steps=steps, width=width)
    assert isinstance(model, Decoder)
    return model


@torch.no_grad()
def judge(policy: SortedFineTuning, ids: Tensor, target: Tensor) -> tuple[list[float], list[float]]:
    """Bits per character, and the share of characters that were the likeliest, at each depth."""
    staged, h = policy.staged, policy.staged.start(ids)
    bits, right = [], []
    for k in range(staged.n_stages):
        h = staged.parts.run(h, staged.span(k))
        logits = staged.read(k, h)
        bits.append(bits_per_character(logits, target))
        right.append(float((logits.argmax(-1) == target).double().mean()))
    return bits, right


def speed(arm: Any, policy: SortedFineTuning, prompt: Tensor, half: int, repeats: int) -> None:
    """Tokens per second at each depth, and with exits per token; the context is filled."""
    new = 1 + policy.parts.context - prompt.shape[1]
    calls = {str(d): partial(policy.generate, prompt, max_new_tokens=new, depth=d) for d in policy.depths}
    calls["exits"] = partial(policy.generate, prompt, max_new_tokens=new, threshold=0.7)
    calls["loop"] = partial(policy.generate, prompt[:1], max_new_tokens=new, threshold=0.7)
    timings = latency(calls, repeats=repeats, warmup=1)
    rate = {name: (1 if name == "loop" else len(prompt)) * new / t.median for name, t in timings.items()}
    arm.log_timed(tokens_per_s=[rate[str(d)] for d in policy.depths], rate_half=rate[str(half)], rate_full=rate[str(policy.depths[-1])])
    arm.log_timed(rate_exits=rate["exits"], rate_exits_alone=rate["loop"])
    arm.log(exit_depth=float(calls["exits"]().depth.double().mean()))


@torch.no_grad()
def exits(policy: SortedFineTuning, task: Language, context: int, rows: int) -> dict[str, list[float]]:
    """Mean layers and accuracy at each threshold, on the character after ``rows`` held-out windows."""
    starts = torch.linspace(0, len(task.test) - context - 1, rows).long()
    windows = task.test[starts[:, None] + torch.arange(context + 1)]
    readouts, scores = (torch.cat(p) for p in zip(*(dense(policy.staged, policy.gate, w) for w in windows[:, :-1].split(200))))
    depths, layers, right = torch.tensor(policy.depths).double(), [], []
    for threshold in THRESHOLDS:
        answer, choice, _ = pick(readouts, scores, policy.setting(windows, threshold=threshold))
        layers.append(float(depths[choice].mean()))
        right.append(float((answer.argmax(-1) == windows[:, -1]).double().mean()))
    return {"exit_layers": layers, "exit_accuracy": right}


def figure(record: RecordView, fig: Figure) -> None:
    """Bits per character against depth, speed against depth, and exits per token."""
    fig.set_size_inches(12, 4)
    quality, rate, tokens = fig.subplots(1, 3)
    for arm, label in LABELS.items():
        if arm not in record.arms:
            continue
        x, y = record.values(arm, "layers")[0], record.values(arm, "bpc")
        style = {"color": COLOURS[arm], "marker": "*" if arm == "alone" else "o", "ms": 11 if arm == "alone" else 5, "capsize": 2}
        quality.errorbar(x, y.mean(0), yerr=y.std(0), ls="" if arm == "alone" else "-", label=label, **style)
    quality.set(xlabel="layers", ylabel="bits per character", title="What each depth can do")
    quality.legend(fontsize=8)
    for arm in ("soft", "sft"):
        if arm not in record.arms:
            continue
        speeds, layers = record.values(arm, "tokens_per_s"), record.values(arm, "layers")[0]
        if arm == "soft":
            rate.errorbar(layers, speeds.mean(0), yerr=speeds.std(0), color=COLOURS[arm], marker="o", ms=5, capsize=2, label="fixed depth")
            where, fast = record.mean(arm, "exit_depth"), record.mean(arm, "rate_exits")
            rate.plot([where], [fast], color="#009e73", marker="D", ls="", ms=7, label="exits per token, threshold 0.7")
    rate.set(xlabel="layers (mean)", ylabel="tokens per second, 12 rows", title="Generation with a cache", ylim=(0, None))
    rate.legend(fontsize=8)
    for arm in ("soft", "sft_ict", "sft"):
        if arm in record.arms:
            x, y = record.values(arm, "exit_layers"), record.values(arm, "exit_accuracy")
            order = np.argsort(x.mean(0))
            tokens.errorbar(
                x.mean(0)[order], y.mean(0)[order], yerr=y.std(0)[order], color=COLOURS[arm], marker="o", ms=4, capsize=2, label=LABELS[arm]
            )
    tokens.set(xlabel="layers (mean)", ylabel="accuracy of the next character", title="Each token stops where it is sure")
    tokens.legend(fontsize=8, loc="lower right")
    for ax in (quality, rate, tokens):
        ax.grid(alpha=0.25)
    fig.tight_layout()
