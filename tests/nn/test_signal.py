"""Gains against closed forms."""

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.nn.hypercomplex import PHConv2d
from neurarium.nn.signal import gain_, signal_report


def test_gains_of_scaled_isometries():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False))
    for layer, scale in ((model[0], 3.0), (model[2], 0.5)):
        nn.init.orthogonal_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(scale)
    report = signal_report(model, torch.randn(5000, 8))
    first, relu, last = report.layers
    assert (first.gain, last.gain) == (pytest.approx(3, rel=1e-4), pytest.approx(0.5, rel=1e-4))
    assert (first.backward_gain, last.backward_gain) == (pytest.approx(3, rel=1e-4), pytest.approx(0.5, rel=1e-4))
    assert relu.gain == pytest.approx(0.5**0.5, rel=0.05)
    assert report.gain == pytest.approx(first.gain * relu.gain * last.gain, rel=1e-6)
    assert "ReLU" in report.describe()


def test_dead_features_and_reading_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        model[1].bias.fill_(-0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(64, 4)
    rng = torch.get_rng_state()
    report = signal_report(model, x)
    assert report.layers[2].dead == 0.75
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(BadInput, match="empty"):
        signal_report(model, torch.randn(0, 4))


@pytest.mark.parametrize(
    "layer", [nn.Linear(200, 300), nn.Conv2d(32, 16, 3, padding=1), PHConv2d(32, 16, 3, 4, padding=1)], ids=lambda m: type(m).__name__
)
def test_gain_is_set(layer):
    x = torch.randn(16, *((200,) if isinstance(layer, nn.Linear) else (32, 24, 24)))
    gain_(layer, 0.7)
    y = layer(x) - layer(torch.zeros_like(x))
    assert (y.square().mean() / x.square().mean()).sqrt().item() == pytest.approx(0.7, rel=0.06)
    gain_(layer, 1.3, x)
    y = layer(x) - layer(torch.zeros_like(x))
    assert (y.square().mean() / x.square().mean()).sqrt().item() == pytest.approx(1.3, rel=1e-4)


def test_gain_refusals():
    with pytest.raises(UnsupportedModel, match="BatchNorm"):
        gain_(nn.BatchNorm2d(3))
    with pytest.raises(UnsupportedModel):
        gain_(nn.ConvTranspose2d(3, 3, 2))
    with pytest.raises(BadInput, match="nothing to rescale"):
        gain_(nn.utils.skip_init(nn.Linear, 2, 2).apply(lambda m: nn.init.zeros_(m.weight)))
