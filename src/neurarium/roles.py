"""What a method looks like from outside: the types that rooms share.

A paper's method has one of eleven roles (see :data:`ROLES`). Methods of one role are interchangeable, methods of different roles fit
together. This is the lowest module of all: it imports torch and nothing of neurarium, and holds no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "ROLES",
    "Batch",
    "Evaluation",
    "History",
    "Learner",
    "Loader",
    "Outcome",
    "Policy",
    "Probe",
    "Problem",
    "Report",
    "Searcher",
    "Solution",
    "Solver",
    "Study",
    "Transform",
]

#: role -> the contract in one line. The conformance suite (:mod:`neurarium.testing`) checks it for every method.
ROLES: dict[str, str] = {
    "layer": "an nn.Module that takes the place of a standard layer",
    "model": "an nn.Module that is a whole network",
    "optimizer": "a torch.optim.Optimizer, an LR scheduler, or a parametrisation helper that makes them",
    "learner": "settings in the constructor; fit(model, loader, *, epochs, ...) -> History",
    "transform": "a function f(model, ...) -> nn.Module that never touches its input",
    "policy": "an nn.Module that decides per input or per budget what to run: decide(x, ...) -> Outcome",
    "searcher": "ask() -> config, tell(config, value), search(space, objective, budget) -> Study",
    "probe": "a function f(model, data, ...) -> Report that only reads",
    "solver": "solve(problem, ...) -> Solution",
    "dataset": "a torch.utils.data.Dataset with a seeded generator",
    "study": "an experiment alone: a theorem or an analysis, checked numerically",
}

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class Loader(Protocol):
    """Anything that yields ``(x, y)`` batches and can be iterated again: a DataLoader, a list of batches, ``data.Batches``.

    A loader that has ``set_epoch(int)`` is told the epoch before each pass, so that a resumed run sees the same order.
    """

    def __iter__(self) -> Any: ...


@dataclass(frozen=True)
class Outcome:
    """What a policy decided for a batch of n rows, in input order."""

    output: Tensor  # (n, ...)
    cost: Tensor  # (n,) int64: FLOPs (2 a multiply-add) that this row really caused
    choice: Tensor  # (n,) int64 exit or configuration, or (n, layers) for decisions per layer
    score: Tensor | None = None  # (n,) what the question measured when it stopped
    price: Tensor | None = None  # (n,) a second currency: data acquired, bytes, joules


@dataclass(frozen=True)
class History:
    """What a learner did.

    ``train`` and ``val`` hold one dict an epoch (``loss``, ``accuracy``, ``seconds``), ``extra`` the series of one rule (alignment,
    goodness, growth), ``state`` all that ``fit(..., resume=history.state)`` needs to go on as if it had never stopped.
    """

    train: tuple[Mapping[str, float], ...] = ()
    val: tuple[Mapping[str, float], ...] = ()
    steps: int = 0
    extra: Mapping[str, Sequence[float]] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def last(self) -> Mapping[str, float]:
        """The last epoch's training measurements; empty before the first."""
        return self.train[-1] if self.train else {}


@dataclass(frozen=True)
class Report:
    """Base of what a probe returns: a frozen dataclass of measurements."""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values (tensors become nested lists), ready for JSON."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(self).items()}

    def describe(self) -> str:
        """One line a field; large tensors by shape and range."""
        return "\n".join(f"{f.name}: {_short(getattr(self, f.name))}" for f in fields(self))


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 8:
        return f"tensor {tuple(value.shape)} in [{value.min().item():.4g}, {value.max().item():.4g}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@runtime_checkable
class Problem(Protocol):
    """What a solver is asked: a frozen dataclass with a name."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class Solution(Protocol):
    """What a solver answers. ``residual()`` is its own measure of how far from solved it is (0 = solved, same units as the problem)."""

    def residual(self) -> float: ...


@dataclass(frozen=True)
class Evaluation:
    """One evaluated configuration of a search; smaller values are better."""

    config: Mapping[str, Any]
    value: float
    cost: float = 1.0


@dataclass(frozen=True)
class Study:
    """What a search found: every evaluation in the order of ``tell``."""

    evaluations: tuple[Evaluation, ...]
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def best(self) -> Evaluation:
        """The evaluation of smallest value; ties go to the earliest."""
        if not self.evaluations:
            raise ValueError("an empty study has no best configuration")
        return min(self.evaluations, key=lambda e: e.value)


class Learner(Protocol):
    """Changes how parameters are learned; trains ``model`` in place."""

    def fit(self, model: nn.Module, loader: Loader, *, epochs: int, **options: Any) -> History: ...


class Transform(Protocol):
    """Makes a new module of a model; the input stays as it was."""

    def __call__(self, model: nn.Module, *args: Any, **options: Any) -> nn.Module: ...


class Policy(Protocol):
    """Decides per input or per budget what to run."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def decide(self, x: Tensor, *, budget: float | None = None, threshold: float | None = None) -> Outcome: ...


class Searcher(Protocol):
    """Looks for a configuration of small value."""

    def ask(self) -> Mapping[str, Any]: ...

    def tell(self, config: Mapping[str, Any], value: float) -> None: ...

    def search(self, space: Any, objective: Callable[[Mapping[str, Any]], float], budget: int) -> Study: ...


class Probe(Protocol):
    """Reads a model and data; leaves weights, buffers, mode and RNG state as they were."""

    def __call__(self, model: nn.Module, data: Any, **options: Any) -> Report: ...


class Solver(Protocol):
    """Solves a problem."""

    def solve(self, problem: Any, **options: Any) -> Solution: ...
