"""Patch-based inference: the memory that published networks need, and the accuracy that a memory buys.

First, on the published MobileNetV2, a ResNet-18 and an MCUNet-like network with large kernels: peak memory of executed inference, layer by
layer and in tiles, from a trace of every allocation (of float32, counted as int8), beside the planned one; the extra FLOPs by a counter;
the largest difference from the plain network's output.

Then eight small networks (four widths, two resolutions) are trained on CIFAR-10. For a limit of 6, 8 and 12 kB each arm takes the network
that fits and is best on validation images: layer by layer, in tiles, in tiles with the network redistributed, and in tiles that are
padded with zeros at their inner borders (the networks of the tiled arm, run wrongly).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.data import TensorData
from neurarium.dynamic.live import trace_memory
from neurarium.dynamic.mobile import MOBILENET_V2, Block, MobileConfig, mobile_net, redistribute
from neurarium.dynamic.patch import PatchedModel, Schedule, patch_inference, plan_memory, search_schedule
from neurarium.experiments.dynamic import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import Arm, RecordView, Trial

LIMITS = (6, 8, 12)  # kB
WIDTHS = (1.0, 1.5, 2.0, 3.0)
SMALL = MobileConfig(8, (Block(1, 8), Block(3, 12, 2), Block(3, 12), Block(3, 24, 2), Block(3, 24)), 0, 10)
MCUNET = MobileConfig(
    16,
    (
        Block(1, 8), Block(3, 16, 2, 7), Block(5, 16, 1, 3), Block(5, 24, 2, 7), Block(4, 24, 1, 5), Block(5, 40, 2, 5), Block(5, 40, 1, 5),
        Block(4, 48, 1, 3), Block(5, 96, 2, 7), Block(4, 96, 1, 5), Block(5, 160, 1, 7),
    ),
    0,
)  # fmt: skip
COLOURS = {"layer": "#555555", "patch": "#0072b2", "patch_redistributed": "#009e73", "naive": "#d55e00"}
LABELS = {
    "layer": "layer by layer",
    "patch": "in tiles",
    "patch_redistributed": "in tiles, redistributed",
    "naive": "tiles with zeros between",
}


def run(trial: Trial) -> None:
    tiles = trial.scale(smoke=((2, 2),), laptop=((2, 2), (3, 3), (4, 4)))

    def task() -> dict[int, Any]:
        return {s: zoo.cifar(trial, train=3_000, test=2_000, size=s) for s in trial.scale(smoke=(16,), laptop=(24, 32))}

    def nets() -> dict[tuple[float, int], tuple[nn.Module, float, float]]:
        """Width, size -> network, accuracy on validation and on test images."""
        data = trial.shared("task", task)
        return {(w, s): _trained(SMALL.scaled(w), data[s], trial) for w in trial.scale(smoke=(1.0, 2.0), laptop=WIDTHS) for s in data}

    def schedules() -> dict[tuple[float, int], tuple[int, list[Schedule]]]:
        """Width, size -> bytes layer by layer, and the best tiles for each limit."""
        data, found = trial.shared("task", task), {}
        for w, s in trial.shared("nets", nets):
            model, image = mobile_net(SMALL.scaled(w)).eval(), data[s].test.x[:1]
            found[w, s] = (
                plan_memory(model, image).peak,
                [search_schedule(model, image, limit_bytes=1024 * k, patches=tiles) for k in LIMITS],
            )
        return found

    for arm in trial.arms("layer", "patch", "patch_redistributed", "naive"):
        if arm.name != "naive":
            published(arm, trial.scale(smoke=64, laptop=224), tiles[-1], trial)
        data, found, chosen = trial.shared("task", task), trial.shared("nets", nets), []
        retrained: dict[Any, tuple[nn.Module, float, float]] = {}
        for i, limit in enumerate(LIMITS):
            fitting = {}
            for net, (layer, tiled) in trial.shared("schedules", schedules).items():
                schedule = Schedule((1, 1), 0, layer, 0.0) if arm.name == "layer" else tiled[i]
                if schedule.peak <= 1024 * limit:
                    fitting[net] = schedule
            w, s = max(fitting, key=lambda net: found[net][1])
            schedule, test, (model, _, accuracy) = fitting[w, s], data[s].test, found[w, s]
            if arm.name == "patch_redistributed":
                config = redistribute(SMALL.scaled(w), test.x, split=max(schedule.split, 3))
                if (config, s) not in retrained:
                    retrained[config, s] = _trained(config, data[s], trial)
                model, _, accuracy = retrained[config, s]
                schedule = search_schedule(model, test.x[:1], limit_bytes=1024 * limit, patches=tiles)
            if arm.name == "naive":
                wrong = _Naive(model, schedule)
                with torch.no_grad():
                    error, accuracy = float((wrong(test.x[:50]) - model(test.x[:50])).abs().max()), _accuracy(wrong, test)
                chosen.append({"error": error, "small_error": error})
            else:
                patched = patch_inference(model, test.x[:1], patches=schedule.patches, split=schedule.split)
                done = _executed(patched, model, test.x[:1])
                chosen.append({"small_kb": done["kb"], "small_error": done["error"], "small_overhead": done["overhead"]})
            chosen[-1] |= {"accuracy": accuracy, "width": w, "size": s}
        arm.log(**{k: [c[k] for c in chosen] for k in chosen[0]})


def published(arm: Arm, size: int, patches: tuple[int, int], trial: Trial) -> None:
    """Memory, extra work and exactness of networks from the literature. MobileNetV2 is tiled up to its first block of stride 8, the
    others where it is best."""
    image, config = torch.randn(1, 3, size, size), MOBILENET_V2
    if arm.name == "patch_redistributed":
        config = redistribute(config, image)
    models = {"mobilenet": mobile_net(config)}
    if arm.name != "patch_redistributed" and trial.name != "smoke":
        models |= {"resnet": resnet18(), "mcunet": mobile_net(MCUNET)}
    measured = []
    for name, model in models.items():
        _settle(model)
        split: int | str = 0 if arm.name == "layer" else "auto" if name != "mobilenet" else str(_first_of_stride_8(config))
        patched = patch_inference(model, image, patches=patches, split=split)
        measured.append(_executed(patched, model, image))
        if name == "mobilenet":
            peaks = list(patched.plan().blocks().values())
            arm.curve("memory", x=list(range(len(peaks))), y=[b / 1024 for b in peaks])
    arm.log(**{k: [m[k] for m in measured] for k in measured[0]})


def _first_of_stride_8(config: MobileConfig) -> int:
    """Its number among the children of the network."""
    stride = 2
    for child, block in enumerate(config.blocks, 1):
        stride *= block.stride
        if stride == 8:
            return child
    raise AssertionError("no block of stride 8")


def _executed(patched: PatchedModel, model: nn.Module, image: Tensor) -> dict[str, float]:
    """Memory by trace and by plan, FLOPs by the counter, difference from the plain network."""
    with torch.no_grad():
        memory = trace_memory(patched, image)
        with FlopCounterMode(display=False) as tiled:
            got = patched(image)
        with FlopCounterMode(display=False) as plain:
            want = model(image)
    planned = patched.plan(bytes_per=4).peak
    return {
        "kb": memory.peak / 4 / 1024,
        "planned_kb": planned / 4 / 1024,
        "overhead": tiled.get_total_flops() / plain.get_total_flops() - 1,
        "error": float((got - want).abs().max()),
    }


def _settle(model: nn.Module) -> None:
    """Evaluation mode, random weights with BatchNorm statistics that are not the initial ones."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    model.eval()


