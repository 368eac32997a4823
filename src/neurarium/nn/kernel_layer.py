"""Scalable neural network kernels: layers that meet their input only through a dot product of random features.

A layer f(W x + b) entangles input and parameters. Written as y = Psi phi(x) (:mod:`.features`) it is linear in what is trained:

* :class:`KernelLinear` trains Psi (out x m) in the place of W (out x d): d/m times fewer numbers. :class:`KernelConv2d` does so to patches,
  :class:`SNNKAdapter` adds x + Psi phi(x), the identity at first, to a frozen network; :func:`kernelise` is the rule for a user's model.
* :func:`bundle`: where one such layer follows another, phi(z) = h(G z + g) of z = Psi phi(x) needs only the product B = G Psi (m x m),
  so the hidden width disappears: y = Psi_T h(B_T-1 h(... h(G_1 x))).
* :func:`fully_bundle`: with all but the last matrix held fixed the network is linear: the optimum of the squared error is
  ``W = Y^T Phi (Phi^T Phi + ridge I)^-1``, that of cross-entropy is found by Newton's method. No backpropagation.

*Source*: Sehanobish et al., "Scalable Neural Network Kernels" (2023).

*Departures*: Psi starts so that a layer followed by a ReLU keeps the root mean square of a unit input, as He's rule does for
a dense layer. Features have the bandwidth sqrt(d) where they have one, since inputs of a network have norm sqrt(d), not 1.
``fit_`` starts Psi from a trained layer by least squares on its inputs. ``bundle`` starts from the very function of the layers
and also takes in a dense layer behind them.

*Cost*: m (d + out) multiply-adds a row where a dense layer has d out: fewer if m < d out / (d + out), in training too. The m x d
matrix G is fixed but stored: it can be drawn again from its seed, and a comparison of sizes has to say whether it counts it.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.nn.features import RFF, URF, ArcCos, PositiveExp, RandomFeatures
from neurarium.nn.replace import Rule

__all__ = ["KernelConv2d", "KernelLinear", "SNNKAdapter", "bundle", "fully_bundle", "kernelise"]


def _features(kind: RandomFeatures | str, d: int, m: int, seed: int = 0, bias: bool = True) -> RandomFeatures:
    if isinstance(kind, RandomFeatures):
        if kind.in_features != d:
            raise BadInput(f"the features read {kind.in_features} numbers, the layer has {d} inputs")
        return kind
    options: dict[str, Any] = {"seed": seed, "bias": bias}
    kinds = {
        "relu": lambda: ArcCos(d, m, 1, **options),
        "step": lambda: ArcCos(d, m, 0, **options),
        "cos": lambda: RFF(d, m, scale=math.sqrt(d), **options),
        "exp": lambda: PositiveExp(d, m, scale=math.sqrt(d), **options),
        "urf": lambda: URF(d, m, "sin", scale=math.sqrt(d), seed=seed),
    }
    if kind not in kinds:
        raise BadInput(f"features is {', '.join(map(repr, kinds))} or a RandomFeatures, not {kind!r}")
    return kinds[kind]()


class KernelLinear(nn.Module):
    """``(..., in_features) -> (..., out_features)``: y = Psi phi(x).

    Args:
        features: ``"relu"``, ``"step"``, ``"cos"``, ``"exp"``, ``"urf"``, or features of your own for ``in_features`` inputs.
        num_features: m (of named features).
        parametrisation: ``"psi"`` trains Psi itself, out x m numbers. ``"weights"`` trains W and b, as many as a dense layer has, and
            Psi = psi(W, b): with ``URF(d, m, f)`` the layer approximates f(W x + b), activation included.
        bias: of named features: the constant input, or b.
        seed: of named features.
    """

    def __init__(
        self, in_features: int, out_features: int, features: RandomFeatures | str = "relu", num_features: int = 64, *,
        parametrisation: Literal["psi", "weights"] = "psi", bias: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if parametrisation not in ("psi", "weights"):
            raise BadInput(f"parametrisation is 'psi' or 'weights', not {parametrisation!r}")
        self.in_features, self.out_features, self.parametrisation = in_features, out_features, parametrisation
        self.features = _features(features, in_features, num_features, seed, bias)
        if parametrisation == "psi":
            self.weight = nn.Parameter(torch.empty(out_features, self.features.num_features))
            self.register_parameter("bias", None)
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features))
            self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Psi: Gaussian with E y^2 = 2 for Gaussian inputs of unit variance. W: rows of norm sqrt 2, of 2 pi / sqrt d for ReLU features."""
        if self.parametrisation == "psi":
            probe = torch.randn(256, self.in_features, generator=torch.Generator().manual_seed(0)).to(self.features.G)
            power = self.features.phi(probe).square().sum(-1).mean().item()
            self.weight.normal_(0, math.sqrt(2 / max(power, 1e-12)))
        else:
            homogeneous = isinstance(self.features, ArcCos) and self.features.order == 1
            self.weight.normal_(0, 2 * math.pi / self.in_features if homogeneous else math.sqrt(2 / self.in_features))
            if self.bias is not None:
                self.bias.zero_()

    @property
    def psi(self) -> Tensor:
        """The matrix (out, m) that meets the features."""
        return self.weight if self.parametrisation == "psi" else self.features.psi(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.features.phi(x), self.psi)

    @torch.no_grad()
    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        """Start from a dense layer: the least-squares Psi for its outputs on ``inputs``. Returns the relative error there.

        With ``parametrisation="weights"`` its W and b are taken over instead, and the error is that against what the kernel estimates.
        """
        if (old.weight.shape[1], old.weight.shape[0]) != (self.in_features, self.out_features):
            raise BadInput(f"a weight {tuple(old.weight.shape)} cannot start a layer {self.in_features} -> {self.out_features}")
        x = _rows(inputs)
        if self.parametrisation == "weights":
            self.weight.copy_(old.weight)
            if self.bias is not None:
                self.bias.copy_(old.bias) if old.bias is not None else self.bias.zero_()
            target = self.features.kernel(x[:, None], self.weight, self.bias)
            return (self(x) - target).norm() / target.norm()
        return self._fit(x, functional.linear(x, old.weight, old.bias))

    @torch.no_grad()
    def _fit(self, x: Tensor, target: Tensor) -> Tensor:
        phi = self.features.phi(x)
        self.weight.copy_(_ridge(phi, target, 1e-6 * phi.square().sum().item() / phi.shape[1]))
        return (self(x) - target).norm() / target.norm()

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply the output by ``factor``; where W is trained this is possible for order-1 ReLU features alone."""
        if self.parametrisation == "weights" and not (isinstance(self.features, ArcCos) and self.features.order == 1):
            raise UnsupportedModel("the output is not proportional to W", module=type(self).__name__)
        self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, parametrisation={self.parametrisation}"


class KernelConv2d(nn.Module):
    """``(batch, in_channels, h, w) -> (batch, out_channels, h', w')``: a :class:`KernelLinear` on every zero-padded patch.

    A kernel of size 1 mixes channels; a larger one keeps all patches in memory, as their features need.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int] = 1, features: RandomFeatures | str = "relu",
        num_features: int = 64, *, stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, bias: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = (_pair(v) for v in (kernel_size, stride, padding, dilation))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.linear = KernelLinear(in_channels * math.prod(self.kernel_size), out_channels, features, num_features, bias=bias, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        patches, size = self._patches(x)
        return self.linear(patches).transpose(1, 2).unflatten(2, size)

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        size = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride)
        )
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            patches = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            patches = functional.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        return patches.transpose(1, 2), size  # (batch, places, in_channels * kernel)

    @torch.no_grad()
    def fit_(self, old: nn.Module, inputs: Tensor | None = None) -> Tensor:
        """Start from a convolution of this shape: least squares on the patches of ``inputs``. Returns the relative error there."""
        if old.weight.shape != (self.out_channels, self.in_channels, *self.kernel_size):
            raise BadInput(f"a kernel {tuple(old.weight.shape)} cannot start a layer {self.in_channels} -> {self.out_channels}")
        if inputs is None or inputs.shape[0] == 0:
            raise BadInput("Psi is fitted on the layer's inputs: pass replace_layers(..., example=inputs of the model)")
        x = self._patches(inputs)[0].flatten(0, 1)
        return self.linear._fit(x, functional.linear(x, old.weight.flatten(1), old.bias))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class SNNKAdapter(nn.Module):
    """y = x + Psi phi(x) on the last axis: ``dim * num_features`` trainable numbers, the identity at the start if ``zero_init``."""

    def __init__(self, dim: int, num_features: int = 16, features: RandomFeatures | str = "cos", *, zero_init: bool = True, seed: int = 0):
        super().__init__()
        self.update = KernelLinear(dim, dim, features, num_features, seed=seed)
        if zero_init:
            nn.init.zeros_(self.update.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.update(x)


def kernelise(
    features: str = "relu", num_features: int | float = 64, *, init: Literal["fresh", "fit"] = "fresh", kernel_size: int | None = None,
    seed: int = 0,
) -> Rule:  # fmt: skip
    """The rule for :func:`neurarium.nn.replace.replace_layers` that trains Psi in the place of the weight.

    Linear layers and 2-D convolutions, of ``kernel_size`` alone if one is given. ``num_features``: m, or below 1 a share of each layer's
    inputs. The activations of the model stay where they are. Kept, with the reason in the report: layers with no more inputs than
    m, which would not get smaller, grouped convolutions, padding other than zeros, subclasses.
    ``init="fit"``: least squares against the trained layer on its inputs (``replace_layers(..., example=...)``).
    """
    if not num_features > 0:
        raise BadInput(f"num_features = {num_features} must be positive")

    def match(name: str, module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return kernel_size is None or module.kernel_size == _pair(kernel_size)
        return isinstance(module, nn.Linear) and kernel_size is None

    def build(old: nn.Module) -> nn.Module:
        if type(old) not in (nn.Linear, nn.Conv2d):
            raise BadInput(f"{type(old).__name__} derives from a standard layer and may compute something else: give it a rule of its own")
        inner = old.weight[0].numel()
        m = max(1, round(num_features * inner)) if num_features < 1 else int(num_features)
        if isinstance(old, nn.Conv2d) and (old.groups != 1 or old.padding_mode != "zeros" or isinstance(old.padding, str)):
            raise BadInput("only ungrouped convolutions with a number as zero padding become kernel layers")
        if m >= inner:
            raise BadInput(f"it has {inner} inputs, no more than the {m} features: it would not get smaller")
        options: dict[str, Any] = {"bias": old.bias is not None, "seed": seed}
        if isinstance(old, nn.Linear):
            return KernelLinear(inner, old.out_features, features, m, **options)
        options |= {"stride": old.stride, "padding": old.padding, "dilation": old.dilation}
        return KernelConv2d(old.in_channels, old.out_channels, old.kernel_size, features, m, **options)

    return Rule(match, build, init)


class _Bundled(nn.Module):
    """y = head h_T(B_T-1 h_T-1(... h_1(G_1 x))): what a chain of kernel layers is after :func:`bundle`."""

    def __init__(self, layers: list[KernelLinear], last: nn.Linear | None) -> None:
        super().__init__()
        self.features = copy.deepcopy(layers[0].features)
        rest = [copy.deepcopy(layer.features) for layer in layers[1:]]
        self.weights = nn.ParameterList([f.G @ a.psi.detach() for f, a in zip(rest, layers)])
        self.activations = nn.ModuleList(rest)
        for f in rest:
            f.register_buffer("G", None)  # it is inside the product
        psi = layers[-1].psi.detach()
        bias = last is not None and last.bias is not None
        self.head = nn.Linear(psi.shape[1], psi.shape[0] if last is None else last.out_features, bias=bias)
        self.head.to(psi)
        with torch.no_grad():
            self.head.weight.copy_(psi if last is None else last.weight @ psi)
            if self.head.bias is not None:
                self.head.bias.copy_(last.bias)

    def phi(self, x: Tensor) -> Tensor:
        """The features that the last matrix reads."""
        h = self.features.phi(x)
        for weight, features in zip(self.weights, self.activations):
            h = features.activate(functional.linear(h, weight, features.offset))
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.phi(x))


@torch.no_grad()
def bundle(model: nn.Module, *, features: str | None = None, num_features: int = 64, seed: int = 0) -> nn.Module:
    """A copy of ``model`` in which every chain of kernel layers is multiplied out; the outputs are the same, the hidden widths are gone.

    Chains are looked for in every ``nn.Sequential``: two or more :class:`KernelLinear` (or one and a dense layer behind it), with at most
    ``nn.Identity`` between them. The features from the second on have to act number by number (``"relu"``, ``"step"``, ``"cos"``).
    With ``features`` named, pairs of a dense layer and an activation (ReLU, GELU, Tanh, SiLU) become kernel layers first, with Psi =
    psi(W, b): a start from the trained weights, not the same function. Raises ``UnsupportedModel`` where there is nothing to bundle.
    """
    model = copy.deepcopy(model)
    if features is not None:
        model = _swap_sequentials(model, lambda s: _kernel_pairs(s, features, num_features, seed))
    found: list[int] = []

    def multiply(chain: nn.Sequential) -> nn.Sequential:
        out: list[nn.Module] = []
        run: list[KernelLinear] = []

        def close(last: nn.Linear | None) -> None:
            if len(run) + (last is not None) > 1 and run:
                found.append(len(run))
                out.append(_Bundled(run, last))
            else:
                out.extend([*run, *([] if last is None else [last])])
            run.clear()

        for name, module in chain.named_children():
            if isinstance(module, KernelLinear):
                if run and not module.features.pointwise:
                    kind = type(module.features).__name__
                    raise UnsupportedModel(f"{kind} features need more of their input than its projections: no bundling", module=name)
                run.append(module)
            elif isinstance(module, nn.Identity) and run:
                continue
            elif type(module) is nn.Linear:
                close(module)
            else:
                close(None)
                out.append(module)
        close(None)
        return nn.Sequential(*out)

    model = _swap_sequentials(model, multiply)
    if not found:
        raise UnsupportedModel("no nn.Sequential holds two layers in a row that could be bundled", module=type(model).__name__)
    return model


def _kernel_pairs(chain: nn.Sequential, features: str, m: int, seed: int) -> nn.Sequential:
    """Dense layer and activation -> one kernel layer."""
    out: list[nn.Module] = []
    layers = list(chain)
    while layers:
        layer = layers.pop(0)
        if type(layer) is nn.Linear and layers and isinstance(layers[0], (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)):
            layers.pop(0)
            new = KernelLinear(layer.in_features, layer.out_features, features, m, bias=layer.bias is not None, seed=seed + len(out))
            new.to(layer.weight)
            new.weight.copy_(new.features.psi(layer.weight, layer.bias))
            out.append(new)
        else:
            out.append(layer)
    return nn.Sequential(*out)


def _swap_sequentials(model: nn.Module, change: Any) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, _swap_sequentials(child, change))
    return change(model) if type(model) is nn.Sequential else model


