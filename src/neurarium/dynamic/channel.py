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
grouped convolution; layers on maps of fewer than ``whole_below`` positions it computes whole, and charges so. Counts are rounded up to a
multiple of ``granularity`` (the filters that fill a group are the next by logit; they are computed anyway, so they are used), in training
as well: 1 is the paper's rule, 16 is what vectorised kernels like. Batch normalisation is folded. A row's cost depends on that row alone.
See :mod:`~neurarium.dynamic.channel_conv`.

*Budgets.* A mask that a predictor widens in one layer changes what later predictors see, so no threshold on them has monotone costs.
``budget=`` therefore fixes how many filters each layer keeps and leaves to the predictor which ones: the counts of a setting are what a
common threshold keeps in each layer on average. All rows then cost the same. ``threshold=`` replaces 1/2 in the paper's rule; a higher
one keeps less.

*Source.* Elkerdawy, Elhoushi, Zhang and Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask
Prediction", arXiv 2110.08232.

*Departures.* Rounded counts, unless ``granularity=1``, and layers on small maps whole, unless ``whole_below=1``. Predictors start with a
bias of 2, so that training starts from the dense network, and the softmax is scaled to mean 1, which changes the size of their steps but
not what they can say. After a residual addition all channels are read. The public code multiplies by masks and saves nothing.

*Cost.* 2 H W K^2 k_in k_out FLOPs a layer and row and 2 C_in d^2 C for its predictor. Gathers are no FLOPs, only the clock sees them:
copying the weights of a row costs about as much as convolving a few dozen positions with them. On one thread and 64 rows, with two
layers of 96 filters on maps of 24x24, time against the masked form was 0.47 at a FLOP ratio of 0.21, 0.52 at 0.36 and 0.80 at 0.67; on
maps of 14x14 and less it can exceed that of computing everything, hence ``whole_below``. Groups whose sizes are no multiples of 16 are
slow: single filters save FLOPs and no time. ``chunk`` rows are run at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.channel_conv import ChannelConv, Plan, Target, target_mask
from neurarium.dynamic.channel_trace import rewired
from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.exits import check_labels
from neurarium.dynamic.outcome import Mode, Outcome, Policy, Segment
from neurarium.dynamic.tree import has_nan, parameter_shapes, shapes
from neurarium.errors import BadInput
from neurarium.learn.fit import device_of, to
from neurarium.roles import Loader

__all__ = ["FTWT", "ChannelCurve"]


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
        whole_below: on maps of fewer positions ``compact`` computes every filter, which is faster there; 1 leaves filters out everywhere.
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
        whole_below: int = 100,
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
        self.plan = Plan(granularity, mode == "joint", whole_below)
        self.model = rewired(model, self.plan, embedding, layers)
        found = [m for m in self.model.modules() if isinstance(m, ChannelConv)]
        self.dynamic = tuple(m.name for m in found if m.predictor is not None)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.counts: tuple[int, ...] | None = None
        self.curve: ChannelCurve | None = None
        self.phase = "joint"
        self.chunk: int | None = 64
        self._fixed: dict[Any, tuple[int, dict[str, int]]] = {}

    @property
    def filters(self) -> tuple[int, ...]:
        """Of each dynamic layer."""
        return tuple(self._layer(name).conv.out_channels for name in self.dynamic)

    def _layer(self, name: str) -> ChannelConv:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, ChannelConv)
        return layer

    def _pass(self, x: Tensor, mode: str, **settings: Any) -> tuple[Tensor, Plan]:
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
        if has_nan(x):
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
        key = shapes(example), parameter_shapes(self)
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
                if has_nan(x):
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
                price = torch.as_tensor(self.price(x, rounded), dtype=torch.float64)  # one number if every layer is computed whole
                total, n = total + float(price.expand(len(x)).sum()), n + len(x)
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
