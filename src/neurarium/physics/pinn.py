"""Physics-informed neural networks: a network is trained until it satisfies a differential equation at sampled points.

The one engine of this room. A :class:`~neurarium.physics.problem.Problem` gives the equation, a network the candidate solution, jets
(:mod:`neurarium.physics.jets`) the exact derivatives, and one of two ways of training the parameters:

* ``optimizer="lm"``: Levenberg-Marquardt on the residuals themselves (:mod:`neurarium.physics.leastsquares`); for small networks by far
  the fastest way to a small error;
* ``optimizer="adam"`` or any function ``parameters -> torch.optim.Optimizer``: first-order training of the mean squared residual, the
  usual way; jets are compiled when that pays.

Long horizons may be solved window after window (``windows``): each begins from the end of the last, which was trained a little beyond
its end (``overlap``) so that the hand-over point is an interior one. The hand-over is exact, so the k-th window's solution is made of
k networks: of an ordinary differential equation the earlier ones are a constant, computed once; of a partial one they are evaluated at
every point, and W windows cost W^2 / 2 networks to train and a chain of W to evaluate. A few dozen windows are reasonable.

*Source*: Raissi, Perdikaris and Karniadakis, Physics-informed neural networks (2019); time windows as in Wight and Zhao (2020).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.physics.jets import Record
from neurarium.physics.leastsquares import LevenbergMarquardt, Rows
from neurarium.physics.networks import MLP, BoxFeatures, ModifiedMLP
from neurarium.physics.problem import Problem
from neurarium.physics.sampling import Uniform
from neurarium.physics.solution import Approximation, Solution
from neurarium.physics.weighting import Causal, CausalSchedule

__all__ = ["PINN", "Progress"]

_NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "modified": ModifiedMLP}


@dataclass
class Progress:
    """What a callback sees after each step. It may return True to end the window's training. The clock stands still meanwhile."""

    step: int  # from 1, in this window
    seconds: float
    loss: float
    solution: Solution  # live: it shares the networks that are being trained
    schedule: CausalSchedule | None
    window: int


