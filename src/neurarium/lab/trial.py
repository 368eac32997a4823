"""What an experiment sees: a trial (one seed at one scale) and its arms.

::

    def run(trial):
        task = data.images("mnist", train=trial.scale(smoke=512, laptop=20_000), seed=trial.seed)
        net = trial.shared("pretrained", lambda: pretrain(task))    # built at most once, by the first arm that asks
        for arm in trial.arms("bptt", "sltt"):                      # yields the arms that are not finished yet
            ...
            arm.log(accuracy=accuracy)

Every arm starts from the same random state, made from the seed alone. A finished arm is never run again: when a run is resumed, or when
another arm crashed, ``run(trial)`` is called anew and ``arms`` skips what is there. So an arm's body must not rely on Python state that
another arm's body made; what several arms need comes from :meth:`Trial.shared`, an earlier arm's number from :meth:`Trial.metric`.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from neurarium.errors import BadInput
from neurarium.lab.measurement import Curve, Grid, Value, as_curve, as_value
from neurarium.lab.names import check_name, check_scale
from neurarium.lab.record import MAX_ARMS, MAX_METRICS, ArmRun
from neurarium.lab.seeding import derived_seed, preserved, seed_all, torch_is_loaded

if TYPE_CHECKING:
    import torch

__all__ = ["Arm", "Trial"]

T = TypeVar("T")


class Arm:
    """One of the things that an experiment compares, and what is measured of it."""

    def __init__(self, name: str, trial: Trial) -> None:
        self.name = name
        self._trial = trial
        self._clock = _Clock(trial)
        self._metrics: dict[str, Value] = {}
        self._timed: list[str] = []
        self._curves: dict[str, Curve] = {}
        self._grids: dict[str, Grid] = {}

    @property
    def seconds(self) -> float:
        """Wall seconds since the arm began, without the building of shared things. Logged as the metric ``seconds`` at the end."""
        return self._clock.seconds()

    def log(self, **metrics: Any) -> None:
        """Record numbers or short lists of numbers (arrays and tensors too), each name once. NaN is recorded, and judged as failing."""
        for name, value in metrics.items():
            self._new(name, self._metrics, "metric")
            self._metrics[name] = as_value(value, f"arm {self.name!r}: metric {name!r}")

    def log_timed(self, **metrics: Any) -> None:
        """:meth:`log` for what a clock measured: it differs from run to run, and comparing two records leaves it out."""
        self.log(**metrics)
        self._timed += metrics

    def curve(self, name: str, x: Any = None, y: Any = None, *, timed: bool = False) -> None:
        """Record a series for figures. ``x`` may be left out; more than 400 points are thinned evenly. ``timed``: see :meth:`log_timed`."""
        self._new(name, self._curves, "curve")
        if y is None:
            raise BadInput(f"arm {self.name!r}: curve {name!r} has no y")
        self._curves[name] = as_curve(x, y, f"arm {self.name!r}: curve {name!r}")
        if timed:
            self._timed.append(name)

    def grid(self, name: str, values: Any) -> None:
        """Record a picture, 2-D; more than 96 cells a side are averaged over blocks. Stored to one part in 254 of its range."""
        self._new(name, self._grids, "grid")
        self._grids[name] = Grid.of(values, f"arm {self.name!r}: grid {name!r}")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Log the wall seconds of a block as a metric; blocks of one name add up. Shared things that are built inside do not count."""
        if name not in self._timed:
            self._new(name, self._metrics, "metric")
            self._timed.append(name)
            self._metrics[name] = 0.0
        clock = _Clock(self._trial)
        try:
            yield
        finally:
            spent = self._metrics[name]
            self._metrics[name] = clock.seconds() + (0.0 if isinstance(spent, list) else spent)

    def _new(self, name: str, table: Mapping[str, Any], kind: str) -> None:
        check_name(name, f"arm {self.name!r}: {kind}")
        if name == "seconds" and kind == "metric":
            raise BadInput(f"arm {self.name!r}: 'seconds' is measured by the lab; choose another name")
        if name in table:
            raise BadInput(f"arm {self.name!r}: {kind} {name!r} is already there; log it once, or use a curve for a series")
        if len(table) >= MAX_METRICS - 1:
            raise BadInput(f"arm {self.name!r}: more than {MAX_METRICS - 1} of one kind; {kind} {name!r} is one too many")

    def _finish(self, status: str, error: str | None = None) -> ArmRun:
        metrics = {**self._metrics, "seconds": self.seconds}
        timed = ("seconds", *self._timed)
        return ArmRun(self._trial.seed, self.name, status, metrics, timed, self._curves, self._grids, error)


