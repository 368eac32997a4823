"""Linear layers, convolutions, batch normalisation and residual connections whose features are points of the Poincaré ball.

    PLinear    y = gyroplane(<x, z_k>, |x|^2, |z_k|, r_k)                            (signed distances to hyperplanes, as coordinates)
    PConv2d    the same on exp0 of the neighbours' concatenated logarithms, times beta_n/beta_ni       (beta-concatenation)
    PBatchNorm exp_b( sqrt(gamma/(s^2 + eps)) PT_{mu->b} log_mu(x) ),  mu the gyromidpoint, s^2 the mean squared distance to it
    PResidual  x (+) f(x)

*Identity initialisation*: with ``Z = I/2`` and ``r = 0`` a square linear layer is *exactly* the identity, at every curvature, so that the
norms of the features survive any depth, while small random weights pull everything to the origin. A convolution with ``init="identity"``
copies, as published, the first entries of the concatenated patch, shortened by the beta factor; ``init="centre"`` copies the central
pixel at full length.

Layers take and give points (``space="ball"``) or tangent vectors at the origin (``space="tangent"``: ``log0 . layer . exp0`` in one step).
The latter sit inside an ordinary network; :func:`hyperbolic` is the rule that puts them into yours.

*Source*: van Spengler, Berkhout, Mettes, "Poincaré ResNet" (2023); the linear layer and the beta-concatenation are Shimizu et al.,
"Hyperbolic Neural Networks++" (2021).

*Departures*: the published batch normalisation always uses batch statistics; here a running midpoint and variance serve in eval mode
(``track_running_stats=False`` for theirs). A layer with more outputs than inputs starts the surplus rows with small random orientations:
at exactly zero they would never receive a gradient. A convolution computes its inner products by an ordinary convolution and its norms by
a box filter, so that no patch is ever copied.

*Cost*: one matrix product or convolution, and about ten elementwise passes over the outputs forward, twenty backward. Kept for the
backward pass: the input, the inner products and one number a position.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput
from neurarium.nn.hyperbolic.ball import PoincareBall
from neurarium.nn.hyperbolic.frechet import frechet_mean
from neurarium.nn.hyperbolic.gyroplane import Into, Out, gyroplane
from neurarium.nn.replace import Rule

__all__ = ["PMLR", "PBatchNorm", "PConv2d", "PLinear", "PResidual", "hyperbolic"]

Space = Literal["ball", "tangent"]
Spaces = Space | tuple[Space, Space]  # of inputs and outputs
_SURPLUS = 1e-2  # length of the orientations beyond the identity


def _spaces(space: Spaces) -> tuple[Space, Space]:
    into, out = (space, space) if isinstance(space, str) else space
    if not {into, out} <= {"ball", "tangent"}:
        raise BadInput(f"space is 'ball', 'tangent' or a pair of them for inputs and outputs, not {space!r}")
    return into, out


class _Gyroplanes(nn.Module):
    """Orientations (out, in, ...) and offsets (out,) of hyperplanes, and the map from inner products to features."""

    into: Into
    out: Out

    def __init__(self, shape: tuple[int, ...], ball: PoincareBall, bias: bool, init: str, space: Spaces, factory: dict[str, Any]) -> None:
        super().__init__()
        if min(shape) < 1:
            raise BadInput(f"a layer needs at least one input and one output, got a weight of shape {shape}")
        self.ball, self.init = ball, init
        self.into, self.out = _spaces(space)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(shape[0], **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: orientations by ``init``, offsets at zero."""
        flat = self.weight.view(len(self.weight), -1)
        out, inner = flat.shape
        if self.init == "identity":
            flat.copy_(torch.eye(out, inner) / 2)
            if out > inner:
                flat[inner:].normal_().mul_(_SURPLUS / flat[inner:].norm(dim=1, keepdim=True))
        elif self.init == "normal":
            flat.normal_(std=(2 * out * inner) ** -0.5)
        else:
            raise BadInput(f"init is 'identity' or 'normal', not {self.init!r}")
        if self.bias is not None:
            self.bias.zero_()

    def _features(self, p: Tensor, square: Tensor, into: Into) -> Tensor:
        norm = self.weight.flatten(1).square().sum(1).clamp_min(1e-15).sqrt()
        r = torch.zeros_like(norm) if self.bias is None else self.bias
        args = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in (p, square, norm, r)]
        out = gyroplane(*args, self.ball.c.to(args[0].dtype), into=into, out=self.out, exact=self.ball.exact)
        return out.to(p.dtype)


