"""Hypernetworks: a network that writes the weights of another, so that one set of parameters serves a whole family of conditions.

The *target* is any ``nn.Module``: its parameters are taken out (:class:`Target`) and given back at every call, computed from a condition
``c``: a task embedding, a descriptor, noise, a hyperparameter. Training sees ``loss(f(x; h(c)), y)``; gradients reach ``h`` alone.

*Equations.* ``z = MLP(E(c))``, ``theta = theta_0 + H z``. How ``H`` is laid out is the review's question of outputs:
``"all"``: one linear map to every weight; ``"multihead"``: one map a target layer; ``"components"``: one output row at a time, from
``[E(c); e_row]``; ``"chunks"``: ``chunk_size`` weights at a time, ``theta_k = h([E(c); e_k])`` with learned embeddings ``e_k`` and one
shared ``h``, which is what makes a hypernetwork smaller than its target.

*Initialisation.* With ``hyperfan_in`` the variance of H is set so that generated weights have variance ``2 / fan_in`` of *their* layer
(``hyperfan_out``: ``2 / fan_out``). The second moment of z which that needs is measured on probe conditions (standard normal, or uniform
where the encoding wants [0, 1]) and not assumed. Generated biases start at 0, scales of normalisation layers at their own value.

*Magnitude invariance.* With piecewise-linear activations and zero biases, ``h(a c) = a h(c)``: the target's scale follows the size of the
condition, its activations the power of its depth. The cure is two settings: ``encoding="cos_sin"`` maps ``c`` in [0, 1] to
``[cos(pi c / 2), sin(pi c / 2)]``, of constant norm, and ``residual=True`` starts ``theta_0`` at the target's own weights, so that h
predicts changes. :func:`mip` makes such a network, :func:`~neurarium.learn.hyper_probes.magnitude_probe` measures the fault.

*Source.* Chauhan et al., "A Brief Review of Hypernetworks in Deep Learning" (arXiv 2306.06955): the taxonomy. Chang, Flokas, Lipson,
"Principled Weight Initialization for Hypernetworks" (2020): hyperfan. Ortiz, Guttag, Dalca, "Magnitude Invariant Parametrizations"
(arXiv 2304.07645): encoding, residual, ``init="mip"``.

*Departures.* ``delta_scale`` shrinks the generated part: on small targets the fan-out rule of the last paper starts with changes larger
than the weights they change. Where ``residual=True`` meets chunks or components, theta_0 is a full vector: nothing is compressed then.

*Cost.* ``"all"``: ``|theta| * hidden[-1]`` parameters and multiply-adds a condition; chunks: ``chunk_size * hidden[-1]`` parameters. A
batch of conditions is one vmap call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from fnmatch import fnmatch
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["HyperNetwork", "Target", "mip"]

OUTPUTS, INITS = ("all", "multihead", "components", "chunks"), ("hyperfan_in", "hyperfan_out", "mip")


def cos_sin(c: Tensor) -> Tensor:
    """Constant norm: every entry becomes a point on a quarter of the unit circle."""
    with suppress(RuntimeError):  # inside vmap or an export there is no value to look at
        if not torch.compiler.is_compiling() and bool(((c < 0) | (c > 1)).any()):
            warnings.warn("the cos_sin encoding is made for conditions in [0, 1]; some lie outside: scale them", stacklevel=4)
    return torch.cat([torch.cos(pi / 2 * c), torch.sin(pi / 2 * c)], -1)


ENCODINGS: dict[str | None, tuple[int, Callable[[Tensor], Tensor]]] = {
    None: (1, lambda c: c),
    "cos_sin": (2, cos_sin),
    "z_1mz": (2, lambda c: torch.cat([c, 1 - c], -1)),
}


class Target(nn.Module):
    """A module without its own weights: ``target.call(weights, *inputs)``.

    Args:
        module: any module; it is copied. Parameters shared by two layers are one entry.
        names: patterns (``"head.*"``) of the parameters that are taken out; all by default. The others stay ordinary parameters.

    ``shapes`` maps the names taken out, in ``state_dict`` order, to their shapes; ``initial`` to the values that they had.
    """

    def __init__(self, module: nn.Module, names: Iterable[str] | None = None) -> None:
        super().__init__()
        for name, m in module.named_modules():
            if getattr(m, "running_mean", None) is not None:
                raise UnsupportedModel(
                    "keeps running statistics, which would mix all conditions; use GroupNorm or LayerNorm, or track_running_stats=False",
                    module=name or type(m).__name__,
                )
            if isinstance(m, nn.RNNBase):
                raise UnsupportedModel("keeps its weights in a second place; use cells", module=name or type(m).__name__)
        module, patterns = deepcopy(module), None if names is None else list(names)
        together: dict[int, list[str]] = {}  # a shared parameter has several names
        values = dict(module.named_parameters(remove_duplicate=False))
        for name, p in values.items():
            if isinstance(p, UninitializedParameter):
                raise UnsupportedModel("a lazy layer has no weights yet; call the module once", module=name.rpartition(".")[0])
            together.setdefault(id(p), []).append(name)
        taken = [n for n in together.values() if patterns is None or any(fnmatch(name, p) for name in n for p in patterns)]
        if not taken:
            raise UnsupportedModel(
                f"has no parameter{'' if patterns is None else f' named like {patterns}'} to generate", module=type(module).__name__
            )
        self.initial = {n[0]: values[n[0]].detach().clone() for n in taken}
        self.shapes = {name: tuple(p.shape) for name, p in self.initial.items()}
        self.aliases = {other: n[0] for n in taken for other in n[1:]}
        for name in (*self.shapes, *self.aliases):  # a place without memory of its own remains
            parent, _, leaf = name.rpartition(".")
            owner, p = module.get_submodule(parent), values[name]
            delattr(owner, leaf)
            owner.register_buffer(leaf, torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape), persistent=False)
        self.module = module

    def call(self, weights: Mapping[str, Tensor], *inputs: Any) -> Any:
        """The module's output with these weights; differentiable in both."""
        if wrong := set(weights) ^ set(self.shapes):
            raise BadInput(f"the weights must be named as in target.shapes; {sorted(wrong)[:4]} are on one side only")
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # attention's fused inference path knows no vmap
        try:
            return functional_call(self.module, {**weights, **{name: weights[first] for name, first in self.aliases.items()}}, inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def forward(self, weights: Mapping[str, Tensor], *inputs: Any) -> Any:
        return self.call(weights, *inputs)


class HyperNetwork(nn.Module):
    """Generates the weights of ``target`` from a condition, and calls it with them.

    Args:
        target: a module (its weights are the start of ``theta_0`` if ``residual``), or a :class:`Target` of some of its parameters.
        condition_dim: length of the condition vector.
        hidden: widths of the generating MLP.
        output: ``"all"``, ``"multihead"``, ``"components"`` or ``"chunks"``, see above.
        chunk_size, chunk_embedding: weights made at a time; length of the learned embeddings of chunks and components.
        encoding: of the condition: None, ``"cos_sin"`` or ``"z_1mz"`` (``[c, 1 - c]``).
        init: ``"hyperfan_in"``, ``"hyperfan_out"`` or ``"mip"`` (Kaiming fan-out, each predicted tensor a layer of its own).
        residual: generate changes of learned weights that start as the target's own.
        delta_scale: factor on what is generated at the start.
        dropout: after each hidden layer.
        activation: makes the nonlinearity of the MLP.

    Shapes: ``c`` (condition_dim,) uses one set of weights for all inputs; ``c`` (n, condition_dim) gives each of n rows its own;
    :meth:`groups` takes conditions (g, condition_dim) and inputs (g, n, ...).
    """

    def __init__(
        self,
        target: nn.Module | Target,
        condition_dim: int,
        *,
        hidden: tuple[int, ...] = (64,),
        output: str = "all",
        chunk_size: int = 512,
        chunk_embedding: int = 8,
        encoding: str | None = None,
        init: str = "hyperfan_in",
        residual: bool = False,
        delta_scale: float = 1.0,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        for name, value, known in (("output", output, OUTPUTS), ("encoding", encoding, tuple(ENCODINGS)), ("init", init, INITS)):
            if value not in known:
                raise BadInput(f"{name} must be one of {known}, not {value!r}")
        if min(condition_dim, chunk_size, chunk_embedding, *hidden) < 1:
            raise BadInput("condition_dim, chunk_size, chunk_embedding and every width in hidden must be at least 1")
        self.target = target if isinstance(target, Target) else Target(target)
        self.condition_dim, self.output, self.encoding, self.residual = condition_dim, output, encoding, residual
        shapes = self.target.shapes
        self.sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self.parts = _layout(shapes, output, chunk_size)  # one (names, rows, length) a linear map
        embedded = output in ("components", "chunks")
        width = condition_dim * ENCODINGS[encoding][0] + embedded * chunk_embedding
        layers: list[nn.Module] = []
        for wide in hidden:
            layers += [nn.Linear(width, wide), activation(), *([nn.Dropout(dropout)] if dropout else [])]
            width = wide
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, length, bias=embedded and not residual) for _, _, length in self.parts)
        self.embedding = nn.Parameter(torch.randn(sum(rows for _, rows, _ in self.parts), chunk_embedding)) if embedded else None
        start = torch.cat([self._start(name, p) for name, p in self.target.initial.items()])
        self.base: Tensor | None = None
        if residual or not embedded:
            self.base = nn.Parameter(start)
        elif start.any():
            del self.base
            self.register_buffer("base", start)
        self._initialise(init, delta_scale)
        self.to(start.device, start.dtype)

    def _start(self, name: str, p: Tensor) -> Tensor:
        scale = p.ndim < 2 and not name.rpartition(".")[2].startswith("bias") and bool((p == 1).all())  # of a normalisation layer
        return p.flatten() if self.residual or scale else torch.zeros_like(p.flatten())

    @torch.no_grad()
    def _initialise(self, init: str, delta_scale: float) -> None:
        linears = [m for m in self.trunk if isinstance(m, nn.Linear)]
        for m in linears:
            nn.init.kaiming_normal_(m.weight, 0.01, mode="fan_out" if init == "mip" else "fan_in", nonlinearity="leaky_relu")
            nn.init.zeros_(m.bias)
        n = max(64, min(4096, 2**18 // sum(rows for _, rows, _ in self.parts)))
        probes = torch.randn(n, self.condition_dim) if self.encoding is None else torch.rand(n, self.condition_dim)
        squares = self._hidden(probes).square().sum(-1).mean(0)  # of all hidden units together; one a row where rows are made one by one
        wanted, first = [], 0
        for name, p in self.target.initial.items():
            if p.ndim < 2:
                variance = 0.0
            elif init == "mip":
                variance = 2 / (1 + 0.01**2) / p.numel()
            else:
                fans = nn.init._calculate_fan_in_and_fan_out(p)
                variance = 2 / fans[init == "hyperfan_out"]
            wanted.append(torch.full((self.sizes[name],), variance))
        pieces = dict(zip(self.sizes, wanted))
        for head, (names, rows, length) in zip(self.heads, self.parts):
            if self.output == "components":
                variances = torch.cat([pieces[n].view(rows, -1) for n in names], 1)
            else:  # in chunks a place serves several tensors: the mean of what they want
                variances = torch.cat([pieces[n] for n in names])
                variances = torch.cat([variances, variances.new_full((rows * length - len(variances),), float("nan"))]).view(rows, length)
            moment = squares if self.embedding is None else squares[first : first + rows].mean()
            first += rows
            variances = variances.nanmean(0) / (1 if init == "mip" else moment)
            head.weight.normal_().mul_(delta_scale * variances.sqrt()[:, None])
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def _hidden(self, c: Tensor) -> Tensor:
        """What the linear maps read: (..., hidden), or (..., rows, hidden) where rows are generated one by one."""
        c = ENCODINGS[self.encoding][1](c)
        if self.embedding is not None:
            rows = self.embedding.expand(*c.shape[:-1], *self.embedding.shape)
            c = torch.cat([c[..., None, :].expand(*rows.shape[:-1], -1), rows], -1)
        return self.trunk(c)

    def _generated(self, c: Tensor) -> dict[str, Tensor]:
        """The part of each weight that depends on the condition, flat: (..., size)."""
        if c.shape[-1:] != (self.condition_dim,):
            raise BadInput(f"the condition has shape {tuple(c.shape)}; its last dimension must be {self.condition_dim}")
        z, found, first = self._hidden(c), {}, 0
        for head, (names, rows, _) in zip(self.heads, self.parts):
            if self.embedding is None:
                made = head(z)
            else:
                made = head(z[..., first : first + rows, :])
                first += rows
            if self.output == "components":
                widths = [self.sizes[n] // rows for n in names]
                found |= {n: piece.flatten(-2) for n, piece in zip(names, made.split(widths, -1))}
            else:
                made = made.flatten(-2) if self.output == "chunks" else made
                widths = [self.sizes[n] for n in names]
                found |= dict(zip(names, made[..., : sum(widths)].split(widths, -1)))
        return {name: found[name] for name in self.sizes}

    def flat(self, c: Tensor) -> Tensor:
        """All weights for condition(s) ``c`` as (..., number of weights), in the order of ``target.shapes``."""
        theta = torch.cat(list(self._generated(c).values()), -1)
        return theta if self.base is None else theta + self.base

    def weights(self, c: Tensor) -> dict[str, Tensor]:
        """The target's parameters for condition(s) ``c``: named as in its ``state_dict``, with the leading dimensions of ``c``."""
        pieces = self.flat(c).split(list(self.sizes.values()), -1)
        return {name: piece.reshape(c.shape[:-1] + self.target.shapes[name]) for name, piece in zip(self.sizes, pieces)}

    def forward(self, c: Tensor, *inputs: Any) -> Any:
        """Condition (condition_dim,): all rows by one target. (n, condition_dim): row i by the target of condition i."""
        if c.ndim == 1:
            return self.target.call(self.weights(c), *inputs)
        return tree_map(lambda out: out.squeeze(1), self.groups(c, *tree_map(lambda x: x.unsqueeze(1), inputs)))

    def groups(self, c: Tensor, *inputs: Any) -> Any:
        """A whole batch for each condition: ``c`` (g, condition_dim), inputs (g, n, ...) -> outputs (g, n, ...), in one call."""
        if c.ndim != 2 or any(isinstance(x, Tensor) and x.shape[:1] != c.shape[:1] for x in inputs):
            raise BadInput(f"conditions {tuple(c.shape)} need inputs with as many rows, not {[tuple(x.shape) for x in inputs]}")
        return vmap(self.target.call, randomness="different")(self.weights(c), *inputs)


def _layout(shapes: Mapping[str, tuple[int, ...]], output: str, chunk_size: int) -> list[tuple[tuple[str, ...], int, int]]:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if output == "all":
        return [(tuple(shapes), 1, sum(sizes.values()))]
    if output == "chunks":
        return [(tuple(shapes), -(-sum(sizes.values()) // chunk_size), chunk_size)]
    layers: dict[Any, list[str]] = {}
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        layers.setdefault((name.rpartition(".")[0], rows if output == "components" else 1), []).append(name)
    return [(tuple(names), rows, sum(sizes[n] for n in names) // rows) for (_, rows), names in layers.items()]


def mip(target: nn.Module | Target, condition_dim: int, **settings: Any) -> HyperNetwork:
    """A hypernetwork in the magnitude-invariant parametrisation; any setting of :class:`HyperNetwork` can be given."""
    return HyperNetwork(
        target, condition_dim, **({"hidden": (16, 64, 128), "encoding": "cos_sin", "residual": True, "init": "mip"} | settings)
    )
