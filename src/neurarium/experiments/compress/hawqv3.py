"""A ResNet-8 in integers, and which of its layers may have 4 bits: an integer program against random, reversed and greedy assignments.

The integer network is checked for floating-point operations, against the numpy reference (``reference_gap``: largest difference of codes)
and against the same network with real rescaling factors (``float_rescale_gap``, in codes of the output). Assignments are judged as networks
with fake-quantised weights and inputs and folded norms; the first and the last layer keep 8 bits, as in the paper, and every mixed one
spends at most half of the way from all 4 to all 8 in bit operations. ``every`` holds random ones of all budgets: predicted perturbation
against the rise of the loss on half of the test images. ``mixed_qat`` trains one epoch on, ``mixed_int`` is the mixed one in integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.compress import BitPlan, bit_costs, count_float_ops, plan_bits, prepare_qat, quantize_integer, sensitivities, simulate
from neurarium.data import TensorData
from neurarium.experiments.compress.zoo import accuracy, cifar, finetune, resnet
from neurarium.meter import stored_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

CHOICES = (4, 8)


def run(trial: Trial) -> None:
    task = cifar(trial)
    count = trial.scale(smoke=32, laptop=256)
    x, y = task.train.x[:count], task.train.y[:count]
    calibration = [(x, y)]
    probes = trial.scale(smoke=2, laptop=24)

    def dense() -> nn.Module:
        return resnet(trial, task)

    def omega() -> dict[str, list[float]]:
        return sensitivities(trial.shared("resnet", dense), calibration, choices=CHOICES, probes=probes, samples=count)

    def costs() -> dict[str, list[float]]:
        return bit_costs(trial.shared("resnet", dense), x[:2], choices=CHOICES)["bops"]

    def planned() -> dict[str, int]:
        cost = trial.shared("costs", costs)
        ends = (next(iter(cost)), next(reversed(cost)))
        plan = plan_bits(
            trial.shared("resnet", dense), calibration, choices=CHOICES, budget={"bops": _budget(cost, ends, 0.5)},
            fixed=dict.fromkeys(ends, 8), probes=probes, samples=count,
        )  # fmt: skip
        return {n: CHOICES.index(b) for n, (b, _) in plan.bits.items()}

    def fake(levels: dict[str, int]) -> nn.Module:
        return prepare_qat(trial.shared("resnet", dense), calibration, bits=_plan(levels))

    for arm in trial.arms("fp32", "int8"):
        model = trial.shared("resnet", dense)
        if arm.name == "fp32":
            right, loss = _judge(model, task.test)
            arm.log(accuracy=right, loss=loss, float_ops=count_float_ops(model, x[:2]), bytes=stored_bytes(model))
            continue
        net = quantize_integer(model, calibration, bits=8)
        codes = net.encode(task.test.x[: trial.scale(smoke=2, laptop=16)])
        out, exact, real = net.core(*codes)[0], simulate(net, *codes)[0], simulate(net, *codes, dyadic=False)[0]
        arm.log(accuracy=accuracy(net, task), bytes=stored_bytes(net))
        arm.log(float_ops=count_float_ops(net.core, *codes) + count_float_ops(net.core, *codes, exported=True))
        arm.log(reference_gap=int((out - exact).abs().max()), float_rescale_gap=int((out - real).abs().max()))

    for arm in trial.arms("uniform8", "uniform4", "mixed", "reversed", "greedy", "mixed_int", "mixed_qat"):
        harm, cost = trial.shared("omega", omega), trial.shared("costs", costs)
        names = list(harm)
        ends = (names[0], names[-1])
        if arm.name.startswith("uniform"):
            levels = {n: CHOICES.index(8) if n in ends or arm.name == "uniform8" else 0 for n in names}
        elif arm.name.startswith("mixed"):
            levels = trial.shared("plan", planned)
        else:
            gain = {n: (harm[n][0] - harm[n][1]) / (cost[n][1] - cost[n][0]) for n in names}
            order = sorted(names, key=lambda n: gain[n], reverse=arm.name == "greedy")
            levels = _filled(order, cost, ends, _budget(cost, ends, 0.5))
        if arm.name == "mixed_int":
            net = quantize_integer(trial.shared("resnet", dense), calibration, bits=_plan(levels))
        else:
            net = fake(levels)
        if arm.name.endswith("_qat"):
            net = finetune(net, task, epochs=1, lr=2e-3, seed=trial.seed)
        right, loss = _judge(net, task.test)
        arm.log(accuracy=right, loss=loss, bops=sum(cost[n][i] for n, i in levels.items()) / sum(c[1] for c in cost.values()))
        arm.log(predicted=sum(harm[n][i] for n, i in levels.items()), levels=[CHOICES[i] for i in levels.values()])
        if arm.name == "mixed_int":
            arm.log(bytes=stored_bytes(net))

    half = TensorData(task.test.x[::2], task.test.y[::2])
    for arm in trial.arms("random", "every"):
        harm, cost = trial.shared("omega", omega), trial.shared("costs", costs)
        names, draw = list(harm), np.random.default_rng(trial.seed)
        ends = (names[0], names[-1])
        random = [0.5] * trial.scale(smoke=2, laptop=8)
        shares = random if arm.name == "random" else [0.0, 1.0, *([0.2, 0.4, 0.6, 0.8] * trial.scale(smoke=1, laptop=2))]
        accuracies, losses, predicted, bops = [], [], [], []
        for share in shares:
            levels = _filled([names[i] for i in draw.permutation(len(names))], cost, ends, _budget(cost, ends, share))
            net = fake(levels)
            right, loss = _judge(net, task.test if arm.name == "random" else half)
            accuracies.append(right), losses.append(loss)
            predicted.append(sum(harm[n][i] for n, i in levels.items()))
            bops.append(sum(cost[n][i] for n, i in levels.items()) / sum(c[1] for c in cost.values()))
        arm.log(accuracy=float(np.mean(accuracies)), accuracies=accuracies, predicted=predicted, loss_increase=losses, bops=bops)


def _plan(levels: dict[str, int]) -> BitPlan:
    return BitPlan({n: (CHOICES[i], CHOICES[i]) for n, i in levels.items()})


def _budget(cost: dict[str, list[float]], ends: tuple[str, str], share: float) -> float:
    """Bit operations at `share` of the way from all 4 to all 8, the first and the last layer at 8."""
    low, high = (sum(c[1] if n in ends else c[i] for n, c in cost.items()) for i in (0, 1))
    return low + share * (high - low)


def _filled(order: list[str], cost: dict[str, list[float]], ends: tuple[str, str], budget: float) -> dict[str, int]:
    """8 bits in the given order wherever they still fit."""
    levels = {n: int(n in ends) for n in cost}
    spent = sum(cost[n][i] for n, i in levels.items())
    for name in order:
        more = cost[name][1] - cost[name][levels[name]]
        if levels[name] == 0 and spent + more <= budget * (1 + 1e-9):
            levels[name], spent = 1, spent + more
    return levels


@torch.no_grad()
def _judge(model: nn.Module, test: TensorData) -> tuple[float, float]:
    """Accuracy and mean loss."""
    outputs = torch.cat([model(part) for part in test.x.split(1000)])
    return float((outputs.argmax(1) == test.y).float().mean()), float(F.cross_entropy(outputs, test.y))


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(10, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    pooled = [(arm, colour) for arm, colour in (("every", "#999999"), ("random", "#56B4E9")) if arm in record.arms]
    for arm, colour in pooled:
        label = "random assignments" if arm == "random" else "random, other budgets"
        x, y = record.values(arm, "bops").ravel(), 100 * record.values(arm, "accuracies").ravel()
        left.plot(100 * x, y, "o", color=colour, markersize=4, alpha=0.5, label=label)
    marks = {"mixed": ("integer program", "#D55E00", "*"), "greedy": ("greedy", "#009E73", "s"), "reversed": ("reversed", "#CC79A7", "v"),
             "uniform4": ("all 4", "#000000", "<"), "uniform8": ("all 8", "#000000", ">")}  # fmt: skip
    for arm, (label, colour, mark) in marks.items():
        values = 100 * record.values(arm, "accuracy")
        spread = values.std(ddof=1) if len(values) > 1 else 0
        x = 100 * record.mean(arm, "bops")
        left.errorbar(x, values.mean(), spread, color=colour, marker=mark, markersize=9, capsize=3, label=label)
    left.axhline(100 * record.mean("fp32", "accuracy"), color="black", linewidth=0.8, linestyle=":")
    left.axhline(100 * record.mean("int8", "accuracy"), color="#0072B2", linewidth=0.8, linestyle="--", label="integers only, 8 bits")
    left.set(xlabel="bit operations (% of all 8)", ylabel="test accuracy (%)", title="ResNet-8: who gets 8 bits, who 4 (dotted: float)")
    left.legend(fontsize=7, loc="lower right")
    for i, seed in enumerate(record.seeds):
        x, y = record.values("every", "predicted")[i], record.values("every", "loss_increase")[i]
        right.plot(x, y, "o", markersize=4, color=("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")[i % 5], label=f"seed {seed}")
    right.set(xlabel="predicted perturbation", ylabel="test loss", title="What the Hessian foretells")
    right.legend(fontsize=7)