def _trained(config: MobileConfig, task: Any, trial: Trial) -> tuple[nn.Module, float, float]:
    train, val = task.train.split(trial.scale(smoke=300, laptop=2_500), seed=trial.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        model = mobile_net(config)
        zoo.train(model, train.batches(100, seed=trial.seed), epochs=trial.scale(smoke=1, laptop=4), lr=1e-2, seed=trial.seed)
    return model, _accuracy(model, val), _accuracy(model, task.test)


@torch.no_grad()
def _accuracy(model: nn.Module, data: TensorData) -> float:
    return float(torch.cat([model(x).argmax(1) == y for x, y in data.batches(500, shuffle=False)]).double().mean())


class _Naive(nn.Module):
    """Tiles that do not overlap, each padded with zeros on all sides."""

    def __init__(self, model: nn.Sequential, schedule: Schedule) -> None:
        super().__init__()
        self.stage, self.rest, self.patches = model[: schedule.split], model[schedule.split :], schedule.patches

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x.tensor_split(self.patches[0], 2):
            rows.append(torch.cat([self.stage(part) for part in row.tensor_split(self.patches[1], 3)], 3))
        return self.rest(torch.cat(rows, 2))


class _Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.b, self.nb = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = short if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return F.relu(y + self.short(x))


def resnet18() -> nn.Sequential:
    """ResNet-18 for 1000 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for outputs, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(_Basic(width, outputs, stride))
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def figure(record: RecordView, fig: Figure) -> None:
    """Memory of each block of MobileNetV2, accuracy against the limit, extra work."""
    fig.set_size_inches(12, 4.2)
    bars, lines, work = fig.subplots(1, 3, gridspec_kw={"width_ratios": (1.7, 1.2, 0.8)})
    for shift, arm in ((-0.2, "layer"), (0.2, "patch")):
        if arm in record.arms:
            x, y = record.curves(arm, "memory")[0]
            bars.bar(np.asarray(x) + shift, y, 0.4, color=COLOURS[arm], label=f"{LABELS[arm]}: peak {max(y):.1f} kB")
    bars.set(xlabel="block of MobileNetV2 (stem, 17 inverted residuals, head)", ylabel="kB alive, int8", title="Memory of each block")
    bars.legend(frameon=False)
    for arm in record.arms:
        values = record.values(arm, "accuracy")
        lines.errorbar(LIMITS, values.mean(0), values.std(0), color=COLOURS[arm], marker="o", capsize=3, label=LABELS[arm],
                       ls="--" if arm == "naive" else "-")  # fmt: skip
    lines.set(xlabel="memory limit (kB)", ylabel="test accuracy", title="Best network that fits, CIFAR-10", xticks=LIMITS)
    lines.legend(frameon=False, fontsize=8)
    for i, arm in enumerate(a for a in ("patch", "patch_redistributed") if a in record.arms):
        share = 100 * record.values(arm, "overhead")[:, 0].mean()
        work.bar(i, share, 0.6, color=COLOURS[arm])
        work.annotate(f"{share:.1f} %", (i, share), ha="center", va="bottom")
    work.set_xticks((0, 1), ("as published", "redistributed"))
    work.set(ylabel="extra FLOPs (%)", title="Work done twice")
    for ax in (bars, lines, work):
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
