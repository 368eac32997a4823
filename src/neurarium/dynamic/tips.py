"""TIPS: which paths through a super-network matter, read from a Markov chain, and trained more often.

Training an anytime network means running a few of its sub-networks in each step. Operations that many sub-networks share are trained far
more often than others. TIPS models the flow of training signal as a random walk from the input through operations to the output; paths over
often visited operations are *topologically important*, and training (and the choice of what is offered at run time) concentrates on them.

*Equations.* Node (l, o): width l with o units. Edges join operations that follow each other in some sub-network, also over a skipped block.

- *edge weight*: w(a -> b) = number of sub-networks in which b follows a, times the channel overlap min(c_a, c_b) / c_max;
- *chain*: P = w, each row normalised, the output absorbing; Q its part without the output;
- *visits*: N = (I - Q)^-1, h(l, o) = N[input, (l, o)], the probability that a walk passes (each node at most once: the graph has no cycle);
- *mass*: m(l, o) = sum_{o' >= o} h(l, o'), how often the units that o adds are trained, as wider options contain them;
- *path*: TAP(p) = sum over the steps a -> b of p, from input to output, of log P(a -> b), the log-probability that a walk takes just p.

Without blocks to skip and with even overlaps TAP is the sum of log h over the operations of p. With them that sum would praise paths for
being short; a probability weighs the step over a block against the steps through it.

*Design.* Sub-networks are put into ``levels`` bins of cost (logarithmic in FLOPs); each bin keeps the ``per_level`` of largest TAP.
*Training:* a step runs the largest, the smallest and paths whose bin is drawn uniformly and which in their bin are drawn by
softmax(TAP / temperature), accumulated as a sandwich: the largest learns the labels, the others its soft answers. *Afterwards*
``calibrate`` measures what was kept, and budgets run through its Pareto front.

*Source.* Li, Zhou, Nowak and Marculescu, "TIPS: Topologically Important Path Sampling for Anytime Neural Networks", arXiv 2305.08021.

*Departures.* The storyline (a Markov chain over operations, its most visited paths, training on them under cost levels) is the paper's; the
exact edge weights, the path score and the way in which levels are filled are **reconstructed** here. ``overlap`` and ``usage`` take others.

*Cost.* Linear in the number of sub-networks, and one dense solve in the number of operations, before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.dynamic.elastic import Config, Depth, ElasticFamily, Sliced, flops, slots
from neurarium.dynamic.samplers import Important
from neurarium.dynamic.slimmable import Slimmable
from neurarium.errors import BadInput

__all__ = ["TIPS", "Importance", "operations", "path_importance"]

Node = tuple[int, int]  # a layer and the option taken there
Overlap = Callable[[float, float], float]


@dataclass(frozen=True, eq=False)
class Importance:
    """What the chain says.

    Attributes:
        nodes: the operations, layer by layer.
        transition: ``(nodes + 2, nodes + 2)``: input, operations, output; rows sum to 1.
        visits: h of each operation.
        mass: m of each operation.
    """

    nodes: tuple[Node, ...]
    transition: Tensor
    visits: Mapping[Node, float]
    mass: Mapping[Node, float]

    def score(self, path: Sequence[Node]) -> float:
        """TAP of a path; -inf where it takes a step that no walk takes."""
        place = {node: i + 1 for i, node in enumerate(self.nodes)}
        if any(node not in place for node in path):
            return -math.inf
        steps = [0, *(place[node] for node in path), len(self.nodes) + 1]
        return float(self.transition[steps[:-1], steps[1:]].log().sum())


def operations(model: nn.Module) -> Callable[[Config], list[Node]]:
    """How a config of an elastic model runs through its widths: ``path(config)`` lists (width, units) without what is skipped."""
    widths, depths = slots(model)
    inside: dict[int, tuple[int, int]] = {}  # widths that only one block of a depth uses
    shared: set[int] = set()
    blocks = {id(m): (i, k) for i, d in enumerate(depths) for k, b in enumerate(d._modules.values()) for m in b.modules()}
    for module in model.modules():
        if isinstance(module, Sliced) and not isinstance(module, Depth):
            for w in {id(w) for axes in module.axes().values() for w in axes.values()}:
                where = blocks.get(id(module))
                if where is None or inside.setdefault(w, where) != where:
                    shared.add(w)
    skipped = [inside.get(id(w)) if id(w) not in shared else None for w in widths]

    def path(config: Config) -> list[Node]:
        return [(l, n) for l, (n, s) in enumerate(zip(config.widths, skipped)) if s is None or s[1] < config.depths[s[0]]]

    return path


def path_importance(
    paths: Sequence[Sequence[Node]], usage: Sequence[float] | None = None, *, sizes: Sequence[int] | None = None, overlap: Overlap = min
) -> Importance:
    """The chain over the operations of all paths.

    Args:
        paths: each a list of (layer, option), layers rising.
        usage: how often each path is used; alike by default.
        sizes: units of each layer, of which an option is a share; by default its largest option.
        overlap: of two shares, how much of the signal of one reaches the other.
    """
    if not paths or any(not p or any(a[0] >= b[0] for a, b in pairwise(p)) for p in paths):
        raise BadInput("need at least one path, each with at least one operation and rising layers")
    counts = [1.0] * len(paths) if usage is None else [float(u) for u in usage]
    if len(counts) != len(paths) or not all(0 <= u < math.inf for u in counts) or not sum(counts) > 0:
        raise BadInput(f"usage needs a number >= 0 for each of the {len(paths)} paths")
    nodes = tuple(sorted({node for p in paths for node in p}))
    most = {l: max(o for k, o in nodes if k == l) if sizes is None else sizes[l] for l, _ in nodes}
    share = [1.0, *(o / most[l] for l, o in nodes), 1.0]
    place = {node: i + 1 for i, node in enumerate(nodes)}
    weight = torch.zeros(len(nodes) + 2, len(nodes) + 2, dtype=torch.float64)
    for p, u in zip(paths, counts):
        steps = [0, *(place[node] for node in p), len(nodes) + 1]
        for a, b in pairwise(steps):
            weight[a, b] += u * overlap(share[a], share[b])
    weight[-1, -1] = 1.0
    total = weight.sum(1, keepdim=True)
    total[total == 0] = 1.0  # an operation of unused paths alone leads nowhere, and nothing leads there
    transition = weight / total
    inner = transition[:-1, :-1]
    h = torch.linalg.solve(torch.eye(len(inner), dtype=torch.float64) - inner.T, torch.eye(len(inner), dtype=torch.float64)[0])[1:]
    visits = dict(zip(nodes, h.tolist()))
    mass = {(l, o): sum(v for (k, other), v in visits.items() if k == l and other >= o) for l, o in nodes}
    return Importance(nodes, transition, visits, mass)


class TIPS(Slimmable):
    """An anytime network trained on its topologically important paths.

    Args:
        supernet: an :class:`~neurarium.dynamic.elastic.ElasticFamily` of all candidate sub-networks.
        example: a batch that it takes.
        levels: bins of cost, equally wide in log FLOPs; empty ones are left out.
        per_level: paths that are kept in each.
        temperature: of the draw inside a bin.
        accumulate: sub-networks a step, the largest and the smallest among them.
        distil: share of the largest network's answers, beside the labels, in what the others learn.
        score: another importance of a config; by default TAP under :func:`path_importance`.

    ``configs`` are those that were kept, with the largest and the smallest. A budget needs ``calibrate`` on validation data.
    """

    def __init__(
        self,
        supernet: ElasticFamily,
        example: Any,
        *,
        levels: int = 5,
        per_level: int = 8,
        temperature: float = 0.5,
        accumulate: int = 4,
        distil: float = 1.0,
        score: Callable[[Config], float] | None = None,
        seed: int = 0,
    ) -> None:
        if levels < 1 or per_level < 1 or accumulate < 2:
            raise BadInput(f"need levels >= 1, per_level >= 1 and accumulate >= 2, not {levels}, {per_level} and {accumulate}")
        model, configs = supernet.model, supernet.configs
        if score is None:
            path = operations(model)
            found = path_importance([path(c) for c in configs], sizes=[w.size for w in slots(model)[0]])
            score = lambda c: found.score(path(c))  # noqa: E731
        kept = fill(configs, flops(model, configs, example), score, levels, per_level)
        ends = configs[0], configs[-1]
        family = ElasticFamily(model, [*(c for b in kept for c in b), *ends], example)
        sampler = Important(
            kept, [[score(c) for c in b] for b in kept], largest=ends[1], smallest=ends[0], n=accumulate - 2, temperature=temperature
        )
        super().__init__(family, sampler=sampler, distil=distil, seed=seed)


def fill(
    configs: Sequence[Config], prices: Sequence[int], score: Callable[[Config], float], levels: int, per_level: int
) -> list[list[Config]]:
    """For each bin of cost, cheapest first, its configs of largest score (of equal ones the cheaper first)."""
    low, high = math.log(min(prices)), math.log(max(prices))
    bins: list[list[tuple[float, int, int]]] = [[] for _ in range(levels)]
    for i, price in enumerate(prices):
        place = (math.log(price) - low) / (high - low) if high > low else 0.0
        bins[min(levels - 1, int(place * levels))].append((-score(configs[i]), price, i))
    return [[configs[i] for _, _, i in sorted(b)[:per_level]] for b in bins]
