"""A small character GPT in the form of OPT, for experiments that need a language model without a download.

LayerNorm with bias before each part, biased linear maps, ReLU feed-forward, learned positions, the output tied to the embedding. This form
and not Llama's, because its channels have means: methods that replace a channel by its mean, or swap weights by their mean error, have
something to work with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.compress.attention import SelfAttention
from neurarium.errors import BadInput

__all__ = ["GPT", "GPTBlock"]


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + down(relu(up(norm(x))))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, causal=True)
        self.ffn_norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention.attend(self.attention_norm(x))
        return x + self.down(torch.relu(self.up(self.ffn_norm(x))))


class GPT(nn.Module):
    """Logits of the next token at each position: (batch, time) -> (batch, time, vocabulary).

    Args:
        vocabulary: number of tokens.
        width, heads, layers, hidden: sizes; `hidden` (of the feed-forward part) is 4 width if not given.
        context: longest input.
    """

    def __init__(
        self, vocabulary: int, *, width: int = 96, heads: int = 6, layers: int = 3, hidden: int | None = None, context: int = 64
    ) -> None:
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads, hidden or 4 * width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(ids, Tensor) and ids.shape[-1] > self.context:
            raise BadInput(f"{ids.shape[-1]} tokens do not fit the context of {self.context}")
        where = torch.ones_like(ids).cumsum(-1) - 1
        return self.head(self.norm(self.blocks(self.token(ids) + self.position(where))))

    @torch.no_grad()
    def generate(self, ids: Tensor, tokens: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The (batch, time) prompts with `tokens` more: the likeliest each time or, with a generator, drawn."""
        for _ in range(tokens):
            logits = self(ids[:, -self.context :])[:, -1]
            new = logits.argmax(-1, keepdim=True) if generator is None else torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], 1)
        return ids
