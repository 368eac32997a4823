"""A small pre-norm decoder for next-token prediction, the language model that the room's experiments and examples work on.

It keeps the names by which decoders are taken apart here: ``layers``, ``norm``, ``head``, and ``embed(ids)`` for what comes before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput

__all__ = ["Attention", "Decoder", "DecoderLayer"]


class Attention(nn.Module):
    """Multi-head self-attention ``(n, time, width) -> (n, time, width)`` with separate maps ``q``, ``k``, ``v`` and ``o``."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"width {width} cannot be split into {heads} heads")
        self.heads, self.head_dim, self.causal = heads, width // heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.attend(x, past)[0]

    def attend(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and all keys and values ``(n, heads, time, width / heads)`` so far; ``past``: those of earlier positions."""
        q, k, v = (m(x).unflatten(2, (self.heads, self.head_dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = None
        if self.causal and past is not None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and past is None)
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int, heads: int, hidden: int, *, causal: bool = True) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads, causal=causal)
        self.ffn_norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.step(x, past)[0]

    def step(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and the keys and values up to here."""
        y, past = self.attention.attend(self.attention_norm(x), past)
        x = x + y
        return x + self.down(F.gelu(self.up(self.ffn_norm(x)))), past


class Decoder(nn.Module):
    """Logits of the next token at each position, ``(n, time)`` int64 to ``(n, time, vocabulary)``.

    Args:
        vocabulary: number of tokens.
        width, heads, layers, hidden: sizes; ``hidden`` of the feed-forward part is 4 width if not given.
        context: longest input.
    """

    def __init__(
        self, vocabulary: int, *, width: int = 96, heads: int = 4, layers: int = 8, hidden: int | None = None, context: int = 96
    ) -> None:
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden or 4 * width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """``(n, time)`` ids of positions ``start``, ``start + 1``, ... to ``(n, time, width)``."""
        if ids.shape[1] + start > self.context:
            raise BadInput(f"{ids.shape[1] + start} tokens do not fit the context of {self.context}")
        return self.token(ids) + self.position.weight[start : start + ids.shape[1]]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
