"""Forward-only training of physical networks: black boxes that compute, and digital maps between them that learn from a contrast.

A physical layer is a system whose response nobody can differentiate (light in a fibre, sound in a cavity), followed by a trainable linear
map. Backpropagation would need a model of the physics. Here each map has a contrast of its own: what comes out for a correctly labelled
input shall point along a fixed random vector, what comes out for a wrong label away from it. Nothing of the physics need be known, and
when it changes, learning just goes on.

*Equations.* Input ``h_0 = [label ; features]``, the label one-hot with the largest value of the data. Layer k measures
``q = S_k(|h| / (||h|| + 1e-6))``, concatenates ``t = [q ; h]`` and maps ``h' = P_k t + b_k``. Goodness ``g = cos(|h'|, p_k)`` with ``p_k``
a fixed random unit vector. Loss ``mean log(1 + exp(-scale (g_pos - g_neg)))`` for ``(P_k, b_k)`` alone, ``inner_steps`` steps on each
batch; then ``h'`` goes on, without a gradient. Prediction: each class is tried as the label, ``argmax sum_k g_k``.

:class:`PhysicsAware` is the rival: forward through the physics, backward through the Jacobian of a **digital twin**, a network fitted to
measured pairs of inputs and outputs beforehand.

*Source.* Momeni et al., "Backpropagation-free Training of Deep Physical Neural Networks" (arXiv 2304.11042); physics-aware training is
Wright et al.'s (arXiv 2104.13386).

*Departures.* Any layer on vectors may stand in the chain, not only a physical one. Mini-batches as well as the full batch.

*Cost.* Measurements: two a sample and layer for each batch, ``classes`` a prediction. Digital: ``inner_steps`` forward and weight-gradient
products for two inputs; no product goes from one layer to the one below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, History, Learner, device_of, forked_rng, loop
from neurarium.learn.local import descend, survey

__all__ = ["PhysicalChain", "PhysicalForwardForward", "PhysicalLayer", "PhysicalSystem", "PhysicsAware", "fit_twin"]

ADAM: Callable[..., Optimizer] = partial(Adam, lr=5e-4)


class PhysicalSystem(Protocol):
    """A black box; it is called without a graph and need not be a module."""

    in_dim: int
    out_dim: int

    def __call__(self, s: Tensor) -> Tensor: ...


class PhysicalLayer(nn.Module):
    """A physical system and the digital map behind it: (n, in_features) -> (n, out_features).

    Args:
        system: takes (n, in_features); ``None``: no physics, a linear layer.
        concat: give the map the layer's input beside the system's output.
    """

    def __init__(self, system: PhysicalSystem | None, in_features: int, out_features: int, *, concat: bool = True) -> None:
        super().__init__()
        if system is not None and system.in_dim != in_features:
            raise BadInput(f"the system takes {system.in_dim} values, the layer {in_features}")
        self.system, self.concat = system, concat or system is None
        self.linear = nn.Linear((0 if system is None else system.out_dim) + (in_features if self.concat else 0), out_features)
        self.twins: tuple[nn.Module, ...] = ()  # at most one, in a tuple because it is no part of the layer
        self.physical = True  # False: the twin also computes the forward pass

    def measure(self, h: Tensor) -> Tensor:
        """What the map sees: (n, values). A gradient passes through the digital path, and through a twin if there is one."""
        if self.system is None:
            return h
        s = h.abs() / (h.norm(dim=1, keepdim=True) + 1e-6)
        q = None
        if self.physical or not torch.is_grad_enabled():
            with torch.no_grad():
                q = self.system(s.detach())
        if self.twins and torch.is_grad_enabled():
            modelled = self.twins[0](s)
            q = modelled if q is None else modelled + (q - modelled).detach()
        return torch.cat([q, h], 1) if self.concat else q

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.measure(h))


class PhysicalChain(nn.Module):
    """Layers whose activity under each label says how well the label fits: (n, ...) -> scores (n, classes).

    Args:
        layers: modules on vectors; the first takes ``classes + features`` values. Usually :class:`PhysicalLayer`.
        features: number of input values of a sample.
        seed: of the fixed random vectors ``p_k``.
    """

    def __init__(self, layers: Sequence[nn.Module], features: int, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        if not layers or classes < 2:
            raise BadInput("needs at least one layer and two classes")
        self.layers, self.features, self.classes = nn.ModuleList(layers), features, classes
        self.register_buffer("high", torch.ones(()))
        generator, h = torch.Generator().manual_seed(seed), torch.ones(2, features + classes)
        like = next(self.parameters(), h)
        h = h.to(like)
        for k, layer in enumerate(self.layers):
            with torch.no_grad(), forked_rng(h.device):
                h = layer(h)
            if h.ndim != 2:
                raise BadInput(f"layer {k} puts out {tuple(h.shape)}; a chain is made of layers on vectors (n, values)")
            self.register_buffer(f"probe{k}", F.normalize(torch.randn(h.shape[1], generator=generator), dim=0).to(h))

    def enter(self, x: Tensor, label: Tensor) -> Tensor:
        """The first layer's input: [label slots ; features]."""
        if x[0].numel() != self.features:
            raise BadInput(f"the chain takes {self.features} values a sample, x has {x[0].numel()}")
        return torch.cat([F.one_hot(label, self.classes).to(x.dtype) * self.high, x.flatten(1)], 1)

    def goodness(self, k: int, h: Tensor) -> Tensor:
        """How well the output of layer ``k`` points along its vector: (n,)."""
        return F.cosine_similarity(h.abs(), self.get_buffer(f"probe{k}")[None], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.arange(self.classes, device=x.device)
        h = self.enter(x.repeat_interleave(self.classes, 0), labels.repeat(len(x)))
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for k, layer in enumerate(self.layers):
            h = layer(h)
            total = total + self.goodness(k, h)
        return total.view(len(x), self.classes)


@dataclass(frozen=True, kw_only=True)
class PhysicalForwardForward(Learner):
    """Train each layer of a :class:`PhysicalChain` by its own contrast of true and false labels.

    Args:
        optimizer: makes the optimizer of one layer.
        scale: of the goodness in the loss.
        inner_steps: steps that a layer takes on a batch before it hands its output on.
        order: ``"greedy"``: as said; ``"parallel"``: the layer hands on what it puts out before its one step on the batch.
    """

    optimizer: Callable[..., Optimizer] = ADAM
    scale: float = 4.0
    inner_steps: int = 10
    order: str = "greedy"

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if not isinstance(model, PhysicalChain):
            raise UnsupportedModel("the rule trains a PhysicalChain (of physical or other layers)", module=type(model).__name__)
        if self.order not in ("greedy", "parallel") or self.inner_steps < 1:
            raise BadInput(f"order must be 'greedy' or 'parallel' and inner_steps >= 1, not {self.order!r} and {self.inner_steps}")
        if device is not None:
            model.to(device)
        facts = survey(loader, device_of(model))
        if facts.classes > model.classes:
            raise BadInput(f"y holds class {facts.classes - 1}, but the model has {model.classes} classes")
        learned = [[p for p in layer.parameters() if p.requires_grad] for layer in model.layers]
        if not any(learned):
            raise UnsupportedModel("no layer has a parameter to train", module=type(model).__name__)
        optimizers = [self.optimizer(p) if p else None for p in learned]
        if not resume:
            model.high.fill_(facts.high)
        steps = self.inner_steps if self.order == "greedy" else 1

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, None]:
            wrong = (y + torch.randint_like(y, 1, model.classes)) % model.classes
            losses = []
            with torch.no_grad():
                h = torch.cat([model.enter(x, y), model.enter(x, wrong)])
            for k, (layer, optimizer) in enumerate(zip(model.layers, optimizers)):
                with torch.no_grad():
                    seen, digital = (layer.measure(h), layer.linear) if isinstance(layer, PhysicalLayer) else (h, layer)
                    after = digital(seen) if optimizer is None or self.order == "parallel" else None
                if optimizer is not None:
                    for _ in range(steps):
                        positive, negative = model.goodness(k, digital(seen)).chunk(2)
                        loss = F.softplus(-self.scale * (positive - negative)).mean()
                        descend(loss, [optimizer])
                    losses.append(loss.detach())
                with torch.no_grad():
                    h = digital(seen) if after is None else after
            return torch.stack(losses).mean(), None

        parts = {f"optimizer {k}": o for k, o in enumerate(optimizers)}
        return loop(model, loader, epochs=epochs, step=step, parts=parts, val=val, seed=seed, callbacks=callbacks, resume=resume)


