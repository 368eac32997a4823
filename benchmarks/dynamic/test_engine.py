"""The compacting engine beside the ways in which early exits are run.

pytest benchmarks/dynamic/test_engine.py -s
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic import EarlyExit, split
from neurarium.dynamic.backbones import BackboneS
from neurarium.experiments.dynamic.dycl_zoo import inputs
from neurarium.meter import latency

ROWS = 64


def pictures(rows: int = ROWS) -> Tensor:
    return F.interpolate(inputs(rows, torch.Generator().manual_seed(0)), size=28)


def network() -> EarlyExit:
    """A small network whose exits, on these pictures, let out most rows early."""
    torch.manual_seed(0)
    policy = EarlyExit(BackboneS()).eval()
    for head in policy.staged.heads:
        nn.init.normal_(head[-1].weight, std=0.3)
    x = pictures(512)
    policy.calibrate([(x, torch.arange(512) % 10)])
    return policy


def naive(policy: EarlyExit, x: Tensor) -> Tensor:
    """Row after row, an ``if`` after every exit."""
    answers = []
    for row in x:
        h = row[None]
        for k, (segment, head) in enumerate(zip(policy.staged.segments, policy.staged.heads)):
            h = segment(h)
            y = head(h)
            if k == 3 or y.softmax(-1).max().item() >= policy.tau[k]:
                break
        answers.append(y)
    return torch.cat(answers)


class Cond(nn.Module):
    """The same for one row as nested ``torch.cond``, which can be exported."""

    def __init__(self, policy: EarlyExit) -> None:
        super().__init__()
        self.staged, self.tau = policy.staged, policy.tau.tolist()

    def forward(self, x: Tensor) -> Tensor:
        return self.ask(0, x)

    def ask(self, k: int, x: Tensor) -> Tensor:
        x = self.staged.segments[k](x)
        y = self.staged.heads[k](x)
        if k == 3:
            return y
        return torch.cond(y.softmax(-1).amax() >= self.tau[k], lambda x, y: y.clone(), lambda x, y: self.ask(k + 1, x), (x, y))


def everything(policy: EarlyExit, x: Tensor) -> Tensor:
    """All exits for all rows, the answers picked afterwards."""
    return policy.decide(x, mode="masked").output


def test_exits_beside_other_ways_to_run_them() -> None:
    torch.set_num_threads(1)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    policy, x = network(), pictures()
    print(f"\nmilliseconds, {ROWS} rows (one row), one thread")
    with torch.no_grad():
        for share in (0.35, 0.5, 0.75):
            policy.use(x, budget=share * policy.costs(x).full)
            cond = torch.export.export(Cond(policy), (x[:1],)).module()
            program = split(policy, x[:2])
            ways: dict[str, Callable[[Tensor], Tensor]] = {
                "mask everything": partial(everything, policy),
                "python loop": partial(naive, policy),
                "torch.cond": lambda x, cond=cond: torch.cat([cond(row[None]) for row in x]),
                "compacting": policy,
                "split, torch.export": program.compile("export"),
                "split, ONNX Runtime": program.compile("onnx"),
            }
            want = policy(x)
            for name, way in ways.items():
                torch.testing.assert_close(way(x), want, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            many = latency({name: partial(way, x) for name, way in ways.items()}, repeats=15)
            single = latency({name: partial(lambda way: [way(row[None]) for row in x[:8]], way) for name, way in ways.items()}, repeats=7)
            flops = float(policy.decide(x).cost.double().mean()) / policy.costs(x).full
            print(f"  FLOPs {flops:.2f} of everything")
            for name in ways:
                ms, to, row = 1e3 * many[name].median, many[name].median / many["mask everything"].median, 1e3 * single[name].median / 8
                print(f"    {name:22} {ms:7.2f}  {to:5.2f} of everything   ({row:.2f})")
            assert many["compacting"].median < many["python loop"].median
            assert many["compacting"].median < many["torch.cond"].median


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_generated_code() -> None:
    """torch.compile takes the segments as they are; it needs minutes to compile them."""
    torch.set_num_threads(1)
    policy, x = network(), pictures()
    with torch.no_grad():
        policy.use(x, budget=0.5 * policy.costs(x).full)
        ways = {"compacting": policy, "split, inductor": split(policy, x[:2]).compile("inductor")}
        torch.testing.assert_close(ways["split, inductor"](x), policy(x), rtol=1e-3, atol=1e-4)
        timed = latency({name: partial(way, x) for name, way in ways.items()}, repeats=15)
    print("\n" + ", ".join(f"{name} {1e3 * timed[name].median:.2f} ms" for name in ways))
