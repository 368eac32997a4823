"""NoProp: every block learns alone to take noise off a label; no signal crosses the blocks in either direction while they train.

The network is a label diffusion. Block t sees the input and a noised embedding of the label and guesses the clean embedding. In training
the noised embedding is *drawn*, from the true label, so no block needs another's output: there is neither a backward nor a forward
pass through the network. To predict, start from pure noise and let the blocks take it off in turn.

*Equations.* Embeddings ``u_y``; ``q(z_t|y) = N(sqrt(abar_t) u_y, 1 - abar_t)`` with ``abar`` rising from noise (t=0) to clean (t=T);
``SNR = abar / (1 - abar)``. Discrete time, block t: ``CE(out(z_T), y) + KL(q(z_0|y) || N(0, 1)) + (T/2) eta (SNR_t - SNR_{t-1})
|u_t(z_{t-1}, x) - u_y|^2``, where ``u_t`` is the mean embedding under the block's class probabilities. Prediction:
``z_t = a u_t(z_{t-1}, x) + b z_{t-1} + sqrt(c) noise`` (:func:`posterior`), then ``out(z_T)``. Continuous time: one block that is told
t, weight ``(eta/2) SNR'(t)`` and a learned schedule ``abar = sigmoid(-gamma(t))``. Flow matching: ``z_t = t u_y + (1-t) z_0``; the block
learns the velocity ``u_y - z_0``, and a prediction follows it to the nearest embedding.

*Source.* Li, Teh, Pascanu, "NoProp" (arXiv 2503.24322), sections 2 and 3 and the algorithms of the three variants.

*Departures.* The encoder of a block is yours. ``abar`` is kept within [0.001, 0.99], because the weight of the last block is infinite at
1. ``out`` begins as the classifier by the nearest embedding. The ends of gamma are fixed, its course is learned. The noise of a prediction
is the same at every call unless a generator is given.

*Cost.* A step is the forward and backward of one block; what it keeps for the backward pass does not grow with the number of blocks. A
prediction runs all of them. ``out`` and learned embeddings are shared: every block's step also trains those.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import History, Learner, device_of, forked_rng, loop
from neurarium.learn.local import descend, eval_mode, generator_state, survey
from neurarium.roles import Loader

__all__ = ["NoProp", "NoPropCTNet", "NoPropFMNet", "NoPropNet", "class_medoids", "posterior"]

ADAMW: Callable[..., Optimizer] = partial(AdamW, lr=1e-3, weight_decay=1e-3, fused=True)  # a third less time on small blocks
LOW, HIGH = 0.001, 0.99  # of abar


@dataclass(frozen=True, kw_only=True)
class NoProp(Learner):
    """Train the blocks of a :class:`NoPropNet`, :class:`NoPropCTNet` or :class:`NoPropFMNet`, each for itself.

    Args:
        eta: weight of the denoising loss; by default the paper's: 0.1 in discrete time, 1 else.
        optimizer: makes the optimizer of each block, and that of what they share.
        order: ``"sweep"``: in an epoch each block in turn goes once through the data; ``"sampled"``: as many batches, each for a block
            drawn at random; ``"parallel"``: each batch for all blocks.
    """

    eta: float | None = None
    optimizer: Callable[..., Optimizer] = ADAMW
    order: str = "sweep"

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if self.order not in ("sweep", "sampled", "parallel"):
            raise BadInput(f"order must be 'sweep', 'sampled' or 'parallel', not {self.order!r}")
        if not isinstance(model, _Diffusion):
            raise UnsupportedModel(
                "NoProp trains a chain of label denoisers: NoPropNet(lambda: encoder, classes, example) makes one of your network",
                module=type(model).__name__,
            )
        if device is not None:
            model.to(device)
        with forked_rng(device_of(model)):
            facts = survey(loader, device_of(model))
        if facts.classes > model.classes:
            raise BadInput(f"y holds class {facts.classes - 1}, but the model has {model.classes} classes")
        if facts.example.shape[1:] != model.input_shape:
            raise BadInput(f"x has shape {tuple(facts.example.shape[1:])} a sample, the model was made for {tuple(model.input_shape)}")
        eta = model.eta if self.eta is None else self.eta
        blocks = [self.optimizer(list(block.parameters())) for block in model.blocks]
        own = {p for block in model.blocks for p in block.parameters()}
        common = [p for p in model.parameters() if p not in own and p.requires_grad]
        shared = [self.optimizer(common)] if common else []
        passes = _Passes(loader, len(blocks) if self.order != "parallel" else 1)

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            which = {"sweep": [passes.at], "parallel": range(len(blocks))}.get(self.order)
            bad, last = None, None
            for t in which or [int(torch.randint(len(blocks), ()))]:
                last, logits = model.loss(t, x, y, eta)
                descend(last, [blocks[t], *shared])
                last = last.detach()
                bad = last if bad is None and not torch.isfinite(last) else bad
            return (last if bad is None else bad), logits

        parts: dict[str, Any] = {f"optimizer {t}": o for t, o in enumerate(blocks)}
        parts["shared"] = shared[0] if shared else None
        return loop(model, passes, epochs=epochs, step=step, parts=parts, val=val, seed=seed, callbacks=callbacks, resume=resume)


class _Passes:
    """The loader several times over; ``at`` says in which of them we are."""

    def __init__(self, loader: Loader, times: int) -> None:
        self.loader, self.times, self.at, self.epoch = loader, times, 0, 0
        if generator_state(loader) is not None:
            self.generator = loader.generator  # type: ignore[attr-defined]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(self.times):
            self.at = at
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(self.epoch * self.times + self.at)
            yield from self.loader


class _Diffusion(nn.Module):
    """Embeddings of the classes, and blocks that take noise off them."""

    blocks: nn.ModuleList
    embedding: Tensor
    eta = 1.0

    def __init__(self, classes: int, example: Tensor, embed: str | int | Tensor, noise_seed: int) -> None:
        super().__init__()
        if classes < 2:
            raise BadInput(f"n_classes must be at least 2, not {classes}")
        self.classes, self.input_shape, self.noise_seed = classes, example.shape[1:], noise_seed
        if isinstance(embed, str):
            if embed != "onehot":
                raise BadInput(f"embed must be 'onehot', a dimension or a (classes, dimension) tensor, not {embed!r}")
            self.register_buffer("embedding", torch.eye(classes))
        else:
            start = nn.init.orthogonal_(torch.empty(classes, embed)) if isinstance(embed, int) else embed.detach().clone().float()
            if start.ndim != 2 or len(start) != classes:
                raise BadInput(f"embed has shape {tuple(start.shape)}; it needs one row for each of {classes} classes")
            self.embedding = nn.Parameter(start)

    @abstractmethod
    def loss(self, t: int, x: Tensor, y: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """The loss of block ``t`` on a batch, and its scores of the classes."""

    @abstractmethod
    def rollout(
        self, x: Tensor, *, steps: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From noise to a label: the states z (steps + 1 of (n, dim)) and each block's scores of the classes on the way (steps)."""

    @abstractmethod
    def scores(self, z: Tensor) -> Tensor:
        """Scores of the classes for a clean embedding."""

    def forward(self, x: Tensor, *, steps: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self.scores(self.rollout(x, steps=steps, generator=generator)[0][-1])

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Callable[[], Tensor]:
        generator = generator or torch.Generator(x.device).manual_seed(self.noise_seed)
        like = self.embedding
        return lambda: torch.randn(len(x), like.shape[1], generator=generator, device=generator.device).to(like)


class NoPropNet(_Diffusion):
    """Discrete time: ``steps`` blocks, each with an encoder of its own.

    Args:
        encoder: makes the network that turns an input into features (any shape; it is flattened): called once for each block.
        n_classes: number of classes.
        example: a batch of inputs, for the shapes.
        steps: number of blocks.
        embed: ``"onehot"``, the dimension of learned embeddings, or their (classes, dimension) start, e.g. :func:`class_medoids`.
        hidden: width of the part of a block that joins features and label.
        noise_seed: of the noise of predictions that are given no generator.
    """

    eta = 0.1

    def __init__(
        self, encoder: Callable[[], nn.Module], n_classes: int, example: Tensor, *, steps: int = 10, embed: str | int | Tensor = "onehot",
        hidden: int = 256, noise_seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(n_classes, example, embed, noise_seed)
        if steps < 1:
            raise BadInput(f"steps must be at least 1, not {steps}")
        dim = self.embedding.shape[1]
        self.blocks = nn.ModuleList(_Block(encoder(), example, dim, hidden, n_classes, norm=True) for _ in range(steps))
        self.out = _decoder(self.embedding)
        self.register_buffer("abar", ((1 - torch.linspace(0, 1, steps + 1)) * pi / 2).cos().square().clamp(LOW, HIGH))

    def noised(self, y: Tensor, t: int) -> Tensor:
        """A draw from q(z_t|y)."""
        u = self.embedding[y]
        return self.abar[t].sqrt() * u + (1 - self.abar[t]).sqrt() * torch.randn_like(u)

    def weight(self, t: int) -> Tensor:
        """Of the denoising loss of block ``t`` (0 is the first), for eta = 1."""
        snr = self.abar / (1 - self.abar)
        return len(self.blocks) / 2 * (snr[t + 1] - snr[t])

    def loss(self, t: int, x: Tensor, y: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        logits = self.blocks[t](self.noised(y, t), x)
        wrong = (logits.softmax(1) @ self.embedding - self.embedding[y]).square().sum(1).mean()
        anchor = F.cross_entropy(self.scores(self.noised(y, len(self.blocks))), y) + prior(self.embedding[y], self.abar[0])
        return anchor + eta * self.weight(t) * wrong, logits

    def rollout(self, x, *, steps=None, generator=None):
        if steps not in (None, len(self.blocks)):
            raise BadInput(f"in discrete time a prediction takes as many steps as there are blocks ({len(self.blocks)}), not {steps}")
        draw = self.noise(x, generator)
        states, logits = [draw()], []
        for t, block in enumerate(self.blocks):
            logits.append(block(states[-1], x))
            a, b, c = posterior(self.abar[t], self.abar[t + 1])
            states.append(a * (logits[-1].softmax(1) @ self.embedding) + b * states[-1] + c.sqrt() * draw())
        return states, logits

    def scores(self, z: Tensor) -> Tensor:
        return self.out(z)


class NoPropCTNet(_Diffusion):
    """Continuous time: one block that is told the time, and a learned noise schedule.

    Args:
        steps: into which a prediction divides the time, unless told otherwise.

    Other arguments: :class:`NoPropNet`.
    """

    def __init__(
        self, encoder: Callable[[], nn.Module], n_classes: int, example: Tensor, *, steps: int = 100, embed: str | int | Tensor = "onehot",
        hidden: int = 256, noise_seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(n_classes, example, embed, noise_seed)
        dim = self.embedding.shape[1]
        self.steps = steps
        self.blocks = nn.ModuleList([_Block(encoder(), example, dim, hidden, n_classes, time=True)])
        self.out = _decoder(self.embedding)
        self.schedule = _Schedule()

    def loss(self, t: int, x: Tensor, y: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        time, u = torch.rand(len(x), 1, device=x.device, dtype=self.embedding.dtype), self.embedding[y]
        abar, rate = self.schedule(time)
        logits = self.blocks[t](abar.sqrt() * u + (1 - abar).sqrt() * torch.randn_like(u), x, time)
        wrong = (rate * (logits.softmax(1) @ self.embedding - u).square().sum(1, keepdim=True)).mean()
        first, last = self.schedule(torch.tensor([[0.0], [1.0]]).to(time))[0]
        z = last.sqrt() * u + (1 - last).sqrt() * torch.randn_like(u)
        return F.cross_entropy(self.scores(z), y) + prior(u, first) + eta / 2 * wrong, logits

    def rollout(self, x, *, steps=None, generator=None):
        draw, times = self.noise(x, generator), torch.linspace(0, 1, (steps or self.steps) + 1, device=x.device)
        abar = self.schedule(times[:, None].to(self.embedding))[0]
        (block,) = self.blocks
        states, logits, features = [draw()], [], block.features(x)
        for t, (now, after) in zip(times, pairwise(abar)):
            logits.append(block.joined(states[-1], features, t.expand(len(x), 1)))
            a, b, c = posterior(now, after)
            states.append(a * (logits[-1].softmax(1) @ self.embedding) + b * states[-1] + c.sqrt() * draw())
        return states, logits

    def scores(self, z: Tensor) -> Tensor:
        return self.out(z)


class NoPropFMNet(_Diffusion):
    """Flow matching: one block that is told the time gives the velocity from noise to the label's embedding.

    Args:
        sigma: standard deviation of noise around the straight path.

    Other arguments: :class:`NoPropCTNet`.
    """

    def __init__(
        self, encoder: Callable[[], nn.Module], n_classes: int, example: Tensor, *, steps: int = 100, embed: str | int | Tensor = "onehot",
        hidden: int = 256, sigma: float = 0.0, noise_seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(n_classes, example, embed, noise_seed)
        self.steps, self.sigma, dim = steps, sigma, self.embedding.shape[1]
        self.blocks = nn.ModuleList([_Block(encoder(), example, dim, hidden, dim, time=True)])

    def loss(self, t: int, x: Tensor, y: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        time, u = torch.rand(len(x), 1, device=x.device, dtype=self.embedding.dtype), self.embedding[y]
        start = torch.randn_like(u)
        z = time * u + (1 - time) * start + self.sigma * torch.randn_like(u)
        velocity = self.blocks[t](z, x, time)
        scores = self.scores(z + (1 - time) * velocity)
        loss = eta * (velocity - (u - start)).square().sum(1).mean()
        if self.embedding.requires_grad:  # learned embeddings would fall together without it
            loss = loss + F.cross_entropy(scores, y)
        return loss, scores

    def rollout(self, x, *, steps=None, generator=None):
        steps = steps or self.steps
        (block,) = self.blocks
        states, logits, features = [self.noise(x, generator)()], [], block.features(x)
        for k in range(steps):
            time = torch.full((len(x), 1), k / steps, device=x.device)
            velocity = block.joined(states[-1], features, time)
            logits.append(self.scores(states[-1] + (1 - k / steps) * velocity))
            states.append(states[-1] + velocity / steps)
        return states, logits

    def scores(self, z: Tensor) -> Tensor:
        return -(z[:, None] - self.embedding).square().sum(2)


def posterior(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``a, b, c`` of ``q(z_t | z_{t-1}, y) = N(a u_y + b z_{t-1}, c)``, from ``abar_{t-1}`` and ``abar_t``."""
    alpha = before / after
    rest = 1 - before
    return after.sqrt() * (1 - alpha) / rest, alpha.sqrt() * (1 - after) / rest, (1 - after) * (1 - alpha) / rest


def prior(u: Tensor, abar: Tensor) -> Tensor:
    """``KL(N(sqrt(abar) u, 1 - abar) || N(0, 1))``, mean over the batch."""
    variance = 1 - abar
    return 0.5 * (abar * u.square() + variance - 1 - variance.log()).sum(1).mean()


def class_medoids(x: Tensor, y: Tensor) -> Tensor:
    """For each class its sample with the smallest sum of distances to the others of it: (classes, features), a start for ``embed``."""
    flat, found = x.flatten(1), []
    for c in range(int(y.max()) + 1):
        own = flat[y == c]
        if not len(own):
            raise BadInput(f"no sample of class {c}")
        found.append(own[torch.cdist(own, own).sum(1).argmin()])
    return torch.stack(found)


def _decoder(embedding: Tensor) -> nn.Linear:
    """From an embedding to the classes, at first by the nearest one."""
    u = embedding.detach()
    out, scale = nn.Linear(u.shape[1], len(u)), 10 / u.square().sum(1).mean()
    with torch.no_grad():
        out.weight.copy_(scale * u)
        out.bias.copy_(-scale / 2 * u.square().sum(1))
    return out


class _Block(nn.Module):
    """Features of the input and a noised label, joined."""

    def __init__(
        self, encoder: nn.Module, example: Tensor, dim: int, hidden: int, out: int, *, norm: bool = False, time: bool = False
    ) -> None:
        super().__init__()
        with torch.no_grad(), forked_rng(example.device), eval_mode(encoder):
            width = encoder(example[:2]).flatten(1).shape[1]
        self.encoder = encoder
        self.label, self.skip = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        self.time = nn.Linear(16, hidden) if time else None
        self.joint = nn.Linear(width + hidden, hidden)
        self.norm = _BatchNorm(hidden) if norm else nn.Identity()
        self.out = nn.Linear(hidden, out)

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x).flatten(1)

    def joined(self, z: Tensor, features: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.label(z)
        if self.time is not None and time is not None:
            phase = time * (pi * torch.arange(1, 9, device=z.device, dtype=z.dtype))
            h = h + self.time(torch.cat([phase.sin(), phase.cos()], 1))
        h = h.relu()
        h = h + self.skip(h).relu()
        return self.out(self.norm(self.joint(torch.cat([features, h], 1))).relu())

    def forward(self, z: Tensor, x: Tensor, time: Tensor | None = None) -> Tensor:
        return self.joined(z, self.features(x), time)


class _BatchNorm(nn.BatchNorm1d):
    """A batch of one row has no statistics: it is normalised by the running ones."""

    def forward(self, h: Tensor) -> Tensor:
        if self.training and len(h) == 1:
            return F.batch_norm(h, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(h)


class _Schedule(nn.Module):
    """``abar(t)`` and ``SNR'(t)`` of ``gamma = g0 + (g1 - g0)(1 - gbar(t))``; gbar rises from 0 to 1 whatever is learned."""

    def __init__(self, units: int = 8) -> None:
        super().__init__()
        self.slope, self.steep, self.height = (nn.Parameter(torch.full((n,), s)) for n, s in ((1, 0.5), (units, 1.5), (units, -2.0)))
        self.centre = nn.Parameter(-torch.linspace(0, 1, units) * 1.7)
        ends = torch.tensor([HIGH, LOW])
        self.register_buffer("ends", ((1 - ends) / ends).log())  # g0, g1

    def rising(self, t: Tensor) -> tuple[Tensor, Tensor]:
        steep, height = F.softplus(self.steep), F.softplus(self.height)
        s = (steep * t + self.centre).sigmoid()
        value = F.softplus(self.slope) * t + (height * s).sum(-1, keepdim=True)
        return value, F.softplus(self.slope) + (height * steep * s * (1 - s)).sum(-1, keepdim=True)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        (value, slope), (low, _), (high, _) = self.rising(t), self.rising(torch.zeros_like(t)), self.rising(torch.ones_like(t))
        g0, g1 = self.ends
        gamma = g0 + (g1 - g0) * (1 - (value - low) / (high - low))
        return (-gamma).sigmoid(), (g1 - g0) * slope / (high - low) * (-gamma).exp()
