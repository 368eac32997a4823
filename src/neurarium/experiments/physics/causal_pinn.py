"""Causal weights against plain training, first and second order, on the Allen-Cahn equation; then the Lorenz system.

Allen-Cahn to T = 1, initial data and periodicity exact, 32 time slices x 64 points. Adam (3 x 48, 4,000 steps) and Levenberg-Marquardt
(3 x 24, 45 steps) train with and without causal weights on the same points from the same start. ``lm_shuffled`` gives the same weights to
the wrong slices: what remains of the gain if causality does not. Points change during training, so the error wobbles; an arm's error is
the median of its last five checks. Adam's learning rate is the best of 1e-3, 3e-3, 1e-2 for the *plain* arm. Lorenz: T = 3 in six
windows, Levenberg-Marquardt with and without weights. The plain arms log the smallest weight that the causal rule would give them,
annealed on their own slice losses, without using it: what the weight tells must be measured against a run which it does not steer.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from neurarium.physics import PINN, Causal, CausalPINN, Progress, Slices, Solution, allen_cahn, lorenz

if TYPE_CHECKING:
    from collections.abc import Callable

    import matplotlib.figure

    from neurarium.lab import Arm, RecordView, Trial
    from neurarium.physics import Problem

FIRST_ORDER = Causal(eps=(100.0,))  # smaller values do nothing visible: the residuals to be weighed sum up to about 1e-2
SECOND_ORDER = Causal(eps=tuple(10.0 * 3.0**k for k in range(9)), delta=0.95, patience=10**9)
LORENZ = Causal(eps=(1e-2, 1e-1, 1.0, 10.0), delta=0.95, patience=10**9)


class Shuffled(Causal):
    """Causal weights, each given to the slice at another, fixed place in time."""

    def earlier(self, losses: torch.Tensor, initial: torch.Tensor | float = 0.0) -> torch.Tensor:
        order = torch.randperm(self.chunks, generator=torch.Generator().manual_seed(0)).to(losses.device)
        return super().earlier(losses, initial)[order]


class Watch:
    """Follows a run: error on the reference grid, largest sum of earlier losses (which decides the smallest weight), all weights.

    A run without weights is judged by ``rule`` at each check, on fresh points of ``sampler``; its training sees nothing of that.
    """

    def __init__(self, every: int, rule: Causal, sampler: Slices) -> None:
        self.every, self.rule, self.sampler = every, rule.begin(10**9), sampler
        self.generator = torch.Generator().manual_seed(0)
        self.steps: list[float] = []
        self.seconds: list[float] = []
        self.errors: list[float] = []
        self.sums: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.eps = float("nan")  # of the last check

    def __call__(self, progress: Progress) -> None:
        if progress.step % self.every == 0:
            self.steps.append(progress.step)
            self.seconds.append(progress.seconds)
            self.errors.append(progress.solution.error()["u"])
            if progress.schedule is not None:
                self.eps = progress.solution.history["eps"][-1]  # the one used: the schedule may have moved on
                self.sums.append(float(progress.schedule.sums.max()))
                self.weights.append(progress.schedule.slice_weights)
            else:
                self.eps = self.rule.eps
                self.rule.update(self.unused(progress.solution))
                self.sums.append(float(self.rule.sums.max()))

    def unused(self, solution: Solution) -> torch.Tensor:
        """The sums of earlier slice losses S_i which causal training would weigh by."""
        piece = solution.pieces[-1]
        like = next(piece.parameters())
        points = self.sampler(piece.problem.domain, self.generator, like.dtype).to(like.device)
        with torch.no_grad():
            squares = sum(r**2 for r in piece.residual(piece.problem.residual, points, piece.problem.orders()))
        return self.rule.settings.earlier(self.rule.settings.slice_losses(squares))

    def min_weight(self) -> list[float]:
        """The smallest weight at each check, at the last eps of the run."""
        return [math.exp(-self.eps * s) for s in self.sums]


def run(trial: Trial) -> None:
    problem, slices = allen_cahn(), trial.scale(smoke=Slices(32, 4), laptop=Slices(32, 64))
    adam = {
        "width": trial.scale(smoke=8, laptop=48),
        "optimizer": partial(torch.optim.Adam, lr=3e-3, fused=True),
        "sampler": slices,
        "device": trial.device,
    }
    lm = {"width": trial.scale(smoke=6, laptop=24), "optimizer": "lm", "sampler": slices, "device": trial.device}
    marching = {**lm, "sampler": Slices(32, trial.scale(smoke=1, laptop=8)), "windows": trial.scale(smoke=2, laptop=6)}
    solvers: dict[str, Callable[[], PINN]] = {
        "adam": lambda: PINN(**adam),
        "adam_causal": lambda: CausalPINN(causal=FIRST_ORDER, **adam),
        "lm": lambda: PINN(**lm),
        "lm_causal": lambda: CausalPINN(causal=SECOND_ORDER, **lm),
        "lm_shuffled": lambda: CausalPINN(causal=Shuffled(SECOND_ORDER.eps, SECOND_ORDER.delta, patience=SECOND_ORDER.patience), **lm),
        "lorenz_plain": lambda: PINN(**marching),
        "lorenz_causal": lambda: CausalPINN(causal=LORENZ, **marching),
    }
    for arm in trial.arms(*solvers):
        solver = solvers[arm.name]()
        if arm.name.startswith("lorenz"):
            solution = solver.solve(lorenz(), steps=trial.scale(smoke=3, laptop=60), seed=trial.seed)
            arm.log(error=solution.error()["x"], residual=solution.residual(), steps_taken=len(solution.history["step"]))
            _trajectory(arm, solution)
            continue
        first = arm.name.startswith("adam")
        watch = Watch(trial.scale(smoke=2, laptop=100) if first else 1, FIRST_ORDER if first else SECOND_ORDER, slices)
        steps = trial.scale(smoke=12, laptop=4000) if first else trial.scale(smoke=6, laptop=45)
        solution = solver.solve(problem, steps=steps, seed=trial.seed, callbacks=[watch])
        arm.log(error=median(watch.errors[-5:]), residual=solution.residual())
        arm.log(minus_log_error=[-math.log(e) for e in watch.errors], min_weight=watch.min_weight())
        arm.curve("error", watch.steps, watch.errors)
        arm.curve("error_by_seconds", watch.seconds, watch.errors, timed=True)
        arm.curve("error_over_time", *_error_over_time(problem, solution))
        if watch.weights:
            arm.grid("weights", torch.stack(watch.weights))


def _error_over_time(problem: Problem, solution: Solution) -> tuple[list[float], list[float]]:
    """Root mean square over x of the error, at each time of the reference."""
    reference = problem.reference()  # type: ignore[misc]
    wrong = (solution(reference.points()).double().cpu() - reference.fields()).view(len(reference.axes["x"]), -1)
    return reference.axes["t"].tolist(), wrong.square().mean(0).sqrt().tolist()


def _trajectory(arm: Arm, solution: Solution) -> None:
    reference = solution.problem.reference()  # type: ignore[misc]
    t = reference.axes["t"][::2]
    arm.curve("x", t, solution(t[:, None])[:, 0].cpu())
    arm.curve("reference", t, reference.values["x"][::2])


NAMES = {
    "adam": ("Adam", "#56b4e9", "--"),
    "adam_causal": ("Adam, causal", "#0072b2", "-"),
    "lm": ("LM", "#e69f00", "--"),
    "lm_causal": ("LM, causal", "#d55e00", "-"),
    "lm_shuffled": ("LM, weights shuffled", "#888888", ":"),
}


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    import numpy as np

    fig.set_size_inches(10, 7)
    fig.set_layout_engine("constrained")
    (left, right), (below, lorenz_at) = fig.subplots(2, 2)
    for name, (label, colour, style) in NAMES.items():
        if name not in record.arms:
            continue
        curves = record.curves(name, "error_over_time")
        t, errors = curves[0][0], np.array([y for _, y in curves])
        left.plot(t, np.exp(np.log(np.maximum(errors, 1e-12)).mean(0)), style, color=colour, label=label)
        left.fill_between(t, errors.min(0), errors.max(0), color=colour, alpha=0.12, linewidth=0)
        for k, (x, y) in enumerate(record.curves(name, "error_by_seconds")):
            below.plot(x, y, style, color=colour, alpha=0.8, label=label if k == 0 else None)
    left.set(
        yscale="log", ylim=(1e-5, 3), xlabel="time t", ylabel="error, rms over x", title="Allen-Cahn: error at each time, after equal steps"
    )
    left.legend(fontsize=7)
    below.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative L2 error", title="Error against time spent")

    if grids := record.grids("lm_causal", "weights"):
        weights = np.asarray(grids[0]).T  # (slices, checks): one check a step, slices over t in [0, 1]
        span = (0.5, weights.shape[1] + 0.5, 0, 1)
        image = right.imshow(weights, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=span)
        fig.colorbar(image, ax=right, label="weight $w_i$")
    right.set(xlabel="step", ylabel="time t", title="Causal weights: the solved front moves on (LM)")

    lorenz_at.plot(*record.curves("lorenz_causal", "reference")[0], color="black", linewidth=2.5, alpha=0.35, label="reference")
    for name, label, colour, style in (("lorenz_plain", "plain", "#e69f00", "--"), ("lorenz_causal", "causal", "#d55e00", "-")):
        for k, (x, y) in enumerate(record.curves(name, "x")):
            lorenz_at.plot(x, y, style, color=colour, linewidth=1, label=label if k == 0 else None)
    lorenz_at.set(xlabel="time t", ylabel="x", ylim=(-25, 25), title="Lorenz in six windows (LM)")
    lorenz_at.legend(fontsize=7)
