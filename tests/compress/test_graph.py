"""Removing units equals zeroing what others read of them, on every kind of network; costs are foretold; the unknown is frozen by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import meter
from neurarium.compress import GPT, ChannelGraph, ChannelPlan, apply_channels
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import subject


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, two: bool = True) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 6), kind(6, 8, 2, batch_first=True, bidirectional=two)
        self.head = nn.Linear(8 * (1 + two), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Gated(nn.Module):
    """SwiGLU by chunk, and group normalisation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv1d(4, 16, 3), nn.GroupNorm(8, 8), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, 1)
        return self.down(self.norm(F.silu(gate) * value)).mean(-1)


def conv(into: int, out: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(out), nn.SiLU())


def tail(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),
    "vgg": lambda: nn.Sequential(
        conv(3, 6), nn.MaxPool2d(2), conv(6, 8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4)
    ),
    "resnet": lambda: subject("resnet").model,
    "mobilenet": lambda: nn.Sequential(conv(3, 6), conv(6, 6, 1, 6), conv(6, 8), conv(8, 16, 2, 8), conv(16, 10), *tail(10)),
    "resnext": lambda: nn.Sequential(conv(3, 12), conv(12, 18, 1, 3), conv(18, 8), *tail(8)),
    "densenet": lambda: subject("densenet").model,
    "vit": lambda: subject("vit").model,
    "unet": lambda: subject("unet").model,
    "lstm": Recurrent,
    "gru": lambda: Recurrent(nn.GRU, two=False),
    "gated": Gated,
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]()
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(m.weight, 1, 0.3), nn.init.normal_(m.bias, 0, 0.3)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.3), nn.init.uniform_(m.running_var, 0.5, 2)
    shape = {"gated": (2, 4, 9), "vit": (2, 3, 16, 16)}.get(name, (2, 3, 8, 8))
    x = torch.randint(0, 11, (2, 7)) if name in ("lstm", "gru") else torch.randn(shape)
    return model.eval(), x


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor, ChannelGraph]:
    model, x = build(request.param)
    return request.param, model, x, ChannelGraph.trace(model, x)


def random_kept(graph: ChannelGraph, seed: int, *, exact: bool = False) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    return {
        g.id: torch.from_numpy(np.sort(random.permutation(g.size)[: random.integers(1, g.size + 1)]))
        for g in graph.groups
        if g.exact or not exact
    }


def masked(model: nn.Module, graph: ChannelGraph, kept: dict[str, Tensor]) -> nn.Module:
    """The whole model, with zeros in the weights that read a removed unit."""
    result = copy.deepcopy(model)
    for name, units in kept.items():
        gone = torch.ones(graph[name].size, dtype=torch.bool)
        gone[units] = False
        for member in graph[name].members:
            for attribute, dim in member.tensors if member.side == "in" else ():
                weight = getattr(result.get_submodule(member.module), attribute)
                weight.data.index_fill_(dim, member.index[gone].flatten(), 0.0)
    return result


