"""Counter-current learning: a second network carries the targets down, and at every level the two networks teach each other.

The forward network takes inputs up. A feedback network of the mirrored shape takes the classes down. At each level an activation should
be similar to the signal of its own class and not to those of the others; that similarity is the only loss there, and it trains one map
of each network: the forward map that made the activation and the feedback map that made the signal. Near the top the feedback signals are
still close to the classes and guide the forward layers; near the bottom the activations are still close to the data and guide the
feedback layers. No error is transported back, no weight is shared between the directions, no layer waits for another's gradient.

*Equations.* ``a_0 = x``, ``a_l = F_l(sg a_{l-1})``; from the class prototypes ``s_L = I`` (one row a class, not a sample) down
``s_{l-1} = act(R_l sg s_l)``, without activation for ``s_0``; ``sg`` cuts the gradient. Level ``l < L`` with ``d_l`` features:
``C_l = a_l s_l^T`` (samples x classes), loss ``256 scale mean((C_l - Y)^2) / d_l`` with ``Y`` the one-hot labels. It trains ``F_l`` and
``R_{l+1}``, so the level of the input trains ``R_1`` alone. The top trains ``F_L`` by cross-entropy. The forward network predicts alone.

*Source.* Kao, Hariharan, "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning" (arXiv 2409.19841)
and its published code: plain SGD with learning rate 1 for both networks, each network's gradient clipped to norm 1.

*Departures.* The mirror is made of any chain of blocks: linear layers, convolutions (upsampled to the size of their input), pools, reshapes
exactly; a residual or transformer block by a learned map from its output's shape to its input's. The clip is one number a network; with
``clip=None`` nothing at all crosses between levels. No gradient centralisation. Targets are classes; the paper's autoencoder is left out.

*Cost.* One forward and one backward of each block, and as much of the feedback network for as many rows as there are classes. What is
kept for a backward pass is that of one level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import NORMS, Chain
from neurarium.learn.fit import History, evaluate, forked_rng, loop
from neurarium.learn.local import Facts, LocalLearner, LocalObjective, eval_mode

__all__ = ["CounterCurrent", "mirror"]

SGD1: Callable[..., Optimizer] = partial(SGD, lr=1.0)


@dataclass(frozen=True, kw_only=True)
class CounterCurrent(LocalLearner):
    """Train every block by the similarity of its output to a feedback network's signals for the classes.

    Args:
        optimizer: of the forward network.
        feedback_optimizer: of the feedback network; like the forward network's by default.
        clip: largest norm of the whole gradient of each network.
        scale: weight of the losses below the top.
        similarity: ``"product"``, the equations above, or ``"cosine"``: of vectors of length one, without the factor ``256 / d_l``. The
            paper's MLPs have the first, its convolutional networks the second.
        self_similarity: weight of a further loss that keeps the samples of a batch, and the signals of the classes, apart (the paper's
            convolutional networks use 0.5, which goes with the cosine).
        activation: makes the activation of a feedback signal; by default that of the mirrored block.
        feedback: the feedback network to begin with, such as ``learner.trained(model).feedback`` of an earlier fit (a copy is trained).

    Other arguments: :class:`~neurarium.learn.local.LocalLearner`; all levels learn on each batch, so ``order`` is ``"parallel"``. The
    feedback network is ``learner.trained(model).feedback`` and in ``history.state``.
    """

    optimizer: Callable[..., Optimizer] = SGD1
    feedback_optimizer: Callable[..., Optimizer] | None = None
    clip: float | None = 1.0
    scale: float = 0.5
    similarity: str = "product"
    self_similarity: float = 0.0
    activation: Callable[[], nn.Module] | None = None
    feedback: nn.ModuleList | None = None

    def objective(self, chain: Chain, facts: Facts) -> _CounterCurrent:
        if self.order != "parallel" or not self.detach:
            raise BadInput("counter-current learning needs both networks at once: order='parallel', detach=True")
        if self.similarity not in ("product", "cosine"):
            raise BadInput(f"similarity must be 'product' or 'cosine', not {self.similarity!r}")
        if chain.head is None:
            raise UnsupportedModel("the last block must be a linear layer that gives one score a class", module=chain.names[-1][-1])
        if facts.classes > chain.head.out_features:
            raise BadInput(f"y holds class {facts.classes - 1}, but the model has {chain.head.out_features} outputs")
        feedback = mirror(chain, facts.example, self.activation) if self.feedback is None else deepcopy(self.feedback)
        feedback.to(chain.head.weight.device, chain.head.weight.dtype)
        return _CounterCurrent(
            chain, feedback, self.scale, self.similarity == "cosine", self.self_similarity, facts.example.is_floating_point()
        )

    def _parallel(self, model, objective, loader, *, epochs, val, seed, callbacks, resume, first) -> History:
        del first
        forward = [p for block in objective.blocks for p in block.parameters() if p.requires_grad]
        feedback = list(objective.feedback.parameters())
        networks = [(forward, self.optimizer(forward)), (feedback, (self.feedback_optimizer or self.optimizer)(feedback))]

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                h = objective.enter(x, y)
            for _, optimizer in networks:
                optimizer.zero_grad()
            scores, worst = h, None
            for i, block in enumerate(objective.blocks):
                h_in = h
                h = block(h_in)
                if objective.learned(i):
                    loss = objective.loss(i, h_in, h, y)[0]
                    loss.backward()  # the graph of this level goes here
                    worst = loss.detach() if worst is None or torch.isfinite(worst) else worst
                scores = h = h.detach()
            if torch.isfinite(worst):
                for parameters, optimizer in networks:
                    if self.clip is not None:
                        nn.utils.clip_grad_norm_(parameters, self.clip)
                    optimizer.step()
            return worst, scores

        parts = {"objective": objective, "forward": networks[0][1], "feedback": networks[1][1]}
        return loop(
            model, loader, epochs=epochs, step=step, parts=parts, val=val, evaluator=partial(evaluate, model),
            seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip


class _CounterCurrent(LocalObjective):
    """Block 0 stands for the input's level, so that block l is F_l; ``feedback[l]`` is R_{l+1}, whose output meets that of block l."""

    signals: list[Tensor]

    def __init__(self, chain: Chain, feedback: nn.ModuleList, scale: float, cosine: bool, apart: float, real: bool) -> None:
        super().__init__((nn.Identity(), *chain.blocks))
        self.feedback, self.scale, self.cosine, self.apart, self.real = feedback, scale, cosine, apart, real
        self.classes = chain.widths[-1]

    def prototypes(self) -> Tensor:
        """What enters the feedback network: (classes, classes)."""
        first = next(self.feedback.parameters())
        return torch.eye(self.classes, device=first.device, dtype=first.dtype)

    def enter(self, x: Tensor, y: Tensor) -> Tensor:
        """Send the classes down; only values are kept, each level makes its own graph."""
        del y
        self.signals = [self.prototypes()]
        for back in reversed(self.feedback[1:]):
            self.signals.insert(0, back(self.signals[0]))
        return x

    def learned(self, i: int) -> list[nn.Parameter]:
        own = super().learned(i)
        if i == len(self.blocks) - 1 or (i == 0 and not self.real):
            return own
        return own + list(self.feedback[i].parameters())

    def loss(self, i: int, h_in: Tensor, h_out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        del h_in
        if i == len(self.blocks) - 1:
            return F.cross_entropy(h_out, y), h_out
        a, s = h_out.flatten(1), self.feedback[i](self.signals[i]).flatten(1)
        size = 256 / a.shape[1]
        if self.cosine:
            a, s, size = F.normalize(a), F.normalize(s), 1.0
        similarity = a @ s.T  # (samples, classes)
        loss = self.scale * size * F.mse_loss(similarity, F.one_hot(y, self.classes).to(a.dtype))
        if self.apart:
            for rows in (F.normalize(a), F.normalize(s)):
                loss = loss + self.apart * F.mse_loss(rows @ rows.T, torch.eye(len(rows), device=a.device, dtype=a.dtype))
        return loss, similarity

    def predictor(self, model: nn.Module) -> nn.Module:
        return model


def mirror(chain: Chain, example: Tensor, activation: Callable[[], nn.Module] | None = None) -> nn.ModuleList:
    """The feedback network of a chain: ``mirror[l]`` maps the output's shape of block l+1 to that of block l (0: the input).

    Args:
        example: a batch that the chain takes.
        activation: of each signal but the lowest; by default that of the block whose output the signal meets, if it has one.
    """
    back, h = [], example[:2]
    for level, block in enumerate(chain.blocks):
        layers: list[nn.Module] = []
        for module in _leaves(block):
            shape = h.shape[1:]
            with torch.no_grad(), forked_rng(h.device), eval_mode(module):
                h = module(h)
            layers[:0] = _reverse(module, h.shape[1:], shape)
        if not any(True for layer in layers for _ in layer.parameters()):
            raise UnsupportedModel("has no weights, so its mirror has none to learn", module=chain.names[level][0])
        if level > 0:
            found = [m for m in _leaves(chain.blocks[level - 1]) if _is_activation(m)]
            layers += [activation()] if activation else [deepcopy(m) for m in found[-1:]]
        back.append(nn.Sequential(*layers))
    return nn.ModuleList(back)


def _leaves(block: nn.Module) -> Iterator[nn.Module]:
    if isinstance(block, nn.Sequential):
        for module in block:
            yield from _leaves(module)
    else:
        yield block


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and next(module.parameters(), None) is None


def _reverse(module: nn.Module, given: torch.Size, wanted: torch.Size) -> list[nn.Module]:
    """Layers from the shape of one module's output to that of its input; learned where the module is."""
    weighted = next(module.parameters(), None) is not None and not isinstance(module, NORMS)
    images = len(given) == len(wanted) == 3
    resize = [nn.Upsample(size=tuple(wanted[1:]))] if images and given[1:] != wanted[1:] else []
    if not weighted:
        if given == wanted:
            return []
        if images and given[0] == wanted[0]:
            return [*resize]
        if given.numel() == wanted.numel():
            return [nn.Flatten(), nn.Unflatten(1, wanted)]
        if len(wanted) == 2 and given == wanted[1:]:
            return [_Repeat(wanted[0])]  # a mean over time
    elif isinstance(module, nn.Conv2d):
        inner = nn.Conv2d(
            given[0], wanted[0], module.kernel_size, padding="same", dilation=module.dilation, groups=module.groups, bias=False
        )
        return [*resize, inner]
    elif images:
        return [*resize, nn.Conv2d(given[0], wanted[0], 3, padding=1, bias=False)]
    elif len(given) == len(wanted) and given[:-1] == wanted[:-1]:
        return [nn.Linear(given[-1], wanted[-1], bias=False)]
    return [nn.Flatten(), nn.Linear(given.numel(), wanted.numel(), bias=False), nn.Unflatten(1, wanted)]


class _Repeat(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, s: Tensor) -> Tensor:
        return s[:, None].expand(-1, self.times, -1)
