"""Parameterised hypercomplex layers: a weight that is a sum of Kronecker products, with 1/n of the free parameters.

A hypercomplex number has n real components and a multiplication rule, which is n matrices A_1..A_n of size n x n. A layer over such
numbers ties its real weight to that rule. Here the rule is learned together with the weights: any n works (3 for RGB), and complex,
quaternion and real layers are the special cases with the rule held fixed.

    H = sum_i A_i (x) F_i,   A in R^(n, n, n),   F in R^(n, out/n, in/n, kernel...)             (Kronecker sum)
    H[a out/n + c, b in/n + e, ...] = sum_i A[i, a, b] F[i, c, e, ...],   y = conv(x, H) + bias  (layer)

Activations, normalisation and pooling act on the real components. ``n^3 + out*in*k^2/n`` parameters; A and F are determined only up to
``A -> A G, F -> G^-1 F`` over the index i, so compare learned rules by the space that they span.

*Source*: Grassucci, Zhang, Comminiello, "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions" (2021); the
linear layer is Zhang et al., "Beyond Fully-Connected Layers with Quaternions" (2021). Nearest Kronecker sum: Van Loan and Pitsianis (1993).

*Departures*: ``init="kaiming"`` (default) gives H exactly He's variance 2/fan_in; the published layers draw A and F by Xavier's rule
(``init="authors"``), which makes Var(H) smaller by n/(out + n^2), fatal without normalisation. The convolution's bias is really added.
``fit_`` starts from a trained layer.

*Cost*: parameters fall by n, *FLOPs do not*: the operator is the dense convolution. Building H adds n*out*in*k^2 multiply-adds a step,
whatever the batch. H is rebuilt at every call and never stored, so copies, checkpoints and ``torch.export`` see A,
the filters and the bias alone; the filters have a convolution's axes, so ``channels_last`` works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput
from neurarium.nn.replace import Rule

__all__ = [
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHLinear",
    "PadChannels",
    "QuaternionConv2d",
    "algebra",
    "decay_groups",
    "dense",
    "hypercomplex",
    "kronecker_factors",
]

Algebra = Literal["learned", "real", "complex", "quaternion"] | Tensor
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NAMES = {"real": 1, "complex": 2, "quaternion": 4}


def algebra(name: str | int) -> Tensor:
    """The multiplication rule A (n, n, n) of the real (1), complex (2) or quaternion (4) numbers: ``sum_i A[i] x_i`` multiplies by x."""
    n = _NAMES.get(name, name)
    if n == 1:
        return torch.ones(1, 1, 1)
    if n == 2:  # [[r, -i], [i, r]]
        return torch.tensor([[[1.0, 0], [0, 1]], [[0, -1], [1, 0]]])
    if n == 4:  # [[r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r]]
        index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
        sign = torch.tensor([[1.0, -1, -1, -1], [1, 1, -1, 1], [1, 1, 1, -1], [1, -1, 1, 1]])
        return functional.one_hot(index, 4).permute(2, 0, 1) * sign
    raise BadInput(f"no fixed algebra {name!r}: choose 'real' (1), 'complex' (2) or 'quaternion' (4), or pass a tensor (n, n, n)")


def kronecker_factors(weight: Tensor, n: int, terms: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``sum_i A_i (x) F_i`` of ``terms`` (default n) products for a weight (out, in, ...), in the Frobenius norm.

    The weight's n x n blocks, flattened, are the rows of a matrix; its truncated SVD is the answer. Returns A (terms, n, n),
    F (terms, out/n, in/n, ...) and all singular values, whose tail is what any such layer loses.
    """
    out, inner, *kernel = weight.shape
    _check_divides(inner, out, n)
    blocks = weight.detach().reshape(n, out // n, n, inner // n, *kernel).transpose(1, 2).reshape(n * n, -1)
    terms, size = n if terms is None else terms, blocks.shape[1]
    u, s, v = torch.linalg.svd(functional.pad(blocks.double(), (0, max(terms - size, 0))), full_matrices=False)
    root = s[:terms].sqrt()
    a = (u[:, :terms] * root).T.reshape(terms, n, n)
    f = (root[:, None] * v[:terms, :size]).reshape(terms, out // n, inner // n, *kernel)
    return a.to(weight.dtype), f.to(weight.dtype), s.to(weight.dtype)


class _PHWeight(nn.Module):
    """A weight of shape (out, in, *kernel) as a Kronecker sum; the layers below put an operator on it."""

    def __init__(
        self, inner: int, out: int, n: int, kernel: tuple[int, ...], bias: bool, rule: Algebra, init: str, factory: dict[str, Any]
    ) -> None:  # fmt: skip
        super().__init__()
        _check_divides(inner, out, n)
        if init not in ("kaiming", "authors"):
            raise BadInput(f"init is 'kaiming' or 'authors', not {init!r}")
        self.n, self.init = n, init
        self.learned = isinstance(rule, str) and rule == "learned"
        if self.learned:
            self.A = nn.Parameter(torch.empty(n, n, n, **factory))
        else:
            fixed = algebra(rule) if isinstance(rule, str) else rule.detach().clone()
            if fixed.shape != (n, n, n):
                raise BadInput(f"the algebra has shape {tuple(fixed.shape)}, n = {n} needs ({n}, {n}, {n})")
            self.register_buffer("A", fixed.to(device=factory["device"], dtype=factory["dtype"] or torch.get_default_dtype()))
        self.filters = nn.Parameter(torch.empty(out, inner // n, *kernel, **factory))  # F_1..F_n, stacked along the outputs
        self.bias = nn.Parameter(torch.empty(out, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A (if learned) and F anew, set the bias to zero."""
        if self.init == "authors":
            if self.learned:
                nn.init.xavier_uniform_(self.A)
            nn.init.xavier_uniform_(self.F)  # on the five axes, as published
        else:
            if self.learned:  # N(0, 1/n), at exactly its expected norm: each entry of H then sums n products of variance 1/n * Var(F)
                self.A.normal_()
                self.A.mul_(self.n / self.A.norm())
            fan_in = self.filters[0].numel() * self.n
            spread = self.A.square().sum() / self.n**2  # mean over the blocks of sum_i A_i^2: 1 for the named algebras
            self.filters.normal_().mul_(torch.sqrt(2 / (fan_in * spread)))
        if self.bias is not None:
            self.bias.zero_()

    @property
    def F(self) -> Tensor:
        """The filter banks (n, out/n, in/n, *kernel): a view of the parameter ``filters``."""
        return self.filters.unflatten(0, (self.n, -1))

    @property
    def weight(self) -> Tensor:
        """H (out, in, *kernel), built anew from A and F; in float32 under autocast."""
        if torch.is_autocast_enabled(self.filters.device.type):
            with torch.autocast(self.filters.device.type, enabled=False):
                return self._kronecker_sum()
        return self._kronecker_sum()

    def _kronecker_sum(self) -> Tensor:
        n, (out, inner, *kernel) = self.n, self.filters.shape
        blocks = (self.A.reshape(n, -1).T @ self.filters.reshape(n, -1)).view(n, n, out // n, inner, *kernel)  # (a, b, c, e, ...)
        return blocks.transpose(1, 2).reshape(out, n * inner, *kernel)

    @torch.no_grad()
    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        """Start from an ordinary layer: the nearest weight that this layer can express (with a fixed algebra: the nearest F), its bias.

        ``inputs`` is not needed: the Frobenius optimum is in closed form. Returns the relative error |H - W| / |W|.
        Raises ``BadInput`` for a layer of another shape, or a transposed convolution, before anything changes.
        """
        del inputs
        weight = old.weight.detach()
        (out, inner, *kernel), transposed = self.filters.shape, isinstance(old, _TRANSPOSED)
        if transposed or weight.shape != (out, self.n * inner, *kernel):
            kind = "of a transposed convolution" if transposed else f"of shape {tuple(weight.shape)}"
            raise BadInput(f"a weight {kind} cannot start a layer whose weight has shape {(out, self.n * inner, *kernel)}")
        if self.bias is not None and old.bias is not None and old.bias.shape != self.bias.shape:
            raise BadInput(f"a bias of shape {tuple(old.bias.shape)} cannot start one of shape {tuple(self.bias.shape)}")
        if self.learned:
            a, f, _ = kronecker_factors(weight, self.n)
            self.A.copy_(a)
        else:
            blocks = weight.reshape(self.n, out // self.n, self.n, inner, *kernel).transpose(1, 2).reshape(self.n**2, -1)
            f = torch.linalg.pinv(self.A.reshape(self.n, -1).T.double()).to(weight.dtype) @ blocks
        self.filters.copy_(f.reshape(self.filters.shape))
        if self.bias is not None:
            self.bias.copy_(old.bias) if old.bias is not None else self.bias.zero_()
        return (self.weight - weight).norm() / weight.norm()

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply H by ``factor``."""
        self.filters.mul_(factor)

    def _describe(self) -> str:
        return f"n={self.n}, bias={self.bias is not None}, algebra={'learned' if self.learned else 'fixed'}"


class PHLinear(_PHWeight):
    """Linear layer ``(..., in_features) -> (..., out_features)`` with a Kronecker-sum weight. Both sizes are multiples of ``n``."""

    def __init__(
        self, in_features: int, out_features: int, n: int = 4, *, bias: bool = True,
        algebra: Algebra = "learned", init: Literal["kaiming", "authors"] = "kaiming", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, n, (), bias, algebra, init, {"device": device, "dtype": dtype})
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._describe()}"


class _PHConv(_PHWeight):
    axes: int
    operator: Callable[..., Tensor]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], n: int = 4, *, stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0, dilation: int | tuple[int, ...] = 1, padding_mode: str = "zeros", bias: bool = True,
        algebra: Algebra = "learned", init: Literal["kaiming", "authors"] = "kaiming", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        # An ordinary convolution on the meta device checks the arguments and spells out the padding; it holds no memory.
        plain = _CONVOLUTIONS[self.axes - 1](
            in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode=padding_mode, device="meta"
        )
        super().__init__(in_channels, out_channels, n, plain.kernel_size, bias, algebra, init, {"device": device, "dtype": dtype})
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, plain.kernel_size
        self.stride, self.padding, self.dilation, self.padding_mode = plain.stride, plain.padding, plain.dilation, padding_mode
        self._edges = plain._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._edges, mode=self.padding_mode), 0
        return type(self).operator(x, self.weight, self.bias, self.stride, padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, padding_mode={self.padding_mode}, {self._describe()}"
        )


class PHConv1d(_PHConv):
    """1-D convolution ``(batch, in_channels, time) -> (batch, out_channels, time')`` with a Kronecker-sum kernel."""

    axes, operator = 1, staticmethod(functional.conv1d)


class PHConv2d(_PHConv):
    """2-D convolution ``(batch, in_channels, h, w) -> (batch, out_channels, h', w')`` with a Kronecker-sum kernel."""

    axes, operator = 2, staticmethod(functional.conv2d)


class PHConv3d(_PHConv):
    """3-D convolution ``(batch, in_channels, d, h, w) -> (batch, out_channels, d', h', w')`` with a Kronecker-sum kernel."""

    axes, operator = 3, staticmethod(functional.conv3d)


class QuaternionConv2d(PHConv2d):
    """:class:`PHConv2d` with n = 4 and Hamilton's product as its fixed algebra."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, 4, algebra="quaternion", **options)


class PadChannels(nn.Module):
    """Zero channels in front, up to the next multiple of n: RGB becomes (0, r, g, b) for n = 2 or 4."""

    def __init__(self, channels: int, n: int) -> None:
        super().__init__()
        self.extra = -channels % n

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(x.shape[0], self.extra, *x.shape[2:]), x], 1)

    def extra_repr(self) -> str:
        return f"extra={self.extra}"


class _Padded(nn.Sequential):
    """Zero channels, then a hypercomplex layer: what takes the place of a first layer whose input channels n does not divide."""

    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        padded = nn.Module()
        padded.weight, padded.bias = self[0](old.weight.detach()), old.bias  # the input channels are axis 1 of the weight too
        return self[1].fit_(padded, inputs)


def hypercomplex(
    n: int, *, min_channels: int | None = None, skip_first: bool | Literal["auto"] = "auto",
    algebra: Algebra = "learned", init: Literal["kaiming", "authors", "fit"] = "kaiming",
) -> Rule:  # fmt: skip
    """The rule for :func:`neurarium.nn.replace.replace_layers` that makes every linear and convolution layer hypercomplex.

    Kept as they are, with the reason in the report: layers whose channels n does not divide (a classifier of ten classes, say), grouped
    and transposed convolutions, subclasses of the standard layers, layers with fewer than ``min_channels`` inputs or outputs. The first
    convolution of the model is treated on its own: ``skip_first="auto"`` pads missing input channels with zeros in front but
    keeps a layer of one input channel, ``True`` keeps it, ``False`` pads even one channel. A linear layer is never padded or skipped as the
    first. ``init="fit"``: the nearest weights to those of a trained network.
    """

    def make(old: nn.Module, inner: int) -> nn.Module:
        options = {"algebra": algebra, "init": "kaiming" if init == "fit" else init, "bias": old.bias is not None}
        if isinstance(old, nn.Linear):
            return PHLinear(inner, old.out_features, n, **options)
        kind = (PHConv1d, PHConv2d, PHConv3d)[_CONVOLUTIONS.index(type(old))]
        options |= {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "padding_mode": old.padding_mode}
        return kind(inner, old.out_channels, old.kernel_size, n, **options)

    def sizes(old: nn.Module) -> tuple[int, int]:
        if isinstance(old, _TRANSPOSED):
            raise BadInput("it is a transposed convolution, for which there is no hypercomplex layer here")
        if type(old) not in (nn.Linear, *_CONVOLUTIONS):
            base = next(c.__name__ for c in type(old).__mro__ if c in (nn.Linear, *_CONVOLUTIONS))
            raise BadInput(f"{type(old).__name__} derives from {base} and may compute something else: give it a rule of its own")
        if getattr(old, "groups", 1) != 1:
            raise BadInput(f"its {old.groups} groups share no channels: a hypercomplex layer mixes all of them")
        inner, out = (old.in_features, old.out_features) if isinstance(old, nn.Linear) else (old.in_channels, old.out_channels)
        if min_channels is not None and min(inner, out) < min_channels:
            raise BadInput(f"it has {inner} -> {out} channels, fewer than min_channels = {min_channels}")
        return inner, out

    def build(old: nn.Module) -> nn.Module:
        return make(old, sizes(old)[0])

    def build_first(old: nn.Module) -> nn.Module:
        inner, _ = sizes(old)
        if skip_first is True:
            raise BadInput("it is the first convolution (skip_first=True)")
        if skip_first == "auto" and inner == 1:
            raise BadInput("it is the first convolution and has one input channel (skip_first='auto')")
        pad = PadChannels(inner, n)
        return _Padded(pad, make(old, inner + pad.extra)) if pad.extra else make(old, inner)

    def match(name: str, module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))

    return Rule(match, build, "fit" if init == "fit" else "fresh", build_first, first=(*_CONVOLUTIONS, *_TRANSPOSED))


def dense() -> Rule:
    """The way back: the rule that makes every hypercomplex layer an ordinary one of the same function, a padded first one included.

    For deployment, where building H at each call costs time and an ordinary weight can be pruned, quantised or priced row by row.
    """

    def build(old: nn.Module) -> nn.Module:
        pad, old = (old[0].extra, old[1]) if isinstance(old, _Padded) else (0, old)
        options = {"bias": old.bias is not None, "device": old.filters.device, "dtype": old.filters.dtype}
        if isinstance(old, PHLinear):
            new: nn.Module = nn.Linear(old.in_features, old.out_features, **options)
        else:
            options |= {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "padding_mode": old.padding_mode}
            new = _CONVOLUTIONS[old.axes - 1](old.in_channels - pad, old.out_channels, old.kernel_size, **options)
        with torch.no_grad():
            new.weight.copy_(old.weight[:, pad:])  # the channels in front are zeros
            if new.bias is not None:
                new.bias.copy_(old.bias)
        return new

    return Rule(lambda name, module: isinstance(module, (_PHWeight, _Padded)), build)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups that spare the algebras A: decay on both factors of H = sum A (x) F would shrink it twice."""
    rules = [m.A for m in model.modules() if isinstance(m, _PHWeight) and m.learned]
    spared = {id(p) for p in rules}
    rest = [p for p in model.parameters() if id(p) not in spared]
    groups = [{"params": rest, "weight_decay": weight_decay}, {"params": rules, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _check_divides(inner: int, out: int, n: int) -> None:
    if n < 1 or inner < 1 or out < 1 or inner % n or out % n:
        common = math.gcd(inner, out)
        nearest = min((d for d in range(1, max(common, 1) + 1) if common % d == 0), key=lambda d: (abs(d - n), d), default=1)
        raise BadInput(f"n = {n} must divide both {inner} inputs and {out} outputs; the nearest n that does is {nearest}")
