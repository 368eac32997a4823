"""FTWT: before each convolution a tiny predictor says which filters will fire strongly on this input; only those are computed.

What the predictor has to say is known: the layer itself shows which filters carried the activations. So masks are learned by
self-supervision, a classification for each filter, without a sparsity loss to balance; and the FLOPs that will be saved are known from the
trained dense network, before any mask is learned (:meth:`FTWT.predicted_flops`).

*Equations.* o = ReLU(BN(conv(x))), (n, C, H, W).

- *target*: heat a_c = max_{hw} |o_c|, normalised to sum 1 over c and sorted; g keeps the filters whose cumulative mass, their own
  included, is at most ``mass``, and always the strongest; ``mass`` 1 drops nothing but zeros. (``target="uniform"``: all but the
  floor((1 - mass) C) weakest.)
- *predictor*: W softmax(pool(x)) + b, x pooled to 1x1, or to d x d with C_in d^2 near ``embedding``.
- *mask*: m = [sigmoid(logit) > 1/2]; the layer puts out o m, the next one does not read what is zero.
- *loss*: cross-entropy of the task + mean over layers of the binary cross-entropies of logits against g, summed over filters.
  ``"decoupled"``: no gradient of the task reaches a predictor; ``"joint"``: it does, straight through the mask and on into x.
- *schedule* (by ``begin_epoch``): predictors alone on the dense network, then all, then fixed predictors.

*What is run.* ``compact`` gathers, for each row, the weights and the inputs of its own filters and runs the rows of equal size as one
grouped convolution. Counts are rounded up to a multiple of ``granularity`` (the filters that fill a group are the next by logit; they are
computed anyway, so they are used), in training as well: 1 is the paper's rule, 16 is what vectorised kernels like. Batch normalisation is
folded. A row's cost depends on that row alone.

*Budgets.* A mask that a predictor widens in one layer changes what later predictors see, so no threshold on them has monotone costs.
``budget=`` therefore fixes how many filters each layer keeps and leaves to the predictor which ones: the counts of a setting are what a
common threshold keeps in each layer on average. All rows then cost the same. ``threshold=`` replaces 1/2 in the paper's rule; a higher
one keeps less.

*Source.* Elkerdawy, Elhoushi, Zhang and Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask
Prediction", arXiv 2110.08232.

*Departures.* Rounded counts, unless ``granularity=1``. Predictors start with a bias of 2, so that training starts from the dense network,
and the softmax is scaled to mean 1, which changes the size of their steps but not what they can say. After a residual addition all
channels are read. The public code multiplies by masks and saves nothing.

*Cost.* 2 H W K^2 k_in k_out FLOPs a layer and row and 2 C_in d^2 C for its predictor. Gathers are no FLOPs, only the clock sees them:
copying the weights of a row costs about as much as convolving a few dozen positions with them. On one thread and 64 rows, time against the
masked form was 0.51 to 0.57 at a FLOP ratio of 0.46 with 64 and 96 filters on 28x28 and 14x14 maps, 0.58 at 0.33 with 32 and 64 filters
there, but 1.6 at 0.48 on 14x14 to 3x3 maps: leave layers on small maps, and narrow ones, out by ``layers=``. ``chunk`` rows are run at
a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.exits import check_labels
from neurarium.dynamic.outcome import Mode, Outcome, Policy, Segment
from neurarium.dynamic.tree import shapes
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import device_of, to
from neurarium.roles import Loader

__all__ = ["FTWT", "ChannelConv", "ChannelCurve", "MaskPredictor", "target_mask"]

Target = Literal["mass", "uniform"]
PIECE = 16  # rows of one grouped convolution: more fall out of the cache
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
ACTIVATION_CALLS: dict[Any, Callable[[], nn.Module]] = {F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu6: nn.ReLU6, "relu": nn.ReLU}
#: modules and functions that leave a channel of zeros a channel of zeros
CHANNELWISE = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.ReLU, nn.ReLU6,
)  # fmt: skip
CHANNELWISE_CALLS = (
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, F.dropout2d, F.relu, torch.relu, F.relu6,
)  # fmt: skip


def target_mask(output: Tensor, *, mass: float = 0.9, target: Target = "mass") -> Tensor:
    """g: which filters carry the activations ``(n, C, H, W)``, ``(n, C)`` bool."""
    heat = output.detach().abs().amax((2, 3))
    filters = heat.shape[1]
    order = heat.argsort(dim=1, descending=True, stable=True)
    if target == "uniform":
        keep = torch.arange(filters, device=heat.device).expand_as(heat) < max(1, filters - int((1 - mass) * filters))
    else:
        share = (heat.double() / heat.double().sum(1, keepdim=True).clamp(min=1e-30)).gather(1, order)
        keep = share > 1e-5 if mass == 1 else share.cumsum(1) - mass <= 1e-5
        keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, order, keep)


class MaskPredictor(nn.Module):
    """A logit for each filter from the pooled input: ``(n, inputs, h, w) -> (n, filters)``."""

    def __init__(self, inputs: int, filters: int, side: int = 1) -> None:
        super().__init__()
        self.side, self.linear = side, nn.Linear(inputs * side**2, filters)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)) if self.side == 1 else F.adaptive_avg_pool2d(x, self.side).flatten(1)
        return self.linear(pooled.softmax(1) * pooled.shape[1])


@dataclass
class _Plan:
    """What the layers of one policy are to do in a pass, and what they note down."""

    granularity: int
    joint: bool
    mode: str = "masked"  # dense: compute masks, apply none
    threshold: Any = 0.5
    counts: tuple[int, ...] | None = None
    chosen: Callable[[ChannelConv, Tensor, Tensor | None], Tensor] | None = None  # other masks than the predictors' (masked mode)
    kept: dict[str, Tensor] = field(default_factory=dict)  # layer -> (n, filters) bool
    seen: dict[str, tuple[Tensor, Tensor]] | None = None  # layer -> logits, output before its mask
    spent: Tensor | None = None

    def round(self, count: Any, filters: int) -> Any:
        """The next count that is run."""
        step = self.granularity
        up = (count + step - 1) // step * step
        return up.clamp(min(step, filters), filters) if isinstance(up, Tensor) else max(min(step, filters), min(up, filters))

    def keep(self, layer: ChannelConv, logits: Tensor) -> Tensor:
        filters = logits.shape[1]
        if self.counts is None:
            count = self.round((logits.sigmoid() > self.threshold).sum(1, keepdim=True), filters)
        else:
            count = torch.full_like(logits[:, :1], self.counts[layer.index], dtype=torch.int64)
        if torch.compiler.is_exporting():  # ONNX has no stable sort: a filter's place is how many are before it
            here, other = logits[:, :, None], logits[:, None, :]
            earlier = torch.ones(filters, filters, dtype=torch.bool, device=logits.device).tril(-1)
            return ((other > here) | (other == here) & earlier).sum(2) < count
        order = logits.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(filters, device=logits.device) < count
        return torch.zeros_like(first).scatter(1, order, first)


class ChannelConv(nn.Module):
    """A convolution, its batch normalisation and its ReLU, of which single filters can be left out for single rows.

    Without a predictor every filter is computed, but only those inputs are read that the layer ``source`` has kept.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module | None, predictor: MaskPredictor | None, plan: _Plan
    ) -> None:
        super().__init__()
        self.conv, self.norm, self.activation, self.predictor, self.plan = conv, norm, activation, predictor, plan
        self.name, self.index, self.source = "", -1, ""

    @property
    def depthwise(self) -> bool:
        return self.conv.groups > 1

    def flops(self, inputs: Any, filters: Any, places: int) -> Any:
        """Of one row: ``filters`` computed from ``inputs`` at ``places`` positions."""
        size = self.conv.weight[0, 0].numel()
        return 2 * places * size * filters * (1 if self.depthwise else inputs)

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        if plan.mode == "compact":
            return self.compact(x)
        out = self.conv(x)
        out = out if self.norm is None else self.norm(out)
        out = out if self.activation is None else self.activation(out)
        if self.predictor is None:
            if plan.seen is not None:
                plan.seen[self.name] = out, out
            return out
        logits = self.predictor(x if plan.joint else x.detach())
        if plan.seen is not None:
            plan.seen[self.name] = logits, out
        if plan.mode == "dense":
            return out
        keep = plan.keep(self, logits) if plan.chosen is None else plan.chosen(self, logits, out)
        plan.kept[self.name] = keep
        mask = keep.to(out.dtype)
        if plan.joint:
            p = logits.sigmoid()
            mask = mask + (p - p.detach())
        return out * mask[:, :, None, None]

    def compact(self, x: Tensor) -> Tensor:
        """Only the kept filters, from the kept inputs; zeros elsewhere."""
        plan, (n, width), filters = self.plan, x.shape[:2], self.conv.out_channels
        keep = plan.keep(self, self.predictor(x)) if self.predictor is not None else None
        given = None if self.depthwise else plan.kept.get(self.source)
        if keep is not None:
            plan.kept[self.name] = keep
        every = torch.ones((), dtype=torch.int64, device=x.device)
        inputs = (every * width).expand(n) if given is None else given.sum(1)
        outputs = (every * filters).expand(n) if keep is None else keep.sum(1)
        weight, bias = self.folded()
        kind = inputs * (filters + 1) + outputs
        kinds = kind.unique().tolist()
        if kinds == [width * (filters + 1) + filters]:
            result = self._finish(self._convolve(x, weight, bias, self.conv.groups))
        else:
            result, parts = None, []
            for value in kinds:
                i, o = divmod(value, filters + 1)
                rest = None if i == width else given, None if o == filters else keep
                parts += [(where, *rest) for where in (kind == value).nonzero().squeeze(1).split(PIECE)]
            for where, read, write in parts:
                if read is None and write is None:
                    part = self._finish(self._convolve(x.index_select(0, where), weight, bias, self.conv.groups))
                    slots = (where[:, None] * filters + torch.arange(filters, device=x.device)).flatten()
                else:
                    part, slots = self._gathered(x, where, read, write, weight, bias)
                if result is None:
                    result = x.new_zeros(n, filters, *part.shape[-2:])
                result.view(n * filters, *part.shape[-2:]).index_copy_(0, slots, part.reshape(-1, *part.shape[-2:]))
        if plan.spent is not None:
            plan.spent = plan.spent + self.flops(inputs, outputs, result[0, 0].numel())
        return result

    def _gathered(
        self, x: Tensor, where: Tensor, given: Tensor | None, keep: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rows ``where`` as one grouped convolution, one group a row; and where its channels belong among all rows' filters."""
        m, width, filters = len(where), x.shape[1], len(weight)
        out = self._chosen(keep, where, filters)  # (m, k_out)
        slots = (where[:, None] * filters + out).flatten()
        if self.depthwise:
            part = x.flatten(0, 1).index_select(0, slots)[None]
            w, groups = weight.index_select(0, out.flatten()), len(slots)
        else:
            read = self._chosen(given, where, width)  # (m, k_in)
            part = x.flatten(0, 1).index_select(0, (where[:, None] * width + read).flatten())[None]
            if given is None:
                w = weight.index_select(0, out.flatten())
            else:
                pairs = (out[:, :, None] * width + read[:, None, :]).flatten()
                w = weight.flatten(0, 1).index_select(0, pairs).view(len(slots), read.shape[1], *weight.shape[2:])
            groups = m
        part = self._convolve(part, w, None if bias is None else bias.index_select(0, out.flatten()), groups)
        return self._finish(part), slots

    @staticmethod
    def _chosen(mask: Tensor | None, where: Tensor, width: int) -> Tensor:
        if mask is None:
            return torch.arange(width, device=where.device).expand(len(where), width)
        return mask.index_select(0, where).nonzero()[:, 1].view(len(where), -1)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding, self.conv.dilation, groups)

    def _finish(self, out: Tensor) -> Tensor:
        return out if self.activation is None else self.activation(out)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the running statistics of the normalisation folded in."""
        weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
        if norm is None:
            return weight, bias
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = (0 if bias is None else bias) - norm.running_mean
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias
        return weight * scale[:, None, None, None], shift


@dataclass(frozen=True, eq=False)
class ChannelCurve:
    """The settings that budgets choose from, cheapest first.

    Attributes:
        counts: ``(settings, layers)`` filters kept.
        accuracy: ``(settings,)`` on the calibration rows.
    """

    counts: Tensor
    accuracy: Tensor


class FTWT(Policy):
    """A copy of a trained convolutional network that computes for each row only the filters that will matter.

    Args:
        model: any model that ``torch.fx`` can trace: every Conv2d (ungrouped or depthwise), its BatchNorm2d if it has one, and its ReLU
            become a :class:`ChannelConv`; a convolution without ReLU that reads one skips what that one left out; the rest stays.
        mass: of the activations that the target mask keeps.
        mode: ``"decoupled"`` or ``"joint"``.
        target: ``"mass"`` or ``"uniform"``.
        embedding: size of what a predictor reads, 1x1 pooling without it.
        layers: names of the convolutions to make dynamic; all that can be without it.
        granularity: filters are kept in multiples of this many.
        warmup_epochs: epochs of predictors alone; freeze_after: the epoch from which on predictors are fixed (half of all, in the paper).

    ``Outcome.choice`` is ``(n, layers)``: how many filters each layer kept. The layers' names are ``layers``.
    """

    #: an exported program multiplies by masks instead of leaving filters out, and charges for it
    exports_masked = True

    def __init__(
        self,
        model: nn.Module,
        *,
        mass: float = 0.9,
        mode: Literal["decoupled", "joint"] = "decoupled",
        target: Target = "mass",
        embedding: int | None = None,
        layers: Sequence[str] | None = None,
        granularity: int = 16,
        warmup_epochs: int = 1,
        freeze_after: int | None = None,
    ) -> None:
        super().__init__()
        if not mass > 0:
            raise BadInput(f"mass must be above 0, not {mass}")
        if mode not in ("decoupled", "joint") or target not in ("mass", "uniform"):
            raise BadInput(f"mode is 'decoupled' or 'joint' and target 'mass' or 'uniform', not {mode!r} and {target!r}")
        if granularity < 1 or (embedding is not None and embedding < 1):
            raise BadInput(f"granularity and embedding must be at least 1, not {granularity} and {embedding}")
        self.mass, self.target, self.warmup_epochs, self.freeze_after = mass, target, warmup_epochs, freeze_after
        self.plan = _Plan(granularity, mode == "joint")
        self.model = _rewired(model, self.plan, embedding, layers)
        found = [m for m in self.model.modules() if isinstance(m, ChannelConv)]
        self.dynamic = tuple(m.name for m in found if m.predictor is not None)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.counts: tuple[int, ...] | None = None
        self.curve: ChannelCurve | None = None
        self.phase = "joint"
        self.chunk: int | None = 32
        self._fixed: dict[Any, tuple[int, dict[str, int]]] = {}

    @property
    def filters(self) -> tuple[int, ...]:
        """Of each dynamic layer."""
        return tuple(self._layer(name).conv.out_channels for name in self.dynamic)

    def _layer(self, name: str) -> ChannelConv:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, ChannelConv)
        return layer

    def _pass(self, x: Tensor, mode: str, **settings: Any) -> tuple[Tensor, _Plan]:
        """The model's output, and the plan with what was noted during the pass."""
        plan, now = self.plan, {"threshold": self.threshold, "counts": self.counts, **settings}
        plan.mode, plan.kept, plan.threshold, plan.counts = mode, {}, now["threshold"], now["counts"]
        plan.seen, plan.spent = now.get("seen"), now.get("spent")
        try:
            out = self.model(x)
            return out, copy.copy(plan)
        finally:
            plan.mode, plan.kept, plan.threshold, plan.counts, plan.seen, plan.spent = "masked", {}, 0.5, None, None, None

    def decide(self, x: Any, *, budget: float | None = None, threshold: float | None = None, mode: Mode = "compact") -> Outcome:
        if mode not in ("compact", "masked", "loop"):
            raise BadInput(f"mode must be 'compact', 'masked' or 'loop', not {mode!r}")
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0:
            raise BadInput("the input must be a batch of images (n, channels, height, width) with at least one row")
        if x.isnan().any():
            raise BadInput("the input has NaN")
        level, counts = self.setting(x, budget=budget, threshold=threshold)
        fixed, full = self.geometry(x)[0], self.full(x)
        parts = x.split({"masked": len(x), "compact": self.chunk or len(x), "loop": 1}[mode])
        outputs, costs, choices = [], [], []
        for part in parts:
            begun = None if mode == "masked" else torch.full((len(part),), fixed, dtype=torch.int64, device=x.device)
            out, plan = self._pass(part, "masked" if mode == "masked" else "compact", threshold=level, counts=counts, spent=begun)
            outputs.append(out)
            costs.append(torch.full((len(part),), full, dtype=torch.int64, device=x.device) if begun is None else plan.spent)
            choices.append(torch.stack([plan.kept[name].sum(1) for name in self.dynamic], 1))
        if len(parts) == 1:
            return Outcome(outputs[0], costs[0], choices[0])
        return Outcome(torch.cat(outputs), torch.cat(costs), torch.cat(choices))

    def setting(self, x: Any, *, budget: float | None = None, threshold: float | None = None) -> tuple[Tensor, tuple[int, ...] | None]:
        """The threshold on the predicted probabilities, and filters a layer (None: as many as pass the threshold)."""
        if budget is not None and threshold is not None:
            raise BadInput("give a budget or a threshold, not both")
        if threshold is not None:
            return torch.full_like(self.threshold, threshold), None
        if budget is None:
            return self.threshold, self.counts
        if self.curve is None:
            raise BadInput("a budget needs a calibrated policy: call calibrate(loader) first")
        settings = [tuple(c) for c in self.curve.counts.tolist()]
        prices = [self.price(x, c) for c in settings]
        fits = [c for c, p in zip(settings, prices) if p <= budget]
        if not fits:
            raise BadInput(f"a budget of {budget:g} FLOPs a row is below the cheapest setting: the smallest feasible one is {prices[0]}")
        return self.threshold, fits[-1]

    def use(self, x: Any = None, *, budget: float | None = None, threshold: float | None = None) -> FTWT:
        """Make a budget (for inputs shaped like ``x``) or a threshold the current setting."""
        level, self.counts = self.setting(x, budget=budget, threshold=threshold)
        self.threshold.copy_(level)
        return self

    def masked(self, x: Any) -> Tensor:
        return self._pass(x, "masked")[0]

    def outputs(self, x: Any) -> list[Tensor]:
        return [self.masked(x)]

    def segments(self) -> Sequence[Segment]:
        return [self.masked]

    def full(self, example: Any) -> int:
        """FLOPs a row of the dense network and all predictors."""
        return super().costs(example).full

    def geometry(self, example: Any) -> tuple[int, dict[str, int]]:
        """FLOPs a row outside the dynamic convolutions, and the number of output positions of each of those, for this input shape."""
        key = shapes(example), tuple(p.shape for p in self.parameters())
        if key not in self._fixed:
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            full = self.full(example)
            with evaluating(self), torch.inference_mode():
                self._pass(example[:1], "dense", seen=seen)
            places = {name: out[0, 0].numel() for name, (_, out) in seen.items()}
            self._fixed[key] = full - self._convolved(places, self.filters), places
        return self._fixed[key]

    def _convolved(self, places: dict[str, int], counts: Sequence[Any]) -> Any:
        """FLOPs of all dynamic convolutions, given how many filters each layer keeps."""
        kept = dict(zip(self.dynamic, counts))
        total: Any = 0
        for name, where in places.items():
            layer = self._layer(name)
            total = total + layer.flops(kept.get(layer.source, layer.conv.in_channels), kept.get(name, layer.conv.out_channels), where)
        return total

    def price(self, example: Any, counts: Sequence[Any]) -> Any:
        """FLOPs of a row that keeps ``counts`` filters, one number (or one tensor of a number a row) a layer."""
        fixed, places = self.geometry(example)
        return fixed + self._convolved(places, counts)

    def program(self, example: Any) -> Any:
        """The masked form of every setting that a budget picks, and of the current one, for :func:`~neurarium.dynamic.compile.split`.

        Filters are masked there, not left out: every row is charged the full price.
        """
        from neurarium.dynamic.compile import Builder

        counts = [] if self.curve is None else [tuple(c) for c in self.curve.counts.tolist()]
        build = Builder(example)
        build.switch(range(len(counts) + 1))
        for setting, fixed in enumerate([*counts, self.counts]):
            build.at(setting)
            output, choice = build.call(_Masked(self, fixed), build.inputs, cost=self.full(example))
            build.leave(output, choice=choice)
        menu = [{"cost": float(self.price(example, c)), "setting": k} for k, c in enumerate(counts)]
        return build.program(setting=len(counts), menu=menu, settings=range(len(counts) + 1))

    def costs(self, example: Any) -> CostTable:
        """The cheapest path (the fewest filters everywhere), and what the dense network adds."""
        least = self.price(example, [self.plan.round(1, f) for f in self.filters])
        return CostTable((least, self.full(example) - least))

    @torch.no_grad()
    def calibrate(self, loader: Loader, *, grid: int = 16) -> ChannelCurve:
        """Find and measure up to ``grid`` settings: one pass for the logits, one for the accuracy of each."""
        if grid < 2:
            raise BadInput(f"grid must be at least 2 settings (cheapest and dearest), not {grid}")
        device, kept = device_of(self), []
        levels = torch.linspace(-8, 8, 257, dtype=torch.float64)
        with evaluating(self):
            batches = [(to(x, device), to(y, device)) for x, y in loader]
            if not batches:
                raise BadInput("the loader yielded no samples to calibrate on")
            for x, _ in batches:
                if x.isnan().any():
                    raise BadInput("the calibration data has NaN")
                seen: dict[str, tuple[Tensor, Tensor]] = {}
                self._pass(x, "masked", seen=seen, counts=None)
                # (levels, layers): filters above each logit, summed over rows
                logits = [seen[name][0].double().cpu().flatten().sort().values for name in self.dynamic]
                kept.append(torch.stack([len(v) - torch.searchsorted(v, levels, right=True) for v in logits], 1))
            n = sum(len(x) for x, _ in batches)
            mean = (torch.stack(kept).sum(0) / n).ceil().long().flip(0)  # cheapest first
            limits = torch.tensor([[self.plan.round(1, f) for f in self.filters], list(self.filters)])
            rounded = torch.stack([self.plan.round(mean[:, i], f) for i, f in enumerate(self.filters)], 1)
            every = torch.cat([limits[:1], rounded, limits[1:]]).unique_consecutive(dim=0)
            counts = every[torch.linspace(0, len(every) - 1, min(grid, len(every))).round().long()]
            right = torch.zeros(len(counts), dtype=torch.float64)
            for x, y in batches:
                for s, c in enumerate(counts.tolist()):
                    right[s] += float((self._pass(x, "masked", counts=tuple(c))[0].argmax(1) == y).sum())
        self.curve = ChannelCurve(counts, right / n)
        return self.curve

    @torch.no_grad()
    def predicted_flops(self, loader: Loader) -> float:
        """Mean FLOPs a row if every predictor gave the target masks of the network as it is now: known before training."""
        total, n = 0.0, 0
        with evaluating(self):
            for x, _ in loader:
                x, seen = to(x, device_of(self)), {}
                self._pass(x, "dense", seen=seen)
                counts = [self.goal(seen[name][1]).sum(1) for name in self.dynamic]
                rounded = [self.plan.round(c, f) for c, f in zip(counts, self.filters)]
                total, n = total + float(self.price(x, rounded).sum()), n + len(x)
        if n == 0:
            raise BadInput("the loader yielded no samples to predict from")
        return total / n

    def goal(self, output: Tensor) -> Tensor:
        """The target mask of a layer's output."""
        return target_mask(output, mass=self.mass, target=self.target)

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        del step
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        alone = self.phase == "predictors"
        with evaluating(self.model) if alone else nullcontext():  # the dense network is a constant then
            logits, _ = self._pass(x, "dense" if alone else "masked", seen=seen, counts=None)
        check_labels(y, logits)
        if self.phase == "frozen":
            return F.cross_entropy(logits, y)
        losses = [
            F.binary_cross_entropy_with_logits(said, self.goal(out).to(said), reduction="none").sum(1).mean()
            for said, out in (seen[name] for name in self.dynamic)
        ]
        masks = torch.stack(losses).mean()
        return masks if alone else F.cross_entropy(logits, y) + masks

    def trainable(self, step: int = 0) -> list[nn.Parameter]:
        del step
        predictors = {id(p) for p in self.predictors()}
        wanted = {"predictors": (True,), "joint": (True, False), "frozen": (False,)}[self.phase]
        return [p for p in self.parameters() if p.requires_grad and (id(p) in predictors) in wanted]

    def predictors(self) -> list[nn.Parameter]:
        """The parameters of all predictors."""
        return [p for name in self.dynamic for p in self._layer(name).predictor.parameters()]  # type: ignore[union-attr]

    def groups(self, lr: float = 0.01, predictor_lr: float = 0.1, weight_decay: float = 5e-4) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: predictors learn faster and do not decay."""
        mine = self.predictors()
        ids = {id(p) for p in mine}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        return [{"params": rest, "lr": lr, "weight_decay": weight_decay}, {"params": mine, "lr": predictor_lr, "weight_decay": 0.0}]

    def begin_epoch(self, epoch: int, step: int, loader: Loader) -> None:
        del step, loader
        frozen = self.freeze_after is not None and epoch >= self.freeze_after
        self.phase = "predictors" if epoch < self.warmup_epochs else "frozen" if frozen else "joint"

    def get_extra_state(self) -> Tensor:
        layers = len(self.dynamic)
        now = torch.tensor([-1.0] * layers if self.counts is None else self.counts, dtype=torch.float64)
        if self.curve is None:
            return torch.cat([now, now.new_zeros(1)])[None]
        settings = torch.cat([self.curve.counts.double(), self.curve.accuracy[:, None]], 1)
        return torch.cat([torch.cat([now, now.new_zeros(1)])[None], settings])

    def set_extra_state(self, state: Tensor) -> None:
        state = state.cpu()
        self.counts = None if state[0, 0] < 0 else tuple(state[0, :-1].long().tolist())
        self.curve = ChannelCurve(state[1:, :-1].long(), state[1:, -1]) if len(state) > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fixed": {}}


class _Masked(nn.Module):
    """Output and kept filters of one setting."""

    def __init__(self, policy: FTWT, counts: tuple[int, ...] | None) -> None:
        super().__init__()
        self.policy, self.counts = policy, counts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, plan = self.policy._pass(x, "masked", counts=self.counts)
        return out, torch.stack([plan.kept[name].sum(1) for name in self.policy.dynamic], 1)


def _rewired(model: nn.Module, plan: _Plan, embedding: int | None, layers: Sequence[str] | None) -> fx.GraphModule:
    """A traced copy in which convolutions, norms and activations are :class:`ChannelConv`."""
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:
        raise UnsupportedModel(f"cannot be traced: {error}", module=type(model).__name__) from error
    modules = dict(traced.named_modules())
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    source: dict[fx.Node, str] = {}
    index, found = 0, []
    for node in list(traced.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and _plain(module) and calls.count(str(node.target)) == 1:
            name, tail = str(node.target), _tail(node, modules)
            given = source.get(node.args[0], "")  # type: ignore[arg-type]
            if tail is not None and (layers is None or name in layers):
                norm, activation, merged = tail
                side = 1 if embedding is None else max(1, round((embedding / module.in_channels) ** 0.5))
                predictor = MaskPredictor(module.in_channels, module.out_channels, side).to(module.weight)
                layer = ChannelConv(module, norm, activation, predictor, plan)
                merged[-1].replace_all_uses_with(node)
                for extra in reversed(merged):
                    traced.graph.erase_node(extra)
                layer.index, index = index, index + 1
                source[node] = name
            elif given and module.groups == 1:
                layer = ChannelConv(module, None, None, None, plan)
            else:
                found += [name] if tail is not None else []
                continue
            layer.name, layer.source = name, given
            layer.train(module.training)
            found += [name] if tail is not None else []
            traced.set_submodule(name, layer)
        elif node.args and node.args[0] in source and (isinstance(module, CHANNELWISE) or node.target in CHANNELWISE_CALLS):
            source[node] = source[node.args[0]]
    if layers is not None and (unknown := [name for name in layers if name not in found]):
        raise BadInput(f"{unknown[0]!r} is no convolution that a ReLU follows; those are {found}")
    if not index:
        raise UnsupportedModel("has no Conv2d that a ReLU follows (with a BatchNorm2d between or not)", module=type(model).__name__)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _plain(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return conv.padding_mode == "zeros" and (conv.groups == 1 or depthwise)


def _tail(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[nn.Module | None, nn.Module, list[fx.Node]] | None:
    """The normalisation and the activation that follow a convolution and are its only use, and their nodes."""
    norm, between = None, []
    after = _only(node)
    module = modules.get(str(after.target)) if after is not None and after.op == "call_module" else None
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        norm, between = module, [after]
        after = _only(after)
    if after is None:
        return None
    if after.op == "call_module" and isinstance(modules.get(str(after.target)), ACTIVATIONS):
        return norm, type(modules[str(after.target)])(inplace=True), [*between, after]
    if after.op in ("call_function", "call_method") and after.target in ACTIVATION_CALLS:
        return norm, ACTIVATION_CALLS[after.target](inplace=True), [*between, after]
    return None


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
