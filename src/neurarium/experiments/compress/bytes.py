"""How many bytes buy how much accuracy? One convolutional network, saved in nine papers' forms.

Every method starts from the same trained network and may train for one epoch on the same 4,000 images: those that learn while they compress
do so then, the others are fine-tuned afterwards in their compressed form, and post-training codes (REQuant) only re-estimate their batch
normalisation. The bytes are those of what would be saved: packed codes with tables and scales, thin factors, and for zeros a bit a weight
that says where they are; fixed-point words at their length. Biases, norms and what a method leaves alone stay in float32 and count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress import (
    AdaPT,
    alds,
    binarize,
    chita,
    dgms,
    gblr,
    pack_binary,
    plan_bits,
    prepare_qat,
    quantize_integer,
    requant,
    set_stage,
    trp,
)
from neurarium.compress.plan import MaskedConv2d, MaskedLinear
from neurarium.compress.quant.packing import packed_bytes
from neurarium.data import ImageTask
from neurarium.experiments.compress.zoo import Augmented, accuracy, cifar, finetune, reestimate_bn, vgg
from neurarium.meter import stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

LR = 0.02
#: arm -> label
NAMES = {
    "dense": "float32", "chita_90": "CHITA, 90 % zeros", "requant_4": "REQuant, 4 bits", "requant_3": "REQuant, 3 bits",
    "dgms_4": "DGMS, 4 bits", "dgms_2": "DGMS, 2 bits", "hawq_mixed": "HAWQ-V3, 4 and 8 bits", "adapt": "AdaPT", "biper": "BiPer, 1 bit",
    "alds_40": "ALDS, 40 %", "alds_20": "ALDS, 20 %", "trp": "TRP", "gblr": "Gaudi-GBLR (linear layers)",
}  # fmt: skip


def run(trial: Trial) -> None:
    task = cifar(trial)
    short = replace(task, train=task.train.split(trial.scale(smoke=0.5, laptop=0.4), trial.seed)[0])
    x, y = short.train.x[: trial.scale(smoke=64, laptop=512)], short.train.y[: trial.scale(smoke=64, laptop=512)]
    steps = len(Augmented(short.train))

    def batches() -> Augmented:
        return Augmented(short.train, seed=trial.seed)

    def tuned(model: nn.Module) -> nn.Module:
        return finetune(model, short, epochs=1, lr=LR, seed=trial.seed)

    optimizer = partial(SGD, lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = partial(OneCycleLR, max_lr=LR, total_steps=steps)
    methods: dict[str, Callable[[nn.Module], nn.Module]] = {
        "dense": tuned,
        "chita_90": lambda m: tuned(chita(m, [(x, y)], sparsity=0.9, samples=min(len(x), 200), ridge=1e-3)),
        "requant_4": lambda m: reestimate_bn(requant(m, bits=4), x),
        "requant_3": lambda m: reestimate_bn(requant(m, bits=3), x),
        "dgms_4": lambda m: dgms(m, batches(), components=16, epochs=1, lr=1e-3, seed=trial.seed),
        "dgms_2": lambda m: dgms(m, batches(), components=4, epochs=1, lr=1e-3, seed=trial.seed),
        "hawq_mixed": lambda m: _integer(trial, m, short, x, y),
        "adapt": lambda m: _adaptive(m, batches(), trial.seed),
        "biper": lambda m: _binary(m, short, trial.seed),
        "alds_40": lambda m: tuned(alds(m, keep=0.4)),
        "alds_20": lambda m: tuned(alds(m, keep=0.2)),
        "trp": lambda m: trp(
            m, batches(), epochs=1, energy=0.9, period=5, nuclear=1e-2, optimizer=optimizer, schedule=schedule, seed=trial.seed
        ),
        "gblr": lambda m: gblr(m, batches(), budget=0.3, epochs=1, optimizer=optimizer, schedule=schedule, packed=True, seed=trial.seed),
    }
    for arm in trial.arms(*NAMES):
        model = trial.shared("vgg", partial(vgg, trial, task))
        small = methods[arm.name](model).eval()
        arm.log(accuracy=accuracy(small, task), bytes=saved(small), share=saved(small) / stored_bytes(model))


def _integer(trial: Trial, model: nn.Module, short: ImageTask, x: Tensor, y: Tensor) -> nn.Module:
    """4 or 8 bits a layer by the integer program, an epoch of training with the quantiser, then integers."""
    whole = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    probes = trial.scale(smoke=2, laptop=16)
    plan = plan_bits(model, [(x[:256], y[:256])], budget={"bytes": 0.6 * whole}, probes=probes, seed=trial.seed)
    trained = finetune(prepare_qat(model, [(x, y)], bits=plan), short, epochs=1, lr=LR / 10, seed=trial.seed)
    return quantize_integer(trained, [(x, y)], bits=plan)


def _adaptive(model: nn.Module, loader: Augmented, seed: int) -> nn.Module:
    """Fixed point; each layer is left with the length of its words as `word`. Starts from 16 bits, since the weights are trained."""
    optimizer = partial(SGD, lr=LR, momentum=0.9)
    result = copy.deepcopy(model).train()
    history = AdaPT(optimizer=optimizer, init=(16, 8)).fit(result, loader, epochs=1, seed=seed)
    for name, module in result.named_modules():
        if f"word/{name}" in history.extra:
            module.word = int(history.extra[f"word/{name}"][-1])  # type: ignore[assignment]
    return result.eval()


def _binary(model: nn.Module, short: ImageTask, seed: int) -> nn.Module:
    """Weights of one bit, inputs real: half of the images with the sine, half with its sign."""
    parts = short.train.split(0.5, seed)
    student = binarize(model, activations=None).train()
    for stage, part in zip((1, 2), parts, strict=True):
        finetune(set_stage(student, stage), replace(short, train=part), epochs=1, lr=LR, seed=seed)
    return pack_binary(student)


def saved(model: nn.Module) -> int:
    """Bytes of the model's state; a masked weight as a bit a position and the numbers that are left."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear | MaskedConv2d):
            prefix = f"{name}." if name else ""
            mask = state.pop(f"{prefix}mask").bool()
            state[f"{prefix}weight"] = module.weight.detach()[mask]
            state[f"{prefix}where"] = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
        elif word := getattr(module, "word", None):
            for tensor in ("weight", "bias"):
                if (codes := state.get(f"{name}.{tensor}")) is not None:
                    state[f"{name}.{tensor}"] = torch.empty(packed_bytes(codes.numel(), word), dtype=torch.uint8)
    return stored_bytes(state)


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(8.5, 5)
    ax = fig.subplots()
    points = [(record.mean(a, "bytes") / 1024, 100 * record.mean(a, "accuracy"), a) for a in record.arms]
    best = -1.0
    front = []
    for size, accuracy_, _ in sorted(points):
        if accuracy_ > best:
            best = accuracy_
            front.append((size, accuracy_))
    ax.step(*zip(*front, strict=True), where="post", color="#999999", linewidth=1, zorder=0)
    colours = (
        "#000000",
        "#E69F00",
        "#0072B2",
        "#0072B2",
        "#56B4E9",
        "#56B4E9",
        "#009E73",
        "#F0E442",
        "#D55E00",
        "#CC79A7",
        "#CC79A7",
        "#882255",
        "#44AA99",
    )
    markers = "osDvD" + "v" + "^Xp" + "hHdP"
    for (size, mean, arm), colour, marker in zip(points, colours, markers, strict=False):
        spread = 100 * record.values(arm, "accuracy").std(ddof=1) if len(record.seeds) > 1 else 0
        label = f"{NAMES[arm]}: {mean:.1f} % in {size:.0f} KiB"
        ax.errorbar(size, mean, spread, fmt=marker, color=colour, markeredgecolor="black", markeredgewidth=0.4, capsize=3, label=label)
    ax.set_xscale("log", base=2)
    ticks = [2**k for k in range(11) if min(p[0] for p in points) * 0.8 <= 2**k <= max(p[0] for p in points) * 1.2]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set(xlabel="saved bytes (KiB)", ylabel="test accuracy (%)", title="One network in nine papers' forms, one epoch of training each")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