@torch.no_grad()
def fully_bundle(
    model_or_features: nn.Module, x: Tensor, y: Tensor, *, loss: Literal["mse", "cross_entropy"] = "mse", ridge: float = 1e-3,
    steps: int = 30,
) -> nn.Module:  # fmt: skip
    """The best last matrix for fixed features, without backpropagation: ``nn.Sequential(features, linear layer without bias)``.

    ``model_or_features``: features of any kind, or a chain of kernel layers or a bundled one, whose own last matrix is left out. Minimises
    ``sum |W phi(x) - y|^2 + ridge |W|^2`` in closed form (``y``: numbers (n, ...), or class indices, taken as one-hot rows), or
    ``sum cross-entropy + ridge |W|^2 / 2`` by at most ``steps`` Newton steps. Phi's part with a constant input serves as the intercept.
    """
    rows = _rows(x)
    if len(rows) != len(y) or not ridge >= 0:
        raise BadInput(f"{len(rows)} inputs, {len(y)} targets, ridge = {ridge}: as many of one as of the other, ridge not below 0")
    if loss not in ("mse", "cross_entropy"):
        raise BadInput(f"loss is 'mse' or 'cross_entropy', not {loss!r}")
    features = _feature_map(copy.deepcopy(model_or_features)).eval()
    phi = features(rows)
    if not torch.isfinite(phi).all():
        raise BadInput("the features are not finite: scale the inputs (exponential features need norms of about 1)")
    if y.is_floating_point():
        target = y if y.ndim > 1 else y[:, None]
    else:
        target = functional.one_hot(y).to(phi.dtype)
    weight = _ridge(phi, target, ridge) if loss == "mse" else _newton(phi, target, ridge, steps)
    head = nn.Linear(phi.shape[1], target.shape[1], bias=False).to(phi)
    head.weight.copy_(weight)
    return nn.Sequential(features, head).requires_grad_(False)


