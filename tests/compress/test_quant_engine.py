"""Grids round to their nearest level, integer rescaling equals Python's integers bit for bit, packed codes take the bytes they say."""

from __future__ import annotations

import copy
import io
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neurarium.compress import affine_grid, dyadic, fixed_codes, fixed_point, pack, pack_layer, packed_bytes, symmetric_grid, unpack
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import stored_bytes


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_symmetric_grid_takes_the_nearest_level(bits: int, axis: int | None) -> None:
    w = _rand(5, 7) * torch.arange(1.0, 6)[:, None]
    grid = symmetric_grid(w, bits, axis=axis)
    top = 2 ** (bits - 1) - 1
    assert (grid.bits, grid.low, grid.high) == (bits, -top, top)
    largest = w.abs().amax() if axis is None else w.abs().amax(1 - axis)
    torch.testing.assert_close(grid.scale * top, largest)
    scale = grid.scale if axis is None else grid.scale.unsqueeze(1 - axis)
    levels = scale[..., None] * torch.arange(-top, top + 1)
    nearest = (w[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((grid(w) - w).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert torch.equal(grid(grid(w)), grid(w))
    assert torch.equal(grid.values(grid.codes(w)), grid(w))
    assert grid.codes(w).dtype == torch.int8
    torch.testing.assert_close(grid(-w), -grid(w))


def test_affine_grids_keep_zero_exact_and_span_the_range() -> None:
    for low, high in ((-0.3, 2.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)):
        grid = affine_grid(low, high, 8)
        assert grid(torch.zeros(1)).item() == 0
        x = torch.linspace(min(low, 0), max(high, 0), 1001)
        assert (grid(x) - x).abs().max() <= grid.scale * 0.5001 + (grid.scale if low < 0 < high else 0)
        assert int(grid.codes(x).min()) >= 0
    per = affine_grid(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), 4, axis=1)
    assert per(torch.tensor([[5.0, 5.0]]))[0, 1] == 4.0
    relu = symmetric_grid(torch.rand(50, generator=torch.Generator().manual_seed(0)), 4, unsigned=True)
    assert (relu.low, relu.high, relu.bits) == (0, 15, 4)


def test_straight_through_gradients_are_those_of_a_learned_step() -> None:
    x = torch.tensor([-9.0, -1.2, 0.3, 1.6, 2.0, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    grid = symmetric_grid(torch.ones(1), 4).with_scale(scale)
    grad_x, grad_s = torch.autograd.grad(grid(x).sum(), (x, scale))
    assert grad_x.tolist() == [0, 1, 1, 1, 1, 0]
    q = x.detach() / 0.5
    v = torch.where(q.abs() > 7, q.sign() * 7, torch.round(q) - q)
    torch.testing.assert_close(grad_s, v.sum())


def test_zero_channels_and_integer_weights_are_exact() -> None:
    w = torch.tensor([[0.0, 0.0], [7.0, -3.0]])
    grid = symmetric_grid(w, 4, axis=0)
    assert torch.equal(grid(w), w)
    assert grid.scale.tolist() == [1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), st.floats(1e-14, 1e9))
def test_rescaling_is_bit_exact_against_python_integers(acc: list[int], scale: float) -> None:
    factor = dyadic(scale)
    m, e = int(factor.multiplier), int(factor.shift)
    if scale >= 2.0**-31:
        assert 2**30 <= m <= 2**31
        assert abs(Fraction(m, 2**e) - Fraction(scale)) / Fraction(scale) <= Fraction(1, 2**31)
    assert abs(Fraction(m, 2**e) - Fraction(scale)) <= max(Fraction(1, 2**63), Fraction(scale) / 2**31)
    y = factor.rescale(torch.tensor(acc))
    assert y.tolist() == [(a * m + (1 << (e - 1))) >> e for a in acc]
    assert y.tolist() == [int((Fraction(a * m, 2**e) + Fraction(1, 2)).__floor__()) for a in acc]
    assert factor.rescale(torch.tensor(acc), low=-8, high=7).tolist() == [max(-8, min(7, v)) for v in y.tolist()]


def test_rescaling_by_channel_takes_integers_alone() -> None:
    scale = torch.tensor([0.5, 0.001, 3.0])
    acc = torch.randint(-(10**6), 10**6, (4, 3, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    together = dyadic(scale).rescale(acc, axis=1)
    for i, s in enumerate(scale):
        assert torch.equal(together[:, i], dyadic(s).rescale(acc[:, i]))
    assert dyadic(0.5).rescale(torch.tensor([-3, -1, 1, 3])).tolist() == [-1, 0, 1, 2]  # halves go up
    with pytest.raises(BadInput, match="takes integers"):
        dyadic(0.5).rescale(torch.ones(2))
    for bad in (0.0, -1.0, 2.0**30, float("nan")):
        with pytest.raises(BadInput, match="scale must"):
            dyadic(bad)


def test_fixed_point_formats() -> None:
    x = torch.linspace(-20, 20, 4001)
    for word, frac in ((8, 4), (4, 0), (6, 6), (16, 8)):
        q = fixed_point(x, word, frac, rounding="nearest")
        assert torch.equal(q * 2**frac, torch.round(q * 2**frac))
        low, high = -(2.0 ** (word - frac - 1)), 2.0 ** (word - frac - 1) - 2.0**-frac
        assert (q >= low).all() and (q <= high).all()
        inside = (x >= low) & (x <= high)
        assert (q - x)[inside].abs().max() <= 2.0 ** -(frac + 1) + 1e-6
        assert torch.equal(fixed_codes(x, word, frac).float() * 2.0**-frac, q)
    value = torch.full((100_000,), 0.3)
    drawn = fixed_point(value, 8, 2, generator=torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.25, 0.5}
    assert abs(drawn.mean() - 0.3) < 4 * 0.1 / 100_000**0.5  # the standard deviation is 0.25 sqrt(0.2 * 0.8) = 0.1
    assert torch.equal(fixed_point(x, 32, 20, rounding="nearest"), torch.round(x.double() * 2**20).div(2**20).float())
    leaf = torch.tensor([0.3, 100.123], requires_grad=True)
    clipped = fixed_point(leaf, 8, 4)
    assert clipped[1] == 7.9375
    clipped.sum().backward()
    assert leaf.grad.tolist() == [1, 1]
    with pytest.raises(BadInput, match="format"):
        fixed_point(x, 33, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 17), st.integers(0, 70), st.booleans(), st.integers(0, 10**6))
def test_packing_is_a_bijection_of_true_size(bits: int, count: int, signed: bool, seed: int) -> None:
    offset = 2 ** (bits - 1) if signed else 0
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)) - offset
    packed = pack(codes, bits, signed=signed)
    assert packed.dtype == torch.uint8
    assert stored_bytes([packed]) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count, signed=signed), codes)
    stream = sum(int(c) + offset << i * bits for i, c in enumerate(codes)) if bits <= 8 else None
    if stream is not None:  # codes back to back, lowest bit first
        assert bytes(packed.tolist()) == stream.to_bytes(len(packed), "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_layers_compute_and_save_what_their_codes_say(bits: int) -> None:
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(13, 6), _rand(3, 13)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect", bias=False), _rand(2, 4, 7, 7)),
    ):
        grid = symmetric_grid(layer.weight, bits, axis=0)
        packed = pack_layer(layer, grid)
        plain = copy.deepcopy(layer)
        plain.weight.data = grid(layer.weight).detach()
        torch.testing.assert_close(packed(x), plain(x))
        assert torch.equal(packed.unpacked()(x), packed(x))
        bias = 0 if layer.bias is None else 24
        assert stored_bytes(packed) == packed_bytes(layer.weight.numel(), bits) + 4 * (2**bits - 1) + 4 * 6 + bias
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), packed(x))
        assert torch.equal(copy.deepcopy(packed)(x), packed(x))
        again = pack_layer(packed.unpacked(), grid)
        assert torch.equal(again.codes, packed.codes)


