"""How a method is built and fed, in the smallest form that the conformance checks need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neurarium.errors import BadInput
from neurarium.roles import ROLES

__all__ = ["Example", "Skipped"]


class Skipped(Exception):
    """A check that this method declares as not applicable; the message is the reason."""


#: role -> the fields of Example that its checks use
_NEEDS = {
    "layer": ("make", "inputs"),
    "model": ("make", "inputs"),
    "optimizer": ("make",),
    "learner": ("make", "model", "loader"),
    "transform": ("apply", "model", "inputs"),
    "policy": ("make", "inputs"),
    "searcher": ("make", "search"),
    "probe": ("apply", "model", "inputs"),
    "solver": ("solve",),
    "dataset": ("make",),
    "study": (),
}


@dataclass(frozen=True, kw_only=False)
class Example:
    """One tiny instance of a method.

    Args:
        role: one of :data:`neurarium.roles.ROLES`.
        make: layer, model: ``make(seed) -> nn.Module``; optimizer: ``make(params) -> Optimizer``; learner: ``make() -> Learner``;
            policy: ``make(seed) -> Policy``, calibrated; searcher, dataset: ``make(seed)``.
        model: ``model(seed) -> nn.Module``, the model that a learner, transform or probe is given.
        inputs: ``inputs(batch, seed) -> tuple`` of tensors whose first dimension is ``batch``.
        loader: ``loader(seed)`` -> a re-iterable of ``(x, y)`` batches; a few small ones.
        apply: transform: ``apply(model) -> nn.Module``; probe: ``apply(model, *inputs) -> Report``.
        solve: ``solve(seed) -> Solution``.
        search: ``search(searcher) -> Study``: a short search on a known objective.
        residual: ``residual(solution) -> float``, an independent measure of what ``solution.residual()`` claims.
        sound: ``sound(model, report, seed) -> bool``: whether a probe's bound survives an attempt to violate it.
        unsupported: ``unsupported() -> nn.Module`` that the method must refuse with UnsupportedModel.
        skip: check name -> the reason why it does not apply.
    """

    role: str
    make: Callable[..., Any] | None = None
    model: Callable[..., Any] | None = None
    inputs: Callable[..., Any] | None = None
    loader: Callable[..., Any] | None = None
    apply: Callable[..., Any] | None = None
    solve: Callable[..., Any] | None = None
    search: Callable[..., Any] | None = None
    residual: Callable[..., float] | None = None
    sound: Callable[..., bool] | None = None
    unsupported: Callable[[], Any] | None = None
    skip: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise BadInput(f"role {self.role!r} is none of {', '.join(ROLES)}")
        missing = [name for name in _NEEDS[self.role] if getattr(self, name) is None]
        if missing:
            raise BadInput(f"an Example of role {self.role!r} needs {', '.join(missing)}")
        empty = [name for name, reason in self.skip.items() if not reason.strip()]
        if empty:
            raise BadInput(f"skip needs a reason for {', '.join(empty)}")
