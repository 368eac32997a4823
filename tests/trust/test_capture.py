"""Reading and replacing activations without leaving a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.trust.explain import capture, last_map, patch


def cnn(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def test_values_and_gradients_are_those_of_the_split_network_also_before_an_inplace_relu() -> None:
    x = torch.randn(2, 2, 8, 8)
    plain, inplace = cnn(), cnn(inplace=True)
    a = plain[:4](x).detach().requires_grad_()
    want = torch.autograd.grad(plain[4:](a)[:, 1].sum(), a)[0]
    for model in (plain, inplace):
        with capture(model, ["3", "0"], x) as seen:
            grads = seen.gradient(seen.output[:, 1])
        assert torch.allclose(seen["3"], a)
        assert (seen["3"] < 0).any()  # not overwritten by the relu behind it
        assert torch.allclose(grads["3"], want)
        assert torch.allclose(seen.output, plain(x))
        assert grads["0"].shape == (2, 4, 8, 8)


def test_frozen_models_and_functional_nonlinearities() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu_(self.conv(x)).mean((2, 3)))

    model = Net().requires_grad_(False)
    x = torch.randn(2, 2, 5, 5)
    with capture(model, ["conv"], x) as seen:
        g = seen.gradient(seen.output[:, 0])["conv"]
    want = (model.conv(x) > 0) * model.head.weight[0].view(1, 4, 1, 1) / 9
    assert torch.allclose(g, want)
    assert last_map(model, x) == "conv"


def test_nothing_stays_on_the_model() -> None:
    model = cnn()
    with pytest.raises(ZeroDivisionError), capture(model, ["3"], torch.randn(1, 2, 8, 8)):
        _ = 1 / 0
    with patch(model, {"3": (..., 0.0)}):
        pass
    last_map(model, torch.randn(1, 2, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_patching_with_the_models_own_values_changes_nothing_and_with_others_what_it_should() -> None:
    model, x = cnn().eval(), torch.randn(3, 2, 8, 8)
    with capture(model, ["1", "3"], x, grad=False) as seen:
        pass
    with patch(model, {"1": (..., seen["1"]), "3": ((slice(None), 2), seen["3"][:, 2])}):
        assert torch.equal(model(x), seen.output)
    with patch(model, {"4": ((slice(None), [0, 5]), 0.0)}):
        got = model(x)
    cut = seen["3"].relu().mean((2, 3))
    cut[:, [0, 5]] = 0.0
    assert torch.allclose(got, model[7](cut), atol=1e-6)
    assert torch.equal(model(x), seen.output)


def test_the_last_map_is_the_last_in_execution_not_in_definition() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Conv2d(3, 3, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).mean((2, 3))

    assert last_map(Swapped(), torch.zeros(1, 2, 4, 4)) == "second"
    assert last_map(cnn(), torch.zeros(1, 2, 8, 8)) == "4"  # the pooled 1 x 1 map behind it shows no place


def test_impossible_sites_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.pair = nn.Linear(2, 2), nn.LSTM(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0]

    x = torch.randn(1, 3, 2)
    with pytest.raises(BadInput, match="no submodule 'layer9'; it has unused, pair"), capture(Odd(), ["layer9"], x):
        pass
    with pytest.raises(UnsupportedModel, match="unused"), capture(Odd(), ["unused"], x):
        pass
    with pytest.raises(UnsupportedModel, match="pair: returns tuple"), capture(Odd(), ["pair"], x):
        pass
    with pytest.raises(UnsupportedModel, match="feature maps"):
        last_map(Odd(), x)
