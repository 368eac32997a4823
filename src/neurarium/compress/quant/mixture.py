"""DGMS: a learned codebook of few values, found as the means of a Gaussian mixture over a layer's weights.

The weights of a trained layer look like a sum of a few Gaussians. DGMS describes them by one with K components, of which the first has its
mean pinned at zero, and puts in the place of each weight the mean of the component that it belongs to. With K = 16 that is a codebook of
4 bits whose values are not evenly spaced, and the zero component prunes for free. Which component a weight belongs to is decided softly
while training, so the task's loss moves weights, means, widths and shares together:

    gamma_k(w) = pi_k N(w; mu_k, sigma_k) / sum_j pi_j N(w; mu_j, sigma_j)        the responsibility of component k
    phi(w)     = softmax(gamma(w) / tau)                                          nearly one-hot: tau = 0.01, learned
    S(w)       = sum_k phi_k(w) mu_k,  mu_0 = 0                                   the weight in training
    P(w)       = mu_{argmax phi(w)}                                               the weight afterwards

The mixture starts at the layer's k-means clusters: means, standard deviations and shares; the centre nearest to zero becomes component 0.

*Source*: Dong, Tan, Wu, Zhang, Ma, "Finding the Task-Optimal Low-Bit Sub-Distribution in Deep Neural Networks", ICML 2022 (arXiv
2112.15139), section 3.

*Departures*: responsibilities are computed in log space (densities of narrow components underflow in float32, and a small constant in the
denominator would then make the assignment uniform). The logarithms of sigma, pi and tau are the parameters, which keeps them positive.
k-means is deterministic: dynamic programming over a histogram of the weights, exact up to 512 distinct values, then Lloyd's steps on all
of them. Training is AdamW with a one-cycle schedule; ``lr`` is the paper's, made for 60 to 350 epochs, a short training wants more.

*Cost*: while training, some ten passes over K numbers a weight, recomputed for the backward pass, so that nothing of size K n is kept.
Afterwards log2 K bits a weight and K values a layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.blocks import explicit
from neurarium.compress.quant.layers import quantisable, swap
from neurarium.compress.quant.packing import pack_layer
from neurarium.errors import BadInput
from neurarium.learn.fit import Backprop
from neurarium.roles import Loader

__all__ = ["MixtureConv2d", "MixtureLinear", "MixtureWeight", "codebook_product", "dgms", "harden", "kmeans_1d", "plan_dgms", "soften"]

_CHUNK = 2**22  # numbers held at once


class MixtureWeight(nn.Module):
    """w -> S(w) in training mode, P(w) in eval mode.

    Args:
        weight: what the mixture is fitted to.
        components: K, the zero component included.
        temperature: tau at the start.
        init: "kmeans", or "em" for expectation-maximisation from there.

    Parameters: ``mean`` (K - 1), ``log_sigma`` and ``log_share`` (K), ``log_temperature``.
    """

    def __init__(self, weight: Tensor, components: int = 16, *, temperature: float = 0.01, init: str = "kmeans") -> None:
        super().__init__()
        if components < 2:
            raise BadInput(f"a mixture has at least 2 components, the zero one included, got {components}")
        if not temperature > 0:
            raise BadInput(f"temperature must be positive, got {temperature}")
        if init not in ("kmeans", "em"):
            raise BadInput(f"init must be 'kmeans' or 'em', got {init!r}")
        mean, sigma, share = _fit(weight, components, steps=100 if init == "em" else 0)
        like = {"dtype": weight.dtype, "device": weight.device}
        self.mean = nn.Parameter(mean[1:].to(**like))
        self.log_sigma = nn.Parameter(sigma.log().to(**like))
        self.log_share = nn.Parameter(share.log().to(**like))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), **like))

    @property
    def codebook(self) -> Tensor:
        """The K values that a weight may have; the first is 0."""
        return F.pad(self.mean, (1, 0))

    def responsibilities(self, weight: Tensor) -> Tensor:
        """gamma, (K, ...), in at least float32."""
        return _responsibilities(weight.flatten(), *self._parts(weight)[:3]).view(-1, *weight.shape)

    def codes(self, weight: Tensor) -> Tensor:
        """The component of each weight, int64; ties go to the first."""
        mean, log_sigma, log_share, _ = self._parts(weight)
        parts = weight.detach().flatten().split(_CHUNK // len(log_sigma))
        return torch.cat([_log_joint(w, mean, log_sigma, log_share).argmax(0) for w in parts]).view(weight.shape)

    def soft(self, weight: Tensor) -> Tensor:
        """S(w)."""
        parts = weight.flatten().split(_CHUNK // len(self.log_sigma))
        return torch.cat([_SoftAssign.apply(w, *self._parts(w)) for w in parts]).view(weight.shape).to(weight.dtype)  # type: ignore[arg-type]

    def _parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return tuple(t.to(dtype) for t in (self.codebook, self.log_sigma, self.log_share, self.log_temperature))

    def forward(self, weight: Tensor) -> Tensor:
        return self.soft(weight) if self.training else self.codebook[self.codes(weight)]


def _log_joint(w: Tensor, mean: Tensor, log_sigma: Tensor, log_share: Tensor) -> Tensor:
    """log(pi_k N(w; mu_k, sigma_k)) up to a constant, (K, n)."""
    z = (w - mean[:, None]) * torch.exp(-log_sigma)[:, None]
    return (log_share - log_sigma)[:, None].addcmul(z, z, value=-0.5)


def _softmax(x: Tensor) -> Tensor:
    """Over dimension 0, in place, without the numbers too small to count: they would be denormal, which costs ten times the time."""
    x = x.sub_(x.amax(0)).clamp_min_(math.log(torch.finfo(x.dtype).eps) - 4).exp_()
    return x.div_(x.sum(0))


def _responsibilities(w: Tensor, mean: Tensor, log_sigma: Tensor, log_share: Tensor) -> Tensor:
    return _softmax(_log_joint(w, mean, log_sigma, log_share))


class _SoftAssign(torch.autograd.Function):
    """S(w) for a flat w; the backward pass computes gamma and phi anew."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, mean: Tensor, log_sigma: Tensor, log_share: Tensor, log_tau: Tensor) -> Tensor:
        ctx.save_for_backward(w, mean, log_sigma, log_share, log_tau)
        return mean @ _softmax(_responsibilities(w, mean, log_sigma, log_share).mul_(torch.exp(-log_tau)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        w, mean, log_sigma, log_share, log_tau = ctx.saved_tensors
        scale, sharp = torch.exp(-log_sigma)[:, None], torch.exp(-log_tau)
        gamma = _responsibilities(w, mean, log_sigma, log_share)
        phi = _softmax(gamma * sharp)
        to_mean = phi @ grad
        to_gamma = phi.mul_(mean[:, None] - mean @ phi).mul_(grad * sharp)
        to_joint = gamma * to_gamma
        total = to_joint.sum(0)
        to_joint.sub_(gamma.mul_(total))
        to_share = to_joint.sum(1)
        z = (w - mean[:, None]).mul_(scale)
        to_z = to_joint.mul_(z)  # minus the gradient to z
        to_sigma = (to_z * z).sum(1) - to_share
        to_w = to_z.mul_(scale)
        return (-to_w.sum(0)).to(w.dtype), to_mean + to_w.sum(1), to_sigma, to_share, -total.sum()


class MixtureLinear(nn.Linear):
    """A linear layer whose weight goes through its ``mixture``."""

    mixture: MixtureWeight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mixture(self.weight), self.bias)


class MixtureConv2d(nn.Conv2d):
    """A convolution whose weight goes through its ``mixture``."""

    mixture: MixtureWeight

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.mixture(self.weight), self.bias)