def test_codebooks_and_what_does_not_fit() -> None:
    layer = nn.Linear(4, 3)
    codes = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(0))
    codes[0, 0] = 4
    table = torch.tensor([0.0, -1.0, 0.25, 2.0, 3.0])
    packed = pack_layer(layer, codes, table=table)
    assert packed.bits == 3
    assert torch.equal(packed.weight, table[codes])
    packed.table = nn.Parameter(packed.table)
    packed(torch.ones(1, 4)).sum().backward()
    torch.testing.assert_close(packed.table.grad, torch.bincount(codes.flatten(), minlength=5).float())
    shifted = pack_layer(layer, affine_grid(layer.weight.min().item(), layer.weight.max().item(), 4))
    assert (shifted.weight - layer.weight).abs().max() <= shifted.scale * 0.51
    with pytest.raises(BadInput, match="do not fit"):
        pack(torch.tensor([4]), 2)
    with pytest.raises(BadInput, match="longer table"):
        pack_layer(layer, codes, table=table[:4])
    with pytest.raises(BadInput, match="codes are"):
        pack_layer(layer, codes.T, table=table)
    with pytest.raises(UnsupportedModel, match="packed"):
        pack_layer(nn.ReLU(), codes, table=table)
    with pytest.raises(BadInput, match="finite"):
        symmetric_grid(torch.tensor([float("nan")]), 4)
    with pytest.raises(BadInput, match="bytes of uint8"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 4)


def test_a_pickled_packed_convolution_holds_no_weight() -> None:
    """The sizes of the pickled codes, table and bias, and nothing of the size of the weight, not even without data."""
    import pickle

    layer = pack_layer(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), symmetric_grid(torch.ones(1), 4))
    assert not list(layer._frame[0].parameters())
    x = _rand(2, 16, 5, 5)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    torch.testing.assert_close(layer.unpacked()(x), layer(x))
