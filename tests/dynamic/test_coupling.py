"""Ordinary models made elastic, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neurarium.dynamic.backbones import BackboneS, VisionTransformerS
from neurarium.dynamic.coupling import make_elastic
from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.elastic import active, at, extract, full, recalibrate, slots
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import subject


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def widths(model: nn.Module) -> dict[str, int]:
    return {w.name: w.size for w in slots(model)[0]}


def proven(model: nn.Module, x: torch.Tensor, *, want: int | None = None) -> nn.Module:
    """The elastic model ``model`` runs and is cut out alike at several configs."""
    recalibrate(model, [(x, None)], [at(model, r, d) for r, d in ((0.5, 0.5), (0.3, 0), (0.8, 1))])
    for r, d in ((0.5, 0.5), (0.3, 0), (0.8, 1)):
        with active(model, at(model, r, d)), torch.no_grad():
            got = model(x)
        assert torch.equal(extract(model, at(model, r, d))(x), got)
    return model


class Net(nn.Module):
    """Residual sums, a depthwise convolution, a gate, two pools, a flatten by view."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b, self.nb = nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8)
        self.gate = nn.Linear(8, 8)
        self.c = nn.Conv2d(8, 6, 3)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = self.na(self.a(x)).relu()
        y = self.nb(self.b(self.d(x)))
        gate = torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)))
        x = nn.functional.max_pool2d(x + y, 2)
        x = nn.functional.adaptive_avg_pool2d(self.c(x), 2) + 0 * gate.sum()
        return self.out(x.view(len(x), -1))


def test_a_residual_network_has_one_width_for_what_is_summed():
    model, x = Net().eval(), torch.randn(4, 1, 10, 10)
    elastic = make_elastic(model, x)
    assert widths(elastic) == {"a": 8, "c": 6} and slots(elastic)[0][0].step == 2
    assert torch.equal(elastic(x), model(x)) and set(elastic.fixed) == {"gate", "out"} and "sum" in elastic.fixed["gate"]
    proven(elastic, x)
    assert not any(hasattr(m, "axes") for m in model.modules())  # the original is as it was


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_common_architectures(name):
    case = subject(name)
    x = case.inputs[0]
    elastic = make_elastic(case.model.eval(), x)
    assert widths(elastic) and torch.equal(elastic(x), case.model(x))
    proven(elastic, x)


def test_exits_and_transformers():
    x = torch.randn(3, 1, 28, 28)
    elastic = make_elastic(BackboneS().eval(), x)
    assert list(widths(elastic).values()) == [16, 16, 32, 48, 64]
    proven(elastic, x)
    model = VisionTransformerS(image=16, width=16, depth=3, heads=4).eval()
    elastic = make_elastic(model, x[..., :16, :16], depths=["blocks"])
    names = widths(elastic)
    assert names["blocks.0.attention"] == 4 and names["blocks.2.up"] == 32 and len(names) == 6 and len(slots(elastic)[1]) == 1
    assert "blocks.1.down" in elastic.fixed and "add" in elastic.fixed["blocks.1.down"]  # the learned positions keep the stream whole
    proven(elastic, x[..., :16, :16])
    ids = torch.randint(7, (2, 5))
    decoder = Decoder(7, width=16, heads=2, layers=3, context=8).eval()
    elastic = make_elastic(decoder, ids, depths=["layers"])
    assert torch.equal(elastic(ids), decoder(ids)) and len(widths(elastic)) == 6
    config = at(elastic, 0.5, 0.5)
    with active(elastic, config):
        assert torch.equal(elastic(ids), extract(elastic, config)(ids))


def test_batch_statistics_of_a_trained_network_are_those_of_all_of_it():
    model, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2)), torch.randn(20, 1, 8, 8)
    model(x)
    model.eval()
    elastic = make_elastic(model, x)
    with active(elastic, full(elastic)):
        assert torch.equal(elastic(x), model(x)) and torch.equal(elastic(x), extract(elastic, full(elastic))(x))
    with pytest.raises(BadInput, match="recalibrate"), active(elastic, at(elastic, 0.5)):
        elastic(x)


def test_skipped_blocks_share_their_width():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))), nn.Linear(8, 2)
    ).eval()
    x = torch.randn(3, 4)
    elastic = make_elastic(model, x, depths=["1"], least=0)
    assert len(widths(make_elastic(model, x))) == 4 and len(widths(elastic)) == 1
    proven(elastic, x)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).softmax(-1))


class Split(Fixed):
    def forward(self, x):
        a, b = self.first(x).chunk(2, -1)
        return self.last(torch.cat([b, a], -1))


class Raw(Fixed):
    def forward(self, x):
        return nn.functional.linear(self.first(x), self.last.weight)


class Reshapes(Fixed):
    def forward(self, x):
        h = self.first(x)
        return self.last(h.reshape(len(h), 8))


@pytest.mark.parametrize(
    ("model", "options", "name", "message"),
    [
        (Fixed(), {"only": ["first"]}, "first", "softmax"),
        (Fixed(), {}, "first", "nothing in the model"),
        (Split(), {"only": ["first"]}, "first", "chunk"),
        (Raw(), {"only": ["first"]}, "first", "linear"),
        (Reshapes(), {}, "first", "does not run with fewer"),
        (Fixed(), {"only": ["last"]}, "last", "output"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {"only": ["1"]}, "1", "makes no units"),
        (nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 9)), nn.Linear(9, 2)), {"depths": ["1"]}, "1.0", "cannot be skipped"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {"depths": ["1"]}, "1", "no nn.Sequential"),
        (nn.Linear(4, 2), {}, "", "nothing"),
    ],
)  # fmt: skip
def test_refused_by_name(model, options, name, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=message) as error:
        make_elastic(model.eval(), torch.randn(3, 4), **options)
    assert error.value.module == name
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_unknown_names():
    with pytest.raises(BadInput, match="no module 'nothing'"):
        make_elastic(Fixed(), torch.randn(3, 4), only=["nothing"])