_MIXED: dict[type, type] = {nn.Linear: MixtureLinear, nn.Conv2d: MixtureConv2d}


def plan_dgms(model: nn.Module, *, components: int = 16, skip: str | Sequence[str] = "first_last") -> BitPlan:
    """log2(components) bits for the weight of each Linear and Conv2d.

    Args:
        skip: names of layers to leave alone, or "first_last": the first and the last module with a weight matrix, in the order in which
            the model lists them.
    """
    bits = components.bit_length() - 1
    if components != 2**bits or not 1 <= bits <= 8:
        raise BadInput(f"components must be 2, 4, 8, ... 256, got {components}")
    found, skipped = quantisable(model, skip)
    return BitPlan(dict.fromkeys(found, (bits, 32)), skipped=skipped)


def soften(model: nn.Module, plan: BitPlan, *, temperature: float = 0.01, init: str = "kmeans") -> nn.Module:
    """A copy whose planned layers have a mixture of 2^bits components each, ready for training by any learner."""
    result = copy.deepcopy(model)
    plan.check(result)
    for name, (bits, _) in plan.bits.items():
        layer = result.get_submodule(name)
        if type(layer) not in _MIXED:
            raise BadInput(f"{name}: a {type(layer).__name__} takes no mixture, only Linear and Conv2d")
        if not torch.isfinite(layer.weight).all():
            raise BadInput(f"{name}: the weight has values that are not finite")
        layer.__class__ = _MIXED[type(layer)]
        layer.mixture = MixtureWeight(layer.weight.detach(), 2**bits, temperature=temperature, init=init).train(layer.training)
    return result


