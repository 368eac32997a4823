"""HAP: scores against exact Hessians, implants against removal, plans against brute force."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import meter
from neurarium.compress import (
    ChannelGraph,
    ChannelPlan,
    ImplantConv2d,
    ImplantLinear,
    ablation,
    apply_hap,
    choose_groups,
    hap,
    hap_scores,
    norm_product,
    plan_hap,
    plan_units,
    unit_fluctuation,
    unit_norm,
    unit_sum,
    unit_taylor,
)
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.experiments.compress.zoo import Residual


def network(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Residual(6, 6, 1), Residual(6, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias, 0, 0.3), nn.init.normal_(m.running_mean, 0, 0.3)
    return model.eval(), [(torch.randn(24, 2, 8, 8), torch.arange(24) % 3)]


def exact_blocks(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """The Hessian of the mean loss in one weight, (n, n)."""
    weight = dict(model.named_parameters())[name]
    rest = {k: v.detach() for k, v in model.named_parameters() if k != name}

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, {**rest, name: w.view_as(weight)}, (x,)), y)

    return torch.autograd.functional.hessian(loss, weight.detach().flatten())


def test_the_score_is_the_trace_of_the_exact_hessian_times_the_norm() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    groups = choose_groups(ChannelGraph.trace(model, x), model)
    blocks = exact_blocks(model, x, y, "0.weight").view(6, 4, 6, 4)
    traces = torch.stack([blocks[u, :, u].diagonal().sum() for u in range(6)])
    norms = model[0].weight.detach().square().sum(1)
    want = traces.clamp_min(0) / 8 * norms
    got = hap_scores(model, groups, [(x, y)], probes=250).scores["0"]
    off = blocks.pow(2)
    spread = torch.stack([2 * (off[u, :, u].sum() - off[u, :, u].diagonal().sum()) + off[u].sum() - off[u, :, u].sum() for u in range(6)])
    assert ((got - want).abs() <= 4 * (spread / 250).sqrt() / 8 * norms).all()
    assert ((got - want).abs() < 0.25 * want.max()).all()


def test_for_isotropic_blocks_the_score_is_the_loss_increase_with_one_probe() -> None:
    """Loss = sum over units of c_u ||w_u - w_u*||^2 / 2 at its minimum w*: a diagonal Hessian, exact after a single probe."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Identity(), nn.Linear(5, 5, bias=False))
    nn.init.eye_(model[2].weight)
    c = torch.tensor([0.5, 3.0, 1.0, 0.1, 7.0])
    data = [(torch.eye(4), model(torch.eye(4)).detach())]

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((out - y).square() * c).sum(1).mean()

    groups = choose_groups(ChannelGraph.trace(model, data[0][0]), model)
    got = hap_scores(model, groups, data, probes=1, loss_fn=loss).scores["0"]
    torch.testing.assert_close(got, ablation(model, groups, data, loss_fn=loss)["0"], rtol=1e-5, atol=1e-6)


def test_rescaling_a_relu_unit_leaves_the_score_and_changes_the_magnitude() -> None:
    model, data = network()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[7].weight[2] *= 10
        scaled[7].bias[2] *= 10
        scaled[9].weight[:, 2] /= 10
    torch.testing.assert_close(scaled(data[0][0]), model(data[0][0]))
    results = []
    for m in (model, scaled):
        groups = choose_groups(ChannelGraph.trace(m, data[0][0][:2]), m, "neurons")
        results.append([hap_scores(m, groups, data, probes=8, weights=w).scores["7"][2] for w in ("out", "in", "both")])
        results[-1] += [norm_product(m, groups)["7"][2], unit_norm(m, groups, p=2)["7"][2]]
    before, after = results
    for i in range(4):
        torch.testing.assert_close(before[i], after[i], rtol=1e-3, atol=1e-12)
    assert after[4] > 9.9 * before[4]


