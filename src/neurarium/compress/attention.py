"""Self-attention whose head size is free of the model's width, built of four plain Linear layers.

``torch.nn.MultiheadAttention`` ties ``num_heads * head_dim`` to the width, so it cannot lose a head; and it uses its weights inside one
fused call, where neither hooks nor masks nor quantisers reach them. ``SelfAttention`` computes the same function of the same arguments.

Second derivatives (Hessian traces) need ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` around the call, as every model has that uses
torch's fused attention kernels; per-sample gradients under vmap are faster with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head self-attention, callable as ``torch.nn.MultiheadAttention`` is with query = key = value.

    Args:
        width: features of the input and the output.
        n_heads: heads.
        head_dim: features of a head; width / n_heads if not given.
        causal: each position sees only itself and what came before.
        batch_first: inputs are (batch, time, width), otherwise (time, batch, width).
    """

    in_proj_bias = None  # with the next: what torch's encoder layer asks before it takes its fused path
    _qkv_same_embed_dim = False

    def __init__(
        self,
        width: int,
        n_heads: int,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if width % n_heads:
                raise BadInput(f"width {width} is no multiple of {n_heads} heads; give head_dim")
            head_dim = width // n_heads
        self.num_heads, self.head_dim, self.causal, self.dropout, self.batch_first = n_heads, head_dim, causal, dropout, batch_first
        self.q = nn.Linear(width, n_heads * head_dim, bias=bias)
        self.k = nn.Linear(width, n_heads * head_dim, bias=bias)
        self.v = nn.Linear(width, n_heads * head_dim, bias=bias)
        self.out = nn.Linear(n_heads * head_dim, width, bias=bias)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, time, width) -> (batch, time, width); `mask` is added to the scores."""
        q, k, v = (f(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(-2))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """The output and None (no attention weights). Masks as torch's module takes them: True or -inf = not seen."""
        del average_attn_weights, is_causal  # the second is a hint about attn_mask
        if (key is not None and key is not query) or (value is not None and value is not query):
            raise BadInput("self-attention has one input: key and value must be the query")
        if need_weights:
            raise BadInput("this attention returns no weights: call it with need_weights=False")
        single = query.ndim == 2
        x = query[None] if single else query if self.batch_first else query.transpose(0, 1)
        mask = self._mask(x, attn_mask, key_padding_mask)
        y = self.attend(x, mask)
        return (y[0] if single else y if self.batch_first else y.transpose(0, 1)), None

    def _mask(self, x: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks and causality as one tensor of scores to add, (batch or 1, heads or 1, time, time)."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _scores(attn_mask, x)
            if total.ndim == 3:
                if len(total) != len(x) * self.num_heads:
                    raise BadInput(f"attn_mask has {len(total)} matrices, expected batch * heads = {len(x)} * {self.num_heads}")
                total = total.view(len(x), self.num_heads, *total.shape[1:])
        if padding is not None:
            hidden = _scores(padding, x).view(len(x), 1, 1, -1)
            total = hidden if total is None else total + hidden
        if total is not None and self.causal:
            time = x.shape[1]
            total = total + torch.full((time, time), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        return total

    @classmethod
    @torch.no_grad()
    def of(cls, other: nn.MultiheadAttention, name: str = "MultiheadAttention") -> SelfAttention:
        """The same function with the weights of torch's module (copied)."""
        if not other._qkv_same_embed_dim or other.bias_k is not None or other.add_zero_attn:
            raise UnsupportedModel("attention with kdim, vdim, add_bias_kv or add_zero_attn is not plain self-attention", module=name)
        bias = other.in_proj_bias is not None
        new = cls(other.embed_dim, other.num_heads, bias=bias, dropout=other.dropout, batch_first=other.batch_first)
        new = new.to(other.in_proj_weight).train(other.training)
        for i, part in enumerate((new.q, new.k, new.v)):
            part.weight.copy_(other.in_proj_weight.chunk(3)[i]).requires_grad_(other.in_proj_weight.requires_grad)
            if bias:
                part.bias.copy_(other.in_proj_bias.chunk(3)[i]).requires_grad_(other.in_proj_bias.requires_grad)
        for key, p in other.out_proj.named_parameters():
            getattr(new.out, key).copy_(p).requires_grad_(p.requires_grad)
        return new


def _scores(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(x.dtype)
