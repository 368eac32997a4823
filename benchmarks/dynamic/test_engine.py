"""The compacting engine beside the ways in which early exits are run, and every policy's clock beside its FLOPs.

pytest benchmarks/dynamic/test_engine.py -s
"""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic import EarlyExit, ExitChain, split
from neurarium.dynamic.backbones import BackboneS, ElasticBackbone
from neurarium.dynamic.elastic import ElasticFamily, grid
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.tips import TIPS
from neurarium.experiments.dynamic.compile_what_decides import POLICIES
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


def tips() -> tuple[Any, Tensor]:
    x, model = pictures(), ElasticBackbone(classes=10)
    policy = TIPS(ElasticFamily(model, grid(model, (0.25, 0.5, 1.0)), x[:2]), x[:2], levels=4, per_level=2, seed=0).eval()
    policy.calibrate([(x, torch.arange(ROWS) % 10)])
    return policy, x


def sguq() -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (200,), generator=g)
    noise = 3 * torch.rand(200, 1, generator=g)
    x = tuple(F.one_hot(y, 3).float().repeat(1, 100) + noise * torch.randn(200, 300, generator=g) for _ in range(3))
    kind = importlib.import_module("neurarium.dynamic.acquisition").SGUQ
    policy = kind((300, 300, 300), 3, members=5, hidden=(128, 64), prices=(1.0, 2.0, 4.0), order=(0, 1, 2))
    policy.fit(tuple(v[:100] for v in x), y[:100], val=(tuple(v[100:] for v in x), y[100:]), epochs=(2, 2))
    return policy.eval(), tuple(v[:ROWS] for v in x)


def sn_net() -> tuple[Any, Tensor]:
    stitch = pytest.importorskip("neurarium.dynamic.stitch").stitch

    def one(width: int) -> nn.Sequential:
        blocks = [m for _ in range(3) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
        )

    x = pictures()
    policy = stitch([one(16), one(32)], x[:2]).init_stitches(x).eval()
    policy.calibrate([(x, torch.arange(ROWS) % 10)])
    return policy, x


def of_room(name: str) -> tuple[Any, Any]:
    policy, x = POLICIES[name](torch.Generator().manual_seed(0))
    if x.ndim == 4 and not isinstance(policy, FamilyPolicy):
        x = pictures()
        policy.calibrate([(x, torch.arange(ROWS) % 10)])
    elif x.ndim == 4:
        x = pictures()
    return policy, x


def larger() -> tuple[Any, Tensor]:
    """Exits on four stages of 32 to 64 channels, 64x64 pixels: 124 MFLOPs a row."""

    def stage(into: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1), nn.ReLU())

    def head(width: int) -> nn.Sequential:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

    net = ExitChain([stage(3, 32, 2), stage(32, 32, 1), stage(32, 64, 2), stage(64, 64, 1)], [head(w) for w in (32, 32, 64, 64)])
    with torch.no_grad():
        for h in net.heads:
            h[-1].weight.mul_(30)  # sure of some rows, so that they leave
    x = torch.randn(ROWS, 3, 64, 64) * torch.rand(ROWS, 1, 1, 1) * 3
    policy = EarlyExit(net).eval()
    policy.calibrate([(x, torch.arange(ROWS) % 10)])
    return policy, x


BUILDERS = {
    "exits, 124 MFLOPs": larger, **{name: partial(of_room, name) for name in POLICIES}, "tips": tips, "sguq": sguq, "sn-net": sn_net,
}  # fmt: skip


@pytest.mark.parametrize("name", list(BUILDERS))
def test_time_follows_flops(name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy, x = BUILDERS[name]()
    print(f"\n{name}, {ROWS} rows: FLOPs and time, of everything (milliseconds)")
    with torch.no_grad():
        if isinstance(policy, FamilyPolicy):
            prices, last = policy.prices(x), len(policy.configs) - 1
            chosen = sorted({round(i * last / 3) for i in range(4)})
            ways = {float(prices[c] / prices[last]): partial(policy.decide, x, config=c) for c in chosen}
            full = partial(policy.decide, x, config=last)
        else:
            table = policy.costs(x)
            budgets = [table.total[0] + s * (table.full - table.total[0]) for s in (0.15, 0.4, 0.7)]
            ways = {
                float(policy.decide(x, budget=b).cost.double().mean() / table.full): partial(policy.decide, x, budget=b) for b in budgets
            }
            full = partial(policy.decide, x, mode="masked")
        timed = latency({"full": full, **{str(f): way for f, way in ways.items()}}, repeats=25, warmup=5)
    worst = -math.inf
    for flops in ways:
        ratio = timed[str(flops)].median / timed["full"].median
        worst = max(worst, ratio - flops)
        print(f"    {flops:.2f}  {ratio:.2f}  ({1e3 * timed[str(flops)].median:.2f})")
    if timed["full"].median < 0.05:
        return  # a few milliseconds: fixed costs of a call, and what no FLOP counter sees, count as much as products
    assert worst <= 0.15, f"{name}: time exceeds the share of FLOPs by {worst:.2f}"