class PINN:
    """A solver of differential equations by training a network; see the module's text.

    Args:
        net: "mlp", "modified" (gated), a function ``(inputs, outputs) -> module`` that takes features, or a module of one's own that
            takes raw coordinates (n, coordinates) and returns (n, fields). Modules without jet rules use nested autograd and Adam.
        width, depth: of the named networks.
        features: a function ``domain -> module`` with a ``width``; None: coordinates scaled to [-1, 1], periodic ones as Fourier modes.
        modes: Fourier modes of a periodic coordinate.
        optimizer: "lm", "adam", a :class:`LevenbergMarquardt` partial, or a function ``parameters -> Optimizer``.
        scheduler: a function ``optimizer -> learning-rate scheduler``, stepped every step ("adam" alone: times 0.9 each 5,000 steps).
        weights: None (all points count alike) or :class:`Causal`.
        sampler: where the residual is asked to vanish (default: 2048 uniform points); ``condition_points`` for each soft condition.
        resample_every: steps between fresh points; None: 1, or 5 with least squares.
        windows, overlap: time windows, and by what part of its length each is trained beyond its end.
        dtype: None: float64 for least squares, float32 otherwise.
        compile: first-order jets through ``torch.compile``; "auto": where at least 1,000 steps are asked for.
    """

    def __init__(
        self,
        net: str | nn.Module | Callable[..., nn.Module] = "mlp",
        *,
        width: int = 24,
        depth: int = 3,
        features: Callable[..., Any] | None = None,
        modes: int = 4,
        optimizer: str | Callable[..., Any] = "lm",
        scheduler: Callable[..., Any] | None = None,
        weights: Causal | None = None,
        sampler: Callable[..., Tensor] | None = None,
        condition_points: int = 256,
        resample_every: int | None = None,
        windows: int = 1,
        overlap: float = 0.05,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        compile: bool | str = "auto",
    ) -> None:
        if isinstance(net, str) and net not in _NETWORKS:
            raise BadInput(f"net must be one of {', '.join(_NETWORKS)}, a module or a function, got {net!r}")
        if isinstance(optimizer, str) and optimizer not in ("lm", "adam"):
            raise BadInput(f"optimizer must be 'lm', 'adam' or a function of the parameters, got {optimizer!r}")
        if windows < 1 or overlap < 0 or width < 1 or depth < 0:
            raise BadInput("windows and width must be at least 1, overlap and depth at least 0")
        self.net, self.width, self.depth, self.features, self.modes = net, width, depth, features, modes
        self.optimizer, self.scheduler, self.weights = optimizer, scheduler, weights
        self.sampler = sampler or Uniform()
        self.condition_points, self.windows, self.overlap = condition_points, windows, overlap
        self.second_order = optimizer == "lm" or getattr(optimizer, "func", optimizer) is LevenbergMarquardt
        self.resample_every = resample_every or (5 if self.second_order else 1)
        self.dtype = dtype or (torch.float64 if self.second_order else torch.float32)
        self.device, self.compile = torch.device(device), compile

    def build(self, problem: Problem, seed: int = 0) -> Approximation:
        """An untrained candidate solution; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(self.net, nn.Module):
                network = copy.deepcopy(self.net)
            else:
                features = (self.features or partial(BoxFeatures, modes=self.modes))(problem.domain)
                made = partial(_NETWORKS[self.net], width=self.width, depth=self.depth) if isinstance(self.net, str) else self.net
                network = nn.Sequential(features, made(features.width, len(problem.fields)))
        return Approximation(problem, network.to(self.device, self.dtype))

    def solve(
        self,
        problem: Problem,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        seed: int = 0,
        callbacks: Sequence[Callable[[Progress], bool | None]] = (),
    ) -> Solution:
        """Train until ``steps`` (each window; default 100 of least squares, 5,000 of first order) or ``seconds`` are spent."""
        steps = steps if steps is not None else (None if seconds is not None else 100 if self.second_order else 5000)
        if steps is not None and steps < 0:
            raise BadInput(f"steps must not be negative, got {steps}")
        if self.weights is not None and problem.domain.time is None:
            raise BadInput(f"{problem.name}: causal weights need a time coordinate, Box(..., time='t')")
        plain = self.features is None and isinstance(self.net, str)
        settings = {k: getattr(self, k) for k in ("net", "width", "depth", "modes")} if plain else {}
        settings |= {"dtype": str(self.dtype).removeprefix("torch.")} if plain else {}
        keys = ("step", "seconds", "loss", "window", *(("eps", "min_weight") if self.weights else ()))
        solution = Solution(problem, [], settings, {k: [] for k in keys})
        for k in range(self.windows):
            part = self._window(problem, solution, k)
            solution.pieces.append(self.build(part, seed + 1000 * k))
            budget = None if seconds is None else seconds / self.windows
            _Training(self, solution, k, seed + 1000 * k).run(steps, budget, callbacks)
        return solution

    def _window(self, problem: Problem, solution: Solution, k: int) -> Problem:
        if self.windows == 1:
            return problem
        if problem.domain.time is None:
            raise BadInput(f"{problem.name}: time windows need a time coordinate")
        lo, hi = problem.domain.bounds[problem.domain.time]
        length = (hi - lo) / self.windows
        start, end = lo + k * length, lo + (k + 1 + (self.overlap if k + 1 < self.windows else 0)) * length
        return problem.window(start, end, solution.pieces[-1].at(start) if k else None)


class _Training:
    """One window's training."""

    def __init__(self, solver: PINN, solution: Solution, window: int, seed: int) -> None:
        self.solver, self.solution, self.window = solver, solution, window
        self.model = solution.pieces[-1]
        self.problem = self.model.problem
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = [(self.problem.residual, None, 1.0), *((c.residual, c.on, c.weight) for c in self.problem.penalties())]
        self.wanted = [self.problem.orders(residual) for residual, _, _ in self.parts]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UnsupportedModel("the network has no trainable parameter", module=type(self.model.network).__name__)

    def draw(self) -> list[Tensor]:
        """Fresh points of the equation, in order of time, and of each soft condition."""
        domain, dtype = self.problem.domain, self.solver.dtype
        interior = self.solver.sampler(domain, self.generator, dtype)
        if domain.time is not None:
            interior = interior[torch.argsort(interior[:, domain.coords.index(domain.time)], stable=True)]
        n = self.solver.condition_points
        sets = [interior]
        for _, on, _ in self.parts[1:]:
            count = 1 if set(on or ()) == set(domain.coords) else n
            sets.append(domain.points(torch.rand(count, len(domain.coords), generator=self.generator, dtype=dtype), on))
        return [points.to(self.solver.device) for points in sets]

    def rows(self, points: Sequence[Tensor]) -> list[Rows]:
        """Residuals of the equation and of each condition, scaled so that their squares add up to the loss without weights."""
        blocks = []
        for (residual, _, weight), x, wanted in zip(self.parts, points, self.wanted):
            tape: list[Record] = []
            values = self.model.residual(residual, x, wanted, tape)
            blocks.append(Rows(values, tape, (weight / len(x)) ** 0.5))
        return blocks

    def loss(self, points: Sequence[Tensor], schedule: CausalSchedule | None, strength: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mean squared residual, weighted if there is a schedule, plus the soft conditions; and each time slice's earlier losses."""
        totals = []
        for (residual, _, weight), x, wanted in zip(self.parts, points, self.wanted):
            squares = sum(r**2 for r in self.model.residual(residual, x, wanted))
            totals.append((squares, weight))
        squares: Any = totals[0][0]
        soft = [weight * s.mean() for s, weight in totals[1:]]
        sums = None
        if schedule is not None and strength is not None:
            initial = soft[0] if self.problem.soft_start else 0.0
            w, sums = schedule.weights(squares, initial, strength)
            squares = w * squares
        return sum(soft, squares.mean()), sums

    def run(self, steps: int | None, seconds: float | None, callbacks: Sequence[Callable[[Progress], bool | None]]) -> None:
        solver, clock = self.solver, time.perf_counter()
        schedule = solver.weights.begin(10**9 if steps is None else steps) if solver.weights else None
        step_once = self._least_squares(schedule) if solver.second_order else self._first_order(schedule, steps)
        points: list[Tensor] = []
        step = 0
        while steps is None or step < steps:
            if seconds is not None and time.perf_counter() - clock >= seconds:
                break
            if step % solver.resample_every == 0:
                points = self.draw()
            loss, sums = step_once(points)
            step += 1
            if loss != loss or loss == float("inf"):
                if step == 1:
                    raise BadInput(f"{self.problem.name}: the loss at the start is {loss}")
                warnings.warn(f"{self.problem.name}: training diverged at step {step}", RuntimeWarning, stacklevel=3)
                break
            if schedule is not None and sums is not None:
                eps = schedule.eps
                schedule.update(sums)
                self._note(eps=eps, min_weight=schedule.min_weight)
            passed = time.perf_counter() - clock
            self._note(step=step, seconds=passed, loss=loss, window=self.window)
            progress = Progress(step, passed, loss, self.solution, schedule, self.window)
            stop = sum(bool(callback(progress)) for callback in callbacks) > 0  # every callback is called
            clock = time.perf_counter() - passed
            if stop or (schedule is not None and schedule.converged):
                break

    def _note(self, **values: float) -> None:
        for key, value in values.items():
            self.solution.history[key].append(value)

    def _least_squares(self, schedule: CausalSchedule | None) -> Callable[[Sequence[Tensor]], tuple[float, Tensor | None]]:
        if not self.model.jets:
            raise UnsupportedModel(
                "least squares needs a network of operations that jets know (linear layers, tanh, sin, silu, ...); use optimizer='adam'",
                module=type(self.model.network).__name__,
            )
        make = LevenbergMarquardt if self.solver.optimizer == "lm" else self.solver.optimizer
        optimizer = make(self.parameters)  # type: ignore[operator]
        sums: Tensor | None = None

        def weigh(blocks: Sequence[Rows]) -> Sequence[Rows]:
            nonlocal sums
            if schedule is None:
                return blocks
            squares = sum(r.detach() ** 2 for r in blocks[0].values)
            initial = blocks[1].loss() if self.problem.soft_start else 0.0
            w, sums = schedule.weights(squares, initial, schedule.strength(squares))  # type: ignore[arg-type]
            return [Rows(blocks[0].values, blocks[0].tape, blocks[0].scale * w.sqrt()), *blocks[1:]]

        def step(points: Sequence[Tensor]) -> tuple[float, Tensor | None]:
            return optimizer.step(lambda: self.rows(points), weigh), sums

        return step

    def _first_order(self, schedule: CausalSchedule | None, steps: int | None) -> Callable[[Sequence[Tensor]], tuple[float, Tensor | None]]:
        optimizer_of, scheduler_of = self.solver.optimizer, self.solver.scheduler
        if optimizer_of == "adam":
            optimizer_of = partial(torch.optim.Adam, lr=1e-3, fused=True)
            scheduler_of = scheduler_of or partial(torch.optim.lr_scheduler.StepLR, step_size=5000, gamma=0.9)
        optimizer = optimizer_of(self.parameters)  # type: ignore[operator]
        scheduler = scheduler_of(optimizer) if scheduler_of else None
        wish = self.solver.compile
        compiled = self.model.jets and (wish is True or (wish == "auto" and (steps or 0) >= 1000))
        loss_of = _compiled(self.loss) if compiled else self.loss
        sums: Tensor | None = None

        def step(points: Sequence[Tensor]) -> tuple[float, Tensor | None]:
            strength = schedule.strength(points[0]) if schedule else None

            def closure() -> Tensor:
                nonlocal sums
                optimizer.zero_grad()
                loss, sums = loss_of(points, schedule, strength)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()
            return float(loss.detach()), sums

        return step


def _compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile``, or ``f`` itself from the first failure on (no C++ compiler, say)."""
    current = torch.compile(f)

    def call(*args: Any) -> Any:
        nonlocal current
        try:
            return current(*args)
        except Exception as error:
            if current is f:
                raise
            warnings.warn(f"torch.compile failed, going on without: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=2)
            current = f
            return f(*args)

    return call
