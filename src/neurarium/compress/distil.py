"""Learning from teachers: landmark points from a tough and a tolerant one, classes from soft targets.

**Landmarks.** The tough teacher was trained on the true points, the tolerant one on points that a shape model has smoothed, which are
easier to hit. How far a teacher is from the truth says, coordinate by coordinate, how hard a point is: the student is pushed while it is
worse than the teacher, and let go, even a little rewarded, once it is better.
With truth g, prediction p and teacher t, reflect the teacher to the
student's side, t' = g + sign(p - g) |t - g|, and

    assist = mean( w |t' - p| ),   w = alpha   where |p - g| > |t - g|,   alpha_minus   nearer than the teacher,
                                   0           nearer than a share `margin` of the teacher's distance.

Pushing away from t' on the inner side (alpha_minus < 0) is pushing towards g. The main loss, with d = |p - g| and D = |tolerant - g|, is
3 d up to d = D and d^2 + 3 D - D^2 beyond. Total: 2 main + assist of the tough + assist of the tolerant; it may be negative by design.
Coordinates are to be in [-0.5, 0.5]: in pixels d^2 would drown everything.

:class:`ActiveShapeModel` does the smoothing: shapes are aligned by similarity transforms, their principal components kept up to a share of
the variance, and coefficients limited to three standard deviations.

**Classes.** :class:`SoftTargets` is plain knowledge distillation: cross-entropy with the labels, and with the teacher's distribution at a
temperature.

*Source*: Fard and Mahoor, Facial Landmark Points Detection Using Knowledge Distillation-Based Neural Networks (CVIU 2022), constants from
the authors' published code; Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015).
*Departures*: any regression target of any shape may stand for the points. Teachers answer each batch, or once for a fixed set
(:func:`with_teachers`), which spares two forward passes of three.
*Cost*: a training step of the student, and a forward pass of each teacher that is not cached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.utils._pytree import tree_leaves

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, Learner, call, check_labels, device_of
from neurarium.roles import History

__all__ = ["ActiveShapeModel", "LandmarkKD", "SoftTargets", "assistive_loss", "landmark_kd_loss", "main_loss", "with_teachers"]

ADAM: Callable[..., Optimizer] = partial(Adam, lr=1e-3)


def assistive_loss(pred: Tensor, truth: Tensor, teacher: Tensor, alpha: float, alpha_minus: float, margin: float = 0.15) -> Tensor:
    """Push towards the teacher's distance from outside, away from it from inside; all three of one shape."""
    with torch.no_grad():
        side, distance, own = (pred - truth).sign(), (teacher - truth).abs(), (pred - truth).abs()
        reflected = truth + side * distance
        weight = torch.where(own > distance, alpha, torch.where(own > margin * distance, alpha_minus, 0.0))
    return (weight * (reflected - pred).abs()).mean()


def main_loss(pred: Tensor, truth: Tensor, tolerant: Tensor) -> Tensor:
    """3 d up to the tolerant teacher's distance D, d^2 + 3 D - D^2 beyond."""
    d, limit = (pred - truth).abs(), (tolerant.detach() - truth).abs()
    return torch.where(d <= limit, 3 * d, d.square() + 3 * limit - limit.square()).mean()


