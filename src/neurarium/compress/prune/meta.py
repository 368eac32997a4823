"""Meta pruning: a graph network rewrites a network a little, such that it becomes easy to prune.

Which channels matter is an accident of training. A *metanetwork* reads the network as a graph, channels as nodes and weights as edges,
and writes back the same graph, slightly changed. It is trained, over a few networks, to keep their loss while the norms of their channel
groups become sparse; a new network then needs one pass through it, ordinary fine-tuning and ordinary pruning by norms.

Features: a node has the numbers of up to two normalisations (scale, shift, mean, variance; 1, 0, 0, 1 where there is none, the shift being
the bias of a layer without one), an edge its kernel in a 3 x 3 frame. A layer of the metanetwork, with A, B, C, D = SiLU(Linear)::

    m_ij = A(x_j) * B(x_i) * e_ij         x_i += P [mean, std, max, min over j of m_ij]       (the same against the arrows, with e s,
    e_ij += (C(x_j) * D(x_i) + C(x_i) * D(x_j)) * e_ij                                         s = +1 in the first half, -1 in the second)

on normalised x and e; at the end ``features + 0.01 MLP(.)``. One step of training minimises the sum over batches of the loss of the new
weights w' plus, for each unit with norm n over all its slices, ``reg gamma |w'|^2 / 2`` with a constant
``gamma = alpha^((n_max - n) / (n_max - n_min))`` in its group: the smaller, the harder it is pushed.

*Source*: Liu et al., "Meta Pruning via Graph Metanetworks", 2025 (arXiv 2506.12041), and its public code.

*Departures*: the graph comes from the channel graph of any traced network, so channels that a residual sum ties are one node (the authors
write one node a layer by hand and join those by edges); what a node has no room for (a third normalisation, the biases of a whole
head) becomes an edge from it to itself;
layers that are neither linear nor convolutions of at most 3 x 3 stay as they are. Networks are transformed in eval mode.

*Cost*: memory and time grow with edges x hidden x layers: 5,000 weights and hidden 32 take some 10 ms a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from neurarium.compress.channels import ChannelPlan, apply_channels
from neurarium.compress.graph import ChannelGraph, Example
from neurarium.compress.prune.units import budget, traced, unit_slices
from neurarium.compress.sensitivity import collect
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop
from neurarium.meter import undisturbed

__all__ = ["NetworkGraph", "PruningMetaNet", "group_gammas", "meta_prune", "meta_train", "plan_group_norm"]

SLOT = (1.0, 0.0, 0.0, 1.0)
NODE, EDGE = 8, 9


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a tensor lives: rows of the node or edge features, and the columns (one a number of the tensor, or all in one)."""

    name: str
    edges: bool
    rows: Tensor
    columns: Tensor
    positive: bool = False


