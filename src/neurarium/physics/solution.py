"""What a physics-informed solver returns: a function of space and time that knows its derivatives, residual and error."""

from __future__ import annotations

import copy
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, RecordError
from neurarium.physics.jets import Jet, Orders, Record, coordinates, derivatives_by_autograd, orders, stack, takes_jets
from neurarium.physics.problem import Fields, Names, Problem, Residual

if TYPE_CHECKING:
    from neurarium.physics.pinn import PINN

__all__ = ["Approximation", "Solution"]


class Approximation(nn.Module):
    """A network read as the fields of a problem: (n, coordinates) -> (n, fields), through the problem's ansatz.

    Derivatives are jets where the network has only operations with jet rules, else nested autograd (``self.jets`` tells which).
    """

    def __init__(self, problem: Problem, network: nn.Module) -> None:
        super().__init__()
        self.problem, self.network = problem, network
        self.jets = takes_jets(network, len(problem.domain.coords))

    def evaluate(self, coords: Mapping[str, Jet]) -> dict[str, Jet]:
        """The fields as jets at coordinates that are jets."""
        inputs = stack([coords[name] for name in self.problem.domain.coords], -1)
        if self.jets:
            raw = self.network(inputs)
        else:
            raw = derivatives_by_autograd(self.network, inputs.value, inputs.orders)
        names = self.problem.fields
        if raw.shape != (len(inputs.value), len(names)):
            raise BadInput(f"the network must return (n, {len(names)}) for the fields {names}, got {tuple(raw.shape)}")
        return self.problem.compose({name: raw[:, i] for i, name in enumerate(names)}, coords)

    def residual(self, residual: Residual, points: Tensor, wanted: Orders, tape: list[Record] | None = None) -> tuple[Tensor, ...]:
        """A residual's equations at points, each (n,)."""
        coords = coordinates(points, wanted, tape)
        values = Names({name: jet.value for name, jet in coords.items()}, "coordinate")
        answer = residual(Fields(self.evaluate(coords)), values, self.problem.names)
        return tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)

    def forward(self, points: Tensor) -> Tensor:
        fields = self.evaluate(coordinates(points, orders(self.problem.domain.coords, frozenset())))
        return torch.stack([fields[name].value for name in self.problem.fields], 1)

    def at(self, time: float) -> Callable[[Names], dict[str, Any]]:
        """The fields at one instant, as initial data (with all their derivatives in space) of what follows."""
        frozen = copy.deepcopy(self).requires_grad_(False)
        name = self.problem.domain.time
        axis = self.problem.domain.coords.index(name)  # type: ignore[arg-type]
        if self.problem.domain.coords == (name,):  # an ordinary differential equation: the state is a few numbers
            like = next(frozen.parameters(), torch.zeros(()))
            with torch.no_grad():
                state = frozen(like.new_full((1, 1), time))[0].tolist()
            return lambda coords: dict(zip(self.problem.fields, state))

        def initial(coords: Names) -> dict[str, Any]:
            given = dict(coords.items())
            plain = not isinstance(given[name], Jet)
            if plain:
                none = orders(self.problem.domain.coords, frozenset())
                given = {k: Jet([v], none) for k, v in given.items()}
            held = given[name]
            given[name] = Jet.constant(torch.full_like(held.value, time), held.orders)
            still = [a[axis] == 0 for a in held.orders.indices]
            fields = frozen.evaluate({k: Jet(v.streams, v.orders) for k, v in given.items()})
            if plain:
                return {k: v.value for k, v in fields.items()}
            return {
                k: Jet([s if keep else torch.zeros_like(s) for s, keep in zip(v.streams, still)], v.orders, held.tape)
                for k, v in fields.items()
            }

        return initial


