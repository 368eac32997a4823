"""What is seen while a run goes on: one line a paper, with the arms that run now and the time that is left.

Nothing is drawn where nobody looks (the output is no terminal); notes that tell why nothing happens are printed there all the same.
The time left comes from the arms that are finished: an arm not yet run takes as long as it took at other seeds, or as the mean arm.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from neurarium.lab.execute import Event
from neurarium.lab.record import ArmRun

__all__ = ["Progress"]


@dataclass
class _Line:
    seeds: Sequence[int]
    ended: set[int] = field(default_factory=set)
    arms: tuple[str, ...] = ()
    seconds: dict[tuple[int, str], float] = field(default_factory=dict)
    running: dict[int, tuple[str, float]] = field(default_factory=dict)  # seed -> arm, since when
    note: str = ""

    def left(self, now: float) -> float | None:
        """Seconds of work that are left; None while nothing is known."""
        if not self.seconds:
            return None
        means = {arm: _mean([s for (_, a), s in self.seconds.items() if a == arm]) for arm in self.arms}
        overall = _mean(list(self.seconds.values())) or 0.0
        todo = [(seed, arm) for seed in self.seeds if seed not in self.ended for arm in self.arms if (seed, arm) not in self.seconds]
        total = sum(overall if means[arm] is None else means[arm] or 0.0 for _, arm in todo)
        return max(0.0, total - sum(now - since for _, since in self.running.values()))


class Progress:
    """Lines that follow the events of a run. Use as a context manager."""

    def __init__(self, show: bool = True) -> None:
        self._show = show
        self._lines: dict[str, _Line] = {}
        self._live: Any = None

    def __enter__(self) -> Progress:
        if self._show:
            from rich.console import Console
            from rich.live import Live

            self._console = Console(stderr=True)
            if self._console.is_terminal:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._table)
                self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, key: str, seeds: Sequence[int], runs: Sequence[ArmRun], ended: Sequence[int]) -> None:
        """A paper is about to run; ``runs`` and ``ended`` seeds are there already."""
        arms = tuple(dict.fromkeys(run.arm for run in runs))
        self._lines[key] = _Line(seeds, set(ended), arms, {(run.seed, run.arm): run.seconds for run in runs})

    def event(self, event: Event) -> None:
        """Follow one event."""
        line = self._lines[event.key]
        if event.arm is not None:
            line.arms = tuple(dict.fromkeys((*line.arms, *event.arms)))
            line.running[event.seed] = event.arm, time.monotonic()
        if event.run is not None:
            line.seconds[event.run.seed, event.run.arm] = event.run.seconds
            line.running.pop(event.seed, None)
        if event.end is not None:
            line.ended.add(event.seed)
            line.running.pop(event.seed, None)

    def note(self, text: str) -> None:
        """Say something at once, terminal or not."""
        if self._show:
            from rich.text import Text

            self._console.print(Text(text))

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        table = Table.grid(padding=(0, 2))
        shown = [(key, line) for key, line in self._lines.items() if line.running] or list(self._lines.items())[:1]
        for key, line in shown:
            total = max(1, len(line.seeds) * len(line.arms))
            done = total if len(line.ended) == len(line.seeds) else len(line.seconds)
            running = ", ".join(f"seed {seed} {arm} {now - since:.0f} s" for seed, (arm, since) in sorted(line.running.items()))
            table.add_row(
                Text(key),
                ProgressBar(total, done, width=20),
                Text(f"{done}/{total}" if line.arms else ""),
                Text(running),
                Text(self._left(line, now)),
            )
        waiting = sum(len(line.ended) < len(line.seeds) and not line.running for _, line in self._lines.items())
        if len(self._lines) > 1:
            table.add_row(Text(""), Text(f"{len(self._lines)} papers, {waiting} waiting"), Text(""), Text(""), Text(""))
        return table

    @staticmethod
    def _left(line: _Line, now: float) -> str:
        left = line.left(now)
        if left is None:
            return "time left unknown"
        left /= max(1, len(line.running))
        return f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
