"""One training step (forward and backward) of this room's layers beside the ordinary layer, and beside hypll and geoopt.

    pytest benchmarks/nn -s

Same inputs and incoming gradients, one thread, float32, the steps measured in turn; gradients reach the input as well. Printed are
medians; the limits are on the 10 % quantiles, which a disturbance meets less. Peers that are absent are left out, by name. The Poincaré
layers come last, since tensors of hypll that are still alive cannot be looked at by ``saved_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.meter import latency, saved_bytes
from neurarium.nn import KernelLinear, PHConv2d, PHLinear, PLinear, PoincareBall, WaveBlock

REPEATS = 30


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def step(fn: Callable[[Tensor], Tensor], x: Tensor, params: list[nn.Parameter] | None = None) -> Callable[[], None]:
    """Forward and backward, to the parameters and to the input."""
    x = x.detach().clone().requires_grad_()
    leaves = [x, *(fn.parameters() if isinstance(fn, nn.Module) else params or [])]
    gradient = torch.randn_like(fn(x).detach())

    def run() -> None:
        torch.autograd.grad(fn(x), leaves, gradient)

    return run


def ratios(title: str, steps: dict[str, Callable[[], None]], to: str) -> dict[str, float]:
    """Times all, prints one row, returns the 10 % quantiles relative to those of ``to``."""
    found = latency(steps, repeats=REPEATS)
    cells = (f"{name} {1e3 * t.median:.2f} ms ({t.median / found[to].median:.2f})" for name, t in found.items())
    print(f"\n{title}: " + ", ".join(cells))
    return {name: t.low / found[to].low for name, t in found.items()}


@pytest.mark.parametrize(("batch", "channels", "side"), [(64, 32, 28), (32, 64, 16), (64, 128, 8)])
def test_hypercomplex_convolution(batch, channels, side):
    x = torch.randn(batch, channels, side, side)
    layers = {"dense": nn.Conv2d(channels, channels, 3, padding=1)}
    layers |= {f"n = {n}": PHConv2d(channels, channels, 3, n, padding=1) for n in (2, 4, 8)}
    title = f"3x3 convolution, {batch} of {channels}x{side}x{side}"
    found = ratios(title, {name: step(layer, x) for name, layer in layers.items()}, "dense")
    assert max(found.values()) <= 1.25


@pytest.mark.parametrize(("rows", "size"), [(256, 512), (1024, 256)])
def test_hypercomplex_linear(rows, size):
    layers = {"dense": nn.Linear(size, size), "n = 4": PHLinear(size, size, 4)}
    found = ratios(f"linear, {rows} of {size}", {n: step(layer, torch.randn(rows, size)) for n, layer in layers.items()}, "dense")
    assert found["n = 4"] <= 1.25


@pytest.mark.parametrize(("rows", "d", "m"), [(256, 1024, 256), (256, 512, 64), (1024, 256, 32)])
def test_kernel_layer(rows, d, m):
    """Both with a ReLU behind them; m features cost 2 m/d of a square dense layer's multiply-adds."""
    x = torch.randn(rows, d)
    layers = {"dense": nn.Sequential(nn.Linear(d, d), nn.ReLU()), "kernel": nn.Sequential(KernelLinear(d, d, "relu", m), nn.ReLU())}
    found = ratios(f"kernel layer, {rows} of {d}, m = {m}", {name: step(layer, x) for name, layer in layers.items()}, "dense")
    kept = {name: saved_bytes(layer, x) for name, layer in layers.items()}
    print(f"  kept for the backward pass: {kept['kernel'] / kept['dense']:.2f} of dense; multiply-adds: {2 * m / d:.2f}")
    assert found["kernel"] < 1


class Dense(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.second(functional.gelu(self.norm1(self.first(x)))))


@pytest.mark.parametrize(("batch", "channels", "side"), [(32, 32, 28), (32, 64, 16)])
def test_wave_block(batch, channels, side):
    x = torch.randn(batch, channels, side, side)
    blocks = {"dense": Dense(channels), "wave, bilinear": WaveBlock(channels, dropout=0.0, upsample="bilinear")}
    blocks["wave, transposed convolution"] = WaveBlock(channels, dropout=0.0)
    found = ratios(f"block, {batch} of {channels}x{side}x{side}", {name: step(block, x) for name, block in blocks.items()}, "dense")
    kept = {name: saved_bytes(block, x) for name, block in blocks.items()}
    cells = (f"{name} {size / 2**20:.1f} MiB ({size / kept['dense']:.2f})" for name, size in kept.items())
    print("  kept for the backward pass: " + ", ".join(cells))
    assert max(size for name, size in kept.items() if name != "dense") < kept["dense"]
    assert found["wave, bilinear"] < 1


@pytest.mark.parametrize(("rows", "inner", "out"), [(256, 512, 512), (1024, 128, 128), (4096, 64, 64)])
def test_poincare_linear(rows, inner, out):
    """hypll's layer has our weights and must give our outputs; geoopt has no layer, so the classical one is built from its operations.

    The hand-written backward pass is there for what it does not keep; ``plain backward`` shows what that costs in time.
    """
    ball = PoincareBall(0.5)
    x = ball.expmap0(0.5 * torch.randn(rows, inner) / inner**0.5)
    flat, ours, plain = nn.Linear(inner, out), PLinear(inner, out, ball), PLinear(inner, out, PoincareBall(0.5, exact=False))
    for layer in (ours, plain):
        nn.init.normal_(layer.weight, std=inner**-0.5)
    steps = {"flat": step(flat, x), "ours": step(ours, x), "ours, plain backward": step(plain, x)}
    absent = []
    try:
        import hypll.nn as hn
        from hypll.manifolds.poincare_ball import Curvature
        from hypll.manifolds.poincare_ball import PoincareBall as Theirs
        from hypll.tensors import ManifoldTensor
    except ImportError:
        absent.append("hypll")
    else:
        theirs = Theirs(Curvature(0.5, constraining_strategy=lambda t: t))
        other = hn.HLinear(inner, out, theirs)
        other.z.tensor.data, other.bias.data = ours.weight.data.T.clone(), ours.bias.data.clone()

        def forward(x: Tensor) -> Tensor:
            return other(ManifoldTensor(x, manifold=theirs)).tensor

        torch.testing.assert_close(forward(x), ours(x), rtol=1e-3, atol=1e-4)
        steps["hypll"] = step(forward, x, [other.z.tensor, other.bias])
    try:
        import geoopt
    except ImportError:
        absent.append("geoopt")
    else:
        manifold = geoopt.PoincareBall(0.5)
        weight, bias = nn.Parameter(torch.randn(out, inner) / inner**0.5), nn.Parameter(torch.zeros(out))
        steps["geoopt, Möbius"] = step(
            lambda x: manifold.mobius_add(manifold.mobius_matvec(weight, x), manifold.expmap0(bias)), x, [weight, bias]
        )
    found = ratios(f"Poincaré linear, {rows} of {inner} to {out}" + "".join(f" ({name} is absent)" for name in absent), steps, "flat")
    if inner >= 512:  # narrower layers are pointwise work in the main, and compiling them does not help
        assert found["ours"] <= 4
    assert found["ours"] <= min([found[name] for name in ("hypll", "geoopt, Möbius") if name in found], default=torch.inf)
