"""Muon and ROOT: momentum, made orthogonal.

Muon replaces the momentum of a weight matrix by the nearest orthogonal matrix, so that every direction of the matrix learns at one
speed. The polar factor comes from five Newton-Schulz steps with fixed coefficients. ROOT makes this robust in two ways: the
coefficients fit the *shape* of the matrix, because square and wide matrices have different spectra, and entries of the momentum above a
high quantile are cut before, because a few outliers in the gradient would otherwise turn the whole matrix.

*Equations*, for each weight matrix ``W`` (convolutions flattened to (out, in*k*k)) with gradient ``G``:
momentum ``M = mu M + G``, ``V = G + mu M`` (Nesterov) or ``M``; threshold ``eps = quantile_q(|V|)``;
soft threshold ``O = sign(V) max(|V| - eps, 0)``, base ``B = V - O`` (so ``B = clamp(V, -eps, eps)``);
``X = B / ||B||_F`` and K times ``A = X X'``, ``X = a X + (b A + c A^2) X``; ``W = (1 - lr wd) W - lr s X`` with
``s = 0.2 sqrt(max(rows, columns))``, which gives updates the size of Adam's. Vectors, embeddings and the head get AdamW.
The iteration acts on each singular value alone, ``p(s) = a s + b s^3 + c s^5``; coefficients are fitted by minimising
``mean (p^K(s) - 1)^2`` over a shape's spectra, with a penalty where ``p^k`` overshoots anywhere in [0, 1].

*Source.* ROOT: arXiv 2511.20626 (update; published coefficients of four shapes). Muon: Jordan et al. 2024; the scale ``s``: Moonlight,
arXiv 2502.16982.

*Departures.* The paper's fit is described in words; objective, starts and spectra are reconstructed. Gaussian matrices alone give
coefficients that fail on real momenta, whose spectra are steep, so spectra are a mixture (:func:`spectra_for`). The stability penalty is
ours.

*Cost.* Five steps of three products a matrix; matrices of one shape are stacked and go through together. The quantile is one selection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from neurarium.errors import BadInput

__all__ = [
    "BUILTIN", "CLASSIC", "MUON", "ROOT", "Muon", "coefficients_for", "fit_coefficients", "matrix_groups", "newton_schulz",
    "soft_threshold", "spectra_for", "spectral_error",
]  # fmt: skip

Coefficients = tuple[float, float, float]
MUON: Coefficients = (3.4445, -4.7750, 2.0315)
CLASSIC: Coefficients = (15 / 8, -10 / 8, 3 / 8)  # exact in the limit, but slow to lift small singular values

#: (rows, columns) -> coefficients for five steps. Those at 2048 are published (ROOT, table of coefficients); the others come
#: from ``fit_coefficients(spectra_for(shape))``.
BUILTIN: dict[tuple[int, int], Coefficients] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
    (32, 32): (3.2084, -3.6990, 1.4455),
    (32, 64): (3.1557, -3.5740, 1.3894),
    (32, 128): (3.1751, -3.6226, 1.4100),
    (32, 256): (3.1982, -3.6474, 1.4110),
    (64, 64): (3.1852, -3.6496, 1.4232),
    (64, 128): (3.2076, -3.6595, 1.4168),
    (64, 256): (3.1516, -3.5843, 1.4029),
    (64, 512): (3.2487, -3.7635, 1.4688),
    (128, 128): (3.1670, -3.6353, 1.4284),
    (128, 256): (3.2808, -3.7699, 1.4448),
    (128, 512): (3.1795, -3.6213, 1.4107),
    (128, 1024): (3.3078, -3.8467, 1.4816),
    (256, 256): (3.3397, -4.3992, 1.9113),
    (256, 512): (3.3956, -4.4047, 1.8532),
    (256, 1024): (3.3286, -3.9481, 1.5429),
    (256, 2048): (3.2984, -3.6414, 1.3321),
}


class ROOT(Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the rest, in one optimizer with one ``state_dict``.

    Args:
        params: parameters, or parameter groups; a group's ``use_orth=False`` sends it to AdamW. :func:`matrix_groups` makes groups that
            spare embeddings and the head. Tensors of fewer than two axes always get AdamW.
        coefficients: ``"shape"`` (ROOT), ``"muon"``, ``"classic"``, one ``(a, b, c)``, or a table like :data:`BUILTIN`.
        quantile: of ``|V|`` above which entries are cut; ``None`` cuts nothing.
        scale: ``"rms"`` as above, ``"spectral"``: ``sqrt(max(1, rows/columns))``, or ``None``: 1.
        betas, eps: of AdamW.
        ns_dtype: precision of the Newton-Schulz products, see :func:`newton_schulz`.

    With ``coefficients="muon", quantile=None`` this is Muon, and ``Muon`` is short for that.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        coefficients: str | Sequence[float] | Mapping[tuple[int, int], Coefficients] = "shape",
        quantile: float | None = 0.9,
        scale: str | None = "rms",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(coefficients, Mapping):
            coefficients = {tuple(k): tuple(v) for k, v in coefficients.items()}
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "ns_steps": ns_steps,
            "coefficients": coefficients, "quantile": quantile, "scale": scale, "betas": tuple(betas), "eps": eps,
            "ns_dtype": ns_dtype, "use_orth": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        g = self.param_groups[-1]
        valid = {
            "lr": g["lr"] >= 0, "momentum": 0 <= g["momentum"] < 1, "weight_decay": g["weight_decay"] >= 0, "ns_steps": g["ns_steps"] >= 1,
            "quantile": g["quantile"] is None or 0 < g["quantile"] < 1, "scale": g["scale"] in ("rms", "spectral", None),
            "betas": all(0 <= b < 1 for b in g["betas"]),
        }  # fmt: skip
        if wrong := [name for name, fine in valid.items() if not fine]:
            raise BadInput(f"{wrong[0]}={g[wrong[0]]!r} is out of range")
        _coefficients(g["coefficients"], (2, 2))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise BadInput("sparse gradients have no singular values here: put that parameter into a group of another optimizer")
            shapes: dict[Any, list[Tensor]] = {}
            for p in params:
                if group["use_orth"] and p.ndim >= 2:
                    shapes.setdefault((p.shape[0], p[0].numel(), p.dtype, p.device), []).append(p)
            self._adamw([p for p in params if not (group["use_orth"] and p.ndim >= 2)], group)
            for (rows, columns, *_), alike in shapes.items():
                self._orthogonal(alike, rows, columns, group)
        return loss

    def _orthogonal(self, params: list[Tensor], rows: int, columns: int, group: dict[str, Any]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        v = torch._foreach_add(grads, momenta, alpha=group["momentum"]) if group["nesterov"] else momenta
        v = torch.stack([t.reshape(rows, columns) for t in v])  # (matrices, rows, columns)
        if group["quantile"] is not None:
            eps = _quantile(v.flatten(1), group["quantile"]).view(-1, 1, 1) + 1e-9
            v = v.clamp(-eps, eps)  # = v - soft_threshold(v, eps)
        x = newton_schulz(v, _coefficients(group["coefficients"], (rows, columns)), group["ns_steps"], dtype=group["ns_dtype"])
        size = {"rms": 0.2 * max(rows, columns) ** 0.5, "spectral": max(1, rows / columns) ** 0.5, None: 1.0}[group["scale"]]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, [u.reshape(p.shape) for u, p in zip(x, params)], alpha=-group["lr"] * size)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in params]
        adamw(  # torch's own arithmetic
            params, [p.grad for p in params], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
            [s["step"] for s in states], amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


Muon = partial(ROOT, coefficients="muon", quantile=None)


def newton_schulz(
    x: Tensor, coefficients: Sequence[float] = MUON, steps: int = 5, eps: float = 1e-7, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate polar factor ``U V'`` of matrices (..., rows, columns): ``steps`` times ``X = a X + (b A + c A^2) X`` with ``A = X X'``.

    Singular vectors are kept, singular values go through ``p``. ``dtype`` is that of the products: by default float64 for float64,
    bfloat16 on CUDA, float32 on other devices (bfloat16 is slow on most processors, and fast on those with matrix units for it).
    """
    if x.ndim < 2:
        raise BadInput(f"newton_schulz needs matrices, not shape {tuple(x.shape)}")
    a, b, c = coefficients
    if dtype is None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.bfloat16 if x.is_cuda else torch.float32
    tall = x.shape[-2] > x.shape[-1]
    z = x.mT if tall else x
    shape = z.shape
    z = z.to(dtype).reshape(-1, *shape[-2:])
    z = z / (z.norm(dim=(1, 2), keepdim=True) + eps)
    for _ in range(steps):
        gram = torch.bmm(z, z.mT)
        z = torch.baddbmm(z, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), z, beta=a)
    z = z.view(shape)
    return (z.mT if tall else z).to(x.dtype)


