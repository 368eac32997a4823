"""muP beside the authors' package (mup on PyPI): the same numbers, and what each does with compiling, exporting, copying and loading.

    pytest benchmarks/learn/test_mup.py -s

Same initial weights, same data, 20 steps of Adam and of SGD in float32 and in float64, one thread. Skips without the package.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.learn.parametrize import MuAdam, MuSGD, infer_shapes, mup_
from neurarium.meter import latency

peer = pytest.importorskip("mup", reason="pip install mup")


class Network(nn.Module):
    """A convolutional network with a normalisation, a residual connection and a readout."""

    def __init__(self, width, readout=nn.Linear):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv, self.up = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3)
        self.fc, self.head = nn.Linear(2 * width, width), readout(width, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.up(x + F.relu(self.conv(x)))).mean((2, 3))
        return self.head(F.relu(self.fc(x)))


def pair(width=64, base=16, dtype=torch.float32):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, theirs = Network(width).to(dtype), Network(width, peer.MuReadout).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    bases = [Network(n, peer.MuReadout) for n in (base, base + 1)]
    peer.set_base_shapes(theirs, bases[0], delta=bases[1])
    shapes = infer_shapes(ours, Network(base))
    mup_(ours, shapes, zero_readout=False)
    return ours, theirs, shapes


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 1, 12, 12, generator=g).to(dtype), torch.arange(64) % 10


def train(model, optimizer, x, y, steps=20):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["float32", "float64"])
@pytest.mark.parametrize("family", ["adam", "sgd"])
def test_same_numbers(family, dtype, within):
    ours, theirs, shapes = pair(dtype=dtype)
    x, y = batch(dtype)
    settings = {"lr": 1e-3 if family == "adam" else 1e-2, "weight_decay": 1e-3}
    make = {"adam": (MuAdam, peer.MuAdam), "sgd": (MuSGD, peer.MuSGD)}[family]
    start = [p.detach().clone() for p in ours.parameters()]
    train(ours, make[0](ours, shapes, **settings), x, y)
    train(theirs, make[1](theirs.parameters(), **settings), x, y)
    distance = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), theirs.parameters()))
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), start))
    print(f"\n{family} in {dtype}: weights moved by up to {moved:.2g}; furthest from the package's {distance:.1e}")
    assert distance <= within < moved


def outcome(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    return "works"


def test_what_each_can_do():
    ours, theirs, shapes = pair()
    x, _ = batch()
    want = ours(x)
    torch.testing.assert_close(want, theirs(x))
    base = Network(16, peer.MuReadout)

    def same(model):
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)

    found = {
        "torch.compile, whole graph": (
            lambda: same(torch.compile(ours, backend="aot_eager", fullgraph=True)),
            lambda: same(torch.compile(theirs, backend="aot_eager", fullgraph=True)),
        ),
        "torch.export": (lambda: same(torch.export.export(ours, (x,)).module()), lambda: same(torch.export.export(theirs, (x,)).module())),
        "parametrise twice": (lambda: same(mup_(ours, shapes)), lambda: same(peer.set_base_shapes(theirs, base))),
        "deep copy, then an optimizer": (
            lambda: MuAdam(copy.deepcopy(ours), shapes),
            lambda: peer.MuAdam(copy.deepcopy(theirs).parameters(), lr=1),
        ),
        "functional_call with other tensors": (
            lambda: torch.func.functional_call(ours, {n: p.detach().clone() for n, p in ours.named_parameters()}, (x,)),
            lambda: torch.func.functional_call(theirs, {n: p.detach().clone() for n, p in theirs.named_parameters()}, (x,)),
        ),
        "a number as base": (lambda: infer_shapes(Network(64), 4), lambda: peer.set_base_shapes(Network(64, peer.MuReadout), 4)),
    }  # fmt: skip
    print()
    for what, (mine, other) in found.items():
        results = outcome(mine), outcome(other)
        print(f"{what:36} ours: {results[0]:8} package: {results[1]}")
        assert results[0] == "works", what


def test_time_of_a_step():
    ours, theirs, shapes = pair()
    x, y = batch()
    optimizers = MuAdam(ours, shapes), peer.MuAdam(theirs.parameters(), lr=1e-3)
    found = latency({
        "ours": lambda: train(ours, optimizers[0], x, y, 1), "package": lambda: train(theirs, optimizers[1], x, y, 1)
    }, repeats=20)  # fmt: skip
    print("\none training step: " + ", ".join(f"{name} {1e3 * t.median:.1f} ms" for name, t in found.items()))
    assert found["ours"].low <= 1.2 * found["package"].low
