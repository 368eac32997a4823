"""AdaPT: training in fixed point, each layer in the shortest format that its weights and gradients need at the time.

The format <WL, FL> holds the multiples of 2^-FL in [-2^(WL-FL-1), 2^(WL-FL-1) - 2^-FL]. Forward and backward pass see each layer's weights
rounded stochastically to its format; the update goes to float copies. Formats change while the network learns, after `lookback` steps of
a layer each time:

    push down   the smallest FL, then the smallest WL, for which the histogram of the rounded weights is that of the weights:
                KL(hist(w) || hist(Q(w))) = 0, with `resolution` bins over one range
    push up     the gradients of the window, each of norm 1, have the diversity Delta = sum ||g|| / ||sum g|| >= 1: 1 if they agree,
                sqrt(n) if they are orthogonal. With a = log Delta - 1 > 0:
                    s1 = max(ceil(1 / a^2), 1)      s2 = max(min(ceil(32 a^2), 32) - FL, 0)
                    FL grows by min(s1, s2), ceil of their mean, or max(s1, s2), as the strategy says; without disagreement by 1
    strategy    min where the loss is below its mean over the last average lookback; else one further in min -> mean -> max
    lookback    towards (largest lookback) / Delta, with momentum 0.33; at its bounds the resolution moves by one bin
    bounds      FL <= 32 - buffer, WL = max(WL, FL) + 1, FL + buffer <= WL <= 32

The loss gets l1 ||W||_1 + l2 / 2 ||W||^2 and a penalty of (WL / 32) times the non-zero share, summed over the layers. Gradients are
divided by their norm, tensor by tensor.

*Source*: Kummer, Sidak, Reichmann, Gansterer, "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized training approach for
DNNs", 2021 (arXiv 2107.13490), sections 3 and 4; and its performance model, of which the training overhead is reconstructed.

*Departures*: the Kullback-Leibler divergence is that of its definition (zero exactly where the histograms are equal); both searches bisect,
FL over 0 .. 32 - buffer at WL = 32, then WL at that FL. The penalty is a number without gradient: it is reported in the loss's history,
and the norms alone train. Gradients are rounded to the layer's format after the division by their norm, stochastically, with 8 more
fraction bits, as a tensor of norm 1 has entries far below the weights'. `init_weights` starts from a truncated normal of variance
1 / fan-in; a trained network starts as it is.

*Cost*: a rounding of weights and gradients a step, a norm and a sum of gradients (one float a weight) kept, about 10 histograms a window.
No speed is gained in float arithmetic: :func:`speedups` is a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.calibrate import is_conv1d
from neurarium.compress.quant.fixedpoint import fixed_point
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, History, call, evaluate, find_loss, loop, trainable

__all__ = ["AdaPT", "Precision", "divergence", "diversity", "init_weights", "push_down", "push_up", "size_ratio", "speedups", "weight_plan"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_STRATEGIES = ("min", "mean", "max")
_SGD = partial(SGD, lr=0.03, momentum=0.9)


def same_histogram(a: Tensor, b: Tensor, bins: int) -> bool:
    """Whether KL(hist(a) || hist(b)) is 0: both have the same counts in equal bins over the range of the two."""
    low, high = float(torch.minimum(a.min(), b.min())), float(torch.maximum(a.max(), b.max()))
    if low == high:
        return True
    return torch.equal(*(torch.histc(t.double(), bins, low, high) for t in (a, b)))


def divergence(a: Tensor, b: Tensor, bins: int) -> float:
    """KL(hist(a) || hist(b)) in nats; infinite where a has numbers in a bin that b leaves empty."""
    low, high = float(torch.minimum(a.min(), b.min())), float(torch.maximum(a.max(), b.max()))
    if low == high:
        return 0.0
    p, q = (torch.histc(t.double(), bins, low, high) / t.numel() for t in (a, b))
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())


def push_down(weight: Tensor, bins: int, *, buffer_bits: int = 8) -> tuple[int, int]:
    """The shortest format (WL, FL) in which the weight, rounded to nearest, keeps its histogram: first FL, then WL by bisection."""
    frac = _least(0, 32 - buffer_bits, lambda f: same_histogram(weight, fixed_point(weight, 32, f, rounding="nearest"), bins))
    word = _least(frac + 1, 32, lambda w: same_histogram(weight, fixed_point(weight, w, frac, rounding="nearest"), bins))
    return word, frac


def _least(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The least number in low..high that is enough, taking for granted that more is enough too; high if none is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def diversity(norms: float, total: Tensor) -> float:
    """Delta = (sum of the gradients' norms) / (norm of their sum), at least 1."""
    return max(norms / max(float(total.norm()), 1e-12), 1.0)


def push_up(word: int, frac: int, delta: float, strategy: str, *, buffer_bits: int = 8) -> tuple[int, int]:
    """The format (WL, FL) after the fraction has grown as the diversity asks."""
    a = math.log(delta) - 1
    if a > 0:
        s1 = max(math.ceil(1 / a**2), 1)
        s2 = max(min(math.ceil(32 * a**2), 32) - frac, 0)
        grow = {"min": min(s1, s2), "mean": math.ceil((s1 + s2) / 2), "max": max(s1, s2)}[strategy]
    else:
        grow = 1
    frac += grow
    word = max(word, frac) + 1
    frac = min(frac, 32 - buffer_bits)
    return min(max(word, frac + buffer_bits), 32), frac


@dataclass
class Precision:
    """The format and the window of one layer."""

    word: int
    frac: int
    lookback: float
    bins: int
    steps: int = 0
    norms: float = 0.0
    total: Tensor | None = None


class _State:
    """What a run knows beside weights and optimizer: formats, windows, the loss's past. Saved and restored with the history."""

    def __init__(self, layers: Mapping[str, nn.Module], learner: AdaPT) -> None:
        word, frac = learner.init
        self.layers = {name: Precision(word, frac, float(learner.lookback[0]), learner.resolution[1] // 2 or 1) for name in layers}
        self.strategy, self.losses = 0, list[float]()
        self.rows: dict[str, list[float]] = {f"{k}/{name}": [] for name in layers for k in ("word", "frac", "sparsity")}

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": {name: dict(vars(p)) for name, p in self.layers.items()}, "strategy": self.strategy, "losses": list(self.losses),
            "rows": {k: list(v) for k, v in self.rows.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.layers = {name: Precision(**p) for name, p in state["layers"].items()}
        self.strategy, self.losses = state["strategy"], list(state["losses"])
        self.rows = {k: list(v) for k, v in state["rows"].items()}


@dataclass(frozen=True)
class AdaPT(Backprop):
    """Trains in fixed point whose word and fraction lengths adapt, layer by layer.

    Args:
        loss, schedule, clip, groups: as of :class:`~neurarium.learn.fit.Backprop`.
        optimizer: makes the optimizer; gradients have norm 1 when it sees them.
        lookback: least and largest number of steps between two changes of a layer's format.
        resolution: least and largest number of histogram bins.
        buffer_bits: bits in front of the fraction that are always kept.
        l1, l2: weights of the norms; ``penalty``: weight of the reported penalty.
        strategy: "adaptive", or "min", "mean", "max" throughout.
        init: (WL, FL) of all layers at the start.
        down, up: whether formats are pushed down and up; without both the format is fixed.
        quantise: False trains in float, with the same gradients of norm 1: the baseline.

    ``history.extra`` holds, for each layer and step, ``word/NAME``, ``frac/NAME`` and ``sparsity/NAME``. The model ends with weights
    in its final formats (rounded to nearest): there is no float refinement. ``history.state`` keeps the float weights to go on from.
    """

    optimizer: Callable[..., Optimizer] = _SGD
    lookback: tuple[int, int] = (10, 100)
    resolution: tuple[int, int] = (1, 100)
    buffer_bits: int = 8
    l1: float = 1e-5
    l2: float = 1e-4
    penalty: float = 0.0
    strategy: str = "adaptive"
    init: tuple[int, int] = (8, 4)
    down: bool = True
    up: bool = True
    quantise: bool = True

    def __post_init__(self) -> None:
        for name in ("lookback", "resolution"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise BadInput(f"{name} must be (least, largest) with 1 <= least <= largest, got {(low, high)}")
        if self.strategy not in ("adaptive", *_STRATEGIES):
            raise BadInput(f"strategy must be 'adaptive', 'min', 'mean' or 'max', got {self.strategy!r}")
        word, frac = self.init
        if not 1 <= word <= 32 or not 0 <= frac <= 32 - self.buffer_bits or not 0 <= self.buffer_bits < 32:
            raise BadInput(f"init must be (WL, FL) with 1 <= WL <= 32 and 0 <= FL <= 32 - buffer_bits, got {self.init}, {self.buffer_bits}")

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if device is not None:
            model.to(device)
        layers = _layers(model)
        parameters = trainable(model)
        optimizer = self.optimizer(parameters if self.groups is None else self.groups(model))
        schedule = None if self.schedule is None else self.schedule(optimizer)
        state = _State(layers, self)
        held = {name: [p for p in (m.weight, m.bias) if p is not None and p.requires_grad] for name, m in layers.items()}

        def step(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            with self._rounded(held, state, "stochastic"):
                output = call(model, x)
                loss = find_loss(self.loss)(output, y)
                weights = [m.weight for m in layers.values() if m.weight.requires_grad]
                norms = [self.l1 * w.abs().sum() + 0.5 * self.l2 * w.square().sum() for w in weights]
                (loss + torch.stack(norms).sum() if norms else loss).backward()
                for name, m in layers.items():
                    self._note(state, name, m.weight.detach())
            if torch.isfinite(loss.detach()):
                self._normalise(parameters, held, state)
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, self.clip)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                if self.quantise:
                    self._adapt(state, layers, float(loss.detach()))
            used = [p.word / 32 * float((layers[n].weight != 0).float().mean()) for n, p in state.layers.items()] if self.penalty else []
            return loss + self.penalty * sum(used), output if isinstance(output, Tensor) else None

        def judge(data: Any) -> Mapping[str, float]:
            with self._rounded(held, state):
                return evaluate(model, data, loss=self.loss)

        history = loop(
            model, loader, epochs=epochs, step=step, parts={"optimizer": optimizer, "schedule": schedule, "formats": state}, val=val,
            evaluator=judge, seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip
        self._round(held, state)
        return History(history.train, history.val, history.steps, {**history.extra, **state.rows}, history.state)

    @torch.no_grad()
    def _round(self, held: Mapping[str, Sequence[nn.Parameter]], state: _State, rounding: str = "nearest") -> None:
        for name, ps in held.items():
            for p in ps:
                if self.quantise and torch.isfinite(p).all():  # else the loss will say so
                    p.copy_(fixed_point(p, state.layers[name].word, state.layers[name].frac, rounding=rounding))

    @contextmanager
    def _rounded(self, held: Mapping[str, Sequence[nn.Parameter]], state: _State, rounding: str = "nearest") -> Iterator[None]:
        """The layers' weights in their formats for the block; the float ones afterwards."""
        master = {p: p.detach().clone() for ps in held.values() for p in ps}
        try:
            self._round(held, state, rounding)
            yield
        finally:
            with torch.no_grad():
                for p, w in master.items():
                    p.copy_(w)

    def _note(self, state: _State, name: str, used: Tensor) -> None:
        p = state.layers[name]
        row = (p.word, p.frac, float((used == 0).float().mean())) if self.quantise else (32, 32, float((used == 0).float().mean()))
        for key, value in zip(("word", "frac", "sparsity"), row, strict=True):
            state.rows[f"{key}/{name}"].append(float(value))

    @torch.no_grad()
    def _normalise(self, parameters: Sequence[nn.Parameter], held: Mapping[str, Sequence[nn.Parameter]], state: _State) -> None:
        """Gradients to norm 1, tensor by tensor; those of the layers in fixed point, and into the layers' windows."""
        for p in parameters:
            if p.grad is not None:
                p.grad.div_(p.grad.norm().clamp_min(1e-12))
        if not self.quantise:
            return
        for name, ps in held.items():
            f = state.layers[name]
            for p in ps:
                if p.grad is not None and torch.isfinite(p.grad).all():
                    frac = min(f.frac + 8, 30)
                    p.grad.copy_(fixed_point(p.grad, min(frac + 2, 32), frac))
            if (g := ps[0].grad if ps else None) is not None:
                f.steps, f.norms = f.steps + 1, f.norms + float(g.norm())
                f.total = g.clone() if f.total is None else f.total + g

    def _adapt(self, state: _State, layers: Mapping[str, nn.Module], loss: float) -> None:
        due = {name: p for name, p in state.layers.items() if p.total is not None and p.steps >= p.lookback}
        window = max(round(sum(p.lookback for p in state.layers.values()) / len(state.layers)), 1)
        if due and len(state.losses) >= window:
            better = loss < sum(state.losses[-window:]) / window
            state.strategy = 0 if better else min(state.strategy + 1, 2)
        state.losses = [*state.losses[-self.lookback[1] :], loss]
        strategy = _STRATEGIES[state.strategy] if self.strategy == "adaptive" else self.strategy
        for name, p in due.items():
            delta = diversity(p.norms, p.total)
            if self.down:
                p.word, p.frac = push_down(layers[name].weight.detach(), p.bins, buffer_bits=self.buffer_bits)
            if self.up:
                p.word, p.frac = push_up(p.word, p.frac, delta, strategy, buffer_bits=self.buffer_bits)
            low, high = self.lookback
            wanted = min(max(high / delta, low), high)
            p.lookback = 0.33 * p.lookback + 0.67 * wanted
            if p.lookback >= high - 0.5:
                p.bins = min(p.bins + 1, self.resolution[1])
            elif p.lookback <= low + 0.5:
                p.bins = max(p.bins - 1, self.resolution[0])
            p.steps, p.norms, p.total = 0, 0.0, None


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that get a format: linear maps and convolutions; of several that share a weight, the first."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, m in model.named_modules():
        if (type(m) in _KINDS or is_conv1d(m)) and "weight" in m._parameters and id(m.weight) not in seen:
            seen.add(id(m.weight))
            found[name] = m
    if not found:
        raise UnsupportedModel("has no linear layer or convolution to keep in fixed point", module=type(model).__name__)
    return found


@torch.no_grad()
def init_weights(model: nn.Module, *, scale: float = 1.0, seed: int = 0) -> nn.Module:
    """Draws the weights of Linear and Conv2d layers from a normal of variance scale / fan-in, cut at two deviations, in place."""
    draw = torch.Generator().manual_seed(seed)
    for m in _layers(model).values():
        deviation = math.sqrt(scale / m.weight[0].numel()) / 0.8796  # of the uncut normal
        new = torch.empty(m.weight.shape)
        nn.init.trunc_normal_(new, 0.0, deviation, -2 * deviation, 2 * deviation, generator=draw)
        m.weight.copy_(new)
    return model


def weight_plan(history: History) -> BitPlan:
    """The word lengths at the end, as a plan: (WL, 32) for each layer."""
    return BitPlan({key[5:]: (int(rows[-1]), 32) for key, rows in history.extra.items() if key.startswith("word/")})


def size_ratio(model: nn.Module, history: History) -> float:
    """sum of WL * non-zero weights / (32 * weights), over the layers in fixed point."""
    bits = weight_plan(history).bits
    weights = {name: model.get_submodule(name).weight for name in bits}
    return sum(bits[n][0] * int((w != 0).sum()) for n, w in weights.items()) / (32 * sum(w.numel() for w in weights.values()))


def speedups(
    history: History, macs: Mapping[str, float], *, weights: Mapping[str, int], batch: int, lookback: float = 50
) -> dict[str, float]:
    """The paper's cost model, not a time: a multiply-add costs WL / 32 times the non-zero share.

    Args:
        macs: multiply-adds of each layer for one row.
        weights: numbers in each layer's weight.
        batch: rows a step.
        lookback: steps between two push-downs, for their overhead.

    Returns:
        ``inference``, with the last formats, and ``training``: forward and backward pass (three times the forward pass) over all steps,
        plus five histograms a lookback and one norm a step.
    """
    total = sum(macs.values())
    share = {n: [w / 32 * (1 - s) for w, s in zip(history.extra[f"word/{n}"], history.extra[f"sparsity/{n}"], strict=True)] for n in macs}
    steps = len(next(iter(share.values())))
    now = sum(macs[n] * share[n][-1] for n in macs)
    spent = sum(3 * batch * macs[n] * sum(share[n]) + weights[n] * steps * (1 + 5 / lookback) for n in macs)
    return {"inference": total / now, "training": 3 * batch * total * steps / spent}
