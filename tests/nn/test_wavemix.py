"""Wavelet mixing: the published sizes, the block's symmetries, the rule in a user's model."""

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput
from neurarium.nn.replace import replace_layers
from neurarium.nn.signal import signal_report
from neurarium.nn.wavelet import dwt2
from neurarium.nn.wavemix import WaveBlock, WaveMix, WaveMixLite, wave_mixing


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_small_networks_have_exactly_the_published_parameters():
    assert count(WaveMixLite(1, 10, depth=10, channels=8, upsample="bilinear")) == 3_566
    assert count(WaveMixLite(3, 10, depth=7, channels=32, upsample="bilinear")) == 37_058
    assert count(WaveMixLite(1, 10, depth=5, channels=8)) == 7_156
    assert count(WaveMixLite(3, 10, depth=6, channels=64)) == 520_106


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_parameter_count_in_closed_form(levels):
    c, m = 16, 2
    expected = c * c // 4 + c // 4
    for level in range(1, levels + 1):
        inner, out = c if level == levels else c + c // 2, c if level == 1 else c // 2
        expected += inner * m * c + m * c + m * c * out + out + 16 * out * out + out + 2 * out
    assert count(WaveBlock(c, levels=levels)) == expected


def by_hand(block, x):
    """The block from its definition, with dwt2."""
    r = block.reduce(x)
    details = dwt2(r, levels=block.levels)[1]
    h = None
    for level in range(block.levels, 0, -1):
        ll = dwt2(r, levels=level)[0]
        lh, hl, hh = details[level - 1]
        z = torch.cat([ll, *(torch.stack([lh[:, c], hl[:, c], hh[:, c]], 1) for c in range(r.shape[1]))], 1)
        h = block.mix[level - 1](z if h is None else torch.cat([z, h], 1))
    return x + h


@pytest.mark.parametrize("upsample", ["deconv", "bilinear"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_block_is_its_definition(levels, upsample):
    block = WaveBlock(8, levels=levels, upsample=upsample).eval()
    x = torch.randn(2, 8, 16, 24)
    torch.testing.assert_close(block(x), by_hand(block, x), atol=1e-5, rtol=1e-5)


def test_block_is_the_identity_when_the_norms_weight_is_zero():
    block, x = WaveBlock(8, levels=2), torch.randn(2, 8, 9, 13)
    nn.init.zeros_(block.mix[0][-1].weight)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("levels", [1, 2])
def test_shifts_by_the_coarsest_cell_commute_and_by_one_pixel_do_not(levels):
    block, x = WaveBlock(8, levels=levels, upsample="deconv").eval(), torch.randn(1, 8, 32, 32)
    inner = slice(12, 20)
    for shift, same in ((2**levels, True), (1, False)):
        moved = block(x.roll((shift, shift), (2, 3))).roll((-shift, -shift), (2, 3))
        assert torch.allclose(moved[..., inner, inner], block(x)[..., inner, inner], atol=1e-5) == same


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("upsample", ["deconv", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_ten_blocks_keep_the_signal(levels, upsample, train):
    torch.manual_seed(0)
    stack = nn.Sequential(*[m for _ in range(10) for m in (WaveBlock(16, levels=levels, upsample=upsample), nn.ReLU())]).train(train)
    x = torch.randn(8, 16, 16, 16)
    assert 0.3 < (stack(x).square().mean() / x.square().mean()).sqrt() < 3
    assert 0.3 < signal_report(stack, x).layers[-1].output_rms < 3


@pytest.mark.parametrize("head", ["classify", "segment", "restore"])
@pytest.mark.parametrize("stem", ["patch", "strided", "plain"])
def test_heads_and_stems_at_any_size(stem, head):
    net = WaveMix(3, 5, depth=1, channels=16, levels=2, stem=stem, head=head)
    out = net(torch.randn(2, 3, 30, 33))
    assert out.shape == ((2, 5) if head == "classify" else (2, 5, 30, 33))
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_rule_in_a_users_model():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 16, 1), nn.Conv2d(16, 10, 3, padding="same"), nn.Conv2d(10, 12, 3, padding=2, dilation=2),
    )  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    new = replace_layers(model, wave_mixing(levels=2), example=x)
    report = new.replace_report
    assert [r.name for r in report.replaced] == ["0", "2", "7"]
    assert {s.name: s.why.split(",")[0] for s in report.skipped} == {
        "4": "stride (2", "6": "its 10 outputs are no multiple of 4"
    }  # fmt: skip
    assert isinstance(new[2], WaveBlock) and isinstance(new[0][1], WaveBlock)
    new(x).sum().backward()
    with pytest.raises(BadInput, match="no weights of a WaveBlock"):
        wave_mixing(init="fit")


def test_bad_sizes_are_refused():
    for make in (lambda: WaveBlock(6), lambda: WaveBlock(8, levels=0), lambda: WaveBlock(8, upsample="nearest"),
                 lambda: WaveBlock(8, upsample="bilinear", ff_channels=4), lambda: WaveMix(3, 10, 1, 16, 1, 3, head="segment"),
                 lambda: WaveMix(3, 10, stem="conv")):  # fmt: skip
        with pytest.raises(BadInput):
            make()
    with pytest.raises(BadInput, match="8, height"):
        WaveBlock(8)(torch.zeros(1, 4, 8, 8))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    net, x = nn.Sequential(WaveBlock(4), WaveBlock(4, levels=2, upsample="bilinear")).eval(), torch.randn(2, 4, 6, 9)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(out), net(x).detach(), atol=1e-6, rtol=1e-5)
