"""Ten programs with data-dependent control flow, through the front end that reads source and through what torch offers.

The programs decide for one input, as they were written. A way to compile works if it makes a program at all; it is consistent if that
program then answers as the module does on 200 inputs. These are drawn at random; where none of them takes a way at a question, the first
of 4,800 further ones that does is added, so that between them they take every way (``covered``). Times are medians, compilation aside.

``split_onnx`` and ``split_export`` are :func:`neurarium.dynamic.split` with every segment on ONNX Runtime or as a ``torch.export`` program;
``compile`` is ``torch.compile`` in one graph, ``compile_breaks`` with graph breaks allowed, both with the backend that only captures, which
is enough to see whether the program is right; ``cond`` is a version written by hand with ``torch.cond``, exported.

Everything runs on one thread. With more, the threads of ONNX Runtime keep spinning after a call and slow down the module that is timed in
turn with it, so that the program looks many times as fast as it is.

``speedup``: time of the module over time of the program, one input. ``each``: time of the program on 64 inputs at once, rows parting where
they decide differently, over the time of the module on the same inputs one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from neurarium.dynamic.compile import Program, split
from neurarium.experiments.dynamic.dycl_zoo import PROGRAMS, inputs, make
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

Call = Callable[[Tensor], Tensor]
ARMS = ("split_onnx", "split_export", "export", "jit_trace", "compile", "compile_breaks", "cond")
LABELS = {
    "split_onnx": "split, ONNX Runtime", "split_export": "split, torch.export", "export": "torch.export", "jit_trace": "torch.jit.trace",
    "compile": "torch.compile, one graph", "compile_breaks": "torch.compile, graph breaks", "cond": "torch.cond by hand, exported",
}  # fmt: skip


def run(trial: Trial) -> None:
    names = trial.scale(smoke=("cascade",), laptop=tuple(PROGRAMS))
    rows, many, repeats = trial.scale(smoke=(32, 8, 2), laptop=(200, 64, 7))
    torch.set_num_threads(1)
    drawn = inputs(trial.scale(smoke=64, laptop=5000), torch.Generator().manual_seed(1000 + trial.seed))
    programs = make(names, trial.seed)
    with torch.no_grad():
        given = {name: covering(program, drawn[:rows], drawn[rows:]) for name, program in programs.items()}
        answers = {name: one_by_one(program, given[name]) for name, program in programs.items()}
    for arm in trial.arms(*ARMS):
        seen: dict[str, list[float]] = {k: [] for k in ("success", "consistent", "covered", "speedup", "each", "segments", "worst")}
        for name, program in programs.items():
            x = given[name]
            compiled = attempt(arm.name, program, x)
            seen["success"].append(float(compiled is not None))
            with torch.no_grad():
                apart = furthest(compiled, answers[name], x)
                seen["worst"].append(min(apart, 1e6))
                seen["consistent"].append(float(apart <= 1e-4))
                if not arm.name.startswith("split"):
                    continue
                if compiled is None:
                    fast, covered, parts = (1.0, math.inf), 0.0, 0
                else:
                    fast, covered, parts = times(program, compiled, x, many, repeats), coverage(compiled, x), len(compiled.segments)
            seen["speedup"].append(fast[0])
            seen["each"].append(fast[1])
            seen["covered"].append(covered)
            seen["segments"].append(parts)
        timed = {k: seen.pop(k) for k in ("speedup", "each")}
        arm.log(**{k: v for k, v in seen.items() if v})
        if arm.name.startswith("split"):
            arm.log_timed(**timed)


def one_by_one(call: Call, x: Tensor) -> Tensor:
    return torch.cat([call(row[None]) for row in x])


def attempt(arm: str, program: nn.Module, x: Tensor) -> Any:
    """The compiled program, or nothing if the compiler refuses."""
    row = x[:1]
    try:
        with torch.no_grad():
            match arm:
                case "split_onnx" | "split_export":
                    return split(program, x[:4]).compile(arm.removeprefix("split_"))
                case "export":
                    return torch.export.export(program, (row,)).module()
                case "jit_trace":
                    return torch.jit.trace(program, row, check_trace=False)
                case "cond":
                    return torch.export.export(_Cond(program), (row,)).module() if hasattr(program, "cond") else None
            torch._dynamo.reset()
            compiled = torch.compile(program, backend="eager", fullgraph=arm == "compile")
            compiled(row)
            return compiled
    except Exception:  # each compiler has its own ways to say no
        return None


class _Cond(nn.Module):
    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return self.program.cond(x)


def furthest(compiled: Call | None, answers: Tensor, x: Tensor) -> float:
    """The largest difference from the module's answers; infinite if there is no program, or it fails on an input."""
    if compiled is None:
        return math.inf
    try:
        return float((one_by_one(compiled, x) - answers).abs().max())
    except Exception:
        return math.inf


