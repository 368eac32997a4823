"""Gaudi-GBLR: a weight as a sum of rank-one blocks whose places and sizes are learned by gradient descent.

    W = sum_i (m_i^out * u_i) (m_i^in * v_i)^T,

with masks m that are 1 on one contiguous (cyclic) run of indices and 0 elsewhere. Full masks give low rank, short disjoint ones block
sparsity, a mixture block low rank: one family, and every layer finds its own member. A mask of width w and location l (shares of the
length n) is written by its Fourier coefficients, those of a boxcar,

    M_k = w sinc(k w) / sinc(k / n) exp(i pi k (1/n - w)) exp(-2 i pi k l) exp(-k^2 / (2 sigma^2)),   sinc(x) = sin(pi x) / (pi x),

which are differentiable in w and l. Without the last factor and for multiples of 1/n they are the boxcar exactly; the Gaussian widens its
edges so that gradients see beyond them, and sigma grows during training. Widths and locations are rounded to the grid with
straight-through gradients. After each step widths are soft-thresholded, w <- max(w - step threshold, 0), as long as the layers cost more
than the budget: components that do not earn their width vanish.

*Source*: Lee and Kim, Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks (ICLR 2024), sections 3
and 4. The authors' public code was read for settings.

*Departures*: in eval mode masks are exact boxes, so that what is judged is what :func:`pack_blocks` stores. ``gblr`` learns the structure
during the first part of the steps and trains the values on with fixed exact boxes. The budget is a share of the dense weights; the paper
steers by the mean width. On the way to it a budget that falls geometrically is enforced: the ends of boxes that carry the least energy
for each number saved go (the paper has the soft threshold alone, which takes more steps than a short training has). Short components
start on the diagonal, from singular vectors of their own block of what the full ones leave, continued beyond the block.

*Cost*: training computes with full factors, in + out multiply-adds a component and rank: for a square layer with all components twice the
dense layer. Only the packed layer is cheaper: sum over components of min((a + b) rank, a b) for a rows and b columns.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from neurarium.compress.blocks import opened
from neurarium.compress.factor.lowrank import decomposable
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, Loss
from neurarium.roles import Loader

__all__ = ["BlockLowRankLinear", "GaudiGBLR", "WidthShrink", "box_mask", "gaudi_mask", "gblr", "pack_blocks"]

_ADAMW = partial(AdamW, lr=1e-3)
_INITS = ("splr", "lowrank", "dense")


def gaudi_mask(width: Tensor, location: Tensor, n: int, sigma: float | None = None) -> Tensor:
    """Masks ``(..., n)`` for widths and locations ``(...)`` in [0, 1]; their mean over n is the width. ``sigma`` None: sharp."""
    w, at = width[..., None], location[..., None]
    k = torch.arange(n // 2 + 1, device=width.device, dtype=width.dtype)
    size = w * torch.sinc(k * w) / torch.sinc(k / n)
    if sigma is not None:
        size = size * torch.exp(-(k**2) / (2 * sigma**2))
    angle = torch.pi * k * (1 / n - w) - 2 * torch.pi * k * at
    return torch.fft.irfft(torch.complex(size * angle.cos(), size * angle.sin()), n, norm="forward")


def box_mask(width: Tensor, location: Tensor, n: int) -> Tensor:
    """The exact boxes: True on round(width n) indices from round(location n) on, cyclically."""
    start, length = (location * n).round()[..., None], (width * n).round()[..., None]
    return torch.remainder(torch.arange(n, device=width.device) - start, n) < length


class GaudiGBLR(nn.Module):
    """A linear layer with a learned generalised block-low-rank weight.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        components: number of blocks; by default min(in, out) / rank, enough for every matrix.
        rank: of each block.
        sigma: of the Gaussian in training mode; None for sharp masks.
        init: "splr" (half of the budget in full components, the rest in short ones along the diagonal), "lowrank" (all in full ones),
            "dense" (all components full).
        budget: share of the dense weights that the initial structure costs; ignored by "dense".
    """

    def __init__(
        self, in_features: int, out_features: int, components: int | None = None, rank: int = 1, *, bias: bool = True,
        sigma: float | None = 100.0, init: str = "splr", budget: float = 0.5, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        least = min(in_features, out_features)
        components = least // rank if components is None and 1 <= rank <= least else components
        if not 1 <= rank <= least or components is None or components < 1:
            raise BadInput(f"rank must be in 1..{least} and components at least 1, got rank {rank} and {components} components")
        if init not in _INITS:
            raise BadInput(f"init must be one of {', '.join(_INITS)}, got {init!r}")
        if not 0 < budget <= 1:
            raise BadInput(f"budget must be above 0 and at most 1, got {budget}")
        self.in_features, self.out_features, self.components, self.rank = in_features, out_features, components, rank
        self.sigma, self.init, self.budget = sigma, init, budget
        like = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.empty(components, rank, out_features, **like))
        self.v = nn.Parameter(torch.empty(components, rank, in_features, **like))
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None
        for name in ("out_width", "out_location", "in_width", "in_location"):
            setattr(self, name, nn.Parameter(torch.zeros(components, **like)))
        weight = torch.empty(out_features, in_features, device=self.u.device)
        nn.init.uniform_(weight, -(in_features**-0.5), in_features**-0.5)
        if self.u.device.type != "meta":
            self.set_weight(weight)

    @classmethod
    def like(cls, layer: nn.Linear, components: int | None = None, rank: int = 1, **options: Any) -> GaudiGBLR:
        """Started from a dense layer: full components are its best low-rank part."""
        bias, device = layer.bias is not None, layer.weight.device
        result = cls(layer.in_features, layer.out_features, components, rank, bias=bias, device="meta", dtype=layer.weight.dtype, **options)
        result = result.to_empty(device=device)
        result.set_weight(layer.weight.detach())
        if bias:
            with torch.no_grad():
                result.bias.copy_(layer.bias)
        return result.train(layer.training)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """The initial structure, and factors that come near to this weight in it."""
        if not bool(torch.isfinite(weight).all()):
            raise BadInput("the weight has values that are not finite")
        n, m, r = self.out_features, self.in_features, self.rank
        spend = self.budget * n * m
        full = self.components if self.init == "dense" else int(spend * (0.5 if self.init == "splr" else 1) / (r * (n + m)))
        full = min(full, self.components)
        rest = self.components - full
        width = torch.zeros(self.components, dtype=torch.float64)
        width[:full] = 1
        if rest and self.init == "splr":
            width[full:] = min(max((spend - full * r * (n + m)) / (rest * r * (n + m)), 1 / min(n, m)), 1)
        location = torch.zeros(self.components, dtype=torch.float64)
        location[full:] = torch.arange(rest, dtype=torch.float64) / max(rest, 1)
        for name, value in (("width", width), ("location", location)):
            getattr(self, f"out_{name}").copy_(value), getattr(self, f"in_{name}").copy_(value)
        matrix = weight.cpu().double()
        u, v = torch.zeros(self.u.shape, dtype=torch.float64), torch.zeros(self.v.shape, dtype=torch.float64)
        left, s, right = torch.linalg.svd(matrix, full_matrices=False)
        top = min(full * r, len(s))
        u.view(-1, n)[:top] = (left[:, :top] * s[:top].sqrt()).T
        v.view(-1, m)[:top] = s[:top].sqrt()[:, None] * right[:top]
        if full * r > top:  # more than full rank: the surplus starts small, not dead
            u.view(-1, n)[top : full * r] = left[:, : full * r - top].T * 1e-3
        matrix = matrix - u.view(-1, n).T @ v.view(-1, m)
        rows, columns = box_mask(width, location, n), box_mask(width, location, m)
        for i in range(full, self.components):
            a, b = (rows[i], columns[i]) if width[i] > 0 else (torch.ones(n, dtype=torch.bool), torch.ones(m, dtype=torch.bool))
            left, s, right = torch.linalg.svd(matrix[a][:, b], full_matrices=False)
            few = min(r, len(s))
            root = s[:few, None].sqrt().clamp_min(1e-6)
            u[i][:few] = right[:few] @ matrix[:, b].T / root  # beyond the box as well: what it would take there
            v[i][:few] = left[:, :few].T @ matrix[a] / root
            matrix = matrix - (u[i] * a).T @ (v[i] * b)
        self.u.copy_(u), self.v.copy_(v)

    def masks(self) -> tuple[Tensor, Tensor]:
        """(components, out) and (components, in): smooth in training mode, exact boxes in eval mode."""
        result = []
        for width, location, n in _sides(self):
            width, location = width.float(), location.float()
            if self.training:
                width, location = (p + ((p * n).round() / n - p).detach() for p in (width, location))
                result.append(gaudi_mask(width, location, n, self.sigma).to(self.u.dtype))
            else:
                result.append(box_mask(width, location, n).to(self.u.dtype))
        return result[0], result[1]

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.masks()
        hidden = F.linear(x, (self.v * columns[:, None]).flatten(0, 1))
        return F.linear(hidden, (self.u * rows[:, None]).flatten(0, 1).T, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight; a plain tensor, computed anew on every use."""
        rows, columns = self.masks()
        return (self.u * rows[:, None]).flatten(0, 1).T @ (self.v * columns[:, None]).flatten(0, 1)

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of each block on the grid; both 0 where one of them is."""
        a, b = (self.out_width.detach().float() * self.out_features).round(), (self.in_width.detach().float() * self.in_features).round()
        alive = (a > 0) & (b > 0)
        return (a * alive).long(), (b * alive).long()

    def cost(self) -> int:
        """Weights and multiply-adds a row of the packed layer, without the bias."""
        a, b = self.sizes()
        return int(torch.minimum((a + b) * self.rank, a * b).sum())

    def structure(self) -> list[nn.Parameter]:
        """The widths and locations."""
        return [self.out_width, self.out_location, self.in_width, self.in_location]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, components={self.components}, rank={self.rank}, bias={self.bias is not None}"


class WidthShrink:
    """Soft-thresholds the widths of all layers together while they cost too much. Call ``step(lr)`` after each optimizer step.

    Args:
        modules: modules in which GaudiGBLR layers are looked for, or these layers.
        target: stop at this mean width of the components that are alive; or
        budget: stop at this share of the dense weights.
        threshold: each step takes lr x threshold from every width.
    """

    def __init__(
        self, modules: nn.Module | Iterable[nn.Module], target: float | None = None, threshold: float = 0.02, *, budget: float | None = None
    ) -> None:
        if (target is None) == (budget is None):
            raise BadInput("give either target or budget")
        modules = [modules] if isinstance(modules, nn.Module) else modules
        self.layers = list(dict.fromkeys(m for module in modules for m in module.modules() if isinstance(m, GaudiGBLR)))
        if not self.layers:
            raise BadInput("there is no GaudiGBLR layer to shrink")
        self.target, self.budget, self.threshold = target, budget, threshold

    def mean_width(self) -> float:
        """Over both sides of all components that are alive."""
        widths = torch.cat([torch.cat([m.out_width[a > 0], m.in_width[a > 0]]) for m in self.layers for a in [m.sizes()[0]]])
        return float(widths.detach().mean()) if len(widths) else 0.0

    def share(self) -> float:
        """Cost of all layers, as a share of the dense weights."""
        return sum(m.cost() for m in self.layers) / sum(m.in_features * m.out_features for m in self.layers)

    def above(self) -> bool:
        return self.mean_width() > self.target if self.budget is None else self.share() > self.budget

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One soft-thresholding where it is due; widths are kept in [0, 1] and locations in [0, 1) always."""
        take = lr * self.threshold if self.above() else 0.0
        for m in self.layers:
            for width, location, n in _sides(m):
                width.copy_(F.softshrink(width, take).clamp(0, 1) if take else width.clamp(0, 1))
                location.remainder_(1)
                location[(location * n).round() == n] = 0

    @torch.no_grad()
    def trim(self, budget: float | None = None) -> None:
        """Meets the goal, or this share of the dense weights, at once.

        For a budget, rows and columns at the ends of the boxes are taken away one by one, those first that carry the least energy for each
        number saved. For a mean width, every width loses the same.
        """
        budget = self.budget if budget is None else budget
        if budget is not None:
            _trim(self.layers, budget)
            return
        before = [[p.clone() for p in (m.out_width, m.in_width)] for m in self.layers]
        low, high = 0.0, 1.0
        for amount in (0.0, *[None] * 24):
            amount = (low + high) / 2 if amount is None else amount
            self._take(before, amount)
            if not self.above():
                high = amount
                if amount == 0:
                    return
            else:
                low = amount
        self._take(before, high)

    def _take(self, before: list[list[Tensor]], amount: float) -> None:
        for m, olds in zip(self.layers, before, strict=True):
            for width, old in zip((m.out_width, m.in_width), olds, strict=True):
                width.copy_((old - amount).clamp(0, 1))


