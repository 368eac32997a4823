"""What replacement must not break: the input model, sharing, ties, hooks, devices and modes."""

import pytest
import torch
from torch import nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.nn.replace import Rule, replace_layers


class Scaled(nn.Module):
    """A stand-in layer: a linear map with one extra parameter."""

    def __init__(self, old):
        super().__init__()
        self.linear, self.scale = nn.Linear(old.in_features, old.out_features), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.linear(x)

    def fit_(self, old, inputs):
        self.linear.load_state_dict(old.state_dict())
        self.seen = inputs


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_replaces_in_a_copy_and_reports():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = replace_layers(model, Rule(nn.Linear, Scaled))
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(out[0]) is type(out[2]) is Scaled
    assert out[0].linear.weight.data_ptr() != model[0].weight.data_ptr()
    assert [(r.name, r.before, r.after) for r in out.replace_report.replaced] == [("0", 20, 21), ("2", 10, 11)]
    assert "2 layers replaced: 30 -> 32" in out.replace_report.describe()
    assert replace_layers(model, Rule(nn.Linear, Scaled), copy=False) is model
    assert type(model[0]) is Scaled


def test_fit_gets_the_old_layer_and_its_inputs():
    model, x = net(), torch.randn(3, 4)
    out = replace_layers(model, Rule(nn.Linear, Scaled, init="fit"), example=x)
    torch.testing.assert_close(out(x), model(x))
    assert torch.equal(out[0].seen, x)
    torch.testing.assert_close(out[2].seen, model[1](model[0](x)))
    assert not model[0]._forward_pre_hooks


def test_shared_modules_stay_shared_and_tied_weights_stay():
    shared = nn.Linear(4, 4)
    out = replace_layers(nn.Sequential(shared, nn.ReLU(), shared), Rule(nn.Linear, Scaled))
    assert out[0] is out[2]
    assert len(out.replace_report.replaced) == 1
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    out = replace_layers(tied, Rule(nn.Linear, Scaled))
    assert out[1].weight is out[0].weight
    assert "tied" in out.replace_report.skipped[0].why


def test_what_cannot_be_replaced_is_kept_with_the_reason():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    model[1].register_forward_hook(lambda *_: None)

    def picky(old):
        if old.out_features % 2:
            raise BadInput("odd")
        return Scaled(old)

    report = replace_layers(model, Rule(nn.Linear, picky)).replace_report
    assert not report.replaced
    for skipped, word in zip(report.skipped, ["derives", "hooks", "parametrised", "odd"], strict=True):
        assert word in skipped.why


def test_keep_root_nesting_mode_dtype_and_freezing():
    model = nn.Sequential(net(), nn.Linear(2, 2)).double().eval()
    model[1].requires_grad_(False)
    out = replace_layers(model, Rule(nn.Linear, Scaled), keep=["0.2", model[0][0]])
    assert type(out[0][0]) is type(out[0][2]) is nn.Linear
    assert out[1].scale.dtype == torch.float64
    assert not out[1].scale.requires_grad
    assert not out[1].training
    assert type(replace_layers(nn.Linear(2, 2), Rule(nn.Linear, Scaled))) is Scaled
    blocks = [Rule(lambda name, m: isinstance(m, nn.Sequential) and name == "0", lambda old: nn.Identity()), Rule(nn.Linear, Scaled)]
    assert [r.name for r in replace_layers(model, blocks).replace_report.replaced] == ["0", "1"]
    with pytest.raises(BadInput, match="nothere"):
        replace_layers(model, Rule(nn.Linear, Scaled), keep=["nothere"])


def test_first_match_and_wrong_results_on_the_example():
    out = replace_layers(net(), Rule(nn.Linear, Scaled, build_first=lambda old: nn.Identity()))
    assert type(out[0]) is nn.Identity
    assert type(out[2]) is Scaled
    with pytest.raises(UnsupportedModel, match="gives"):
        replace_layers(net(), Rule(nn.Linear, lambda old: nn.Linear(old.in_features, 4)), example=torch.randn(1, 4))
    with pytest.raises(UnsupportedModel, match="fails on the example"):
        replace_layers(net(), Rule(nn.Linear, lambda old: nn.Linear(9, 4)), example=torch.randn(1, 4))
    report = replace_layers(net(), Rule(nn.Linear, lambda old: nn.Identity(), init="fit")).replace_report
    assert "no fit_" in report.skipped[0].why


def test_a_kept_first_match_stays_the_first():
    rule = Rule(nn.Linear, Scaled, build_first=lambda old: nn.Identity())
    out = replace_layers(net(), rule, keep=["0"])
    assert type(out[0]) is nn.Linear
    assert type(out[2]) is Scaled
    second = Rule(nn.Linear, Scaled, build_first=lambda old: nn.Identity(), first=lambda name, m: m.out_features == 2)
    out = replace_layers(net(), second)
    assert (type(out[0]), type(out[2])) == (Scaled, nn.Identity)
