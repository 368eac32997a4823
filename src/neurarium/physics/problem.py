"""Differential equations as data: a domain, fields, a residual, and what is known at the start and on the boundary.

A :class:`Problem` is written once in ordinary torch arithmetic and says nothing of how it is solved::

    Problem(
        name="heat",
        domain=Box(x=(-1, 1), t=(0, 1), time="t", periodic=("x",)),
        fields=("u",),
        residual=lambda f, c, p: f.d("u", "t") - p.kappa * f.d("u", "xx"),
        initial=lambda c: {"u": torch.sin(math.pi * c.x)},
        parameters={"kappa": 0.1},
    )

``residual(fields, coords, parameters)`` sees tensors of shape (n,): ``f.u`` a value, ``f.d("u", "xx")`` a derivative, ``c.x`` a
coordinate, ``p.kappa`` a parameter; it returns one tensor or a tuple (a system). The derivatives that it needs are found by calling it
once with a recorder. ``initial(coords)`` gives the fields at the start; by default they hold exactly (``hard``), by the ansatz
``u = u_0 + (t - t_0) N``. An ``ansatz(fields, coords)`` of one's own maps the network's raw fields to the fields, in jets, so that its
derivatives are exact. Other conditions are penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from neurarium.errors import BadInput
from neurarium.physics.jets import Jet, Orders, orders
from neurarium.physics.reference import Reference

__all__ = ["Box", "Condition", "Fields", "Names", "Problem"]


class Names:
    """Named values: ``c.x`` or ``c["x"]``."""

    def __init__(self, values: Mapping[str, Any], kind: str = "name") -> None:
        self._values, self._kind = dict(values), kind

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"no {self.__dict__.get('_kind', 'name')} {name!r}; there are {', '.join(values) or 'none'}")
        return values[name]

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def items(self) -> Any:
        return self._values.items()


class Fields:
    """What a residual sees of the solution: ``f.u`` the value, ``f.d("u", "xx")`` a derivative, tensors of shape (n,)."""

    def __init__(self, jets: Mapping[str, Jet]) -> None:
        self._jets = dict(jets)

    def _jet(self, name: str) -> Jet:
        jets = self.__dict__.get("_jets", {})
        if name not in jets:
            raise AttributeError(f"no field {name!r}; there are {', '.join(jets)}")
        return jets[name]

    def __getattr__(self, name: str) -> Tensor:
        return self._jet(name).value

    def d(self, name: str, key: str) -> Tensor:
        return self._jet(name).derivative(key)


class _Recorder(Fields):
    """Answers with arbitrary numbers and notes which derivatives were asked for."""

    def __init__(self, names: tuple[str, ...], n: int, coords: Orders) -> None:
        self._jets = {name: Jet([torch.linspace(0.3, 0.7, n, dtype=torch.float64)], coords) for name in names}
        self._coords, self.asked = coords, set[str]()

    def d(self, name: str, key: str) -> Tensor:
        self._coords.index(key)
        self.asked.add(key)
        return 0.5 * self._jet(name).value


class Box:
    """A box of named coordinates: ``Box(x=(-1, 1), t=(0, 1), time="t", periodic=("x",))``.

    ``time`` names the coordinate along which the solution evolves, ``periodic`` those along which it repeats. The order of the names is
    the order of the columns of points.
    """

    def __init__(self, *, time: str | None = None, periodic: tuple[str, ...] = (), **bounds: tuple[float, float]) -> None:
        self.bounds = {name: (float(lo), float(hi)) for name, (lo, hi) in bounds.items()}
        for name, (lo, hi) in self.bounds.items():
            if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
                raise BadInput(f"the bounds of {name} must be finite and rising, got ({lo}, {hi})")
        self.time, self.periodic = time, tuple(periodic)
        for name in (*self.periodic, *([time] if time else [])):
            if name not in self.bounds:
                raise BadInput(f"{name!r} is not a coordinate; there are {', '.join(self.bounds) or 'none'}")
        if not self.bounds:
            raise BadInput("a domain needs at least one coordinate")

    @property
    def coords(self) -> tuple[str, ...]:
        return tuple(self.bounds)

    def between(self, name: str, lo: float, hi: float) -> Box:
        """The same box with other bounds of one coordinate."""
        return Box(time=self.time, periodic=self.periodic, **{**self.bounds, name: (lo, hi)})

    def points(self, unit: Tensor, on: Mapping[str, float] | None = None) -> Tensor:
        """Unit-cube rows (n, coordinates) to points of the box; the coordinates in ``on`` are held at those values."""
        lo, hi = unit.new_tensor(list(self.bounds.values())).T
        points = lo + (hi - lo) * unit
        for name, value in (on or {}).items():
            points[:, self.coords.index(name)] = value
        return points

    def __repr__(self) -> str:
        return "Box(" + ", ".join(f"{k}=[{lo:g}, {hi:g}]" for k, (lo, hi) in self.bounds.items()) + ")"


Residual = Callable[[Fields, Names, Names], Any]


@dataclass(frozen=True)
class Condition:
    """A penalty ``weight * mean(residual^2)`` on the part of the domain where the coordinates in ``on`` have those values."""

    on: Mapping[str, float]
    residual: Residual
    weight: float = 1.0

    @classmethod
    def dirichlet(cls, name: str, value: float | Callable[[Names], Any], *, weight: float = 1.0, **on: float) -> Condition:
        """``field = value`` where e.g. ``x=-1``; the value is a number or a function of the coordinates."""
        return cls(on, lambda f, c, p: getattr(f, name) - (value(c) if callable(value) else value), weight)

    @classmethod
    def neumann(cls, name: str, key: str, value: float | Callable[[Names], Any], *, weight: float = 1.0, **on: float) -> Condition:
        """``derivative = value``: ``neumann("u", "x", 0.0, x=1.0)``."""
        return cls(on, lambda f, c, p: f.d(name, key) - (value(c) if callable(value) else value), weight)


@dataclass(frozen=True)
class Problem:
    """A differential equation with its data; see the module's text.

    ``scales`` are typical sizes of the fields (default 1): the network's raw outputs are multiplied by them. ``exact`` maps points to
    fields (n, fields); ``reference`` computes a grid solution with its own error estimate. Either serves ``Solution.error``.
    """

    name: str
    domain: Box
    fields: tuple[str, ...]
    residual: Residual
    initial: Callable[[Names], Mapping[str, Any]] | None = None
    hard: bool = True
    initial_weight: float = 100.0
    ansatz: Callable[[Names, Names], Mapping[str, Any]] | None = None
    conditions: tuple[Condition, ...] = ()
    parameters: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    exact: Callable[[Tensor], Tensor] | None = None
    reference: Callable[[], Reference] | None = None

    def __post_init__(self) -> None:
        if not self.fields or len(set(self.fields)) != len(self.fields):
            raise BadInput(f"{self.name}: fields must be distinct names, got {self.fields}")
        if self.initial is not None and self.domain.time is None:
            raise BadInput(f"{self.name}: initial data need a time coordinate, Box(..., time='t')")

    @property
    def soft_start(self) -> bool:
        """Whether the initial data are a penalty; it is then the first of :meth:`penalties`."""
        return self.initial is not None and not self.hard

    def penalties(self) -> tuple[Condition, ...]:
        """The soft conditions: the initial data, unless they hold exactly, then ``conditions``."""
        if not self.soft_start:
            return self.conditions
        initial, fields = self.initial, self.fields

        def violation(f: Fields, c: Names, p: Names) -> tuple[Any, ...]:
            start = initial(c)  # type: ignore[misc]
            return tuple(getattr(f, name) - start[name] for name in fields)

        return (Condition({self.domain.time: self.start}, violation, self.initial_weight), *self.conditions)  # type: ignore[dict-item]

    @property
    def start(self) -> float:
        """The time at which the initial data hold."""
        assert self.domain.time is not None
        return self.domain.bounds[self.domain.time][0]

    def orders(self, residual: Residual | None = None) -> Orders:
        """The derivatives that the residual (or a condition's) asks for."""
        none = orders(self.domain.coords, frozenset())
        recorder = _Recorder(self.fields, 3, none)
        unit = torch.linspace(0.2, 0.8, 3, dtype=torch.float64)[:, None].expand(3, len(self.domain.coords))
        points = self.domain.points(unit)
        coords = Names(dict(zip(self.domain.coords, points.unbind(1))), "coordinate")
        (residual or self.residual)(recorder, coords, self.names)
        return orders(self.domain.coords, frozenset(recorder.asked))

    @property
    def names(self) -> Names:
        """The parameters as ``p.kappa``."""
        return Names(self.parameters, "parameter")

    def compose(self, raw: Mapping[str, Jet], coords: Mapping[str, Jet]) -> dict[str, Jet]:
        """The fields from the network's raw fields: scaling, then the ansatz."""
        raw = {name: raw[name] * self.scales[name] if name in self.scales else raw[name] for name in self.fields}
        if self.ansatz is not None:
            return dict(self.ansatz(Names(raw, "field"), Names(coords, "coordinate")))
        if self.initial is None or not self.hard:
            return raw
        elapsed = coords[self.domain.time] - self.start  # type: ignore[index]
        start = self.initial(Names(coords, "coordinate"))
        return {name: elapsed * raw[name] + start[name] for name in self.fields}

    def window(self, start: float, end: float, initial: Callable[[Names], Mapping[str, Any]] | None = None) -> Problem:
        """The same problem on [start, end] of the time axis, begun from other initial data."""
        if self.domain.time is None or self.initial is None or self.ansatz is not None:
            raise BadInput(f"{self.name}: time windows need a time coordinate, `initial` data and no ansatz of one's own")
        domain = self.domain.between(self.domain.time, start, end)
        return replace(self, domain=domain, initial=initial or self.initial)
