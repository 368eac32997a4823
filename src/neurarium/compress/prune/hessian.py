"""HAP: units are ranked by curvature times squared norm; the very cheapest go, the next cheapest are replaced by a cheap implant.

To silence a unit p (a channel, a neuron, a head) with weights w_p in a converged network costs, to second order and with all other
weights held, w_p^T H_pp w_p / 2. Only the trace of H_pp can be had cheaply, and for a block that is nearly isotropic it is enough:

    S_p = tr(H_pp) / (2 n_p) * ||w_p||^2,    tr(H_pp) ~ mean over sign vectors v of v_p . (H v)_p    (Hutchinson)

with one v over all ranked weights at once, so that a probe costs two gradients however many units there are. Units of all layers stand
in one ranking. Of the share that is pruned, the lowest are removed; the rest is given a *neural implant*: a k x k convolution's channel
becomes a 1 x 1 convolution of the same input, the rows of a linear layer a factor pair of small rank.

*Source*: Yu et al., Hessian-Aware Pruning and Optimal Neural Implant (2021), sections 3.1 (score), 3.2 (trace), 3.3 (implant). The authors'
public code was read for settings: eval mode, 512 images, up to 300 probes, 10-20 % of the pruned as implants, at most 95 % of a layer.

*Departures*: a unit with several weight tensors (a head's q, k, v and output columns; a residual channel of several layers) is the sum of
S over them, not one block, which leaves S unchanged when a ReLU unit is rescaled. Negative traces count as zero. Batch normalisation
behind an implant starts from statistics of zero, so that an implant that starts at zero equals removal. `of="params"` or "macs" prunes to a
budget in which the implants count. ``curvature="fisher"`` uses E[g^2], which costs one pass and has no sign. Linear implants are our
reading of the abstract.

*Cost*: probes x two gradients of `samples` rows. A small block's trace is noisy, since all other weights shake it: with a few probes the
ranking is worse than magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium import meter
from neurarium.compress.channels import ChannelPlan, Cost, apply_channels
from neurarium.compress.curvature import hessian_trace
from neurarium.compress.graph import ChannelGraph, Example, Group
from neurarium.compress.sensitivity import Loss, collect
from neurarium.compress.unit_scores import (
    KINDS,
    check_ratio,
    choose_groups,
    diagonal,
    first_that_fits,
    floor_of,
    kept_without,
    makers,
    ranked,
    sum_into,
    unit_weights,
)
from neurarium.errors import BadInput
from neurarium.meter import undisturbed

__all__ = ["HapScores", "ImplantConv2d", "ImplantLinear", "apply_hap", "hap", "hap_scores", "plan_hap"]


@dataclass(frozen=True)
class HapScores:
    """S of each unit, by group; how many traces came out negative; probes drawn (0 for the Fisher)."""

    scores: Mapping[str, Tensor]
    clipped: int
    probes: int


class ImplantConv2d(nn.Module):
    """A convolution some of whose channels are 1 x 1: they read the centre tap only.

    Args:
        conv: the convolution to start from (groups = 1); it is not changed.
        rows: the channels that become implants.
        init: "zero", or "copy": the weights of the centre tap.
    """

    def __init__(self, conv: nn.Conv2d, rows: Tensor, *, init: str = "zero") -> None:
        super().__init__()
        full, order = _split(conv.out_channels, rows)
        self.kernel_size, self.stride, self.dilation, self.padding_mode = conv.kernel_size, conv.stride, conv.dilation, conv.padding_mode
        self.padding = tuple(conv._reversed_padding_repeated_twice)
        self.centre = tuple((k - 1) // 2 for k in conv.kernel_size)
        weight = conv.weight.detach()
        self.weight = nn.Parameter(weight[full].clone(), conv.weight.requires_grad)
        tap = weight[rows][:, :, self.centre[0], self.centre[1], None, None].clone()
        self.implant = nn.Parameter(tap if init == "copy" else torch.zeros_like(tap), conv.weight.requires_grad)
        self.bias = _bias(conv, rows, init)
        self.register_buffer("order", order.to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        cut = []
        for k, c, d in zip(self.kernel_size[::-1], self.centre[::-1], self.dilation[::-1], strict=True):
            cut += [-c * d, -(k - 1 - c) * d]
        whole = F.conv2d(x, self.weight, None, self.stride, 0, self.dilation)
        cheap = F.conv2d(F.pad(x, cut), self.implant, None, self.stride)
        y = torch.cat([whole, cheap], 1).index_select(1, self.order)
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {len(self.weight)} + {len(self.implant)} implants, kernel_size={self.kernel_size}"


class ImplantLinear(nn.Module):
    """A linear layer some of whose rows are a product of two small factors.

    Args:
        linear: the layer to start from; it is not changed.
        rows: the outputs that become implants.
        rank: of the factor pair; by default 5 % of the smaller side, at least 1.
        init: "zero" (the outer factor is zero), or "copy": the best approximation of the rows.
    """

    def __init__(self, linear: nn.Linear, rows: Tensor, *, rank: int | None = None, init: str = "zero") -> None:
        super().__init__()
        full, order = _split(linear.out_features, rows)
        weight = linear.weight.detach()
        old = weight[rows].cpu().double()
        rank = _rank(len(rows), weight.shape[1]) if rank is None else rank
        u, s, v = torch.linalg.svd(old, full_matrices=False)
        up = u[:, :rank] * s[:rank].sqrt()
        down = s[:rank].sqrt()[:, None] * v[:rank] if init == "copy" else v[:rank]
        trains = linear.weight.requires_grad
        self.weight = nn.Parameter(weight[full].clone(), trains)
        self.up = nn.Parameter((up if init == "copy" else torch.zeros_like(up)).to(weight), trains)
        self.down = nn.Parameter(down.to(weight).contiguous(), trains)
        self.bias = _bias(linear, rows, init)
        self.register_buffer("order", order.to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.linear(x, self.weight), F.linear(F.linear(x, self.down), self.up)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {len(self.weight)} + {len(self.up)} implants of rank {len(self.down)}"


def hap(
    model: nn.Module,
    loader: Iterable,
    *,
    ratio: float = 0.5,
    of: str = "units",
    implant: float = 0.1,
    units: str | Sequence[str] = KINDS,
    coupled: str = "inner",
    init: str = "zero",
    probes: int = 64,
    samples: int = 512,
    max_layer_ratio: float = 0.95,
    curvature: str = "hessian",
    loss_fn: Loss = F.cross_entropy,
    example: Example | None = None,
    seed: int = 0,
) -> nn.Module:
    """A smaller copy, to be fine-tuned; ``result.plan`` says what went.

    Args:
        loader: ``(x, y)`` batches; the first `samples` rows are used.
        ratio: share to prune (removed and implanted), of the units; or what share of the model's parameters or multiply-adds is saved.
        of: "units", "params", "macs" or "bytes": what `ratio` is a share of.
        implant: share of the pruned units that get an implant (where the layer has one: k x k convolutions with k > 1 and linear
            layers; elsewhere they are removed).
        units: "channels", "neurons", "heads", or several: what may go.
        coupled: "inner", only channels that one layer makes; "sum": also those of residual sums.
        init: of the implants: "zero" or "copy".
        probes: random vectors of the trace.
        max_layer_ratio: no group of channels loses more than this share.
        curvature: "hessian" or "fisher".
        loss_fn: ``loss_fn(model(x), y)``, a mean over rows; for "fisher" also of a batch of one.
        example: input for the trace of the graph (default: two rows of the loader).

    Raises:
        UnsupportedModel: no such unit, or the model cannot be traced; the message names the layers.
        BadInput: an empty or non-finite loader, a ratio that cannot be reached.
    """
    plan = plan_hap(
        model, loader, ratio=ratio, of=of, implant=implant, units=units, coupled=coupled, probes=probes, samples=samples,
        max_layer_ratio=max_layer_ratio, curvature=curvature, loss_fn=loss_fn, example=example, seed=seed,
    )  # fmt: skip
    result = apply_hap(model, plan, init=init)
    result.plan = plan  # type: ignore[assignment]
    return result


def plan_hap(
    model: nn.Module,
    loader: Iterable,
    *,
    ratio: float = 0.5,
    of: str = "units",
    implant: float = 0.1,
    units: str | Sequence[str] = KINDS,
    coupled: str = "inner",
    probes: int = 64,
    samples: int = 512,
    max_layer_ratio: float = 0.95,
    curvature: str = "hessian",
    loss_fn: Loss = F.cross_entropy,
    example: Example | None = None,
    scores: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> ChannelPlan:
    """What :func:`hap` does, as a plan. `scores` of another method (group id -> (units,)) may take the place of S."""
    check_ratio(ratio, of, max_layer_ratio)
    if not 0.0 <= implant <= 1.0:
        raise BadInput(f"implant must be in [0, 1], got {implant}")
    loader = [collect(loader, samples)]
    example = loader[0][0][:2] if example is None else example
    graph = ChannelGraph.trace(model, example)
    groups = choose_groups(graph, model, units, coupled)
    if scores is None:
        scores = hap_scores(model, groups, loader, probes=probes, samples=samples, curvature=curvature, loss_fn=loss_fn, seed=seed).scores
    implants = _Implants(graph, model, [g for g in groups if g.id in scores], example)
    order = ranked(scores, floor_of(max_layer_ratio))

    def parts(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The units that stay in the model, and the module outputs among them that become implants."""
        cheap = [u for u in order[count - round(implant * count) : count] if u[0] in implants.makers]
        gone = set(order[:count]) - set(cheap)
        return kept_without(scores, gone), implants.rows(cheap)

    count = first_that_fits(lambda n: implants.cost(*parts(n)), graph, scores, len(order), ratio, of)
    kept, rows = parts(count)
    plan = graph.plan(kept, scores=dict(scores), implanted={**rows, **implants.norms(rows)})
    return replace(plan, cost_after=_measured(apply_hap(model, plan), example)) if rows else plan


