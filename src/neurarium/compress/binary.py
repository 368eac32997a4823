"""BiPer: binary weights as the sign of a sine.

A binary layer stores one bit a weight. Usually the bit is the sign of a latent weight w, whose gradient must be invented, since a sign has
none. BiPer takes the sign of a sine instead: a square wave forward, the sine's own derivative backward. A small move of w can flip the
sign anywhere, not only near 0, and the frequency omega controls how far the sine is from its sign.

    stage 1   weight = alpha sin(omega w)           real numbers in [-alpha, alpha]; the gradient is exact
    stage 2   weight = alpha sign(sin(omega w))     one bit; the sign passes the gradient on: d/dw = alpha omega cos(omega w)

alpha is learned, one an output channel. Activations, where they are binary too, are sign(a) with the gradient max(0, 2 - |2 a|), where
a is first divided by its standard deviation over the sample (in training only: a sign does not see the scale). The loss gets
tau * sum over layers mean(sin^2(omega w)) (:func:`biper_penalty`). A network is trained in stage 1, then on in stage 2 (:func:`set_stage`).

*Quantisation error.* With gamma = E|sin(omega w)|, QE = E (sin - gamma sign(sin))^2 = E sin^2 - gamma^2. For w from a Laplace distribution
of scale b and a = omega b:  E sin^2 = 2 a^2 / (1 + 4 a^2),  E|sin| = a / (1 + a^2) coth(pi / (2 a)); QE peaks near a = 1 and tends to
1/2 - 4 / pi^2.

*Source*: Vargas, Correa, Hinojosa, Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024 (arXiv 2404.01278),
sections 3 and 4. The closed form of QE is ours.

*Departures*: sign(0) is +1. New layers start with weights of standard deviation 1 / omega. Going to stage 2, each alpha is multiplied by
its channel's gamma, so that the weights keep their size. :func:`binarize` starts from a trained network: it scales each weight to that
deviation and sets alpha by least squares, so that the layer is as near to the old one as it can be; the paper trains from scratch, with
alpha from U(0, 1).

*Cost*: training like the float layer. Stored, one bit a weight and one number an output channel (:func:`pack_binary`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.blocks import explicit
from neurarium.compress.quant.layers import quantisable, swap
from neurarium.compress.quant.packing import pack, pack_layer
from neurarium.errors import BadInput

__all__ = [
    "BiPerConv2d", "BiPerLinear", "SignActivation", "SignConv2d", "SignLinear", "binarize", "biper_error", "biper_penalty", "laplace_error",
    "pack_binary", "plan_binary", "set_sharpness", "set_stage", "xnor_product",
]  # fmt: skip


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Sign(torch.autograd.Function):
    """sign(x) with sign(0) = 1; the gradient is multiplied by ``slope(x)``, None: it passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(x)
        return _sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.slope is None else grad * ctx.slope(ctx.saved_tensors[0])), None


def _piecewise(x: Tensor) -> Tensor:
    return (2 - (2 * x).abs()).clamp_min(0)


def _clipped(x: Tensor) -> Tensor:
    return (x.abs() <= 1).to(x.dtype)