@torch.no_grad()
def test_removing_units_equals_zeroing_what_is_read_of_them(case: tuple) -> None:
    _, model, x, graph = case
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        kept = random_kept(graph, seed, exact=True)
        smaller = graph.remove(model, kept)
        torch.testing.assert_close(smaller(x), masked(model, graph, kept)(x), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class LayerNormOver(nn.Module):
    """LayerNorm with the statistics of some of its channels."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        some = x[..., self.kept]
        mean, var = some.mean(-1, keepdim=True), some.var(-1, correction=0, keepdim=True)
        return (x - mean) / (var + self.norm.eps).sqrt() * self.norm.weight + self.norm.bias


@torch.no_grad()
def test_the_width_of_a_transformer_goes_with_its_norms() -> None:
    model, x = build("vit")
    graph = ChannelGraph.trace(model, x)
    stream = graph["patch"]
    assert not stream.exact
    assert [graph[f"layers.{i}.attention.qkv"].size for i in (0, 1)] == [2, 2]
    kept = torch.tensor([0, 3, 4, 7, 8, 11])
    whole = masked(model, graph, {"patch": kept})
    for name, module in list(whole.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, attribute = name.rpartition(".")
            setattr(whole.get_submodule(parent), attribute, LayerNormOver(module, kept))
    torch.testing.assert_close(graph.remove(model, {"patch": kept})(x), whole(x), atol=1e-5, rtol=1e-5)


def test_the_cost_is_what_the_meter_measures(case: tuple) -> None:
    _, model, x, graph = case
    for kept in ({}, random_kept(graph, 5), {g.id: [0] for g in graph.groups}):
        smaller, cost = graph.remove(model, kept), graph.cost(kept)
        assert cost.params == meter.parameters(smaller)
        assert cost.bytes == meter.stored_bytes(smaller)
        assert cost.macs == meter.macs(smaller, x)


def test_every_layer_is_in_a_group_or_frozen_with_a_reason(case: tuple) -> None:
    name, model, _, graph = case
    makers = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase))}
    grouped = {member.module for g in graph.groups for member in g.members if member.side == "out"}
    last = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv1d))][-1]
    if name == "vit":
        last = "head"
    assert grouped == makers - {last}
    assert graph.frozen == {last: "is an output of the model"}
    least = graph.remove(model, {g.id: [g.size - 1] for g in graph.groups})
    for g in graph.groups:
        assert {getattr(least.get_submodule(m.module), t).shape[d] // m.index.shape[1] for m in g.members for t, d in m.tensors} >= {1}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@torch.no_grad()
def test_what_remains_is_an_ordinary_module(case: tuple) -> None:
    name, model, x, graph = case
    smaller = graph.remove(model, random_kept(graph, 9))
    y = smaller(x)
    assert [type(m) for m in smaller.modules()] == [type(m) for m in model.modules()]
    buffer = io.BytesIO()
    torch.save(smaller, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    assert torch.equal(copy.deepcopy(smaller)(x), y)
    assert not {p.data_ptr() for p in smaller.parameters()} & {p.data_ptr() for p in model.parameters()}
    if name in ("mobilenet", "lstm"):
        torch.testing.assert_close(torch.export.export(smaller, (x,), strict=False).module()(x), y)
    with torch.enable_grad():
        smaller.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters() if p.requires_grad)


def test_a_plan_survives_json_and_needs_no_graph() -> None:
    model, x = build("mobilenet")
    graph = ChannelGraph.trace(model, x)
    kept = random_kept(graph, 3)
    plan = graph.plan(kept, scores={g.id: torch.rand(g.size, dtype=torch.float64) for g in graph.groups})
    back = ChannelPlan.from_json(plan.to_json())
    assert back.to_json() == plan.to_json()
    assert torch.equal(apply_channels(model, back)(x), graph.remove(model, kept)(x))
    assert back.cost_after == graph.cost(kept) != back.cost_before
    assert "0.0" in plan.describe()
    assert "is an output" in plan.describe()
    with pytest.raises(BadInput, match=r"0\.0\.weight: the plan was made for shape"):
        plan.check(nn.Sequential(conv(3, 5)))
    with pytest.raises(BadInput, match="not a channel plan"):
        ChannelPlan.from_json('{"kind": "mask"}')


def test_wrong_units_are_named() -> None:
    model, x = build("mlp")
    graph = ChannelGraph.trace(model, x)
    for name, kept, message in (("1", [], "at least one"), ("1", [8], "0 to 7"), ("9", [0], "no group '9'"), ("1", [0, 0], "twice")):
        with pytest.raises(BadInput, match=message):
            graph.remove(model, {name: kept})


class Hard(nn.Module):
    """Heads that the code counts by a number, and a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.out = nn.Linear(16, 8)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 5), nn.Linear(12, 3)
        self.mix = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(x.shape[0], x.shape[1], 4, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mix(self.gate(x).softmax(-1))
        return self.down(F.relu(self.up(x)))


@torch.no_grad()
def test_sizes_fixed_in_the_code_are_found_and_frozen() -> None:
    """Cutting one of four heads of 4 leaves 12 channels, which fold into other heads without an error of torch."""
    torch.manual_seed(0)
    model, x = Hard().eval(), torch.randn(2, 3, 8)
    graph = ChannelGraph.trace(model, x)
    assert {"up"} <= {g.id for g in graph.groups} <= {"up", "out"}
    assert all("fixed in the code" in graph.frozen[name] for name in "qkv")
    assert graph.frozen["gate"] == "is normalised by a softmax"
    kept = random_kept(graph, 1, exact=True)
    torch.testing.assert_close(graph.remove(model, kept)(x), masked(model, graph, kept)(x), atol=1e-5, rtol=1e-5)


class Branching(nn.Module):
    def __init__(self, on_data: bool) -> None:
        super().__init__()
        self.a, self.b, self.on_data = nn.Linear(4, 6), nn.Linear(6, 2), on_data

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if (h.sum() > 0) if self.on_data else (len(h.shape) == 2):
            h = h * 2
        return self.b(h)


@torch.no_grad()
def test_control_flow_on_shapes_is_followed_and_on_data_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = Branching(False).eval()
    graph = ChannelGraph.trace(model, {"x": x})
    kept = {"a": torch.tensor([1, 2, 5])}
    torch.testing.assert_close(graph.remove(model, kept)(x), masked(model, graph, kept)(x))
    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        ChannelGraph.trace(Branching(True), x)


def test_a_model_without_inner_channels_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="is an output of the model"):
        ChannelGraph.trace(nn.Linear(3, 4), torch.randn(2, 3))


