"""Graphs hold networks bit for bit, the metanetwork does not see the order of channels, its penalty is the one it says it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium import meter
from neurarium.compress import ChannelGraph, NetworkGraph, PruningMetaNet, apply_channels, meta_prune, meta_train, plan_group_norm
from neurarium.compress.prune.meta import _open_norms, group_gammas, group_penalty
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.architectures import subject

ARCHITECTURES = ("mlp", "vgg", "resnet", "mobilenet", "densenet", "vit", "gpt", "unet", "lstm")


def metanet(scale: float = 0.01) -> PruningMetaNet:
    torch.manual_seed(1)
    return PruningMetaNet(hidden=8, layers=2, node_scale=scale, edge_scale=scale)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


LOADER = [(torch.randn(16, 6, generator=torch.Generator().manual_seed(i)), torch.arange(16) % 3) for i in range(2)]
EXAMPLE = LOADER[0][0][:1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_comes_back_bit_for_bit(name: str) -> None:
    case = subject(name)
    graph = NetworkGraph.of(case.model, case.inputs)
    wiped = graph.to_model(_zeroed(case.model, graph), graph.nodes, graph.edges)
    for key, value in case.model.state_dict().items():
        assert torch.equal(value, wiped.state_dict()[key]), key
    covered = {p.name for p in graph.places}
    assert all(n in covered or any(n.startswith(s) for s in graph.skipped) for n, _ in case.model.named_parameters())


def _zeroed(model: nn.Module, graph: NetworkGraph) -> nn.Module:
    twin = copy.deepcopy(model)
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    with torch.no_grad():
        for place in graph.places:
            tensors[place.name].zero_()
    return twin


def test_the_graph_of_a_known_network() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    graph = NetworkGraph.of(model, torch.rand(1, 2, 4, 4))
    assert len(graph.nodes) == 2 + 4 + 3 + 2 and len(graph.edges) == 2 * 4 + 4 * 3 + 12 * 2
    one = graph.edges[8:20]
    assert torch.equal(one[:, 4], model[3].weight.flatten()) and one[:, [0, 1, 2, 3, 5, 6, 7, 8]].abs().max() == 0
    assert torch.equal(graph.edges[:8], model[0].weight.reshape(8, 9))
    assert torch.equal(graph.nodes[graph.target[8:20:4], 1], model[3].bias)  # a bias is the shift of a normalisation that is not there


def test_scale_zero_is_the_identity() -> None:
    case = subject("resnet")
    out = metanet(0.0).transform(case.model, case.inputs)
    assert torch.equal(case.run(out), case.run())


def test_the_order_of_hidden_channels_does_not_matter() -> None:
    model, order = mlp(), torch.randperm(8, generator=torch.Generator().manual_seed(2))
    other = mlp()
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order]), other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    net = metanet(1.0)
    a, b = net.transform(model, EXAMPLE), net.transform(other, EXAMPLE)
    assert torch.allclose(a[0].weight[order], b[0].weight, atol=1e-5) and torch.allclose(a[2].weight[:, order], b[2].weight, atol=1e-5)
    assert not torch.allclose(a[0].weight, model[0].weight, atol=1e-2)


def test_gammas_by_hand() -> None:
    slices = [torch.tensor([[3.0], [0.0], [1.0]]), torch.tensor([[4.0], [1.0], [0.0]])]  # norms 5, 1, 1
    assert torch.allclose(group_gammas(slices, 16.0), torch.tensor([1.0, 16.0, 16.0]))
    slices[1][2] = 8.0**0.5  # norms 5, 1, 3
    assert torch.allclose(group_gammas(slices, 16.0), torch.tensor([1.0, 16.0, 4.0]))
    assert torch.equal(group_gammas([torch.ones(3, 2)]), torch.ones(3))


def test_the_penalty_pulls_as_torch_pruning_does() -> None:
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for m in (model[1], model[4]):
            m.weight.uniform_(0.5, 1.5)
    x = torch.rand(1, 3, 9, 9)
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    pruner = tp.pruner.GroupNormPruner(model, x, importance=importance, reg=1.0, ignored_layers=[model[8]])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pruner.regularize(model, alpha=16)
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    group_penalty(dict(model.named_parameters()), ChannelGraph.trace(model, x), 16.0).backward()
    for name, p in model.named_parameters():
        if p.ndim > 1 or name in ("1.weight", "4.weight"):
            assert torch.allclose(p.grad, theirs[name], atol=1e-5), name


def test_open_norms_compute_what_batch_norms_compute() -> None:
    case = subject("resnet")
    assert torch.allclose(_open_norms(case.model)(*case.inputs), case.run(), atol=1e-5)


def test_training_lowers_loss_plus_penalty_and_leaves_the_networks_alone() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = metanet(0.1)
    history = meta_train(net, [model], LOADER, epochs=25, lr=3e-3, reg=0.05)
    objective = [2 * loss + 0.05 * penalty for loss, penalty in history]
    assert objective[-1] < objective[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_step_of_training_is_the_gradient_of_one_graph() -> None:
    """Batches summed on detached weights and one pass back = the gradient of the whole objective."""
    model, first, second = mlp(), metanet(), metanet()
    graph = NetworkGraph.of(model, EXAMPLE)
    tensors = graph.tensors(model, *first(graph))
    loss = sum(F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y) for x, y in LOADER)
    (loss + 10 * group_penalty(tensors, graph.channels)).backward()
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: seen.update({n: p.grad for n, p in second.named_parameters()}))
        meta_train(second, [model], LOADER, epochs=1)
    for name, p in first.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, seen[name], rtol=1e-3, atol=1e-4), name


def test_pruning_meets_the_ratio_and_composes_its_plans() -> None:
    case = subject("vgg")
    for first in (0.0, 0.2):
        small = meta_prune(case.model, metanet(0.0), case.loader, ratio=0.5, first=first)
        plan = small.plan
        assert 0.35 <= plan.cost_after.macs / plan.cost_before.macs <= 0.5
        assert plan.cost_after.macs == meter.macs(small, case.loader[0][0][:1])
        assert torch.allclose(case.run(apply_channels(case.model, plan)), case.run(small), atol=1e-5)  # the metanetwork did nothing


def test_norms_are_taken_anew_as_neighbours_go() -> None:
    torch.manual_seed(0)
    model = mlp()
    graph = ChannelGraph.trace(model, EXAMPLE)
    once, often = (plan_group_norm(model, graph, ratio=0.6, steps=n) for n in (1, 10))
    for plan in (once, often):
        assert plan.cost_after.macs <= 0.4 * plan.cost_before.macs
    norms = torch.cat([model[0].weight, model[2].weight.T], 1).norm(dim=1).double()
    assert once.scores["0"].allclose(norms.detach() / norms.max(), atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="at least one network"):
        meta_train(metanet(), [], LOADER)
    with pytest.raises(BadInput, match="empty"):
        meta_prune(mlp(), metanet(), [])
    with pytest.raises(BadInput, match="not finite"):
        meta_prune(mlp(), metanet(), [(torch.full((4, 6), torch.nan), torch.zeros(4).long())])
    with pytest.raises(BadInput, match="first"):
        meta_prune(mlp(), metanet(), LOADER, ratio=0.2, first=0.5)
    with pytest.raises(BadInput, match="ratio"):
        meta_prune(mlp(), metanet(), LOADER, ratio=1.0)
    with pytest.raises(UnsupportedModel):
        NetworkGraph.of(nn.Sequential(nn.Linear(6, 3)), EXAMPLE)
