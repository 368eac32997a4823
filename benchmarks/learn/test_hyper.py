"""A batch of conditions through hypernetworks: one vmap call here, a loop over weight sets in hypnettorch and hyperlight.

    pytest benchmarks/learn/test_hyper.py -s

The same generating network (parameters copied), the same target, the same images: 32 images for each of n conditions, forward and
backward. That outputs agree is checked before anything is timed. One thread, steps measured in turn.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.learn.hyper import HyperNetwork, mip
from neurarium.meter import latency

CONDITIONS = (4, 16, 64)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copy_linears(ours, weights, biases):
    with torch.no_grad():
        for layer, w, b in zip((m for m in ours.trunk if isinstance(m, nn.Linear)), weights, biases):
            layer.weight.copy_(w), layer.bias.copy_(b)
        ours.heads[0].weight.copy_(weights[-1])


def measured(name, ours, theirs, conditions):
    for mine, other in zip(ours(), theirs()):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    found = latency(
        {"ours": lambda: ours()[0].square().mean().backward(), "theirs": lambda: theirs()[0].square().mean().backward()}, repeats=15
    )
    ratio = found["theirs"].median / found["ours"].median
    ours_ms, theirs_ms = 1e3 * found["ours"].median, 1e3 * found["theirs"].median
    print(f"{name:>12}, {conditions:>2} conditions: loop {theirs_ms:8.2f} ms, one call {ours_ms:8.2f} ms, ratio {ratio:.2f}")
    return ratio


def test_against_hypnettorch():
    pytest.importorskip("hypnettorch")
    from hypnettorch.hnets import HMLP
    from hypnettorch.mnets import MLP

    print()
    ratios = []
    for n in CONDITIONS:
        torch.manual_seed(0)
        main = MLP(n_in=64, n_out=10, hidden_layers=(32,), no_weights=True, verbose=False)
        peer = HMLP(main.param_shapes, uncond_in_size=2, cond_in_size=0, layers=(16, 64), num_cond_embs=0, verbose=False)
        target = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        hyper = HyperNetwork(target, 2, hidden=(16, 64), activation=nn.ReLU)
        assert [list(s) for s in hyper.target.shapes.values()] == main.param_shapes
        copy_linears(hyper, peer.layer_weight_tensors, peer.layer_bias_vectors)
        hyper.base.data.copy_(peer.layer_bias_vectors[-1])
        c, x = torch.rand(n, 2), torch.randn(n, 32, 64)

        def loop(peer=peer, main=main, c=c, x=x):
            sets = peer(uncond_input=c) if len(c) > 1 else [peer(uncond_input=c)]
            return (torch.stack([main(images, weights=w) for images, w in zip(x, sets)]),)

        ratios.append(measured("hypnettorch", lambda hyper=hyper, c=c, x=x: (hyper.groups(c, x),), loop, n))
    assert ratios[-1] > 1.5


def test_against_hyperlight():
    hyperlight = pytest.importorskip("hyperlight")
    print()
    ratios = []
    for n in CONDITIONS:
        torch.manual_seed(0)
        target = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        hyper = mip(target, 2, hidden=(16, 64))
        peer = hyperlight.HyperNet({"c": (2,)}, hyper.target.shapes, [16, 64])
        theirs = [m for m in peer.backbone if isinstance(m, nn.Linear)]
        copy_linears(hyper, [m.weight for m in theirs], [m.bias for m in theirs])
        hyper.base.data.copy_(theirs[-1].bias)
        main = hyperlight.hypernetize(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), parameters=None)
        main = hyperlight.hypernetize(main, modules=[main[0], main[2]])
        c, x = torch.rand(n, 2), torch.randn(n, 32, 64)

        def loop(peer=peer, main=main, c=c, x=x):
            sets, outputs = peer(c=c), []
            for i, images in enumerate(x):
                with main.using_externals({name: w[i] for name, w in sets.items()}):
                    outputs.append(main(images))
            return (torch.stack(outputs),)

        ratios.append(measured("hyperlight", lambda hyper=hyper, c=c, x=x: (hyper.groups(c, x),), loop, n))
    assert ratios[-1] > 1.5


def test_convolutions_too():
    """A convolutional target: the loop is ours as well, so that only the batching differs (grouped convolutions on a processor)."""
    print()
    target = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(), nn.Flatten())
    for n in CONDITIONS[:2]:
        torch.manual_seed(0)
        hyper = mip(target, 1, hidden=(16, 64))
        c, x = torch.rand(n, 1), torch.randn(n, 32, 1, 14, 14)
        loop = lambda hyper=hyper, c=c, x=x: (torch.stack([hyper(a, b) for a, b in zip(c, x)]),)  # noqa: E731
        measured("convolutions", lambda hyper=hyper, c=c, x=x: (hyper.groups(c, x),), loop, n)
        assert F.mse_loss(hyper.groups(c, x), loop()[0]) < 1e-8