@torch.no_grad()
def test_torchs_own_encoder_goes_through_export() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 8)
    graph = ChannelGraph.trace(model, x)
    assert graph["0.linear1"].exact
    assert any("self_attn" in name for name in graph.frozen)
    kept = random_kept(graph, 2, exact=True)
    torch.testing.assert_close(graph.remove(model, kept)(x), masked(model, graph, kept)(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_heads_are_found_where_a_method_of_the_attention_is_called_from_outside() -> None:
    torch.manual_seed(0)
    model, ids = GPT(11, width=12, heads=3, layers=2, context=8).eval(), torch.randint(0, 11, (2, 8))
    graph = ChannelGraph.trace(model, ids)
    assert graph["blocks.1.attention.q"].size == 3
    kept = {"blocks.0.attention.q": torch.tensor([0, 2]), "blocks.1.attention.q": torch.tensor([1])}
    smaller = graph.remove(model, kept)
    assert smaller.blocks[1].attention.num_heads == 1
    torch.testing.assert_close(smaller(ids), masked(model, graph, kept)(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.inner, self.back = nn.Linear(6, 10), nn.Linear(10, 6)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for _ in range(2):  # one layer, used twice
                h = h + self.back(torch.relu(self.inner(h)))
            return self.head(h)

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randint(0, 9, (2, 4))
    graph = ChannelGraph.trace(model, x)
    assert {g.id: g.size for g in graph.groups} == {"embed": 6, "inner": 10}
    kept = {"embed": [0, 2, 5], "inner": [1, 2]}
    smaller = graph.remove(model, kept)
    assert smaller.head.weight is smaller.embed.weight
    assert smaller.head.weight.shape == (9, 3)
    assert graph.cost(kept).params == meter.parameters(smaller)
    assert graph.cost(kept).bytes == meter.stored_bytes(smaller)
    assert smaller(x).shape == (2, 4, 9)


@pytest.mark.parametrize("name", ["vgg", "resnet", "mobilenet", "densenet", "unet"])
def test_the_groups_are_those_of_torch_pruning(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    model, x = build(name)
    graph = ChannelGraph.trace(model, x)
    theirs = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {m: n for n, m in model.named_modules()}
    for group in graph.groups:
        members = [model.get_submodule(m.module) for m in group.members]
        if any(getattr(m, "groups", 1) > 1 and m.out_channels != m.in_channels for m in members):
            continue  # they stop at a depthwise layer that multiplies its channels
        module = model.get_submodule(group.id)
        prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
        if isinstance(module, nn.ConvTranspose2d):
            prune = tp.prune_conv_out_channels
        found = {
            names[dep.target.module]
            for dep, _ in theirs.get_pruning_group(module, prune, idxs=[0])
            if dep.target.module in names and list(dep.target.module.parameters())
        }
        assert found == {m.module for m in group.members}, group.id
