"""Landmark points with a tough and a tolerant teacher, on drawn faces whose true points are known.

Two large networks learn the annotators' points and the points smoothed by a shape model; a small one learns from the annotators alone, from
both teachers, from either, from the tough teacher's answers instead of the annotators', and with parts of the loss left out. The arm ``l1``
tells what the shape of the loss alone is worth, since the assistive losses are piecewise linear. All students start from the same weights,
see the same batches and take as many steps with the same optimizer.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data
from neurarium.compress import ActiveShapeModel, LandmarkKD, with_teachers
from neurarium.data import FaceTask, TensorData
from neurarium.learn.fit import Backprop
from neurarium.meter import parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

STUDENTS: dict[str, dict[str, Any]] = {
    "main_only": {"weights": (2.0, 0.0, 0.0)},
    "kd": {},
    "tough_only": {"weights": (2.0, 1.0, 0.0)},
    "tolerant_only": {"weights": (2.0, 0.0, 1.0)},
    "no_negative": {"assist": (1.9, 0.0, 1.8, 0.0)},
}
PLAIN: dict[str, Any] = {"l2": (0, "mse"), "l1": (0, F.l1_loss), "plain_teacher": (1, "mse")}  # whose points, which loss
FAILURE = 0.08  # of the distance between the eyes
LEVELS = tuple(i / 200 for i in range(41))


def run(trial: Trial) -> None:
    task = trial.shared("faces", lambda: faces(trial))
    shared = trial.shared("teachers", lambda: teachers(trial, task))
    tough, tolerant = shared["networks"]
    for arm in trial.arms("teachers", *PLAIN, *STUDENTS):
        if arm.name == "teachers":
            arm.log(params=parameters(tough), variance_kept=shared["variance_kept"])
            arm.log(**{f"{name}_nme": float(error(m, task).mean()) for name, m in (("tough", tough), ("tolerant", tolerant))})
            measure(arm, tough, task)
            continue
        model = student(trial).to(trial.device)
        taught = shared["targets"]
        epochs = trial.scale(smoke=2, laptop=10)
        if arm.name in STUDENTS:
            fit(LandmarkKD, model, taught, epochs, trial.seed, **STUDENTS[arm.name])
        else:
            row, loss = PLAIN[arm.name]
            fit(Backprop, model, TensorData(taught.x, taught.y[:, row]), epochs, trial.seed, loss=loss)
        arm.log(params=parameters(model))
        measure(arm, model, task)
        if arm.name == "kd":
            worst = error(model, task).topk(9).indices
            x, truth = task.test.x[worst, 0].cpu(), task.test.y[worst].cpu()
            with torch.no_grad():
                found = model.eval()(task.test.x[worst]).cpu()
            arm.grid("worst", torch.cat([torch.cat(list(x[i : i + 3]), 1) for i in (0, 3, 6)], 0))
            for name, points in (("found", found), ("truth", truth)):
                at = (points.view(9, -1, 2) + 0.5) * x.shape[-1]
                at = at + x.shape[-1] * torch.tensor([[i % 3, i // 3] for i in range(9)])[:, None]
                arm.curve(name, x=at[..., 0].flatten().tolist(), y=at[..., 1].flatten().tolist())


def faces(trial: Trial) -> FaceTask:
    """Faces of 32 x 32 pixels, standardised."""
    train, test, size = trial.scale(smoke=(120, 60, 16), laptop=(1200, 1000, 32))
    task = data.synthetic_faces(train, test, size=size, seed=trial.seed)
    mean, std = task.train.x.mean(), task.train.x.std()
    parts = (TensorData((p.x - mean) / std, p.y).to(trial.device) for p in (task.train, task.test))
    return FaceTask(*parts)


def teachers(trial: Trial, task: FaceTask) -> dict[str, Any]:
    """The two teachers, what they answer on the training images, and how much variance the shape model keeps."""
    shapes = ActiveShapeModel(variance=0.95).fit(task.train.y)
    networks = []
    for y in (task.train.y, shapes.smooth(task.train.y)):
        torch.manual_seed(trial.seed)
        model = teacher(trial).to(trial.device)
        fit(Backprop, model, TensorData(task.train.x, y), trial.scale(smoke=2, laptop=10), trial.seed, loss="mse")
        networks.append(model.eval())
    return {"networks": networks, "targets": with_teachers(task.train, *networks), "variance_kept": shapes.variance_kept}


def teacher(trial: Trial) -> nn.Module:
    """Four convolutions of stride 2."""
    widths = trial.scale(smoke=(8, 8, 16, 16), laptop=(32, 64, 128, 128))
    layers = [m for i, o in zip((1, *widths), widths, strict=False) for m in _unit(i, o, stride=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * trial.scale(smoke=1, laptop=4), 64))


def student(trial: Trial) -> nn.Module:
    """The same with depthwise-separable convolutions, a half to a quarter as wide."""
    widths = trial.scale(smoke=(4, 4, 8, 8), laptop=(8, 16, 32, 64))
    layers = _unit(1, widths[0], stride=2)
    for into, out in pairwise(widths):
        layers += [*_unit(into, into, stride=2, groups=into), *_unit(into, out, kernel=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * trial.scale(smoke=1, laptop=4), 64))


def _unit(into: int, out: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def fit(learner: Any, model: nn.Module, train: TensorData, epochs: int, seed: int, **options: Any) -> None:
    batches = train.batches(50, seed=seed)
    schedule = partial(OneCycleLR, max_lr=5e-3, total_steps=epochs * len(batches))
    learner(optimizer=partial(Adam, lr=5e-3), schedule=schedule, **options).fit(model, batches, epochs=epochs, seed=seed)


@torch.no_grad()
def error(model: nn.Module, task: FaceTask) -> Tensor:
    """The normalised mean error of each test face."""
    model.eval()
    return torch.cat([task.nme(model(x), y) for x, y in task.test.batches(500, shuffle=False)])


def measure(arm: Any, model: nn.Module, task: FaceTask) -> None:
    errors = error(model, task).cpu()
    share = [float((errors <= level).float().mean()) for level in LEVELS]
    until = [s for level, s in zip(LEVELS, share, strict=True) if level <= FAILURE]
    arm.log(nme=float(errors.mean()), failures=float((errors > FAILURE).float().mean()), auc=float(np.mean(until)))
    arm.curve("ced", x=list(LEVELS), y=share)


def figure(record: RecordView, fig: Figure) -> None:
    names = {
        "teachers": ("tough teacher", "#000000"), "l2": ("student, L2 to the annotators", "#999999"),
        "l1": ("student, L1 to the annotators", "#8B4513"),
        "plain_teacher": ("student, L2 to the teacher", "#56B4E9"), "main_only": ("main loss only", "#E69F00"),
        "tough_only": ("tough only", "#CC79A7"), "tolerant_only": ("tolerant only", "#009E73"), "kd": ("both teachers", "#D55E00"),
    }  # fmt: skip
    fig.set_size_inches(12, 4)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.2, 0.9, 1))
    for arm, (label, colour) in names.items():
        curves = record.curves(arm, "ced")
        y = np.mean([c[1] for c in curves], axis=0)
        left.plot(100 * np.asarray(curves[0][0]), 100 * y, color=colour, label=label, linestyle="--" if arm == "teachers" else "-")
    left.set(xlabel="error (% of the distance between the eyes)", ylabel="faces below (%)", title="Cumulative errors")
    left.legend(fontsize=7, loc="lower right")
    for i, (arm, (_, colour)) in enumerate(names.items()):
        values = 100 * record.values(arm, "nme")
        middle.errorbar(values.mean(), -i, xerr=values.std(ddof=1) if len(values) > 1 else 0, color=colour, marker="o", capsize=3)
        middle.plot(values, [-i - 0.2] * len(values), "|", color=colour)
    middle.set_yticks([-i for i in range(len(names))], [label for label, _ in names.values()], fontsize=7)
    middle.set(xlabel="mean error (%)", title="Seeds and their mean")
    right.imshow(record.grids("kd", "worst")[0], cmap="gray", extent=None)
    for name, colour, marker in (("truth", "#009E73", "."), ("found", "#D55E00", "x")):
        x, y = record.curves("kd", name)[0]
        right.plot(np.asarray(x) - 0.5, np.asarray(y) - 0.5, marker, color=colour, markersize=3, label=name)
    right.set(title="The nine worst faces (both teachers)", xticks=[], yticks=[])
    right.legend(fontsize=7, loc="upper right")
