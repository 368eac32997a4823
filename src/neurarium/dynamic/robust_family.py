"""ProARD: one elastic network, trained once so that every network inside it resists attacks.

The largest network inside is trained robustly first. It then teaches the others, which share its weights, by its soft labels, on inputs
that are attacked anew for each student. Drawing any student from the start fails both sides: small ones disturb the weights that large ones
need, and each is drawn too seldom. So students enter progressively, one dimension (width, depth, expand) after another, the large values
first, and more of them are drawn per update the more there are. Before a dimension opens, its units are sorted by importance, so that the
leading slice, which is what small students get, is the best one.

*Equations.* t the teacher's softmax on clean inputs, s_c the logits of student c, x' the attacked input, KL(p || s) of p and softmax s:

- *teacher* (TRADES): CE(s(x), y) + beta KL(softmax s(x) || s(x')), x' = argmax over the ball of the KL;
- *student* (RSLAD): 5/6 KL(t || s_c(x')) + 1/6 KL(t || s_c(x)), x' = argmax over the ball of KL(t || s_c(x')): no hard labels;
- *attack*: ``attack_steps`` signed steps (:func:`~neurarium.dynamic.attacks.pgd`) from x + 0.001 N(0, 1), in evaluation mode;
- *update*: the mean over ``accumulate`` students drawn uniformly from those that are open.

*Dimensions.* ``depth``: the :class:`~neurarium.dynamic.elastic.Depth` slots; ``expand``: the widths that only blocks inside a depth use,
such as the hidden channels of a residual block or attention heads; ``width``: all other widths.

*Source.* Mousavi, Daneshtalab et al., "ProARD: progressive adversarial robustness distillation: provide wide range of robust students",
arXiv 2506.07666; losses of Zhang et al. 2019 (TRADES) and Zi et al. 2021 (RSLAD).

*Departures.* The teacher is the largest network as it was when the students' training began, kept fixed; the largest network goes on as one
of the students. (The paper calls it dynamic and trained jointly; without labels a teacher that moves with its students has nothing to hold
it.) Gradients of the students drawn together are averaged. The learning rate changes by the epoch, and momentum starts anew in each phase,
as units have moved. The paper's search among the trained students (a predictor and NSGA-II) is not here: a few are simply measured.

*Cost.* A student's update: attack_steps + 2 forward and backward passes of the student and a forward pass of the teacher. ``History.extra``
has ``flops``, counted, cumulative by epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from neurarium.dynamic.attacks import LOSSES, pgd
from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.elastic import Config, ElasticFamily, ElasticNorm, Sliced, reorder, slots
from neurarium.dynamic.samplers import Uniform
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Learner, check_labels, loop, trainable
from neurarium.roles import History

__all__ = ["Phase", "ProARD", "dimensions", "rslad_loss", "trades_loss"]

DEFAULT: Callable[..., Optimizer] = partial(SGD, lr=7.5e-3, momentum=0.9, weight_decay=3e-5)


def trades_loss(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """CE(clean, y) + beta KL(softmax clean || attacked) of logits ``(n, classes)``."""
    return F.cross_entropy(clean, y) + beta * LOSSES["kl"](attacked, clean.softmax(-1)).mean()


def rslad_loss(clean: Tensor, attacked: Tensor, teacher: Tensor) -> Tensor:
    """5/6 KL(teacher || attacked) + 1/6 KL(teacher || clean) of logits, the teacher's being probabilities ``(n, classes)``."""
    return (5 * LOSSES["kl"](attacked, teacher).mean() + LOSSES["kl"](clean, teacher).mean()) / 6


def dimensions(family: ElasticFamily) -> dict[str, tuple[int, ...]]:
    """``width``, ``depth`` and ``expand``: the positions in ``Config.key`` that belong to each."""
    widths, depths = slots(family.model)
    outside: set[int] = set()  # widths that something outside of all depths uses
    inside = {id(m) for depth in depths for m in depth.modules() if m is not depth}
    for module in family.model.modules():
        if isinstance(module, Sliced) and id(module) not in inside:
            outside.update(id(w) for axes in module.axes().values() for w in axes.values())
    shared = outside or {id(w) for w in widths}
    return {
        "width": tuple(i for i, w in enumerate(widths) if id(w) in shared),
        "depth": tuple(range(len(widths), len(widths) + len(depths))),
        "expand": tuple(i for i, w in enumerate(widths) if id(w) not in shared),
    }


@dataclass(frozen=True)
class Phase:
    """So many epochs with students drawn from ``configs``; ``opens``: dimensions whose units are sorted first; ``rate``: of learning."""

    epochs: int
    configs: tuple[Config, ...]
    draws: int = 1
    opens: tuple[str, ...] = ()
    rate: float = 1.0


