"""DynMoLE: a mixture of LoRA experts whose router mixes all of them where it is unsure and runs few where it is sure.

A frozen linear map gets N low-rank experts, and a router that weighs them for each token. How spread its distribution is (its Tsallis
entropy) says how to use it: spread, and all experts are mixed softly; concentrated, and only the experts that hold most of the probability
are run. So the number of experts follows the token and the layer; a loss on the entropy pushes routers to decide.

*Equations.* p = softmax(W_r x), (N,). S_q(p) = (1 - sum_i p_i^q)/(q - 1), for q -> 1 Shannon's entropy; s = S_q(p)/S_q(uniform) in [0, 1].

- *soft*, where s > H: K = all experts, w = p;
- *else*: K = the smallest set of largest p_i that holds at least top_p, and at least top_k experts; w = p on K, renormalised;
- y = base(x) + (alpha/r) sum_{e in K} w_e B_e A_e x;
- *auxiliary loss* of a layer: 1e-2 mean S_q(p) + 1e-3 N sum_e f_e P_e, with f_e the share of tokens that use e (no gradient), P_e the mean
  of p_e over tokens.

With one expert it is LoRA, with H = -inf a dense mixture, with H = inf and top_p = 0 top-k routing (MoLA), with H = inf alone top-p
routing.

*Source.* Li, Wang et al., "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism", arXiv 2504.00661. LoRA:
Hu et al. 2021.

*Departures.* The entropy is compared with H as a share of its maximum, so that H means the same for any N. The values of q, H and the two
coefficients are reconstructed, all are arguments. Experts that a token does not use are not run for it where that saves time, which takes
a certain rank: below it the layer runs all of them on all tokens and weighs them, with the same output, unless ``dispatch="sparse"``.

*Cost.* 2 in out + 2 in N + 2 r (in + out) |K| FLOPs a token, |K| = N in a dense run: ``last_cost``. 512x512, one thread,
microseconds a token, sparse against dense: 6.0 and 5.5 with 2.2 of 8 experts of rank 8, 8.2 and 19.3 with 2.5 of 16 of rank 64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["DynMoLE", "auxiliary_loss", "mole_transform", "tsallis_entropy"]

PAYS = 64  # saved rank for each expert that is run, from which on sparse dispatch is faster


def tsallis_entropy(p: Tensor, q: float) -> Tensor:
    """S_q of distributions ``(..., n)``, ``(...)``; q = 1 is Shannon's entropy in nats.

    Written as -sum p expm1((q - 1) log p)/(q - 1), which loses no digits near q = 1.
    """
    logs = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    return -(p * (logs if q == 1 else torch.expm1((q - 1) * logs) / (q - 1))).sum(-1)


class DynMoLE(nn.Module):
    """A frozen linear map with a mixture of LoRA experts on it, ``(..., in) -> (..., out)``. Starts as the map itself.

    Args:
        base: frozen in place.
        experts: N; a single one has no router.
        rank, alpha, dropout: as in LoRA, for each expert.
        top_p, top_k: of the routing where the router is sure.
        entropic_index: q.
        entropy_threshold: H, a share of the largest entropy; ``-inf`` mixes always, ``inf`` never.
        dispatch: ``"sparse"`` runs an expert on the tokens that use it, ``"dense"`` all on all, ``"auto"`` what is faster for a layer of
            this size. Same output; ``last_cost`` charges what was run.

    ``top_p``, ``top_k``, ``entropy_threshold`` and ``dispatch`` may be set at any time.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        experts: int = 8,
        rank: int = 8,
        alpha: float = 16.0,
        top_p: float = 0.75,
        top_k: int = 2,
        entropic_index: float = 1.2,
        entropy_threshold: float = 0.9,
        dropout: float = 0.05,
        dispatch: Literal["auto", "sparse", "dense"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise UnsupportedModel("experts are added to nn.Linear", module=type(base).__name__)
        if experts < 1 or rank < 1:
            raise BadInput(f"needs at least one expert of rank 1, not {experts} of rank {rank}")
        if not 0 <= top_p <= 1 or not top_k >= 1:
            raise BadInput(f"top_p must lie in [0, 1] and top_k be at least 1, not {top_p} and {top_k}")
        if not entropic_index > 0:
            raise BadInput(f"the entropic index must be positive, not {entropic_index}")
        if dispatch not in ("auto", "sparse", "dense"):
            raise BadInput(f"dispatch must be 'auto', 'sparse' or 'dense', not {dispatch!r}")
        self.base = base.requires_grad_(False)
        self.experts, self.rank, self.scaling = experts, rank, alpha / rank
        self.top_p, self.top_k, self.entropic_index, self.entropy_threshold = top_p, top_k, entropic_index, entropy_threshold
        self.dispatch, self.dropout = dispatch, nn.Dropout(dropout)
        like = base.weight
        self.router = nn.Parameter(like.new_empty(experts, base.in_features)) if experts > 1 else None
        self.down = nn.Parameter(like.new_empty(experts, rank, base.in_features))  # A
        self.up = nn.Parameter(like.new_empty(experts, base.out_features, rank))  # B
        self._routing: tuple[Tensor, Tensor, torch.Size, bool] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts that add nothing yet, a router that is nearly even."""
        bound = 1 / math.sqrt(self.base.in_features)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        if self.router is not None:
            nn.init.normal_(self.router, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if not x.ndim or x.shape[-1] != self.base.in_features:
            raise BadInput(f"expected (..., {self.base.in_features}), not {tuple(x.shape)}")
        z = x.reshape(-1, x.shape[-1])
        y, p = self.base(z), self.probabilities(z)
        used = self.choose(p)
        w = p * used
        w = (w / w.sum(-1, keepdim=True) * self.scaling).to(z.dtype)
        z = self.dropout(z)
        if torch.compiler.is_exporting():  # one graph, the same for all tokens
            return self._dense(y, z, w).view(*x.shape[:-1], -1)
        sparse = self.sparse
        self._routing = p, used, x.shape[:-1], sparse
        y = self._sparse(y, z, w, used) if sparse else self._dense(y, z, w)
        return y.view(*x.shape[:-1], self.base.out_features)

    @property
    def sparse(self) -> bool:
        """Whether an expert is run on the tokens that use it alone.

        Products that are left out save time in proportion to the rank; collecting tokens and adding up outputs takes as long at any rank.
        """
        if self.dispatch == "auto":
            return (self.experts - self.top_k) * self.rank >= PAYS * self.top_k
        return self.dispatch == "sparse"

    def probabilities(self, x: Tensor) -> Tensor:
        """p, ``(tokens, experts)``, in float32 at least: half precision would decide ties between experts by rounding."""
        precise = torch.promote_types(x.dtype, torch.float32)
        if self.router is None:
            return x.new_ones(len(x), 1, dtype=precise)
        return F.linear(x.to(precise), self.router.to(precise)).softmax(-1)

    @torch.no_grad()
    def choose(self, p: Tensor) -> Tensor:
        """Which experts are used, bool, of the shape of p."""
        if self.router is None:
            return torch.ones_like(p, dtype=torch.bool)
        q = self.entropic_index
        most = math.log(self.experts) if q == 1 else (1 - self.experts ** (1 - q)) / (q - 1)
        soft = tsallis_entropy(p, q) / most > self.entropy_threshold
        ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # so the expert that crosses top_p is kept
        keep = (before < self.top_p) | (torch.arange(self.experts, device=p.device) < self.top_k)
        return torch.zeros_like(keep).scatter(-1, order, keep) | soft[..., None]

    def _dense(self, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        """y + sum_e w_e B_e A_e z over all experts, by two products."""
        h = F.linear(z, self.down.flatten(0, 1)).unflatten(1, (self.experts, self.rank)) * w[..., None]
        return torch.addmm(y, h.flatten(1), self.up.transpose(1, 2).flatten(0, 1))

    def _sparse(self, y: Tensor, z: Tensor, w: Tensor, used: Tensor) -> Tensor:
        """The same, each expert on its own tokens; those that use all of them go together."""
        every = used.all(1)
        if every.all():
            return self._dense(y, z, w)
        if every.any():
            which = every.nonzero().squeeze(1)
            y = y.index_copy(0, which, self._dense(y[which], z[which], w[which]))
        users, weights = (used & ~every[:, None]).t().contiguous(), w.t().contiguous()
        for a, b, user, weight in zip(self.down, self.up, users, weights):
            token = user.nonzero().squeeze(1)
            if len(token):
                h = F.linear(z.index_select(0, token), a) * weight.index_select(0, token)[:, None]
                y = y.index_add_(0, token, F.linear(h, b))
        return y

    def _last(self) -> tuple[Tensor, Tensor, torch.Size, bool]:
        if self._routing is None:
            raise BadInput("the layer has not seen any input yet")
        return self._routing

    @property
    def last_active(self) -> Tensor:
        """How many experts each token of the last call used, int64, of the shape of the tokens."""
        _, used, shape, _ = self._last()
        return used.sum(-1).view(shape)

    @property
    def last_probabilities(self) -> Tensor:
        """What the router said about each token of the last call, ``(..., experts)``."""
        p, _, shape, _ = self._last()
        return p.view(*shape, self.experts)

    @property
    def last_cost(self) -> Tensor:
        """FLOPs that each token of the last call really caused, int64."""
        inputs, outputs = self.base.in_features, self.base.out_features
        routing = 0 if self.router is None else 2 * inputs * self.experts
        run = self.last_active if self._last()[3] else torch.full_like(self.last_active, self.experts)
        return 2 * inputs * outputs + routing + run * (2 * self.rank * (inputs + outputs))

    def auxiliary(self, entropy: float = 1e-2, balance: float = 1e-3) -> Tensor:
        """The router's loss on the tokens of the last call."""
        p, used, _, _ = self._last()
        share, mean = used.to(p.dtype).mean(0), p.mean(0)
        return entropy * tsallis_entropy(p, self.entropic_index).mean() + balance * self.experts * (share * mean).sum()

    @torch.no_grad()
    def delta(self, weights: Tensor) -> Tensor:
        """What experts with these ``weights`` (experts,) add to the base's weight: (alpha/r) sum_e w_e B_e A_e, ``(out, in)``."""
        return self.scaling * torch.einsum("e,eor,eri->oi", weights.to(self.up), self.up, self.down)

    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same: there is one only for a single expert."""
        if self.router is not None:
            raise BadInput(f"{self.experts} experts are weighed anew for each token, which no one weight matrix does")
        linear = copy.deepcopy(self.base)
        with torch.no_grad():
            linear.weight += self.delta(torch.ones(1))
        return linear

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_routing": None}  # of the last call: it may carry a graph

    def extra_repr(self) -> str:
        return f"experts={self.experts}, rank={self.rank}, top_p={self.top_p}, top_k={self.top_k}, threshold={self.entropy_threshold}"


def mole_transform(
    model: nn.Module,
    targets: Sequence[str] = ("q", "k", "v", "o", "up", "down"),
    *,
    experts: int | Callable[[str], int] = 8,
    **options: Any,
) -> nn.Module:
    """A copy of ``model``, frozen, with experts on the linear layers that ``targets`` names.

    Args:
        targets: last parts of module names (``"q_proj"`` for many decoders).
        experts: how many, or a function from a module's name to that.
        options: of :class:`DynMoLE`.

    Raises:
        UnsupportedModel: a target is no linear layer, or its parent reads its weight past it.
        BadInput: there is no such target.
    """
    names = {name: m for name, m in model.named_modules(remove_duplicate=False) if name.rpartition(".")[2] in targets}
    if not names:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise BadInput(f"no module is called one of {tuple(targets)}; the linear layers here are called {linear}")
    for name, module in names.items():
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(f"experts are added to nn.Linear, this is {type(module).__name__}", module=name)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise UnsupportedModel(f"{type(parent).__name__} reads its weight and never calls it", module=name)
    model = copy.deepcopy(model).requires_grad_(False)
    made: dict[int, DynMoLE] = {}  # a layer that is used twice stays one
    for name in names:
        path, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        if id(base) not in made:
            count = experts if isinstance(experts, int) else experts(name)
            made[id(base)] = DynMoLE(base, experts=count, **options).train(base.training)
        setattr(model.get_submodule(path), leaf, made[id(base)])
    return model


def auxiliary_loss(model: nn.Module, entropy: float = 1e-2, balance: float = 1e-3) -> Tensor:
    """The sum of the routers' losses on the last batch, to be added to the task's."""
    layers = [m for m in model.modules() if isinstance(m, DynMoLE) and m.router is not None]
    if not layers:
        raise BadInput("this model has no layer with several experts")
    return torch.stack([layer.auxiliary(entropy, balance) for layer in layers]).sum()
