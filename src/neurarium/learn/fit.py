"""The learner contract, and the plainest learner: backpropagation.

A learner keeps its settings; ``fit`` trains a model in place and says what happened. :func:`loop` is the epoch loop that every learner
shares: seeds, device, validation, callbacks, resuming, and the refusal to go on after a loss that is not a number. A rule only has to
say what one step is.

*Randomness.* ``fit`` seeds torch's generators with ``seed`` and puts the caller's back afterwards, so the same seed gives the same
weights whatever ran before; validation draws from a fork, so that watching a run never changes it. Generators of ``random`` and numpy are
not touched.

*Resuming.* ``history.state`` holds the weights, the optimizer, the schedule, the random state and the history so far.
``fit(..., epochs=n, resume=state)`` goes on **to** epoch n in total and ends bit for bit where an unbroken run of n epochs ends. The
loader must be the same; one with ``set_epoch`` is told the epoch, and a DataLoader's own generator is put back too.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import History, Loader

__all__ = [
    "Backprop",
    "Diverged",
    "EarlyStopping",
    "History",
    "Learner",
    "Progress",
    "evaluate",
    "load_checkpoint",
    "loop",
    "save_checkpoint",
    "trainable",
]

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
ADAMW: Callable[..., Optimizer] = partial(AdamW, lr=1e-3)


class Diverged(BadInput, FloatingPointError):
    """A loss became NaN or infinite. ``step`` counts from 0; ``module`` is the first in execution order whose output is not finite."""

    def __init__(self, message: str, *, step: int, module: str | None) -> None:
        super().__init__(message)
        self.step, self.module = step, module


class Learner(ABC):
    """Changes how parameters are learned. Settings in the constructor; nothing is computed before :meth:`fit`."""

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        epochs: int,
        val: Loader | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        callbacks: Sequence[Callable[[Progress], bool | None]] = (),
        resume: Mapping[str, Any] | None = None,
    ) -> History:
        """Train ``model`` in place.

        Args:
            loader: yields ``(x, y)`` batches and can be iterated again. ``x`` is a tensor, or a tuple of the model's arguments.
            epochs: in total, those of ``resume`` included.
            val: evaluated after each epoch.
            device: where to train; the model's own device by default.
            callbacks: each is called with a :class:`Progress` after each epoch; ``True`` ends the training.
            resume: ``state`` of an earlier history.

        Raises:
            BadInput: an empty loader, a negative ``epochs``, a loss that is not finite (:class:`Diverged`).
        """

    def predictor(self, model: nn.Module) -> nn.Module:
        """The module that returns logits the way this rule predicts; the model itself unless a rule says otherwise."""
        return model


@dataclass(frozen=True)
class Backprop(Learner):
    """Gradient descent by backpropagation, the baseline of every experiment: bit for bit the loop that one writes by hand.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, or a function of ``(output, y)``.
        optimizer: makes the optimizer from the parameters (or from ``groups(model)``).
        schedule: makes a learning-rate scheduler from the optimizer; it is stepped after every batch.
        clip: largest norm of the whole gradient.
        groups: makes the optimizer's parameter groups of the model, e.g. ``matrix_groups``.

    Subclasses that only obtain the gradient otherwise override :meth:`gradients`.
    """

    loss: str | Loss = "cross_entropy"
    optimizer: Callable[..., Optimizer] = ADAMW
    schedule: Callable[[Optimizer], Any] | None = None
    clip: float | None = None
    groups: Callable[[nn.Module], Any] | None = None

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradient in ``.grad`` of each parameter; return the loss and the output."""
        output = call(model, x)
        loss = find_loss(self.loss)(output, y)
        loss.backward()
        return loss, output

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if device is not None:
            model.to(device)
        parameters = trainable(model)
        optimizer = self.optimizer(parameters if self.groups is None else self.groups(model))
        parts: dict[str, Any] = {"optimizer": optimizer}
        schedule = parts["schedule"] = None if self.schedule is None else self.schedule(optimizer)

        def step(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            loss, output = self.gradients(model, x, y)
            if self.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            # A step with a loss that is not finite would spoil the weights: the loop raises right after this returns.
            if torch.isfinite(loss.detach()):
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            return loss, output

        return loop(
            model, loader, epochs=epochs, step=step, parts=parts, val=val, evaluator=partial(evaluate, model, loss=self.loss),
            seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip


@dataclass
class Progress:
    """What a callback sees after an epoch. ``state()`` is what ``resume`` takes; building it copies the weights."""

    model: nn.Module
    epoch: int
    steps: int
    train: Sequence[Mapping[str, float]]
    val: Sequence[Mapping[str, float]]
    state: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class EarlyStopping:
    """Callback: stop when ``metric`` of the validation (of the training, if there is none) has not fallen for ``patience`` epochs.

    The model ends with the weights of its best epoch, also where the epochs run out first (``restore=False``: with the last ones). The
    history alone decides, so a resumed run stops where an unbroken one does. ``sign=-1`` waits for a rise.
    """

    patience: int = 3
    metric: str = "loss"
    sign: int = 1
    restore: bool = True

    def since_best(self, progress: Progress) -> int:
        """Epochs since the best one."""
        values = [self.sign * epoch[self.metric] for epoch in (progress.val or progress.train)]
        return len(values) - 1 - values.index(min(values))

    def __call__(self, progress: Progress) -> bool:
        return self.since_best(progress) >= self.patience


def evaluate(model: nn.Module, loader: Loader, *, loss: str | Loss = "cross_entropy") -> dict[str, float]:
    """Mean loss over the samples and, where ``y`` holds class indices, accuracy. Mode, RNG and gradients stay as they were."""
    loss, total, n, correct, counted = find_loss(loss), 0.0, 0, 0, 0
    device = device_of(model)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), forked_rng(device):
            for x, y in loader:
                output, y = call(model, to(x, device)), to(y, device)
                total += float(loss(output, y)) * len(y)
                n += len(y)
                if is_classes(output, y):
                    correct += int((output.argmax(1) == y).sum())
                    counted += y.numel()
    finally:
        for module, mode in modes:
            module.training = mode
    if n == 0:
        raise BadInput("the loader yielded no samples to evaluate on")
    return {"loss": total / n} | ({"accuracy": correct / counted} if counted else {})


def loop(
    model: nn.Module,
    loader: Loader,
    *,
    epochs: int,
    step: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]],
    parts: Mapping[str, Any],
    val: Loader | None = None,
    evaluator: Callable[[Loader], Mapping[str, float]] | None = None,
    forward: Callable[[Any], Any] | None = None,
    seed: int = 0,
    callbacks: Sequence[Callable[[Progress], bool | None]] = (),
    resume: Mapping[str, Any] | None = None,
) -> History:
    """The epoch loop that learners share.

    Args:
        step: one update from one batch; returns the loss and the output (or ``None``) for the record.
        parts: what else has a ``state_dict`` (optimizers, schedules, readouts), by name; saved and restored. ``None`` is skipped.
        evaluator: measures ``val``; :func:`evaluate` of the model by default.
        forward: what ``step`` runs on ``x``, where that is not the whole model; run again to find the module that diverged.
    """
    if epochs < 0:
        raise BadInput(f"epochs must be >= 0, not {epochs}")
    device = device_of(model)
    parts = {"model": model} | {name: part for name, part in parts.items() if part is not None}
    evaluator = evaluator or partial(evaluate, model)
    train: list[dict[str, float]] = []
    seen: list[Mapping[str, float]] = []
    losses: list[float] = []
    modes = [(m, m.training) for m in model.modules()]
    generator = getattr(loader, "generator", None)
    stops = [c for c in callbacks if isinstance(c, EarlyStopping)]
    best: dict[str, Any] | None = None  # parts at the best epoch, where a callback wants them back

    def state() -> dict[str, Any]:
        return {
            "parts": {name: copied(part.state_dict()) for name, part in parts.items()},
            "train": [dict(e) for e in train], "val": [dict(e) for e in seen], "losses": list(losses),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "loader_rng": generator.get_state() if isinstance(generator, torch.Generator) else None,
            "best": best,
        }  # fmt: skip

    with forked_rng(device):
        torch.manual_seed(seed)
        if resume:
            if missing := set(parts) ^ set(resume["parts"]):
                raise BadInput(f"resume does not fit this learner: {sorted(missing)} on one side only; it has {sorted(resume['parts'])}")
            for name, part in parts.items():
                part.load_state_dict(copied(resume["parts"][name]))
            train[:], seen[:], losses[:] = resume["train"], resume["val"], resume["losses"]
            best = resume["best"]
            torch.set_rng_state(resume["rng"].cpu())
            if resume["cuda_rng"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(resume["cuda_rng"].cpu(), device)
            if resume["loader_rng"] is not None and isinstance(generator, torch.Generator):
                generator.set_state(resume["loader_rng"].cpu())
        try:
            progress = Progress(model, len(train) - 1, len(losses), tuple(train), tuple(seen), state)
            if train and any(stop(progress) for stop in stops):
                epochs = len(train)  # the run being resumed had stopped here
            for epoch in range(len(train), epochs):
                if hasattr(loader, "set_epoch"):
                    loader.set_epoch(epoch)
                model.train()
                began, total, n, correct, counted = time.perf_counter(), 0.0, 0, 0, 0
                for x, y in loader:
                    x, y = to(x, device), to(y, device)
                    loss, output = step(x, y)
                    value = float(loss.detach())
                    if value - value != 0:  # NaN or infinite
                        raise diverged(model, x, value, len(losses), forward)
                    losses.append(value)
                    total += value * len(y)
                    n += len(y)
                    if output is not None and is_classes(output, y):
                        correct += int((output.detach().argmax(1) == y).sum())
                        counted += y.numel()
                if n == 0:
                    raise BadInput(
                        f"the loader yielded no samples in epoch {epoch}"
                        + (": pass something that can be iterated again (a list, a DataLoader), not an iterator" if epoch else "")
                    )
                train.append({"loss": total / n} | ({"accuracy": correct / counted} if counted else {}))
                train[-1]["seconds"] = time.perf_counter() - began
                if val is not None:
                    seen.append(dict(evaluator(val)))
                progress = Progress(model, epoch, len(losses), tuple(train), tuple(seen), state)
                if any(stop.restore and stop.since_best(progress) == 0 for stop in stops):
                    best = {name: copied(part.state_dict()) for name, part in parts.items()}
                ended = [callback(progress) for callback in callbacks]  # all are called, whatever the first says
                if any(ended):
                    break
        finally:
            for module, mode in modes:
                module.training = mode
        final = state()  # of the last epoch, so that the run can go on
        for name, saved in (best or {}).items():
            parts[name].load_state_dict(copied(saved))
        return History(tuple(train), tuple(seen), len(losses), {"loss": tuple(losses)}, final)


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``history.state``, or any nest of dicts, lists, numbers, strings and tensors, as one safetensors file (no pickle anywhere).

    Tensors go into the body, the structure as JSON into the header, so any safetensors reader lists the weights.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, "", tensors))
    path = Path(path)
    partial_file = path.with_name(path.name + ".part")
    save_file(tensors, partial_file, metadata={"structure": structure})
    os.replace(partial_file, path)


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save_checkpoint` wrote, a plain safetensors file, or a ``.pt`` file of one's own (tensors only: no code is run)."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no checkpoint at {path}")
    if path.suffix != ".safetensors" and not _is_safetensors(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        structure = (file.metadata() or {}).get("structure")
    return tensors if structure is None else _decode(json.loads(structure), tensors)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, (Mapping, list, tuple)):
        kind = "counter" if isinstance(value, Counter) else next(k for k, t in _KINDS.items() if isinstance(value, t))
        if kind in ("list", "tuple"):
            return {kind: [_encode(v, f"{name}.{i}".strip("."), tensors) for i, v in enumerate(value)]}
        return {kind: [[k, _encode(v, f"{name}.{k}".strip("."), tensors)] for k, v in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BadInput(f"{name or 'the state'} is a {type(value).__name__}: a checkpoint holds dicts, lists, numbers, strings and tensors")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("list", "tuple"):
        return _KINDS[kind](_decode(v, tensors) for v in content)
    pairs = {k: _decode(v, tensors) for k, v in content}
    return Counter(pairs) if kind == "counter" else pairs


_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "dict": Mapping}


# Small helpers that other learners use too.


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that want a gradient; a model without any cannot be trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UnsupportedModel("has no parameter with requires_grad: nothing to train", module=type(model).__name__)
    return parameters


def find_loss(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise BadInput(f"loss {loss!r} is not one of {sorted(LOSSES)}; a function of (output, y) is welcome too")
    return LOSSES[loss]


def device_of(model: nn.Module) -> torch.device:
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


def to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return tuple(to(v, device) for v in value) if isinstance(value, (tuple, list)) else value


def call(model: Callable[..., Any], x: Any) -> Tensor:
    return model(*x) if isinstance(x, tuple) else model(x)


def is_classes(output: Tensor, y: Tensor) -> bool:
    """Class indices for scores along axis 1."""
    return not y.is_floating_point() and output.ndim == y.ndim + 1 and (output.shape[:1] + output.shape[2:]) == y.shape


def copied(value: Any) -> Any:
    """A deep copy of a state dict, without the aliasing of the tensors that go on training."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Counter):
        return Counter(value)
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(copied(v) for v in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def diverged(model: nn.Module, x: Any, value: float, step: int, forward: Callable[[Any], Any] | None = None) -> Diverged:
    """Run the batch once more and find where numbers stop being finite."""
    first: list[str] = []

    def finite(things: Any) -> bool:
        if isinstance(things, Tensor):
            return not things.is_floating_point() or bool(torch.isfinite(things).all())
        return all(finite(t) for t in things) if isinstance(things, (tuple, list)) else True

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not first and not finite(output):
                first.append(name)

        return hook

    where, module = "the loss itself: every module's output is finite", None
    if not finite(x):
        where = "the batch: x holds a value that is not finite"
    else:
        # Children finish before their parent, so the first hook that fires names the smallest module.
        handles = [m.register_forward_hook(watch(name or "the model")) for name, m in model.named_modules()]
        try:
            with torch.no_grad():
                call(forward or model, x)
        finally:
            for handle in handles:
                handle.remove()
        if first:
            module = first[0]
            spoilt = [n for n, p in model.named_parameters() if n.rpartition(".")[0] == module and not finite(p)]
            where = f"module {module!r} ({type(model.get_submodule(module) if module != 'the model' else model).__name__})" + (
                f", whose parameter {spoilt[0]!r} is not finite" if spoilt else ""
            )
    message = f"the loss is {value} at step {step}; first in {where}. A smaller learning rate or clip= may help."
    return Diverged(message, step=step, module=module)
