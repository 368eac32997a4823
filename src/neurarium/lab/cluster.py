"""The ray engine: every unit is a task on a ray cluster, and its events stream back as they happen.

The cluster's machines need neurarium and the experiments' data, no shared folder: the records are written here. A unit whose seconds
are measured asks for as many processors as this machine has, so that nothing runs beside it on a machine like this.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from neurarium.errors import MissingExtra
from neurarium.lab.engines import Emit
from neurarium.lab.execute import Event, Unit, execute
from neurarium.lab.machine import machine
from neurarium.lab.record import SeedRun

__all__ = ["Ray"]


class Ray:
    """Runs units as ray tasks on the ray that is connected already, else on ``address``, else on one of its own on this machine."""

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray", "ray") from None
        self.ray: Any = ray
        self.address = address

    def map(self, units: Sequence[Unit], emit: Emit) -> None:
        """Run all units; events reach ``emit`` in the calling thread."""
        ray, ours = self.ray, not self.ray.is_initialized()
        if ours:
            ray.init(address=self.address or "local", include_dashboard=False, log_to_driver=False, **_here(self.address))
        try:
            available = int(ray.cluster_resources().get("CPU", 1))
            streams = {}
            for unit in units:
                processors = min(unit.threads, available)
                env = {"env_vars": {name: str(unit.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}}
                task = ray.remote(serve).options(
                    num_cpus=processors,
                    num_gpus=1 if unit.device.startswith("cuda") else 0,
                    num_returns="streaming",
                    max_retries=0,
                    runtime_env=env,
                )
                streams[task.remote(unit.to_dict(), sys.path if self.address is None else [])] = unit
            self._follow(streams, emit)
        finally:
            if ours:
                ray.shutdown()

    def _follow(self, streams: dict[Any, Unit], emit: Emit) -> None:
        ended = set()
        while streams:
            ready, _ = self.ray.wait(list(streams), num_returns=1, fetch_local=False)
            for stream in ready:
                unit = streams[stream]
                try:
                    event = Event.from_dict(self.ray.get(next(stream)))
                except StopIteration:
                    del streams[stream]
                    if (unit.key, unit.seed) in ended:
                        continue
                    event = _lost(unit, "the task returned before the seed had ended")
                except self.ray.exceptions.RayError as error:
                    del streams[stream]
                    event = _lost(unit, f"the task that ran this was lost: {type(error).__name__}")
                if event.end is not None:
                    ended.add((unit.key, unit.seed))
                emit(event)


def serve(unit: dict[str, Any], path: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a task does: run a unit beside this thread and yield its events."""
    sys.path += [entry for entry in path if entry not in sys.path]
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            execute(Unit.from_dict(unit), events.put)
        except BaseException as error:
            events.put(error)
        else:
            events.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (event := events.get()) is not None:
        if isinstance(event, BaseException):
            raise event
        yield event.to_dict()


def _lost(unit: Unit, why: str) -> Event:
    return Event(unit.key, unit.seed, end=SeedRun(unit.seed, tuple(r.arm for r in unit.finished), 0.0, why, machine(unit.threads)))


def _here(address: str | None) -> dict[str, Any]:
    """A ray of our own must find what this process finds."""
    if address is not None:
        return {}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {"num_cpus": os.cpu_count(), "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
