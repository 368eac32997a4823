"""FLAP: remove the inputs that hardly fluctuate, and let a bias say their mean.

A linear layer y = W x + b reads channel j through column W_:j. If x_j is replaced by its mean over the calibration data, the layer errs by
W_:j (x_j - mean_j), which has the expected square

    WIFV_j = var_j ||W_:j||^2        (weighted input feature variance),

and the mean's own part is a constant that the bias takes over: b <- b + sum over removed j of W_:j mean_j. So a channel is worth what it
*fluctuates*, not what it carries, and nothing is trained. In transformers the channels are the heads (read by the attention's output
map) and the feed-forward units (read by the second linear map); the rows that make them leave too. In convolutional networks they
are the coupled channels of :class:`~neurarium.compress.graph.ChannelGraph`, read by one layer or several.

Scores of different layers are made comparable by standardising them within their layer, z = (s - mean s) / std s; a unit of many columns
(a head) scores their mean. ``structure`` says who competes with whom: "AL-AM" all units of the model, each at its price in parameters;
"AL-MM" heads with heads, feed-forward units with feed-forward units; "UL-UM" and "UL-MM" give every layer the same share ("MM": with
a share of its own for heads, ``heads``).

*Source*: An, Zhao, Yu, Tang and Wang, Fluctuation-based Adaptive Structured Pruning for Large Language Models (AAAI 2024); equations
4 to 6 and algorithm 1. The authors' public code was read for the order of steps: statistics of the dense model throughout; heads' column
scores squared before they are standardised.
*Departures*: means and variances count tokens, not batches, and leave padding out; a head costs what it costs in this model instead of
a constant; with grouped-query attention the unit is a key-value head with its query heads; each group keeps at least one unit;
convolutions (where "zeros" padding takes part in the mean of each tap, so that the constant is exact away from the borders only). A layer
without a bias gets one: load such a state dict into ``apply_flap(fresh, plan)``.
*Cost*: one forward pass over the calibration data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from neurarium.compress.allocate import global_threshold
from neurarium.compress.blocks import Layout, TransformerBlocks, explicit
from neurarium.compress.calibrate import InputStats, calibrate, is_conv1d
from neurarium.compress.channels import ChannelPlan, apply_channels
from neurarium.compress.graph import ChannelGraph, Example
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["METRICS", "STRUCTURES", "FlapPlan", "apply_flap", "column_scores", "flap", "magnitude_sp", "plan_flap", "wanda_sp"]

METRICS = ("WIFV", "IFV", "WIFN", "magnitude")
STRUCTURES = ("AL-AM", "AL-MM", "UL-MM", "UL-UM")


@dataclass(frozen=True)
class FlapPlan:
    """Which units stay and which constants stand in for the others.

    Attributes:
        kept: unit group -> units that stay, ascending.
        sizes: unit group -> units before.
        bias: layer -> what its bias gains.
        scores: unit group -> standardised scores.
        parameters_before, parameters_after: of the whole model, new biases included.
        channels: of a model without transformer blocks, the cut as the text of a :class:`~neurarium.compress.channels.ChannelPlan`.
        skipped: what was left alone -> why.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    bias: Mapping[str, tuple[float, ...]]
    scores: Mapping[str, tuple[float, ...]]
    parameters_before: int
    parameters_after: int
    channels: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """A table: group, units, kept; then the parameters; then what was left alone."""
        rows = [f"{'group':40} {'units':>9} {'kept':>9}"]
        rows += [f"{name:40} {self.sizes[name]:>9} {len(units):>9}" for name, units in self.kept.items()]
        rows.append(f"{'parameters':40} {self.parameters_before:>9} {self.parameters_after:>9}")
        return "\n".join([*rows, *(f"{name or '(model)'}: left alone, {why}" for name, why in self.skipped.items())])

    def to_json(self) -> str:
        return json.dumps({"kind": "flap", **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> FlapPlan:
        """The plan that :meth:`to_json` wrote."""
        data = json.loads(text)
        if data.pop("kind", None) != "flap":
            raise BadInput("not a FLAP plan")
        for name in ("kept", "bias", "scores"):
            data[name] = {k: tuple(v) for k, v in data[name].items()}
        return cls(**data)


@dataclass(frozen=True, eq=False)
class _Group:
    """Units that compete, and who reads them: (layer, its matrix (outputs, inputs), columns of each unit (size, k))."""

    kind: str  # "heads", "ffn" or "channels"
    size: int
    price: int
    readers: tuple[tuple[str, Tensor, Tensor], ...]


def flap(model: nn.Module, loader: Iterable, *, layouts: Sequence[Layout] = (), **options: object) -> nn.Module:
    """A smaller copy of the model; ``result.plan`` says what went.

    Args:
        loader: calibration batches, see :func:`~neurarium.compress.calibrate.calibrate`.
        ratio: what to remove, in [0, 1): with "AL-*" the share of the units' parameters (of channels: of what all but one of each group
            would take with them), with "UL-*" the share of the units.
        metric: "WIFV", "IFV" (variance alone), "WIFN" (mean |W_ij| sqrt(E x_j^2), Wanda's) or "magnitude" (||W_:j||).
        structure: "AL-AM", "AL-MM", "UL-MM" or "UL-UM".
        bias: put the removed channels' means into the bias.
        heads: with "-MM", the share of heads to remove; the feed-forward units make up the rest. Default: the same share of both.
        head_cost: price of a head in feed-forward units for "AL-AM"; default: their parameters.
        protect: names of blocks, layers or unit groups to leave alone.
        batches: calibrate on this many only.
        layouts: where your own transformer blocks keep their parts.

    Raises:
        UnsupportedModel: nothing in it can be removed.
        BadInput: an empty or non-finite loader, or a ratio that would remove all units of a group.
    """
    return apply_flap(model, plan_flap(model, loader, layouts=layouts, **options), layouts=layouts)  # type: ignore[arg-type]


def wanda_sp(model: nn.Module, loader: Iterable, **options: object) -> nn.Module:
    """The baseline Wanda-sp: Wanda's score summed over columns, the same share in every layer, no bias."""
    return flap(model, loader, **{"metric": "WIFN", "structure": "UL-UM", "bias": False} | options)  # type: ignore[arg-type]


def magnitude_sp(model: nn.Module, loader: Iterable, **options: object) -> nn.Module:
    """The baseline by weights alone: the length of the columns that read a unit, the same share in every layer, no bias."""
    return flap(model, loader, **{"metric": "magnitude", "structure": "UL-UM", "bias": False} | options)  # type: ignore[arg-type]


def column_scores(weight: Tensor, stats: InputStats, metric: str = "WIFV") -> Tensor:
    """The score of each column of a matrix (outputs, inputs), before any standardising; float64."""
    weight = weight.double().cpu()
    if metric == "WIFV":
        return stats.variance * weight.square().sum(0)
    if metric == "IFV":
        return stats.variance
    if metric == "WIFN":
        return weight.abs().mean(0) * stats.second.sqrt()
    return weight.square().sum(0).sqrt()


def plan_flap(
    model: nn.Module,
    loader: Iterable,
    *,
    ratio: float = 0.2,
    metric: str = "WIFV",
    structure: str = "AL-AM",
    bias: bool = True,
    heads: float | None = None,
    head_cost: float | None = None,
    protect: Sequence[str] = (),
    batches: int | None = None,
    layouts: Sequence[Layout] = (),
) -> FlapPlan:
    """The plan of :func:`flap`."""
    if not 0 <= ratio < 1 or (heads is not None and not 0 <= heads < 1):
        raise BadInput(f"ratio and heads must be in [0, 1), got {ratio} and {heads}")
    if head_cost is not None and not head_cost > 0:
        raise BadInput(f"head_cost must be positive, got {head_cost}")
    if metric not in METRICS or structure not in STRUCTURES:
        raise BadInput(f"metric is one of {', '.join(METRICS)} and structure of {', '.join(STRUCTURES)}; got {metric!r}, {structure!r}")
    stream = iter(loader)
    if (first := next(stream, None)) is None:
        raise BadInput("the calibration loader is empty")
    graph: ChannelGraph | None = None
    try:
        blocks = TransformerBlocks.of(model, layouts)
        fused = any(isinstance(b.qkv[0].module, nn.MultiheadAttention) for b in blocks)
        work = explicit(model) if fused else model
        groups, skipped = _of_blocks(TransformerBlocks.of(work, layouts)), blocks.skipped
    except UnsupportedModel as none:
        work, graph = model, _trace(model, first, none)
        groups, skipped = _of_graph(model, graph)
    groups = _unprotected(groups, protect, skipped)
    names = list(dict.fromkeys(name for g in groups.values() for name, _, _ in g.readers))
    stats = calibrate(work, chain([first], stream), modules=names, batches=batches)
    scores = {key: _standardised(g, stats, metric) for key, g in groups.items()}
    if structure.startswith("UL"):
        kept = _uniform(groups, scores, _shares(groups, ratio, heads if structure == "UL-MM" else None))
    elif graph is not None:
        whole, least = graph.cost().params, graph.cost({key: [0] for key in groups}).params
        budget = whole - ratio * (whole - least)
        kept = global_threshold(scores, budget, cost=lambda masks: graph.cost({k: m.nonzero()[:, 0] for k, m in masks.items()}).params)
    else:
        kept = _adaptive(groups, scores, ratio, heads, head_cost, apart=structure == "AL-MM")
    units = {key: mask.nonzero()[:, 0] for key, mask in kept.items()}
    cut = graph.plan(units) if graph else None
    constants = _constants(groups, kept, stats) if bias else {}
    if cut is not None:
        constants = {name: v[_rows(work, name, cut)] for name, v in constants.items()}
    before = sum(p.numel() for p in model.parameters())
    after = cut.cost_after.params if cut else before - sum(int((~kept[key]).sum()) * g.price for key, g in groups.items())
    after += sum(len(v) for name, v in constants.items() if work.get_submodule(name).bias is None)
    return FlapPlan(
        {key: tuple(index.tolist()) for key, index in units.items()}, {key: g.size for key, g in groups.items()},
        {name: tuple(v.tolist()) for name, v in constants.items()}, {key: tuple(s.tolist()) for key, s in scores.items()},
        before, after, None if cut is None else cut.to_json(), skipped,
    )  # fmt: skip


def apply_flap(model: nn.Module, plan: FlapPlan, *, layouts: Sequence[Layout] = ()) -> nn.Module:
    """A copy of the model without the units that the plan removes. The input is untouched."""
    if plan.channels is None:
        result = TransformerBlocks.of(model, layouts).remove(plan.kept)
    else:
        result = apply_channels(model, ChannelPlan.from_json(plan.channels))
    for name, vector in plan.bias.items():
        layer = result.get_submodule(name)
        constant = torch.tensor(vector, dtype=torch.float64).to(layer.weight.device)
        if layer.bias is None:
            layer.bias = nn.Parameter(constant.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        else:
            with torch.no_grad():
                layer.bias.copy_(layer.bias.double() + constant)
    result.plan = plan
    return result


def _of_blocks(blocks: TransformerBlocks) -> dict[str, _Group]:
    sizes, prices, groups = blocks.sizes(), blocks.unit_parameters(), {}
    for block in blocks:
        for kind in ("heads", "ffn"):
            key = f"{block.name}.{kind}".lstrip(".")
            view, columns = block.readers(kind, torch.arange(sizes[key]))
            groups[key] = _Group(kind, sizes[key], prices[key], ((view.name, view.weight, columns.view(sizes[key], -1)),))
    return groups


def _trace(model: nn.Module, batch: object, why: UnsupportedModel) -> ChannelGraph:
    x: object = batch[0] if isinstance(batch, tuple | list) else batch
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = list(x.values()) if isinstance(x, Mapping) else [x]
    if not all(isinstance(v, Tensor) and bool(torch.isfinite(v).all()) for v in parts if not isinstance(v, bool | int | str | None)):
        raise BadInput("the first calibration batch is no finite tensor x, pair (x, y) or mapping of tensors")
    example: Example = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in x.items()} if isinstance(x, Mapping) else x.to(device)
    try:
        return ChannelGraph.trace(model, example)
    except UnsupportedModel as error:
        raise error from why


def _of_graph(model: nn.Module, graph: ChannelGraph) -> tuple[dict[str, _Group], dict[str, str]]:
    """Groups whose every reader can take a constant."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            owners.setdefault(id(p), set()).add(name)
    groups, skipped = {}, dict(graph.frozen)
    for group in graph.groups:
        members = [m for m in group.members if m.side == "in"]
        why = "a normalisation over the channels ties them together" if not group.exact else None if members else "no layer reads them"
        readers = []
        for member in members:
            module = model.get_submodule(member.module)
            known = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_conv1d(module)
            if not known or getattr(module, "groups", 1) > 1:
                why = why or f"{member.module}, a {type(module).__name__}, reads them and cannot take a constant in their place"
                continue
            if others := owners[id(module.weight)] - {member.module}:
                why = why or f"the weight of {member.module}, which reads them, is shared with {min(others)}"
            weight = module.weight.detach()
            matrix = weight.T if is_conv1d(module) else weight.flatten(1)
            taps = matrix.shape[1] // (weight.shape[0] if is_conv1d(module) else weight.shape[1])
            columns = (member.index[:, :, None] * taps + torch.arange(taps)).flatten(1)
            readers.append((member.module, matrix, columns))
        if why:
            skipped[group.id] = why
        else:
            groups[group.id] = _Group("channels", group.size, 0, tuple(readers))
    if not groups:
        reasons = "; ".join(f"{name or '(model)'}: {why}" for name, why in list(skipped.items())[:3])
        raise UnsupportedModel(f"has no channel that a constant can replace: {reasons}", module=type(model).__name__)
    return groups, skipped


def _unprotected(groups: dict[str, _Group], protect: Sequence[str], skipped: dict[str, str]) -> dict[str, _Group]:
    if isinstance(protect, str):
        raise BadInput(f"protect must be a sequence of names, got the string {protect!r}")
    left = dict(groups)
    for name in protect:
        inside = [key for key in groups if key == name or key.startswith(f"{name}.")]
        if not inside:
            raise BadInput(f"protect names {name!r}, which holds no unit group; the model has {', '.join(list(groups)[:4])}, ...")
        for key in inside:
            left.pop(key, None)
            skipped[key] = "was asked to be left alone"
    if not left:
        raise BadInput("protect leaves nothing to remove")
    return left


def _standardised(group: _Group, stats: Mapping[str, InputStats], metric: str) -> Tensor:
    """One score a unit: the mean z-score of the columns that belong to it."""
    raw = torch.cat([column_scores(matrix, stats[name], metric)[columns] for name, matrix, columns in group.readers], 1)  # (size, k)
    raw = raw.square() if group.kind == "heads" else raw
    spread = raw.std() if raw.numel() > 1 else torch.zeros(())
    return (raw - raw.mean()).mean(1) / spread if spread > 0 else torch.zeros(len(raw), dtype=torch.float64)


def _shares(groups: Mapping[str, _Group], ratio: float, heads: float | None) -> dict[str, float]:
    """Kind -> share to remove, so that together `ratio` of the parameters goes."""
    total = {kind: sum(g.size * g.price for g in groups.values() if g.kind == kind) for kind in {g.kind for g in groups.values()}}
    if heads is None:
        return dict.fromkeys(total, ratio)
    if set(total) != {"heads", "ffn"}:
        raise BadInput(f"heads goes with a model of heads and feed-forward units; here there are {', '.join(sorted(total))}")
    rest = (ratio * sum(total.values()) - heads * total["heads"]) / total["ffn"]
    if not 0 <= rest < 1:
        raise BadInput(f"with {heads:.0%} of the heads the feed-forward units would have to lose {rest:.0%} to make {ratio:.0%} together")
    return {"heads": heads, "ffn": rest}


def _uniform(groups: Mapping[str, _Group], scores: Mapping[str, Tensor], share: Mapping[str, float]) -> dict[str, Tensor]:
    kept = {}
    for key, group in groups.items():
        keep = round((1 - share[group.kind]) * group.size)
        if keep == 0:
            raise BadInput(f"{key}: would lose all of its {group.size} units; choose a smaller ratio or protect it")
        kept.update(global_threshold({key: scores[key]}, keep))
    return kept


def _adaptive(
    groups: Mapping[str, _Group], scores: Mapping[str, Tensor], ratio: float, heads: float | None, head_cost: float | None, *, apart: bool
) -> dict[str, Tensor]:
    price = {key: float(g.price) if head_cost is None else head_cost if g.kind == "heads" else 1.0 for key, g in groups.items()}
    share = _shares(groups, ratio, heads if apart else None)
    kept: dict[str, Tensor] = {}
    for kinds in [[kind] for kind in share] if apart else [list(share)]:
        these = {key: g for key, g in groups.items() if g.kind in kinds}
        budget = sum((1 - share[g.kind]) * g.size * price[key] for key, g in these.items())
        kept |= global_threshold({key: scores[key] for key in these}, budget, cost={key: price[key] for key in these})
    return {key: kept[key] for key in groups}


def _constants(groups: Mapping[str, _Group], kept: Mapping[str, Tensor], stats: Mapping[str, InputStats]) -> dict[str, Tensor]:
    """Layer -> sum over the removed columns of W_:j mean_j."""
    total: dict[str, Tensor] = {}
    for key, group in groups.items():
        for name, matrix, columns in group.readers:
            gone = columns[~kept[key]].flatten()
            if len(gone):
                part = matrix.double().cpu()[:, gone] @ stats[name].mean[gone]
                total[name] = total[name] + part if name in total else part
    return total


def _rows(model: nn.Module, name: str, cut: ChannelPlan) -> Tensor | slice:
    """The outputs of a layer that the cut leaves."""
    out = 1 if is_conv1d(model.get_submodule(name)) else 0
    return cut.slices.get(f"{name}.weight".lstrip("."), {}).get(out, slice(None))
