"""The local engine: child processes of this machine, one per job.

A child is a fresh interpreter that serves the units of one paper and talks JSON lines over its pipes (:mod:`~neurarium.lab.worker`);
nothing is pickled, and a calling script needs no ``if __name__ == "__main__"``. Units whose seconds are measured run after all others,
one at a time with all threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from neurarium.lab.engines import Emit
from neurarium.lab.execute import Event, Unit
from neurarium.lab.machine import machine
from neurarium.lab.record import ArmRun, SeedRun
from neurarium.lab.strictjson import line

__all__ = ["Local"]

_Message: TypeAlias = "Event | BaseException | None"  # None: a job has nothing left to do


class Local:
    """Runs units in up to ``jobs`` child processes at once."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def map(self, units: Sequence[Unit], emit: Emit) -> None:
        """Run all units; events reach ``emit`` in the calling thread. However this ends, no child is left."""
        _Pool([unit for unit in units if not unit.exclusive], self.jobs).run(emit)
        _Pool([unit for unit in units if unit.exclusive], 1).run(emit)


class _Pool:
    def __init__(self, units: Sequence[Unit], jobs: int) -> None:
        self.todo = deque(units)
        self.messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(jobs, len(units)))]
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def run(self, emit: Emit) -> None:
        try:
            for thread in self.threads:
                thread.start()
            working = len(self.threads)
            while working:
                message = self.messages.get()
                if message is None:
                    working -= 1
                elif isinstance(message, BaseException):
                    raise message
                else:
                    emit(message)
        finally:
            self.stopping.set()
            for child in list(self.children):
                child.kill()
            for thread in self.threads:
                thread.join()

    def _serve(self) -> None:
        """One job: a child after another, as long as there are units. A child lives no longer than this thread, which is its parent."""
        child: subprocess.Popen[bytes] | None = None
        serving = ""
        try:
            while not self.stopping.is_set():
                try:
                    unit: Unit | None = self.todo.popleft()
                except IndexError:
                    break
                while unit is not None and not self.stopping.is_set():
                    if child is None or child.poll() is not None or serving != unit.key:
                        self._end(child)
                        child, serving = self._start(unit.threads), unit.key
                    unit = self._run(child, unit)
        except BaseException as error:  # reaches the caller, who stops the rest
            self.messages.put(error)
        finally:
            self._end(child)
            self.messages.put(None)

    def _run(self, child: subprocess.Popen[bytes], unit: Unit) -> Unit | None:
        """Run a unit; if the child dies, what is left of the unit."""
        finished, arms, arm = list(unit.finished), [run.arm for run in unit.finished], ""
        start = began = time.perf_counter()
        for event in _events(child, unit):
            if event.arm is not None:
                arm, arms, began = event.arm, list(event.arms), time.perf_counter()
            if event.run is not None:
                finished.append(event.run)
                arm = ""
            self.messages.put(event)
            if event.end is not None:
                return None
        if self.stopping.is_set():
            return None
        death = _death(child.wait())
        if arm:
            seconds = time.perf_counter() - began
            crash = ArmRun(unit.seed, arm, "crashed", {"seconds": seconds}, ("seconds",), error=death)
            self.messages.put(Event(unit.key, unit.seed, run=crash))
            return replace(unit, finished=(*finished, crash))
        spent = time.perf_counter() - start
        end = SeedRun(unit.seed, tuple(dict.fromkeys(arms)), spent, death, machine(unit.threads))
        self.messages.put(Event(unit.key, unit.seed, end=end))
        return None

    def _start(self, threads: int) -> subprocess.Popen[bytes]:
        counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "neurarium.lab.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **counts, "PYTHONPATH": path},
        )
        self.children.add(child)
        if self.stopping.is_set():
            child.kill()
        return child

    def _end(self, child: subprocess.Popen[bytes] | None) -> None:
        if child is None:
            return
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        child.stdout.close()
        child.kill()
        child.wait()
        self.children.discard(child)


def _events(child: subprocess.Popen[bytes], unit: Unit) -> Iterator[Event]:
    """What the child tells; ends when it is dead."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(line(unit.to_dict()))
        child.stdin.flush()
    except OSError:
        return
    for answer in child.stdout:
        if not answer.endswith(b"\n"):  # cut off in the middle
            return
        yield Event.from_dict(json.loads(answer))


def _death(code: int) -> str:
    if code >= 0:
        return f"the process that ran this ended with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"the process that ran this was killed by {signal.Signals(-code).name}{hint}"
