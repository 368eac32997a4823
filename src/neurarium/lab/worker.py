"""The child process of the local engine: reads units from its standard input, runs them, writes events to its standard output.

It ends when its parent does: the kernel is asked to kill it then (Linux), and the end of its input ends it anywhere else. What an
experiment prints goes to the standard error, so that it cannot be taken for an event. Ctrl-C is the parent's business.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from neurarium.lab.execute import Event, Unit, execute
from neurarium.lab.strictjson import line

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(parent: int) -> None:
    """Serve the process of this number until its end of the pipe is closed."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, requests = os.dup(1), os.dup(0)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    units: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, units), daemon=True).start()

    def emit(event: Event) -> None:
        data = line(event.to_dict())
        while data:
            data = data[os.write(answers, data) :]

    while True:
        execute(Unit.from_dict(units.get()), emit)


def _read(requests: int, units: queue.SimpleQueue[dict[str, Any]]) -> None:
    with os.fdopen(requests, "rb") as stream:
        for request in stream:
            units.put(json.loads(request))
    sys.stderr.flush()
    os._exit(0)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:  # it died before we asked
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