def landmark_kd_loss(
    pred: Tensor, truth: Tensor, tough: Tensor, tolerant: Tensor, weights: tuple[float, float, float] = (2.0, 1.0, 1.0),
    assist: tuple[float, float, float, float] = (1.9, -0.45, 1.8, -0.4), margin: float = 0.15,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The total and its parts: main, tough, tolerant.

    Args:
        weights: of the three parts.
        assist: (alpha, alpha_minus) of the tough teacher, then of the tolerant one.
        margin: share of a teacher's distance within which nothing pushes.
    """
    parts = {
        "main": main_loss(pred, truth, tolerant),
        "tough": assistive_loss(pred, truth, tough, *assist[:2], margin),
        "tolerant": assistive_loss(pred, truth, tolerant, *assist[2:], margin),
    }
    return sum(w * part for w, part in zip(weights, parts.values(), strict=True)), parts  # type: ignore[return-value]


@dataclass(frozen=True)
class LandmarkKD(Learner):
    """Trains a student on landmark points with a tough and a tolerant teacher.

    Args:
        tough, tolerant: trained networks with the student's inputs and outputs; they are run in eval mode and never changed. Both None:
            the loader's targets hold their answers, see :func:`with_teachers`.
        weights, assist, margin: see :func:`landmark_kd_loss`.
        optimizer, schedule, clip: as of :class:`~neurarium.learn.fit.Backprop`.

    ``history.extra`` holds the three parts of the loss, step by step.
    """

    tough: nn.Module | None = None
    tolerant: nn.Module | None = None
    weights: tuple[float, float, float] = (2.0, 1.0, 1.0)
    assist: tuple[float, float, float, float] = (1.9, -0.45, 1.8, -0.4)
    margin: float = 0.15
    optimizer: Callable[..., Optimizer] = ADAM
    schedule: Callable[[Optimizer], Any] | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if (self.tough is None) != (self.tolerant is None):
            raise BadInput("give both teachers, or none and targets made by with_teachers")
        if len(self.weights) != 3 or len(self.assist) != 4 or not 0 <= self.margin <= 1:
            raise BadInput(f"needs 3 weights, 4 assist weights and a margin in [0, 1]; got {self.weights}, {self.assist}, {self.margin}")

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        parts: dict[str, list[float]] = {"main": [], "tough": [], "tolerant": []}
        teachers = _silent((self.tough, self.tolerant), model, device)

        def loss(x: Any, output: Tensor, y: Tensor) -> Tensor:
            if teachers:
                truth, answers = y, [_tensor(call(t, x)) for t in teachers]
            elif y.ndim > 1 and y.shape[1] == 3:
                truth, *answers = y.unbind(1)
            else:
                raise BadInput(f"without teachers y holds truth, tough and tolerant points, (n, 3, ...); got {tuple(y.shape)}")
            for what, t in zip(("the truth", "a teacher's answer"), (truth, answers[0]), strict=True):
                if t.shape != output.shape:
                    raise BadInput(f"{what} has shape {tuple(t.shape)}, the student's answer {tuple(output.shape)}")
            total, now = landmark_kd_loss(output, truth, *answers, self.weights, self.assist, self.margin)
            for name, value in now.items():
                parts[name].append(float(value.detach()))
            return total

        learner = _Taught(loss="mse", optimizer=self.optimizer, schedule=self.schedule, clip=self.clip, rule=loss)
        history = learner.fit(model, loader, epochs=epochs, val=val, device=device, seed=seed, callbacks=callbacks, resume=resume)
        return replace(history, extra={**history.extra, **{f"{k}_loss": tuple(v) for k, v in parts.items()}})


@dataclass(frozen=True)
class SoftTargets(Learner):
    """Plain knowledge distillation of a classifier: (1 - weight) CE(labels) + weight T^2 KL(teacher at T || student at T).

    Args:
        teacher: a trained classifier of the same inputs and classes; run in eval mode, never changed.
        temperature: T; higher shows more of what the teacher thinks of wrong classes.
        weight: of the teacher's part.
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.7
    optimizer: Callable[..., Optimizer] = ADAM
    schedule: Callable[[Optimizer], Any] | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.weight <= 1:
            raise BadInput(f"temperature must be above 0 and weight in [0, 1]; got {self.temperature} and {self.weight}")

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        (teacher,) = _silent((self.teacher,), model, device)

        def loss(x: Any, output: Tensor, y: Tensor) -> Tensor:
            check_labels(output, y)
            soft = F.log_softmax(_tensor(call(teacher, x)) / self.temperature, 1)
            if soft.shape != output.shape:
                raise BadInput(f"the teacher answers {tuple(soft.shape)}, the student {tuple(output.shape)}")
            kl = (soft.exp() * (soft - F.log_softmax(output / self.temperature, 1))).sum(1).mean()
            return (1 - self.weight) * F.cross_entropy(output, y) + self.weight * self.temperature**2 * kl

        learner = _Taught(optimizer=self.optimizer, schedule=self.schedule, clip=self.clip, rule=loss)
        return learner.fit(model, loader, epochs=epochs, val=val, device=device, seed=seed, callbacks=callbacks, resume=resume)


def with_teachers(data: TensorData, tough: nn.Module, tolerant: nn.Module, *, batch_size: int = 500) -> TensorData:
    """The same inputs with targets (n, 3, ...): truth, the tough teacher's answer, the tolerant teacher's."""
    tough, tolerant = _silent((tough, tolerant), None, None)
    answers = []
    with torch.no_grad():
        for x in data.x.split(batch_size):
            answers.append(torch.stack([_tensor(t(x.to(device_of(t)))).to(data.y) for t in (tough, tolerant)], 1))
    return TensorData(data.x, torch.cat([data.y[:, None], torch.cat(answers)], 1))


class ActiveShapeModel:
    """Shapes as a mean and a few directions: ``fit(shapes).smooth(shapes)``.

    Args:
        n_components: directions to keep; or
        variance: the share of variance that they must hold.
        limit: of each coefficient, in standard deviations.
        align: bring shapes to one place, size and angle first; smoothed shapes are put back.
    """

    def __init__(self, n_components: int | None = None, *, variance: float = 0.95, limit: float = 3.0, align: bool = True) -> None:
        if (n_components is not None and n_components < 1) or not 0 < variance <= 1 or not limit > 0:
            raise BadInput(f"needs n_components >= 1, variance in (0, 1], limit > 0; got {n_components}, {variance}, {limit}")
        self.n_components, self.variance, self.limit, self.align = n_components, variance, limit, align

    def fit(self, shapes: Tensor) -> ActiveShapeModel:
        """Learn from shapes (n, 2 k): x and y of each point in turn."""
        rows = self._checked(shapes)
        if len(rows) < 2:
            raise BadInput(f"a shape model needs at least 2 shapes, got {len(rows)}")
        self.mean = rows.mean(0)
        if self.align:
            self.mean = _centred(rows[:1])[0] / _centred(rows[:1]).norm()
            for _ in range(5):  # generalised Procrustes analysis; it settles in two or three rounds
                aligned = _similarity(rows, self.mean)[0]
                self.mean = aligned.mean(0) / aligned.mean(0).norm()
            rows = _similarity(rows, self.mean)[0]
            self.mean = rows.mean(0)
        _, s, v = torch.linalg.svd(rows - self.mean, full_matrices=False)
        power = s.square() / (len(rows) - 1)
        share = power.cumsum(0) / power.sum().clamp_min(1e-300)
        keep = int((share < self.variance - 1e-12).sum()) + 1 if self.n_components is None else self.n_components
        keep = min(keep, len(s))
        self.components, self.spread, self.variance_kept = v[:keep], power[:keep].sqrt(), float(share[keep - 1])
        return self

    def smooth(self, shapes: Tensor) -> Tensor:
        """Each shape as the nearest that the model can say."""
        if not hasattr(self, "components"):
            raise BadInput("fit the shape model first")
        rows = self._checked(shapes)
        if rows.shape[1] != len(self.mean):
            raise BadInput(f"the model has shapes of {len(self.mean)} numbers, not {rows.shape[1]}")
        back = None
        if self.align:
            rows, back = _similarity(rows, self.mean)
        c = (rows - self.mean) @ self.components.T
        c = torch.maximum(torch.minimum(c, self.limit * self.spread), -self.limit * self.spread)
        smooth = self.mean + c @ self.components
        return (smooth if back is None else back(smooth)).to(shapes)

    @staticmethod
    def _checked(shapes: Tensor) -> Tensor:
        if shapes.ndim != 2 or shapes.shape[1] % 2 or not shapes.numel():
            raise BadInput(f"shapes must be (n, 2 k), got {tuple(shapes.shape)}")
        if not bool(torch.isfinite(shapes).all()):
            raise BadInput("shapes have values that are not finite")
        return shapes.detach().double().cpu()


def _centred(rows: Tensor) -> Tensor:
    return torch.view_as_real(_complex(rows) - _complex(rows).mean(1, keepdim=True)).flatten(1)


def _complex(rows: Tensor) -> Tensor:
    return torch.view_as_complex(rows.reshape(len(rows), -1, 2).contiguous())


def _similarity(rows: Tensor, target: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Shapes moved, turned and scaled onto the target by least squares (points as complex numbers), and the way back."""
    z, t = _complex(rows), _complex(target[None])
    place, aim = z.mean(1, keepdim=True), t.mean(1, keepdim=True)
    z, t = z - place, t - aim
    factor = (z.conj() * t).sum(1, keepdim=True) / z.abs().square().sum(1, keepdim=True).clamp_min(1e-300)
    moved = torch.view_as_real(factor * z + aim).flatten(1)
    return moved, lambda smooth: torch.view_as_real((_complex(smooth) - aim) / factor + place).flatten(1)


@dataclass(frozen=True)
class _Taught(Backprop):
    """Backpropagation of a loss that sees the input too."""

    rule: Callable[[Any, Tensor, Tensor], Tensor] | None = None

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        output = _tensor(call(model, x))
        loss = self.rule(x, output, y)  # type: ignore[misc]
        loss.backward()
        return loss, output


def _silent(teachers: tuple[nn.Module | None, ...], student: nn.Module | None, device: Any) -> list[nn.Module]:
    """Copies in eval mode without gradients, where the student is."""
    result = []
    for teacher in teachers:
        if teacher is None:
            continue
        if teacher is student:
            raise UnsupportedModel("the student cannot be its own teacher", module=type(teacher).__name__)
        place = device if device is not None else device_of(teacher if student is None else student)
        result.append(copy.deepcopy(teacher).to(place).eval().requires_grad_(False))
    return result


def _tensor(output: Any) -> Tensor:
    """The answer of a model that may give more than a tensor."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else next(t for t in tree_leaves(output) if isinstance(t, Tensor))
