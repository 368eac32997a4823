"""TRP: a network that is truncated again and again while it learns, until truncation costs nothing.

Every `period` steps each weight matrix W = U S V^T is replaced by its best approximation of the least rank r that holds a share `energy` of
the squared singular values, *before* the forward pass; the gradient is taken there and ordinary steps follow, which may leave the low-rank
set again. The loss that truncation adds is seen by the training, and the weights come to live near low rank. The same SVD gives the
gradient of the nuclear norm, U_r V_r^T, which is added times `nuclear` on that step and pulls all singular values down alike: small ones
vanish, and the next truncation is cheaper.

In the end :func:`decompose` puts thin layers in the place of the dense ones. A convolution's matrix is out x (in k k), for a k x k
convolution to r channels and a 1 x 1 one ("channel"), or (in k) x (out k), for k x 1 and then 1 x k ("spatial").

*Source*: Xu et al., Trained Rank Pruning for Efficient Deep Neural Networks (IJCAI 2020), section 3. The authors' public code was read for
settings.

*Departures*: the period of 20 is the paper's; its code for CIFAR-10 uses 1 (and energy 0.9). All layers that can be decomposed take part,
linear ones too; the code leaves out the first convolution, 1 x 1 and strided ones (name them in `skip`). The threshold of the final
truncation is a share of the layer's largest singular value; in the code it is absolute. Momentum buffers are not truncated.

*Cost*: one SVD a layer every `period` steps, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from neurarium.compress.allocate import minimax_bisect
from neurarium.compress.blocks import opened
from neurarium.compress.factor.fold import fold, rank_size, svd_curve, unfold
from neurarium.compress.factor.lowrank import LowRankConv2d, LowRankLinear, apply_ranks, decomposable, rank_macs
from neurarium.compress.rank_plan import RankPlan
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, Loss
from neurarium.meter import undisturbed
from neurarium.roles import Loader

__all__ = ["TRPCallback", "decompose", "plan_decompose", "trp"]

_KINDS = (nn.Conv2d, nn.Linear)
_SCHEMES = {"channel": 0, "spatial": 2}
_SGD = partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)


class TRPCallback:
    """Truncation in any training loop: call ``before_step()`` before the forward pass and ``after_backward()`` after the backward one.

    Args:
        model: its layers' weights are truncated in place.
        period: steps from one truncation to the next; the first step is one.
        energy: share of the squared singular values that stays; 1 truncates nothing.
        nuclear: weight of the nuclear norm's gradient, added on truncating steps.
        scheme: "channel" or "spatial".
        modules: kinds of layers that take part.
        skip: names of layers that do not.

    Attributes:
        ranks: of each layer after the last truncation.
    """

    def __init__(
        self, model: nn.Module, *, period: int = 20, energy: float = 0.98, nuclear: float = 3e-4, scheme: str = "channel",
        modules: Sequence[type] = _KINDS, skip: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if period < 1:
            raise BadInput(f"period must be at least 1, got {period}")
        if not 0 < energy <= 1:
            raise BadInput(f"energy must be above 0 and at most 1, got {energy}")
        if not nuclear >= 0:
            raise BadInput(f"nuclear must not be negative, got {nuclear}")
        self.period, self.energy, self.nuclear, self.scheme = period, energy, nuclear, scheme
        self.layers = _layers(model, modules, skip)[0]
        self.steps, self.ranks = 0, dict[str, int]()
        self._pull: dict[str, Tensor] = {}
        _scheme(scheme, 4)

    @torch.no_grad()
    def before_step(self) -> None:
        """Truncates the weights if this step is one of those that do."""
        self._pull.clear()
        if self.steps % self.period == 0 and (self.energy < 1 or self.nuclear > 0):
            for name, layer in self.layers.items():
                self._truncate(name, layer.weight)
        self.steps += 1

    @torch.no_grad()
    def after_backward(self) -> None:
        """Adds the nuclear norm's gradient to ``.grad`` after a truncating step."""
        for name, pull in self._pull.items():
            weight = self.layers[name].weight
            if weight.grad is not None:
                weight.grad.add_(pull, alpha=self.nuclear)
        self._pull.clear()

    def _truncate(self, name: str, weight: Tensor) -> None:
        scheme, shape = _scheme(self.scheme, weight), tuple(weight.shape)
        if not bool(torch.isfinite(weight).all()):
            raise BadInput(f"{name}: the weight is not finite at step {self.steps}")
        u, s, vh = torch.linalg.svd(fold(weight.cpu().double(), scheme), full_matrices=False)
        held = s.square().cumsum(0)
        if not held[-1] > 0:
            return
        rank = len(s) if self.energy == 1 else int((held < self.energy * held[-1]).sum()) + 1
        self.ranks[name] = rank
        if rank < len(s):
            weight.copy_(unfold((u[:, :rank] * s[:rank]) @ vh[:rank], shape, scheme))
        if self.nuclear > 0:
            alive = min(rank, int((s > 1e-9 * s[0]).sum()))
            self._pull[name] = unfold(u[:, :alive] @ vh[:alive], shape, scheme).to(weight)


