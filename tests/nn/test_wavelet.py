"""Wavelet transforms against PyWavelets, their inverse, Parseval's identity and their own adjoint."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.nn.wavelet import MODES, HaarDWT2d, HaarIDWT2d, dwt1, dwt2, idwt1, idwt2, wavelet_filters

ALL = ["haar", *(f"db{p}" for p in range(1, 11)), "sym2", "sym3", "sym4"]


@pytest.mark.parametrize("name", ALL)
def test_filters_are_orthonormal_with_vanishing_moments_and_pywts(name):
    h, g = wavelet_filters(name, torch.float64)
    taps = len(h)
    for shift in range(0, taps, 2):
        assert (h[shift:] @ h[: taps - shift]).item() == pytest.approx(float(shift == 0), abs=1e-9)
    assert (h @ g).item() == pytest.approx(0, abs=1e-12)
    for power in range(taps // 2):  # details of a polynomial vanish
        moment = (g * (torch.arange(taps, dtype=torch.float64) / taps) ** power).sum()
        assert moment.item() == pytest.approx(0, abs=1e-5)
    pywt = pytest.importorskip("pywt")
    np.testing.assert_allclose(h, pywt.Wavelet(name).dec_lo, atol=1e-9)
    np.testing.assert_allclose(g, pywt.Wavelet(name).dec_hi, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # pywt finds two levels too many for small images
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["haar", "db2", "sym4"])
def test_transform_is_pywts_and_has_an_inverse_at_every_size(name, mode):
    pywt = pytest.importorskip("pywt")
    for size in (*range(2, 12), 15, 16, 17, 32, 33):
        x = torch.randn(size, 35 - size, dtype=torch.float64)
        for levels in (1, 2):
            coarse, details = dwt2(x, name, levels, mode)
            try:
                expected = pywt.wavedec2(x.numpy(), name, mode=mode, level=levels)
            except ValueError:  # nothing to reflect in an axis of length 1
                continue
            np.testing.assert_allclose(coarse, expected[0], atol=1e-9)
            for ours, theirs in zip(reversed(details), expected[1:]):
                for a, b in zip(ours, theirs):
                    np.testing.assert_allclose(a, b, atol=1e-9)
            torch.testing.assert_close(idwt2(coarse, details, name, mode, x.shape), x, atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_signals(mode):
    pywt = pytest.importorskip("pywt")
    for n in (7, 16, 31):
        x = torch.randn(3, n, dtype=torch.float64)
        coarse, details = dwt1(x, "db3", 2, mode)
        expected = pywt.wavedec(x.numpy(), "db3", mode=mode, level=2) if n > 7 else None
        for ours, theirs in zip([coarse, *reversed(details)], expected or []):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)
        torch.testing.assert_close(idwt1(coarse, details, "db3", mode, n), x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db3", "sym4"])
def test_energy_is_kept_and_the_gradient_is_the_inverse(name):
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    coarse, details = dwt2(x, name, 2, "periodization")
    parts = [coarse, *(band for bands in details for band in bands)]
    assert sum(p.square().sum() for p in parts).item() == pytest.approx(x.square().sum().item(), rel=1e-9)
    cotangents = [torch.randn_like(p) for p in parts]
    (gradient,) = torch.autograd.grad(parts, x, cotangents)
    again = idwt2(cotangents[0], [tuple(cotangents[1:4]), tuple(cotangents[4:])], name, "periodization")
    torch.testing.assert_close(gradient, again)


def test_second_derivatives_and_vmap():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: dwt2(x, "db2", 1, "symmetric")[0], x)
    rows = torch.randn(3, 8, 8)
    torch.testing.assert_close(torch.func.vmap(lambda r: dwt2(r, "db2")[0])(rows), dwt2(rows, "db2")[0])


def test_bands_see_what_their_names_say():
    coarse, [(lh, hl, hh)] = dwt2(torch.ones(6, 8))
    assert torch.equal(coarse, torch.full((3, 4), 2.0).to(coarse)) or torch.allclose(coarse, torch.full((3, 4), 2.0))
    assert max(band.abs().max() for band in (lh, hl, hh)) < 1e-6  # a constant has no details
    stripes = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(8, 8)  # horizontal edges
    _, [(lh, hl, hh)] = dwt2(stripes)
    assert lh.abs().min() > 1 and hl.abs().max() < 1e-6 and hh.abs().max() < 1e-6


def test_the_fast_haar_is_the_filter_bank():
    x = torch.randn(2, 3, 8, 10)
    coarse, [details] = dwt2(x)
    bands = HaarDWT2d()(x)
    torch.testing.assert_close(bands, torch.cat([coarse, *details], 1))
    torch.testing.assert_close(HaarIDWT2d()(bands), x)
    with pytest.raises(BadInput, match="even"):
        HaarDWT2d()(x[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    coarse, [(_, _, hh)] = dwt2(F.pad(torch.randn(4, 4), (1, 1)).to(dtype), "db2")
    assert coarse.dtype == hh.dtype == dtype


def test_bad_input_is_refused():
    x = torch.randn(4, 4)
    for bad in ({"wavelet": "db11"}, {"wavelet": "sym1"}, {"wavelet": "coif1"}, {"mode": "constant"}, {"levels": 0}):
        with pytest.raises(BadInput):
            dwt2(x, **bad)
    with pytest.raises(BadInput, match="floating"):
        dwt2(torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(BadInput, match="axes"):
        dwt2(torch.zeros(4, 0))
