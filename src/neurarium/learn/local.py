"""Layer-local learning: every block of a model has a loss of its own, and no gradient crosses from one block into another.

A rule is a :class:`LocalObjective`: the blocks that it trains, what it learns beside them (readouts), one loss a block, and how it
predicts. :class:`LocalLearner` drives any of them in one of two orders:

- ``parallel``: each batch goes up through the blocks once; each block takes one step on its own loss. Graphs are freed block by block, so
  the memory kept for gradients is that of the largest block.
- ``greedy``: block i is trained to the end before block i+1 begins. What the finished blocks put out is computed **once** and cached
  (``cache=False``, for inputs that change from pass to pass, computes it anew for every batch).

:func:`gradient_alignment` is the meter for all such rules: the cosine between their updates and the gradient of backpropagation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.fit import (
    Diverged,
    EarlyStopping,
    History,
    Learner,
    Progress,
    copied,
    device_of,
    diverged,
    evaluate,
    forked_rng,
    loop,
    to,
)
from neurarium.roles import Loader

__all__ = ["Facts", "LocalLearner", "LocalObjective", "Readout", "goodness", "gradient_alignment", "overlay_label", "survey"]

ADAM: Callable[..., Optimizer] = partial(Adam, lr=1e-3)
_OBJECTIVES: WeakKeyDictionary[nn.Module, dict[type, LocalObjective]] = WeakKeyDictionary()  # what each model was last trained with


@dataclass(frozen=True)
class Facts:
    """What a rule may know of the training data before it starts."""

    example: Tensor  # the first batch of inputs
    classes: int
    high: float  # largest input value, the value of an overlaid label


class LocalObjective(nn.Module):
    """One local loss a block. Submodules are what the rule learns beside the model; the model's own blocks are only referred to."""

    blocks: tuple[nn.Module, ...]
    repeatable = True  # False where what enters a block is drawn anew in each pass, so that it must not be cached

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)

    def enter(self, x: Tensor, y: Tensor) -> Tensor:
        """The input of the first block, made of a batch."""
        del y
        return x

    def between(self, h: Tensor) -> Tensor:
        """What the next block is given of a block's output."""
        return h

    @abstractmethod
    def loss(self, i: int, h_in: Tensor, h_out: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss of block ``i``, and its scores of the classes (n, classes) where it has any."""

    def learned(self, i: int) -> list[nn.Parameter]:
        """The parameters that the loss of block ``i`` trains: those of the block; add the readout's."""
        return [p for p in self.blocks[i].parameters() if p.requires_grad]

    def prepare(self, model: nn.Module, loader: Loader, *, epochs: int, seed: int) -> None:
        """What a rule does once before any block is trained."""

    def solve(self, i: int, inputs: Tensor, y: Tensor) -> Mapping[str, float] | None:
        """Train block ``i`` in closed form on all its inputs and return its measurements; ``None`` where only descent will do."""
        return None

    @abstractmethod
    def predictor(self, model: nn.Module) -> nn.Module:
        """A module that maps inputs to class scores the way the rule predicts."""


@dataclass(frozen=True, kw_only=True)
class LocalLearner(Learner):
    """Drives a :class:`LocalObjective`, which a subclass names in :meth:`objective`.

    Args:
        optimizer: makes the optimizer of one block from its parameters.
        order: ``"parallel"`` or ``"greedy"``. In greedy order ``epochs`` is for each block, callbacks watch one block at a time (``True``
            ends that block), ``history.train[i]["block"]`` says which it was, and a resumed run needs the ``epochs`` of the first.
        detach: ``False`` lets the local losses' gradients flow down through all blocks (an ablation: deep supervision, not a local rule).
        early_stopping: epochs without progress of the (local) validation loss after which a block, or the whole, is done; it keeps the
            weights of its best epoch.
        cache: greedy only: keep the activations of finished blocks, or compute them for every batch.
        cut: the ``blocks`` to cut the model into, see :func:`~neurarium.learn.chain.as_chain`.
    """

    optimizer: Callable[..., Optimizer] = ADAM
    order: str = "parallel"
    detach: bool = True
    early_stopping: int | None = None
    cache: bool = True
    cut: Sequence[str | Sequence[str]] | None = None

    @abstractmethod
    def objective(self, chain: Chain, facts: Facts) -> LocalObjective:
        """The rule's objective for this model; raises ``UnsupportedModel`` for one that it cannot train."""

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if self.order not in ("parallel", "greedy"):
            raise BadInput(f"order must be 'parallel' or 'greedy', not {self.order!r}")
        if device is not None:
            model.to(device)
        with forked_rng(device_of(model)):
            torch.manual_seed(seed)
            first = generator_state(loader)
            if resume and resume.get("first") is not None:
                loader.generator.set_state(resume["first"].cpu())
            facts = survey(loader, device_of(model))
            objective = self.objective(as_chain(model, facts.example, self.cut), facts).to(facts.example.device)
        if not any(objective.learned(i) for i in range(len(objective.blocks))):
            raise UnsupportedModel("no block has a parameter to train", module=type(model).__name__)
        _OBJECTIVES.setdefault(model, {})[type(self)] = objective
        if not resume:
            objective.prepare(model, loader, epochs=epochs, seed=seed)
        callbacks = [*callbacks] if self.early_stopping is None else [*callbacks, EarlyStopping(self.early_stopping)]
        run = self._parallel if self.order == "parallel" else self._greedy
        return run(model, objective, loader, epochs=epochs, val=val, seed=seed, callbacks=callbacks, resume=resume, first=first)

    def predictor(self, model: nn.Module) -> nn.Module:
        """The module that predicts the way this rule does. The model must have been trained (or resumed) by this kind of learner."""
        return self.trained(model).predictor(model)

    def trained(self, model: nn.Module) -> LocalObjective:
        """The objective that last trained ``model``, with its readouts."""
        objective = _OBJECTIVES.get(model, {}).get(type(self))
        if objective is None:
            raise BadInput(f"this model was not trained by a {type(self).__name__} in this process; fit it, or resume with the same epochs")
        return objective

    def _parallel(self, model, objective, loader, *, epochs, val, seed, callbacks, resume, first) -> History:
        optimizers = [self.optimizer(p) if (p := objective.learned(i)) else None for i in range(len(objective.blocks))]

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                h = objective.enter(x, y)
            losses = []
            for i, (block, optimizer) in enumerate(zip(objective.blocks, optimizers)):
                h_in = h.detach() if self.detach else h
                h_out = block(h_in)
                if optimizer is not None:
                    losses.append(objective.loss(i, h_in, h_out, y)[0])
                    if self.detach:
                        descend(losses[-1], [optimizer])
                h = objective.between(h_out.detach() if self.detach else h_out)
            if not self.detach:
                descend(torch.stack(losses).sum(), [o for o in optimizers if o is not None])
            return next((loss for loss in losses if not torch.isfinite(loss)), losses[-1]), None

        def evaluator(data: Loader) -> dict[str, float]:
            return evaluate(objective.predictor(model), data)

        del first
        parts = {"objective": objective} | {f"optimizer {i}": o for i, o in enumerate(optimizers)}
        return loop(
            model, loader, epochs=epochs, step=step, parts=parts, val=val, evaluator=evaluator,
            seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip

    def _greedy(self, model, objective, loader, *, epochs, val, seed, callbacks, resume, first) -> History:
        if resume and resume["epochs"] != epochs:
            raise BadInput(f"a greedy run of epochs={resume['epochs']} for each block cannot go on with epochs={epochs}")
        if resume:
            first = resume["first"]
            model.load_state_dict(resume["inner"]["parts"]["model"])
            objective.load_state_dict(resume["inner"]["parts"]["objective"])
        before = dict(resume["before"]) if resume else {"train": (), "val": (), "losses": ()}
        current = resume["block"] if resume else 0
        cached = self.cache and objective.repeatable
        keep = partial(_Cached, objective, seed=seed) if cached else partial(_Recomputed, objective)
        with forked_rng(device_of(model)):
            torch.manual_seed(seed)
            data = keep(loader, device=device_of(model))
            watched = None if val is None else keep(val, device=device_of(model))

        state: dict[str, Any] = dict(resume or {})
        for i, block in enumerate(objective.blocks):
            parameters = objective.learned(i)
            solved = objective.solve(i, data.x, data.y) if cached and i >= current and parameters else None
            if solved is not None:
                before["train"] += ({**solved, "block": i},)
                parts = {"model": copied(model.state_dict()), "objective": copied(objective.state_dict())}
                state = {"block": i + 1, "epochs": epochs, "before": dict(before), "inner": {"parts": parts}, "first": first}
            elif i >= current and parameters:
                optimizer = self.optimizer(parameters)

                def step(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
                    loss, scores = objective.loss(i, h, block(h), y)  # noqa: B023 (used in this round only)
                    descend(loss, [optimizer])  # noqa: B023
                    return loss, scores

                def whole(inner: dict[str, Any]) -> dict[str, Any]:
                    return {"block": i, "epochs": epochs, "before": dict(before), "inner": inner, "first": first}  # noqa: B023

                try:
                    history = loop(
                        model, data, epochs=epochs, step=step, parts={"objective": objective, "optimizer": optimizer},
                        val=watched, evaluator=partial(_measure, objective, i), forward=block, seed=seed,
                        callbacks=[_with_state(c, whole) for c in callbacks],
                        resume=resume["inner"] if resume and i == current else None,
                    )  # fmt: skip
                except Diverged as error:
                    if error.module is None:  # the block is sound: what an earlier one handed on is not
                        raise diverged(model, to(next(iter(loader))[0], device_of(model)), nan, error.step) from None
                    raise
                state = whole(dict(history.state))
                before["train"] += tuple({**e, "block": i} for e in history.train)
                before["val"] += tuple({**e, "block": i} for e in history.val)
                before["losses"] += tuple(history.extra["loss"])
            data.advance(i, objective)
            if watched is not None:
                watched.advance(i, objective)
        return History(before["train"], before["val"], len(before["losses"]), {"loss": before["losses"]}, state)


def descend(loss: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """One step of each optimizer; none if the loss is not finite (the loop reports that one)."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    if torch.isfinite(loss.detach()):
        for optimizer in optimizers:
            optimizer.step()


def _with_state(callback: Callable[[Progress], bool | None], whole: Callable[..., Any]) -> Callable[[Progress], bool | None]:
    if isinstance(callback, EarlyStopping):
        return callback
    return lambda progress: callback(replace(progress, state=lambda: whole(progress.state())))


class _Cached:
    """All inputs of the current block in memory, shuffled anew in each pass; :meth:`advance` replaces them by the block's outputs."""

    def __init__(self, objective: LocalObjective, loader: Loader, *, seed: int, device: torch.device) -> None:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(0)
        batches = [(to(x, device), to(y, device)) for x, y in loader]
        if not batches:
            raise BadInput("the loader yielded no samples")
        self.size, self.seed, self.epoch = len(batches[0][1]), seed, 0
        self.x, self.y = torch.cat([objective.enter(x, y) for x, y in batches]), torch.cat([y for _, y in batches])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = TensorData(self.x, self.y).batches(self.size, seed=self.seed)
        batches.set_epoch(self.epoch)
        return iter(batches)

    def advance(self, i: int, objective: LocalObjective) -> None:
        with torch.no_grad(), eval_mode(objective.blocks[i]):
            parts = [objective.between(objective.blocks[i](x)) for x in self.x.split(max(self.size, 256))]
        self.x = torch.cat(parts)


class _Recomputed:
    """The loader's batches, sent up through the finished blocks in each pass."""

    def __init__(self, objective: LocalObjective, loader: Loader, *, device: torch.device) -> None:
        self.objective, self.loader, self.device, self.done = objective, loader, device, 0
        if hasattr(loader, "set_epoch"):
            self.set_epoch = loader.set_epoch
        if (generator := getattr(loader, "generator", None)) is not None:
            self.generator = generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            x, y = to(x, self.device), to(y, self.device)
            with torch.no_grad():
                h = self.objective.enter(x, y)
                for block in self.objective.blocks[: self.done]:
                    with eval_mode(block):
                        h = self.objective.between(block(h))
            yield h, y

    def advance(self, i: int, objective: LocalObjective) -> None:
        del objective
        self.done = i + 1


class eval_mode:
    """Eval mode for a while, module by module."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *error: Any) -> None:
        for module, mode in self.modes:
            module.training = mode


def _measure(objective: LocalObjective, i: int, data: Loader) -> dict[str, float]:
    """Local loss, and accuracy of the local scores where there are any."""
    total, n, correct, scored = 0.0, 0, 0, False
    device = next((p.device for p in objective.learned(i)), torch.device("cpu"))
    with torch.no_grad(), eval_mode(objective.blocks[i]), eval_mode(objective), forked_rng(device):
        for h, y in data:
            loss, scores = objective.loss(i, h, objective.blocks[i](h), y)
            total += float(loss) * len(y)
            n += len(y)
            if scores is not None:
                scored, correct = True, correct + int((scores.argmax(1) == y).sum())
    return {"loss": total / n} | ({"accuracy": correct / n} if scored else {})


def generator_state(loader: Loader) -> Tensor | None:
    generator = getattr(loader, "generator", None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


def survey(loader: Loader, device: torch.device) -> Facts:
    """One pass over the data: the first batch, the number of classes, the largest value. The loader's order is as before afterwards."""
    state = generator_state(loader)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    example, classes, high = None, 0, -float("inf")
    for x, y in loader:
        if not isinstance(x, Tensor) or y.is_floating_point() or y.ndim != 1:
            raise BadInput("a local rule needs batches (x, y) of one input tensor and one integer class a sample")
        if not torch.isfinite(x).all():
            raise BadInput("x holds a value that is not finite")
        if example is None and len(x):
            example = x
        if len(y):
            if int(y.min()) < 0:
                raise BadInput(f"y holds class {int(y.min())}; classes count from 0")
            classes, high = max(classes, int(y.max()) + 1), max(high, float(x.max()))
    if example is None:
        raise BadInput("the loader yielded no samples")
    if state is not None:
        loader.generator.set_state(state)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    return Facts(to(example, device), classes, high)


class Readout(nn.Module):
    """A linear map from a block's activations to class scores: images are flattened, sequences averaged over time.

    Args:
        shape: of the activation of one sample: ``(features,)``, ``(time, features)`` or ``(channels, height, width)``.
    """

    def __init__(self, shape: Sequence[int], classes: int, *, bias: bool = False) -> None:
        super().__init__()
        self.sequence = len(shape) == 2
        features = shape[-1] if self.sequence else int(torch.Size(shape).numel())
        self.linear = nn.Linear(features, classes, bias=bias)

    def features(self, h: Tensor) -> Tensor:
        """What is mapped: (n, features)."""
        return h.mean(1) if self.sequence else h.flatten(1)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.features(h))


def overlay_label(x: Tensor, y: Tensor, classes: int, high: float) -> Tensor:
    """``x`` (n, ...) with its first ``classes`` values replaced by the one-hot label, ``high`` where it is one.

    ``high`` should be the largest value of the data: a smaller label is drowned, a larger one is all that is seen.
    """
    flat = x.flatten(1)
    if flat.shape[1] < classes:
        raise BadInput(f"the label of {classes} classes does not fit onto {flat.shape[1]} input values")
    return torch.cat([F.one_hot(y, classes).to(x.dtype) * high, flat[:, classes:]], 1).view_as(x)


def goodness(h: Tensor, kind: str = "mean_square") -> Tensor:
    """How active a layer is, one number a sample: the mean or the sum of its squared activations."""
    if kind not in ("mean_square", "sum_square"):
        raise BadInput(f"goodness must be 'mean_square' or 'sum_square', not {kind!r}")
    squares = h.flatten(1).square()
    return squares.mean(1) if kind == "mean_square" else squares.sum(1)


def gradient_alignment(learner: Learner, model: nn.Module, batch: tuple[Tensor, Tensor], *, seed: int = 0) -> dict[str, float]:
    """Cosine between a rule's update of each parameter and the descent direction of backpropagation (cross-entropy of ``model(x)``).

    The update is one batch from the model's present weights; where the learner has an ``optimizer`` setting, it is replaced by plain
    gradient descent, so that the rule is measured and not Adam. 1 = the gradient, 0 = orthogonal. NaN where either is zero. The model is
    not changed.
    """
    settings = {"optimizer": partial(SGD, lr=1.0)} if hasattr(learner, "optimizer") else {}
    if hasattr(learner, "order") and getattr(learner, "loss", None) != "mse":  # a closed form has only its own order
        settings["order"] = "parallel"
    trained, twin = deepcopy(model), deepcopy(model)
    replace(learner, **settings).fit(trained, [batch], epochs=1, seed=seed)  # type: ignore[type-var]
    twin.train()
    with forked_rng(device_of(twin)):
        torch.manual_seed(seed)
        F.cross_entropy(twin(to(batch[0], device_of(twin))), to(batch[1], device_of(twin))).backward()
    cosines = {}
    for (name, before), after, true in zip(model.named_parameters(), trained.parameters(), twin.parameters()):
        if true.grad is not None:
            update = (after - before).detach().double().flatten()
            descent = -true.grad.double().flatten()
            length = update.norm() * descent.norm()
            cosines[name] = float(update @ descent / length) if length > 0 else float("nan")
    return cosines
