"""Trainable gates: the saw-tooth's limits, gradients against activation gates, costs and strips against the graph."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import meter
from neurarium.compress import GPT, Gate, Gated, GateLoss, add_gates, saw_gate, strip_gates, trainable_gate
from neurarium.compress.prune.gate import SHAPES
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.experiments.compress.zoo import Residual


def network(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Residual(6, 6, 1), Residual(6, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias, 0, 0.3), nn.init.normal_(m.running_mean, 0, 0.3)
    return model.eval(), [(torch.randn(8, 2, 8, 8), torch.arange(8) % 3) for _ in range(3)]


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("teeth", [1e2, 1e5])
def test_the_saw_tooth_is_a_step_with_the_derivative_of_the_shape(shape: str, teeth: float) -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    step, slope = (w > 0).double(), SHAPES[shape](w).detach()
    value = saw_gate(w, shape, teeth)
    assert float((value - step).abs().max().detach()) <= float(slope.max()) / teeth * (1 + 1e-9)
    (found,) = torch.autograd.grad(value.sum(), w)
    assert float((found - slope).abs().max()) <= 1 / teeth  # the shapes' own slopes are below 1
    gate = Gate(1000, shape=shape)
    gate.weight.data = w.detach().float()
    (limit,) = torch.autograd.grad(gate().sum(), gate.weight)
    torch.testing.assert_close(limit, slope.float())
    assert set(gate().unique().tolist()) <= {0.0, 1.0}


def test_gates_are_trained_by_any_gradient_method() -> None:
    alone = Gate(2)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.2)
    for _ in range(20):  # y = b x with target 0 for the first, 3 for the second
        optimizer.zero_grad()
        (alone() * 3 - torch.tensor([0.0, 3.0])).square().sum().backward()
        optimizer.step()
    assert alone().tolist() == [0.0, 1.0]
    three = Gate(3, shape="constant")
    with torch.no_grad():
        three.weight += torch.tensor([0.0, 0.05, 0.1])
    optimizer = torch.optim.SGD(three.parameters(), lr=0.02)
    for _ in range(200):
        if float(three().detach().sum()) == 2:
            break
        optimizer.zero_grad()
        (three().sum() - 2).abs().backward()
        optimizer.step()
    assert three().tolist() == [0.0, 1.0, 1.0]


def test_a_group_is_never_empty() -> None:
    gate = Gate(4, init=-1.0)
    with torch.no_grad():
        gate.weight[2] = -0.5
    assert gate().tolist() == [0, 0, 1, 0]
    assert torch.autograd.grad(gate().sum(), gate.weight)[0].abs().min() > 0


@pytest.mark.parametrize("coupled", ["inner", "sum"])
def test_stripping_keeps_the_function_and_the_cost(coupled: str) -> None:
    model, data = network()
    x = data[0][0]
    gated = add_gates(model, example=x[:2], coupled=coupled).eval()
    assert len(gated.gates) == (3 if coupled == "inner" else 5)  # a residual stream has one gate a channel
    with torch.no_grad():
        torch.testing.assert_close(gated(x), model(x))
        torch.manual_seed(3)
        for gate in gated.gates:
            gate.weight.normal_()
        small = strip_gates(gated)
        torch.testing.assert_close(small(x), gated(x), atol=1e-6, rtol=1e-6)
    for what, measured in (("macs", meter.macs(small, x[:2])), ("params", meter.parameters(small))):
        assert measured == getattr(small.plan.cost_after, what)
        assert float(gated.cost(what).detach()) == pytest.approx(measured / getattr(small.plan.cost_before, what), abs=1e-6)
    assert type(small[3].body[0]) is nn.Conv2d


def test_a_gates_gradient_is_that_of_a_factor_on_the_activation_even_when_closed() -> None:
    model, ((x, y), *_) = network()
    gated = add_gates(model, example=x[:2], shape="constant", units="neurons").eval()
    with torch.no_grad():
        gated.gates[0].weight[1] = -0.5
    (found,) = torch.autograd.grad(F.cross_entropy(gated(x), y), gated.gates[0].weight)
    factor = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], requires_grad=True)
    handle = model[8].register_forward_hook(lambda m, a, out: out * factor)
    (want,) = torch.autograd.grad(F.cross_entropy(model(x), y), factor)
    handle.remove()
    torch.testing.assert_close(found, want)
    assert float(want[1].abs()) > 0


def test_the_loss_counts_cost_and_flips() -> None:
    model, ((x, y), *_) = network()
    gated = add_gates(model, example=x[:2], units="neurons").eval()
    loss = GateLoss(gated, target=0.5, cost="params", weight=3.0)
    out = gated(x)
    ratio = gated.cost("params")
    torch.testing.assert_close(loss(out, y), F.cross_entropy(out, y) + 3 * (ratio - 0.5).abs().float())
    for value in (-1.0, 0.5, 0.5, -1.0):
        with torch.no_grad():
            gated.gates[0].weight[2] = value
        loss(out, y)
    assert loss.flips.tolist() == [0, 0, 3, 0, 0, 0]
    assert [n for (n,) in loss.opened] == [6, 5, 6, 6, 5]
    with torch.no_grad():
        loss(out, y)
    assert len(loss.opened) == 5


def test_training_ends_at_the_target_and_leaves_the_input_alone() -> None:
    model, data = network()
    before = copy.deepcopy(model.state_dict())
    seen: list[Gated] = []
    small = trainable_gate(model, data, target=0.6, epochs=6, tol=0.05, watch=lambda gated, _: seen.append(gated))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert abs(meter.macs(small, data[0][0][:2]) / meter.macs(model, data[0][0][:2]) - 0.6) < 0.1
    assert not any(isinstance(m, (Gate, Gated)) for m in small.modules())
    assert not torch.equal(small[9].weight, model[9].weight[:, small.plan.kept["7"]])
    assert any(int((gate.weight <= 0).sum()) for gate in seen[0].gates)


def test_the_optimizers_weight_decay_does_not_close_gates() -> None:
    model, data = network()
    weights: list[Tensor] = []
    trainable_gate(
        model, data, target=1.0, epochs=2, finetune=0, shape=torch.zeros_like, init=0.5,
        optimizer=partial(torch.optim.SGD, weight_decay=0.5),
        watch=lambda gated, _: weights.extend(gate.weight.detach().clone() for gate in gated.gates),
    )  # fmt: skip
    assert weights and all(torch.equal(w, torch.full_like(w, 0.5)) for w in weights)  # no gradient reached them either


def test_heads_and_neurons_of_a_transformer() -> None:
    torch.manual_seed(0)
    model, ids = GPT(11, width=12, heads=3, layers=2, context=8).eval(), torch.randint(0, 11, (2, 8))
    gated = add_gates(model, example=ids).eval()
    assert len(gated.gates) == 4
    with torch.no_grad():
        gated.gates[0].weight[1] = -1
        gated.gates[1].weight[:20] = -1
    small = strip_gates(gated)
    assert small.blocks[0].attention.num_heads == 2
    torch.testing.assert_close(small(ids), gated(ids), atol=1e-6, rtol=1e-5)


def test_bad_input_is_refused() -> None:
    model, data = network()
    before = copy.deepcopy(model.state_dict())
    x, y = data[0]
    for options, match in (
        ({"target": 0.01}, "cannot be met"), ({"target": 0.0}, "target"), ({"cost": "joules"}, "cost"), ({"shape": "step"}, "shape"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            trainable_gate(model, data, **options)
    for bad, match in (([], "empty"), ([(x * float("nan"), y)], "not finite")):
        with pytest.raises(BadInput, match=match):
            trainable_gate(model, bad)
    with pytest.raises(UnsupportedModel, match="heads"):
        add_gates(model, example=x[:2], units="heads")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
