"""Bits by value: limits of lambda and z, the quantiser, operations by hand, real bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.codes import Coded, Grid
from neurarium.dynamic.exits import EarlyExit, with_exits
from neurarium.dynamic.live import trace_memory
from neurarium.dynamic.mobile import Block, MobileConfig, mobile_net
from neurarium.dynamic.patch import patch_inference
from neurarium.dynamic.patch_quant import bit_scores, entropy, outlier_tiles, quantmcu, usual_values
from neurarium.dynamic.quantised import CodedChain, QuantisedModel, Statistics, operations, outlier_share, quantise
from neurarium.errors import BadInput, UnsupportedModel


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model = mobile_net(MobileConfig(8, (Block(1, 8), Block(3, 8), Block(3, 12, 2), Block(3, 12)), 0, 4))
    images = torch.randn(24, 3, 24, 24)
    for _ in range(20):  # BatchNorm statistics
        model(images)
    return patch_inference(model.eval(), images, patches=(2, 3), split="3"), images


@pytest.fixture(scope="module")
def statistics(task):
    return Statistics.collect(*task)


def mixture(patched, images) -> QuantisedModel:
    """Random bits."""
    shape = quantise(patched, images, 8).bits.shape
    return quantise(patched, images, 2 ** torch.randint(1, 4, shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_quantiser(bits):
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    grid = Grid.of(x.min(), x.max(), bits)
    step = grid.scale
    # 0 is on the grid, which may shift its ends by half a step
    assert (grid(x) - x).abs().max() <= step * (1 if bits == 1 else 0.5) + step / 2 * (1 - (bits > 1)) + 1e-9 + step / 2
    inner = x.clamp(grid.values(torch.tensor(0.0)), grid.values(torch.tensor(2.0**bits - 1)))
    assert (grid(inner) - inner).abs().max() <= step / 2 + 1e-12
    assert torch.equal(grid(grid(x)), grid(x)) and grid(torch.zeros(1)).item() == 0
    coded = Coded(torch.empty(Coded.size(x.numel(), bits), dtype=torch.uint8), tuple(x.shape), grid)
    coded.write(x)
    assert len(coded.buffer) == math.ceil(105 * bits / 8) and torch.equal(coded.read(), grid(x))


def test_entropy_falls_with_the_bits(task, statistics):
    lost = -bit_scores(task[0], statistics, 1.0, (8, 4, 2, 1))
    assert (lost[0] == 0).all() and (lost.diff(dim=0) >= 0).all() and (lost[-1].sum(1) <= 1).all()
    counts = torch.tensor([1, 1, 2, 0])
    assert entropy(counts) == pytest.approx(1.5)
    x = torch.randn(10_000)
    for b in (4, 2, 1):
        assert entropy(torch.bincount(Grid.of(x.min(), x.max(), b).codes(x).long())) <= b


def test_limits_of_lambda_and_of_outliers(task):
    patched, images = task
    free = float("inf")
    assert (quantmcu(patched, images, lam=1.0, outlier_z=free).bits == 8).all()
    assert (quantmcu(patched, images, lam=0.0, outlier_z=free).bits == 2).all()
    share = [outlier_share(patched, images, usual_values(images, z)) for z in (0.0, free, 2.0)]
    assert share[0].min() == 1 and share[1].max() == 0
    assert all(outlier_tiles(patched, images, 2.0)) and not any(outlier_tiles(patched, images, 6.0))
    none = quantmcu(patched, images, lam=0.0, outlier_z=0.0)
    with torch.no_grad():
        assert (none.bits == 8).all() and torch.equal(none(images), quantise(patched, images, 8)(images))
    assert share[2].mean(1).tolist() == pytest.approx([0.0455] * 6, abs=0.01)  # they are Gaussian


def test_a_tile_with_outliers_keeps_eight_bits(task):
    patched, images = task
    spiky = images.clamp(-2.5, 2.5)
    spiky[:, :, 3, 3] = 9.0  # in the first tile alone
    bits = quantmcu(patched, spiky, lam=0.0, outlier_z=3.0).bits
    assert (bits[0] == 8).all() and (bits[-1] == 2).all()


def test_few_bits_where_work_outweighs_information(task, statistics):
    """Work and entropy as shares of the branch: at lambda 1/2 the sign of their difference decides between 8 and 2 bits, by brute force."""
    patched, images = task
    table = quantmcu(patched, images, bits=(8, 2), outlier_z=float("inf")).bits
    work = torch.tensor(operations(patched)).double()
    for t in range(len(work)):
        coarse = [statistics.histogram[t, i].view(256, -1).sum(1) for i in range(work.shape[1])]
        before, after = [entropy(c) for c in coarse], []
        for i, counts in enumerate(statistics.histogram[t]):
            low, high = statistics.low[t, i], statistics.high[t, i]
            centres = low + (high - low) * (torch.arange(len(counts)) + 0.5) / len(counts)
            codes = Grid.of(statistics.inner_low[t, i], statistics.inner_high[t, i], 2).codes(centres)
            after.append(entropy(torch.stack([counts[codes == k].sum() for k in range(4)])))
        for i in range(work.shape[1]):
            few = 0.75 * work[t, i] / work[t].sum() > (before[i] - after[i]) / sum(before)
            assert table[t, i] == (2 if few else 8)
    assert {2, 8} == set(table.flatten().tolist())


def spots(images, loud):
    """A bright spot in the first tile of these images."""
    images = images.clamp(-2.5, 2.5)
    images[loud, :, 3:5, 3:5] = 12.0
    return images


def test_outliers_are_told_apart_while_it_runs(task):
    patched, images = task
    loud = torch.arange(24) < 4
    images = spots(images, loud)
    model = quantmcu(patched, images, lam=0.0, dynamic=True)
    quiet, full = quantise(patched, images, model.bits), quantise(patched, images, 8)
    assert (model.bits == 2).all()
    with torch.no_grad():
        out = model(images)
        for k in (0, 10):  # alone as in a batch
            torch.testing.assert_close(model(images[k : k + 1]), out[k : k + 1])
        everywhere = images.clone()
        everywhere[..., ::2, ::2] = 12.0
        assert torch.equal(model(everywhere), full(everywhere))
        assert trace_memory(model, everywhere[:1]).peak == model.plan().peak == full.plan().peak
        assert trace_memory(model, images[-1:]).peak == quiet.plan().peak
        want = patched(images)
        assert (out - want)[~loud].square().mean() < (quiet(images) - want)[~loud].square().mean()  # spots widen no range
    torch.testing.assert_close(model(images), out, rtol=1e-4, atol=1e-5)  # rounded floats
    macs = torch.tensor(operations(patched))
    reached = [(s[patched.graph.source][0][0] < 5, s[patched.graph.source][1][0] < 5) for s in patched.tiles().values()]  # by halos too
    spotted, without = torch.tensor([all(r) for r in reached]), quantise(patched, images[~loud], model.bits)
    torch.testing.assert_close(model.high[spotted], without.high[spotted])  # of the images without outliers there
    torch.testing.assert_close(model.low[spotted], without.low[spotted])
    assert model.counted(images)[~loud].unique().tolist() == [model.stage_bitops] == [16 * int(macs.sum())]
    assert model.counted(images)[loud].unique().tolist() == [model.stage_bitops + 48 * int(macs[[all(r) for r in reached]].sum())]
    assert quiet.counted(images).unique().tolist() == [quiet.stage_bitops]
    assert model(images[:0]).shape == out[:0].shape
    with pytest.raises(BadInput, match="cannot be met"):
        quantmcu(patched, images, dynamic=True, limit_bytes=0.8 * full.plan().patch_peak)


def test_operations_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 5))
    images = torch.randn(4, 2, 6, 6)
    patched = patch_inference(model.eval(), images, patches=(1, 2), split=2)
    model = quantise(patched, images, torch.tensor([[4, 2], [8, 4]]))
    tile = 6 * 3
    first, second = tile * 3 * 2 * 9, tile * 4 * 3
    assert model.maps[0] == patched.graph.source and model.stage_bitops == 8 * (4 * first + 2 * second + 8 * first + 4 * second)
    assert model.bitops == model.stage_bitops + 64 * 4 * 36 * 5


def test_codes_take_the_bytes_that_are_planned(task):
    patched, images = task
    for table in (8, 4, 2):
        model = quantise(patched, images, table)
        with torch.no_grad():
            assert trace_memory(model, images[:1]).peak == model.plan().peak
    mixed = mixture(patched, images)
    with torch.no_grad():
        assert trace_memory(mixed, images[:1]).peak == mixed.plan().peak
    assert quantise(patched, images, 8).plan().peak <= patched.plan().peak  # the last map goes right into the output
    wide = mobile_net(MobileConfig(8, (Block(1, 8), Block(3, 24, 2), Block(6, 24)), 0, 4)).eval()
    for dynamic in (False, True):  # nothing of the stage lives on behind it
        model = quantmcu(patch_inference(wide, images, patches=(2, 2), split="1"), images, dynamic=dynamic, outlier_z=6.0)
        with torch.no_grad():
            assert model.plan().worst.tile is None and trace_memory(model, images[:1]).peak == model.plan().peak


def test_codes_and_rounded_floats_are_the_same_function(task):
    patched, images = task
    mixed = mixture(patched, images)
    rounded = mixed(images)
    with torch.no_grad():
        torch.testing.assert_close(mixed(images), rounded, rtol=1e-4, atol=1e-5)


def test_eight_bits_are_close_and_tiles_fit_together(task):
    patched, images = task
    whole = quantise(patch_inference(patched.model, images, patches=(1, 1), split="3"), images, 8)
    tiled = quantise(patched, images, 8)
    with torch.no_grad():
        want = patched(images)
        spread = want.std()
        assert (tiled(images) - want).abs().mean() < 0.1 * spread
        assert (tiled(images) - whole(images)).abs().mean() < 0.1 * spread
        assert (quantise(patched, images, 2)(images) - want).abs().mean() > (tiled(images) - want).abs().mean()


def test_limits_on_memory(task):
    patched, images = task
    eight = quantise(patched, images, 8).plan().patch_peak
    small = quantmcu(patched, images, lam=1.0, outlier_z=float("inf"), limit_bytes=0.8 * eight)
    assert small.plan().patch_peak <= 0.8 * eight and 8 in small.bits
    with torch.no_grad():
        assert trace_memory(small, images[:1]).peak == small.plan().peak
    with pytest.raises(BadInput, match="cannot be met"):
        quantmcu(patched, images, limit_bytes=10)
    with pytest.raises(BadInput, match="cannot be met"):
        quantmcu(patched, images, outlier_z=0.0, limit_bytes=0.8 * eight)


def test_unusable_settings_are_refused(task):
    patched, images = task
    with pytest.raises(UnsupportedModel, match="tiles"):
        quantmcu(patch_inference(patched.model, images, split=0), images)
    for call in (
        lambda: quantmcu(patched, images[:0]),
        lambda: quantmcu(patched, images[:, :2]),
        lambda: quantmcu(patched, images * float("nan")),
        lambda: quantmcu(patched, images, lam=1.5),
        lambda: quantmcu(patched, images, outlier_z=-1.0),
        lambda: quantmcu(patched, images, outlier_z=float("nan")),
        lambda: quantmcu(patched, images, bits=(4, 2)),
        lambda: quantmcu(patched, images, bits=(8, 3)),
        lambda: quantise(patched, images, torch.full((2, 2), 8)),
        lambda: quantise(patched, images, 8)(images[..., :20, :20]),
    ):
        with pytest.raises(BadInput):
            call()
    assert isinstance(quantise(patched, images, 8), QuantisedModel)


def test_exits_on_codes_are_charged_exactly(task):
    patched, images = task
    chain = with_exits(patched.model, images[:2], cuts=["2"])
    first = quantise(patch_inference(chain.segments[0], images, patches=(2, 2), split="2"), images, 8)
    middle = chain.segments[0](images).detach()
    rest = patch_inference(chain.segments[1], middle, patches=(1, 1), split=2)
    coded = EarlyExit(CodedChain([first, quantise(rest, middle, 8)], chain.heads), threshold=0.3).eval()
    plain = EarlyExit(chain, threshold=0.3).eval()
    coded.costs(images), plain.costs(images)  # measured once, before anything is counted
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            outcome = coded.decide(images)
        assert counter.get_total_flops() == int(outcome.cost.sum()) and 0 < outcome.choice.sum() < len(images)
        assert torch.equal(coded.decide(images[:7]).choice, outcome.choice[:7])
        assert torch.equal(coded.decide(images, mode="masked").choice, outcome.choice)
        assert (outcome.choice == plain.decide(images).choice).double().mean() > 0.8
        state, _ = coded.staged.stage(0, coded.staged.start(images[:1]))
        assert state.dtype == torch.uint8 and state.shape[1:] == middle.shape[1:]
        longest = trace_memory(lambda x: coded.decide(x, threshold=2.0), images[:1]).peak
        floats = trace_memory(lambda x: plain.decide(x, threshold=2.0), images[:1]).peak
        assert longest < floats / 4
    with pytest.raises(BadInput):
        CodedChain([first], chain.heads)