def trp(
    model: nn.Module,
    loader: Loader,
    *,
    epochs: int,
    energy: float = 0.98,
    period: int = 20,
    nuclear: float = 3e-4,
    scheme: str = "channel",
    optimizer: Callable[..., Optimizer] = _SGD,
    schedule: Callable[[Optimizer], Any] | None = None,
    loss: str | Loss = "cross_entropy",
    decompose: bool = True,
    threshold: float = 0.05,
    modules: Sequence[type] = _KINDS,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A copy of the model, trained with truncation and then decomposed, with ``result.plan``.

    Args:
        loader: ``(x, y)`` batches, re-iterable.
        epochs: of training, at least 1.
        energy, period, nuclear, scheme, modules, skip: as of :class:`TRPCallback`.
        optimizer, schedule, loss: as of :class:`~neurarium.learn.fit.Backprop`.
        decompose: False gives the trained dense model back, for :func:`decompose` at a size of your choice.
        threshold: singular values up to this share of a layer's largest are cut at the end.
        seed: of the training.

    Raises:
        UnsupportedModel: no layer can be decomposed.
        BadInput: an empty loader, values that are not finite.
    """
    if epochs < 1:
        raise BadInput(f"epochs must be at least 1, got {epochs}")
    training, result = model.training, opened(model)
    result = copy.deepcopy(model) if result is model else result
    rank = TRPCallback(result, period=period, energy=energy, nuclear=nuclear, scheme=scheme, modules=modules, skip=skip)
    _Truncated(loss=loss, optimizer=optimizer, schedule=schedule, rank=rank).fit(result, loader, epochs=epochs, seed=seed)
    result.zero_grad()
    return _decompose(result.train(training), threshold=threshold, scheme=scheme, modules=modules, skip=skip) if decompose else result


@dataclass(frozen=True)
class _Truncated(Backprop):
    """Backpropagation with the callback's two calls around each gradient."""

    rank: TRPCallback | None = None

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        self.rank.before_step()
        loss, output = super().gradients(model, x, y)
        self.rank.after_backward()
        return loss, output if isinstance(output, Tensor) else None  # Hugging Face's outputs are not for the record


def decompose(
    model: nn.Module,
    *,
    threshold: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    speedup: float | None = None,
    example: Tensor | tuple | None = None,
    scheme: str = "channel",
    modules: Sequence[type] = _KINDS,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of the model with thin layers by truncated SVD, with ``result.plan``. Give exactly one of the four rules.

    Args:
        threshold: cut singular values up to this share of the layer's largest.
        energy: keep the least rank with this share of the squared singular values.
        rank: the same for all layers (at most what each has).
        speedup: the same energy in all layers, the largest at which they need 1 / speedup of their multiply-adds on `example`.
        example: the model's input (or tuple of inputs), for `speedup`.

    A layer whose factors would not be smaller stays dense.
    """
    model = opened(model)
    plan = plan_decompose(
        model, threshold=threshold, energy=energy, rank=rank, speedup=speedup, example=example, scheme=scheme, modules=modules, skip=skip
    )
    result = apply_ranks(model, plan)
    result.plan = plan  # type: ignore[assignment]
    return result


_decompose = decompose


def plan_decompose(
    model: nn.Module,
    *,
    threshold: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    speedup: float | None = None,
    example: Tensor | tuple | None = None,
    scheme: str = "channel",
    modules: Sequence[type] = _KINDS,
    skip: Sequence[str] = (),
) -> RankPlan:
    """The plan of :func:`decompose`; its names are those of ``explicit(model)`` where that differs from the model."""
    given = {k: v for k, v in {"threshold": threshold, "energy": energy, "rank": rank, "speedup": speedup}.items() if v is not None}
    if len(given) != 1:
        raise BadInput(f"give exactly one of threshold, energy, rank and speedup, got {', '.join(given) or 'none'}")
    ((rule, value),) = given.items()
    lowest, highest = {"threshold": (0, 1), "energy": (0, 1), "rank": (1, torch.inf), "speedup": (1, torch.inf)}[rule]
    if not lowest <= value <= highest:
        raise BadInput(f"{rule} must be from {lowest} to {highest}, got {value}")
    model = opened(model)
    layers, skipped = _layers(model, modules, skip)
    curves = {}
    for name, layer in layers.items():
        try:  # entry j is what rank j leaves out: of the largest singular value, or of the norm
            norm = "operator" if rule == "threshold" else "frobenius"
            curve = svd_curve(layer.weight, 1, _scheme(scheme, layer.weight), norm=norm)
        except BadInput as error:
            raise BadInput(f"{name or type(layer).__name__}: {error}") from None
        curves[name] = torch.cat([torch.ones(1, dtype=curve.dtype), curve])
    if rule == "speedup":
        ranks = _by_speed(model, layers, curves, value, example, scheme)
    elif rule == "rank":
        ranks = {name: min(int(value), len(curve) - 1) for name, curve in curves.items()}
    else:
        most = value if rule == "threshold" else (1 - value) ** 0.5
        ranks = {name: max(1, int((curve > most + 1e-9).sum())) for name, curve in curves.items()}
    chosen, errors, skipped = {}, {}, dict(skipped)
    for name, layer in layers.items():
        entry = _scheme(scheme, layer.weight)
        if ranks[name] and ranks[name] * rank_size(tuple(layer.weight.shape), 1, entry) < layer.weight.numel():
            chosen[name], errors[name] = (1, ranks[name], entry), float(curves[name][ranks[name]])
        else:
            skipped[name] = "stays dense: the factors would not be smaller"
    return RankPlan(chosen, errors, skipped)


def _by_speed(
    model: nn.Module, layers: dict[str, nn.Module], curves: dict[str, Tensor], speedup: float, example: Any, scheme: str
) -> dict[str, int]:
    """Ranks of equal energy within the budget of multiply-adds; 0 where a layer stays dense."""
    if example is None:
        raise BadInput("speedup needs an example input")
    done = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear | LowRankConv2d)}
    rows = _positions(model, layers | done, example)
    errors, costs, total = {}, {}, 0.0
    for name, pair in done.items():  # what is thin already pays for what it has
        layer, how = pair.to_dense(), {"splits": pair.splits, "scheme": pair.scheme}
        errors[name], costs[name] = [0.0], [sum(_macs(layer, where, pair.rank, **how) for where in rows[name])]
        total += sum(_macs(layer, where) for where in rows[name])
    for name, layer in layers.items():
        shape, entry = tuple(layer.weight.shape), _scheme(scheme, layer.weight)
        dense, unit = (sum(_macs(layer, where, j, scheme=entry) for where in rows[name]) for j in (None, 1))
        count = min(len(curves[name]) - 1, (layer.weight.numel() - 1) // rank_size(shape, 1, entry))
        count = min(count, (dense - 1) // unit) if unit else count
        errors[name] = [*curves[name][1 : count + 1].square().tolist(), 0.0]
        costs[name] = [*(unit * j for j in range(1, count + 1)), dense]
        total += dense
    levels = minimax_bisect(errors, costs, total / speedup)
    return {name: 0 if levels[name] + 1 == len(errors[name]) else levels[name] + 1 for name in layers}


def _macs(layer: nn.Module, where: Any, rank: int | None = None, **how: int) -> int:
    """Multiply-adds of one call, dense or at a rank."""
    if isinstance(layer, nn.Linear):
        return where * (layer.weight.numel() if rank is None else rank_macs(layer, rank, splits=how.get("splits", 1)))
    inside, outside = where
    return layer.weight.numel() * outside[0] * outside[1] if rank is None else rank_macs(layer, rank, inside, **how)


def _positions(model: nn.Module, layers: dict[str, nn.Module], example: Any) -> dict[str, list]:
    """For each call of a layer: the rows of a linear one, (input size, output size) of a convolution."""
    found: dict[str, list] = {name: [] for name in layers}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = args[0]
            linear = isinstance(module, nn.Linear | LowRankLinear)
            found[name].append(x.numel() // x.shape[-1] if linear else (tuple(x.shape[-2:]), tuple(output.shape[-2:])))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with undisturbed(model), torch.no_grad():
            model.eval()
            inputs = example if isinstance(example, tuple | list) else (example,)
            model(*(t[:1] if isinstance(t, Tensor) else t for t in inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return found


def _layers(model: nn.Module, modules: Sequence[type], skip: Iterable[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    found, skipped = decomposable(model, modules)
    names = dict(model.named_modules())
    for name in skip:
        if name not in names:
            raise BadInput(f"skip names {name!r}, which the model does not have")
        if found.pop(name, None) is not None:
            skipped[name] = "the caller left it out"
    if not found and not any("low rank" in why for why in skipped.values()) and skip:
        raise UnsupportedModel("has no layer left that can be decomposed", module=type(model).__name__)
    return found, skipped


def _scheme(scheme: str, weight: Tensor | int) -> int:
    """The folding of a weight: linear and 1 x 1 layers have one only."""
    if scheme not in _SCHEMES:
        raise BadInput(f"scheme must be 'channel' or 'spatial', got {scheme!r}")
    if isinstance(weight, int) or weight.ndim == 2 or tuple(weight.shape[2:]) == (1, 1):
        return 0
    return _SCHEMES[scheme]
