from __future__ import annotations

import copy
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import FusionPlan, align_layers, apply_fusion, cka, cla_fuse, layer_costs, optimal_transport, ot_fuse, plan_fusion
from neurarium.compress.fuse.folding import fold_norms, write_back
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import subject
from neurarium.testing.examples.compress.fusion import COVER

IMAGES = [(torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(32))]
ROWS = [(torch.randn(64, 10, generator=torch.Generator().manual_seed(1)), torch.zeros(64))]


def mlp(*widths: int, act: type = nn.ReLU, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), act())]
    return nn.Sequential(*layers[:-1])


def vgg(*stages: tuple[int, ...], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers, into = [], 3
    for stage in stages:
        for width in stage:
            layers += [nn.Conv2d(into, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            into = width
        layers.append(nn.MaxPool2d(2))
    return lived(nn.Sequential(*layers, nn.Flatten(), nn.Linear(into * (8 // 2 ** len(stages)) ** 2, 5)))


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.norm2(self.two(torch.relu(self.norm1(self.one(x))))))


def resnet(widths: tuple[int, int], blocks: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU()]
    for into, out, stride in ((widths[0], widths[0], 1), (*widths, 2)):
        layers += [Block(into, out, stride), *(Block(out, out, 1) for _ in range(blocks - 1))]
    return lived(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)))


def lived(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(0, 0.3), m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
    return model.eval()


def agree(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-5)


# Layers


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (8, 4), (7, 1)])
@pytest.mark.parametrize("first", [0, 1])
def test_the_map_is_the_best_of_all_increasing_ones(shape: tuple[int, int], first: int) -> None:
    m, n = shape
    for seed in range(10):
        cost = torch.rand(m, n, generator=torch.Generator().manual_seed(seed))
        maps = [c for c in combinations(range(m), n) if c[:first] == tuple(range(first))]
        value = lambda c, cost=cost: float(sum(cost[l, k] for k, l in enumerate(c)))  # noqa: E731
        found = align_layers(cost, first=first)
        assert tuple(found) in maps
        assert value(found) == pytest.approx(min(map(value, maps)))
    assert align_layers(torch.zeros(5, 2), last_free=2) == [0, 1]
    assert max(align_layers(torch.rand(6, 2), last_free=2)) <= 3


def test_cka_knows_no_rotation_no_scale_and_no_shift() -> None:
    x, y = torch.randn(40, 7), torch.randn(40, 5)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    assert cka(x, y) == pytest.approx(cka(3 * x @ rotation + 1, y), abs=1e-6)
    assert cka(x, x @ rotation) == pytest.approx(1)
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    assert cka(x, y) == pytest.approx(float((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())))
    assert cka(x, torch.ones(40, 3)) == 0


@pytest.mark.parametrize("kind", ["cka", "cca", "wasserstein", "index", "width"])
def test_every_cost_finds_a_layer_in_itself(kind: str) -> None:
    layers = [torch.randn(60, 4 + i, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    cost = layer_costs(layers, layers, kind)
    assert cost.shape == (4, 4)
    assert cost.diagonal().abs().max() < 1e-6
    assert align_layers(layer_costs(layers, [layers[0], layers[2]], "cka"), first=0) == [0, 2]


# Transport


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (9, 3)])
def test_the_assignment_is_as_good_as_the_linear_program(shape: tuple[int, int]) -> None:
    cost = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    n, m = shape
    grains = optimal_transport(cost)
    program = optimal_transport(cost, torch.full((n,), 1 / n))
    for plan in (grains, program):
        torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
        torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64))
        assert plan.min() >= 0
    assert float((grains * cost).sum()) == pytest.approx(float((program * cost).sum()))


def test_the_plan_costs_what_pot_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):
        monkeypatch.setenv(f"POT_BACKEND_DISABLE_{backend}", "1")  # importing them takes seconds
    ot = pytest.importorskip("ot")
    for n, m in ((20, 20), (12, 30), (17, 23)):
        cost = torch.rand(n, m, dtype=torch.float64)
        ours = float((optimal_transport(cost) * cost).sum())
        assert ours == pytest.approx(float(ot.emd2([], [], cost.numpy())), rel=1e-9)