class PLinear(_Gyroplanes):
    """Hyperbolic linear layer ``(..., in_features) -> (..., out_features)``; both are points, or tangent vectors at the origin.

    ``weight`` (out, in) holds the orientations z_k, ``bias`` (out,) the offsets r_k. As c -> 0 it becomes the ordinary linear layer
    ``2 Z x - 2 |z_k| r_k``. ``init``: ``"identity"`` or ``"normal"`` (N(0, 1/(2 in out)), which collapses with depth).
    """

    def __init__(
        self, in_features: int, out_features: int, ball: PoincareBall, *, bias: bool = True,
        init: Literal["identity", "normal"] = "identity", space: Spaces = "ball", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__((out_features, in_features), ball, bias, init, space, {"device": device, "dtype": dtype})
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise BadInput(f"PLinear takes {self.in_features} features, the input has shape {tuple(x.shape)}")
        return self._features(functional.linear(x, self.weight), (x * x).sum(-1, keepdim=True), self.into)

    @torch.no_grad()
    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        """Start from an ordinary layer: equal to it in the limit c -> 0, and without a bias to first order at the origin for every c.

        Z = W/2 and r_k = -b_k/|w_k|. Returns the relative error of the outputs on ``inputs`` (0 without any), for the layer between tangent
        spaces. Raises ``BadInput`` for another shape.
        """
        if old.weight.shape != self.weight.shape or isinstance(old, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            raise BadInput(
                f"a {type(old).__name__} of shape {tuple(old.weight.shape)} cannot start one of shape {tuple(self.weight.shape)}"
            )
        if self.bias is None and old.bias is not None:
            raise BadInput("the old layer has a bias, the new one has none")
        self.weight.copy_(old.weight / (2 * self._patch_gain()))
        if self.bias is not None:
            norms = old.weight.flatten(1).norm(dim=1).clamp_min(1e-7)
            self.bias.copy_(-old.bias / norms * self._patch_gain()) if old.bias is not None else self.bias.zero_()
        if inputs is None or (self.into, self.out) != ("tangent", "tangent"):
            return self.weight.new_zeros(())
        want = old(inputs)
        return (self(inputs) - want).norm() / want.norm()

    def _patch_gain(self) -> float:
        return 1.0

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply the orientations by ``factor``: the gain near the origin."""
        self.weight.mul_(factor)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, init={self.init}, space={self.into}->{self.out}"


class PConv2d(PLinear):
    """Hyperbolic convolution ``(n, in_channels, h, w) -> (n, out_channels, h', w')``: every pixel's channels are one vector.

    ``init``: ``"identity"`` as published, ``"centre"`` (the layer is the identity on channels that it has on both sides), ``"normal"``.
    Zero padding is the origin of the ball.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], ball: PoincareBall, *,
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, bias: bool = True,
        init: Literal["identity", "centre", "normal"] = "identity", space: Spaces = "ball", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, device="meta")  # checks and spells out
        self.kernel_size, self.stride, self.padding, self.dilation = plain.kernel_size, plain.stride, plain.padding, plain.dilation
        shape = (out_channels, in_channels, *plain.kernel_size)
        _Gyroplanes.__init__(self, shape, ball, bias, init, space, {"device": device, "dtype": dtype})
        self.in_features, self.out_features = in_channels, out_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        self.register_buffer("box", torch.ones(1, 1, *plain.kernel_size, device=device, dtype=dtype), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init != "centre":
            return super().reset_parameters()
        out, inner, high, broad = self.weight.shape
        self.weight.zero_()
        centre = self.weight[:, :, high // 2, broad // 2]
        centre.copy_(torch.eye(out, inner) / (2 * self._patch_gain()))
        if out > inner:
            centre[inner:].normal_().mul_(_SURPLUS / centre[inner:].norm(dim=1, keepdim=True))
        if self.bias is not None:
            self.bias.zero_()
        return None

    def _patch_gain(self) -> float:
        """beta_n/beta_ni for n = in * k^2 and ni = in, with beta_a = B(a/2, 1/2): what keeps the concatenation's expected length."""
        inner, taps = self.weight.shape[1], self.weight[0, 0].numel()
        return math.exp(_log_beta(inner * taps) - _log_beta(inner))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise BadInput(f"PConv2d takes (n, {self.in_channels}, h, w), the input has shape {tuple(x.shape)}")
        if self.into == "ball":
            x = self.ball.logmap0(x.movedim(1, -1)).movedim(-1, 1)
        gain, where = self._patch_gain(), {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        p = functional.conv2d(x, self.weight * gain, **where)
        box = (self.box * gain**2).to(x.dtype)
        square = functional.conv2d((x * x).sum(1, keepdim=True), box, **where)
        return self._features(p.movedim(1, -1), square.movedim(1, -1), "tangent").movedim(-1, 1)


def _log_beta(a: float) -> float:
    """log B(a/2, 1/2)."""
    return math.lgamma(a / 2) + math.lgamma(0.5) - math.lgamma((a + 1) / 2)


class PMLR(PLinear):
    """Hyperbolic multinomial regression: the signed, scaled distances to one hyperplane a class are the logits."""

    def __init__(
        self, in_features: int, classes: int, ball: PoincareBall, *, space: Space = "ball", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, classes, ball, init="normal", space=space, device=device, dtype=dtype)
        self.out = "scores"  # type: ignore[assignment]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=0.25 * self.weight.shape[1] ** -0.5)  # near the origin the logits are 4 Z x
        self.bias.zero_()

    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        raise BadInput("PMLR is a classifier on points, not a layer that takes the place of a linear one")


class PBatchNorm(nn.Module):
    """Batch normalisation of points (n, features) or (n, features, ...): moves their mean to a learned point and scales their spread.

    ``center``: ``"midpoint"`` (closed form) or ``"frechet"`` (iterated to ``tol``). One variance for the whole vector, one learned scale.
    """

    def __init__(
        self, features: int, ball: PoincareBall, *, center: Literal["midpoint", "frechet"] = "midpoint", space: Spaces = "ball",
        eps: float = 1e-6, momentum: float = 0.1, track_running_stats: bool = True, tol: float = 1e-6,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if center not in ("midpoint", "frechet"):
            raise BadInput(f"center is 'midpoint' or 'frechet', not {center!r}")
        self.features, self.ball, self.center, self.eps, self.momentum, self.tol = features, ball, center, eps, momentum, tol
        self.into, self.out = _spaces(space)
        factory = {"device": device, "dtype": dtype}
        self.bias = nn.Parameter(torch.zeros(features, **factory))  # beta: the new mean is exp0(beta)
        self.weight = nn.Parameter(torch.ones((), **factory))  # gamma, the new variance; its absolute value counts
        self.track_running_stats = track_running_stats
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(features, **factory))
            self.register_buffer("running_var", torch.ones((), **factory))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.features:
            raise BadInput(f"PBatchNorm takes (n, {self.features}, ...), the input has shape {tuple(x.shape)}")
        points = x.movedim(1, -1)
        dtype = points.dtype
        points = points if dtype in (torch.float32, torch.float64) else points.float()
        if self.into == "tangent":
            points = self.ball.expmap0(points)
        out = self._normalise(points)
        return (self.ball.logmap0(out) if self.out == "tangent" else out).to(dtype).movedim(-1, 1)

    def _normalise(self, points: Tensor) -> Tensor:
        ball, batch = self.ball, self.training or not self.track_running_stats
        if batch:
            flat = points.reshape(-1, self.features)
            if len(flat) < 2:
                raise BadInput("PBatchNorm needs at least two points to normalise by their spread")
            mean = ball.midpoint(flat) if self.center == "midpoint" else frechet_mean(flat, ball, tol=self.tol)
        else:
            mean = self.running_mean.to(points.dtype)
        logs = ball.logmap0(ball.mobius_add(-mean, points))  # log_mu(x) up to 2/lambda_mu
        var = 4 * (logs * logs).sum(-1).mean() if batch else self.running_var.to(points.dtype)
        if self.training and self.track_running_stats:
            self._track(mean.detach(), var.detach())
        # With v = log_mu(x): exp_b(t PT v) = b (+) gyr[b, -mu] exp0(t lambda_mu v / 2): the transport's factors cancel
        scale = (self.weight.abs().to(points.dtype) / (var + self.eps)).sqrt()
        target = ball.expmap0(self.bias.to(points.dtype))
        turn = ball.gyration(target, -mean, torch.eye(self.features, dtype=points.dtype, device=points.device))  # rows: images of the axes
        return ball.mobius_add(target, ball.expmap0((logs * scale) @ turn))

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Walk the running midpoint a share of the geodesic towards the batch's."""
        share = torch.tensor(self.momentum, dtype=mean.dtype, device=mean.device)
        self.running_mean.copy_(self.ball.geodesic(share, self.running_mean.to(mean.dtype), mean))
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.features}, center={self.center}, space={self.into}->{self.out}"


class PResidual(nn.Module):
    """``body(x) (+) shortcut(x)`` over the channels (axis 1) of points; the shortcut is x itself by default."""

    def __init__(self, body: nn.Module, ball: PoincareBall, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.ball, self.shortcut = body, ball, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        f, rest = self.body(x), self.shortcut(x)
        if f.shape != rest.shape:
            raise BadInput(
                f"the body gives shape {tuple(f.shape)}, the shortcut {tuple(rest.shape)}: a residual connection needs equal ones"
            )
        return self.ball.mobius_add(f.movedim(1, -1), rest.movedim(1, -1)).movedim(-1, 1)


def hyperbolic(ball: PoincareBall, *, init: Literal["identity", "normal", "fit"] = "identity") -> Rule:
    """The rule for :func:`neurarium.nn.replace.replace_layers` that makes linear layers and 2-D convolutions hyperbolic.

    The new layers map tangent vectors at the origin of ``ball`` (shared by all of them), so that the model around them stays as it is.
    Features should be short against 1/sqrt c: without normalisation in between, a stack of convolutions carries longer ones to the border.
    ``init="identity"``: linear layers copy their input, convolutions its central pixel. ``"normal"``: small random weights. ``"fit"``: the
    weights of the trained layer, whose function it has where ``c |x|^2`` and ``c |y|^2`` are small: choose c accordingly.
    Kept, with the reason in the report: grouped and 1-D/3-D convolutions, padding modes other than zeros, subclasses of these layers.
    """
    if init not in ("identity", "normal", "fit"):
        raise BadInput(f"init is 'identity', 'normal' or 'fit', not {init!r}")
    start = "normal" if init == "normal" else "identity"

    def build(old: nn.Module) -> nn.Module:
        if type(old) is nn.Linear:
            return PLinear(old.in_features, old.out_features, ball, bias=old.bias is not None, init=start, space="tangent")
        if type(old) is not nn.Conv2d:
            base = next(c.__name__ for c in type(old).__mro__ if c in _OLD)
            raise BadInput(
                f"there is no hyperbolic {base} here" if type(old) is not nn.Conv2d and type(old) in _OLD
                else f"{type(old).__name__} derives from {base} and may compute something else: give it a rule of its own"
            )  # fmt: skip
        if old.groups != 1:
            raise BadInput(f"its {old.groups} groups share no channels: a hyperbolic layer measures distances over all of them")
        if old.padding_mode != "zeros":
            raise BadInput(f"its padding mode is {old.padding_mode!r}; a hyperbolic convolution pads with the origin")
        options = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "bias": old.bias is not None}
        kind = "centre" if start == "identity" else start
        return PConv2d(old.in_channels, old.out_channels, old.kernel_size, ball, init=kind, space="tangent", **options)

    return Rule(lambda name, module: isinstance(module, _OLD), build, "fit" if init == "fit" else "fresh")


_OLD = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