@torch.no_grad()
def test_an_implant_that_starts_at_zero_is_removal() -> None:
    model, data = network()
    x = data[0][0]
    plan = plan_hap(model, data, ratio=0.5, implant=0.5, probes=2)
    assert any(isinstance(m, (ImplantConv2d, ImplantLinear)) for m in apply_hap(model, plan).modules())
    graph = ChannelGraph.trace(model, x[:2])
    gone = {}
    for group in graph.groups:
        cheap = set(plan.implanted.get(group.id, torch.empty(0)).tolist())
        gone[group.id] = [u for u in plan.kept[group.id].tolist() if u not in cheap]
    torch.testing.assert_close(apply_hap(model, plan)(x), graph.remove(model, gone)(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(apply_hap(model, plan, init="copy")(x), graph.remove(model, gone)(x), atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "bias": False},
        {"kernel_size": (5, 2), "padding": (1, 0), "dilation": (2, 1), "stride": (1, 2)},
        {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    ],
)
@torch.no_grad()
def test_a_copied_implant_keeps_the_centre_tap(options: dict) -> None:
    torch.manual_seed(0)
    conv, rows = nn.Conv2d(3, 6, **options), torch.tensor([1, 4])
    x = torch.randn(2, 3, 11, 12)
    implant = ImplantConv2d(conv, rows, init="copy")
    mask = torch.zeros_like(conv.weight[0])
    mask[:, (conv.kernel_size[0] - 1) // 2, (conv.kernel_size[1] - 1) // 2] = 1
    conv.weight[rows] *= mask
    torch.testing.assert_close(implant(x), conv(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_linear_implant_of_full_rank_is_the_layer() -> None:
    torch.manual_seed(0)
    linear, rows = nn.Linear(5, 8), torch.tensor([0, 3, 7])
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(ImplantLinear(linear, rows, rank=3, init="copy")(x), linear(x))
    silent = ImplantLinear(linear, rows)(x)
    assert (silent[..., rows] == 0).all()
    torch.testing.assert_close(silent[..., [1, 2, 4, 5, 6]], linear(x)[..., [1, 2, 4, 5, 6]])


@pytest.mark.parametrize("of", ["units", "params", "macs"])
def test_the_plan_keeps_its_promises(of: str) -> None:
    model, data = network()
    before = copy.deepcopy(model.state_dict())
    small = hap(model, data, ratio=0.3, of=of, implant=0.4, probes=2)
    plan: ChannelPlan = small.plan
    x = data[0][0][:2]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plan.cost_after.params == meter.parameters(small)
    assert plan.cost_after.macs == meter.macs(small, x)
    assert plan.cost_after.bytes == meter.stored_bytes(small)
    if of != "units":
        assert getattr(plan.cost_after, of) <= 0.7 * getattr(plan.cost_before, of)
    else:
        total = sum(map(len, plan.scores.values()))
        kept = sum(len(plan.kept[g]) - len(plan.implanted.get(g, ())) for g in plan.scores)
        assert total - kept == round(0.3 * total)
    again = apply_hap(model, ChannelPlan.from_json(plan.to_json()))
    torch.testing.assert_close(again(data[0][0]), small(data[0][0]))
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), small(x))


def test_the_lowest_scores_go_first_and_every_layer_keeps_some() -> None:
    model, data = network()
    graph = ChannelGraph.trace(model, data[0][0][:2])
    groups = choose_groups(graph, model)
    assert {g.id for g in groups} == {"3.body.0", "4.body.0", "7"}
    assert {g.id for g in choose_groups(graph, model, coupled="sum")} == {g.id for g in graph.groups}
    scores = {g.id: torch.arange(g.size, dtype=torch.float64) + 100 * i for i, g in enumerate(groups)}
    plan = plan_units(graph, scores, ratio=0.35, of="units", max_layer_ratio=0.8)
    assert plan.kept["3.body.0"].tolist() == [4, 5]  # 80 % of six, rounded so that a fifth stays
    assert plan.kept["4.body.0"].tolist() == [3, 4, 5, 6, 7]
    assert plan.kept["7"].tolist() == [0, 1, 2, 3, 4, 5]
    nothing = plan_units(graph, scores, ratio=0.0, of="params")
    torch.testing.assert_close(apply_hap(model, nothing)(data[0][0]), model(data[0][0]))


def test_ablation_is_the_loss_without_the_unit_and_taylor_the_slope_of_a_gate() -> None:
    model, ((x, y),) = network()
    graph = ChannelGraph.trace(model, x[:2])
    groups = choose_groups(graph, model)
    truth = ablation(model, groups, [(x, y)])
    with torch.no_grad():
        base = float(F.cross_entropy(model(x), y))
        without = graph.remove(model, {"4.body.0": [0, 1, 2, 4, 5, 6, 7]})
        assert float(truth["4.body.0"][3]) == pytest.approx(float(F.cross_entropy(without(x), y)) - base, abs=1e-5)
    gates = torch.ones(len(x), 6, requires_grad=True)
    handle = model[8].register_forward_hook(lambda m, a, out: out * gates)
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), gates)
    handle.remove()
    each = unit_taylor(model, groups, [(x, y)], weights="in", reduce="sample", chunk=10)["7"]
    mean = unit_taylor(model, groups, [(x, y)], weights="in", chunk=10)["7"]
    torch.testing.assert_close(each, slope.abs().mean(0).double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mean, slope.mean(0).abs().double(), rtol=1e-4, atol=1e-7)
    counts = unit_sum(model, groups, {k: torch.ones_like(v) for k, v in model.named_parameters()}, weights="both")
    assert counts["7"].tolist() == [8 + 3] * 6


