"""Self-expanding networks: start small, and grow where natural gradient says that the loss would fall fastest.

Every few epochs the network asks: how fast could the loss fall if I stayed as I am, if one block had one more layer, if it had a few more
channels? The answer is the natural expansion score of each candidate. If the best candidate promises enough more than the present
network, it becomes the network. Growth does not change the function, so training goes on as if nothing had happened.

*Equations.* With gradient g and Fisher matrix F, ``eta = g' F^-1 g``: twice the fall of the loss that the natural step promises.
``fisher="sample"``: F is the diagonal of the mean of per-sample squared gradients, ``eta = sum_j g_j^2 / (F_j + damping)``, at most the
number of parameters. ``"full"``: the whole matrix. ``"batch"``: ``F_j = sum_b g_bj^2`` over gradients of batches and
``eta = sum_b sum_j g_bj^2 / (F_j + damping)``, which counts the parameters whose gradient stands above the damping. A candidate with p'
parameters grows the network if ``(eta'/p') exp(-lam ((p' - p)/p)^2) > tau eta/p``.

*Source.* Appolinary et al., "Self Expanding Convolutional Neural Networks" (arXiv 2401.05686), whose public code has the ``"batch"``
score; the score itself: Mitchell et al., arXiv 2307.04526.

*Departures.* An inserted layer is a Dirac convolution and a PReLU of slope 1, because a LeakyReLU after a LeakyReLU is not an identity,
nor is batch normalisation in training. New channels come as twins with opposite outgoing weights, of the size of the old ones; the paper
gives all of them 1e-4 noise. So growth is exact, and every new weight has a gradient. Scores are compared per parameter: eta itself grows
with p, but by so little for a small addition that a factor of 2 is out of reach. The penalty's scale is not given in the paper; here the
increase is relative, and ``lam`` is 0 because a comparison per parameter has a price already.

*Cost.* A decision scores the network and two candidates a block: one gradient a sample each (``"sample"``), or one a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import EarlyStopping, Learner, Loss, call, copied, device_of, evaluate, find_loss, loop, to, trainable
from neurarium.learn.local import eval_mode
from neurarium.learn.schedule import undisturbed
from neurarium.roles import History, Loader, Report

__all__ = [
    "Block", "ExpandableCNN", "NaturalExpansion", "SelfExpanding", "find_blocks", "insert_identity_conv", "natural_expansion_score",
    "widen_conv",
]  # fmt: skip

ADAM: Callable[..., Optimizer] = partial(Adam, lr=2e-3)
TAU = {"batch": 2.0, "sample": 1.05, "full": 1.05}


@dataclass(frozen=True)
class NaturalExpansion(Report):
    """``eta``: twice the fall of the loss that a natural gradient step promises, by the chosen Fisher matrix."""

    eta: float
    parameters: int

    @property
    def per_parameter(self) -> float:
        return self.eta / self.parameters


def natural_expansion_score(
    model: nn.Module,
    batches: Loader,
    *,
    loss: str | Loss = "cross_entropy",
    fisher: str = "sample",
    damping: float = 1e-8,
) -> NaturalExpansion:
    """The natural expansion score of a model on some batches, in eval mode; nothing of the model is changed.

    Args:
        loss: a mean over the batch.
        fisher: ``"sample"``, ``"full"`` (for models of some hundred parameters) or ``"batch"``, see above.
        damping: added to the Fisher matrix (its diagonal).
    """
    if fisher not in TAU or not damping >= 0:
        raise BadInput(f"fisher must be one of {sorted(TAU)} and damping >= 0, not {fisher!r}, {damping}")
    checked, device = find_loss(loss), device_of(model)
    plain: Loss = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}[loss] if isinstance(loss, str) else loss
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()] if n not in weights}
    count = sum(p.numel() for p in weights.values())
    if not count:
        raise UnsupportedModel("has no parameter with requires_grad: nothing to score", module=type(model).__name__)

    def of_batch(w: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        return plain(functional_call(model, (w, rest), x if isinstance(x, tuple) else (x,)), y)

    def of_sample(w: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        return of_batch(w, tuple(t[None] for t in x) if isinstance(x, tuple) else x[None], y[None])

    total = torch.zeros(count, device=device, dtype=next(iter(weights.values())).dtype)
    squares, kept, n = torch.zeros_like(total), [], 0
    with eval_mode(model):
        for x, y in batches:
            if not len(y):
                raise BadInput("an empty batch has no gradient")
            x, y = to(x, device), to(y, device)
            if not n:
                with torch.no_grad():
                    checked(call(model, x), y)  # says what is wrong with the labels; inside vmap it could not look
            if fisher == "batch":
                g = torch.cat([v.flatten() for v in grad(of_batch)(weights, x, y).values()])
                squares += g * g
            else:
                for part in range(0, len(y), 32):
                    at = slice(part, part + 32)
                    some = tuple(t[at] for t in x) if isinstance(x, tuple) else x[at]
                    each = vmap(grad(of_sample), (None, 0, 0))(weights, some, y[at])
                    each = torch.cat([v.flatten(1) for v in each.values()], 1)  # (samples, parameters)
                    total += each.sum(0)
                    squares += each.square().sum(0)
                    if fisher == "full":
                        kept.append(each)
            n += len(y)
    if not n:
        raise BadInput("there is no batch to score on")
    if not torch.isfinite(squares).all():
        raise BadInput("the gradient is not finite: the data or the weights hold a NaN")
    mean, moving = total / n, squares > 0  # what has no gradient contributes nothing, also without damping
    if fisher == "batch":
        eta = (squares / (squares + damping))[moving].sum()
    elif fisher == "sample":
        eta = (mean.square() / (squares / n + damping))[moving].sum()
    else:
        every = torch.cat(kept)
        matrix = every.mT @ every / n + damping * torch.eye(count, device=device, dtype=every.dtype)
        eta = mean @ torch.linalg.lstsq(matrix, mean[:, None], driver="gelsd" if not every.is_cuda else None).solution[:, 0]
    return NaturalExpansion(float(eta), count)


# How a network is wired: which module's channels go where.

PASSING = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardtanh, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
PASSING_NAMES = {
    "relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid", "hardtanh", "dropout", "dropout2d", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "boolean_dispatch", "interpolate", "contiguous",
}  # fmt: skip
ACTING = (nn.BatchNorm2d, nn.PReLU, *PASSING[:10])
Places = tuple[Tensor, Tensor]  # places of the old entries along an axis; for every entry, its new channel's number or -1 if it is old


@dataclass(frozen=True)
class Wiring:
    nodes: list[fx.Node]
    shapes: dict[fx.Node, torch.Size]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


def _wiring(model: nn.Module, example: Any) -> Wiring:
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # whatever the model's own code does with a stand-in for a tensor
        raise UnsupportedModel(f"its forward cannot be traced ({type(error).__name__}: {error})", module=type(model).__name__) from error
    recorder = _Recorder(traced)
    with eval_mode(model), torch.no_grad():
        traced.eval()
        recorder.run(*(example if isinstance(example, tuple) else (example,)))
    return Wiring(list(traced.graph.nodes), recorder.shapes)


class Grown(nn.Sequential):
    """A module and the identity layers that have been put behind it."""


@dataclass(frozen=True)
class Block:
    """Convolutions of one resolution."""

    convs: tuple[str, ...]
    end: str  # the module behind which a layer may be inserted
    size: tuple[int, ...]  # (channels, height, width) there


def find_blocks(model: nn.Module, example: Any) -> list[Block]:
    """Convolutions (larger than 1x1, if there are such) in order, grouped by the resolution of their output."""
    wiring, modules = _wiring(model, example), dict(model.named_modules())
    found = [n for n in wiring.nodes if n.op == "call_module" and type(modules[n.target]) is nn.Conv2d]
    wide = [n for n in found if max(modules[n.target].kernel_size) > 1] or found
    if not wide:
        raise UnsupportedModel("has no nn.Conv2d, so there is nothing to grow", module=type(model).__name__)
    sizes: dict[tuple[int, ...], list[fx.Node]] = {}
    for node in wide:
        sizes.setdefault(tuple(wiring.shapes[node][2:]), []).append(node)
    uses = Counter(n.target for n in wiring.nodes if n.op == "call_module")
    if twice := [n.target for n in wide if uses[n.target] > 1]:
        raise UnsupportedModel("is used more than once, so it cannot grow", module=twice[0])
    blocks = []
    for nodes in sizes.values():
        end = nodes[-1]
        while len(end.users) == 1:
            user = next(iter(end.users))
            if user.op != "call_module" or uses[user.target] > 1 or not isinstance(modules[user.target], ACTING):
                break
            end = user
        blocks.append(Block(tuple(n.target for n in nodes), end.target, tuple(wiring.shapes[end][1:])))
    return blocks


def insert_identity_conv(
    model: nn.Module, at: str, *, example: Any, kernel: int = 3, noise: float = 1e-3, seed: int = 0
) -> nn.Module:
    """A copy of the model with a layer behind module ``at`` that changes nothing yet: a Dirac convolution and a PReLU of slope 1.

    Args:
        example: an input, to learn how many channels there are.
        noise: of the kernel around the Dirac; with 0 the function is exactly the same.
    """
    grown = deepcopy(model)
    shape: list[torch.Size] = []
    modules = dict(grown.named_modules())
    if at not in modules or not at:
        raise BadInput(f"the model has no module {at!r}")
    handle = modules[at].register_forward_hook(lambda m, inputs, output: shape.append(output.shape))
    with eval_mode(grown), torch.no_grad():
        call(grown, example)
    handle.remove()
    if len(shape) != 1 or len(shape[0]) != 4:
        raise UnsupportedModel("must be used once and put out images (n, channels, height, width)", module=at)
    _insert(grown, at, shape[0][1], kernel, noise, seed)
    return grown


def _insert(model: nn.Module, at: str, channels: int, kernel: int, noise: float, seed: int) -> None:
    if kernel % 2 == 0:
        raise BadInput(f"an identity needs an odd kernel, not {kernel}")
    like = next(iter(model.parameters()))
    conv = nn.utils.skip_init(nn.Conv2d, channels, channels, kernel, padding=kernel // 2)
    with torch.no_grad():
        nn.init.dirac_(conv.weight)
        conv.weight += noise * torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(seed))
        conv.bias.zero_()
    layer = nn.Sequential(conv, nn.PReLU(channels, init=1.0)).to(like.device, like.dtype)
    parent, _, name = at.rpartition(".")
    holder, module = model.get_submodule(parent), model.get_submodule(at)
    outer = model.get_submodule(parent.rpartition(".")[0]) if parent else None
    if isinstance(outer, Grown):  # ``at`` is the end of a layer that was inserted before
        outer.append(layer.train(outer.training))
    else:
        holder._modules[name] = Grown(module, layer).train(module.training)


def widen_conv(model: nn.Module, at: str, by: int, *, example: Any, std: float | None = None, seed: int = 0) -> nn.Module:
    """A copy of the model whose convolution ``at`` has ``by`` more output channels; the function is the same, to rounding.

    Normalisation, activations, pooling, flattening and concatenation behind it are followed to the layers that read the channels. The new
    channels are pairs of twins, which those layers read with opposite weights; an odd one is read with weight zero.

    Args:
        example: an input, for the shapes.
        std: of the new channels' incoming weights; that of the present ones by default.

    Raises:
        UnsupportedModel: the channels reach a sum, a grouped convolution, a norm over channels, the output, or unknown code.
    """
    grown = deepcopy(model)
    _widen(grown, at, by, example, std, seed)
    return grown


Swaps = list[tuple[nn.Parameter, nn.Parameter, int, Tensor]]  # old, new, axis, places of the old entries; in the order of change


def _widen(model: nn.Module, at: str, by: int, example: Any, std: float | None, seed: int) -> Swaps:
    modules, wiring = dict(model.named_modules()), _wiring(model, example)
    conv = modules.get(at)
    if type(conv) is not nn.Conv2d or conv.groups != 1 or by < 1:
        raise UnsupportedModel(f"must be an nn.Conv2d of one group, to be widened by at least 1 (not {by})", module=at)
    places: dict[fx.Node, Places] = {}
    edits: dict[str, Places] = {}
    for node in wiring.nodes:
        _follow(node, at, by, conv.out_channels, modules, wiring.shapes, places, edits)
    if not places:
        raise UnsupportedModel("is not used by forward", module=at)
    swaps: Swaps = []
    device = conv.weight.device
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        size = float(conv.weight.square().mean().sqrt()) if std is None else std
        fresh = size * torch.randn(by, *conv.weight.shape[1:], generator=generator).to(conv.weight)
        fresh[1::2] = fresh[: by - by % 2 : 2]
        old = torch.arange(conv.out_channels, device=device)
        _resize(conv, "weight", 0, old, torch.cat([torch.zeros_like(conv.weight), fresh]), swaps)
        if conv.bias is not None:
            _resize(conv, "bias", 0, old, conv.bias.new_zeros(conv.out_channels + by), swaps)
        conv.out_channels += by
        for name, (kept, channel) in edits.items():
            module, kept, total = modules[name], kept.to(device), len(channel)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = module.weight.new_zeros(module.weight.shape[0], total, *module.weight.shape[2:])
                size = float(module.weight.square().mean().sqrt())
                for pair in range(by // 2):  # what one adds, its twin takes away
                    one, two = (torch.nonzero(channel == c)[:, 0].to(device) for c in (2 * pair, 2 * pair + 1))
                    weight[:, one] = size * torch.randn(weight[:, one].shape, generator=generator).to(weight)
                    weight[:, two] = -weight[:, one]
                _resize(module, "weight", 1, kept, weight, swaps)
                setattr(module, "in_channels" if isinstance(module, nn.Conv2d) else "in_features", total)
                continue
            for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                if (tensor := getattr(module, part, None)) is not None:
                    first = float(tensor.mean()) if isinstance(module, nn.PReLU) else value
                    _resize(module, part, 0, kept, torch.full((total,), first, dtype=tensor.dtype, device=device), swaps)
            setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", total)
    return swaps


def _resize(module: nn.Module, name: str, axis: int, kept: Tensor, fresh: Tensor, swaps: Swaps) -> None:
    old = getattr(module, name)
    fresh = fresh.index_copy(axis, kept, old.detach())
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(fresh, requires_grad=old.requires_grad)
        setattr(module, name, new)
        swaps.append((old, new, axis, kept))
    else:
        setattr(module, name, fresh)


def _follow(
    node: fx.Node, at: str, by: int, channels: int, modules: Mapping[str, nn.Module], shapes: Mapping[fx.Node, torch.Size],
    places: dict[fx.Node, Places], edits: dict[str, Places],
) -> None:  # fmt: skip
    """Where the old channels are in the output of this node."""
    inputs = [n for n in node.all_input_nodes if n in places]
    module = modules[node.target] if node.op == "call_module" else None
    name = str(node.target) if module is not None else getattr(node.target, "__name__", str(node.target))
    if module is modules[at] and module is not None:
        if inputs or any(modules[n.target] is module for n in places if n.op == "call_module"):
            raise UnsupportedModel("is used twice, so its channels cannot grow", module=at)
        places[node] = torch.arange(channels), torch.cat([torch.full((channels,), -1), torch.arange(by)])
    elif not inputs:
        return
    elif node.op == "output":
        raise UnsupportedModel("its channels are the model's output", module=at)
    elif isinstance(module, (nn.Conv2d, nn.Linear)) and type(module) in (nn.Conv2d, nn.Linear):
        if name in edits or getattr(module, "groups", 1) != 1 or (isinstance(module, nn.Linear) and len(shapes[inputs[0]]) != 2):
            raise UnsupportedModel(f"cannot take more channels from {at}: it is grouped, shared, or reads another axis", module=name)
        edits[name] = places[inputs[0]]
    elif isinstance(module, nn.BatchNorm2d) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
        if name in edits:
            raise UnsupportedModel(f"is used twice behind {at}, so its channels cannot grow", module=name)
        edits[name] = places[node] = places[inputs[0]]
    elif isinstance(module, (nn.PReLU, *PASSING)) or (module is None and (name in PASSING_NAMES or _spatial_mean(node, name))):
        places[node] = places[inputs[0]]
    elif (isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1) or (name == "flatten" and _from_one(node)):
        kept, fresh = places[inputs[0]]
        area = math.prod(shapes[inputs[0]][2:])
        places[node] = (kept[:, None] * area + torch.arange(area)).flatten(), fresh.repeat_interleave(area)
    elif name in ("cat", "concat") and (node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)) == 1:
        kept, fresh = [], []
        for part in node.args[0]:  # type: ignore[union-attr]
            size = shapes[part][1]
            of_part = places.get(part, (torch.arange(size), torch.full((size,), -1)))
            kept.append(of_part[0] + sum(map(len, fresh)))
            fresh.append(of_part[1])
        places[node] = torch.cat(kept), torch.cat(fresh)
    else:
        raise UnsupportedModel(f"mixes or orders the channels of {at} in a way that is not known here", module=name)


def _spatial_mean(node: fx.Node, name: str) -> bool:
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return name == "mean" and axes is not None and {a % 4 for a in (axes if isinstance(axes, (tuple, list)) else (axes,))} == {2, 3}


def _from_one(node: fx.Node) -> bool:
    return (node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)) == 1 and len(node.args) < 3


class ExpandableCNN(nn.Module):
    """The paper's network: blocks of 3x3 convolution, normalisation and LeakyReLU with pooling between; the first block's output is
    carried to the end and concatenated, and a 1x1 convolution leads to the classes.

    Args:
        channels: of the blocks, which begin with one layer each.
    """

    def __init__(self, channels: Sequence[int] = (16, 16, 16), classes: int = 10, in_channels: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        if not channels:
            raise BadInput("ExpandableCNN needs at least one block")
        sizes = [in_channels, *channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(), nn.Dropout2d(dropout))
            for a, b in pairwise(sizes)
        )
        self.pool, self.small = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)
        self.mix = nn.Conv2d(channels[0] + channels[-1], channels[-1], 1)
        self.act, self.head = nn.LeakyReLU(), nn.Linear(4 * channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = block(self.pool(x))
        return self.head(self.act(self.mix(torch.cat([self.small(first), self.small(x)], 1))).flatten(1))


@dataclass(frozen=True)
class Candidate:
    """One way to grow."""

    kind: str  # "insert" or "widen"
    at: tuple[str, ...]  # the module behind which to insert, or the convolutions to widen
    amount: int  # kernel size, or channels
    seed: int

    def apply(self, model: nn.Module, example: Any, noise: float) -> Swaps:
        """Grow ``model`` in place."""
        if self.kind == "insert":
            block = next(b for b in find_blocks(model, example) if b.end == self.at[0])
            _insert(model, self.at[0], block.size[0], self.amount, noise, self.seed)
            return []
        swaps: Swaps = []
        for i, conv in enumerate(self.at):
            try:
                swaps += _widen(model, conv, self.amount, example, None, self.seed + i)
            except UnsupportedModel:
                continue  # its neighbours may still grow
        if not swaps:
            raise UnsupportedModel("no convolution of the block can be widened", module=self.at[0])
        return swaps


@dataclass(frozen=True)
class SelfExpanding(Learner):
    """Train by backpropagation, and before an epoch grow where it promises most. Works on any traceable model with convolutions.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, or a function of ``(output, y)``.
        optimizer: of the parameters; its state is carried through growth.
        schedule: of the learning rate, stepped after every batch; growth does not reset it.
        fisher, damping: of the score, see :func:`natural_expansion_score`.
        tau: how much more, per parameter, a candidate must promise; by default 2 for ``fisher="batch"``, else 1.05.
        lam: penalty on the squared relative increase of parameters.
        add_channels: by which a block is widened.
        cooldown: epochs before the first decision and after each growth.
        max_per_block: convolutions that a block may have.
        samples: on which a decision is made.
        l1: weight of the sum of absolute weights in the loss.
        noise: around the identity of an inserted layer.

    After ``fit``, ``history.extra["expansions"]`` holds the epochs of growth, ``["parameters"]`` the size in each epoch, ``["ratio"]``
    what the best candidate promised; ``history.state["parts"]["growth"]["checkpoints"]`` the weights at the end of each size. The model is
    grown in place; ``resume`` takes it as it was given first or as it is. Subclasses change the decision in :meth:`choose`.
    """

    loss: str | Loss = "cross_entropy"
    optimizer: Callable[..., Optimizer] = ADAM
    schedule: Callable[[Optimizer], Any] | None = None
    fisher: str = "sample"
    damping: float = 1e-8
    tau: float | None = None
    lam: float = 0.0
    add_channels: int = 2
    cooldown: int = 10
    max_per_block: int = 10
    samples: int = 256
    l1: float = 1e-5
    noise: float = 1e-3

    def candidates(self, model: nn.Module, example: Any) -> list[Candidate]:
        """Each block with one more layer, and with more channels."""
        found = []
        for block in find_blocks(model, example):
            seed = int(torch.randint(2**31, ()))
            if len(block.convs) < self.max_per_block:
                found.append(Candidate("insert", (block.end,), max(model.get_submodule(block.convs[-1]).kernel_size) | 1, seed))
            found.append(Candidate("widen", block.convs, self.add_channels, seed))
        return found

    def choose(
        self, model: nn.Module, batches: Sequence[Any], candidates: Sequence[Candidate], epoch: int
    ) -> tuple[Candidate | None, float]:
        """The candidate to grow by, or None, and what the best one promised."""
        del epoch
        score = partial(natural_expansion_score, batches=batches, loss=self.loss, fisher=self.fisher, damping=self.damping)
        now, best, most = score(model), None, 0.0
        for candidate in candidates:
            grown = deepcopy(model)
            try:
                candidate.apply(grown, batches[0][0], self.noise)
            except UnsupportedModel:
                continue
            found = score(grown)
            penalty = math.exp(-self.lam * ((found.parameters - now.parameters) / now.parameters) ** 2)
            promise = found.per_parameter * penalty / max(now.per_parameter, 1e-30)
            if promise > most:
                best, most = candidate, promise
        return (best if most > (TAU[self.fisher] if self.tau is None else self.tau) else None), most

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if self.fisher not in TAU or self.add_channels < 1 or self.cooldown < 1 or self.samples < 1:
            raise BadInput(f"fisher must be one of {sorted(TAU)}; add_channels, cooldown and samples at least 1")
        if any(isinstance(c, EarlyStopping) and c.restore for c in callbacks):
            raise BadInput("EarlyStopping(restore=True) cannot put the weights of a smaller size into a grown model: restore=False")
        if device is not None:
            model.to(device)
        growth = _Growth(self, model, loader)
        if resume:
            growth.replay(resume)
        parameters = trainable(model)
        growth.optimizer = optimizer = self.optimizer(parameters)
        if len(optimizer.param_groups) != 1:
            raise BadInput("SelfExpanding needs an optimizer of one parameter group")
        schedule = None if self.schedule is None else self.schedule(optimizer)
        loss_of = find_loss(self.loss)

        def step(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            output = call(model, x)
            loss = loss_of(output, y)
            whole = loss + self.l1 * sum(p.abs().sum() for p in trainable(model)) if self.l1 else loss
            whole.backward()
            if torch.isfinite(whole.detach()):
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            return loss, output

        history = loop(
            model, growth, epochs=epochs, step=step, parts={"growth": growth, "schedule": schedule}, val=val,
            evaluator=partial(evaluate, model, loss=self.loss), seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip
        series = {"expansions": growth.epochs, "parameters": growth.sizes, "ratio": growth.ratios}
        return replace(history, extra={**history.extra, **{k: tuple(v) for k, v in series.items()}})


class _Growth:
    """The loader of the training loop, which grows the model before an epoch; and what of this must be saved."""

    def __init__(self, learner: SelfExpanding, model: nn.Module, loader: Loader) -> None:
        self.learner, self.model, self.loader = learner, model, loader
        self.optimizer: Optimizer
        self.events: list[list[Any]] = []
        self.signatures: list[list[list[int]]] = []  # of the weights, before each event
        self.epochs: list[int] = []
        self.sizes: list[int] = []
        self.ratios: list[float] = []
        self.checkpoints: list[dict[str, Any]] = []
        with undisturbed(loader, device_of(model)) as some:
            first = next(iter(some), None)
        if first is None or not len(first[1]):
            raise BadInput("the loader yielded no samples")
        self.example = to(first[0], device_of(model))
        find_blocks(model, self.example)  # refuses before the first step
        if isinstance(getattr(loader, "generator", None), torch.Generator):
            self.generator = loader.generator

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        since = epoch - self.epochs[-1] if self.epochs else epoch
        if epoch > 0 and since >= self.learner.cooldown:
            self._decide(epoch)
        self.sizes.append(sum(p.numel() for p in trainable(self.model)))

    def _decide(self, epoch: int) -> None:
        with undisturbed(self.loader, device_of(self.model)) as some:
            if hasattr(some, "set_epoch"):
                some.set_epoch(epoch)
            batches, count = [], 0
            for x, y in some:
                batches.append((to(x, device_of(self.model)), to(y, device_of(self.model))))
                count += len(y)
                if count >= self.learner.samples:
                    break
        choice, promise = self.learner.choose(self.model, batches, self.learner.candidates(self.model, self.example), epoch)
        self.ratios.append(promise)
        if choice is None:
            return
        self.checkpoints.append({"epoch": epoch, "parameters": self.sizes[-1], "model": copied(self.model.state_dict())})
        self.signatures.append(self._signature())
        swaps = choice.apply(self.model, self.example, self.learner.noise)
        carry(self.optimizer, trainable(self.model), swaps)
        self.events.append([choice.kind, list(choice.at), choice.amount])
        self.epochs.append(epoch)

    def _signature(self) -> list[list[int]]:
        return [list(v.shape) for v in self.model.state_dict().values()]

    def replay(self, resume: Mapping[str, Any]) -> None:
        """Give the model the architecture of a saved run; it may be any of the sizes that the run went through."""
        saved = resume["parts"].get("growth")
        if saved is None:
            raise BadInput(f"resume does not fit this learner: it has {sorted(resume['parts'])}")
        steps = [list(map(list, s)) for s in saved["signatures"]] + [[list(v.shape) for v in resume["parts"]["model"].values()]]
        mine = self._signature()
        if mine not in steps:
            raise BadInput("resume does not fit this model: it has none of the sizes that the saved run went through")
        for kind, at, amount in saved["events"][steps.index(mine) :]:
            Candidate(kind, tuple(at), int(amount), 0).apply(self.model, self.example, 0.0)

    def state_dict(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in ("events", "signatures", "epochs", "sizes", "ratios", "checkpoints")}
        return {"optimizer": self.optimizer.state_dict(), **copied(plain)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("events", "signatures", "epochs", "sizes", "ratios", "checkpoints"):
            setattr(self, name, list(state[name]))


def carry(optimizer: Optimizer, parameters: Sequence[nn.Parameter], swaps: Swaps) -> None:
    """Give the optimizer the new parameters; what it remembered of an old one is kept at the old entries and zero at the new."""
    for old, new, axis, places in swaps:
        if (state := optimizer.state.pop(old, None)) is not None:
            optimizer.state[new] = {k: _padded(v, new, axis, places) for k, v in state.items()}
    optimizer.param_groups[0]["params"] = list(parameters)


def _padded(value: Any, after: Tensor, axis: int, places: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.ndim != after.ndim:
        return value
    shape = list(value.shape)
    shape[axis] = after.shape[axis]
    return value.new_zeros(shape).index_copy(axis, places.to(value.device), value)