@dataclass(frozen=True, eq=False)
class NetworkGraph:
    """A network as nodes (n, 8), edges (m, 9) from `source` to `target`, and the way back.

    Attributes:
        channels: the channel graph that the nodes come from.
        skipped: layers that are not in it, with the reason.
    """

    nodes: Tensor
    edges: Tensor
    source: Tensor
    target: Tensor
    channels: ChannelGraph
    skipped: Mapping[str, str] = field(default_factory=dict)
    places: tuple[_Place, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example: Example, *, channels: ChannelGraph | None = None) -> NetworkGraph:
        """The graph of a model that :class:`ChannelGraph` can trace."""
        channels = ChannelGraph.trace(model, example) if channels is None else channels
        weights, norms, skipped = _contents(model, channels)
        if not weights:
            why = "; ".join(f"{n}: {w}" for n, w in list(skipped.items())[:3])
            raise UnsupportedModel(f"has no linear layer or small convolution that the graph can hold{': ' + why if why else ''}",
                                   module=type(model).__name__)  # fmt: skip
        dims = {name: channels.components(name) for name in [*weights, *(n for names, _ in norms for n in names if n)]}
        used = torch.cat([torch.from_numpy(d).flatten() for found in dims.values() if found for d in found[:2]]).unique()
        number = {int(c): i for i, c in enumerate(used)}
        at = {name: [torch.tensor([number[int(c)] for c in d]) for d in found[:2]] for name, found in dims.items() if found}
        tensors = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
        like = next(tensors[n] for n in weights)
        nodes = torch.tensor([*SLOT, *SLOT], dtype=like.dtype, device=like.device).repeat(len(used), 1)
        sources, targets, places, start = [], [], [], 0
        for name, (out, taps) in weights.items():
            ends = at[name]
            grid = torch.cartesian_prod(torch.arange(len(ends[0])), torch.arange(len(ends[1])))
            targets.append(ends[out][grid[:, out]]), sources.append(ends[1 - out][grid[:, 1 - out]])
            places.append(_Place(name, True, start + torch.arange(len(grid)), taps))
            start += len(grid)
        taken = torch.zeros(len(used), dtype=torch.int64)
        for names, where in norms:
            here = at[where][0]
            single = len(here.unique()) == len(here)  # not where a whole head is one unit
            slot = int(taken[here].max()) if single else 2
            taken[here] += int(single)
            columns = [(c, n) for c, n in enumerate(names) if n]
            if slot < 2:
                places += [_Place(n, False, here, torch.tensor([4 * slot + c]), c == 3) for c, n in columns]
            else:
                sources.append(here), targets.append(here)
                places += [_Place(n, True, start + torch.arange(len(here)), torch.tensor([c]), c == 3) for c, n in columns]
                start += len(here)
        edges = torch.zeros(start, EDGE, dtype=like.dtype, device=like.device)
        for place in places:
            table = edges if place.edges else nodes
            table[place.rows[:, None], place.columns] = tensors[place.name].to(like).reshape(len(place.rows), -1)
        return cls(nodes, edges, torch.cat(sources), torch.cat(targets), channels, skipped, tuple(places))

    def tensors(self, model: nn.Module, nodes: Tensor, edges: Tensor) -> dict[str, Tensor]:
        """The model's tensors by name as these features say, differentiable in them. Variances stay positive."""
        known = dict((*model.named_parameters(), *model.named_buffers()))
        result = {}
        for place in self.places:
            value = (edges if place.edges else nodes)[place.rows[:, None], place.columns].reshape(known[place.name].shape)
            result[place.name] = (value.clamp_min(1e-5) if place.positive else value).to(known[place.name].dtype)
        return result

    def to_model(self, model: nn.Module, nodes: Tensor | None = None, edges: Tensor | None = None) -> nn.Module:
        """A copy of the model with these features (this graph's own if not given) written into it."""
        result = apply_channels(model, self.channels.plan({}))
        own = nodes is None and edges is None
        values = self.tensors(model, self.nodes if nodes is None else nodes, self.edges if edges is None else edges)
        slots = dict((*result.named_parameters(), *result.named_buffers()))
        with torch.no_grad():
            for place in self.places:
                if not (own and place.positive):  # the clamp is for what a metanetwork wrote
                    slots[place.name].copy_(values[place.name])
        return result


def _contents(model: nn.Module, channels: ChannelGraph) -> tuple[dict[str, tuple[int, Tensor]], list, dict[str, str]]:
    """Weights as edges (name -> output dimension, columns of the taps), norms (scale, shift, mean, variance; whose channels), skipped."""
    weights: dict[str, tuple[int, Tensor]] = {}
    norms: list[tuple[tuple[str | None, ...], str]] = []
    skipped: dict[str, str] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if isinstance(t, Tensor)}
        if not own:
            continue
        weight, bias = own.get("weight"), own.get("bias")
        name = {k: f"{path}.{k}".lstrip(".") for k in own}
        kind = type(module).__name__
        if weight is not None and id(weight) in seen:
            skipped[path] = "shares its weight with an earlier layer"
            continue
        if weight is not None:
            seen.add(id(weight))
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        if isinstance(module, nn.Linear) or convolution or (kind == "Conv1D" and hasattr(module, "nf")):
            if weight is None or channels.components(name.get("weight", "")) is None:
                skipped[path] = "is not met by the trace"
                continue
            taps = _taps(weight.shape[2:])
            if taps is None:
                skipped[path] = f"its kernel {tuple(weight.shape[2:])} does not fit a 3 x 3 frame"
            else:
                out = int(kind == "Conv1D" or (convolution and module.transposed))
                weights[name["weight"]] = (out, taps)
                if bias is not None and channels.components(name["bias"]) is not None:
                    norms.append(((None, name["bias"], None, None), name["bias"]))
        elif weight is not None and weight.ndim == 1 and channels.components(name["weight"]) is not None:
            row = tuple(name.get(k) for k in ("weight", "bias", "running_mean", "running_var"))
            norms.append((row, name["weight"]))
        else:
            skipped[path] = f"{kind or 'it'} is neither a linear layer, a convolution nor a normalisation with a scale"
    return weights, norms, skipped