def fit_twin(
    system: PhysicalSystem, *, pairs: int = 10_000, hidden: int = 128, epochs: int = 30, lr: float = 3e-3, seed: int = 0
) -> nn.Module:
    """A network of two hidden layers fitted to ``pairs`` measurements of ``system`` at random inputs of unit length."""
    with forked_rng(torch.device("cpu")):
        torch.manual_seed(seed)
        device = device_of(system) if isinstance(system, nn.Module) else torch.device("cpu")
        s = F.normalize(torch.randn(pairs, system.in_dim).abs(), dim=1).to(device)
        with torch.no_grad():
            q = system(s)
        centre, spread = q.mean(0), q.std().clamp_min(1e-6)
        net = nn.Sequential(
            nn.Linear(system.in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, system.out_dim)
        ).to(device)
        optimizer = Adam(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-pairs // 256))
        with torch.enable_grad():
            s_in = s * system.in_dim**0.5  # entries of order one
            for _ in range(epochs):
                for at in torch.randperm(pairs).split(256):
                    optimizer.zero_grad()
                    F.mse_loss(net(s_in[at]), (q[at] - centre) / spread).backward()
                    optimizer.step()
                    schedule.step()
        last = net[-1]
        with torch.no_grad():  # fold the scales into the weights
            net[0].weight *= system.in_dim**0.5
            last.weight *= spread
            last.bias.mul_(spread).add_(centre)
    return net.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class PhysicsAware(Backprop):
    """Backpropagation through digital twins of all physical layers of a model.

    Args:
        twin: makes the differentiable twin of a system; called once a layer in each :meth:`fit`.
        physical_forward: ``False``: the twins also compute the forward pass of training ("in silico"), the physics only predicts.

    Other arguments: :class:`~neurarium.learn.fit.Backprop`.
    """

    twin: Callable[[Any], nn.Module] = fit_twin
    physical_forward: bool = True

    def fit(self, model, loader, **options) -> History:
        layers = physical_layers(model)
        if not layers:
            raise UnsupportedModel("has no PhysicalLayer: there is nothing to make a twin of", module=type(model).__name__)
        try:
            for layer in layers:
                layer.twins = (self.twin(layer.system).to(device_of(model)),)
            return super().fit(model, loader, **options)
        finally:
            for layer in layers:
                layer.twins = ()

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        layers = physical_layers(model)
        try:
            for layer in layers:
                layer.physical = self.physical_forward
            return super().gradients(model, x, y)
        finally:
            for layer in layers:
                layer.physical = True


def physical_layers(model: nn.Module) -> list[PhysicalLayer]:
    return [m for m in model.modules() if isinstance(m, PhysicalLayer) and m.system is not None]
