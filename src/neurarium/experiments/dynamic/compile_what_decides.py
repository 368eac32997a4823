"""Policies of this room and programs of :mod:`~neurarium.experiments.dynamic.dycl_zoo`, through every way to compile them.

Weights are random and policies are calibrated on random labels: this is about programs, not about answers. Policies decide row by row and
take whole batches; programs decide for one input, as they were written, so that "64 inputs" of a program is a loop unless the compiled form
takes them at once.

``works``: the share that becomes a program at all. ``exact_1``, ``exact_64``: the share whose program answers as the original on 20 inputs
given one by one, or on 64 in one call. ``speed_1``, ``speed_64``: time of the original over time of the program, the geometric mean over
those that are exact (0: none is). A policy under ``torch.export`` runs its masked form: right, at the price of everything. All on one
thread (see :mod:`~neurarium.experiments.dynamic.dycl`). What ``torch.compile`` makes is warm when it is timed: it has seen the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from neurarium.dynamic.backbones import BackboneS, ElasticBackbone
from neurarium.dynamic.compile import split
from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.exits import ExitChain
from neurarium.dynamic.jei import JEIDNN
from neurarium.dynamic.outcome import Policy
from neurarium.dynamic.perceiver import DistilledExit, DynPerceiver
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.sorted_llm import SortedFineTuning
from neurarium.dynamic.tree import rows, take
from neurarium.experiments.dynamic.dycl_zoo import inputs, make
from neurarium.meter import latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

ARMS = ("split_onnx", "split_export", "export", "jit_trace", "compile_breaks", "cond")
LABELS = {
    "split_onnx": "split, ONNX Runtime", "split_export": "split, torch.export", "export": "torch.export", "jit_trace": "torch.jit.trace",
    "compile_breaks": "torch.compile, graph breaks", "cond": "torch.cond by hand",
}  # fmt: skip
PROGRAMS = ("early exit", "cascade", "skipped blocks", "pondering")


def _exits(policy: Any, x: Tensor) -> Any:
    policy.eval()
    for name, p in policy.staged.named_parameters():
        if "head" in name and p.ndim == 2:
            nn.init.normal_(p, std=2 / math.sqrt(p.shape[1]))  # answers that differ from row to row
    policy.calibrate([(x, torch.arange(len(x)) % 10)])
    table = policy.costs(x)
    policy.use(x, budget=(table.total[0] + table.full) / 2)
    return policy


def _jei(draw: torch.Generator) -> tuple[nn.Module, Tensor]:
    x, network = inputs(64, draw), BackboneS()
    policy = JEIDNN(ExitChain(network.segments, network.heads))
    nn.init.normal_(policy.gate.weight)
    return _exits(policy, x), x


def _perceiver(draw: torch.Generator) -> tuple[nn.Module, Tensor]:
    def stage(a: int, b: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.ReLU())

    x = inputs(64, draw)
    stages = [stage(8, 16, 1), stage(16, 32, 2)]
    network = DynPerceiver(
        stages, (8, 16, 32), num_classes=10, stem=stage(1, 8, 2), latents=16, blocks=(1, 1), heads=(1, 2), pool=4, out_pool=2
    )
    return _exits(DistilledExit(network), x), x


def _sorted(draw: torch.Generator) -> tuple[nn.Module, Tensor]:
    x = inputs(64, draw)
    return SortedNet(ElasticBackbone(classes=10), x[:2], widths=(0.5, 1.0)).eval().use(config=0), x


def _decoder(draw: torch.Generator) -> tuple[nn.Module, Tensor]:
    ids = torch.randint(30, (64, 17), generator=draw)
    decoder = Decoder(30, width=48, heads=4, layers=4, context=32)
    nn.init.normal_(decoder.head.weight, std=0.5)
    nn.init.normal_(decoder.token.weight)
    policy = SortedFineTuning(decoder, (1, 2, 4)).eval()
    policy.calibrate([(ids[:, :-1], ids[:, 1:])])
    return policy.use(ids[:, :-1], budget=0.6 * policy.costs(ids[:, :-1]).full), ids[:, :-1]


POLICIES: dict[str, Callable[[torch.Generator], tuple[nn.Module, Tensor]]] = {
    "jei-dnn": _jei, "dyn-perceiver": _perceiver, "sortednet": _sorted, "sorted-llama": _decoder,
}  # fmt: skip


def models(seed: int, names: tuple[str, ...]) -> dict[str, tuple[nn.Module, Any]]:
    """Every policy and program, with 64 inputs."""
    made = {}
    for name in names:
        draw = torch.Generator().manual_seed(1000 + seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made[name] = POLICIES[name](draw) if name in POLICIES else (make((name,), seed)[name], inputs(64, draw))
    return made


def run(trial: Trial) -> None:
    names = trial.scale(smoke=("cascade",), laptop=(*POLICIES, *PROGRAMS))
    repeats = trial.scale(smoke=2, laptop=7)
    torch.set_num_threads(1)  # as in dycl
    tried = models(trial.seed, names)
    for arm in trial.arms(*trial.scale(smoke=ARMS[1:], laptop=ARMS)):  # the exporter to ONNX takes seconds to load; dycl loads it
        works, one, all_at_once = [], [], []
        speeds: dict[int, list[float]] = {1: [], 64: []}
        for model, x in tried.values():
            with torch.no_grad():
                compiled = attempt(arm.name, model, x)
                want, some = singly(model, x), take(x, torch.arange(20))
                right = same(partial(singly, compiled, some), want[:20]), same(partial(nothing if compiled is None else compiled, x), want)
                works.append(float(compiled is not None))
                one.append(float(right[0]))
                all_at_once.append(float(right[1]))
                together = model if isinstance(model, Policy) else partial(singly, model)
                few = take(x, torch.arange(8))
                if right[0]:
                    speeds[1].append(speed(partial(singly, model, few), partial(singly, compiled, few), repeats))
                if right[1]:
                    speeds[64].append(speed(partial(together, x), partial(compiled, x), repeats))
        arm.log(works=float(np.mean(works)), exact_1=float(np.mean(one)), exact_64=float(np.mean(all_at_once)))
        arm.log(each_works=works, each_exact_1=one, each_exact_64=all_at_once)
        arm.log_timed(**{f"speed_{n}": float(np.exp(np.mean(np.log(s)))) if s else 0.0 for n, s in speeds.items()})


def nothing(x: Any) -> Any:
    raise RuntimeError("there is no program")


def singly(call: Any, x: Any) -> Tensor:
    return torch.cat([call(take(x, torch.tensor([i]))) for i in range(rows(x))])


def same(call: Callable[[], Tensor], want: Tensor) -> bool:
    try:
        got = call()
    except Exception:  # a program that does not take the input
        return False
    return got.shape == want.shape and bool(torch.allclose(got, want, rtol=1e-3, atol=1e-4))


def speed(original: Callable[[], Any], compiled: Callable[[], Any], repeats: int) -> float:
    timings = latency({"original": original, "compiled": compiled}, repeats=repeats, warmup=2)
    return timings["original"].median / timings["compiled"].median


class _Cond(nn.Module):
    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return self.program.cond(x)


def attempt(arm: str, model: nn.Module, x: Any) -> Any:
    """The compiled model, or nothing where the compiler refuses. Policies are exported with a free batch size."""
    decides = isinstance(model, Policy)
    row, four = take(x, torch.tensor([0])), take(x, torch.arange(4))
    try:
        match arm:
            case "split_onnx" | "split_export":
                return split(model, four).compile(arm.removeprefix("split_"))
            case "export":
                free = tree_map(lambda t: {0: torch.export.Dim("n", min=1, max=4096)}, four)
                return torch.export.export(model, (four if decides else row,), dynamic_shapes=(free,) if decides else None).module()
            case "jit_trace":
                return torch.jit.trace(model, four if decides else row, check_trace=False)
            case "cond":
                return torch.export.export(_Cond(model), (row,)).module() if hasattr(model, "cond") else None
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        compiled(four if decides else row)
        return compiled
    except Exception:  # each compiler has its own ways to say no
        return None


def figure(record: RecordView, fig: Figure) -> None:
    """What works, what is right, and how fast it is."""
    fig.set_size_inches(12, 4.6)
    left, right = fig.subplots(1, 2)
    arms = [a for a in ARMS if a in record.arms]
    where = np.arange(len(arms))
    for i, (metric, label, colour) in enumerate(
        (("works", "makes a program", "#bbbbbb"), ("exact_1", "right, one by one", "#56b4e9"), ("exact_64", "right, 64 at once", "#0072b2"))
    ):
        left.barh(where + 0.27 * (i - 1), [record.mean(a, metric) for a in arms], 0.25, color=colour, label=label)
    for i, (metric, label, colour) in enumerate((("speed_1", "one by one", "#56b4e9"), ("speed_64", "64 at once", "#0072b2"))):
        values = [record.values(a, metric) for a in arms]
        right.barh(
            where + 0.36 * (i - 0.5), [v.mean() for v in values], 0.34, xerr=[v.std() for v in values], color=colour, label=label, capsize=2
        )
    right.axvline(1, color="black", lw=0.8)
    for ax in (left, right):
        ax.set_yticks(where, [LABELS[a] for a in arms])
        ax.invert_yaxis()
        ax.legend(fontsize=8, loc="lower right")
    left.set(xlabel="share of policies and programs", xlim=(0, 1.02), title="Is there a program, and is it right?")
    right.set(xlabel="times as fast as the original", title="Speed, where it is right")
    fig.tight_layout()