def hap_scores(
    model: nn.Module,
    groups: Sequence[Group],
    loader: Iterable,
    *,
    probes: int = 64,
    samples: int = 512,
    curvature: str = "hessian",
    loss_fn: Loss = F.cross_entropy,
    weights: str | None = None,
    seed: int = 0,
) -> HapScores:
    """S of each unit of the groups.

    Args:
        weights: "out" (what makes the unit), "in" (what reads it) or "both", added up. By default "out", for heads "both".
    """
    if curvature not in ("hessian", "fisher"):
        raise BadInput(f"curvature must be 'hessian' or 'fisher', got {curvature!r}")
    uses: dict[str, list[tuple[str, int, Tensor]]] = {}
    for group in groups:
        heads = any(m.side == "in" and m.index.shape[1] > 1 for m in group.members) and group.unit > 1
        uses |= unit_weights(model, [group], weights or ("both" if heads else "out"))
    slots: dict[str, list[tuple[int, Tensor]]] = {}
    for entries in uses.values():
        for name, dim, index in entries:
            slots.setdefault(name, []).append((dim, index))

    def per_unit(name: str, t: Tensor) -> Tensor:
        return torch.cat([sum_into(t, dim, index) for dim, index in slots[name]])

    data = [collect(loader, samples)]
    if curvature == "hessian":
        report = hessian_trace(
            model, data, names=list(slots), probes=probes, per=per_unit, samples=samples, chunk=128, loss_fn=loss_fn, seed=seed
        )
        traces, drawn = report.mean, report.probes
    else:
        fisher = diagonal(model, groups, data, weights="both", samples=samples, loss_fn=loss_fn)
        traces, drawn = {name: per_unit(name, fisher[name]) for name in slots}, 0
    known = dict(model.named_parameters())
    position = dict.fromkeys(slots, 0)
    scores, clipped = {}, 0
    for group, entries in uses.items():
        total = torch.zeros(len(entries[0][2]), dtype=torch.float64)
        for name, dim, index in entries:
            trace = traces[name][position[name] : position[name] + len(index)]
            position[name] += len(index)
            clipped += int((trace < 0).sum())
            size = known[name].numel() // known[name].shape[dim] * index.shape[1]
            total += trace.clamp_min(0) / (2 * size) * sum_into(known[name].detach().double().square(), dim, index)
        scores[group] = total
    return HapScores(scores, clipped, drawn)