class Solution:
    """The answer of :meth:`PINN.solve`: call it with points (n, coordinates) for the fields (n, fields).

    ``history`` holds one number a step: ``step, seconds, loss, window``, and ``eps, min_weight`` of a causal run. Time windows make it
    piecewise in time.
    """

    def __init__(self, problem: Problem, pieces: Sequence[Approximation], settings: Mapping[str, Any], history: Mapping[str, list]) -> None:
        self.problem, self.pieces, self.settings, self.history = problem, list(pieces), dict(settings), history

    @property
    def params(self) -> dict[str, float]:
        """The parameters of the equation."""
        return dict(self.problem.parameters)

    def __call__(self, points: Any) -> Tensor:
        with torch.no_grad():
            return self._piecewise(points, lambda piece, x: piece(x))

    def d(self, field: str, key: str) -> Callable[[Any], Tensor]:
        """``solution.d("u", "xx")`` is the function points -> derivative (n,)."""
        if field not in self.problem.fields:
            raise BadInput(f"no field {field!r}; there are {self.problem.fields}")
        wanted = Orders(self.problem.domain.coords, {key})
        take = lambda f, c, p: f.d(field, key)  # noqa: E731
        return lambda points: self._piecewise(points, lambda piece, x: piece.residual(take, x, wanted)[0].detach())

    def residual(self, n: int = 4096, seed: int = 0) -> float:
        """Root mean square of the equations' residual at n fresh uniform points, soft conditions' violation included."""
        generator = torch.Generator().manual_seed(seed)
        problem, unit = self.problem, torch.rand(n, len(self.problem.domain.coords), generator=generator, dtype=torch.float64)
        parts = [(problem.residual, problem.domain.points(unit))]
        parts += [(c.residual, problem.domain.points(unit, c.on)) for c in problem.penalties()]
        total = 0.0
        for residual, points in parts:
            wanted = problem.orders(residual)
            squares = lambda piece, x, r=residual, w=wanted: sum(v.detach() ** 2 for v in piece.residual(r, x, w))  # noqa: E731
            total += float(self._piecewise(points, squares).mean())
        return total**0.5

    def error(self) -> dict[str, float]:
        """Relative L2 error of each field against the exact or the reference solution."""
        if self.problem.exact is not None:
            points = self.problem.domain.points(torch.rand(4096, len(self.problem.domain.coords), dtype=torch.float64, generator=_fixed()))
            truth = self.problem.exact(points)
        elif self.problem.reference is not None:
            reference = self.problem.reference()
            points, truth = reference.points(), reference.fields()
        else:
            raise BadInput(f"{self.problem.name} has neither an exact nor a reference solution")
        difference = self(points).double().cpu() - truth
        return dict(zip(self.problem.fields, (difference.norm(dim=0) / truth.norm(dim=0)).tolist()))

    def save(self, path: str | Path) -> None:
        """Weights as ``path`` (safetensors), history and settings as JSON beside it; each file is replaced whole or not at all."""
        from safetensors.torch import save

        path = Path(path)
        if path.suffix == ".json":
            raise BadInput(f"{path}: name the file of the weights (.safetensors); the JSON is written beside it")
        tensors = {f"{i}.{k}": v.contiguous() for i, p in enumerate(self.pieces) for k, v in p.network.state_dict().items()}
        windows = [p.problem.domain.bounds[p.problem.domain.time] for p in self.pieces] if self.problem.domain.time else [None]
        meta = {"problem": self.problem.name, "windows": windows, "settings": self.settings, "history": dict(self.history)}
        _write({path: save(tensors), path.with_suffix(".json"): json.dumps(meta).encode()})

    @classmethod
    def load(cls, path: str | Path, problem: Problem, solver: PINN | None = None) -> Solution:
        """What :meth:`save` wrote. ``problem`` is the one that was solved, ``solver`` the PINN if its network was the user's own."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        meta = _meta(path.with_suffix(".json"))
        if meta["problem"] != problem.name:
            raise RecordError(f"{path} holds a solution of {meta['problem']}, not of {problem.name}")
        if solver is None and not meta["settings"]:
            raise BadInput(f"{path} was made with a network of the user's own: pass the solver")
        solver = solver or _solver(path.with_suffix(".json"), meta["settings"])
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise RecordError(f"{path} is damaged: {error}") from error
        pieces: list[Approximation] = []
        try:
            for i, bounds in enumerate(meta["windows"]):
                windowed = len(meta["windows"]) > 1
                part = problem.window(*bounds, pieces[-1].at(bounds[0]) if pieces else None) if windowed else problem
                piece = solver.build(part)
                piece.network.load_state_dict({k.split(".", 1)[1]: tensors.pop(k) for k in list(tensors) if k.startswith(f"{i}.")})
                pieces.append(piece)
        except (RuntimeError, BadInput) as error:  # other tensors than the network's; windows that are none
            raise RecordError(f"{path} does not fit the network or the windows described beside it: {error}") from error
        if tensors:
            raise RecordError(f"{path} holds tensors of no window: {', '.join(sorted(tensors)[:3])}")
        return cls(problem, pieces, meta["settings"], meta["history"])

    def _piecewise(self, points: Any, f: Callable[[Approximation, Tensor], Tensor]) -> Tensor:
        like = next(self.pieces[0].parameters(), torch.zeros(()))
        points = torch.as_tensor(points, dtype=like.dtype, device=like.device)
        coords = self.problem.domain.coords
        if points.ndim != 2 or points.shape[1] != len(coords):
            raise BadInput(f"points must be (n, {len(coords)}), columns {coords}, got {tuple(points.shape)}")
        if len(self.pieces) == 1:
            return f(self.pieces[0], points)
        time = self.problem.domain.time
        starts = points.new_tensor([p.problem.domain.bounds[time][0] for p in self.pieces[1:]])  # type: ignore[index]
        which = torch.bucketize(points[:, coords.index(time)].contiguous(), starts, right=True)  # type: ignore[arg-type]
        parts = [(torch.nonzero(which == i)[:, 0], piece) for i, piece in enumerate(self.pieces)]
        values = [(at, f(piece, points[at])) for at, piece in parts if len(at)]
        out = values[0][1].new_empty(len(points), *values[0][1].shape[1:]) if values else f(self.pieces[0], points)
        for at, value in values:
            out[at] = value
        return out


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _write(files: Mapping[Path, bytes]) -> None:
    """All contents go to temporary files first, which then take the places of the old ones."""
    made: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            made[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            made[path].write_bytes(data)
        for path, temporary in made.items():
            os.replace(temporary, path)
    finally:
        for temporary in made.values():
            temporary.unlink(missing_ok=True)


def _meta(path: Path) -> dict[str, Any]:
    """The JSON of a saved solution, of the right shape."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{path} is damaged: {error}") from error
    kinds = {"problem": str, "windows": list, "settings": dict, "history": dict}
    if not isinstance(meta, dict):
        raise RecordError(f"{path} is damaged: not the description of a solution")
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            raise RecordError(f"{path} is damaged: {key!r} is missing or not a {kind.__name__}")
    spans = meta["windows"]
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)  # noqa: E731
    pairs = all(isinstance(w, list) and len(w) == 2 and all(map(number, w)) for w in spans)
    if not spans or not (pairs or spans == [None]):
        raise RecordError(f"{path} is damaged: 'windows' must be pairs of times")
    if not all(isinstance(column, list) for column in meta["history"].values()):
        raise RecordError(f"{path} is damaged: 'history' must be lists of numbers")
    return meta


def _solver(path: Path, settings: Mapping[str, Any]) -> PINN:
    from neurarium.physics.pinn import PINN

    dtypes = {"float32": torch.float32, "float64": torch.float64}
    if not isinstance(settings.get("dtype"), str) or settings["dtype"] not in dtypes:
        raise RecordError(f"{path}: dtype must be float32 or float64, got {settings.get('dtype')!r}; for another one pass the solver")
    if set(settings) != {"net", "width", "depth", "modes", "dtype"} or not isinstance(settings["net"], str):
        raise RecordError(f"{path} is damaged: 'settings' must be net, width, depth, modes and dtype")
    if not all(type(settings[k]) is int for k in ("width", "depth", "modes")):
        raise RecordError(f"{path} is damaged: width, depth and modes must be whole numbers")
    try:
        return PINN(**{**settings, "dtype": dtypes[settings["dtype"]]})
    except BadInput as error:
        raise RecordError(f"{path} is damaged: {error}") from error
