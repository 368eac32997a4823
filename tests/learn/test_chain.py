"""A chain is the model, or it is refused by the name of the module that breaks it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import as_chain


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + F.relu(self.conv(x))


class Own(nn.Module):
    """Children in order of use, one of them a list."""

    def __init__(self, skip=False, functional=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stages = nn.ModuleList([Residual(4), Residual(4)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(16, 10)
        self.skip, self.functional = skip, functional

    def forward(self, x):
        x = first = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            if self.skip:
                x = x + first
        x = self.pool(x)
        return self.head(F.gelu(x) if self.functional else x)


IMAGES = torch.rand(3, 1, 8, 8)


def test_blocks_start_at_weights_and_take_what_follows_along():
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU()),
        nn.Linear(6, 10),
    )
    chain = as_chain(model, IMAGES)
    assert chain.names == (("0", "1", "2", "3", "4"), ("5.0", "5.1"), ("6",))
    assert chain.widths == (8, 6, 10)
    assert chain.head is model[6]
    assert len(chain.hidden) == 2
    assert model.training
    model.eval()
    assert torch.equal(chain.forward(IMAGES)[-1], model(IMAGES))


def test_residual_blocks_are_whole_and_detach_cuts_the_graph():
    model = Own().eval()
    chain = as_chain(model, IMAGES)
    assert chain.names == (("stem.0", "stem.1", "stem.2"), ("stages.0",), ("stages.1", "pool.0", "pool.1"), ("head",))
    assert chain.widths == (4, 4, 16, 10)
    outputs = chain.forward(IMAGES)
    outputs[-1].sum().backward()
    assert model.head.weight.grad is not None
    assert model.stages[0].conv.weight.grad is None
    chain.forward(IMAGES, detach=False)[-1].sum().backward()
    assert model.stages[0].conv.weight.grad is not None
    assert len(chain.forward(IMAGES, upto=2)) == 2


def test_what_is_no_chain_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"^stages\.1:"):
        as_chain(Own(skip=True), IMAGES)
    with pytest.raises(UnsupportedModel, match=r"^head:"):
        as_chain(Own(functional=True), IMAGES)
    with pytest.raises(UnsupportedModel, match=r"^stages\.1: what the model does after"):
        as_chain(Own(), IMAGES, blocks=["stem", "stages.0", "stages.1"])
    with pytest.raises(BadInput, match="'nose'"):
        as_chain(Own(), IMAGES, blocks=["nose"])
    shared = nn.Linear(8, 8)
    with pytest.raises(UnsupportedModel, match="shares weights"):
        as_chain(nn.Sequential(nn.Linear(64, 8), shared, nn.ReLU(), shared), torch.rand(2, 64))
    with pytest.raises(BadInput, match="example"):
        as_chain(Own(), IMAGES[:0])


def test_explicit_groups():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    chain = as_chain(model, torch.rand(2, 4), blocks=[["0", "1", "2", "3"], "4"])
    assert len(chain.blocks) == 2
    assert chain.head is model[4]


def test_blocks_attribute():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    assert as_chain(Body(), torch.rand(2, 4)).names == (("blocks.0",), ("blocks.1",))


def test_a_transformer_encoder_is_a_chain_of_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Flatten(), nn.Linear(40, 2))
    chain = as_chain(model, torch.rand(2, 5, 3))
    assert chain.widths == (8, 40, 2)
    assert chain.names[1] == ("1", "2")