@dataclass(frozen=True)
class ProARD(Learner):
    """Trains an :class:`~neurarium.dynamic.elastic.ElasticFamily` whose configs vary in the dimensions that ``stages`` names.

    Args:
        stages: the dimensions in the order in which they open; several in a tuple open together. Without any, the teacher alone is trained.
        eps, step, attack_steps: the ball (sup-norm) and the attack; ``eps=0`` trains without one. ``clip``: the range of inputs.
        beta: weight of the teacher's robustness.
        kd: ``"rslad"``: the teacher teaches the students; ``None``: they learn from the labels as the teacher did.
        accumulate: students per update, for each stage.
        teacher_epochs: 0 takes the family's largest network as it comes.
        open_epochs, stage_epochs: from the second stage on a dimension first opens down to its middle value, at a third of the learning
            rate, then whole. A dimension of two values opens at once. The last phase goes on for as long as ``fit`` is told.
        warmup: epochs in which the learning rate of a ``stage_epochs`` phase rises; it falls by a cosine in every phase.
        optimizer: makes the optimizer.
    """

    stages: tuple[str | tuple[str, ...], ...] = ("width", "depth", "expand")
    eps: float = 8 / 255
    step: float = 2 / 255
    attack_steps: int = 10
    beta: float = 6.0
    kd: Literal["rslad"] | None = "rslad"
    accumulate: tuple[int, ...] = (1, 2, 4)
    teacher_epochs: int = 120
    open_epochs: int = 25
    stage_epochs: int = 120
    warmup: int = 5
    clip: tuple[float, float] | None = (0.0, 1.0)
    optimizer: Callable[..., Optimizer] = field(default=DEFAULT)

    def __post_init__(self) -> None:
        if len(self.accumulate) != len(self.stages) or any(n < 1 for n in self.accumulate):
            raise BadInput(f"accumulate needs a number of students for each of the {len(self.stages)} stages, not {self.accumulate}")
        if unknown := {d for s in self.stages for d in _names(s)} - {"width", "depth", "expand"}:
            raise BadInput(f"stages names {sorted(unknown)[0]!r}, which is not 'width', 'depth' or 'expand'")
        if self.kd not in ("rslad", None):
            raise BadInput(f"kd must be 'rslad' or None, not {self.kd!r}")
        numbers = {k: getattr(self, k) for k in ("eps", "step", "attack_steps", "beta", "teacher_epochs", "open_epochs", "warmup")}
        if bad := [k for k, v in numbers.items() if not v >= 0]:
            raise BadInput(f"{bad[0]} must be at least 0, not {numbers[bad[0]]}")
        if self.stage_epochs < 1 or (not self.stages and self.teacher_epochs < 1):
            raise BadInput("there must be at least one epoch to train in")

    def phases(self, family: ElasticFamily) -> list[Phase]:
        """The teacher's phase, then what is open when.

        Raises:
            UnsupportedModel: the configs do not vary in a dimension that ``stages`` names, or no config contains all others.
        """
        name = type(family).__name__
        if not isinstance(family, ElasticFamily):
            raise UnsupportedModel("is no ElasticFamily(model, configs, example): there are no students inside", module=name)
        if any(m.batch and m.statistics == "recalibrate" for m in family.modules() if isinstance(m, ElasticNorm)):
            raise UnsupportedModel("keeps no batch statistics in training, so it cannot be attacked as it will be used", module=name)
        largest = family.configs[-1]
        if not all(c.within(largest) for c in family.configs):
            raise UnsupportedModel("has no config that contains all others: nobody to teach them", module=name)
        where, free = dimensions(family), {i: {largest.key[i]} for i in range(len(largest.key))}

        def open_now() -> tuple[Config, ...]:
            return tuple(c for c in family.configs if all(v in free[i] for i, v in enumerate(c.key)))

        found = [Phase(self.teacher_epochs, (largest,))]
        for i, (stage, draws) in enumerate(zip(self.stages, self.accumulate)):
            opens = _names(stage)
            values = {j: sorted({c.key[j] for c in family.configs}) for d in opens for j in where[d]}
            for d in opens:
                if all(len(values[j]) == 1 for j in where[d]):
                    raise UnsupportedModel(f"has no configs that differ in {d}", module=name)
            before = open_now()
            if i:
                free.update({j: set(v[len(v) // 2 :]) for j, v in values.items()})
                if (some := open_now()) != before and self.open_epochs:
                    found.append(Phase(self.open_epochs, some, draws, opens, 1 / 3))
                    opens = ()
            free.update({j: set(v) for j, v in values.items()})
            found.append(Phase(self.stage_epochs, open_now(), draws, opens))
        return found

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        phases = self.phases(model)
        if device is not None:
            model.to(device)
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        optimizer, clock, largest = self.optimizer(trainable(model)), _Clock(), model.configs[-1]
        rates = [group["lr"] for group in optimizer.param_groups]

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, None]:
            index, epoch = _where(phases, clock.epoch)
            phase = phases[index]
            if index != clock.phase:
                if clock.phase == 0:
                    teacher.load_state_dict(model.state_dict())
                _sort_units(model, phase.opens)
                optimizer.state.clear()
                clock.phase = index
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * self._rate(phase, epoch)
            students = Uniform(phase.configs, phase.draws).sample(0) if index else [largest]
            optimizer.zero_grad()
            taught = None
            if index and self.kd:
                with clock.counted("teacher", x.shape), torch.no_grad(), evaluating(teacher):
                    taught = teacher.run(x, largest).softmax(-1)
            total = torch.zeros((), device=x.device)
            for config in students:
                with clock.counted(config, taught is None, x.shape):
                    loss = self.loss(model, config, x, y, taught) / len(students)
                    loss.backward()
                total = total + loss.detach()
            if torch.isfinite(total):
                optimizer.step()
            return total, None

        def next_epoch(progress: Any) -> None:
            del progress
            clock.epoch += 1
            clock.spent.append(clock.flops)

        history = loop(
            model, loader, epochs=epochs, step=step, parts={"optimizer": optimizer, "teacher": teacher, "clock": clock}, val=val,
            seed=seed, callbacks=[next_epoch, *callbacks], resume=resume,
        )  # fmt: skip
        return replace(history, extra={**history.extra, "flops": tuple(clock.spent)})

    def loss(self, family: ElasticFamily, config: Config, x: Tensor, y: Tensor, taught: Tensor | None = None) -> Tensor:
        """The loss of one student on a batch; without ``taught``, the teacher's probabilities, it learns from the labels."""
        run = partial(family.run, config=config)
        attacked = self.attack(family, config, x, taught)
        clean = run(x)
        check_labels(clean, y)
        return trades_loss(clean, run(attacked), y, self.beta) if taught is None else rslad_loss(clean, run(attacked), taught)

    def attack(self, family: ElasticFamily, config: Config, x: Tensor, taught: Tensor | None = None) -> Tensor:
        """x' on which a student is far from ``taught``, or from what it says about x."""
        if not x.is_floating_point() or bool(x.isnan().any()):
            raise BadInput("the input must be floating-point numbers, and has NaN or is none")
        if self.eps == 0:
            return x
        run = partial(family.run, config=config)
        if taught is None:
            with torch.no_grad(), evaluating(family):
                taught = run(x).softmax(-1)
        return pgd(
            run, x, taught, eps=self.eps, step=self.step, steps=self.attack_steps, loss="kl", start=0.001, clip=self.clip, best=False,
            module=family,
        )  # fmt: skip

    def _rate(self, phase: Phase, epoch: int) -> float:
        at = min(epoch, phase.epochs - 1) / max(1, phase.epochs)
        rising = 1.0 if phase.rate < 1 else min(1.0, (epoch + 1) / (min(self.warmup, phase.epochs - 1) + 1))
        return phase.rate * rising * (1 + math.cos(math.pi * at)) / 2


def _names(stage: str | tuple[str, ...]) -> tuple[str, ...]:
    return (stage,) if isinstance(stage, str) else tuple(stage)


def _where(phases: list[Phase], epoch: int) -> tuple[int, int]:
    """The phase of an epoch, and the epoch in it; the last one does not end."""
    for i, phase in enumerate(phases[:-1]):
        if epoch < phase.epochs:
            return i, epoch
        epoch -= phase.epochs
    return len(phases) - 1, epoch


def _sort_units(family: ElasticFamily, opens: tuple[str, ...]) -> None:
    """Important units first, in the widths that are about to open; the others keep the order that students have learned."""
    where = dimensions(family)
    moved = {i for d in opens if d != "depth" for i in where[d]}
    if moved:
        widths = slots(family.model)[0]
        if len({w.name for w in widths}) < len(widths):
            raise UnsupportedModel("has two widths of one name", module=type(family.model).__name__)
        reorder(family.model, {w.name: torch.zeros(w.size) for i, w in enumerate(widths) if i not in moved})


class _Clock:
    """Where the training is and what it has spent; each kind of update is counted when it is first done."""

    def __init__(self) -> None:
        self.epoch, self.phase, self.flops = 0, 0, 0
        self.spent: list[int] = []
        self.prices: dict[Any, int] = {}

    @contextmanager
    def counted(self, *kind: Any) -> Iterator[None]:
        if kind in self.prices:
            yield
        else:
            with _Flops() as counter:
                yield
            self.prices[kind] = counter.total
        self.flops += self.prices[kind]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "phase": self.phase, "flops": self.flops, "spent": list(self.spent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.phase, self.flops, self.spent = (state[k] for k in ("epoch", "phase", "flops", "spent"))
        self.spent = list(self.spent)


class _Flops(TorchDispatchMode):
    """torch's FLOP counter without its hooks on modules, which refuse the gradients that an attack asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