class SignActivation(nn.Module):
    """sign(a), +1 at 0. Gradient: max(0, 2 - |2 a / s|) / s with s the standard deviation over the last ``dims`` dimensions."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _sign(x)
        over = tuple(range(-min(self.dims, x.ndim), 0))
        scale = (x.var(over, keepdim=True, correction=0) + 1e-5).rsqrt()
        return _Sign.apply(x * scale, _piecewise)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class _Binary:
    """A layer whose weight is ``alpha`` times ``codes(w)``, and whose input may be a sign."""

    weight: Tensor
    bias: Tensor | None
    alpha: Tensor
    inputs: SignActivation | None

    def _begin(self, activations: str | None, spread: float) -> None:
        if activations not in ("sign", None):
            raise BadInput(f"activations must be 'sign' or None (as they come), got {activations!r}")
        self.inputs = SignActivation(self.weight.ndim - 1) if activations else None
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.alpha = nn.Parameter(torch.rand(len(self.weight), **like))
        with torch.no_grad():
            self.weight.normal_(0, spread)

    def values(self) -> Tensor:
        """The weight in units of alpha."""
        raise NotImplementedError

    def bits(self) -> Tensor:
        """The signs that are stored, +1 and -1."""
        raise NotImplementedError

    def effective(self) -> Tensor:
        """The weight that the layer computes with."""
        return self.values() * self.alpha.view(-1, *[1] * (self.weight.ndim - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.inputs is None else self.inputs(x)
        weight = self.effective()
        return F.linear(x, weight, self.bias) if weight.ndim == 2 else self._conv_forward(x, weight, self.bias)  # type: ignore[attr-defined]

    def resemble(self, weight: Tensor) -> None:
        """Takes the signs from a float weight and alpha by least squares: alpha = <w, v> / <v, v>, channel by channel."""
        with torch.no_grad():
            self.weight.copy_(weight * (self._spread() / weight.double().std(correction=0).clamp_min(1e-12)))
            v, w = self.values().flatten(1).double(), weight.flatten(1).double()
            self.alpha.copy_((v * w).sum(1) / (v * v).sum(1).clamp_min(1e-12))

    def _spread(self) -> float:
        return 1.0

    def packed(self) -> nn.Module:
        """The layer with one bit a weight: a PackedLinear or PackedConv2d, after a SignActivation where the activations are binary."""
        bits = self.bits()
        plain = nn.Linear if bits.ndim == 2 else nn.Conv2d
        like = copy.copy(self)
        like.__class__ = plain  # type: ignore[assignment]
        codes, table = (bits > 0).to(torch.int64), torch.tensor([-1.0, 1.0])
        layer = pack_layer(like, codes, table=table, scale=self.alpha.detach())  # type: ignore[arg-type]
        if self.inputs is None:
            return layer
        return nn.Sequential(copy.deepcopy(self.inputs), layer).train(self.training)  # type: ignore[attr-defined]


class _BiPer(_Binary):
    frequency: float
    stage: int

    def _options(self, frequency: float, stage: int, activations: str | None) -> None:
        if not frequency > 0 or stage not in (1, 2):
            raise BadInput(f"frequency must be positive and stage 1 or 2, got {frequency} and {stage}")
        self.frequency, self.stage = float(frequency), stage
        self._begin(activations, self._spread())

    def _spread(self) -> float:
        return 1 / self.frequency

    def values(self) -> Tensor:
        wave = torch.sin(self.frequency * self.weight)
        return wave if self.stage == 1 else _Sign.apply(wave, None)

    def bits(self) -> Tensor:
        return _sign(torch.sin(self.frequency * self.weight.detach()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frequency={self.frequency:g}, stage={self.stage}"  # type: ignore[misc]


class BiPerLinear(_BiPer, nn.Linear):
    """A linear layer with weight alpha sin(omega w) or its sign.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        frequency: omega.
        stage: 1 or 2.
        activations: "sign" makes the input binary too.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, frequency: float = 20.0, stage: int = 1,
        activations: str | None = "sign", device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._options(frequency, stage, activations)


class BiPerConv2d(_BiPer, nn.Conv2d):
    """A convolution with weight alpha sin(omega w) or its sign; padding adds zeros after the activation's sign.

    Args:
        in_channels, out_channels, kernel_size, **conv: as of ``nn.Conv2d``.
        frequency, stage, activations: as of :class:`BiPerLinear`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], *, frequency: float = 20.0, stage: int = 1,
        activations: str | None = "sign", **conv: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, **conv)
        self._options(frequency, stage, activations)


class _Surrogate(_Binary):
    """The sign of w itself: what BiPer is measured against."""

    surrogate: str
    sharpness: float

    def _options(self, surrogate: str, activations: str | None) -> None:
        if surrogate not in ("ste", "polynomial", "tanh"):
            raise BadInput(f"surrogate must be 'ste', 'polynomial' or 'tanh', got {surrogate!r}")
        self.surrogate, self.sharpness = surrogate, 1.0
        self._begin(activations, 0.5)

    def _spread(self) -> float:
        return 0.5

    def values(self) -> Tensor:
        slope = {"ste": _clipped, "polynomial": _piecewise, "tanh": self._slope}[self.surrogate]
        return _Sign.apply(self.weight, slope)  # type: ignore[no-any-return]

    def _slope(self, x: Tensor) -> Tensor:
        return max(1 / self.sharpness, 1.0) * self.sharpness * (1 - torch.tanh(self.sharpness * x) ** 2)

    def bits(self) -> Tensor:
        return _sign(self.weight.detach())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, surrogate={self.surrogate}"  # type: ignore[misc]


class SignLinear(_Surrogate, nn.Linear):
    """A linear layer with weight alpha sign(w).

    The gradient of the sign is taken to be, with `surrogate` "ste": 1 where |w| <= 1; "polynomial": max(0, 2 - |2 w|) (Bi-Real); "tanh":
    that of tanh(t w), with t raised in training by :func:`set_sharpness`, and at least 1 at w = 0.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, surrogate: str = "ste", activations: str | None = "sign",
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._options(surrogate, activations)