class _Box:
    """One component of a layer while it is trimmed: its run of rows and of columns, and which end to lose next."""

    def __init__(self, sides: list[np.ndarray], start: list[int], length: list[int]) -> None:
        self.sides, self.start, self.length = sides, start, length  # sides: u (rank, out) and v (rank, in)
        self.cut: tuple[int, int] = (0, 0)

    def cost(self, a: int, b: int) -> int:
        return min((a + b) * len(self.sides[0]), a * b)

    def weakest(self) -> float:
        """The least energy a number saved at any end; remembers where."""
        best = np.inf
        runs = [(s + np.arange(k)) % f.shape[1] for s, k, f in zip(self.start, self.length, self.sides, strict=True)]
        for side in (0, 1):
            kept = self.sides[1 - side][:, runs[1 - side]]
            whole = self.length[side] == self.sides[side].shape[1]  # a ring can be opened anywhere
            at = runs[side] if whole else runs[side][[0, -1]]
            ends = self.sides[side][:, at]
            energy = np.einsum("ij,ik,kj->j", ends, kept @ kept.T, ends)
            smaller = list(self.length)
            smaller[side] -= 1
            energy = energy / (self.cost(*self.length) - self.cost(*smaller))
            if energy.min() < best:
                best, self.cut = float(energy.min()), (side, int(at[energy.argmin()]))
        return best

    def shorten(self) -> None:
        side, at = self.cut
        n = self.sides[side].shape[1]
        if at == self.start[side] or self.length[side] == n:
            self.start[side] = (at + 1) % n
        self.length[side] -= 1


