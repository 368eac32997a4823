"""Elastic layers: slices are real, cut-outs are bit-equal, statistics belong to one config."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.decoder import Attention
from neurarium.dynamic.elastic import (
    Config,
    Depth,
    ElasticAttention,
    ElasticConv2d,
    ElasticFamily,
    ElasticLinear,
    ElasticNorm,
    Width,
    active,
    at,
    declare,
    extract,
    flops,
    full,
    grid,
    recalibrate,
    reorder,
    slots,
    units,
)
from neurarium.errors import BadInput, UnsupportedModel


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**options) -> ElasticBackbone:
    model = ElasticBackbone(classes=3, **{"widths": (8, 12), "strides": (2, 1), "blocks": (1, 2), "expand": 1.5, **options})
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def transformer() -> nn.Sequential:
    stream, hidden = Width("stream", 12, 1), Width("hidden", 20)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = ElasticNorm(nn.LayerNorm(12), stream), ElasticAttention(12, 4, stream=stream, causal=True)
            self.up, self.down = ElasticLinear(12, 20, inputs=stream, outputs=hidden), ElasticLinear(20, 12, inputs=hidden, outputs=stream)

        def forward(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.down(self.up(x).relu())

    return nn.Sequential(
        ElasticLinear(5, 12, outputs=stream), Depth(*(Block() for _ in range(3)), least=1),
        ElasticNorm(nn.RMSNorm(12), stream), ElasticLinear(12, 2, inputs=stream),
    ).eval()  # fmt: skip


def some(model: nn.Module) -> list[Config]:
    return [full(model), at(model, 0.5, 0.5), at(model, 0.25, 0), at(model, 0.7, 1)]


def sizes(model: nn.Module) -> int:
    """Parameters by the sizes of the slices alone."""
    blocks = [m for m in model.modules() if isinstance(m, Depth)]
    skipped = {id(p) for d in blocks for m in list(d._modules.values())[d.active :] for p in m.parameters()}
    total = 0
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in skipped:
                shape = list(p.shape)
                for dim, w in module.axes().get(name, {}).items() if hasattr(module, "axes") else ():
                    shape[dim] = shape[dim] * w.active // w.size
                total += torch.Size(shape).numel()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "shape"), [(small, (5, 1, 9, 9)), (lambda: small(norm="batch"), (5, 1, 9, 9)), (transformer, (5, 6, 5))])
def test_a_cut_out_is_the_same_network_bit_for_bit(make, shape, dtype):
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    recalibrate(model, [(torch.randn(shape, dtype=dtype), None)], some(model))
    last = None
    for config in some(model):
        with active(model, config), torch.no_grad():
            want, price, size = model(x), CostTable.measure([model], x).full, sizes(model)
        alone = extract(model, config)
        assert torch.equal(alone(x), want) and not any(hasattr(m, "axes") for m in alone.modules())
        assert sum(p.numel() for p in alone.parameters()) == size
        assert CostTable.measure([alone], x).full == price  # what is cut away is not computed
        assert last is None or not torch.equal(want, last)
        last = want
        shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert not any(p.untyped_storage().data_ptr() in shared for p in alone.parameters())


def test_gradients_outside_the_slice_are_zero_and_inside_those_of_the_cut_out():
    model, x = small(), torch.randn(4, 1, 9, 9)
    config = at(model, 0.5, 0)
    with active(model, config):
        model(x).square().sum().backward()
        alone = extract(model, config)
        alone(x).square().sum().backward()
        weight, small_weight = model.head[-1].weight.grad, alone.head[-1].weight.grad
    assert torch.allclose(weight[:, : small_weight.shape[1]], small_weight) and not weight[:, small_weight.shape[1] :].any()
    assert all(p.grad is None for p in model.stages[0][3].parameters())  # a skipped block


def test_switching_makes_no_tensor():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} ran")

    model = small()
    with Nothing(), active(model, at(model, 0.5, 0)):
        pass
    pointer = model.head[-1].weight.data_ptr()
    with active(model, at(model, 0.5)):
        assert model.head[-1].part("weight").data_ptr() == pointer


def test_settings_are_put_back_also_after_an_error():
    model = small(norm="batch")
    before = [s.active for group in slots(model) for s in group]
    with pytest.raises(ZeroDivisionError), active(model, at(model, 0.5, 0)):
        with active(model, at(model, 0.25)):
            pass
        assert slots(model)[0][0].active == 4
        raise ZeroDivisionError
    assert [s.active for group in slots(model) for s in group] == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config((8,), (1,)), "3 widths|5 widths"),
        (Config((3, 12, 12, 18, 18), (1, 2)), "'stage 0' cannot be 3"),
        (Config((8, 12, 12, 18, 20), (1, 2)), "cannot be 20"),
        (Config((8, 12, 12, 18, 18), (2, 2)), "'stage 0' cannot be 2"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, message):
    with pytest.raises(BadInput, match=message), active(small(), config):
        pass


def test_batch_statistics_belong_to_the_config():
    model, x = small(norm="batch"), 3 + torch.randn(64, 1, 9, 9)
    a, b = at(model, 1, 1), at(model, 0.5, 0)
    with pytest.raises(BadInput, match="recalibrate"), active(model, a):
        model(x)
    declare(model, [a, b])
    model.train()
    with active(model, a):
        for _ in range(60):
            model(x)
    norm = model.stages[0][1]
    assert norm.running_mean[0].abs().sum() > 0 and not norm.running_mean[1].any()
    model.eval()
    with active(model, a):
        trained = model(x)
    recalibrate(model, [(x, None)], [a])  # the same data in one step
    with active(model, a):
        torch.testing.assert_close(model(x), trained, rtol=0.05, atol=0.05)
        made = nn.functional.conv2d(x, model.stages[0][0].weight, stride=2, padding=1)
        torch.testing.assert_close(norm.running_mean[0], made.mean((0, 2, 3)))


def test_shared_statistics_are_wrong_for_the_small_ones_and_recalibrated_ones_right():
    """The known failure, and that the policy repairs it: features keep unit variance only with statistics of their own."""
    x, spread = torch.randn(256, 1, 9, 9), {}
    for policy in ("shared", "recalibrate"):
        torch.manual_seed(1)
        model = small(norm="batch", statistics=policy).train()
        for _ in range(60):
            model(x)
        config = at(model, 0.5, 0)
        if policy == "recalibrate":
            assert len(model.stages[1][1].running_mean) == 0  # training kept none
            recalibrate(model.eval(), [(x, None)], [config])
        model.eval()
        norm = model.stages[1][1]
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
        with active(model, config):
            normed = model.stages[1][:2](model.stages[0](x))
        spread[policy] = (normed.var((0, 2, 3)) - 1).abs().max().item()
    assert spread["recalibrate"] < 0.01 and spread["shared"] > 0.2


@pytest.mark.parametrize("make", [small, lambda: small(norm="batch")])
def test_reordering_changes_no_output_and_puts_the_best_first(make):
    model, x = make().double(), torch.randn(4, 1, 9, 9).double()
    recalibrate(model, [(x, None)], [full(model)])
    with active(model, full(model)):
        before = model(x)
        reorder(model)
        torch.testing.assert_close(model(x), before)
    for width in slots(model)[0]:
        steps = units(model, width).view(-1, width.step).sum(1)
        assert (steps.diff() <= 1e-9).all(), width.name


def test_reordering_heads_and_given_scores():
    model, x = transformer().double(), torch.randn(3, 6, 5).double()
    before = model(x)
    reorder(model, {"stream": torch.rand(12)})
    torch.testing.assert_close(model(x), before)
    with pytest.raises(BadInput, match="12 units"):
        reorder(model, {"stream": torch.rand(4)})


def test_attention_equals_torch_and_ours():
    x = torch.randn(3, 5, 12)
    theirs, ours = nn.MultiheadAttention(12, 3, batch_first=True).eval(), Attention(12, 3).eval()
    torch.testing.assert_close(ElasticAttention.of(theirs)(x), theirs(x, x, x)[0])
    elastic = ElasticAttention.of(ours)
    assert torch.equal(elastic(x), ours(x)) and elastic.q.weight is ours.q.weight
    with active(elastic, Config((2,))):
        alone = extract(elastic, Config((2,)))
        assert type(alone) is Attention and alone.heads == 2 and torch.equal(alone(x), elastic(x))
    with pytest.raises(UnsupportedModel, match="batch_first"):
        ElasticAttention.of(nn.MultiheadAttention(12, 3))


def test_depthwise_convolutions_follow_and_other_groups_are_refused():
    w = Width("w", 8)
    model = nn.Sequential(ElasticConv2d(2, 8, 3, outputs=w), ElasticConv2d(8, 8, 3, inputs=w, outputs=w, groups=8)).eval()
    x = torch.randn(2, 2, 7, 7)
    with active(model, Config((3,))):
        assert torch.equal(extract(model, Config((3,)))(x), model(x)) and model(x).shape[1] == 3
    with pytest.raises(UnsupportedModel, match="groups"):
        ElasticConv2d(8, 8, 3, inputs=w, outputs=w, groups=2)
    with pytest.raises(BadInput, match="cut the groups"):
        ElasticNorm(nn.GroupNorm(4, 8), w)
    with pytest.raises(UnsupportedModel):
        ElasticNorm(nn.InstanceNorm2d(8), w)


def test_copies_and_states_carry_slots_and_statistics():
    model = small(norm="batch")
    config = at(model, 0.5, 0)
    recalibrate(model, [(torch.randn(8, 1, 9, 9), None)], [config])
    fresh = small(norm="batch")
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, 1, 9, 9)
    with active(model, config):
        want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        with active(twin, config):
            assert torch.equal(twin(x), want)
        assert slots(twin)[0][0] is not slots(model)[0][0]


def test_a_family_is_sorted_by_what_it_costs():
    model, x = small(), torch.randn(2, 1, 9, 9)
    family = ElasticFamily(model, grid(model, (0.5, 1.0), together=True)[::-1], x)
    assert len(family.configs) == 2 * 2 * 3
    prices = [CostTable.measure([lambda x, c=c: family.run(x, c)], x).full for c in family.configs]
    assert prices == sorted(prices) and family.configs[-1] == full(model)
    with pytest.raises(UnsupportedModel, match="no elastic layer"):
        ElasticFamily(nn.Linear(2, 2), [Config()], x)


@pytest.mark.parametrize(("make", "shape"), [(small, (2, 1, 9, 9)), (lambda: small(norm="batch"), (2, 1, 9, 9)), (transformer, (2, 6, 5))])
def test_prices_from_one_pass_are_the_measured_ones(make, shape):
    model, x = make(), torch.randn(shape)
    configs = grid(model, (0.25, 0.6, 1.0), together=True)
    prices = flops(model, configs, x)
    recalibrate(model, [(torch.randn(4, *shape[1:]), None)], configs)
    for config, price in zip(configs, prices):
        assert CostTable.measure([extract(model, config)], x).full == price


def test_a_unit_is_worth_what_its_readers_weigh_it():
    width = Width("hidden", 3)
    model = nn.Sequential(ElasticLinear.of(nn.Linear(2, 3), outputs=width), nn.ReLU(), ElasticLinear.of(nn.Linear(3, 2), inputs=width))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[0.0, -3.0, 1.0], [0.5, 1.0, -1.0]]))
    assert units(model, width).tolist() == [0.5, 4.0, 2.0]
    before = model[2].weight.clone()
    reorder(model)
    assert torch.equal(model[2].weight, before[:, [1, 2, 0]])