class _Phi(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.phi(x)


def _feature_map(model: nn.Module) -> nn.Module:
    if isinstance(model, KernelLinear):
        return model.features
    if isinstance(model, _Bundled):
        model.head = nn.Identity()
        return _Phi(model)
    if type(model) is nn.Sequential and len(model) and isinstance(model[-1], (nn.Linear, KernelLinear, _Bundled)):
        return nn.Sequential(*list(model)[:-1], nn.Identity() if isinstance(model[-1], nn.Linear) else _feature_map(model[-1]))
    return model


def _ridge(phi: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(out, m), solved in float64."""
    a = phi.double()
    gram = a.T @ a
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    right = a.T @ y.double()
    if failed:  # fewer rows than features and no ridge
        return torch.linalg.lstsq(a, y.double(), driver="gelsd").solution.T.to(phi.dtype)
    return torch.cholesky_solve(right, factor).T.to(phi.dtype)


def _newton(phi: Tensor, target: Tensor, ridge: float, steps: int) -> Tensor:
    """Multinomial logistic regression: Newton steps by conjugate gradients with exact products, halved until the loss falls."""
    a, y = phi.double(), target.double()
    w = a.new_zeros(a.shape[1], y.shape[1])

    def value(v: Tensor) -> float:
        return (-(y * functional.log_softmax(a @ v, 1)).sum() + ridge / 2 * v.square().sum()).item()

    now = value(w)
    for _ in range(steps):
        p = torch.softmax(a @ w, 1)
        gradient = a.T @ (p - y) + ridge * w
        if gradient.norm() < 1e-8 * max(1.0, a.norm().item()):
            break

        def curvature(v: Tensor, p: Tensor = p) -> Tensor:
            t = p * (a @ v)
            return a.T @ (t - p * t.sum(1, keepdim=True)) + ridge * v

        step, r = torch.zeros_like(w), gradient.clone()
        direction, rr = r.clone(), r.square().sum()
        tolerance = min(0.25, gradient.norm().item() ** 0.5) * gradient.norm()
        for _ in range(200):
            if rr.sqrt() <= 1e-2 * tolerance:
                break
            c = curvature(direction)
            alpha = rr / (direction * c).sum()
            step, r = step + alpha * direction, r - alpha * c
            new = r.square().sum()
            direction, rr = r + new / rr * direction, new
        size = 1.0
        while value(w - size * step) > now and size > 1e-8:
            size /= 2
        w = w - size * step
        now = value(w)
    return w.T.to(phi.dtype)


def _rows(x: Tensor | None) -> Tensor:
    if x is None or x.shape[0] == 0:
        raise BadInput("inputs are needed: pass some rows (replace_layers(..., example=inputs of the model))")
    return x.flatten(0, -2) if x.ndim > 2 else x


def _pair(v: int | tuple[int, ...]) -> tuple[int, ...]:
    return (v, v) if isinstance(v, int) else tuple(v)