def test_masses_of_ones_own() -> None:
    plan = optimal_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(plan, torch.tensor([[0.5, 0.2], [0.0, 0.3]], dtype=torch.float64))
    for bad in (torch.zeros(3), torch.full((2, 2), float("nan")), torch.zeros(0, 2)):
        with pytest.raises(BadInput, match="cost"):
            optimal_transport(bad)
    with pytest.raises(BadInput, match="masses"):
        optimal_transport(torch.ones(2, 2), torch.tensor([1.0, 1.0]))


def shuffled(model: nn.Sequential) -> nn.Module:
    """The same function with the neurons of two hidden layers in another order."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for one, two in ((0, 2), (2, 4)):
            order = torch.randperm(other[one].out_features)
            other[one].weight.copy_(other[one].weight[order]), other[one].bias.copy_(other[one].bias[order])
            other[two].weight.copy_(other[two].weight[:, order])
    return other


@pytest.mark.parametrize("align", ["activations", "weights"])
def test_a_network_fused_with_itself_in_another_order_is_itself(align: str) -> None:
    model = mlp(10, 16, 12, 4)
    result = ot_fuse(shuffled(model), model, ROWS, align=align)
    for p, q in zip(result.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    naive = ot_fuse(shuffled(model), model, ROWS, align="index")
    assert (naive[0].weight - model[0].weight).abs().max() > 0.05


def test_the_transport_runs_through_flatten_norms_and_shortcuts() -> None:
    for name in ("vgg", "densenet", "lstm"):
        one, two = subject(name, 0), subject(name, 1)
        assert (one.run(ot_fuse(one.model, two.model, one.loader, weight=0.0)) - one.run()).abs().max() < 1e-4, name
        assert (one.run(ot_fuse(one.model, two.model, one.loader, weight=1.0)) - one.run(two.model)).abs().max() < 1e-4, name


def test_neurons_that_were_split_come_together() -> None:
    small = mlp(10, 8, 3)
    wide = mlp(10, 16, 3)
    with torch.no_grad():
        wide[0].weight.copy_(small[0].weight.repeat_interleave(2, 0)), wide[0].bias.copy_(small[0].bias.repeat_interleave(2))
        wide[2].weight.copy_(small[2].weight.repeat_interleave(2, 1) / 2), wide[2].bias.copy_(small[2].bias)
    result = ot_fuse(wide, small, ROWS)
    torch.testing.assert_close(result[0].weight, small[0].weight)
    torch.testing.assert_close(result[2].weight, small[2].weight)
    agree(ot_fuse(small, wide, ROWS, weight=0.0), small, ROWS[0][0])  # and are split again


def test_folding_and_writing_back_change_nothing() -> None:
    model, x = vgg((4, 6), (6,)), IMAGES[0][0]
    folded = fold_norms(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    agree(folded, model, x)
    back = write_back(folded, x)
    assert [(n, p.shape) for n, p in back.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    agree(back, model, x)
    with torch.no_grad():  # the statistics are those of the data: training mode agrees too
        torch.testing.assert_close(back.train()(x), model(x), rtol=1e-2, atol=1e-3)


# Both

PAIRS = {
    "mlp": (lambda: mlp(10, 12, 9, 8, 7, 4, seed=1), lambda: mlp(10, 12, 6, 4), ROWS),
    "vgg": (lambda: vgg((5, 6), (6, 8, 8), seed=1), lambda: vgg((4,), (6, 6)), IMAGES),
    "resnet": (lambda: resnet((4, 6), 3, seed=1), lambda: resnet((4, 6), 1), IMAGES),
    "narrow resnet": (lambda: resnet((8, 6), 2, seed=1), lambda: resnet((4, 6), 1), IMAGES),
}


@pytest.mark.parametrize("name", PAIRS)
def test_added_layers_leave_the_function(name: str) -> None:
    large, small, loader = (PAIRS[name][0](), PAIRS[name][1](), PAIRS[name][2])
    result = cla_fuse(large, small, loader, weight=1.0)
    assert len(result) == len(large)
    agree(result, small, loader[0][0])


@pytest.mark.parametrize("name", ["mlp", "narrow resnet"])
def test_merged_it_has_the_small_ones_shape(name: str) -> None:
    large, small, loader = (PAIRS[name][0](), PAIRS[name][1](), PAIRS[name][2])
    result = cla_fuse(large, small, loader, balance="merge")
    assert [(n, p.shape) for n, p in result.named_parameters()] == [(n, p.shape) for n, p in small.named_parameters()]
    agree(cla_fuse(large, small, loader, balance="merge", weight=1.0), small, loader[0][0])


def test_merging_is_exact_where_every_neuron_is_active() -> None:
    large, small = mlp(10, 12, 9, 4, seed=1), mlp(10, 12, 4)
    with torch.no_grad():
        large[2].bias += 10  # the second hidden layer never rests
    merged = apply_fusion(large, small, FusionPlan({"/0": (0,)}), ROWS, balance="merge", weight=0.0)
    agree(merged, large, ROWS[0][0])


def test_with_equal_depth_it_is_ot_fusion() -> None:
    a, b = vgg((4, 5), (6,), seed=1), vgg((4, 5), (6,))
    one, two = cla_fuse(a, b, IMAGES), ot_fuse(a, b, IMAGES)
    assert all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert one.plan.maps == {}
    assert one.plan.moved


def test_the_plan_names_the_layers() -> None:
    large, small = mlp(10, 12, 9, 8, 7, 4, seed=1), mlp(10, 12, 6, 4)
    plan = plan_fusion(large, small, ROWS)
    assert list(plan.maps) == ["/0"]
    cost = torch.tensor(plan.costs["/0"])
    assert cost.shape == (4, 2)
    assert list(plan.maps["/0"]) == align_layers(cost)
    for bad, what in (({"/0": (1, 2)}, "from 0"), ({"/0": (0, 4)}, "of 4"), ({"/7": (0,)}, "/7")):
        with pytest.raises(BadInput, match=what):
            apply_fusion(large, small, FusionPlan(bad), ROWS)
    assert "large layer" in cla_fuse(large, small, ROWS).plan.describe()


def test_what_cannot_be_is_refused_by_name() -> None:
    large, small = mlp(10, 12, 9, 4, act=nn.GELU), mlp(10, 12, 4, act=nn.GELU)
    with pytest.raises(UnsupportedModel, match=r"^2:"):
        cla_fuse(large, small, ROWS)
    cla_fuse(large, small, ROWS, balance="merge")
    with pytest.raises(UnsupportedModel, match="only 1 in the large"):
        cla_fuse(small, large, ROWS)
    with pytest.raises(UnsupportedModel, match=r"^3:.*balance='add'"):
        cla_fuse(vgg((4, 4), (6,)), vgg((4,), (6,)), IMAGES, balance="merge")
    with pytest.raises(UnsupportedModel, match="stages"):
        cla_fuse(vgg((4, 4), (6,)), vgg((4,)), IMAGES)
    with pytest.raises(UnsupportedModel, match="no channels"):
        ot_fuse(nn.Linear(10, 4), nn.Linear(10, 4), ROWS)
    with pytest.raises(UnsupportedModel, match=r"0\.bias"):
        ot_fuse(nn.Sequential(nn.Linear(10, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)), mlp(10, 6, 2), ROWS)
    for loader, what in (([], "empty"), ([(torch.full((4, 10), float("nan")), torch.zeros(4))], "finite")):
        with pytest.raises(BadInput, match=what):
            cla_fuse(mlp(10, 6, 6, 2), mlp(10, 6, 2), loader)
    for options in ({"weight": 1.5}, {"align": "magic"}, {"balance": "magic"}, {"layer_cost": "magic"}):
        with pytest.raises(BadInput, match=r"magic|weight"):
            cla_fuse(mlp(10, 6, 6, 2), mlp(10, 6, 2), ROWS, **options)


@pytest.mark.parametrize("name", ["mlp", "resnet", "mobilenet", "vit", "unet"])
def test_any_architecture_can_be_fused(name: str) -> None:
    one = subject(name)
    before = one.run()
    result = COVER["clafusion"](one)
    out = one.run(result)
    assert out.shape == before.shape
    assert torch.isfinite(out).all()
    assert (out - before).norm() < 0.5 * before.norm()