def covering(program: nn.Module, x: Tensor, more: Tensor) -> Tensor:
    """``x``, and for a way at a question that none of its rows takes the first row of ``more`` that does."""
    found = split(program, x[:4])
    found.host.taken = taken = set()
    one_by_one(found, x)
    rows = [x]
    for row in more.split(1):
        if len(taken) == ways(found):
            break
        before = len(taken)
        found(row)
        if len(taken) > before:
            rows.append(row)
    return torch.cat(rows)


def coverage(compiled: Program, x: Tensor) -> float:
    """The share of ways out of questions that some input takes."""
    compiled.host.taken = taken = set()
    one_by_one(compiled, x)
    compiled.host.taken = None
    return len(taken) / ways(compiled)


def ways(program: Program) -> int:
    return 2 * sum(node["do"] == "ask" for node in program.host.plan["nodes"])


def times(program: nn.Module, compiled: Program, x: Tensor, many: int, repeats: int) -> tuple[float, float]:
    """Speed-up on one input, over inputs that take different ways; and time on many inputs over the module's loop."""
    few = x[: 2 * repeats]
    single = latency({"module": partial(one_by_one, program, few), "split": partial(one_by_one, compiled, few)}, repeats=repeats, warmup=2)
    batch = x[:many]
    both = latency({"module": partial(one_by_one, program, batch), "split": partial(compiled, batch)}, repeats=repeats, warmup=1)
    return single["module"].median / single["split"].median, both["split"].median / both["module"].median


def figure(record: RecordView, fig: Figure) -> None:
    """Which programs survive which compiler, and how fast they are."""
    fig.set_size_inches(12, 5.2)
    table, bars = fig.subplots(1, 2, width_ratios=(1.25, 1))
    arms = [a for a in ARMS if a in record.arms]
    consistent = np.array([record.values(a, "consistent").mean(0) for a in arms])
    success = np.array([record.values(a, "success").mean(0) for a in arms])
    names = list(PROGRAMS) if consistent.shape[1] == len(PROGRAMS) else ["cascade"]
    state = np.where(consistent > 0.99, 2, np.where(success > 0, 1, 0))
    from matplotlib.colors import ListedColormap

    table.imshow(state, cmap=ListedColormap(["#d9d9d9", "#d55e00", "#009e73"]), vmin=0, vmax=2, aspect="auto")
    for i, j in np.ndindex(*state.shape):
        table.text(
            j, i, ("no", "wrong", "same")[state[i, j]], ha="center", va="center", fontsize=8, color="white" if state[i, j] else "black"
        )
    table.set_xticks(range(len(names)), names, rotation=35, ha="right")
    table.set_yticks(range(len(arms)), [LABELS[a] for a in arms])
    table.set_title("Does it compile, and is it the same on 200 inputs?")
    where = np.arange(len(names))
    for i, (arm, colour) in enumerate((("split_onnx", "#0072b2"), ("split_export", "#e69f00"))):
        if arm in record.arms:
            values = record.values(arm, "speedup")
            bars.barh(where + 0.38 * (i - 0.5), values.mean(0), 0.36, xerr=values.std(0), color=colour, label=LABELS[arm], capsize=2)
    bars.axvline(1, color="black", lw=0.8)
    bars.set_yticks(where, names)
    bars.invert_yaxis()
    bars.set(xlabel="times as fast as the module, one input", title="Speed at batch 1")
    bars.legend(fontsize=8)
    fig.tight_layout()