def _trim(layers: Sequence[GaudiGBLR], budget: float) -> None:
    total, limit = sum(m.cost() for m in layers), budget * sum(m.in_features * m.out_features for m in layers)
    if total <= limit:
        return
    boxes: dict[tuple[int, int], _Box] = {}
    for number, m in enumerate(layers):
        u, v = (p.detach().cpu().double().numpy() for p in (m.u, m.v))
        starts = [(p.detach().cpu().float() * n).round().long() % n for p, n in _places(m)]
        lengths = [size.tolist() for size in m.sizes()]
        for i in range(m.components):
            if lengths[0][i]:
                boxes[number, i] = _Box([u[i], v[i]], [int(s[i]) for s in starts], [size[i] for size in lengths])
    heap = [(box.weakest(), *key) for key, box in boxes.items()]
    heapq.heapify(heap)
    changed = set()
    while total > limit:
        _, *key = heapq.heappop(heap)
        box = boxes[tuple(key)]
        total -= box.cost(*box.length)
        box.shorten()
        changed.add(tuple(key))
        if min(box.length) > 0:
            total += box.cost(*box.length)
            heapq.heappush(heap, (box.weakest(), *key))
    for number, i in changed:
        m, box = layers[number], boxes[number, i]
        for side, (width, location, n) in enumerate(_sides(m)):
            width[i] = box.length[side] / n if min(box.length) else 0.0
            location[i] = box.start[side] / n


