"""A recurrent cell whose weights are rewritten at every step by a smaller recurrent cell: dynamic weights.

A hypernetwork of the usual kind makes one set of weights a condition. Here the small cell reads the input and the large cell's state, and
what it emits scales each row of the large cell's matrices and shifts its biases, a new one at each time.

*Equations.* ``(h', c') = LSTM([x; h])``; for each gate g: ``z = A h'``, ``gate = d_h(z) * (W_h h) + d_x(z) * (W_x x) + b(z)``, where
``d_h = 1 + B_h z`` and ``b = b_0 + B_b z``. With ``B = 0`` the large cell is an ordinary LSTM, and so it starts up to ``scale``.

*Source.* Ha, Dai, Le, "HyperNetworks" (2017), the dynamic case of the review arXiv 2306.06955. *Departures.* Scales are written as one
plus a change; no layer normalisation. *Cost.* The small cell, plus ``12 * hidden`` scales and shifts a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DynamicHyperLSTMCell"]

State = tuple[Tensor, Tensor, Tensor, Tensor]


class DynamicHyperLSTMCell(nn.Module):
    """``cell(x, state) -> state``; a state is ``(h, c, small h, small c)``, None at the start.

    Args:
        inputs, hidden: as of ``nn.LSTMCell``.
        small: hidden units of the generating cell.
        embedding: length of z, for each of the twelve signals.
        scale: standard deviation of the B at the start.
    """

    def __init__(self, inputs: int, hidden: int, *, small: int = 16, embedding: int = 4, scale: float = 0.1) -> None:
        super().__init__()
        self.hidden, self.embedding = hidden, embedding
        self.generator = nn.LSTMCell(inputs + hidden, small)
        self.main = nn.LSTMCell(inputs, hidden)  # holds W_x, W_h, b_0; gates in torch's order
        self.signals = nn.Linear(small, 12 * embedding)
        self.maps = nn.Parameter(scale * torch.randn(12, embedding, hidden))

    def forward(self, x: Tensor, state: State | None = None) -> State:
        if state is None:
            zero = x.new_zeros(len(x), self.hidden)
            state = (zero, zero, *(x.new_zeros(len(x), self.generator.hidden_size) for _ in range(2)))
        h, c, small_h, small_c = state
        small_h, small_c = self.generator(torch.cat([x, h], 1), (small_h, small_c))
        z = self.signals(small_h).unflatten(1, (3, 4, self.embedding))
        change = torch.einsum("nkge,kgeh->nkgh", z, self.maps.unflatten(0, (3, 4))).flatten(2)  # (n, 3, 4 hidden)
        main = self.main
        gates = (1 + change[:, 0]) * (h @ main.weight_hh.T) + (1 + change[:, 1]) * (x @ main.weight_ih.T)
        i, f, g, o = (gates + main.bias_ih + main.bias_hh + change[:, 2]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c, small_h, small_c