def soft_threshold(v: Tensor, eps: float | Tensor) -> Tensor:
    """``sign(v) max(|v| - eps, 0)``: minimises ``1/2 ||v - o||^2 + eps ||o||_1`` over ``o``."""
    return v - v.clamp(-eps, eps) if not isinstance(eps, Tensor) else v - torch.minimum(torch.maximum(v, -eps), eps)


def spectral_error(x: Tensor) -> Tensor:
    """Distance from orthogonality, ``mean (sigma_i - 1)^2``, one number a matrix. It does not depend on the size of the matrix."""
    return (torch.linalg.svdvals(x) - 1).square().mean(-1)


def spectra_for(shape: Sequence[int], *, samples: int = 32, kind: str = "mixture", seed: int = 0) -> Tensor:
    """Normalised singular values (samples, min(shape)) to fit coefficients on.

    ``"gaussian"``: of Gaussian matrices. ``"steep"``: like momenta of nets in training, falling geometrically over one to three decades;
    in half of them the first value holds .6 to .99 of the norm, as it does early in training. ``"mixture"``: half and half.
    """
    if kind not in ("gaussian", "steep", "mixture"):
        raise BadInput(f"kind must be 'gaussian', 'steep' or 'mixture', not {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    m, n = min(shape), max(shape)
    found = []
    if kind != "steep":
        gaussian = torch.randn(samples, m, n, generator=generator)
        found.append(torch.linalg.eigvalsh(gaussian @ gaussian.mT).clamp(min=0).sqrt().flip(1))
    if kind != "gaussian":
        decades = 1 + 2 * torch.rand(samples, 1, generator=generator)
        steep = 10 ** (-decades * torch.linspace(0, 1, m))
        share = 0.6 + 0.39 * torch.rand(samples // 2, generator=generator)  # of the norm in the first direction
        steep[: samples // 2, 0] = steep[: samples // 2, 1:].norm(dim=1) * share / (1 - share**2).sqrt() if m > 1 else 1
        found.append(steep)
    if kind == "mixture":
        found = [f[::2] for f in found]
    spectra = torch.cat(found)
    return spectra / spectra.norm(dim=1, keepdim=True)


def fit_coefficients(
    spectra: Tensor,
    *,
    steps: int = 5,
    starts: Sequence[str | Coefficients] = ("muon", "classic"),
    iterations: int = 1500,
    lr: float = 2e-3,
    overshoot: float = 1.3,
) -> Coefficients:
    """Coefficients that map the given singular values closest to 1 in ``steps`` steps.

    Args:
        spectra: singular values (samples, k), or matrices (samples, rows, columns); each sample is normalised to norm 1.
        starts: where Adam begins; all are tried and the best is kept, because a single one can end in a poor local minimum.
        overshoot: no singular value in [0, 1] may exceed this after any step (soft): otherwise input of low rank diverges.
    """
    values = torch.linalg.svdvals(spectra.double()) if spectra.ndim == 3 else spectra.double()
    if values.ndim != 2 or values.numel() == 0 or not torch.isfinite(values).all():
        raise BadInput("spectra must be finite, (samples, k) singular values or (samples, rows, columns) matrices")
    values = (values / values.norm(dim=1, keepdim=True)).flatten()
    if len(values) > 4096:  # a spectrum is smooth: quantiles say all
        values = values.sort().values[torch.linspace(0, len(values) - 1, 4096).long()]
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    points, n = torch.cat([values, grid]), len(values)
    named = {"muon": MUON, "classic": CLASSIC}
    theta = torch.tensor([named[s] if isinstance(s, str) else s for s in starts], dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr)

    def objective() -> Tensor:
        a, b, c = theta.T.unsqueeze(-1)
        s, peak = points.expand(len(theta), -1), torch.zeros(len(theta), dtype=torch.float64)
        for _ in range(steps):
            square = s * s
            s = s * (a + square * (b + square * c))
            peak = torch.maximum(peak, s[:, n:].abs().amax(1))
        return (s[:, :n] - 1).square().mean(1) + (peak - overshoot).clamp(min=0) * 10

    best, found = torch.full((len(theta),), torch.inf, dtype=torch.float64), theta.detach().clone()
    for _ in range(iterations):
        optimizer.zero_grad()
        value = objective()
        better = value.detach() < best
        best, found = torch.where(better, value.detach(), best), torch.where(better[:, None], theta.detach(), found)
        value.sum().backward()
        theta.grad = theta.grad / theta.grad.norm(dim=1, keepdim=True).clamp(min=1)  # clip each start by itself
        optimizer.step()
    a, b, c = found[best.argmin()].tolist()
    return a, b, c


def coefficients_for(
    shape: Sequence[int], *, table: Mapping[tuple[int, int], Coefficients] = BUILTIN, spectrum: str | None = None
) -> Coefficients:
    """Coefficients for a matrix shape: the nearest in ``table`` by aspect ratio, then by size.

    With ``spectrum`` (see :func:`spectra_for`) they are fitted to the shape instead; that takes about two seconds and is kept.
    """
    m, n = min(shape), max(shape)
    if spectrum is not None:
        return _fitted(m, n, spectrum)
    if not table:
        raise BadInput("the table of coefficients is empty")
    nearest = min(table, key=lambda k: (round(abs(log(max(k) / min(k)) - log(n / m)), 6), abs(log(min(k) / m))))
    return tuple(table[nearest])  # type: ignore[return-value]


@lru_cache(maxsize=256)
def _fitted(m: int, n: int, spectrum: str) -> Coefficients:
    with torch.enable_grad():
        return fit_coefficients(spectra_for((m, n), kind=spectrum))


def _coefficients(setting: Any, shape: tuple[int, int]) -> Coefficients:
    if isinstance(setting, str):
        if setting not in ("shape", "muon", "classic"):
            raise BadInput(f"coefficients must be 'shape', 'muon', 'classic', three numbers or a table, not {setting!r}")
        return coefficients_for(shape) if setting == "shape" else MUON if setting == "muon" else CLASSIC
    if isinstance(setting, Mapping):
        return coefficients_for(shape, table=setting)
    if len(setting) != 3:
        raise BadInput(f"coefficients are three numbers a, b, c, not {setting!r}")
    return tuple(setting)  # type: ignore[return-value]


def _quantile(v: Tensor, q: float, most: int = 1 << 16) -> Tensor:
    """The q-quantile of ``|v|`` in each row by selection; of evenly spaced entries where a row is longer than ``most``."""
    if v.shape[1] > most:
        v = v[:, :: -(-v.shape[1] // most) | 1]  # an odd stride, so that it walks through all columns of a power of two
    return v.abs().kthvalue(1 + int(q * (v.shape[1] - 1)), dim=1).values


def matrix_groups(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Parameter groups by role: ``hidden``, ``input`` and ``conv`` have ``use_orth=True``; ``output``, ``embedding``, ``vector`` not.

    Roles come from the modules: weights of ``nn.Embedding`` are embeddings (a head that shares them too), the first and last
    ``nn.Linear`` in order of registration are input and output, what has fewer than two axes longer than 1 is a vector. A bare matrix
    whose name has ``pos``, ``emb``, ``token`` or ``cls`` in it is an embedding.

    Args:
        overrides: regular expression searched in the parameter's name -> role.
    """
    owners: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            if p.requires_grad and (p not in owners or isinstance(module, nn.Embedding)):
                owners[p] = (name, module)
    linear = [p for p, (_, m) in owners.items() if isinstance(m, nn.Linear) and p.ndim == 2]
    groups: dict[str, list[nn.Parameter]] = {}
    for p, (name, module) in owners.items():
        groups.setdefault(_role(p, name, module, linear, overrides or {}), []).append(p)
    return [{"params": params, "role": role, "use_orth": role in ("hidden", "input", "conv")} for role, params in groups.items()]


ROLES = ("input", "hidden", "output", "embedding", "vector", "conv")


def _role(p: nn.Parameter, name: str, module: nn.Module, linear: list[nn.Parameter], overrides: Mapping[str, str]) -> str:
    for pattern, role in overrides.items():
        if role not in ROLES:
            raise BadInput(f"role {role!r} is not one of {ROLES}")
        if re.search(pattern, name):
            return role
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if sum(n > 1 for n in p.shape) < 2:
        return "vector"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if linear and p is linear[-1]:
        return "output"
    if isinstance(module, nn.Linear):
        return "input" if p is linear[0] else "hidden"
    if p.ndim != 2 or re.search("pos|emb|token|cls", name.rpartition(".")[2]):
        return "embedding"
    return "hidden"
