"""Early exits: a chain of segments with a small classifier after each, and the policy that stops at the first sure one.

:func:`with_exits` puts exits on a model of yours; :class:`EarlyExit` trains them and decides with any gate and any thresholds. Policies
that learn when to stop build on it.

*Source.* Exits after intermediate layers, trained jointly by a sum of losses: BranchyNet (Teerapittayanon et al. 2016); heads that pool to
2x2 rather than to 1x1 keep where things are, without which heads on few channels are too weak to let anything leave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.budget import Curve, calibrate
from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.gates import Gate, MaxProb
from neurarium.dynamic.outcome import Mode, Outcome, Policy, Segment, Staged
from neurarium.dynamic.staged import dense, pick, run, step
from neurarium.dynamic.tree import has_nan
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import as_chain
from neurarium.learn.fit import to
from neurarium.roles import Loader

__all__ = ["EarlyExit", "ExitChain", "check_labels", "freeze_backbone", "head", "with_exits"]


class ExitChain(nn.Module):
    """Segments one after another, readout k by ``heads[k]`` from what segment k puts out. As a module it is the plain model: all
    segments and the last head."""

    def __init__(self, segments: Sequence[nn.Module], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(segments) != len(heads) or not segments:
            raise BadInput(f"need one head for each segment and at least one of both, not {len(segments)} segments and {len(heads)} heads")
        self.segments, self.heads = nn.ModuleList(segments), nn.ModuleList(heads)

    @property
    def n_stages(self) -> int:
        return len(self.segments)

    def start(self, x: Tensor) -> Tensor:
        return x

    def stage(self, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.segments[k](state)
        return state, self.heads[k](state)

    def forward(self, x: Tensor) -> Tensor:
        for segment in self.segments:
            x = segment(x)
        return self.heads[-1](x)


class _MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def head(feature: Tensor, classes: int) -> nn.Module:
    """A linear classifier on features ``(n, d)``, ``(n, time, d)`` (mean over time) or ``(n, channels, height, width)`` (pooled to 2x2)."""
    if feature.ndim == 2:
        return nn.Linear(feature.shape[1], classes)
    if feature.ndim == 3:
        return nn.Sequential(_MeanToken(), nn.Linear(feature.shape[2], classes))
    if feature.ndim == 4:
        size = min(2, feature.shape[2]), min(2, feature.shape[3])
        return nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(feature.shape[1] * size[0] * size[1], classes))
    raise BadInput(f"no standard head for features of shape {tuple(feature.shape)}: pass head=")


def with_exits(
    model: nn.Module, example: Tensor, *, cuts: int | Sequence[str] = 3, head: Callable[[Tensor, int], nn.Module] = head
) -> ExitChain:
    """A copy of ``model`` with exits; the last readout is the model's own output.

    Args:
        model: any model that is a chain of modules (``nn.Sequential``, a list of blocks, children that run in order), which is proven on
            ``example``: the cut chain must give exactly ``model(example)``.
        example: a batch; the output must be ``(n, classes)``.
        cuts: how many exits, placed nearest to equal shares of the FLOPs, or after which modules (their names in ``model``).
        head: makes an exit from a feature batch and the number of classes.

    Raises:
        UnsupportedModel: names the module where the model is not such a chain.
    """
    model = copy.deepcopy(model)
    chain = as_chain(model, example)
    with evaluating(model), torch.no_grad():
        features = chain.forward(example)
    if features[-1].ndim != 2:
        raise UnsupportedModel(f"puts out {tuple(features[-1].shape)}, exits need (n, classes)", module=chain.names[-1][-1])
    last = len(chain.blocks) - 1
    if isinstance(cuts, int):
        if not 1 <= cuts <= last:
            raise BadInput(f"this model is a chain of {last + 1} blocks: it takes 1 to {last} exits, not {cuts}")
        with evaluating(model):
            price = torch.tensor(CostTable.measure(chain.blocks, example).total, dtype=torch.float64)
        after = _spread(price[:-1] / price[-1].clamp(min=1), cuts)
    else:
        where = {name: i for i, names in enumerate(chain.names) for name in names}
        after = sorted({_find(name, where, last) for name in cuts})
        if not after:
            raise BadInput("cuts names no module to exit after")
    edges = [0, *(a + 1 for a in after), last + 1]
    segments = [_join(chain.blocks[a:b]) for a, b in pairwise(edges)]
    exits = [head(features[a], features[-1].shape[1]).to(features[a]) for a in after]
    return ExitChain(segments, [*exits, nn.Identity()]).train(model.training)


def _join(blocks: Sequence[nn.Module]) -> nn.Module:
    return blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)


def _find(name: str, where: dict[str, int], last: int) -> int:
    if name not in where or where[name] == last:
        names = sorted(n for n, i in where.items() if i != last)
        raise BadInput(f"cannot exit after {name!r}; the modules to exit after are {names}")
    return where[name]


def _spread(shares: Tensor, n: int) -> list[int]:
    """The n positions nearest to shares 1/(n+1), 2/(n+1), ..., no two the same, in order."""
    chosen: list[int] = []
    for i in range(1, n + 1):
        first, stop = (chosen[-1] + 1 if chosen else 0), len(shares) - (n - i)
        chosen.append(first + int((shares[first:stop] - i / (n + 1)).abs().argmin()))
    return chosen


def freeze_backbone(staged: Any) -> list[nn.Parameter]:
    """Freeze all but the early heads, in place, and return the parameters that are left to train.

    Raises:
        UnsupportedModel: the network has no ``heads``, or early heads without parameters.
    """
    heads = getattr(staged, "heads", None)
    name = type(staged).__name__
    if not isinstance(heads, nn.ModuleList) or len(heads) != staged.n_stages:
        raise UnsupportedModel("needs `heads`, an nn.ModuleList with one classifier a stage; with_exits makes them", module=name)
    staged.requires_grad_(False)
    early = heads[:-1].requires_grad_(True)
    if not list(early.parameters()):
        raise UnsupportedModel("has no early head with parameters: nothing to train on a frozen backbone", module=name)
    return list(early.parameters())


def check_labels(y: Tensor, readout: Tensor) -> None:
    """Raise :class:`BadInput` unless ``y`` is one class number for each row of ``readout`` (n, classes)."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise BadInput(f"labels must be integers, not {y.dtype}")
    n, classes = readout.shape[0], readout.shape[-1]
    if y.shape != (n,):
        raise BadInput(f"{n} rows need labels of shape ({n},), not {tuple(y.shape)}")
    if n and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise BadInput(f"labels must lie in 0..{classes - 1}, not {int(y.min())}..{int(y.max())}")