class Trial:
    """One seed at one scale. Made by the runner; by hand it is ``Trial(seed=0)``, which measures into :attr:`runs`."""

    def __init__(
        self,
        seed: int = 0,
        name: str = "smoke",
        device: str = "cpu",
        *,
        finished: Mapping[str, ArmRun] | None = None,
        on_start: Callable[[str], None] | None = None,
        on_finish: Callable[[ArmRun], None] | None = None,
    ) -> None:
        self.seed, self.name = seed, check_scale(name)
        self.order: list[str] = []  # every arm that was announced
        self.runs: dict[str, ArmRun] = dict(finished or {})
        self.stands_in = ""
        self.failure: BaseException | None = None  # of the machinery around the experiment: not a crash of an arm
        self._device = device
        self._open: Arm | None = None
        self._shared: dict[str, Any] = {}
        self._copies: dict[str, Any] = {}  # the open arm's own
        self._building = 0
        self._shared_seconds = 0.0
        self._torch_seeded = False
        self._on_start, self._on_finish = on_start, on_finish

    @property
    def device(self) -> torch.device:
        """Where the experiment computes."""
        device: torch.device = self._torch().device(self._device)
        return device

    def generator(self) -> torch.Generator:
        """A fresh generator on the trial's device, seeded by the trial's seed."""
        generator: torch.Generator = self._torch().Generator(device=self._device)
        return generator.manual_seed(self.seed)

    def scale(self, *, smoke: T, laptop: T) -> T:
        """The value for this trial's scale."""
        return smoke if self.name == "smoke" else laptop

    def stand_in(self, text: str) -> None:
        """Say that this run uses something else than the catalog's evidence note names (other data, because the first were not there).

        The record keeps it and every report shows it.
        """
        self.stands_in = " ".join(text.split())[:120]

    def arms(self, *names: str) -> Iterator[Arm]:
        """The arms that are not finished yet, one after another, each from the same random state. For use in one ``for`` loop."""
        for name in names:
            check_name(name, "arm")
        self.order += [name for name in names if name not in self.order]
        if len(set(names)) < len(names) or len({name.lower() for name in self.order}) < len(self.order):
            raise BadInput(f"arms {', '.join(self.order)}: each name once, and not distinguished by case alone")
        if len(self.order) > MAX_ARMS:
            raise BadInput(f"an experiment has at most {MAX_ARMS} arms")
        return self._iterate(names)

    def shared(self, name: str, build: Callable[[], T]) -> T:
        """What several arms use (a pretrained net, a tuned setting), built when it is first asked for, under a seed of its own.

        The random state goes on as if nothing had been built, and the building counts into no arm's seconds, so that it makes no
        difference which arm asks first. Each arm gets a deep copy of its own (what cannot be copied is handed out as it is).
        """
        check_name(name, "shared")
        if name in self._copies:
            value: T = self._copies[name]
            return value
        with self._apart():
            if name not in self._shared:
                seed_all(derived_seed(self.seed, name))
                self._shared[name] = build()
            value = _copied(self._shared[name])
        if self._open is not None and self._building == 0:
            self._copies[name] = value
        return value

    def metric(self, arm: str, name: str) -> Any:
        """What a finished arm logged, also when it ran before a resume."""
        run = self.runs.get(arm)
        if run is None or run.status != "done":
            done = [other.arm for other in self.runs.values() if other.status == "done"]
            why = "crashed" if run is not None else "is not finished"
            raise BadInput(f"arm {arm!r} {why} at seed {self.seed}, so it has no {name!r}; finished are {', '.join(done) or 'none'}")
        if name not in run.metrics:
            raise BadInput(f"arm {arm!r} has no metric {name!r}; it logged {', '.join(run.metrics)}")
        return run.metrics[name]

    @property
    def open(self) -> str | None:
        """The arm whose body is running, or was when an exception left it."""
        return None if self._open is None else self._open.name

    def crash(self, error: str) -> None:
        """Record that the open arm crashed."""
        if self._open is None:
            raise BadInput("no arm is open")
        self._close("crashed", error)

    def _iterate(self, names: tuple[str, ...]) -> Iterator[Arm]:
        for name in names:
            if name in self.runs:
                continue
            if self._open is not None:
                raise BadInput(f"arm {name!r} begins inside arm {self._open.name!r}; loops over arms cannot be nested")
            if self._on_start is not None:
                self._guarded(self._on_start, name)
            seed_all(self.seed)
            self._torch_seeded = torch_is_loaded()
            self._open = arm = Arm(name, self)
            yield arm
            if torch_is_loaded() and not self._torch_seeded:
                raise BadInput("torch was first imported inside an arm, too late to be seeded; import it at the top of the module")
            self._close("done")

    def _close(self, status: str, error: str | None = None) -> None:
        assert self._open is not None
        run = self._open._finish(status, error)
        self._open, self._copies = None, {}
        self.runs[run.arm] = run
        if self._on_finish is not None:
            self._guarded(self._on_finish, run)

    def _guarded(self, call: Callable[[Any], None], argument: Any) -> None:
        """The machinery's own errors must not be taken for the experiment's, even if the experiment catches them."""
        try:
            call(argument)
        except BaseException as error:
            self.failure = error
            raise

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        start, outermost = time.perf_counter(), self._building == 0
        self._building += 1
        try:
            with preserved():
                yield
        finally:
            self._building -= 1
            if outermost:
                self._shared_seconds += time.perf_counter() - start

    def _torch(self) -> Any:
        """torch, seeded like the rest if this is what loads it."""
        fresh = not torch_is_loaded()
        import torch

        if fresh:
            torch.manual_seed(self.seed)
            self._torch_seeded = True
        return torch


class _Clock:
    """Wall seconds, without those in which shared things were built."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._shared = trial._shared_seconds
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return max(0.0, time.perf_counter() - self._start - (self._trial._shared_seconds - self._shared))


def _copied(value: T) -> T:
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError, NotImplementedError, copy.Error):  # a lock, an open file, a tensor inside a graph
        return value