def _taps(kernel: Sequence[int]) -> Tensor | None:
    """The columns of the 3 x 3 frame that a kernel fills, centred."""
    if len(kernel) > 2 or any(k > 3 for k in kernel):
        return None
    spans = [torch.arange(k) + (1 if k == 1 else 0) for k in ([1] * (2 - len(kernel)) + list(kernel))]
    return (3 * spans[0][:, None] + spans[1]).flatten()


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        part = lambda: nn.Sequential(nn.Linear(width, width), nn.SiLU())  # noqa: E731
        self.a, self.b, self.c, self.d = part(), part(), part(), part()
        self.project = nn.Linear(4 * width, width)
        self.register_buffer("sign", torch.tensor([1.0, -1.0]).repeat_interleave(torch.tensor([width - width // 2, width // 2])))

    def forward(self, x: Tensor, e: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        u, v = F.layer_norm(x, x.shape[-1:]), F.layer_norm(e, e.shape[-1:])
        a, b, c, d = self.a(u), self.b(u), self.c(u), self.d(u)
        forth = _gather(a[source] * b[target] * v, target, len(x))
        back = _gather(a[target] * b[source] * (v * self.sign), source, len(x))
        return x + self.project(forth) + self.project(back), e + (c[source] * d[target] + c[target] * d[source]) * v


def _gather(messages: Tensor, to: Tensor, n: int) -> Tensor:
    """Mean, standard deviation, maximum and minimum of the messages at each of n nodes, zero where none arrive."""
    count = torch.bincount(to, minlength=n).clamp_min(1)[:, None].to(messages)
    total = messages.new_zeros(n, messages.shape[1])
    mean = total.index_add(0, to, messages) / count
    spread = (total.index_add(0, to, (messages - mean[to]).square()) / count + 1e-6).sqrt()
    index = to[:, None].expand_as(messages)
    top, low = (total.scatter_reduce(0, index, messages, how, include_self=False) for how in ("amax", "amin"))
    return torch.cat([mean, spread, top, low], 1)


class PruningMetaNet(nn.Module):
    """Reads nodes and edges, gives them back a little changed; indifferent to the order of the channels.

    Args:
        hidden, layers: size.
        node_scale, edge_scale: how much it may change the features; 0 gives the identity.
    """

    def __init__(
        self, hidden: int = 64, layers: int = 8, node_dim: int = NODE, edge_dim: int = EDGE, *,
        node_scale: float = 0.01, edge_scale: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        self.node_scale, self.edge_scale = node_scale, edge_scale
        self.read_nodes, self.read_edges = nn.Linear(node_dim, hidden), nn.Linear(edge_dim, hidden)
        self.layers = nn.ModuleList(_Layer(hidden) for _ in range(layers))
        self.write_nodes, self.write_edges = (
            nn.Sequential(nn.LayerNorm(hidden, elementwise_affine=False), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, n))
            for n in (node_dim, edge_dim)
        )

    def forward(self, graph: NetworkGraph) -> tuple[Tensor, Tensor]:
        weight = self.read_nodes.weight
        source, target = graph.source.to(weight.device), graph.target.to(weight.device)
        nodes, edges = graph.nodes.to(weight), graph.edges.to(weight)
        x, e = self.read_nodes(nodes), self.read_edges(edges)
        for layer in self.layers:
            x, e = layer(x, e, source, target)
        return nodes + self.node_scale * self.write_nodes(x), edges + self.edge_scale * self.write_edges(e)

    @torch.no_grad()
    def transform(self, model: nn.Module, example: Example) -> nn.Module:
        """A copy of the model as this metanetwork rewrites it."""
        graph = NetworkGraph.of(model, example)
        nodes, edges = self(graph)
        return graph.to_model(model, nodes, edges)


class _OpenNorm(nn.Module):
    """What a batch normalisation does in eval mode, differentiable in its statistics too."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        y = (x - self.running_mean.view(shape)) * (self.running_var.view(shape) + self.eps).rsqrt()
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


def _open_norms(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.__class__ = _OpenNorm
    return twin


def group_gammas(slices: Sequence[Tensor], alpha: float = 16.0) -> Tensor:
    """The weight of each unit of one group: from 1 for the largest norm to alpha for the smallest."""
    norms = torch.cat([s.detach() for s in slices], 1).norm(dim=1)
    spread = norms.max() - norms.min()
    return torch.ones_like(norms) if spread == 0 else alpha ** ((norms.max() - norms) / spread)


def group_penalty(tensors: Mapping[str, Tensor], channels: ChannelGraph, alpha: float = 16.0) -> Tensor:
    """Half the squared weights, each unit's times its gamma; the gradient is gamma w for every group that a weight is in. No biases."""
    chosen = {n: t for n, t in tensors.items() if not n.endswith(("bias", "running_mean", "running_var"))}
    total = torch.zeros((), dtype=next(iter(chosen.values())).dtype, device=next(iter(chosen.values())).device)
    for group in channels.groups:
        if slices := unit_slices(chosen, group):
            gamma = group_gammas(slices, alpha)
            total = total + 0.5 * sum((gamma * s.square().sum(1)).sum() for s in slices)
    return total


def meta_train(
    metanet: PruningMetaNet,
    models: Sequence[nn.Module],
    loader: Iterable,
    *,
    reg: float = 10.0,
    alpha: float = 16.0,
    epochs: int = 5,
    lr: float = 1e-3,
    loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    example: Example | None = None,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Trains the metanetwork in place on a few trained networks, which stay as they are. AdamW, the rate divided by 10 after 3/5 of it.

    Args:
        loader: (x, y) batches; each step sums the loss over all of them.
        epochs: passes over the networks, one step each.

    Returns:
        (loss a batch, penalty) of each step.
    """
    if not models:
        raise BadInput("needs at least one network to learn from")
    x, _ = collect(loader, 1)
    example = x if example is None else example
    graphs = [NetworkGraph.of(model, example) for model in models]
    twins = [_open_norms(model) for model in models]
    optimizer = torch.optim.AdamW(metanet.parameters(), lr=lr, weight_decay=5e-4)
    order, history = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.1 if epoch >= 0.6 * epochs else 1.0)
        for i in torch.randperm(len(models), generator=order).tolist():
            model, graph = models[i], graphs[i]
            nodes, edges = metanet(graph)
            made = graph.tensors(model, nodes, edges)
            leaves = {k: v.detach().requires_grad_(True) for k, v in made.items()}  # batches accumulate here, one pass back at the end
            frozen = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers()) if k not in made}
            total, batches = 0.0, 0
            with undisturbed(twins[i]):
                for x, y in loader:
                    loss = loss_fn(functional_call(twins[i], {**frozen, **leaves}, (x,)), y)
                    loss.backward()
                    total, batches = total + float(loss.detach()), batches + 1
            penalty = group_penalty({**frozen, **leaves}, graph.channels, alpha)
            (reg * penalty).backward()
            if not torch.isfinite(penalty + total):
                raise BadInput(f"the loss of network {i} is not finite after the metanetwork")
            found = [(made[k], leaf.grad) for k, leaf in leaves.items() if leaf.grad is not None and made[k].requires_grad]
            optimizer.zero_grad()
            torch.autograd.backward([m for m, _ in found], [g for _, g in found])
            optimizer.step()
            history.append((total / batches, float(penalty.detach())))
    return history


def plan_group_norm(model: nn.Module, channels: ChannelGraph, *, ratio: float, steps: int = 20) -> ChannelPlan:
    """Removes units of the smallest norm over all of their slices, divided by the largest of their group, over all groups together.

    Args:
        ratio: share of the multiply-adds to remove.
        steps: norms are taken anew after each part of it, since a unit's slices shrink when its neighbours go.
    """
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"ratio is the share of multiply-adds to remove, in [0, 1), got {ratio}")
    with torch.no_grad():
        tensors = {n: t.detach().cpu().double().clone() for n, t in model.named_parameters(remove_duplicate=False)}
        tensors = {n: t for n, t in tensors.items() if not n.endswith("bias")}
        alive = {g.id: torch.ones(g.size, dtype=torch.bool) for g in channels.groups}
        scores: dict[str, Tensor] = {}
        for step in range(1, steps + 1) if ratio else (steps,):
            for group in channels.groups:
                norms = torch.cat(unit_slices(tensors, group), 1).norm(dim=1)
                scores[group.id] = torch.where(alive[group.id], norms / norms.max().clamp_min(1e-300), -1.0)
            kept = budget(channels, scores, 1 - ratio * step / steps)
            for group in channels.groups:
                gone = alive[group.id].clone()
                gone[kept[group.id]] = False
                alive[group.id] &= ~gone
                for member in group.members:
                    for attribute, dim in member.tensors:
                        if (name := f"{member.module}.{attribute}".lstrip(".")) in tensors:
                            tensors[name].index_fill_(dim, member.index[gone].flatten(), 0.0)
    return channels.plan(kept, scores=scores)


def meta_prune(
    model: nn.Module,
    metanet: PruningMetaNet | None,
    loader: Iterable,
    *,
    ratio: float = 0.5,
    first: float = 0.0,
    finetune_epochs: tuple[int, int] = (0, 0),
    lr: float = 0.01,
    loss_fn: Any = "cross_entropy",
    example: Example | None = None,
    steps: int = 20,
    seed: int = 0,
) -> nn.Module:
    """A smaller copy: prune a little, rewrite by the metanetwork, fine-tune, prune by group norms, fine-tune.

    Args:
        metanet: None leaves its step out: pruning by group norms with the same fine-tuning.
        loader: (x, y) batches for the fine-tuning.
        ratio: share of the multiply-adds to remove in all; `first` of it before the metanetwork (the paper: 1 - 1/1.32).
        finetune_epochs: before and after the second pruning.
    """
    if not 0.0 <= first <= ratio:
        raise BadInput(f"the first pruning is a part of all: 0 <= first <= ratio, got {first} and {ratio}")
    x, _ = collect(loader, 1)
    example = x if example is None else example
    whole, channels = traced(model, example)
    training = whole.training
    start = plan_group_norm(whole, channels, ratio=first, steps=steps)
    result, graph = apply_channels(whole, start), channels
    if first:
        graph = ChannelGraph.trace(result, example)
    if metanet is not None:
        result = metanet.transform(result, example)
    result = _tuned(result, loader, finetune_epochs[0], lr, loss_fn, seed)
    left = start.cost_after.macs / start.cost_before.macs
    then = plan_group_norm(result, graph, ratio=max(0.0, 1 - (1 - ratio) / left), steps=steps)
    result = _tuned(apply_channels(result, then), loader, finetune_epochs[1], lr, loss_fn, seed + 1)
    kept = {name: start.kept[name][then.kept[name]] if name in then.kept else units for name, units in start.kept.items()}
    result.plan = channels.plan(kept)  # type: ignore[assignment]
    return result.train(training)


def _tuned(model: nn.Module, loader: Iterable, epochs: int, lr: float, loss_fn: Any, seed: int) -> nn.Module:
    if epochs:
        learner = Backprop(loss=loss_fn, optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4))
        learner.fit(model, loader, epochs=epochs, seed=seed)  # type: ignore[arg-type]
    return model