class EarlyExit(Policy):
    """Stop at the first exit that is sure enough.

    Args:
        staged: a :class:`~neurarium.dynamic.outcome.Staged` network; :func:`with_exits` makes one of an ordinary model.
        gate: the question; the largest probability by default.
        threshold: where to stop, at every exit the same; above 1 is never. ``calibrate`` allows ``budget=`` besides.
        frozen: train the early heads alone.

    The loss is the plain sum of the exits' cross-entropies. ``tau`` (stages,) is the current setting and part of ``state_dict``, and so is
    the calibrated curve. ``chunk`` is the number of rows run at a time (``None``: all), see :func:`~neurarium.dynamic.staged.best_chunk`.
    """

    def __init__(self, staged: Staged, gate: Gate | None = None, *, threshold: float = 0.9, frozen: bool = False) -> None:
        super().__init__()
        if not isinstance(staged, nn.Module) or not isinstance(staged, Staged):
            raise UnsupportedModel("has no n_stages, start and stage: with_exits(model, example) adds them", module=type(staged).__name__)
        self.staged = staged
        self.gate = MaxProb() if gate is None else gate
        self.frozen = frozen
        self.chunk: int | None = None
        self.curve: Curve | None = None
        self.register_buffer("tau", torch.full((staged.n_stages,), float(threshold)))
        if frozen:
            freeze_backbone(staged)

    def decide(self, x: Any, *, budget: float | None = None, threshold: float | None = None, mode: Mode = "compact") -> Outcome:
        if has_nan(x):
            raise BadInput("the input has NaN: no exit can be sure of what it says about that")
        table = self.costs(x)
        tau = self._setting(table, budget, threshold)
        return run(self.staged, self.gate, tau, x, totals=table.tensor(tau.device), mode=mode, chunk=self.chunk)

    def setting(self, x: Any, *, budget: float | None = None, threshold: float | None = None) -> Tensor:
        """The thresholds ``(stages,)`` that a budget in FLOPs a row, or one threshold for all exits, stands for."""
        return self._setting(None if budget is None else self.costs(x), budget, threshold)

    def _setting(self, table: CostTable | None, budget: float | None, threshold: float | None) -> Tensor:
        if budget is not None and threshold is not None:
            raise BadInput("give a budget or a threshold, not both")
        if threshold is not None:
            return torch.full_like(self.tau, threshold)
        if budget is None or table is None:
            return self.tau
        if self.curve is None:
            raise BadInput("a budget needs a calibrated policy: call calibrate(loader) first")
        return self.curve.tau[self.curve.pick(budget, table)].to(self.tau)

    def use(self, x: Any = None, *, budget: float | None = None, threshold: float | None = None) -> EarlyExit:
        """Make a budget (for inputs shaped like ``x``) or a threshold the current setting."""
        self.tau.copy_(self.setting(x, budget=budget, threshold=threshold))
        return self

    def masked(self, x: Any) -> Tensor:
        return pick(*dense(self.staged, self.gate, x), self.tau)[0]

    def outputs(self, x: Any) -> list[Tensor]:
        state, ys = self.staged.start(x), []
        for k in range(self.staged.n_stages):
            state, y = self.staged.stage(k, state)
            ys.append(y)
        return ys

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        del step
        return torch.stack([F.cross_entropy(out, y) for out in self.outputs(x)]).sum()

    def train(self, mode: bool = True) -> EarlyExit:
        """Training mode; a frozen backbone stays in evaluation mode, its early heads follow ``mode``."""
        super().train(mode)
        if self.frozen and mode:
            self.staged.eval()
            self.staged.heads[:-1].train()
        return self

    @torch.no_grad()
    def calibrate(self, loader: Loader, *, grid: int = 64) -> Curve:
        scores, correct = [], []
        with evaluating(self):
            for x, y in loader:
                readouts, s = dense(self.staged, self.gate, to(x, self.tau.device))
                scores.append(s)
                correct.append(readouts.argmax(-1) == y[:, None].to(readouts.device))
        if not scores:
            raise BadInput("the loader yielded no samples to calibrate on")
        self.curve = calibrate(torch.cat(scores), torch.cat(correct), grid=grid)
        return self.curve

    def costs(self, example: Any) -> CostTable:
        """As :meth:`Policy.costs`; cached features carry the prices of the network that they come from."""
        table = getattr(self.staged, "table", None)
        return table if isinstance(table, CostTable) else super().costs(example)

    def segments(self) -> Sequence[Segment]:
        return [partial(self._segment, k) for k in range(self.staged.n_stages)]

    def _segment(self, k: int, carry: Any) -> Any:
        state, memory = (self.staged.start(carry), None) if k == 0 else carry
        state, _, _, memory = step(self.staged, self.gate, k, state, memory)
        return state, memory

    def get_extra_state(self) -> Tensor:
        return torch.empty(0) if self.curve is None else self.curve.pack()

    def set_extra_state(self, state: Tensor) -> None:
        self.curve = None if state.numel() == 0 else Curve.unpack(state.cpu())