def harden(model: nn.Module) -> nn.Module:
    """A copy whose mixture layers are packed codes and a codebook (PackedLinear, PackedConv2d)."""
    result = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    plain = {mixed: kind for kind, mixed in _MIXED.items()}
    for layer in [m for m in result.modules() if type(m) in plain]:
        codes, table = layer.mixture.codes(layer.weight), layer.mixture.codebook.detach()
        del layer.mixture
        layer.__class__ = plain[type(layer)]
        made[layer] = pack_layer(layer, codes, table=table)
    return swap(result, made)


def dgms(
    model: nn.Module,
    loader: Loader,
    *,
    components: int = 16,
    temperature: float = 0.01,
    epochs: int = 3,
    lr: float = 2e-5,
    weight_decay: float = 5e-4,
    skip: str | Sequence[str] = "first_last",
    init: str = "kmeans",
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    seed: int = 0,
) -> nn.Module:
    """A copy of the model in codes of log2(components) bits, with values learned on the task.

    Args:
        loader: ``(x, y)`` batches to train on; not read where ``epochs`` is 0 (then it is k-means alone).
        temperature: tau at the start.
        weight_decay: of the weights and biases; the mixtures have none.
        skip: see :func:`plan_dgms`.
        loss: as of :class:`~neurarium.learn.fit.Backprop`.

    Returns:
        A model with :class:`~neurarium.compress.quant.packing.PackedLinear` and ``PackedConv2d`` layers, in the input's mode; its ``plan``
        is a BitPlan. Attention of ``nn.TransformerEncoderLayer`` and Hugging Face's Conv1D are made plain Linear layers first.
    """
    if epochs < 0 or not lr > 0:
        raise BadInput(f"epochs must be >= 0 and lr positive, got {epochs} and {lr}")
    opened = explicit(model)
    plan = plan_dgms(opened, components=components, skip=skip)
    result = soften(opened, plan, temperature=temperature, init=init)
    if epochs and plan.bits:
        tune(result, loader, epochs=epochs, lr=lr, weight_decay=weight_decay, loss=loss, seed=seed)
    result = harden(result)
    result.plan = plan
    return result


class _Tune(Backprop):
    """Backpropagation that also takes models whose output is no tensor; the loss knows what to do with it."""

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> Any:
        value, output = super().gradients(model, x, y)
        return value, output if isinstance(output, Tensor) else None


def tune(
    model: nn.Module, loader: Loader, *, epochs: int, lr: float, weight_decay: float = 5e-4, loss: Any = "cross_entropy", seed: int = 0
) -> None:
    """Trains a softened model in place: AdamW with one cycle of the learning rate, no decay on the mixtures."""
    steps = epochs * (len(loader) if hasattr(loader, "__len__") else sum(1 for _ in loader))
    if not steps:
        raise BadInput("the loader is empty: there is nothing to train on")

    def groups(m: nn.Module) -> list[dict[str, Any]]:
        mixtures = [p for part in m.modules() if isinstance(part, MixtureWeight) for p in part.parameters()]
        inside = {id(p) for p in mixtures}
        rest = [p for p in m.parameters() if p.requires_grad and id(p) not in inside]
        return [{"params": rest}, {"params": mixtures, "weight_decay": 0.0}]

    optimizer, schedule = partial(AdamW, lr=lr, weight_decay=weight_decay), partial(OneCycleLR, max_lr=lr, total_steps=max(steps, 2))
    _Tune(loss=loss, optimizer=optimizer, schedule=schedule, groups=groups).fit(model, loader, epochs=epochs, seed=seed)


