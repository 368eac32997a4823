"""Where units of work are run: in this process, in processes of this machine, on a ray cluster.

An engine is anything with ``map(units, emit)``: it runs every unit to its end, tells ``emit`` of each event as it happens (in the
caller's thread), and returns when all are done. It stores nothing and judges nothing, so the records are the same whichever is used.

- ``inline``: here, one after another. Nothing to start, and a debugger works.
- ``local`` (the default): child processes, each fresh and with one torch thread when several run, all threads when alone. They die with
  this process, however it dies. A child that dies (out of memory, a crash in native code) costs the arm that it ran, not the run.
- ``ray``: the extra of that name; tasks on ``address``, or on a ray of its own on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from neurarium.errors import BadInput
from neurarium.lab.execute import Event, Unit, execute

__all__ = ["ENGINES", "Emit", "Engine", "Inline", "engine"]

Emit: TypeAlias = Callable[[Event], None]

ENGINES = ("inline", "local", "ray")


class Engine(Protocol):
    """Runs units; see the module's docstring."""

    def map(self, units: Sequence[Unit], emit: Emit) -> None: ...


class Inline:
    """Every unit in this process, one after another."""

    def map(self, units: Sequence[Unit], emit: Emit) -> None:
        """Run the units in their order. A number of threads that an experiment sets ends with it."""
        import torch

        threads = torch.get_num_threads()
        for unit in units:
            try:
                execute(unit, emit)
            finally:
                torch.set_num_threads(threads)


def engine(name: str | Engine, *, jobs: int = 1, address: str | None = None) -> Engine:
    """The engine of this name; an engine is returned as it is."""
    if not isinstance(name, str):
        return name
    if name == "inline":
        return Inline()
    if name == "local":
        from neurarium.lab.local import Local

        return Local(jobs)
    if name == "ray":
        from neurarium.lab.cluster import Ray

        return Ray(address)
    raise BadInput(f"engine {name!r} is unknown; engines are {', '.join(ENGINES)}")