@torch.no_grad()
def test_fluctuation_is_the_variance_that_reaches_the_next_layer() -> None:
    model, ((x, y),) = network()
    groups = choose_groups(ChannelGraph.trace(model, x[:2]), model)
    hidden = model[:9](x).double()
    want = hidden.var(0) * model[9].weight.double().square().sum(0)
    found = unit_fluctuation(model, groups, [(x[:10], y[:10]), (x[10:], y[10:])])
    torch.testing.assert_close(found["7"], want, rtol=1e-5, atol=1e-12)
    inner = F.relu(model[3].body[1](model[3].body[0](model[:3](x))))
    columns = F.unfold(inner, 3, padding=1).double().transpose(0, 1).flatten(1).var(1).view(6, 9)
    weights = model[3].body[3].weight.double().square().sum(0).flatten(1)
    torch.testing.assert_close(found["3.body.0"], (columns * weights).sum(1), rtol=1e-5, atol=1e-12)


def test_bad_input_is_refused_before_anything_changes() -> None:
    model, data = network()
    before = copy.deepcopy(model.state_dict())
    x, y = data[0]
    for bad, match in (([], "empty"), ([(x * float("nan"), y)], "not finite")):
        with pytest.raises(BadInput, match=match):
            hap(model, bad, probes=1)
    for options, match in (
        ({"ratio": 1.0}, "whole layers"), ({"ratio": 0.99, "of": "params"}, "must stay"), ({"ratio": 0.97}, "every layer keeps"),
        ({"implant": 2.0}, "implant"), ({"units": "filters"}, "filters"), ({"curvature": "none"}, "curvature"),
        ({"of": "joules"}, "of must"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            hap(model, data, probes=1, **options)
    with pytest.raises(UnsupportedModel, match="heads"):
        hap(model, data, probes=1, units="heads")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_fisher_may_take_the_hessians_place() -> None:
    model, ((x, y),) = network()
    groups = choose_groups(ChannelGraph.trace(model, x[:2]), model, "neurons")
    weight = model[7].weight
    square = torch.stack([torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), weight)[0].square() for i in range(24)])
    want = square.mean(0).sum(1) / (2 * 8) * weight.detach().square().sum(1)
    got = hap_scores(model, groups, [(x, y)], curvature="fisher").scores["7"]
    torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-8)