class SignConv2d(_Surrogate, nn.Conv2d):
    """A convolution with weight alpha sign(w); `surrogate` as of :class:`SignLinear`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], *, surrogate: str = "ste",
        activations: str | None = "sign", **conv: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, **conv)
        self._options(surrogate, activations)


def plan_binary(model: nn.Module, *, activations: str | None = "sign", skip: str | Sequence[str] = "first_last") -> BitPlan:
    """One bit for the weight of each Linear and Conv2d, and for its input where `activations` is "sign"; `skip` as of plan_dgms."""
    found, skipped = quantisable(model, skip, done=(_Binary,))
    return BitPlan(dict.fromkeys(found, (1, 1 if activations else 32)), skipped=skipped)


def binarize(
    model: nn.Module, *, frequency: float = 20.0, stage: int = 1, activations: str | None = "sign", skip: str | Sequence[str] = "first_last"
) -> nn.Module:
    """A copy of the model with BiPer layers in the place of its Linear and Conv2d layers, to be trained; ``result.plan`` is a BitPlan.

    Attention of ``nn.TransformerEncoderLayer`` and Hugging Face's Conv1D are made plain Linear layers first.
    """
    result = explicit(model)
    plan = plan_binary(result, activations=activations, skip=skip)
    made: dict[nn.Module, nn.Module] = {}
    for name in plan.bits:
        old = result.get_submodule(name)
        if not torch.isfinite(old.weight).all():
            raise BadInput(f"{name}: the weight has values that are not finite")
        like = {"device": old.weight.device, "dtype": old.weight.dtype, "bias": old.bias is not None}
        how = {"frequency": frequency, "stage": stage, "activations": activations}
        with torch.random.fork_rng(devices=[]):
            if isinstance(old, nn.Linear):
                new: Any = BiPerLinear(old.in_features, old.out_features, **like, **how)
            else:
                shape = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups", "padding_mode")}
                new = BiPerConv2d(old.in_channels, old.out_channels, old.kernel_size, **shape, **like, **how)
        new.resemble(old.weight.detach())
        if old.bias is not None:
            new.bias = copy.deepcopy(old.bias)
        made[old] = new.train(old.training)
    result = swap(result, made)
    result.plan = plan
    return result


def set_stage(model: nn.Module, stage: int) -> nn.Module:
    """Puts all BiPer layers into a stage, in place; their alpha is scaled so that the size of each channel's weight stays."""
    if stage not in (1, 2):
        raise BadInput(f"stage must be 1 or 2, got {stage}")
    for layer in _layers(model, _BiPer):
        if layer.stage != stage:
            with torch.no_grad():
                wave = torch.sin(layer.frequency * layer.weight).abs().flatten(1).mean(1).clamp_min(1e-6)
                layer.alpha.mul_(wave if stage == 2 else 1 / wave)
            layer.stage = stage
    return model


def set_sharpness(model: nn.Module, sharpness: float) -> nn.Module:
    """Sets t of the "tanh" surrogates, in place."""
    if not sharpness > 0:
        raise BadInput(f"sharpness must be positive, got {sharpness}")
    for layer in _layers(model, _Surrogate):
        layer.sharpness = float(sharpness)
    return model


def biper_penalty(model: nn.Module, tau: float) -> Tensor:
    """tau * sum over BiPer layers of mean(sin^2(omega w)), to be added to the loss."""
    terms = [(torch.sin(m.frequency * m.weight) ** 2).mean() for m in _layers(model, _BiPer)]
    if not terms:
        raise BadInput("the model has no BiPer layer")
    return tau * torch.stack(terms).sum()


def pack_binary(model: nn.Module) -> nn.Module:
    """A copy whose binary layers hold one bit a weight; equal to the model in stage 2 and eval mode, up to the order of a sum."""
    result = copy.deepcopy(model)
    made = {m: m.packed() for m in list(_layers(result, _Binary))}
    if not made:
        raise BadInput("the model has no binary layer")
    return swap(result, made)


def biper_error(weight: Tensor, frequency: float) -> float:
    """QE = E sin^2 - (E|sin|)^2 of these weights."""
    wave = torch.sin(frequency * weight.detach().double())
    return float((wave**2).mean() - wave.abs().mean() ** 2)


def laplace_error(frequency: float, scale: float) -> float:
    """QE of weights from a Laplace distribution of that scale (standard deviation sqrt(2) scale)."""
    a = frequency * scale
    if not a > 0:
        raise BadInput(f"frequency * scale must be positive, got {a}")
    return 2 * a**2 / (1 + 4 * a**2) - (a / (1 + a**2) / math.tanh(math.pi / (2 * a))) ** 2


def xnor_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` of matrices of +1 and -1 the way hardware does it: n - 2 popcount(x xor w), on eight signs a byte; int64."""
    if x.shape[-1] != w.shape[-1] or not all(bool((t.abs() == 1).all()) for t in (x, w)):
        raise BadInput(f"two matrices of +1 and -1 with rows of one length are needed, got {tuple(x.shape)} and {tuple(w.shape)}")
    count = torch.tensor([i.bit_count() for i in range(256)], device=x.device)
    a, b = (torch.stack([pack((row > 0).to(torch.int64), 1) for row in t]) for t in (x, w))
    differ = count[(a[:, None] ^ b[None]).to(torch.int64)].sum(-1)
    return x.shape[-1] - 2 * differ


def _layers(model: nn.Module, kind: type) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, kind))
