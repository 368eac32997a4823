"""Trainable gates: 0/1 switches on channels whose derivative is any shape one likes, trained with the weights by plain gradients.

A step b(w) = 1[w > 0] has no derivative. Add a saw-tooth so fine that its height cannot be seen but its slope can:

    g_M(w) = b(w) + s_M(w) g(w),    s_M(w) = (M w - floor(M w)) / M in [0, 1/M),    s_M' = 1 almost everywhere.

As M grows g_M tends to b uniformly, and its derivative g(w) + s_M(w) g'(w) to g(w). In the limit: forward b(w), backward times g(w). One
gate stands on each unit of a :class:`~neurarium.compress.graph.ChannelGraph` (a channel, a neuron, a head, a channel of a residual stream),
and the cost of the network is a sum of *products* of gates, e.g. kernel * pixels * (open outputs) * (open inputs) for a convolution. With

    loss + weight * |cost(b) / cost(1) - target|

weights and selection are trained together. Then the closed units are cut out.

*Source*: Kim et al., Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks (AAAI 2020), sections 3.1 (gate), 3.2 (shaping the
gradient), 3.3 (differentiable cost). The gate is the paper's; loss, schedule and rates are reconstructed.

*Departures*: a gate multiplies what *reads* the unit (the columns of the next layers' weights), not the map behind the normalisation: the
same function, on every kind of layer, and a closed gate in front of a ReLU still feels a gradient. A group's largest gate is always open.
If the cost ends farther from the target than `tol`, the gates nearest to zero flip until it is met.

*Cost*: that of training; the gated network itself saves nothing before it is stripped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress.channels import apply_channels
from neurarium.compress.graph import ChannelGraph, Example, Group
from neurarium.compress.sensitivity import Loss, collect
from neurarium.compress.training import Tuning
from neurarium.compress.unit_scores import KINDS, choose_groups, unit_weights
from neurarium.errors import BadInput
from neurarium.learn.fit import Learner

__all__ = ["SHAPES", "Gate", "GateFunction", "GateLoss", "Gated", "add_gates", "saw_gate", "strip_gates", "trainable_gate"]

#: derivative shapes g(w) by name; "constant" is the straight-through estimator
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "sigmoid": lambda w: 4 * torch.sigmoid(w) * (1 - torch.sigmoid(w)),
    "tanh": lambda w: 1 - torch.tanh(w).square(),
}

_SGD: Callable[..., Optimizer] = partial(SGD, momentum=0.9, weight_decay=5e-4)


class GateFunction(torch.autograd.Function):
    """b(w) forward, g(w) backward: the limit of :func:`saw_gate`."""

    @staticmethod
    def forward(w: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        return (w > 0).to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        w, ctx.slope = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (w,) = ctx.saved_tensors
        return grad * ctx.slope(w), None


def saw_gate(w: Tensor, shape: str | Callable[[Tensor], Tensor] = "sigmoid", teeth: float = 1e5) -> Tensor:
    """g_M(w) = b(w) + s_M(w) g(w) with M = `teeth`, differentiated as it stands.

    In float64: float32 loses the fraction of M w once M w is above 1e7, and most of its digits well before.
    """
    scaled = teeth * w.double()
    saw = (scaled - scaled.floor().detach()) / teeth
    return (w > 0).double() + saw * _slope(shape)(w.double())


class Gate(nn.Module):
    """One 0/1 switch a unit, open where the weight is above 0; the largest is always open.

    Args:
        units: how many.
        shape: of the derivative: "sigmoid" (largest at the switching point), "tanh", "constant" (straight-through), or a function.
        init: first value of the weights.
    """

    def __init__(self, units: int, *, shape: str | Callable[[Tensor], Tensor] = "sigmoid", init: float = 0.5) -> None:
        super().__init__()
        self.shape = shape
        _slope(shape)
        self.weight = nn.Parameter(torch.full((units,), float(init)))

    def forward(self) -> Tensor:
        gate = GateFunction.apply(self.weight, _slope(self.shape))
        if bool((self.weight <= 0).all()):
            gate = gate + F.one_hot(self.weight.argmax(), len(self.weight)).to(gate)
        return gate

    def extra_repr(self) -> str:
        return f"{int((self.weight > 0).sum())} of {len(self.weight)} open, shape={self.shape}"


class Gated(nn.Module):
    """A model whose units can be switched off. Made by :func:`add_gates`; called as the model is."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, groups: Sequence[Group], example: Example, shape: Any, init: float) -> None:
        super().__init__()
        self.model, self.example = model, example
        self.names = [g.id for g in groups]
        self.gates = nn.ModuleList(Gate(g.size, shape=shape, init=init) for g in groups).to(next(model.parameters()).device)
        self.skipped = dict(graph.frozen)
        self._readers: dict[str, list[tuple[int, int, int]]] = {}
        for i, uses in enumerate(unit_weights(model, groups, "in").values()):
            for j, (name, dim, index) in enumerate(uses):
                length = model.get_parameter(name).shape[dim]
                place = torch.full((length,), -1)
                place[index] = torch.arange(len(index))[:, None]
                self.register_buffer(f"_place_{i}_{j}", place.to(self.gates[i].weight.device), persistent=False)
                self._readers.setdefault(name, []).append((dim, i, j))
        chosen = {g.id for g in groups}
        mask = torch.cat([torch.full((g.size,), g.id in chosen) for g in graph.groups])
        for what in ("macs", "params"):
            terms = graph.counts(what)
            width = max((len(sizes) for _, sizes in terms), default=0)
            factor, stay, belongs = [], [], []
            for number, sizes in terms:
                sizes = [*sizes, *[(1, torch.zeros(len(mask)).numpy())] * (width - len(sizes))]
                factor.append(number)
                parts = [torch.as_tensor(counts, dtype=torch.float32) for _, counts in sizes]
                stay.append([float(n + p[~mask].sum()) for (n, _), p in zip(sizes, parts, strict=True)])
                belongs.append(torch.stack([p[mask] for p in parts]))
            self.register_buffer(f"_{what}_factor", torch.tensor(factor, dtype=torch.float64), persistent=False)
            self.register_buffer(f"_{what}_stay", torch.tensor(stay), persistent=False)
            self.register_buffer(f"_{what}_belongs", torch.stack(belongs), persistent=False)  # (terms, sizes, units)

    def switches(self) -> list[Tensor]:
        """b of each group."""
        return [gate() for gate in self.gates]

    def cost(self, of: str = "macs", switches: Sequence[Tensor] | None = None) -> Tensor:
        """The share of the whole model's "macs" or "params" that the open units cost, differentiable in the gates."""
        b = torch.cat(list(self.switches() if switches is None else switches))
        stay, belongs, factor = getattr(self, f"_{of}_stay"), getattr(self, f"_{of}_belongs"), getattr(self, f"_{of}_factor")
        now = (stay + belongs.to(b) @ b).double().prod(1) @ factor
        return now / ((stay + belongs.sum(2)).double().prod(1) @ factor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        switches = self.switches()
        known = dict(self.model.named_parameters())
        weights = {}
        for name, uses in self._readers.items():
            weight = known[name]
            for dim, i, j in uses:
                place = getattr(self, f"_place_{i}_{j}")
                line = torch.where(place >= 0, switches[i][place], 1.0).to(weight)
                weight = weight * line.view([-1 if d == dim else 1 for d in range(weight.ndim)])
            weights[name] = weight
        return functional_call(self.model, weights, args, kwargs)


class GateLoss:
    """loss + weight * |cost / full cost - target|, to be trained with any optimizer. Counts how often each gate flips.

    Args:
        model: the gated model.
        target: share of the cost that is wanted.
        cost: "macs" or "params".
        weight: of the second term.
        loss_fn: the first term, of (output, y).

    Attributes:
        opened: open units of each group, one list a call with gradients.
        ratios: the cost's share at each such call.
        flips: how often each gate has changed its state.
    """

    def __init__(self, model: Gated, target: float = 0.5, cost: str = "macs", weight: float = 1.0, loss_fn: Loss = F.cross_entropy) -> None:
        if not 0.0 < target <= 1.0:
            raise BadInput(f"target must be in (0, 1], got {target}")
        if cost not in ("macs", "params"):
            raise BadInput(f"cost must be 'macs' or 'params', got {cost!r}")
        self.model, self.target, self.cost, self.weight, self.loss_fn = model, target, cost, weight, loss_fn
        self.opened: list[list[int]] = []
        self.ratios: list[float] = []
        self.flips: Tensor | None = None
        self._last: Tensor | None = None

    def __call__(self, output: Any, y: Tensor) -> Tensor:
        switches = self.model.switches()
        ratio = self.model.cost(self.cost, switches)
        if torch.is_grad_enabled():
            state = torch.cat(switches).detach().bool()
            changed = torch.zeros_like(state, dtype=torch.int64) if self._last is None else (state != self._last).long()
            self.flips = changed if self.flips is None else self.flips + changed
            self._last = state
            self.opened.append([int(s.sum()) for s in switches])
            self.ratios.append(float(ratio.detach()))
        loss = self.loss_fn(output, y)
        return loss + self.weight * (ratio - self.target).abs().to(loss)


def add_gates(
    model: nn.Module,
    *,
    example: Example,
    units: str | Sequence[str] = KINDS,
    coupled: str = "inner",
    shape: str | Callable[[Tensor], Tensor] = "sigmoid",
    init: float = 0.5,
) -> Gated:
    """A copy of the model with a gate on each unit of the kinds asked for (see :func:`~neurarium.compress.unit_scores.choose_groups`).

    Args:
        example: an input (a tuple of inputs, a mapping) for the trace of the graph.
        units: "channels", "neurons", "heads", or several.
        coupled: "inner", or "sum" to gate the width of residual streams too, by one shared gate a channel.
    """
    graph = ChannelGraph.trace(model, example)
    groups = choose_groups(graph, model, units, coupled)
    return Gated(copy.deepcopy(model), graph, groups, example, shape, init)


def strip_gates(gated: Gated) -> nn.Module:
    """The plain, smaller model without the closed units; ``result.plan`` says what went."""
    graph = ChannelGraph.trace(gated.model, gated.example)
    kept = {name: b.detach().bool().nonzero()[:, 0].cpu() for name, b in zip(gated.names, gated.switches(), strict=True)}
    scores = {name: gate.weight.detach().double().cpu() for name, gate in zip(gated.names, gated.gates, strict=True)}
    plan = graph.plan(kept, scores=scores)
    result = apply_channels(gated.model, plan)
    result.plan = plan  # type: ignore[assignment]
    return result


def trainable_gate(
    model: nn.Module,
    loader: Iterable,
    *,
    target: float = 0.5,
    epochs: int = 2,
    finetune: int = 1,
    cost: str = "macs",
    weight: float = 2.0,
    tol: float = 0.02,
    lr: float = 0.01,
    gate_lr: float = 0.2,
    optimizer: Callable[..., Optimizer] = _SGD,
    units: str | Sequence[str] = KINDS,
    coupled: str = "inner",
    shape: str | Callable[[Tensor], Tensor] = "sigmoid",
    init: float = 0.5,
    loss_fn: Loss = F.cross_entropy,
    learner: Learner | None = None,
    example: Example | None = None,
    watch: Callable[[Gated, GateLoss], None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Gates on, weights and gates trained together, closed units cut out, the rest fine-tuned.

    Args:
        loader: re-iterable ``(x, y)`` batches.
        target: share of `cost` ("macs" or "params") that may stay.
        epochs: of joint training. finetune: epochs after the cut, by `learner` (default: SGD in one cycle of `lr`).
        weight: of the cost in the loss.
        tol: largest distance from the target that is left to training.
        lr, gate_lr: rates of weights and gates; gates have no weight decay.
        watch: called with the gated model and its loss when the joint training ends.

    Raises:
        UnsupportedModel: no such units. BadInput: a target that cannot be reached, an empty or non-finite loader.
    """
    x, _ = collect(loader, 2)
    gated = add_gates(model, example=x if example is None else example, units=units, coupled=coupled, shape=shape, init=init)
    gated.train(model.training)
    objective = GateLoss(gated, target, cost, weight, loss_fn)
    _check_target(gated, objective)

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        weights = [p for p in gated.model.parameters() if p.requires_grad]
        return [{"params": weights, "lr": lr}, {"params": list(gated.gates.parameters()), "lr": gate_lr, "weight_decay": 0.0}]

    Tuning(loss=objective, optimizer=partial(optimizer, lr=lr), groups=groups).fit(gated, loader, epochs=epochs, seed=seed)
    _settle(gated, objective, tol)
    if watch is not None:
        watch(gated, objective)
    result = strip_gates(gated)
    plan = result.plan
    if finetune:
        learner = _one_cycle(loss_fn, optimizer, lr, finetune * len(list(loader))) if learner is None else learner
        learner.fit(result, loader, epochs=finetune, seed=seed)  # type: ignore[arg-type]
    result.plan = plan
    return result


def _one_cycle(loss_fn: Loss, optimizer: Callable[..., Optimizer], lr: float, steps: int) -> Tuning:
    return Tuning(loss=loss_fn, optimizer=partial(optimizer, lr=lr), schedule=partial(OneCycleLR, max_lr=lr, total_steps=steps))


@torch.no_grad()
def _check_target(gated: Gated, objective: GateLoss) -> None:
    """The least that can be: one unit of each group."""
    least = [torch.eye(len(g.weight), device=g.weight.device)[0] for g in gated.gates]
    if (floor := float(gated.cost(objective.cost, least))) > objective.target:
        raise BadInput(
            f"target {objective.target} cannot be met: with one unit a layer the model keeps {floor:.3f} of its {objective.cost}"
        )


@torch.no_grad()
def _settle(gated: Gated, objective: GateLoss, tol: float) -> None:
    """Flips the gates nearest to zero until the cost is within `tol` of the target, or as near as it comes."""
    weights = torch.cat([g.weight for g in gated.gates]).clone()
    best: list[Tensor] | None = None
    distance = abs(float(gated.cost(objective.cost)) - objective.target)
    if distance <= tol:
        return
    shifts = torch.sort(weights).values  # gates open where w > shift
    low, high = 0, len(shifts) - 1
    while low <= high:
        middle = (low + high) // 2
        trial = [(g.weight > shifts[middle]).to(g.weight) for g in gated.gates]
        trial = [b if bool(b.any()) else F.one_hot(g.weight.argmax(), len(b)).to(b) for b, g in zip(trial, gated.gates, strict=True)]
        ratio = float(gated.cost(objective.cost, trial))
        if best is None or abs(ratio - objective.target) < distance:
            best, distance = trial, abs(ratio - objective.target)
        low, high = (middle + 1, high) if ratio > objective.target else (low, middle - 1)
    for gate, b in zip(gated.gates, best or [], strict=False):
        wrong = (gate.weight > 0) != b.bool()
        gate.weight[wrong] = torch.where(b[wrong].bool(), 1e-6, -1e-6)


def _slope(shape: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(shape):
        return shape
    if shape not in SHAPES:
        raise BadInput(f"shape must be {', '.join(map(repr, SHAPES))} or a function, got {shape!r}")
    return SHAPES[shape]
