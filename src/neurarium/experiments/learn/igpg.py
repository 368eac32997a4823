"""Networks written code by code: a zoo of small classifiers of 8x8 digits, and what can be drawn from it.

The zoo has three architectures, three tasks (digits upright, turned, or with exchanged labels) and four families of initialisations; a
fourth task is held out. Within a task the families are different solutions, so codes drawn place by place do not fit together.
Baselines: the same codes drawn independently at each place, the same prior without the task, the task's mean weights, a network of the
zoo plus noise (it only remembers), a random initialisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import data
from neurarium.learn.generate import IGPG, TaskConditioner, WeightGPT
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.learn.zoo import Instruction, ZooNet, accuracies, model_zoo, train_many

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

CHUNK, CODES, TOKENS, NOISE, TEMPERATURE = 64, 768, 1, 0.02, 0.7
RATES, FINE = (3e-3, 1e-2, 3e-2, 1e-1), (0, 3, 6, 12, 24, 45)  # 45 steps of 32 images are one epoch
ARCHITECTURES = {
    "mlp 64 4 10": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10)),
    "mlp 64 16 10": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
    "cnn 1 4 8 10": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 10),
    ),
}  # fmt: skip
HELD_OUT = "upright, other labels"
ARMS = ("igpg", "unconditional", "independent", "retrieved", "task_mean", "one_family_mean", "random_init", "reconstructed", "pretrained")
LABELS = {
    "pretrained": "trained (the zoo)", "reconstructed": "through the codes and back", "retrieved": "of the zoo, plus noise", "igpg": "IGPG",
    "unconditional": "task not told", "independent": "codes independent", "task_mean": "mean of the task",
    "one_family_mean": "mean of one family", "random_init": "random start",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("#000000", "#999999", "#CC79A7", "#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#009E73")))


def run(trial: Trial) -> None:
    tasks = digits(trial.seed)
    known = {name: t for name, t in tasks.items() if name != HELD_OUT}
    nets = trial.scale(smoke=1, laptop=8)
    zoo = trial.shared("zoo", lambda: model_zoo(makers(trial), known, nets=nets, steps=trial.scale(smoke=5, laptop=250), seed=trial.seed))
    model, losses = trial.shared("igpg", lambda: fitted(zoo, tasks, trial))
    cells = [Instruction(task, a) for a in makers(trial) for task in known]
    rates = trial.scale(smoke=RATES[:1], laptop=RATES)
    count, generator = trial.scale(smoke=2, laptop=8), torch.Generator().manual_seed(trial.seed)

    for arm in trial.arms(*ARMS):
        source = model
        if arm.name == "unconditional":
            source = IGPG(model.tokenizer, model.vq, prior(model.conditioner.dim), Untold(model.conditioner))
            source.fit_prior(zoo, epochs(trial)[1], lr=3e-3, seed=trial.seed)
        means, drawn = [], {}
        for cell in cells:
            drawn[cell] = draw(arm.name, source, zoo, cell, count, generator)
            means.append(accuracies(ARCHITECTURES[cell.architecture](), drawn[cell], known[cell.dataset][1]).mean().item())
        arm.log(accuracy=float(np.mean(means)), cells=means)
        if arm.name in ("igpg", "retrieved"):
            arm.log(novelty=float(np.mean([novelty(drawn[c], zoo, c) for c in cells])))
        if arm.name == "igpg":
            arm.log(vq_loss=losses["vq"][-1], token_nll=losses["prior"][-1], used_codes=used(model, zoo))
            arm.curve("vq", y=losses["vq"])
            arm.curve("prior", y=losses["prior"])
        if arm.name in ("igpg", "random_init", "task_mean"):
            asked = [Instruction(HELD_OUT, a) for a in makers(trial)]
            starts = {c: draw(arm.name, source, zoo, c, count, generator) for c in asked}
            fine = np.mean([fine_tuned(c, starts[c], tasks[HELD_OUT], rates, trial.seed) for c in asked], axis=0)
            arm.log(held_out=fine[0], held_out_epoch=fine[-1])
            arm.curve("held_out", x=list(FINE), y=fine)


def makers(trial: Trial) -> dict:
    names = trial.scale(smoke=list(ARCHITECTURES)[:2], laptop=list(ARCHITECTURES))
    return {name: ARCHITECTURES[name] for name in names}


def digits(seed: int) -> dict[str, tuple[data.TensorData, data.TensorData]]:
    task = data.images("digits", seed=seed)
    labels = torch.Generator().manual_seed(seed)
    exchanged, other = (torch.randperm(10, generator=labels) for _ in range(2))
    plain = torch.arange(10)

    def made(turns: int, names: Tensor) -> tuple[data.TensorData, data.TensorData]:
        return tuple(data.TensorData(torch.rot90(p.x, turns, (2, 3)).contiguous(), names[p.y]) for p in (task.train, task.test))

    return {
        "upright": made(0, plain),
        "turned": made(1, plain),
        "upright, exchanged": made(0, exchanged),
        HELD_OUT: made(0, other),
    }


def epochs(trial: Trial) -> tuple[int, int]:
    return trial.scale(smoke=(2, 1), laptop=(120, 60))


def prior(dim: int) -> WeightGPT:
    return WeightGPT(CODES, condition_dim=dim, layers=2, width=64, heads=4, context=64)


def fitted(zoo: list[ZooNet], tasks: dict, trial: Trial) -> tuple[IGPG, dict]:
    conditioner = TaskConditioner({name: train for name, (train, _) in tasks.items()}, list(makers(trial)))
    vq = GumbelVQ(CHUNK, codes=CODES, code_dim=32, tokens_per_chunk=TOKENS, places=(4, 8, 64), temperature=(0.5, 0.05))
    model = IGPG(WeightTokenizer(CHUNK), vq, prior(conditioner.dim), conditioner)
    first, second = epochs(trial)
    return model, model.fit_zoo(zoo, epochs_vq=first, epochs_prior=second, lr_prior=3e-3, seed=trial.seed)


class Untold(nn.Module):
    """The instruction without its data set."""

    def __init__(self, conditioner: TaskConditioner) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.conditioner.table.zero_()

    def forward(self, instructions: list[Instruction]) -> Tensor:
        return self.conditioner(instructions)


def draw(name: str, model: IGPG, zoo: list[ZooNet], cell: Instruction, count: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """``count`` networks for the cell, the way of each arm."""
    if name in ("igpg", "unconditional"):
        return model.generate(cell, n=count, temperature=TEMPERATURE, generator=generator)
    if name == "random_init":
        return [ARCHITECTURES[cell.architecture]().state_dict() for _ in range(count)]
    nets = [z for z in zoo if z.instruction.architecture == cell.architecture and cell.dataset in (z.instruction.dataset, HELD_OUT)]
    if name == "one_family_mean":
        nets = [z for z in nets if z.family == 0]
    if name.endswith("mean"):
        return [{n: torch.stack([z.state[n] for z in nets]).mean(0) for n in nets[0].state}]
    if name == "independent":
        tokens = torch.stack([model.tokens(cell.architecture, z.state) for z in nets])
        counts = F.one_hot(tokens, CODES).sum(0).float() ** (1 / TEMPERATURE)  # (places, codes): as sharp as the prior's
        return model.decode(cell.architecture, torch.multinomial(counts, count, replacement=True, generator=generator).T.contiguous())
    if name == "pretrained":
        return [z.state for z in nets]
    chosen = [nets[i].state for i in torch.randint(len(nets), (count,), generator=generator).tolist()]
    if name == "reconstructed":
        return [model.reconstruct(cell.architecture, state) for state in chosen]
    return [{n: t + NOISE * torch.randn(t.shape, generator=generator) for n, t in state.items()} for state in chosen]


def flat(states: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([t.flatten() for t in s.values()]) for s in states])


def novelty(states: list[dict[str, Tensor]], zoo: list[ZooNet], cell: Instruction) -> float:
    """Distance to the nearest network of the zoo, in units of that between networks of the zoo (below 1: nearer than they are)."""
    known = flat([z.state for z in zoo if z.instruction == cell])
    between = torch.cdist(known, known).fill_diagonal_(float("inf")).amin(1).mean() if len(known) > 1 else torch.tensor(1.0)
    return float(torch.cdist(flat(states), known).amin(1).mean() / between)


def used(model: IGPG, zoo: list[ZooNet]) -> float:
    """Perplexity of the codes over the zoo."""
    counts = torch.bincount(torch.cat([model.tokens(z.instruction.architecture, z.state) for z in zoo]), minlength=CODES).double()
    p = counts[counts > 0] / counts.sum()
    return float((-(p * p.log()).sum()).exp())


def fine_tuned(cell: Instruction, states: list, task: tuple, rates: tuple, seed: int) -> list[float]:
    """Test accuracy after each number of steps in FINE, at the rate that fits the training images best after the last."""
    module, best = ARCHITECTURES[cell.architecture](), (-1.0, [])
    for lr in rates:
        runs = [states if not s else train_many(module, states, [task[0]] * len(states), steps=s, lr=lr, seed=seed) for s in FINE]
        fit = accuracies(module, runs[-1], task[0]).mean().item()
        best = max(best, (fit, [accuracies(module, r, task[1]).mean().item() for r in runs]), key=lambda b: b[0])
    return best[1]


def figure(record: RecordView, fig: Figure) -> None:
    """Accuracy by source; generated against trained accuracy; fine-tuning on the held-out task."""
    fig.set_size_inches(12, 4.3)
    fig.set_layout_engine("constrained")
    bars, scatter, tuning = fig.subplots(1, 3)
    values = [100 * record.values(a, "accuracy") for a in LABELS]
    bars.barh(list(LABELS.values()), [v.mean() for v in values], xerr=[v.std() for v in values], color=list(COLOURS.values()), capsize=3)
    bars.invert_yaxis()
    bars.axvline(10, color="k", lw=0.8, ls=":")
    bars.set(xlabel="test accuracy without fine-tuning (%)", title="Where the weights come from", xlim=(0, 100))
    for a in ("retrieved", "igpg", "independent"):
        x, y = 100 * record.values("pretrained", "cells"), 100 * record.values(a, "cells")
        scatter.plot(x.ravel(), y.ravel(), "o", ms=5, alpha=0.7, color=COLOURS[a], mec="k", mew=0.4, label=LABELS[a])
    low = 100 * record.values("pretrained", "cells").min() - 5
    scatter.plot([low, 100], [low, 100], "k:", lw=0.8)
    scatter.set(xlabel="accuracy of trained networks (%)", ylabel="accuracy as generated (%)", title="One point a task and architecture")
    scatter.legend(fontsize=8)
    for a in ("igpg", "task_mean", "random_init"):
        curves = record.curves(a, "held_out")
        y = 100 * np.array([c[1] for c in curves])
        name = "mean of the zoo" if a == "task_mean" else LABELS[a]
        tuning.errorbar(curves[0][0], y.mean(0), y.std(0), marker="o", capsize=3, color=COLOURS[a], label=name)
    tuning.set(xlabel="steps of 32 images (45 are one epoch)", ylabel="test accuracy (%)", title="A task that the zoo does not hold")
    tuning.legend(fontsize=8)
    for ax in (scatter, tuning):
        ax.grid(alpha=0.3)
    fig.suptitle("Weights written code by code: three architectures, three tasks, four families of initialisations")