def apply_hap(model: nn.Module, plan: ChannelPlan, *, init: str = "zero") -> nn.Module:
    """A smaller copy in which the plan's implants have taken their places. The input is untouched."""
    if init not in ("zero", "copy"):
        raise BadInput(f"init must be 'zero' or 'copy', got {init!r}")
    result = apply_channels(model, plan)
    for name, outputs in plan.implanted.items():
        old = result.get_submodule(name)
        lines = (plan.slices.get(f"{name}.{tensor}".lstrip("."), {}).get(0) for tensor in ("weight", "running_mean"))
        stay = next((kept for kept in lines if kept is not None), None)
        rows = outputs if stay is None else torch.searchsorted(stay, outputs)
        if isinstance(old, nn.modules.batchnorm._BatchNorm):
            if init == "zero":
                _start_from_zero(old, rows)
            continue
        new: nn.Module = ImplantConv2d(old, rows, init=init) if isinstance(old, nn.Conv2d) else ImplantLinear(old, rows, init=init)
        new.train(old.training)
        if old is result:
            return new
        for module in list(result.modules()):
            for child, value in module._modules.items():
                if value is old:
                    module._modules[child] = new
    return result


class _Implants:
    """Which groups can have implants, in which modules, and what they save."""

    def __init__(self, graph: ChannelGraph, model: nn.Module, groups: Sequence[Group], example: Example) -> None:
        self.graph, self.modules = graph, {}
        self.makers: dict[str, list[tuple[str, Tensor]]] = {}
        self.scaled: dict[str, list[tuple[str, Tensor]]] = {}
        uses = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
        inner = {g.id for g in choose_groups(graph, model)} if groups else set()
        for group in groups:
            modules = {name: model.get_submodule(name) for name in makers(group)}
            if group.id in inner and all(_implantable(m) and uses.count(id(m.weight)) == 1 for m in modules.values()):
                self.modules |= modules
                outs = {m.module: m.index for m in group.members if m.side == "out"}
                self.makers[group.id] = list(outs.items())
                norms = {m.module: m.index for m in group.members if m.side == "norm"}
                self.scaled[group.id] = [
                    (n, i) for n, i in norms.items() if isinstance(model.get_submodule(n), nn.modules.batchnorm._BatchNorm)
                ]
        self.places = _places(model, self.modules, example)

    def rows(self, units: Iterable[tuple[str, int]]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        self._norms: dict[str, list[Tensor]] = {}
        for group, unit in units:
            for name, index in self.makers[group]:
                found.setdefault(name, []).append(index[unit])
            for name, index in self.scaled[group]:
                self._norms.setdefault(name, []).append(index[unit])
        return {name: torch.cat(parts).unique() for name, parts in found.items()}

    def norms(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of batch normalisations behind the implants that :meth:`rows` gave last."""
        return {name: torch.cat(parts).unique() for name, parts in self._norms.items()} if rows else {}

    def cost(self, kept: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Cost:
        """What the graph foretells, less what the implants save."""
        plan = self.graph.plan(kept)
        params, macs, size = plan.cost_after.params, plan.cost_after.macs, plan.cost_after.bytes
        for name, r in rows.items():
            module = self.modules[name]
            cut = plan.slices.get(f"{name}.weight".lstrip("."), {})
            out, into = (len(cut[d]) if d in cut else module.weight.shape[d] for d in (0, 1))
            if isinstance(module, nn.Conv2d):
                saved = len(r) * into * (math.prod(module.kernel_size) - 1)
            else:
                saved = len(r) * into - _rank(len(r), into) * (len(r) + into)
            params -= saved
            macs -= saved * self.places[name]
            size -= saved * module.weight.element_size() - 8 * out
        return Cost(params, macs, size)


def _implantable(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and math.prod(module.kernel_size) > 1
    return type(module) is nn.Linear


def _places(model: nn.Module, modules: Mapping[str, nn.Module], example: Example) -> dict[str, int]:
    """How often each row of a layer's weight is applied to the example."""
    places = dict.fromkeys(modules, 0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            places[name] += output.numel() // module.weight.shape[0]

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in modules.items()]
    try:
        with undisturbed(model), torch.no_grad():
            _call(model.eval(), example)
    finally:
        for handle in handles:
            handle.remove()
    return places


def _call(model: nn.Module, example: Example) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(example) if isinstance(example, Tensor) else model(*example)


def _measured(model: nn.Module, example: Example) -> Cost:
    model.eval()
    return Cost(meter.parameters(model), meter.macs(lambda: _call(model, example)), meter.stored_bytes(model))


def _rank(rows: int, into: int) -> int:
    return math.ceil(0.05 * min(rows, into))


def _split(outputs: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The other outputs, and where each output stands in (others, rows)."""
    mask = torch.ones(outputs, dtype=torch.bool)
    mask[rows] = False
    full = mask.nonzero()[:, 0]
    return full, torch.cat([full, rows.cpu()]).argsort()


def _bias(layer: nn.Conv2d | nn.Linear, rows: Tensor, init: str) -> nn.Parameter | None:
    if layer.bias is None:
        return None
    bias = layer.bias.detach().clone()
    if init == "zero":
        bias[rows] = 0
    return nn.Parameter(bias, layer.bias.requires_grad)


@torch.no_grad()
def _start_from_zero(norm: nn.modules.batchnorm._BatchNorm, rows: Tensor) -> None:
    """Zero in, zero out for these channels."""
    for tensor, value in ((norm.running_mean, 0.0), (norm.running_var, 1.0), (norm.bias, 0.0)):
        if tensor is not None:
            tensor[rows] = value