def _sides(m: GaudiGBLR) -> list[tuple[Tensor, Tensor, int]]:
    return [(m.out_width, m.out_location, m.out_features), (m.in_width, m.in_location, m.in_features)]


def _places(m: GaudiGBLR) -> list[tuple[Tensor, int]]:
    return [(location, n) for _, location, n in _sides(m)]


def gblr(
    model: nn.Module,
    loader: Loader | None = None,
    *,
    budget: float,
    epochs: int = 1,
    components: int | None = None,
    rank: int = 1,
    start: float = 1.5,
    init: str = "splr",
    learn: float = 0.6,
    sigma: tuple[float, float] = (1.0, 100.0),
    structure_lr: float = 5e-3,
    threshold: float = 0.02,
    optimizer: Callable[..., Optimizer] = _ADAMW,
    schedule: Callable[[Optimizer], Any] | None = None,
    loss: str | Loss = "cross_entropy",
    skip: Sequence[str] = (),
    packed: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A copy of the model whose linear layers are GaudiGBLR layers of learned structure that cost at most `budget`.

    Args:
        loader: ``(x, y)`` batches with a length; None: the initial structure, without training.
        budget: share of the dense weights of all converted layers together.
        epochs: of training.
        components, rank, init: as of :class:`GaudiGBLR`.
        start: the structure begins with this many times the budget (as far as `init` heeds it) and is shrunk.
        learn: share of the steps in which widths and locations are learned; then they are fixed.
        sigma: of the smoothing, first and last; it grows by the same factor each step.
        structure_lr: learning rate of widths and locations (Adam with betas 0 and 0.999, no weight decay).
        threshold: of the shrinking, see :class:`WidthShrink`.
        optimizer, schedule, loss: as of :class:`~neurarium.learn.fit.Backprop`; the optimizer takes parameter groups and ``betas``.
        skip: names of layers to leave dense.
        packed: give the packed layers (:func:`pack_blocks`) instead of trainable structure.

    ``result.skipped`` says which layers were left alone and why.

    Raises:
        UnsupportedModel: no linear layer.
        BadInput: a budget out of range, an empty loader, values that are not finite.
    """
    if not 0 < budget <= 1:
        raise BadInput(f"budget must be above 0 and at most 1, got {budget}")
    if not 0 < learn <= 1 or start < 1 or epochs < 1:
        raise BadInput(f"learn must be in (0, 1], start and epochs at least 1, got {learn}, {start} and {epochs}")
    training, result = model.training, opened(model)
    found, skipped = decomposable(result, (nn.Linear,))
    for name in skip:
        if found.pop(name, None) is None:
            raise BadInput(f"skip names {name!r}, which is no linear layer that could be converted")
        skipped[name] = "the caller left it out"
    result = copy.deepcopy(model) if result is model else result
    initial = min(1.0, start * budget) if loader is not None else budget
    made: dict[nn.Module, GaudiGBLR] = {}
    for name in found:
        old = result.get_submodule(name)
        try:
            made[old] = GaudiGBLR.like(old, components, min(rank, *old.weight.shape), init=init, budget=initial)
        except BadInput as error:
            raise BadInput(f"{name or type(old).__name__}: {error}") from None
    result = made.get(result, result)
    for parent in list(result.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in made:
                parent._modules[child_name] = made[child]
    if made:
        shrink = WidthShrink(made.values(), threshold=threshold, budget=budget)
        if loader is not None:
            steps = epochs * len(loader)  # type: ignore[arg-type]
            phase = _Phases(shrink, max(1, round(learn * steps)), sigma, structure_lr, shrink.share())
            groups = partial(_groups, layers=shrink.layers, lr=structure_lr)
            _Shrinking(loss=loss, optimizer=optimizer, schedule=schedule, groups=groups, phase=phase).fit(
                result, loader, epochs=epochs, seed=seed
            )
            phase.fix()
            result.zero_grad()
        shrink.trim()
    result = pack_blocks(result) if packed and made else result
    result.skipped = skipped  # type: ignore[assignment]
    return result.train(training)


class _Phases:
    """What surrounds each step: smoothing and shrinking first, then a fixed structure."""

    def __init__(self, shrink: WidthShrink, learn: int, sigma: tuple[float, float], lr: float, share: float) -> None:
        self.shrink, self.learn, self.sigma, self.lr, self.done = shrink, learn, sigma, lr, 0
        self.first = share

    def before(self) -> None:
        if 0 < self.done <= self.learn:
            self.shrink.step(self.lr)
            if self.done % max(1, self.learn // 20) == 0 and self.first > self.shrink.budget:
                past = min(1.0, 1.25 * self.done / self.learn)  # the last fifth is spent at the budget
                self.shrink.trim(self.first * (self.shrink.budget / self.first) ** past)
        if self.done < self.learn:
            first, last = self.sigma
            for layer in self.shrink.layers:
                layer.sigma = first * (last / first) ** (self.done / max(1, self.learn - 1))
        elif self.done == self.learn:
            self.fix()
        self.done += 1

    def fix(self) -> None:
        self.shrink.step(self.lr)
        self.shrink.trim()
        for layer in self.shrink.layers:
            layer.sigma = None
            for p in layer.structure():
                p.requires_grad_(False)
                p.grad = None


@dataclass(frozen=True)
class _Shrinking(Backprop):
    """Backpropagation with the phases before each gradient."""

    phase: _Phases | None = None

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        self.phase.before()
        loss, output = super().gradients(model, x, y)
        return loss, output if isinstance(output, Tensor) else None


def _groups(model: nn.Module, *, layers: Sequence[GaudiGBLR], lr: float) -> list[dict[str, Any]]:
    structure = {id(p) for layer in layers for p in layer.structure()}
    own = [p for p in model.parameters() if id(p) in structure]
    rest = [p for p in model.parameters() if id(p) not in structure and p.requires_grad]
    return [{"params": rest}, {"params": own, "lr": lr, "betas": (0.0, 0.999), "weight_decay": 0.0}]


class BlockLowRankLinear(nn.Module):
    """The packed form of a :class:`GaudiGBLR`: only entries inside the boxes are stored and multiplied. Made by :func:`pack_blocks`.

    A component of a rows and b columns keeps its two factors, (a + b) rank numbers, or the block itself where that is less. Components are
    sorted into groups of like size; in the computation (not in memory) the short ones of a group are padded to its longest. The structure
    is fixed, the values train on.
    """

    def __init__(self, layer: GaudiGBLR) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out = layer.in_features, layer.out_features
        rows, columns = layer.sizes()
        out_at, in_at = (
            (p.detach().float() * n).round().long() % n for p, n in ((layer.out_location, n_out), (layer.in_location, n_in))
        )
        groups: dict[tuple, list[int]] = {}
        for i in (rows > 0).nonzero().flatten().tolist():
            a, b = int(rows[i]), int(columns[i])
            direct = a * b < (a + b) * layer.rank
            groups.setdefault((direct, a == n_out, b == n_in, a.bit_length(), b.bit_length()), []).append(i)
        self.groups = nn.ModuleList()
        for (direct, tall, wide, *_), members in sorted(groups.items()):
            at = torch.tensor(members, device=rows.device)
            start = torch.zeros_like(at)
            boxes = torch.stack([start if tall else out_at[at], rows[at], start if wide else in_at[at], columns[at]])
            self.groups.append(_Boxes(layer, members, boxes, direct))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = flat.new_zeros(flat.shape[0], self.out_features)
        for group in self.groups:
            y = y + group(flat)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight; a plain tensor, computed anew on every use."""
        like = next(iter(self.groups.parameters()), self.bias)
        eye = torch.eye(self.in_features, device=like.device, dtype=like.dtype)
        return sum((group(eye) for group in self.groups), eye.new_zeros(self.in_features, self.out_features)).T

    def cost(self) -> int:
        """Stored values, without the bias."""
        return sum(p.numel() for p in self.groups.parameters())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class _Boxes(nn.Module):
    """Blocks of like size. `boxes` has the rows: first row, rows, first column, columns (cyclic)."""

    def __init__(self, layer: GaudiGBLR, members: list[int], boxes: Tensor, direct: bool) -> None:
        super().__init__()
        self.shape, self.rank = (layer.out_features, layer.in_features), 0 if direct else layer.rank
        self.longest = int(boxes[1].max()), int(boxes[3].max())
        self.full = int(boxes[1].min()) == layer.out_features, int(boxes[3].min()) == layer.in_features
        self.register_buffer("boxes", boxes)
        left, right = [], []
        for i, (top, a, first, b) in zip(members, boxes.T.tolist(), strict=True):
            rows = (top + torch.arange(a, device=boxes.device)) % self.shape[0]
            columns = (first + torch.arange(b, device=boxes.device)) % self.shape[1]
            u, v = layer.u.detach()[i][:, rows], layer.v.detach()[i][:, columns]
            left.append((u.T @ v if direct else u).flatten())
            right.append(v.flatten())
        self.left = nn.Parameter(torch.cat(left), layer.u.requires_grad)
        self.right = None if direct else nn.Parameter(torch.cat(right), layer.v.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        top, rows, first, columns = self.boxes
        if self.right is None:
            y = torch.einsum("npb,pab->npa", x[:, self._places(first, 1)], self._blocks())
        else:
            right = self._padded(self.right, columns, self.longest[1])  # (boxes, rank, columns)
            if self.full[1]:
                h = F.linear(x, right.flatten(0, 1)).unflatten(1, right.shape[:2])
            else:
                h = torch.einsum("npb,prb->npr", x[:, self._places(first, 1)], right)
            left = self._padded(self.left, rows, self.longest[0])
            if self.full[0]:
                return h.flatten(1) @ left.flatten(0, 1)
            y = torch.einsum("npr,pra->npa", h, left)
        return x.new_zeros(x.shape[0], self.shape[0]).index_add(1, self._places(top, 0).flatten(), y.flatten(1))

    def _places(self, start: Tensor, side: int) -> Tensor:
        return torch.remainder(start[:, None] + torch.arange(self.longest[side], device=start.device), self.shape[side])

    def _padded(self, flat: Tensor, sizes: Tensor, longest: int) -> Tensor:
        """(boxes, rank, longest) of values stored box by box, zero beyond each box's size."""
        offset = (sizes * self.rank).cumsum(0) - sizes * self.rank
        along, of = torch.arange(longest, device=flat.device), torch.arange(self.rank, device=flat.device)
        index = offset[:, None, None] + of[:, None] * sizes[:, None, None] + along
        inside = along < sizes[:, None, None]
        return flat[torch.where(inside, index, 0)] * inside

    def _blocks(self) -> Tensor:
        """(boxes, rows, columns) of blocks that are stored whole."""
        _, rows, _, columns = self.boxes
        offset = (rows * columns).cumsum(0) - rows * columns
        i, j = (torch.arange(n, device=rows.device) for n in self.longest)
        inside = (i[:, None] < rows[:, None, None]) & (j < columns[:, None, None])
        index = offset[:, None, None] + i[:, None] * columns[:, None, None] + j
        return self.left[torch.where(inside, index, 0)] * inside


def pack_blocks(model: nn.Module) -> nn.Module:
    """A copy in which every :class:`GaudiGBLR` (the model itself, if it is one) is packed. The function is that of eval mode."""
    result = copy.deepcopy(model)
    made = {m: BlockLowRankLinear(m) for m in result.modules() if isinstance(m, GaudiGBLR)}
    if not made:
        raise UnsupportedModel("has no GaudiGBLR layer to pack", module=type(model).__name__)
    for parent in list(result.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                parent._modules[name] = made[child]
    return made.get(result, result)