def codebook_product(x: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    """``x @ table[codes].T`` the way a table-lookup kernel does it: inputs are added up by code, then multiplied, K times an output.

    Args:
        x: (rows, in).
        codes: (out, in) integers below K.
        table: (K,).
    """
    sums = x.new_zeros(len(x), len(codes), len(table))
    index = codes.unsqueeze(0).expand(len(x), -1, -1)
    return sums.scatter_add_(2, index, x.unsqueeze(1).expand(-1, len(codes), -1)) @ table


def kmeans_1d(values: Tensor, clusters: int, *, bins: int = 512, iterations: int = 50) -> Tensor:
    """The centres of 1-D k-means, ascending, float64; fewer where there are fewer distinct values.

    Optimal for up to `bins` distinct values (dynamic programming over the sorted values); beyond that their histogram of equal counts is
    clustered so, and Lloyd's steps on all values follow.
    """
    x = values.detach().flatten().double().cpu().sort().values
    if not x.numel() or not torch.isfinite(x).all():
        raise BadInput("k-means needs at least one value, all of them finite")
    points, counts = x.unique_consecutive(return_counts=True)
    if len(points) <= clusters:
        return points
    if whole := len(points) <= bins:
        weight = counts.double()
    else:
        parts = torch.tensor_split(x, bins)
        points, weight = torch.stack([p.mean() for p in parts]), torch.tensor([len(p) for p in parts], dtype=torch.float64)
    edges = _segments(points, weight, clusters)
    mass, total = F.pad(weight.cumsum(0), (1, 0)), F.pad((weight * points).cumsum(0), (1, 0))
    centres = (total[edges[1:]] - total[edges[:-1]]) / (mass[edges[1:]] - mass[edges[:-1]])
    prefix = F.pad(x.cumsum(0), (1, 0))
    for _ in range(0 if whole else iterations):
        cut = torch.cat([torch.tensor([0]), torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2), torch.tensor([len(x)])])
        size = cut[1:] - cut[:-1]
        new = torch.where(size > 0, (prefix[cut[1:]] - prefix[cut[:-1]]) / size.clamp_min(1), centres)
        if torch.equal(new, centres):
            break
        centres = new
    return centres


def _segments(points: Tensor, weight: Tensor, clusters: int) -> Tensor:
    """The borders of the contiguous segments with the least squared error: best[j] = min_i best[i] + cost(i, j), once a cluster."""
    n = len(points)
    points = points - points.mean()  # squares of numbers near zero lose fewer digits
    s0, s1, s2 = (F.pad((weight * points**k).cumsum(0), (1, 0)) for k in range(3))
    m = s0[:, None] - s0
    cost = s2[:, None] - s2 - (s1[:, None] - s1) ** 2 / m.clamp_min(1e-12)
    cost = torch.where(m > 0, cost.clamp_min(0), math.inf)  # (to, from)
    best, back = cost[:, 0], []
    for _ in range(clusters - 1):
        best, choice = (cost + best).min(1)
        back.append(choice)
    edges = [n]
    for choice in reversed(back):
        edges.append(int(choice[edges[-1]]))
    return torch.tensor([0, *reversed(edges)])


def _fit(weight: Tensor, components: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means (the first is 0), standard deviations and shares, float64: of the k-means clusters, then `steps` of EM."""
    x = weight.detach().flatten().double().cpu()
    centres = kmeans_1d(x, components)
    label = torch.searchsorted((centres[1:] + centres[:-1]) / 2, x)
    size = torch.bincount(label, minlength=len(centres)).double()
    var = torch.zeros_like(centres).index_add_(0, label, (x - centres[label]) ** 2) / size.clamp_min(1)
    floor = max(1e-3 * float(x.std(correction=0)) / components, 1e-6)
    mean, sigma, share = centres, var.sqrt().clamp_min(floor), size / len(x)
    if missing := components - len(centres):  # fewer distinct values than components: the others have no share to speak of
        mean, sigma = F.pad(mean, (0, missing), value=float(centres[-1])), F.pad(sigma, (0, missing), value=floor)
        share = F.pad(share, (0, missing))
    zero = int(mean.abs().argmin())
    order = torch.tensor([zero, *(k for k in range(components) if k != zero)])
    mean, sigma, share = mean[order], sigma[order], (share[order] + 1e-9) / (1 + components * 1e-9)
    mean[0] = 0.0
    for _ in range(steps):
        gamma = (share.log() - sigma.log() - 0.5 * ((x[:, None] - mean) / sigma) ** 2).softmax(1)
        mass = gamma.sum(0) + 1e-12
        mean = (gamma * x[:, None]).sum(0) / mass
        mean[0] = 0.0
        sigma = ((gamma * (x[:, None] - mean) ** 2).sum(0) / mass).sqrt().clamp_min(floor)
        share = mass / mass.sum()
    return mean, sigma, share
